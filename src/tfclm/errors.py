"""The one error for what a user gave: a command prints it as one line and exits with code 2."""


class InputError(ValueError):
    """Input that cannot be used; the message names what is wrong (file, line, column, flag) and what would be right."""


def first_line(error: BaseException) -> str:
    """The type of an error and the first line that says something, of a message that may have many."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
