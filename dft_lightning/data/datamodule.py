"""The LightningDataModule: instruction rows to padded, joined or packed batches."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, get_args

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from dft_lightning.checkpoints.trust import loading_options
from dft_lightning.component import brief_values
from dft_lightning.data.accumulation import accumulate_to
from dft_lightning.data.batches import Collator, PackedRows, RowSampler, TokenizedRows
from dft_lightning.data.cache import RowCounts, tokenize
from dft_lightning.data.forms import Conversation, LastTurn, RowColumns, RowForm
from dft_lightning.data.messages import Conversations, OnBadRows, RowReader, read_messages
from dft_lightning.data.mixtures import MixedRows
from dft_lightning.data.packing import Packing, Packs, pack_documents
from dft_lightning.data.row_position import RowPosition
from dft_lightning.data.sources import RowSource, as_source
from dft_lightning.data.stream_position import StreamRecord
from dft_lightning.data.streaming import StreamedBatches, StreamOptions
from dft_lightning.data.template import TrainTurns
from dft_lightning.data.tokenizer import end_of_turn, load_tokenizer
from dft_lightning.data.tokens import ConversationEncoder
from dft_lightning.data.workers import start_worker
from dft_lightning.errors import InputError
from dft_lightning.foreign.lightning import PlainHyperparameters
from dft_lightning.foreign.torch import called_by_torchdata
from dft_lightning.losses.statistics import normalise_needs
from dft_lightning.metrics.exact_sums import MAX_SOURCES
from dft_lightning.progress import last_step

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase
    from typing_extensions import Self

SPLITS_OF_STAGE = {
    "fit": ("train", "validation", "forgetting"),
    "validate": ("validation", "forgetting"),
    "test": ("test",),
    "predict": ("predict",),
}
_LAST_TURN: dict[str, LastTurn] = {"test": "assistant", "predict": "optional"}


class InstructionDataModule(PlainHyperparameters, pl.LightningDataModule):
    """Instruction rows from local files, the hub or a source of one's own, tokenised once and cached.

    Rows have one of these forms, recognised by their columns or named: prompt and completion, Alpaca's
    ``instruction``/``input``/``output``, ``messages`` (with ``tools`` and tool calls, too), ShareGPT's
    ``conversations``, preferences (``chosen``), or plain ``text``. They pass through the tokenizer's chat template, or
    a plain one where it has none. The loss is on assistant turns, their end-of-turn token included; of plain text it is
    on everything. A ``weight`` of a row or message multiplies the loss of its tokens, as a row's ``reward`` or
    ``advantage`` does; the divisor stays the number of target tokens. A weight of 0 makes no targets. Rows that
    ``score`` has written bring a reference model's log-probs to the batches, as ``reference_log_prob``. See
    ``docs/data.md``.

    Args:
        train: training rows: a local ``.jsonl``, ``.json``, ``.csv`` or ``.parquet`` file, a folder of such files or
            one of ``save_to_disk``, a hub name (split ``train``), or a source:
            ``LocalRows``, ``HubRows``, ``ArithmeticRows`` or a subclass of ``RowSource``.
        validation: validation rows, likewise; ``None`` for none or for a part of ``train``.
        test: test rows, likewise.
        predict: rows to complete; ``None`` takes ``test``. They need no completion.
        forgetting: a second validation set, of what training should not spoil, likewise; logged as ``forgetting/``.
        validation_fraction: share of ``train`` that is set apart for validation, by ``seed``.
        row_form: ``"auto"``, ``"prompt_completion"``, ``"alpaca"``, ``"messages"``, ``"sharegpt"``, ``"preference"`` or
            ``"text"``.
        prompt_column: column of the prompt: a text or a list of messages.
        completion_column: column of the completion, likewise.
        messages_column: column of the messages.
        text_column: column of plain text.
        weight_column: column of the rows' weights, where they have it; ``None`` recognises ``weight``, ``reward`` and
            ``advantage``, which alone may be negative.
        system_prompt: system message of the rows that have none, in training and generation.
        prompt_suffix: what every user message ends with, in training and generation.
        on_bad_rows: ``"raise"``, or ``"skip"`` to leave out rows that cannot be read, rendered or masked; they are
            counted, and the first ten shown.
        tokenizer: hub name, local folder or ``asset://NAME``; ``None`` takes the model's.
        chat_template: Jinja text or ``.jinja`` file in place of the tokenizer's own.
        chat_template_kwargs: further variables of the chat template, such as ``enable_thinking``.
        allow_special_tokens: let rows spell special tokens (``<|im_end|>``) as control. Otherwise they are text.
        max_length: rows longer than this keep their first ``max_length`` tokens; a row with no target left is
            dropped and counted.
        train_on_prompts: learn the prompts too, all with weight 1: rows and messages can have no other.
        train_turns: learn ``"all"`` assistant turns, or the ``"last"`` alone.
        batch_size: rows per micro-batch and rank.
        global_batch_size: rows of an optimizer step over all ranks and micro-batches; sets the trainer's
            ``accumulate_grad_batches``. The last step of an epoch may have fewer.
        eval_batch_size: the same as ``batch_size`` in validation, test and predict; ``None`` takes it.
        pad_to_multiple_of: batch lengths are rounded up to a multiple of this.
        padding_free: join the rows of a micro-batch into one instead of padding them; they stay separate documents to
            the model, which is checked. ``model.loading.attn_implementation`` should be ``documents`` or a flash
            attention.
        packing: pack the training rows into rows of ``max_length`` tokens, best-fit decreasing: ``"bfd"`` cuts longer
            rows off, ``"bfd_split"`` into pieces. ``batch_size`` then counts packed rows. They stay separate documents.
        group_by_length: let training batches have rows of about the same length.
        streaming: read the training rows as training goes, pass after pass, without a cache; needs
            ``trainer.max_steps``.
        shuffle_buffer_size: of a stream: rows among which the next is drawn, for each worker.
        shuffle: a new row order in each epoch, by ``seed``; the same for any number of ranks.
        seed: of the order and, unless ``split_seed`` is given, of the split.
        split_seed: of the split by ``validation_fraction``.
        num_workers: of the data loaders.
        num_proc: processes that tokenise; ``None`` for this one.

    Raises:
        InputError: at ``prepare_data`` or ``setup``: bad rows, files or tokenizers, reference log-probs that the loss
            reads and the rows lack, or a ``global_batch_size`` that is no whole number of micro-batches.

    Example:
        >>> from dft_lightning.data import ArithmeticRows, InstructionDataModule
        >>> rows = ArithmeticRows(num_rows=4, seed=1)
        >>> data = InstructionDataModule(rows, tokenizer="asset://arithmetic-base", batch_size=2)
        >>> data.prepare_data(); data.setup("fit")
        >>> sorted(next(iter(data.train_dataloader())))
        ['attention_mask', 'input_ids', 'labels']
    """

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: Any,
        map_location: Any = None,
        hparams_file: Any = None,
        weights_only: bool | None = True,
        **kwargs: Any,
    ) -> Self:
        """A data module of a checkpoint's options and ``kwargs`` over them; none of its classes are imported.

        Raises:
            InputError: the checkpoint names a class that is neither this package's nor imported already.
        """
        with loading_options(cls, checkpoint_path, hparams_file, weights_only, kwargs) as options:
            return super().load_from_checkpoint(checkpoint_path, map_location, hparams_file, weights_only, **options)

    def __init__(
        self,
        train: RowSource | str | None = None,
        validation: RowSource | str | None = None,
        test: RowSource | str | None = None,
        predict: RowSource | str | None = None,
        forgetting: RowSource | str | None = None,
        validation_fraction: float = 0.0,
        row_form: RowForm = "auto",
        prompt_column: str = "prompt",
        completion_column: str = "completion",
        messages_column: str = "messages",
        text_column: str = "text",
        weight_column: str | None = None,
        system_prompt: str | None = None,
        prompt_suffix: str | None = None,
        on_bad_rows: OnBadRows = "raise",
        tokenizer: str | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        allow_special_tokens: bool = False,
        max_length: int | None = None,
        train_on_prompts: bool = False,
        train_turns: TrainTurns = "all",
        batch_size: int = 8,
        global_batch_size: int | None = None,
        eval_batch_size: int | None = None,
        pad_to_multiple_of: int = 1,
        padding_free: bool = False,
        packing: Packing | None = None,
        group_by_length: bool = False,
        streaming: bool = False,
        shuffle_buffer_size: int = 10_000,
        shuffle: bool = True,
        seed: int = 0,
        split_seed: int | None = None,
        num_workers: int = 0,
        num_proc: int | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)  # which checkpoints hold
        _check_positive(
            batch_size=batch_size,
            global_batch_size=global_batch_size,
            eval_batch_size=eval_batch_size,
            pad_to_multiple_of=pad_to_multiple_of,
            max_length=max_length,
            num_proc=num_proc,
            shuffle_buffer_size=shuffle_buffer_size,
        )
        _check_choices(row_form, on_bad_rows, train_turns, packing)
        if packing is not None and (max_length is None or max_length < 2):
            raise ValueError(f"packing needs max_length, the tokens of a packed row, at least 2; got {max_length}")
        if packing is not None and group_by_length:
            raise ValueError("packed rows are all of one length: leave group_by_length out")
        if streaming and (group_by_length or validation_fraction):
            raise ValueError(
                "a stream has no known rows to group or divide: leave group_by_length and "
                "validation_fraction out, and give validation"
            )
        if num_workers < 0:
            raise ValueError(f"num_workers must not be negative, got {num_workers}")
        if not 0 <= validation_fraction < 1:
            raise ValueError(f"validation_fraction must lie in [0, 1), got {validation_fraction}")
        if padding_free and pad_to_multiple_of != 1:
            raise ValueError("padding_free batches have nothing to pad: leave pad_to_multiple_of at 1")
        if forgetting is not None and validation is None and not validation_fraction:
            raise ValueError("forgetting is a second validation set: give validation or validation_fraction as well")
        if validation_fraction and validation is not None:
            raise ValueError("give validation or validation_fraction, not both")
        self.sources = {
            "train": train,
            "validation": validation,
            "forgetting": forgetting,
            "test": test,
            "predict": predict or test,
        }
        self.columns = RowColumns(
            row_form,
            prompt_column,
            completion_column,
            messages_column,
            text_column,
            weight_column,
            system_prompt,
            prompt_suffix,
            weighted=not train_on_prompts,
        )
        self.validation_fraction = validation_fraction
        self.tokenizer_name = tokenizer
        self.chat_template = chat_template
        self.chat_template_kwargs = chat_template_kwargs
        self.allow_special_tokens = allow_special_tokens
        self.on_bad_rows: OnBadRows = on_bad_rows
        self.max_length = max_length
        self.train_on_prompts = train_on_prompts
        self.train_turns: TrainTurns = train_turns
        self.batch_size = batch_size
        self.global_batch_size = global_batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self.pad_to_multiple_of = pad_to_multiple_of
        self.padding_free = padding_free
        self.packing = packing
        self.group_by_length = group_by_length
        self.streaming = streaming
        self.shuffle_buffer_size = shuffle_buffer_size
        self.shuffle = shuffle
        self.seed = seed
        self.split_seed = seed if split_seed is None else split_seed
        self.num_workers = num_workers
        self.num_proc = num_proc
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.end_of_turn_ids: list[int] = []
        self._micro_batches = 1
        self.counts: dict[str, RowCounts] = {}
        self.model_hparams: dict[str, Any] = {}  # where there is no trainer to ask
        self.source_names: list[str] = []  # of mixtures, whose losses are logged apart
        self.packs: Packs | None = None
        self._rows: dict[str, Dataset] = {}
        self._referenced: set[str] = set()  # the splits whose rows have reference log-probs
        self._source_index: dict[str, list[int]] = {}
        self._divided: dict[str, Conversations] = {}
        self._encoders: dict[int | None, ConversationEncoder] = {}
        self._stream = StreamRecord()
        self.row_position = RowPosition()

    def plain_hparams(self, values: dict[str, Any]) -> dict[str, Any]:
        """In a plain form, and no rows in memory."""
        return brief_values(values)

    # -- loading -----------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Read, check and tokenise the rows into the cache of ``datasets``, before any model is loaded."""
        trainer = self.trainer
        try:
            self.load(trainer.state.fn.value if trainer is not None and trainer.state.fn else "fit")
        except InputError:
            # Only one process per machine is here, and the others wait for it. All of them meet the same mistake in
            # setup, and end by it.
            if trainer is None or trainer.world_size == 1:
                raise

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self._stream.reset()
            self.row_position.reset()
        if stage == "fit" and self.trainer is not None:
            self._check_trainer(self.trainer)
        if stage == "fit" and self.global_batch_size is not None and self.trainer is not None:
            self._micro_batches = accumulate_to(
                self.trainer, self.global_batch_size, self.batch_size, self._micro_batches
            )
        self.load(stage)

    def _check_trainer(self, trainer: pl.Trainer) -> None:
        """What a run cannot do with these batches."""
        loss = getattr(trainer.lightning_module, "loss", None)
        if self.packing == "bfd_split" and not getattr(loss, "pointwise", True):
            raise InputError(
                f"{type(loss).__name__} reads whole sequences (pointwise = False), and data.packing: bfd_split cuts "
                "them: use bfd"
            )
        if not self.streaming:
            return
        if trainer.max_steps < 0 and not any(isinstance(callback, Timer) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            raise InputError("data.streaming goes round without end: set trainer.max_steps")
        if self.sources["validation"] is not None and trainer.val_check_interval == 1.0 and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            raise InputError(
                "data.streaming has no end of an epoch to validate at: set trainer.val_check_interval to a number of "
                "batches, with trainer.check_val_every_n_epoch: null"
            )

    def build_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer by name, or the model's. Override for one made otherwise."""
        name, options, key = self.tokenizer_name, dict[str, Any](), "data.tokenizer"
        if name is None:
            hparams = self._model_hparams()
            if not isinstance(hparams.get("model"), str):
                raise InputError("data.tokenizer is not set, and the model has no name to take it from")
            name, key = hparams["model"], "model.model"
            loading = hparams.get("loading") or {}
            options = {key: loading[key] for key in ("revision", "trust_remote_code") if key in loading}
        return load_tokenizer(name, chat_template=self.chat_template, key=key, **options)

    def load_tokenizer(self) -> None:
        """Load the tokenizer, where it is not yet, and find how its template ends a turn."""
        if self.tokenizer is not None:
            return
        self.tokenizer = self.build_tokenizer()
        turn_end = end_of_turn(self.tokenizer, self.chat_template_kwargs)
        self.end_of_turn_ids = [turn_end[1]] if turn_end else []
        if turn_end is None:
            rank_zero_warn("the chat template ends turns with no special token: the model will not learn to stop")

    def _model_hparams(self) -> Any:
        return getattr(getattr(self.trainer, "lightning_module", None), "hparams", self.model_hparams)

    def load(self, stage: str, only: str | None = None) -> None:
        """Read and tokenise what ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"`` needs, where it is not yet.

        Args:
            stage: which of them.
            only: the one split of it that is needed.
        """
        self.load_tokenizer()
        for split in SPLITS_OF_STAGE[stage]:
            if split in self._rows or only not in (None, split):
                continue
            if split == "train" and self.streaming:
                source = self._source("train")
                if isinstance(source, MixedRows) and source.leaves_rows_out:
                    raise InputError(
                        "data.streaming: each pass over a mixture begins with the same rows and would end before the "
                        "others: set its stopping_strategy: all_exhausted"
                    )
                self._name_sources("train", source.parts)
                self._check_stream_references()
                continue
            conversations = self._conversations(split, required=split in (only, SPLITS_OF_STAGE[stage][0]))
            if conversations is not None:
                if split != "predict":
                    self._check_references(split, next(iter(conversations)))
                self._rows[split] = self._tokenize(split, conversations)
        self._divided.clear()
        if stage == "fit" and self.packing is not None and not self.streaming and self.packs is None:
            self.packs = self._pack()

    def read_split(self, split: str) -> tuple[Conversations, ConversationEncoder]:
        """A split's rows as messages, not yet tokens, and what makes tokens of them.

        Raises:
            InputError: there is no such split, or it has bad rows.
        """
        self.load_tokenizer()
        conversations = self._conversations(split, required=True)
        assert conversations is not None
        return conversations, self.encoder(split)

    def _conversations(self, split: str, required: bool) -> Conversations | None:
        """Messages of a split, or ``None`` where there is none and none is required."""
        source = self.sources[split]
        if split == "validation" and source is None and self.validation_fraction:
            return self._divide_train()["validation"]
        if source is None and not required:
            return None
        if source is None:
            raise InputError(f"data.{split} is not set" + (", nor data.test" if split == "predict" else ""))
        if split == "train" and self.validation_fraction:
            return self._divide_train()["train"]
        return self._read(split)

    def _source(self, split: str) -> RowSource:
        source = self.sources[split]
        if source is None:
            raise InputError(f"data.{split} is not set")
        found = as_source(source, "test" if split == "predict" else split)
        if self.streaming and split == "train":
            found.stream()
        return found

    def _read(self, split: str) -> Conversations:
        columns, needed = self._columns(split), _LAST_TURN.get(split, "any")
        return read_messages(self._source(split), columns, last_turn=needed, on_bad_rows=self.on_bad_rows)

    def _columns(self, split: str) -> RowColumns:
        """How a split is read: not every run can take negative weights."""
        return replace(self.columns, unsigned=self._why_unsigned() if split == "train" else "")

    def _why_unsigned(self) -> str:
        if (self._model_hparams().get("step") or {}).get("renormalize"):
            return "model.step.renormalize divides by the sum of the weights: leave that out"
        loss = getattr(getattr(self.trainer, "lightning_module", None), "loss", None)
        if not getattr(loss, "takes_negative_weights", True):
            return (
                f"{type(loss).__name__} means nothing with a negative weight: leave such rows out, or take another loss"
            )
        return ""

    def reader(self, split: str) -> RowReader:
        """What reads a split's own source, row by row.

        Raises:
            InputError: it has none.
        """
        return RowReader(self._source(split), self._columns(split), _LAST_TURN.get(split, "any"))

    def _divide_train(self) -> dict[str, Conversations]:
        """``train`` and ``validation`` of the training rows, read once for both."""
        if self._divided:
            return self._divided
        source = self.sources["train"]
        if source is None:
            raise InputError("data.train is not set, so data.validation_fraction has nothing to divide")
        train, validation = self._read("train").divide(self.validation_fraction, self.split_seed)
        self._divided.update(train=train, validation=validation)
        return self._divided

    def encoder(self, split: str) -> ConversationEncoder:
        """What makes tokens of a split's rows, once the tokenizer is loaded.

        Made once for the splits that are cut at the same length: it takes tables and trial renderings.
        """
        assert self.tokenizer is not None
        in_pieces = split == "train" and self.packing == "bfd_split"  # cut into them, not off
        max_length = None if in_pieces else self.max_length
        if max_length not in self._encoders:
            self._encoders[max_length] = ConversationEncoder(
                self.tokenizer,
                max_length,
                self.train_on_prompts,
                self.train_turns,
                self.chat_template_kwargs,
                self.allow_special_tokens,
                piece_length=self.max_length if in_pieces else None,
            )
        return self._encoders[max_length]

    def _tokenize(self, split: str, conversations: Conversations) -> Dataset:
        found = tokenize(
            conversations,
            self.encoder(split),
            with_prompts=split != "train",
            # Generation needs no target: a row too long to learn from is still a problem to solve.
            keep_all=split in ("test", "predict"),
            num_proc=self.num_proc,
            on_bad_rows=self.on_bad_rows,
            desc=f"Tokenising {split} rows",
        )
        counts = self.counts[split] = found.counts
        bad = f", {counts.bad} bad" if counts.bad else ""
        weighted = len(found.rows) - found.rows.data["weights"].null_count
        weights = f", {weighted} with weights other than 1" if weighted else ""
        rank_zero_info(
            f"{split}: {counts.rows} rows{bad}, {counts.truncated} truncated, {counts.dropped} dropped without a "
            f"target{weights}"
        )
        if counts.bad:
            rank_zero_warn(f"data.on_bad_rows: skip\n{found.problems.report(counts.rows)}")
        if len(found.rows) == 0:
            within = "" if self.max_length is None else f" left within max_length {self.max_length}"
            raise InputError(f"data.{split}: no row has a target{within}")
        self._check_all_referenced(split, found.rows)
        self._name_sources(split, found.parts)
        return found.rows

    def _name_sources(self, split: str, parts: list[str]) -> None:
        """Each part's place among the names of all mixtures."""
        self.source_names += [name for name in parts if name not in self.source_names]
        if len(self.source_names) > MAX_SOURCES:
            raise InputError(
                f"data.{split}: with the other splits' its sources have {len(self.source_names)} names, "
                f"and losses are logged of {MAX_SOURCES} at most"
            )
        self._source_index[split] = [self.source_names.index(name) for name in parts]

    # -- reference log-probs -----------------------------------------------------------------------------------

    def _loss_with_reference(self) -> str | None:
        """The name of the trainer's loss, where it reads ``reference_log_prob``."""
        loss = getattr(getattr(self.trainer, "lightning_module", None), "loss", None)
        needs = {need.name for need in normalise_needs(getattr(loss, "needs", ()))}
        return type(loss).__name__ if "reference_log_prob" in needs else None

    def _check_references(self, split: str, first: Conversation) -> None:
        """Whether the loss will have what it reads, by the first row: that all are alike is seen to later."""
        loss = self._loss_with_reference()
        if loss is None or first.reference_log_prob is not None:
            return
        if split in ("validation", "forgetting") and getattr(self.trainer, "limit_val_batches", 1) == 0:
            return
        part = split == "validation" and self.validation_fraction
        raise InputError(
            f"data.{'train' if part else split}: {loss} reads reference_log_prob, which the rows lack: run "
            "`python -m dft_lightning score` with this config, and give the options that it prints"
        )

    def _check_stream_references(self) -> None:
        if self._loss_with_reference() is None:
            return
        for _, _, found in self.reader("train").read():
            if isinstance(found, Conversation):
                self._check_references("train", found)
                return

    def _check_all_referenced(self, split: str, rows: Dataset) -> None:
        """All rows have reference log-probs, or none has."""
        column = rows.data["reference_log_prob"]
        if column.null_count == 0:
            self._referenced.add(split)
        elif column.null_count < len(rows):
            place = json.loads(rows["number"][column.is_null().index(True).as_py()])
            raise InputError(
                f"data.{split}: row {place} has no reference_log_prob, and others have: score every source, or none"
            )

    # ----------------------------------------------------------------------------------------------------------

    def _pack(self) -> Packs:
        assert self.packing is not None
        assert self.max_length is not None
        rows = self._rows["train"]
        lengths = self.lengths("train").numpy()
        packs = pack_documents(lengths, self.packing, self.max_length, self.seed, lambda i: rows[i]["labels"])
        rank_zero_info(
            f"train: {len(packs.pieces)} documents in {len(packs)} packed rows of {self.max_length} tokens, "
            f"{packs.efficiency(self.max_length):.1%} full"
        )
        return packs

    def lengths(self, split: str) -> Tensor:
        """Tokens of each row of a split."""
        import pyarrow.compute

        return torch.from_numpy(
            pyarrow.compute.list_value_length(self._rows[split].data["input_ids"]).to_numpy().copy()
        )

    # -- loaders -----------------------------------------------------------------------------------------------

    def train_dataloader(self) -> DataLoader[Any]:
        if self.streaming:
            return self._stream_loader()
        return self._loader("train", shuffle=self.shuffle, packs=self.packs, goes_on=True)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """The validation rows; a list of them and the ``forgetting`` rows where there are such."""
        if "forgetting" in self._rows:
            return [self._loader("validation"), self._loader("forgetting")]
        return self._loader("validation") if "validation" in self._rows else []

    def test_dataloader(self) -> DataLoader[Any]:
        return self._loader("test", with_prompts=True)

    def predict_dataloader(self) -> DataLoader[Any]:
        return self._loader("predict", with_prompts=True)

    def generation_dataloader(self, limit: int | None = None, split: str = "validation") -> DataLoader[Any]:
        """The first ``limit`` rows of a split (all for ``None``) with their prompts, to generate along ``fit``.

        Raises:
            InputError: there are no such rows.
        """
        if split not in self._rows:
            raise InputError(f"generation along fit needs {split} rows: set data.{split}")
        return self._loader(split, with_prompts=True, limit=limit)

    def evaluation_dataloader(self, split: str, limit: int | None = None) -> DataLoader[Any]:
        """The first ``limit`` rows of a split (all for ``None``) in their own order, of ``train`` too.

        Raises:
            InputError: they are streamed, or cut into pieces.
        """
        if split == "train" and self.packing == "bfd_split":
            raise InputError("data.packing: bfd_split has no whole training rows, which compare goes back to: use bfd")
        if split == "train" and self.streaming:
            raise InputError(
                "data.streaming: the training rows cannot be gone back to, which compare does: turn it off"
            )
        return self._loader(split, limit=limit)

    def tokenized(self, split: str) -> Dataset:
        """A loaded split's rows, with the columns of :class:`~dft_lightning.data.cache.TokenizedSplit`."""
        return self._rows[split]

    def sources_of(self, split: str) -> list[str]:
        """Names of the sources that a split is mixed from; none of a single one."""
        return [self.source_names[i] for i in self._source_index[split]]

    def has_split(self, split: str) -> bool:
        """Whether a split's rows are loaded."""
        return split in self._rows

    def answers(self, split: str, limit: int | None = None) -> list[str | None]:
        """What the completions of a split are scored against: the final assistant turn of the first ``limit`` rows."""
        rows = self._rows[split]
        return list(rows["answer"][: len(rows) if limit is None else limit])

    def problems(self, split: str) -> list[str]:
        """Prompt and answer of each row of a split, to tell whether two runs had the same."""
        rows = self._rows[split]
        return [f"{prompt}{answer}" for prompt, answer in zip(rows["prompt"], rows["answer"], strict=True)]

    def _loader(
        self,
        split: str,
        *,
        shuffle: bool = False,
        with_prompts: bool = False,
        limit: int | None = None,
        packs: Packs | None = None,
        goes_on: bool = False,
    ) -> DataLoader[Any]:
        rows: Any = self._rows[split]
        if limit is not None:
            rows = rows.select(range(min(limit, len(rows))))
        if with_prompts and "" in rows["prompt"]:
            raise InputError(f"data.{split}: plain text has no prompt to generate from: give rows of another form")
        pad = self._pad_token_id()
        with_reference = split in self._referenced
        if packs is None:
            dataset: Any = TokenizedRows(rows, pad, with_reference)
        else:
            dataset = PackedRows(rows, packs, pad, with_reference)
        rank, ranks = self._ranks()
        grouped = split == "train" and shuffle and self.group_by_length
        sampler = RowSampler(
            dataset,
            num_replicas=ranks,
            rank=rank,
            shuffle=shuffle,
            seed=self.seed,
            lengths=self.lengths(split) if grouped else None,
            group_size=self._group_size(),
        )
        if goes_on:
            self.row_position.apply(sampler, self.batch_size * ranks, self._row_order())
        with called_by_torchdata():
            loader: DataLoader[Any] = StatefulDataLoader(
                dataset,
                batch_size=self.batch_size if split == "train" else self.eval_batch_size,
                sampler=sampler,
                collate_fn=self._collator(split, with_prompts),
                num_workers=self.num_workers,
                pin_memory=torch.cuda.is_available(),
                persistent_workers=self.num_workers > 0,
                **self._worker_options(rank),
            )
        return loader

    def _stream_loader(self) -> DataLoader[Any]:
        rank, ranks = self._ranks()
        overfits = getattr(self.trainer, "overfit_batches", 0) > 0  # on the same batches again
        stream = StreamedBatches(
            self.reader("train"),
            self.encoder("train"),
            self._collator("train", with_prompts=False),
            StreamOptions(
                batch_size=self.batch_size,
                shuffle_buffer_size=self.shuffle_buffer_size if self.shuffle else 1,
                seed=self.seed,
                packing=self.packing,
                max_length=self.max_length,
                on_bad_rows=self.on_bad_rows,
                referenced=True if self._loss_with_reference() else None,
            ),
            rank,
            ranks,
            None if overfits else self._stream.position(rank, ranks, self.num_workers),
        )
        return DataLoader(
            stream,
            batch_size=None,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            **self._worker_options(rank),
        )

    def _worker_options(self, rank: int) -> dict[str, Any]:
        return {
            # Of its own: each new pass over a loader would take a number of those that dropout draws from.
            "generator": torch.Generator().manual_seed(self.seed),
            "worker_init_fn": partial(start_worker, rank=rank),
        }

    def collator(self) -> Collator:
        """Pads rows of any split, once the tokenizer is loaded."""
        return Collator(self._pad_token_id(), self.pad_to_multiple_of)

    def _collator(self, split: str, with_prompts: bool) -> Collator:
        sources = self._source_index.get(split) or None
        return Collator(self._pad_token_id(), self.pad_to_multiple_of, with_prompts, self.padding_free, sources)

    def _pad_token_id(self) -> int:
        assert self.tokenizer is not None, "call setup() first"
        pad = self.tokenizer.pad_token_id
        return int(pad if pad is not None else (self.tokenizer.eos_token_id or 0))  # masked everywhere it stands

    def _ranks(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)

    # -- where a run is in its rows ----------------------------------------------------------------------------

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Note where the stream was left when this batch was made, which is no part of it.

        Then the module's own hook, which Lightning leaves out where a data module has one.
        """
        if self.streaming:
            batch = self._stream.take(batch, begins_step=not self._within_step())
        module = getattr(self.trainer, "lightning_module", None)
        if module is None or not is_overridden("on_before_batch_transfer", module):
            return batch
        return module.on_before_batch_transfer(batch, dataloader_idx)

    @staticmethod
    def goes_on(loader: Any) -> bool:
        """Whether a training loader is one of this class's, which begins where a checkpoint says."""
        sampled = isinstance(getattr(loader, "sampler", None), RowSampler)
        return sampled or isinstance(getattr(loader, "dataset", None), StreamedBatches)

    def _within_step(self) -> bool:
        """Whether the last batch was one of several of an optimizer step that is not done."""
        return self.trainer is not None and last_step(self.trainer).micro_batches > 0

    def state_dict(self) -> dict[str, Any]:
        """The place in the training rows after the last optimizer step; of a stream every rank's. A collective."""
        if self.streaming:
            return self._stream.state_dict(self._ranks()[1], self._within_step())
        if self.trainer is None or "train" not in self._rows:
            return {}
        return {"train": self.row_position.state_dict(self.trainer, self.batch_size, self._row_order())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._stream.load_state_dict(state_dict)
        self.row_position.load_state_dict(state_dict.get("train"))

    def _row_order(self) -> dict[str, Any]:
        """What the order of the training rows hangs on."""
        order = {
            "number of rows": len(self._rows["train"]) if self.packs is None else len(self.packs),
            "data.seed": self.seed if self.shuffle else None,
            "data.packing": self.packing,
        }
        if self.shuffle and self.group_by_length:
            order["rows of a group"] = self._group_size()
        return order

    def _group_size(self) -> int:
        return self.global_batch_size or self.batch_size * self._ranks()[1]


def _check_choices(row_form: str, on_bad_rows: str, train_turns: str, packing: str | None) -> None:
    """In Python nothing else does."""
    for name, value, choices in (
        ("row_form", row_form, get_args(RowForm)),
        ("on_bad_rows", on_bad_rows, get_args(OnBadRows)),
        ("train_turns", train_turns, get_args(TrainTurns)),
        ("packing", packing, (None, *get_args(Packing))),
    ):
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}")


def _check_positive(**values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
