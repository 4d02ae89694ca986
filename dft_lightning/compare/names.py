"""Names of losses as they stand in the names of folders and files."""

from __future__ import annotations

import re


def slug_of(name: str) -> str:
    """A name as it stands in a folder's name.

    Example:
        >>> slug_of("CE, then DFT")
        'ce-then-dft'
    """
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
