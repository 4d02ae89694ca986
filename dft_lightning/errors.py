"""Mistakes of a user's input, told apart from faults of the program."""


class InputError(ValueError):
    """Something a user gave is wrong: a file, a row, an option. The message says what, where and what to do.

    The command prints the message alone and exits with status 2.
    """
