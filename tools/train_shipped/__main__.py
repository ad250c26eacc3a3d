"""`python -m tools.train_shipped PART`: `gpu` (`tools.train_shipped.gpu`) or one of `tools.train_shipped.commands`."""

import sys
import time

STARTED = time.monotonic()  # before torch is imported: a budget in minutes counts from here


def main(arguments: list[str] | None = None) -> int:
    """Run one part, importing only that part: training needs none of the libraries of the evaluation."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["gpu"]:
        from tools.train_shipped import gpu

        return gpu.main(arguments[1:], STARTED)
    from tools.train_shipped import commands

    return commands.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
