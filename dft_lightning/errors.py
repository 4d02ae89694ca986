"""Mistakes of a user's input, told apart from faults of the program."""


class InputError(ValueError):
    """Something a user gave is wrong: a file, a row, an option. The message says what, where and what to do.

    The command prints the message alone and exits with status 2.
    """


def one_line(error: Exception, limit: int = 300) -> str:
    """An error's text on one line, cut to ``limit`` characters; its type where it has no text."""
    return shortened(" ".join(str(error).split()) or type(error).__name__, limit)


def printable(text: str) -> str:
    """A text without what a terminal would obey: a file's names may be in it."""
    return text.translate(_CONTROLS)


_CONTROLS = {code: f"\\x{code:02x}" for code in [*range(0x20), *range(0x7F, 0xA0)] if chr(code) not in "\t\n"}


def shortened(text: str, limit: int = 1000) -> str:
    """A text cut to ``limit`` characters: what it quotes of a row may be megabytes."""
    return text if len(text) <= limit else text[:limit] + " ..."
