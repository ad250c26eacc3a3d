"""A canvas cut into windows, as the baselines of panoramas and videos see it, and the prior's calls on them.

Symbols as in `distillation.multidiffusion`; a track is the windows of one place in all frames, in their order. M
windows, of which a call takes those at `rows` [m].
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from csd3d.canvas.windows import Windows, gather, scatter
from csd3d.distillation.ddim import PredictNoise
from csd3d.distillation.edit import PredictBranches
from csd3d.distillation.multidiffusion import Gather, Scatter, window_shares
from csd3d.errors import InputError
from csd3d.priors import Condition, DiffusersPrior, Prior, edit_branches

Report = Callable[[dict[str, float]], None]
WINDOWS_AT_ONCE = 64  # whose branches are put together for one call of a prior, which splits it as its memory allows


@dataclass(frozen=True)
class Pieces:
    """A source and an instruction, in windows of [C, h, w].

    z_source [F, C, H, W] its latents; condition [F, C, H, W] its *unscaled* posterior modes (`encode_condition`)
    text: the instruction; null: "" (one row each)
    words [L] bool: which tokens of the text are words (`instruction_words`)
    gather, scatter: canvas to windows and the adjoint; weights [1 | M, 1, h, w]: how much windows count in their mean
    tracks: indices of windows (`window_tracks`)
    """

    z_source: Tensor
    condition: Tensor
    text: Condition
    null: Condition
    words: Tensor
    gather: Gather
    scatter: Scatter
    weights: Tensor
    tracks: list[Tensor]

    def merge(self, windows: Tensor) -> Tensor:
        """The canvas [F, C, H, W] of windows [M, C, h, w], averaged where they overlap."""
        return self.scatter(window_shares(self.weights, self.z_source, self.gather, self.scatter) * windows)


def window_pieces(
    prior: DiffusersPrior,
    z_source: Tensor,
    condition: Tensor,
    prompt: str,
    windows: Windows,
    weights: Tensor,
) -> Pieces:
    """A canvas under `windows` that cover it, and its instruction."""
    return Pieces(
        z_source=z_source,
        condition=condition,
        text=prior.condition([prompt]),
        null=prior.condition([""]),
        words=instruction_words(prior, prompt),
        gather=lambda canvas: gather(canvas, windows),
        scatter=lambda patches: scatter(patches, windows, tuple(z_source.shape)),
        weights=weights,
        tracks=window_tracks(windows.frame, windows.top, windows.left),
    )


def instruction_words(prior: DiffusersPrior, prompt: str) -> Tensor:
    """[L] bool: the tokens of `prompt` that are neither its start, its end nor padding.

    Raises InputError where the text encoder, and its tokenizer with it, was freed before.
    """
    if "tokenizer" not in prior.text.parts:
        raise InputError("prior.drop_text_encoder: the tokenizer is freed; find words before, or set it false")
    position = torch.arange(prior.condition([prompt]).text.shape[1])
    count = len(prior.tokenizer(prompt, truncation=True, max_length=len(position)).input_ids)
    return (position > 0) & (position < count - 1)


def window_tracks(frame: Tensor, top: Tensor, left: Tensor) -> list[Tensor]:
    """The windows at each (top, left) in the order of their frames, for windows given by these, [M] each."""
    places = torch.stack([top, left], dim=1).unique(dim=0)
    at = [((top == y) & (left == x)).nonzero().flatten() for y, x in places.tolist()]
    return [rows[frame[rows].argsort(stable=True)] for rows in at]


def window_predictor(prior: Prior, pieces: Pieces) -> PredictBranches:
    """The `predict` of `guided_predictor` for the windows of `pieces`."""
    conditions = branch_conditions(pieces)

    def call(z_stack: Tensor, t: int, branches: tuple[str, ...], rows: Tensor) -> Tensor:
        by_name = conditions(rows)
        return prior.predict_noise(z_stack, t, Condition.cat([by_name[branch] for branch in branches]))

    return call


def frame_predictor(
    prior: DiffusersPrior, pieces: Pieces, begin: Callable[[tuple[str, ...], int], None]
) -> PredictBranches:
    """As `window_predictor`, in calls of one micro batch each, announced by `begin(branches, first frame of the call)`.

    A call holds as many branches as the micro batch takes, and of their frames as many as then fit, in rising order.
    """
    conditions = branch_conditions(pieces)

    def call(z_stack: Tensor, t: int, branches: tuple[str, ...], rows: Tensor) -> Tensor:
        latents, by_name = dict(zip(branches, z_stack.chunk(len(branches)), strict=True)), conditions(rows)
        eps = {branch: [] for branch in branches}
        for groups, part in _micro_batches(branches, len(rows), prior.micro_batch):
            begin(groups, int(part[0]))
            z_t = torch.cat([latents[group][part] for group in groups])
            condition = Condition.cat([by_name[group][part] for group in groups])
            found = prior.predict_noise(z_t, t, condition).chunk(len(groups))
            for group, one in zip(groups, found, strict=True):
                eps[group].append(one)
        return torch.cat([torch.cat(eps[branch]) for branch in branches])

    return call


def branch_conditions(pieces: Pieces) -> Callable[[Tensor], dict[str, Condition]]:
    """A function of `rows` [m]: the conditions of their branches by name, m rows each."""
    image = pieces.gather(pieces.condition)

    def of_rows(rows: Tensor) -> dict[str, Condition]:
        found = edit_branches(pieces.text, pieces.null, image[rows])
        return dict(zip(("null", "image", "full"), found, strict=True))

    return of_rows


def reported(predict: PredictNoise, report: Report) -> PredictNoise:
    """`predict` that reports its t before every call."""

    def call(z_t: Tensor, t: int) -> Tensor:
        report({"t": float(t)})
        return predict(z_t, t)

    return call


def _micro_batches(branches: tuple[str, ...], frames: int, size: int) -> list[tuple[tuple[str, ...], Tensor]]:
    """Groups and frames of the calls, of at most `size` rows."""
    together = min(len(branches), size)
    groups = [branches[i : i + together] for i in range(0, len(branches), together)]
    return [(group, part) for group in groups for part in torch.arange(frames).split(size // together)]
