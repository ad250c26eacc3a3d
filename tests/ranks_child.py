"""Runs one job by 1, 2 and 4 processes, and by 2 of which one dies; prints the exit codes. For test_ranks.py.

`python ranks_child.py CONFIG OUT`. The processes are forked from this one, so that everything is imported once.
"""

import os
import socket
import sys
from pathlib import Path

import launch
from csd3d import ranks
from csd3d.priors import messages


def together(count: int, argv: list[str], error: Path, dies: int | None = None) -> list[int]:
    """The exit codes of `count` ranks that run launch.py; rank `dies` is killed when it is asked for a second time."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(count):
        if (child := os.fork()) == 0:
            values = (str(rank), str(count), "127.0.0.1", str(port))
            os.environ |= dict(zip(ranks.VARIABLES, values, strict=True))
            os.dup2(os.open(f"{error}.{rank}", os.O_CREAT | os.O_WRONLY), 2)
            if rank == dies:
                die_at_second_request()
            os._exit(launch.main(argv))
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def die_at_second_request() -> None:
    """Let this process be killed when rank 0 asks it for the second time."""
    receive, asked = messages.receive, []

    def dying(*args):
        message = receive(*args)
        asked.append(message)
        if sum(map(bool, asked)) == 2:
            os.kill(os.getpid(), 9)
        return message

    messages.receive = dying


config, out = sys.argv[1], Path(sys.argv[2])
print(1, [launch.main(["--config", config, "--output", str(out / "1")])])  # imports all that the others need
for count in (2, 4):
    print(count, together(count, ["--config", config, "--output", str(out / f"{count}")], out / f"error{count}"))
dying = together(2, ["--config", config, "--output", str(out / "dying")], out / "dying-error", dies=1)
print("dying", dying, flush=True)
print("resumed", together(2, ["--resume", str(out / "dying")], out / "resumed-error"))
