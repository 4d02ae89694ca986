"""Reference log-probs of rows: two columns that ``score`` writes, checked against the tokens that they are of."""

from __future__ import annotations

import base64
import hashlib
from typing import Any

import numpy as np

from dft_lightning.data.rows.checks import BadRow
from dft_lightning.errors import InputError
from dft_lightning.losses.base import IGNORE_INDEX

LOG_PROB = "reference_log_prob"
FINGERPRINT = "reference_fingerprint"

Floats = np.ndarray[Any, np.dtype[np.float32]]
Integers = np.ndarray[Any, np.dtype[np.int32]]


def read_reference(row: dict[str, Any]) -> tuple[str, str] | None:
    """A row's log-probs, float32 in base64 (their digits would take several times the room), and fingerprint.

    Returns:
        Both, or ``None`` where the row has neither.

    Raises:
        BadRow: one without the other, or values that are none.
    """
    values, fingerprint = row.get(LOG_PROB), row.get(FINGERPRINT)
    if values is None and fingerprint is None:
        return None
    if values is None or fingerprint is None:
        lacking, other = (LOG_PROB, FINGERPRINT) if values is None else (FINGERPRINT, LOG_PROB)
        raise BadRow(f"{lacking}: missing beside {other}: run score again, which writes both")
    if not isinstance(fingerprint, str):
        raise BadRow(f"{FINGERPRINT}: expected a string, got {type(fingerprint).__name__}")
    if not isinstance(values, list) or not set(map(type, values)) <= {int, float}:
        kind = "a list with others in it" if isinstance(values, list) else type(values).__name__
        raise BadRow(f"{LOG_PROB}: expected a list of numbers, got {kind}")
    try:
        with np.errstate(over="ignore"):
            log_prob = np.array(values, np.float64).astype("<f4")
    except OverflowError:
        raise BadRow(f"{LOG_PROB}: has a whole number beyond what floats hold") from None
    wrong = np.flatnonzero(~(np.isfinite(log_prob) & (log_prob <= 0)))
    if wrong.size:
        raise BadRow(f"{LOG_PROB}[{wrong[0]}]: {values[wrong[0]]}, which is no log-prob")
    return base64.b64encode(log_prob.tobytes()).decode(), fingerprint


def fingerprint_of(input_ids: Integers, labels: Integers, piece_length: int | None) -> str:
    """What ties log-probs to a row as the model saw it.

    Args:
        input_ids: ``[T]``, all tokens of the row, before any are cut off.
        labels: ``[T]``, -100 where there is no target.
        piece_length: tokens of the pieces that longer rows are cut into, each with no context but its own; ``None``
            where they are not. It is in the fingerprint of the rows that are cut.
    """
    content = np.asarray(input_ids, "<i4").tobytes() + np.asarray(labels, "<i4").tobytes()
    digest = hashlib.sha256(content).hexdigest()[:32]
    return digest if piece_length is None or len(input_ids) <= piece_length else f"{digest}/{piece_length}"


def aligned_reference(
    log_prob: str,
    fingerprint: str,
    input_ids: Integers,
    labels: Integers,
    max_length: int | None,
    piece_length: int | None,
) -> Floats:
    """Log-probs at the tokens that they are of.

    Args:
        log_prob: of the row's first targets, in order, as :func:`read_reference` returns them.
        fingerprint: of the row as it was scored.
        input_ids: ``[T]``, all tokens of the row as it is now.
        labels: ``[T]``, likewise.
        max_length: how many of them are kept; ``None`` for all.
        piece_length: see :func:`fingerprint_of`.

    Returns:
        ``[min(T, max_length)]``, float32, 0 where there is no target.

    Raises:
        InputError: they are of another row, or of fewer targets than are kept, or were scored with another context.
    """
    digest, _, scored = fingerprint.partition("/")
    if digest != fingerprint_of(input_ids, labels, None) or (scored and not scored.isdecimal()):
        raise InputError(
            f"{LOG_PROB}: scored with another tokenizer, template or masking, or the row was changed since: run score "
            "again"
        )
    values = np.frombuffer(base64.b64decode(log_prob), "<f4")
    places = np.flatnonzero(labels != IGNORE_INDEX)
    if len(values) > len(places):
        raise InputError(f"{LOG_PROB}: {len(values)} log-probs, and the row has {len(places)} targets: run score again")
    size = len(input_ids) if max_length is None else min(len(input_ids), max_length)
    places = places[places < size]
    _check_context(int(scored) if scored else None, _cut(len(input_ids), piece_length), places)
    if len(values) < len(places):
        raise InputError(
            f"{LOG_PROB}: of the first {len(values)} targets, and {len(places)} are kept here: it was scored with a "
            "smaller data.text.max_length: run score again with this one"
        )
    found = np.zeros(size, np.float32)
    found[places] = values[: len(places)]
    return found


def _cut(length: int, piece_length: int | None) -> int | None:
    return None if piece_length is None or length <= piece_length else piece_length


def _check_context(scored: int | None, own: int | None, places: np.ndarray[Any, Any]) -> None:
    """Up to the first cut of either all tokens have the same before them, and beyond it others."""
    cuts = [cut for cut in (scored, own) if cut is not None]
    if scored == own or not places.size or places[-1] < min(cuts):
        return
    described = ["whole" if cut is None else f"in pieces of {cut} tokens" for cut in (scored, own)]
    raise InputError(
        f"{LOG_PROB}: the row was scored {described[0]} and is {described[1]} here: run score again with this "
        "data.batches.packing and data.text.max_length"
    )
