"""The lines of a run that is not done yet: kept as they come, put in order at the end."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from dft_lightning.errors import InputError
from dft_lightning.files import add_lines, open_alone, replacing

Job = tuple[int, int]


class PartialFile:
    """``FILE.partial``: a line with the run's options, then the lines of whole batches in their order.

    A run of the same options goes on where the last one stopped: lines of a batch that is not whole, the last one cut
    perhaps, are dropped.

    Args:
        output: the file to make.
        options: what decides the lines, by the name that a message calls it.
        batches: the (prompt, sample) of each batch's lines.
        overwrite: begin anew where the partial file is of other options.

    Attributes:
        batches_done: whole ones in the file.

    Raises:
        InputError: it is of other options, is none, cannot be written, or another process is writing it.
    """

    def __init__(
        self, output: Path, options: dict[str, Any], batches: Sequence[Sequence[Job]], overwrite: bool
    ) -> None:
        self.output = output
        self.path = output.with_name(f"{output.name}.partial")
        self.batches = batches
        self.batches_done = 0
        self._file = self._open()
        try:
            self._go_on(options, overwrite)
        except BaseException:
            self._file.close()
            raise

    def _open(self) -> BinaryIO:
        try:
            return open_alone(self.path)
        except BlockingIOError:
            raise InputError(f"--output: another sample is writing {self.path}") from None
        except OSError as error:
            raise self._not_written(error) from error

    def _not_written(self, error: OSError) -> InputError:
        return InputError(f"--output: {self.path} cannot be written: {error.strerror}")

    def _go_on(self, options: dict[str, Any], overwrite: bool) -> None:
        options = json.loads(json.dumps(options))  # as they are read back
        self._file.seek(0)
        first = self._file.readline()
        torn = not first.endswith(b"\n") and _HEADER.startswith(first[: len(_HEADER)])  # its writer ended there
        problem = None if torn else _differs(first, options)
        if problem is not None and not overwrite:
            raise InputError(f"--output: {self.path} {problem}, or --overwrite to begin anew")
        if problem is None and not torn:
            self._drop_what_is_not_whole()
            return
        self._file.truncate(0)
        self._write([{"options": options}])

    def _drop_what_is_not_whole(self) -> None:
        end = self._file.tell()
        for batch in self.batches:
            lines = [self._file.readline() for _ in batch]
            if [_job_of(line) for line in lines] != list(batch):
                break
            end += sum(map(len, lines))
            self.batches_done += 1
        self._file.truncate(end)

    @property
    def lines_done(self) -> int:
        """Lines of the whole batches."""
        return sum(map(len, self.batches[: self.batches_done]))

    def append(self, lines: Sequence[dict[str, Any]]) -> None:
        """Add the next batch's lines.

        Raises:
            InputError: they cannot be written.
        """
        self._write(lines)
        self.batches_done += 1

    def _write(self, records: Sequence[dict[str, Any]]) -> None:
        try:
            add_lines(self._file, records)
        except OSError as error:
            raise self._not_written(error) from error

    def lines(self) -> Iterator[dict[str, Any]]:
        """All lines, by prompt and sample."""
        return (json.loads(text) for text in self._texts())

    def _texts(self) -> list[bytes]:
        self._file.seek(0)
        self._file.readline()  # the options
        return [text for _, text in sorted(zip(chain.from_iterable(self.batches), self._file, strict=False))]

    def finish(self) -> None:
        """Put the lines in order into the output, and take the partial file away.

        Raises:
            InputError: the output cannot be written.
        """
        try:
            with replacing(self.output) as file:
                for text in self._texts():
                    file.write(text.decode())
            self.path.unlink()
        except OSError as error:
            raise InputError(f"--output: {self.output} cannot be written: {error.strerror}") from error

    def close(self) -> None:
        """Let another process have it."""
        self._file.close()


_HEADER = b'{"options": {'


def _differs(first: bytes, options: dict[str, Any]) -> str | None:
    """What sets a partial file's first line apart from these options, as a message has it."""
    try:
        begun = dict(json.loads(first)["options"])
    except (ValueError, TypeError, KeyError):
        return "is there and is none of sample: give another file"
    for name in options:
        if begun.get(name) == options[name]:
            continue
        if name.startswith("the "):
            return f"was begun with other {name.removeprefix('the ')}: give them again"
        return f"was begun with {name} {begun.get(name)}, and it is {options[name]} now: give that again"
    return None


def _job_of(text: bytes) -> Job | None:
    """Of which prompt and sample a line is; ``None`` for one that is cut or missing."""
    try:
        line = json.loads(text) if text.endswith(b"\n") else None
        return None if line is None else (line["index"], line["sample"])
    except (ValueError, TypeError, KeyError):
        return None
