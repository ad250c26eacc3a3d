"""How long the rest of a run will take, guessed from the phases that are done."""

import time
from collections.abc import Callable, Mapping

SHORTEST = 1.0  # seconds; shorter phases say nothing about the pace
LEAST = 0.1  # share of all costs that must be done before anything is said


class Outlook:
    """The pace of a run: seconds for each unit of what its phases are expected to cost.

    outlook = Outlook({"reconstruct": 1, "csd_edit": 2, "video": 0.5})
    outlook.begin("reconstruct")         # None: nothing is known yet
    outlook.begin("csd_edit")            # 2.5 times as long as the reconstruction has taken

    Phases that the costs do not name cost nothing. A phase counts from its `begin` to the next one's.
    """

    def __init__(self, costs: Mapping[str, float], clock: Callable[[], float] = time.monotonic) -> None:
        self.costs, self.clock = dict(costs), clock
        self.seconds = self.paid = 0.0
        self.now: tuple[float, float] | None = None  # the present phase: when it began, and what it costs

    def begin(self, name: str, share: float = 1.0) -> float | None:
        """The seconds until the run ends, as the phase `name` begins; None until enough has been timed.

        share: of that phase, what is left to do in a run that was resumed.
        """
        if self.now is not None:
            began, cost = self.now
            if self.clock() - began >= SHORTEST and cost > 0:
                self.seconds, self.paid = self.seconds + self.clock() - began, self.paid + cost
        names = list(self.costs)
        after = names[names.index(name) + 1 :] if name in names else []
        cost = share * self.costs.get(name, 0.0)
        self.now = self.clock(), cost
        left = cost + sum(self.costs[each] for each in after)
        return self.seconds / self.paid * left if self.paid > LEAST * (self.paid + left) else None
