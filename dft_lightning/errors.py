"""Mistakes of a user's input, told apart from faults of the program."""


class InputError(ValueError):
    """Something a user gave is wrong: a file, a row, an option. The message says what, where and what to do.

    The command prints the message alone and exits with status 2.
    """


def one_line(error: Exception, limit: int = 300) -> str:
    """An error's text on one line, cut to ``limit`` characters; its type where it has no text."""
    return shortened(" ".join(str(error).split()) or type(error).__name__, limit)


def shortened(text: str, limit: int = 1000) -> str:
    """A text cut to ``limit`` characters: what it quotes of a row may be megabytes."""
    return text if len(text) <= limit else text[:limit] + " ..."
