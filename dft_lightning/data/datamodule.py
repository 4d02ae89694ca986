"""The LightningDataModule: instruction rows to padded, joined or packed batches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils.data import DataLoader

from dft_lightning.checkpoints.trust import loading_options
from dft_lightning.component import brief_values
from dft_lightning.data.batches.collating import Collator
from dft_lightning.data.batches.loaders import goes_on, prompt_loader, row_loader, stream_loader
from dft_lightning.data.batches.packing import Packs
from dft_lightning.data.batches.row_position import RowPosition
from dft_lightning.data.batches.steps import StepRows, Steps
from dft_lightning.data.batches.stream_position import StreamRecord
from dft_lightning.data.options import (
    GROUPS,
    BatchOptions,
    RowOptions,
    StreamOptions,
    TextOptions,
    check_positive,
    check_together,
    whole_options,
)
from dft_lightning.data.requirements import Run, check_going_back, check_trainer
from dft_lightning.data.rows.sources import RowSource
from dft_lightning.data.splits import SPLITS_OF_STAGE, Splits
from dft_lightning.data.text.tokenizer import end_of_turn, load_tokenizer
from dft_lightning.errors import InputError
from dft_lightning.foreign.lightning import PlainHyperparameters
from dft_lightning.progress import RowsOfBatches, last_step

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from typing_extensions import Self


class InstructionDataModule(PlainHyperparameters, pl.LightningDataModule):
    """Instruction rows from local files, the hub, memory or a source of one's own, tokenised once and cached.

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
        validation_fraction: share of ``train`` that is set apart for validation, by ``batches.split_seed``.
        rows: how rows are read; in Python also a dict of :class:`RowOptions`' fields, as of the other groups.
        text: how they become tokens, and which of these are learnt: the tokenizer, its template, ``max_length``.
        batch_size: rows per micro-batch and rank.
        global_batch_size: rows of an optimizer step over all ranks and micro-batches; sets the trainer's
            ``accumulate_grad_batches``. The last step of an epoch may have fewer.
        eval_batch_size: the same as ``batch_size`` in validation, test and predict; ``None`` takes it.
        batches: how tokenised rows become batches: packing, padding, order and seeds.
        streaming: read the training rows as training goes, pass after pass, without a cache; needs
            ``trainer.max_steps``. ``{}`` takes the defaults of :class:`StreamOptions`.
        num_workers: of the data loaders.
        num_proc: processes that tokenise; ``None`` for this one.

    Raises:
        InputError: at ``prepare_data`` or ``setup``: bad rows, files or tokenizers, reference log-probs that the loss
            reads and the rows lack, or a ``global_batch_size`` that is no whole number of micro-batches.

    Example:
        >>> from dft_lightning.data import ArithmeticRows, InstructionDataModule
        >>> rows = ArithmeticRows(num_rows=4, seed=1)
        >>> data = InstructionDataModule(rows, text={"tokenizer": "asset://arithmetic-base"}, batch_size=2)
        >>> data.prepare_data(); data.setup("fit")
        >>> sorted(next(iter(data.train_dataloader())))
        ['attention_mask', 'input_ids', 'labels', 'layout']
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
        with loading_options(cls, checkpoint_path, hparams_file, weights_only, kwargs, GROUPS) as options:
            return super().load_from_checkpoint(checkpoint_path, map_location, hparams_file, weights_only, **options)

    def __init__(
        self,
        train: RowSource | str | None = None,
        validation: RowSource | str | None = None,
        test: RowSource | str | None = None,
        predict: RowSource | str | None = None,
        forgetting: RowSource | str | None = None,
        validation_fraction: float = 0.0,
        rows: RowOptions = RowOptions(),  # noqa: B008 (frozen)
        text: TextOptions = TextOptions(),  # noqa: B008 (frozen)
        batch_size: int = 8,
        global_batch_size: int | None = None,
        eval_batch_size: int | None = None,
        batches: BatchOptions = BatchOptions(),  # noqa: B008 (frozen)
        streaming: StreamOptions | None = None,
        num_workers: int = 0,
        num_proc: int | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)  # which checkpoints hold
        whole = whole_options({"rows": rows, "text": text, "batches": batches, "streaming": streaming})
        self.rows: RowOptions = whole["rows"]
        self.text: TextOptions = whole["text"]
        self.batches: BatchOptions = whole["batches"]
        self.streaming: StreamOptions | None = whole["streaming"]
        self.sources = {
            "train": train,
            "validation": validation,
            "forgetting": forgetting,
            "test": test,
            "predict": test if predict is None else predict,
        }
        self.validation_fraction = validation_fraction
        self.batch_size = batch_size
        self.global_batch_size = global_batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self.num_workers = num_workers
        self.num_proc = num_proc
        check_positive(
            batch_size=batch_size,
            global_batch_size=global_batch_size,
            eval_batch_size=eval_batch_size,
            num_proc=num_proc,
        )
        check_together(
            self.text,
            self.batches,
            self.streaming,
            validation=validation,
            forgetting=forgetting,
            validation_fraction=validation_fraction,
            num_workers=num_workers,
            global_batch_size=global_batch_size,
        )
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.end_of_turn_ids: list[int] = []
        self.model_hparams: dict[str, Any] = {}  # where there is no trainer to ask
        self.splits = Splits(self)
        self._steps = Steps(batch_size, global_batch_size, self.batches)
        self._stream = StreamRecord()
        self.row_position = RowPosition()

    def plain_hparams(self, values: dict[str, Any]) -> dict[str, Any]:
        """In a plain form, and no rows in memory."""
        return brief_values(whole_options(values))

    # -- loading -------------------------------------------------------------------------------------------------------

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

    def setup(self, stage: str = "fit") -> None:
        trainer = self.trainer
        if stage == "fit":
            self._stream.reset()
            self.row_position.reset()
        if stage == "fit" and trainer is not None:
            check_trainer(trainer, self.batches, self.streaming, validates=self.sources["validation"] is not None)
            self._steps.accumulate(trainer)
        if trainer is not None and trainer.world_size > 1:
            self.splits.follow(trainer.strategy.broadcast(self.splits.names))
        self.load(stage)
        if stage == "fit" and self.batches.max_tokens is not None:
            self._steps.count_tokens(trainer, self._step_rows())

    def build_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer by name, or the model's. Override for one made otherwise."""
        name, options, key = self.text.tokenizer, dict[str, Any](), "data.text.tokenizer"
        if name is None:
            name, key = self.run().name_of_model(), "model.model"
            loading = self.run().hparams.get("loading") or {}
            options = {key: loading[key] for key in ("revision", "trust_remote_code") if key in loading}
        return load_tokenizer(name, chat_template=self.text.chat_template, key=key, **options)

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded where it is not yet; then how its template ends a turn is known, too."""
        if self.tokenizer is None:
            self.tokenizer = self.build_tokenizer()
            turn_end = end_of_turn(self.tokenizer, self.text.chat_template_kwargs)
            self.end_of_turn_ids = [turn_end[1]] if turn_end else []
            if turn_end is None:
                rank_zero_warn("the chat template ends turns with no special token: the model will not learn to stop")
        return self.tokenizer

    def run(self) -> Run:
        """What rows hang on beside the options."""
        module = getattr(self.trainer, "lightning_module", None)
        hparams = getattr(module, "hparams", self.model_hparams)
        validates = getattr(self.trainer, "limit_val_batches", 1) != 0
        name = getattr(module, "model_name", None)
        return Run(loss=getattr(module, "loss", None), hparams=hparams, validates=validates, model_name=name)

    def load(self, stage: str, only: str | None = None) -> None:
        """Read and tokenise what ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"`` needs, where it is not yet.

        Args:
            stage: which of them.
            only: the one split of it that is needed.

        Raises:
            InputError: anything wrong with the rows.
        """
        self.load_tokenizer()
        for split in SPLITS_OF_STAGE[stage]:
            if only in (None, split):
                self.splits.load(split, required=split in (only, SPLITS_OF_STAGE[stage][0]))
        self.splits.forget_read()

    # -- loaders -------------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> DataLoader[Any]:
        rank, ranks = self._ranks()
        if self.streaming is None:
            return self._loader("train", shuffle=self.batches.shuffle, goes_on=True)
        overfits = getattr(self.trainer, "overfit_batches", 0) > 0  # on the same batches again
        position = None if overfits else self._stream.position(rank, ranks, self.num_workers)
        return stream_loader(self.splits.stream(), self.collator("train"), self.num_workers, (rank, ranks), position)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """The validation rows; a list of them and the ``forgetting`` rows where there are such."""
        if "forgetting" in self.splits:
            return [self._loader("validation"), self._loader("forgetting")]
        return self._loader("validation") if "validation" in self.splits else []

    def test_dataloader(self) -> DataLoader[Any]:
        if "test" in self.splits and any(self.splits.tokenized("test")["prompt"]):  # plain text has none
            return self._prompt_loader("test")
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        return self._prompt_loader("predict")

    def generation_dataloader(self, limit: int | None = None, split: str = "validation") -> DataLoader[Any]:
        """The first ``limit`` rows of a split (all for ``None``) with their prompts, to generate along ``fit``.

        Raises:
            InputError: there are no such rows.
        """
        if split not in self.splits:
            raise InputError(f"generation along fit needs {split} rows: set data.{split}")
        return self._prompt_loader(split, limit)

    def evaluation_dataloader(self, split: str, limit: int | None = None) -> DataLoader[Any]:
        """The first ``limit`` rows of a split (all for ``None``) in their own order, of ``train`` too.

        Raises:
            InputError: they are streamed, or cut into pieces.
        """
        if split == "train":
            check_going_back(self.batches, self.streaming)
        return self._loader(split, limit=limit)

    def _prompt_loader(self, split: str, limit: int | None = None) -> DataLoader[Any]:
        """The first ``limit`` rows of a split with their prompts, those of about the same length together."""
        self._check_split(split)
        rows = self.splits.dataset(split, self._pad_token_id(), with_prompts=True, limit=limit, packs=None)
        most = getattr(self.trainer, f"limit_{split}_batches", 1.0)
        some = isinstance(most, int) or most != 1.0  # which are then the first rows; an int is a number of batches
        return prompt_loader(
            rows,
            self.collator(split, with_prompts=True),
            batch_size=self.eval_batch_size,
            options=self.batches,
            ranks=self._ranks(),
            lengths=None if some else self.splits.lengths(split, "prompt_ids")[: len(rows)],
            num_workers=self.num_workers,
        )

    def _check_split(self, split: str) -> None:
        if split not in self.splits:
            stages = [stage for stage, splits in SPLITS_OF_STAGE.items() if split in splits]
            raise InputError(f"there are no {split} rows: set data.{split} and call setup({stages[-1]!r}) first")

    def _loader(
        self, split: str, *, shuffle: bool = False, limit: int | None = None, goes_on: bool = False
    ) -> DataLoader[Any]:
        self._check_split(split)
        pad, packs = self._pad_token_id(), self.packs if goes_on else None
        return row_loader(
            self.splits.dataset(split, pad, with_prompts=False, limit=limit, packs=packs),
            self.collator(split),
            batch_size=self.batch_size if split == "train" else self.eval_batch_size,
            options=self.batches,
            ranks=self._ranks(),
            shuffle=shuffle,
            lengths=self.splits.lengths(split) if shuffle and self.batches.group_by_length else None,
            group_size=self._steps.group_size(self._ranks()[1]),
            dealing=self._steps.dealing(self.trainer, self._step_rows()) if goes_on and packs is None else None,
            num_workers=self.num_workers,
            begin=self._begin if goes_on else None,
        )

    def _step_rows(self) -> StepRows:
        return StepRows.of(self.splits.tokenized("train"), self.splits.lengths("train"), self.batches)

    def _begin(self, sampler: Any) -> None:
        """Where a checkpoint says that the training rows go on."""
        self.row_position.apply(sampler, self.rows_of_batches(), self._row_order())

    def rows_of_batches(self) -> RowsOfBatches:
        """Rows of training micro-batches over all ranks."""
        return self._steps.rows_of_batches(self._ranks()[1])

    @property
    def packs(self) -> Packs | None:
        """The packed training rows, once they are loaded; ``None`` without ``batches.packing``."""
        return self.splits.packs

    def has_split(self, split: str) -> bool:
        """Whether a split's rows are loaded."""
        return split in self.splits

    def answers(self, split: str, limit: int | None = None) -> list[str | None]:
        """What the completions of a split's first ``limit`` rows are scored against."""
        return self.splits.answers(split, limit)

    @property
    def source_names(self) -> list[str]:
        """Of all mixtures, whose losses are logged apart."""
        return self.splits.source_names

    def collator(self, split: str | None = None, with_prompts: bool = False) -> Collator:
        """Makes batches of a split's rows, once the tokenizer is loaded; pads those of any for ``None``."""
        multiple = self.batches.pad_to_multiple_of
        if split is None:
            return Collator(self._pad_token_id(), multiple)
        sources = self.splits.source_index(split)
        return Collator(self._pad_token_id(), multiple, with_prompts, self.batches.padding_free, sources)

    def _pad_token_id(self) -> int:
        assert self.tokenizer is not None, "call setup() first"
        pad = self.tokenizer.pad_token_id
        return int(pad if pad is not None else (self.tokenizer.eos_token_id or 0))  # masked everywhere it stands

    def _ranks(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)

    # -- where a run is in its rows ------------------------------------------------------------------------------------

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Note where the stream was left when this batch was made, which is no part of it.

        Then the module's own hook, which Lightning leaves out where a data module has one.
        """
        if self.streaming is not None:
            batch = self._stream.take(batch, begins_step=not self._within_step())
        module = getattr(self.trainer, "lightning_module", None)
        if module is None or not is_overridden("on_before_batch_transfer", module):
            return batch
        return module.on_before_batch_transfer(batch, dataloader_idx)

    goes_on = staticmethod(goes_on)

    def _within_step(self) -> bool:
        """Whether the last batch was one of several of an optimizer step that is not done."""
        return self.trainer is not None and last_step(self.trainer).micro_batches > 0

    def state_dict(self) -> dict[str, Any]:
        """The place in the training rows after the last optimizer step; of a stream every rank's. A collective."""
        if self.streaming is not None:
            return self._stream.state_dict(self._ranks()[1], self._within_step())
        if self.trainer is None or "train" not in self.splits:
            return {}
        return {"train": self.row_position.state_dict(self.trainer, self.rows_of_batches(), self._row_order())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._stream.load_state_dict(state_dict)
        self.row_position.load_state_dict(state_dict.get("train"))

    def _row_order(self) -> dict[str, Any]:
        number = len(self.splits.tokenized("train")) if self.packs is None else len(self.packs)
        return self._steps.row_order(number, self._ranks()[1])
