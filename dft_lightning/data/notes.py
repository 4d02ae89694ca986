"""What is said, once, of the rows of a source: how many have something that a reader should know of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from dft_lightning.errors import printable, shortened

KINDS = {
    "unread": ("not read: {}", False),
    "steering": ("not read, though it steers other trainers: {}", True),
    "left to the template": ("message keys that only the chat template may read: {}", False),
    "numbers": ("numbers, read as the text that JSON writes: {}", False),
    "joined": ("made one message each: {}", False),
    "dropped": (
        "the chat template leaves out {}: set data.text.chat_template to one that writes them (a thought may also "
        "stand in the content, as <think>...</think>)",
        True,
    ),
    "unread variables": ("chat_template_kwargs that the chat template does not read: {}", True),
    "special tokens": ("spelled by rows, as text: {} (data.text.allow_special_tokens makes them control)", False),
    "allowed special tokens": ("spelled by rows, as control: {}", False),
    "long": ("rows of more tokens than the model has positions, {}: it was not trained on what is beyond", True),
    "weighted by": ("the column {} weights the rows' losses (another by data.rows.weight_column)", False),
    "each": (
        "the chat template rewrites earlier turns: a row is made of each assistant turn, as data.text.train_turns: "
        "each does: {}",
        False,
    ),
}
"""By kind: what is said of the names with their counts of rows, and whether it is a warning."""


_MOST, _MOST_KEPT = 20, 1000  # names: of a line, and of all that are told apart


def _shown(name: str) -> str:
    """A name as a terminal takes it."""
    return shortened(printable(" ".join(name.split())).encode("utf-8", "backslashreplace").decode(), 100)


WHOLE = -1  # the part of a source that notes on tokens are of: they are of all parts


class Notes:
    """Counts of rows by kind and name; see :data:`KINDS`.

    Example:
        >>> notes = Notes()
        >>> notes.add("unread", ["id", "source"]); notes.add("unread", ["id"])
        >>> notes.lines("rows.jsonl")
        [('rows.jsonl: not read: id (2 rows), source (1 row)', False)]
    """

    def __init__(self, counts: Iterable[tuple[str, str, int]] = ()) -> None:
        self._counts: Counter[tuple[str, str]] = Counter()
        for kind, name, count in counts:
            self._counts[kind, name] += count

    def add(self, kind: str, names: Iterable[str]) -> None:
        """Count a row for each of the names."""
        assert kind in KINDS, kind
        for name in names:
            known = len(self._counts) < _MOST_KEPT or (kind, name) in self._counts
            self._counts[kind, name if known else "others"] += 1

    def update(self, other: Notes) -> None:
        """Add another's counts."""
        self._counts.update(other._counts)

    def plain(self) -> list[tuple[str, str, int]]:
        """What ``Notes`` takes, and JSON holds."""
        return [(kind, name, count) for (kind, name), count in self._counts.items()]

    def __bool__(self) -> bool:
        return bool(self._counts)

    def lines(self, source: str, counted: bool = True) -> list[tuple[str, bool]]:
        """A line for each kind that there is, with the counts or without, and whether it is a warning."""
        found = []
        for kind, (text, warns) in KINDS.items():
            names = [(name, count) for (other, name), count in self._counts.items() if other == kind]
            if names:
                rows = [f" ({count} row{'s' if count > 1 else ''})" if counted else "" for _, count in names]
                named = [f"{_shown(name)}{count}" for (name, _), count in zip(names, rows, strict=True)]
                more = f" and {len(names) - _MOST} others" if len(names) > _MOST else ""
                found.append((f"{source}: {text.format(', '.join(named[:_MOST]) + more)}", warns))
        return found
