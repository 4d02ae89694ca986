"""Where the commands of this room show what they found."""

from __future__ import annotations

from typing import Any

from rich.console import Console


def new_console(**options: Any) -> Console:
    """A console that takes words as they are: names of sources may have [brackets] and :colons:."""
    return Console(markup=False, emoji=False, highlight=False, **options)
