"""The LightningDataModule: instruction rows to padded batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader

from dft_lightning.data.accumulation import accumulate_to
from dft_lightning.data.batches import Collator, RowSampler, TokenizedRows
from dft_lightning.data.cache import tokenize
from dft_lightning.data.messages import Conversations, LastTurn, RowColumns, RowForm, read_messages
from dft_lightning.data.sources import RowSource, as_source
from dft_lightning.data.tokenizer import end_of_turn, load_tokenizer
from dft_lightning.data.tokens import ConversationEncoder
from dft_lightning.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

SPLITS_OF_STAGE = {
    "fit": ("train", "validation", "forgetting"),
    "validate": ("validation", "forgetting"),
    "test": ("test",),
    "predict": ("predict",),
}


@dataclass(frozen=True)
class RowCounts:
    """What became of the rows of a split: read, cut to ``max_length``, dropped for lack of a target."""

    rows: int
    truncated: int
    dropped: int


class InstructionDataModule(pl.LightningDataModule):
    """Instruction rows from local files, the hub or a source of one's own, tokenised once and cached.

    Rows have one of three forms, recognised by their columns or named: prompt and completion, Alpaca's
    ``instruction``/``input``/``output``, or ``messages`` with roles and contents. They pass through the tokenizer's
    chat template, or a plain one where it has none. The loss is on assistant turns, their end-of-turn token included.

    Args:
        train: training rows: a local ``.jsonl``, ``.json``, ``.csv`` or ``.parquet`` file, a folder of such files or
            one of ``save_to_disk``, a hub name (split ``train``), or a source:
            ``LocalRows``, ``HubRows``, ``ArithmeticRows`` or a subclass of ``RowSource``.
        validation: validation rows, likewise; ``None`` for none or for a part of ``train``.
        test: test rows, likewise.
        predict: rows to complete; ``None`` takes ``test``. They need no completion.
        forgetting: a second validation set, of what training should not spoil, likewise; logged as ``forgetting/``.
        validation_fraction: share of ``train`` that is set apart for validation, by ``seed``.
        row_form: ``"auto"``, ``"prompt_completion"``, ``"alpaca"`` or ``"messages"``.
        prompt_column: column of the prompt.
        completion_column: column of the completion.
        messages_column: column of the messages.
        tokenizer: hub name, local folder or ``asset://NAME``; ``None`` takes the model's.
        chat_template: Jinja text or ``.jinja`` file in place of the tokenizer's own.
        max_length: rows longer than this keep their first ``max_length`` tokens; a row with no target left is
            dropped and counted.
        train_on_prompts: learn the prompts too.
        batch_size: rows per micro-batch and rank.
        global_batch_size: rows of an optimizer step over all ranks and micro-batches; sets the trainer's
            ``accumulate_grad_batches``. The last step of an epoch may have fewer.
        eval_batch_size: the same as ``batch_size`` in validation, test and predict; ``None`` takes it.
        pad_to_multiple_of: batch lengths are rounded up to a multiple of this.
        padding_free: join the rows of a micro-batch into one instead of padding them; they stay separate documents to
            the model, which is checked. ``model.attn_implementation`` should be ``documents`` or a flash attention.
        shuffle: a new row order in each epoch, by ``seed``; the same for any number of ranks.
        seed: of the order and, unless ``split_seed`` is given, of the split.
        split_seed: of the split by ``validation_fraction``.
        num_workers: of the data loaders.
        num_proc: processes that tokenise; ``None`` for this one.

    Raises:
        InputError: at ``prepare_data`` or ``setup``: bad rows, files or tokenizers, or a ``global_batch_size`` that
            is no whole number of micro-batches.

    Example:
        >>> from dft_lightning.data import ArithmeticRows, InstructionDataModule
        >>> rows = ArithmeticRows(num_rows=4, seed=1)
        >>> data = InstructionDataModule(rows, tokenizer="asset://arithmetic-base", batch_size=2)
        >>> data.prepare_data(); data.setup("fit")
        >>> sorted(next(iter(data.train_dataloader())))
        ['attention_mask', 'input_ids', 'labels']
    """

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
        tokenizer: str | None = None,
        chat_template: str | None = None,
        max_length: int | None = None,
        train_on_prompts: bool = False,
        batch_size: int = 8,
        global_batch_size: int | None = None,
        eval_batch_size: int | None = None,
        pad_to_multiple_of: int = 1,
        padding_free: bool = False,
        shuffle: bool = True,
        seed: int = 0,
        split_seed: int | None = None,
        num_workers: int = 0,
        num_proc: int | None = None,
    ) -> None:
        super().__init__()
        _check_positive(
            batch_size=batch_size,
            global_batch_size=global_batch_size,
            eval_batch_size=eval_batch_size,
            pad_to_multiple_of=pad_to_multiple_of,
            max_length=max_length,
            num_proc=num_proc,
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
        self.columns = RowColumns(row_form, prompt_column, completion_column, messages_column)
        self.validation_fraction = validation_fraction
        self.tokenizer_name = tokenizer
        self.chat_template = chat_template
        self.max_length = max_length
        self.train_on_prompts = train_on_prompts
        self.batch_size = batch_size
        self.global_batch_size = global_batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self.pad_to_multiple_of = pad_to_multiple_of
        self.padding_free = padding_free
        self.shuffle = shuffle
        self.seed = seed
        self.split_seed = seed if split_seed is None else split_seed
        self.num_workers = num_workers
        self.num_proc = num_proc
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.end_of_turn_ids: list[int] = []
        self._micro_batches = 1
        self.counts: dict[str, RowCounts] = {}
        self._rows: dict[str, Dataset] = {}
        self._divided: dict[str, Conversations] = {}

    # -- loading -----------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Read, check and tokenise the rows into the cache of ``datasets``, before any model is loaded."""
        trainer = self.trainer
        try:
            self._load(trainer.state.fn.value if trainer is not None and trainer.state.fn else "fit")
        except InputError:
            # Only one process per machine is here, and the others wait for it. All of them meet the same mistake in
            # setup, and end by it.
            if trainer is None or trainer.world_size == 1:
                raise

    def setup(self, stage: str) -> None:
        if stage == "fit" and self.global_batch_size is not None and self.trainer is not None:
            self._micro_batches = accumulate_to(
                self.trainer, self.global_batch_size, self.batch_size, self._micro_batches
            )
        self._load(stage)

    def build_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer by name, or the model's. Override for one made otherwise."""
        name, options, key = self.tokenizer_name, dict[str, Any](), "data.tokenizer"
        if name is None:
            hparams = getattr(getattr(self.trainer, "lightning_module", None), "hparams", {})
            if not isinstance(hparams.get("model"), str):
                raise InputError("data.tokenizer is not set, and the model has no name to take it from")
            name, key = hparams["model"], "model.model"
            options = {key: hparams[key] for key in ("revision", "trust_remote_code") if key in hparams}
        return load_tokenizer(name, chat_template=self.chat_template, key=key, **options)

    def _load(self, stage: str) -> None:
        if self.tokenizer is None:
            self.tokenizer = self.build_tokenizer()
            turn_end = end_of_turn(self.tokenizer)
            self.end_of_turn_ids = [turn_end[1]] if turn_end else []
            if turn_end is None:
                rank_zero_warn("the chat template ends turns with no special token: the model will not learn to stop")
        for split in SPLITS_OF_STAGE[stage]:
            if split in self._rows:
                continue
            conversations = self._conversations(split, required=split == SPLITS_OF_STAGE[stage][0])
            if conversations is not None:
                self._rows[split] = self._tokenize(split, conversations)
        self._divided.clear()

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
        return self._read(split, source)

    def _read(self, split: str, source: RowSource | str) -> Conversations:
        rows = as_source(source, "test" if split == "predict" else split)
        last_turn: dict[str, LastTurn] = {"test": "assistant", "predict": "optional"}
        return read_messages(rows, self.columns, last_turn=last_turn.get(split, "any"))

    def _divide_train(self) -> dict[str, Conversations]:
        """``train`` and ``validation`` of the training rows, read once for both."""
        if self._divided:
            return self._divided
        source = self.sources["train"]
        if source is None:
            raise InputError("data.train is not set, so data.validation_fraction has nothing to divide")
        conversations = self._read("train", source)
        order = torch.randperm(
            len(conversations.messages), generator=torch.Generator().manual_seed(self.split_seed)
        ).tolist()
        size = round(len(order) * self.validation_fraction)
        if not 0 < size < len(order):
            raise InputError(
                f"data.validation_fraction {self.validation_fraction} of {len(order)} rows leaves "
                f"{size} for validation and {len(order) - size} for training"
            )
        self._divided["train"] = conversations.select(sorted(order[size:]))
        self._divided["validation"] = conversations.select(sorted(order[:size]))
        return self._divided

    def _tokenize(self, split: str, conversations: Conversations) -> Dataset:
        assert self.tokenizer is not None
        rows = tokenize(
            conversations,
            ConversationEncoder(self.tokenizer, self.max_length, self.train_on_prompts),
            with_prompts=split != "train",
            # Generation needs no target: a row too long to learn from is still a problem to solve.
            keep_all=split in ("test", "predict"),
            num_proc=self.num_proc,
            desc=f"Tokenising {split} rows",
        )
        total, truncated = len(conversations.messages), sum(rows["truncated"])
        counts = RowCounts(total, truncated, total - len(rows))
        self.counts[split] = counts
        rank_zero_info(f"{split}: {total} rows, {truncated} truncated, {counts.dropped} dropped without a target")
        if len(rows) == 0:
            raise InputError(f"data.{split}: no row has a target left within max_length {self.max_length}")
        return rows

    # -- loaders -----------------------------------------------------------------------------------------------

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader("train", shuffle=self.shuffle)

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
        """The first ``limit`` rows of a split (all for ``None``) in their own order, of ``train`` too."""
        return self._loader(split, limit=limit)

    def has_split(self, split: str) -> bool:
        """Whether a split's rows are loaded."""
        return split in self._rows

    def references(self, split: str, limit: int | None = None) -> list[str | None]:
        """What the completions of a split are scored against: the final assistant turn of the first ``limit`` rows."""
        rows = self._rows[split]
        return list(rows["reference"][: len(rows) if limit is None else limit])

    def problems(self, split: str) -> list[str]:
        """Prompt and reference of each row of a split, to tell whether two runs had the same."""
        rows = self._rows[split]
        return [f"{prompt}{reference}" for prompt, reference in zip(rows["prompt"], rows["reference"], strict=True)]

    def _loader(
        self, split: str, *, shuffle: bool = False, with_prompts: bool = False, limit: int | None = None
    ) -> DataLoader[Any]:
        assert self.tokenizer is not None, "call setup() first"
        pad = self.tokenizer.pad_token_id
        pad = pad if pad is not None else (self.tokenizer.eos_token_id or 0)  # masked everywhere it stands
        rows: Any = self._rows[split]
        if limit is not None:
            rows = rows.select(range(min(limit, len(rows))))
        dataset = TokenizedRows(rows, int(pad))
        trainer = self.trainer
        sampler = RowSampler(
            dataset,
            num_replicas=trainer.world_size if trainer is not None else 1,
            rank=trainer.global_rank if trainer is not None else 0,
            shuffle=shuffle,
            seed=self.seed,
        )
        return DataLoader(
            dataset,
            batch_size=self.batch_size if split == "train" else self.eval_batch_size,
            sampler=sampler,
            collate_fn=Collator(int(pad), self.pad_to_multiple_of, with_prompts, self.padding_free),
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
        )


def _check_positive(**values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
