"""The one exception a user's mistake raises: `launch.py` prints its single line and exits with 2."""


class InputError(ValueError):
    """Bad input from outside: says in one line what was wrong, where (file and key), and what would be right."""
