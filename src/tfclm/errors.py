"""The one error for what a user gave: a command prints it as one line and exits with code 2."""


class InputError(ValueError):
    """Input that cannot be used; the message names what is wrong (file, line, column, flag) and what would be right."""
