"""The splits of a data module: their sources read, tokenised and checked, each once."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from dft_lightning.data.batches.collating import ItemRows, PackedRows
from dft_lightning.data.batches.packing import Packs, pack_documents
from dft_lightning.data.batches.streaming import Stream
from dft_lightning.data.options import BatchOptions, RowOptions, StreamOptions, TextOptions
from dft_lightning.data.requirements import Run, check_lengths
from dft_lightning.data.rows.forms import Conversation, LastTurn, Reading
from dft_lightning.data.rows.reading import Conversations, RowReader, read_messages, validation_positions
from dft_lightning.data.rows.sources import RowSource, as_source
from dft_lightning.data.text.cache import RowCounts, TokenizedRows, column_of, tokenized
from dft_lightning.data.text.preparation import PartOfRows, Preparation, SourceRows, Spool
from dft_lightning.data.text.tokens import ConversationEncoder
from dft_lightning.errors import InputError
from dft_lightning.foreign.datasets import cache_folder
from dft_lightning.metrics.exact_sums import MAX_SOURCES
from dft_lightning.models.row_checks import Positions

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

SPLITS_OF_STAGE = {
    "fit": ("train", "validation", "forgetting", "test"),  # whose bad rows end a run before it is trained
    "validate": ("validation", "forgetting"),
    "test": ("test",),
    "predict": ("predict",),
}
_LAST_TURN: dict[str, LastTurn] = {"test": "assistant", "predict": "optional"}


class Owner(Protocol):
    """What the splits need of their data module."""

    sources: dict[str, Any]
    validation_fraction: float
    rows: RowOptions
    text: TextOptions
    batches: BatchOptions
    streaming: StreamOptions | None
    batch_size: int
    num_proc: int | None

    def run(self) -> Run: ...

    def load_tokenizer(self) -> PreTrainedTokenizerBase: ...


class Splits:
    """Tokenised rows by split: those that are loaded, which ``in`` tells.

    Args:
        data: whose options count, and whose tokenizer.

    Attributes:
        counts: what became of each split's rows.
        source_names: of all mixtures, whose losses are logged apart.
        packs: the packed training rows.
        names: of the splits' entries in the cache; those of another process are taken over.
    """

    def __init__(self, data: Owner) -> None:
        self._data = data
        self.counts: dict[str, RowCounts] = {}
        self.source_names: list[str] = []
        self.packs: Packs | None = None
        self.names: dict[str, str] = {}
        self._rows: dict[str, Dataset] = {}
        self._referenced: set[str] = set()  # the splits whose rows have reference log-probs
        self._source_index: dict[str, list[int]] = {}
        self._encoders: dict[tuple[int | None, bool], ConversationEncoder] = {}
        self._said: set[str] = set()
        self._spool: Spool | None = None
        self._positions: Positions | None = None
        self._measured: set[tuple[str, Positions]] = set()

    def __contains__(self, split: object) -> bool:
        return split in self._rows

    # -- what is loaded ------------------------------------------------------------------------------------------------

    def tokenized(self, split: str) -> Dataset:
        """A loaded split's rows, with the columns of :class:`~dft_lightning.data.text.cache.TokenizedRows`."""
        return self._rows[split]

    def lengths(self, split: str, column: str = "input_ids") -> Tensor:
        """Tokens of each row of a split, or of its ``prompt_ids``."""
        import pyarrow.compute

        lengths = pyarrow.compute.list_value_length(column_of(self._rows[split], column))
        return torch.from_numpy(lengths.to_numpy().copy())

    def sources_of(self, split: str) -> list[str]:
        """Names of the sources that a split is mixed from; none of a single one."""
        return [self.source_names[i] for i in self._source_index[split]]

    def source_index(self, split: str) -> list[int] | None:
        """The place of each part of a split's mixture among the names of all; ``None`` of a single source."""
        return self._source_index.get(split) or None

    def answers(self, split: str, limit: int | None = None) -> list[str | None]:
        """What the completions of a split are scored against: the final assistant turn of the first ``limit`` rows."""
        rows = self._rows[split]
        return list(rows["answer"][: len(rows) if limit is None else limit])

    def problems(self, split: str, limit: int | None = None) -> list[str]:
        """Prompt and answer of the first ``limit`` rows of a split, to tell whether two runs had the same."""
        prompts = self._rows[split]["prompt"]
        answers = self.answers(split, limit)
        return [f"{prompt}{answer}" for prompt, answer in zip(prompts[: len(answers)], answers, strict=True)]

    def dataset(
        self, split: str, pad_token_id: int, *, with_prompts: bool, limit: int | None, packs: Packs | None
    ) -> Any:
        """A split's rows, or its packs, for a loader; see :class:`~.collating.ItemRows`.

        Raises:
            InputError: prompts are wanted, and there are none.
        """
        rows: Any = self._rows[split]
        if limit is not None:
            rows = rows.select(range(min(limit, len(rows))))
        if with_prompts and "" in rows["prompt"]:
            raise InputError(f"data.{split}: plain text has no prompt to generate from: give rows of another form")
        referenced = split in self._referenced
        if packs is None:
            return ItemRows(rows, pad_token_id, referenced)
        return PackedRows(rows, packs, pad_token_id, referenced)

    # -- loading -------------------------------------------------------------------------------------------------------

    def load(self, split: str, *, required: bool) -> None:
        """Tokenised rows of a split, where it is not there yet and there is one, or one is required.

        Raises:
            InputError: anything wrong with its rows.
        """
        data = self._data
        if split in self._rows:
            return
        if split == "train" and data.streaming is not None:
            self._check_stream()
            return
        if not self._is_there(split, required):
            return
        preparation = self._preparation(split)
        found = self._tokenized(split, preparation)
        self.names[split] = found.name
        if split == "train" and data.validation_fraction:
            found = found.without(self._validation_rows(found.read))
        self._say(split, preparation, found)
        self._check_rows(split, found.rows)
        self._name_sources(split, preparation.source.parts)
        self._rows[split] = found.rows
        if split == "train" and data.batches.packing is not None:
            self.packs = self._pack()

    def follow(self, names: dict[str, str]) -> None:
        """Take the rows that the first process has prepared, without reading any here.

        Raises:
            InputError: this machine has prepared others.
        """
        for split, name in names.items():
            self._check_name(split, self.names.setdefault(split, name), name)

    @staticmethod
    def _check_name(split: str, own: str, name: str | None) -> None:
        if name not in (None, own):
            raise InputError(
                f"data.{split}: this machine's rows, tokenizer or versions differ from those of the first process"
            )

    def _key(self, split: str) -> str:
        """What has a split's rows."""
        part = split == "validation" and self._data.validation_fraction
        return f"data.{'train' if part else split}"

    def _is_there(self, split: str, required: bool) -> bool:
        data = self._data
        divided = split == "validation" and data.sources[split] is None and data.validation_fraction > 0
        if divided and data.sources["train"] is None:
            raise InputError("data.train is not set, so data.validation_fraction has nothing to divide")
        if required and data.sources[split] is None and not divided:
            raise InputError(f"data.{split} is not set" + (", nor data.test" if split == "predict" else ""))
        return divided or data.sources[split] is not None

    def _tokenized(self, split: str, preparation: Preparation) -> TokenizedRows:
        name, num_proc = self.names.get(split), self._data.num_proc
        found = tokenized(preparation, name=name, num_proc=num_proc, desc=f"Tokenising {split} rows")
        self._check_name(split, found.name, name)
        return found

    def _preparation(self, split: str) -> Preparation:
        """What makes the tokens of a split: of ``validation`` as a part of ``train`` those of its rows alone."""
        data = self._data
        part = split == "validation" and data.sources[split] is None
        source = self.source("train" if part else split)
        reading = Reading(data.rows, _LAST_TURN.get(split, "any"))
        return Preparation(
            source,
            reading,
            partial(self._rows_to_read, split, source, reading),
            self.encoder(split),
            with_prompts=split != "train",
            # Generation needs no target: a row too long to learn from is still a problem to solve.
            keep_all=split in ("test", "predict"),
            part=[data.validation_fraction, data.batches.seed_of_split] if part else [],
        )

    def _rows_to_read(self, split: str, source: RowSource, reading: Reading) -> SourceRows | Spool | PartOfRows:
        check = None if split == "predict" else partial(self._data.run().check_first, split, self._key(split))
        rows = SourceRows(source, reading, check)
        if split not in ("train", "validation") or not self._data.validation_fraction:
            return rows
        if self._spool is None:
            self._spool = Spool(rows, cache_folder())
        spool = self._spool
        return spool if split == "train" else PartOfRows(spool, self._validation_rows(spool.total))

    def forget_read(self) -> None:
        """Let go of what is kept on disk for splits that are loaded together."""
        if self._spool is not None:
            self._spool.close()
            self._spool = None

    def _validation_rows(self, total: int) -> set[int]:
        return validation_positions(total, self._data.validation_fraction, self._data.batches.seed_of_split)

    def read(self, split: str) -> Conversations:
        """A split's rows as messages, not yet tokens.

        Raises:
            InputError: there is no such split, or it has bad rows.
        """
        data = self._data
        self._is_there(split, required=True)
        divided = data.validation_fraction > 0 and split in ("train", "validation")
        found = read_messages(self.source("train" if divided else split), self.reading(split))
        if not divided:
            return found
        chosen = self._validation_rows(len(found) + found.problems.count)
        return found.at(lambda position: (position in chosen) == (split == "validation"))

    def source(self, split: str) -> RowSource:
        """A split's own source.

        Raises:
            InputError: it has none.
        """
        source = self._data.sources[split]
        if source is None:
            raise InputError(f"data.{split} is not set")
        found = as_source(source, "test" if split == "predict" else split, f"data.{split}")
        if self._data.streaming is not None and split == "train":
            found.stream()
        return found

    def reading(self, split: str) -> Reading:
        """How a split is read row by row: not every run can take negative weights."""
        unsigned = self._data.run().unsigned if split == "train" else ""
        return Reading(self._data.rows, _LAST_TURN.get(split, "any"), unsigned)

    def reader(self, split: str) -> RowReader:
        """What reads a split's own source, row by row.

        Raises:
            InputError: it has none.
        """
        return RowReader(self.source(split), self.reading(split))

    def encoder(self, split: str) -> ConversationEncoder:
        """What makes tokens of a split's rows.

        Made once for the splits that are cut at the same length: it takes tables and trial renderings.
        """
        data = self._data
        in_pieces = split == "train" and data.batches.packing == "bfd_split"  # cut into them, not off
        options = replace(data.text, max_length=None) if in_pieces else data.text
        one_row = split in ("test", "predict")  # a problem each
        key = (options.max_length, one_row)
        if key not in self._encoders:
            piece_length = data.text.max_length if in_pieces else None
            self._encoders[key] = ConversationEncoder(data.load_tokenizer(), options, piece_length, one_row)
        return self._encoders[key]

    # -- what is said and checked --------------------------------------------------------------------------------------

    def _say(self, split: str, preparation: Preparation, found: TokenizedRows) -> None:
        counts = self.counts[split] = found.counts
        bad = f", {counts.bad} bad" if counts.bad else ""
        weighted = len(found.rows) - column_of(found.rows, "weights").null_count
        weights = f", {weighted} with weights other than 1" if weighted else ""
        several = len(found.rows) + counts.dropped + counts.bad > counts.rows
        made = f" (as {len(found.rows)} rows of tokens)" if several else ""
        cut = f"{counts.truncated} truncated, {counts.dropped} dropped without a target"
        rank_zero_info(f"{split}: {counts.rows} rows{made}{bad}, {cut}{weights}")
        if (longest := self._data.text.max_length) and 2 * (counts.truncated + counts.dropped) > counts.rows:
            rank_zero_warn(f"{split}: most rows are longer than data.text.max_length: {longest}")
        source = preparation.source
        if (day := preparation.encoder.template.date) is not None and self._data.text.date is None:
            self._tell(f"the chat template writes today's date, {day}: data.text.date pins a day")
        if counts.bad:
            rank_zero_warn(f"data.rows.on_bad_rows: skip\n{found.problems(source.name)}")
        for line, warns in found.said(source):
            self._tell(line, warns)

    def _tell(self, line: str, warns: bool = False) -> None:
        """Once, though two splits have the same rows."""
        if line not in self._said:
            self._said.add(line)
            (rank_zero_warn if warns else rank_zero_info)(line)

    def _check_rows(self, split: str, rows: Dataset) -> None:
        max_length = self._data.text.max_length
        if len(rows) == 0:
            within = "" if max_length is None else f" left within max_length {max_length}"
            raise InputError(f"data.{split}: no row has a target{within}")
        run = self._data.run()
        if run.check_references(split, self._key(split), rows):
            self._referenced.add(split)
        if split == "train":
            run.check_signs("data.train", rows)

    def check_lengths(self, positions: Positions | None) -> None:
        """Name the rows, or those of a stream to come, that a model has no positions for.

        Raises:
            InputError: see :func:`~dft_lightning.data.requirements.check_lengths`.
        """
        if positions is None:
            return
        self._positions = positions
        for split, rows in self._rows.items():
            if (split, positions) in self._measured:
                continue
            self._measured.add((split, positions))
            lengths = self.lengths(split)
            if split == "train" and self._data.batches.packing == "bfd_split":  # in pieces
                lengths = lengths.clamp(max=self._data.text.max_length)
            check_lengths(f"data.{split}", rows, lengths, positions)

    def _name_sources(self, split: str, parts: list[str]) -> None:
        """Each part's place among the names of all mixtures."""
        self.source_names += [name for name in parts if name not in self.source_names]
        if len(self.source_names) > MAX_SOURCES:
            raise InputError(
                f"data.{split}: with the other splits' its sources have {len(self.source_names)} names, "
                f"and losses are logged of {MAX_SOURCES} at most"
            )
        self._source_index[split] = [self.source_names.index(name) for name in parts]

    def _pack(self) -> Packs:
        options, max_length = self._data.batches, self._data.text.max_length
        assert options.packing is not None
        assert max_length is not None
        rows, lengths = self._rows["train"], self.lengths("train").numpy()
        packs = pack_documents(lengths, options.packing, max_length, options.seed, lambda i: rows[i]["labels"])
        rank_zero_info(
            f"train: {len(packs.pieces)} documents in {len(packs)} packed rows of {max_length} tokens, "
            f"{packs.efficiency(max_length):.1%} full"
        )
        return packs

    # -- a stream ------------------------------------------------------------------------------------------------------

    def stream(self) -> Stream:
        """The training rows as they are read in training."""
        data = self._data
        assert data.streaming is not None
        return Stream(
            self.reader("train"),
            self.encoder("train"),
            data.streaming,
            data.batches,
            batch_size=data.batch_size,
            max_length=data.text.max_length,
            referenced=True if data.run().reads_reference else None,
            positions=self._positions,
        )

    def _check_stream(self) -> None:
        source = self.source("train")
        self._name_sources("train", source.parts)
        if self._data.run().reads_reference is None:
            return
        for _, _, found in self.reader("train").read():
            if isinstance(found, Conversation):
                self._data.run().check_first("train", "data.train", found)
                return
