"""Streamed rows: each once a pass, over any ranks and workers, and resumed at the exact row."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice, pairwise

import pytest
import torch

from dft_lightning import CausalLMModule, DFTLoss, InstructionDataModule
from dft_lightning.data import ArithmeticRows, HubRows, MixedRows
from dft_lightning.data.batches.collating import Collator
from dft_lightning.data.batches.stream_position import StreamRecord
from dft_lightning.data.batches.streaming import Stream, StreamedBatches
from dft_lightning.data.options import BatchOptions, StreamOptions
from dft_lightning.data.rows.forms import Reading
from dft_lightning.data.rows.reading import RowReader
from dft_lightning.data.text.tokenizer import load_tokenizer
from dft_lightning.data.text.tokens import ConversationEncoder
from dft_lightning.errors import InputError
from small_runs import TINY_ARITHMETIC, data_options, trainer

TOKENIZER = load_tokenizer("asset://arithmetic-base")
ROWS = 37


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = ArithmeticRows(ROWS, min_digits=1, max_digits=6, seed=3).rows()
    path.write_text("\n".join(json.dumps(row) for _, row in rows))
    return str(path)


def stream(source, rank=0, world_size=1, position=None, **options):
    from dft_lightning.data.rows.sources import as_source

    found = data_options(**{"shuffle_buffer_size": 8, "seed": 1, **options})
    read = Stream(
        RowReader(as_source(source, "train"), Reading()),
        ConversationEncoder(TOKENIZER),
        StreamOptions(**found["streaming"]),
        BatchOptions(**found["batches"]),
        batch_size=3,
        max_length=found.get("text", {}).get("max_length"),
    )
    return StreamedBatches(read, Collator(0), rank, world_size, position)


def documents(batch):
    """The text of each document of a batch."""
    if "position_ids" not in batch:
        texts = (ids[mask == 1] for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True))
        return [TOKENIZER.decode(ids) for ids in texts]
    found = []
    for ids, positions in zip(batch["input_ids"], batch["position_ids"], strict=True):
        starts = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
        found += [TOKENIZER.decode(ids[a:b]) for a, b in pairwise(starts) if b - a > 1]
    return found


def every_row(source):
    data = InstructionDataModule(source, text={"tokenizer": "asset://arithmetic-base"})
    data.setup("fit")
    return Counter(TOKENIZER.decode(ids) for ids in data.splits.tokenized("train")["input_ids"])


@pytest.mark.parametrize("options", [{}, {"shuffle_buffer_size": 1}, {"packing": "bfd", "max_length": 128}])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_pass_has_each_row_once_on_one_rank(source, world_size, options):
    """Up to what is left over for the batch that goes on into the next pass."""
    seen = Counter()
    for rank in range(world_size):
        for batch in stream(source, rank, world_size, **options):
            if batch["stream"]["state"]["passes"] > 0:
                break
            seen.update(documents(batch))
    expected = every_row(source)
    assert not seen - expected  # nothing else, and nothing twice
    left_over = sum((expected - seen).values())
    assert left_over <= world_size * (3 if not options.get("packing") else 3 * 6)


def test_a_hub_stream_has_each_row_once_for_any_number_of_workers(tmp_path):
    """In a worker, a stream of ``datasets`` iterates over some of its files alone."""
    for part in range(3):
        rows = ArithmeticRows(10, max_digits=6, seed=part).rows()
        (tmp_path / f"train-{part}.jsonl").write_text("\n".join(json.dumps(row) for _, row in rows))
    for num_workers in (0, 2):
        data = InstructionDataModule(
            HubRows(str(tmp_path), streaming=True),
            batch_size=5,
            num_workers=num_workers,
            streaming={},
            text={"tokenizer": "asset://arithmetic-base"},
        )
        data.setup("fit")
        seen = Counter(text for batch in islice(data.train_dataloader(), 6) for text in documents(batch))
        assert seen == every_row(str(tmp_path)), num_workers


def test_orders_differ_by_pass_and_seed_and_not_by_run(source):
    def passes(count, **options):
        texts = [text for batch in islice(iter(stream(source, **options)), ROWS) for text in documents(batch)]
        return [texts[i * ROWS : (i + 1) * ROWS] for i in range(count)]

    first, second, third = passes(3)
    assert Counter(first) == Counter(second) == Counter(third) == every_row(source)
    assert first != second
    assert passes(3)[0] == first
    assert passes(1, seed=2)[0] != first
    in_order = passes(1, shuffle_buffer_size=1)[0]
    assert in_order == list(every_row(source).elements())


@pytest.mark.parametrize(
    "options",
    [{}, {"num_workers": 2}, {"packing": "bfd", "max_length": 128}, {"packing": "bfd_split", "max_length": 40}],
)
def test_a_stream_goes_on_at_the_exact_row(source, options):
    """From every place: what comes after a checkpoint is what would have come."""

    def module():
        data = InstructionDataModule(
            source,
            batch_size=3,
            **data_options(tokenizer="asset://arithmetic-base", streaming={}, shuffle_buffer_size=8, **options),
        )
        data.setup("fit")
        return data

    def take(data, iterator, count):
        batches = (data.on_before_batch_transfer(batch, 0) for batch in islice(iterator, count))
        return [(batch["input_ids"].tolist(), batch["labels"].tolist()) for batch in batches]

    whole_run = module()
    expected = take(whole_run, iter(whole_run.train_dataloader()), 30)
    for done in (1, 5, 12, 13, 14) if "num_workers" not in options else (5,):
        interrupted = module()
        before = take(interrupted, iter(interrupted.train_dataloader()), done)
        state = json.loads(json.dumps(interrupted.state_dict()))
        resumed = module()
        resumed.load_state_dict(state)
        assert before + take(resumed, iter(resumed.train_dataloader()), 30 - done) == expected
        assert resumed.state_dict() == whole_run.state_dict()


def test_a_resumed_run_ends_with_the_same_weights(source, tmp_path):
    def fit(max_steps, ckpt_path=None):
        torch.manual_seed(0)
        module = CausalLMModule(TINY_ARITHMETIC, loss=DFTLoss(), optimizer={"lr": 1e-3}, schedule={"decay": "constant"})
        data = InstructionDataModule(source, batch_size=4, streaming={}, text={"tokenizer": "asset://arithmetic-base"})
        run = trainer(max_steps=max_steps, accumulate_grad_batches=2)
        run.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
        return run, module

    _, expected = fit(9)
    interrupted, _ = fit(5)
    interrupted.save_checkpoint(tmp_path / "run.ckpt")
    _, resumed = fit(9, str(tmp_path / "run.ckpt"))
    for one, other in zip(resumed.parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_epoch_begins_where_the_last_one_ended(source, num_workers):
    def fit(data, **options):
        class Recorder(CausalLMModule):
            def on_train_batch_start(self, batch, batch_idx):
                seen.append(batch["input_ids"].tolist())

        seen = []
        trainer(**options).fit(Recorder(TINY_ARITHMETIC, schedule={"decay": "constant"}), datamodule=data)
        return seen

    def module():
        return InstructionDataModule(
            source, batch_size=3, num_workers=num_workers, streaming={}, text={"tokenizer": "asset://arithmetic-base"}
        )

    data = module()
    expected = fit(data, max_steps=7)
    assert fit(data, max_steps=7) == expected  # another run is from the start
    for options in ({}, {"reload_dataloaders_every_n_epochs": 1}):
        assert fit(module(), max_steps=7, limit_train_batches=3, **options) == expected
    repeated = fit(module(), max_steps=7, overfit_batches=3)
    assert repeated == [*expected[:3], *expected[:3], expected[0]]


def test_every_rank_goes_on_from_its_own_place(source):
    records = []
    for rank in range(2):
        record = StreamRecord()
        for batch in islice(iter(stream(source, rank, 2)), 4 + rank):
            record.take(batch)
        records.append(record.state_dict(1)["stream"][0])
    for rank in range(2):
        record = StreamRecord()
        record.load_state_dict({"stream": records})
        resumed = next(iter(stream(source, rank, 2, record.position(rank, 2))))
        expected = next(islice(iter(stream(source, rank, 2)), 4 + rank, None))
        assert documents(resumed) == documents(expected)
    record.load_state_dict({"stream": records})
    with pytest.raises(InputError, match="was read by 2 processes and there are 3: resume on as many"):
        record.position(0, 3)


def test_another_number_of_workers_is_refused(source):
    record = StreamRecord()
    record.take(next(iter(stream(source))))
    record.load_state_dict(record.state_dict(1))
    with pytest.raises(InputError, match="read by 1 workers and there are 2: set data.num_workers as it was"):
        record.position(0, 1, num_workers=2)


def test_bad_rows_are_named_or_counted(tmp_path):
    path = tmp_path / "rows.jsonl"
    good = json.dumps({"prompt": "1+1=", "completion": "2"})
    path.write_text(f'{good}\n{{"prompt": true, "completion": "2"}}\n{good}\nnonsense\n')

    def take(on_bad_rows, count):
        data = InstructionDataModule(
            str(path),
            batch_size=2,
            streaming={},
            text={"tokenizer": "asset://arithmetic-base"},
            rows={"on_bad_rows": on_bad_rows},
        )
        data.setup("fit")
        for batch in islice(iter(data.train_dataloader()), count):
            assert "stream" not in data.on_before_batch_transfer(batch, 0)
        return data.state_dict()["stream"][0]

    with pytest.raises(InputError, match=r"rows.jsonl: row (2: prompt: expected a string|4: broken JSON)"):
        take("raise", 1)
    with pytest.warns(UserWarning, match=r"on_bad_rows: skip: row"):
        assert take("skip", 3)["bad"] == 6


def test_bad_rows_are_counted_once_by_a_run_that_is_resumed(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("nonsense\n" + '{"prompt": "1+1=", "completion": "2"}\n' * 20)

    def module():
        data = InstructionDataModule(
            str(path),
            batch_size=2,
            streaming={},
            text={"tokenizer": "asset://arithmetic-base"},
            rows={"on_bad_rows": "skip"},
        )
        data.setup("fit")
        return data

    def take(data):
        data.on_before_batch_transfer(next(iter(data.train_dataloader())), 0)
        return data.state_dict()

    with pytest.warns(UserWarning, match=r"on_bad_rows: skip: row"):
        state = take(module())
    resumed = module()
    resumed.load_state_dict(state)
    assert take(resumed)["stream"][0]["bad"] == 1


def test_a_stream_without_a_row_to_learn_from_ends(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("")
    data = InstructionDataModule(str(path), streaming={}, text={"tokenizer": "asset://arithmetic-base"})
    data.setup("fit")
    with pytest.raises(InputError, match=r"rows.jsonl: a pass over the rows of worker 0 of 1 has none with a target"):
        data.on_before_batch_transfer(next(iter(data.train_dataloader())), 0)


def test_a_stream_of_a_mixture_has_its_sources():
    parts = {"easy": ArithmeticRows(9, max_digits=3), "hard": ArithmeticRows(9, min_digits=5)}
    data = InstructionDataModule(
        MixedRows(parts, {"easy": 1, "hard": 1}, "all_exhausted"),
        streaming={},
        text={"tokenizer": "asset://arithmetic-base"},
    )
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert data.source_names == ["easy", "hard"]
    for ids, source in zip(batch["input_ids"], batch["source"], strict=True):
        digits = len(TOKENIZER.decode(ids).split("+")[0].lstrip("^"))
        assert int(source[0]) == (digits >= 5)


def test_a_mixture_whose_passes_leave_the_same_rows_out_is_refused():
    """Five rows of the one source, and about as many of the thousand of the other, would be all of the run."""
    mixture = MixedRows({"large": ArithmeticRows(1000), "small": ArithmeticRows(5)}, {"large": 1, "small": 1})
    data = InstructionDataModule(mixture, streaming={}, text={"tokenizer": "asset://arithmetic-base"})
    with pytest.raises(InputError, match="set its stopping_strategy: all_exhausted"):
        data.setup("fit")


@pytest.mark.parametrize("streaming", [False, True])
def test_the_modules_own_hook_is_called(source, streaming):
    class Hooked(CausalLMModule):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            seen.append(sorted(batch))
            return batch

    seen = []
    data = InstructionDataModule(
        source, batch_size=3, streaming={} if streaming else None, text={"tokenizer": "asset://arithmetic-base"}
    )
    trainer(max_steps=2).fit(Hooked(TINY_ARITHMETIC, schedule={"decay": "constant"}), datamodule=data)
    assert seen == [["attention_mask", "input_ids", "labels", "layout"]] * 2


def test_streamed_rows_cannot_be_evaluated(source):
    data = InstructionDataModule(source, streaming={}, text={"tokenizer": "asset://arithmetic-base"})
    data.setup("fit")
    with pytest.raises(InputError, match=r"data.streaming: the training rows cannot be gone back to"):
        data.evaluation_dataloader("train", 4)


def test_what_a_stream_needs(source):
    data = InstructionDataModule(source, source, streaming={}, text={"tokenizer": "asset://arithmetic-base"})
    with pytest.raises(InputError, match="goes round without end: set trainer.max_steps"):
        trainer(max_epochs=1, max_steps=-1).fit(CausalLMModule(TINY_ARITHMETIC), datamodule=data)
    with pytest.raises(InputError, match="no end of an epoch to validate at: set trainer.val_check_interval"):
        trainer(max_steps=1).fit(CausalLMModule(TINY_ARITHMETIC), datamodule=data)
    run = trainer(max_steps=4, val_check_interval=2, check_val_every_n_epoch=None, limit_val_batches=1)
    run.fit(CausalLMModule(TINY_ARITHMETIC), datamodule=data)
    assert "val/nll" in run.callback_metrics
    with pytest.raises(ValueError, match="no known rows to group or divide"):
        InstructionDataModule(source, validation_fraction=0.1, streaming={})


def test_hub_parts_of_a_streamed_mixture_are_streamed():
    mixture = MixedRows({"a": HubRows("some/name"), "b": "other/name"})
    data = InstructionDataModule(mixture, streaming={}, text={"tokenizer": "asset://arithmetic-base"})
    data.setup("fit")
    assert all(source.streaming for source in mixture.sources.values())
