"""The exception that a user's mistake raises: `launch.py` prints its line and exits with 2."""


class InputError(ValueError):
    """Bad input from outside: says in one line what was wrong, where (file and key), and what would be right."""


class InputErrors(InputError):
    """Several mistakes at once, each in a line of its own."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines
