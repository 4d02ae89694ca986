"""Rows of a step dealt to ranks and micro-batches by their tokens: the same rows, the same gradient, hardly a wait."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest

from dft_lightning import CausalLMModule, InstructionDataModule
from dft_lightning.data import ArithmeticRows
from dft_lightning.data.batches.dealing import deal_rows, deal_tokens, fits, waiting
from dft_lightning.data.batches.sampling import RowSampler, epoch_order
from dft_lightning.data.batches.step_dealing import RowDealing, TokenDealing
from dft_lightning.errors import InputError
from small_runs import TINY_ARITHMETIC, arithmetic_data, on_two_processes, step_gradient, trainer


def ragged(number, seed=0):
    """Lengths like those of GSM8K: a mean of 200, and a tail to 570."""
    return np.random.default_rng(seed).lognormal(5.2, 0.38, number).astype(np.int64).clip(70, 570)


SHAPES = [(8, [4]), (8, [2] * 4), (8, [4, 4]), (32, [2] * 4), (3, [4, 4, 1]), (1, [3, 3, 2]), (5, [1])]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("lockstep", [False, True])
@pytest.mark.parametrize(("ranks", "sizes"), SHAPES)
def test_every_row_is_dealt_once(ranks, sizes, padded, lockstep):
    for seed in range(5):
        lengths = ragged(ranks * sum(sizes), seed)
        dealt = deal_rows(lengths, ranks, sizes, padded, lockstep)
        assert [[len(rows) for rows in rank] for rank in dealt] == [sizes] * ranks
        assert sorted(np.concatenate([rows for rank in dealt for rows in rank])) == list(range(len(lengths)))


@pytest.mark.parametrize(
    ("ranks", "sizes", "bound", "bound_of_each"),
    [
        (8, [4], 0.05, 0.05),
        (8, [2] * 4, 0.02, 0.07),
        (8, [8], 0.02, 0.02),
        (32, [8], 0.02, 0.02),
        (32, [2] * 4, 0.02, 0.12),
    ],
)
def test_ranks_hardly_wait(ranks, sizes, bound, bound_of_each):
    """On the mean of some steps; of rows that are dealt in turn they wait for a sixth to more than half of the step."""
    size, waits = ranks * sum(sizes), []
    for seed in range(10):
        lengths = ragged(size, seed)
        in_turn = list(np.arange(size).reshape(len(sizes), sizes[0], ranks).transpose(2, 0, 1))
        dealt = deal_rows(lengths, ranks, sizes, False)
        alike = deal_rows(lengths, ranks, sizes, False, lockstep=True)
        of_tokens = deal_tokens(lengths, ranks, len(sizes), 10**6, False)
        waits.append([waiting(each, lengths, False) for each in (in_turn, dealt, alike, of_tokens)])
    in_turn, dealt, alike, of_tokens = np.mean(waits, 0)
    assert in_turn[0] > 0.12
    assert dealt[0] < bound
    assert alike[1] < bound_of_each
    assert of_tokens[0] < 0.02


def test_against_every_way_of_dealing():
    """Joined rows of two ranks: the longest rank is within a twentieth of that of the best of all ways."""
    for seed in range(40):
        lengths = ragged(8, seed)
        best = min(
            max(lengths[list(own)].sum(), lengths.sum() - lengths[list(own)].sum())
            for own in itertools.combinations(range(8), 4)
        )
        dealt = deal_rows(lengths, 2, [4], padded=False)
        found = max(lengths[rank[0]].sum() for rank in dealt)
        assert best <= found <= 1.05 * best


def test_padded_rows_of_like_lengths_come_together():
    lengths = ragged(64)
    dealt = deal_rows(lengths, 4, [4] * 4, padded=True)
    tokens = sum(4 * lengths[rows].max() for rank in dealt for rows in rank)
    ordered = np.sort(lengths)[::-1].reshape(-1, 4)
    assert tokens == 4 * ordered.max(1).sum()  # as few as micro-batches of four rows can have


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("lockstep", [False, True])
def test_micro_batches_of_tokens_are_within_their_limit(padded, lockstep):
    for seed, micro_batches in itertools.product(range(3), (1, 5)):
        lengths = ragged(50, seed)
        limits = [limit for limit in range(300, 8000, 50) if fits(lengths, 4 * micro_batches, limit, padded)]
        assert limits == list(range(limits[0], 8000, 50))
        dealt = deal_tokens(lengths, 4, micro_batches, limits[0], padded, lockstep)
        assert [len(rank) for rank in dealt] == [micro_batches] * 4
        assert sorted(np.concatenate([rows for rank in dealt for rows in rank])) == list(range(50))
        for rows in (rows for rank in dealt for rows in rank if len(rows)):
            tokens = len(rows) * lengths[rows].max() if padded else lengths[rows].sum()
            assert tokens <= limits[0]
        assert deal_tokens(lengths, 4, micro_batches, limits[0] - 50, padded) is None
        # No way of dealing needs less than all tokens have, nor than the longest row.
        assert limits[0] + 50 > max(lengths.max(), lengths.sum() / (4 * micro_batches))


def test_evening_out_keeps_the_limit():
    """Many odd cases, a few of which it would break in."""
    generator = np.random.default_rng(0)
    for _ in range(400):
        ranks, micro_batches = (int(n) for n in generator.integers(1, 5, 2))
        lengths = generator.integers(1, 60, int(generator.integers(2, 30)))
        least = max(int(lengths.max()), -(-int(lengths.sum()) // (ranks * micro_batches)))
        for lockstep, extra in itertools.product((False, True), (0, 2, 5)):
            dealt = deal_tokens(lengths, ranks, micro_batches, least + extra, False, lockstep)
            if dealt is not None:
                assert max(lengths[rows].sum() for rank in dealt for rows in rank) <= least + extra


def steps_of(ranks, size, dealing, epoch=0, start=0, seed=5):
    """The rows of each step of an epoch, and what each rank yields."""
    own = []
    for rank in range(ranks):
        sampler = RowSampler(range(size), ranks, rank, shuffle=True, seed=seed, dealing=dealing)
        sampler.load_state_dict({"epoch": epoch, "rows": start})
        own.append(list(sampler))
    return own


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("ranks", "micro_batches", "batch_size"), [(1, 12, 1), (2, 3, 2), (4, 1, 3), (3, 4, 1), (12, 1, 1)]
)
def test_the_same_rows_make_the_same_steps(ranks, micro_batches, batch_size, padded):
    """On any number of ranks and of micro-batches, in the epoch's last step too, and where a run goes on."""
    size, lengths = 43, ragged(43)
    dealing = RowDealing(lengths, padded, batch_size, lambda epoch: micro_batches)
    for start in (0, 12):
        own = steps_of(ranks, size, dealing, epoch=2, start=start)
        assert len({len(rank) for rank in own}) == 1
        order, per_rank = epoch_order(size, True, 5, 2)[start:], 12 // ranks
        for step in range(-(-len(order) // 12)):
            rows = [row for rank in own for row in rank[step * per_rank : (step + 1) * per_rank]]
            assert sorted(row for row in rows if row >= 0) == sorted(order[12 * step : 12 * step + 12])


def test_a_run_that_goes_on_in_larger_steps_ends_the_one_that_it_is_in():
    """Steps end where the trainer's do, which counts from the beginning of the epoch: after row 16, 24 and so on."""
    dealing = RowDealing(ragged(40), False, 2, lambda epoch: 4)
    order = epoch_order(40, True, 5, 0)
    (own,) = steps_of(1, 40, dealing, start=12)
    assert sorted(own[:4]) == sorted(order[12:16])
    assert sorted(own[4:12]) == sorted(order[16:24])
    assert sorted(own) == sorted(order[12:])


def test_an_epoch_that_is_cut_short_deals_what_is_left_of_it():
    dealing = RowDealing(ragged(43), False, 2, lambda epoch: 3, limit=16)
    own = steps_of(2, 43, dealing)
    assert [len(rank) for rank in own] == [8, 8]
    assert sorted(own[0] + own[1]) == sorted(epoch_order(43, True, 5, 0)[:16])


@pytest.mark.parametrize(("limit", "rows"), [(6, 12), (0.3, 12), (99, 40), (None, 40)])
def test_a_trainer_that_cuts_epochs_short_trains_on_the_rows_that_come_first(limit, rows):
    class Watch(CausalLMModule):
        def training_step(self, batch, batch_idx):
            seen.extend(batch["attention_mask"].sum(1).tolist())
            return super().training_step(batch, batch_idx)

    seen = []
    data = arithmetic_data(40, batch_size=2, shuffle=True)
    fit = trainer(max_epochs=1, max_steps=-1, accumulate_grad_batches=4, limit_train_batches=limit)
    fit.fit(Watch(TINY_ARITHMETIC), datamodule=data)
    first = epoch_order(40, True, data.batches.seed, 0)[:rows]
    assert sorted(seen) == sorted(data.splits.lengths("train")[first].tolist())


def test_the_state_of_dealt_rows_is_of_whole_steps():
    dealing = RowDealing(ragged(40), False, 2, lambda epoch: 3)
    sampler = RowSampler(range(40), 2, 1, shuffle=True, dealing=dealing)
    drawn = iter(sampler)
    found = []
    for _ in range(13):
        next(drawn)
        found.append(sampler.state_dict()["rows"])
    assert found == [0] * 5 + [12] * 6 + [24] * 2


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("ranks", [1, 3])
def test_steps_of_tokens(padded, ranks):
    size, lengths = 50, ragged(50)
    orders = [epoch_order(size, True, 5, epoch) for epoch in range(3)]
    dealing = TokenDealing.of_epochs(orders, lengths, padded, 700, 14, ranks)
    assert (dealing.rows, dealing.last > 0) == (14, True)
    of_epoch = 3 * dealing.micro_batches + dealing.last
    for epoch, start in ((0, 0), (1, 0), (2, 28)):
        own = steps_of(ranks, size, dealing, epoch, start)
        batches = of_epoch - start // 14 * dealing.micro_batches
        assert [len(rank) for rank in own] == [batches] * ranks
        sampler = RowSampler(range(size), ranks, 0, dealing=dealing)
        assert len(sampler) == of_epoch
        for step, first in enumerate(range(start, size, 14)):
            part = slice(step * dealing.micro_batches, (step + 1) * dealing.micro_batches)
            rows = [row for rank in own for batch in rank[part] for row in batch if row >= 0]
            assert sorted(rows) == sorted(orders[epoch][first : first + 14])
        for batch in (batch for rank in own for batch in rank):
            real = lengths[[row for row in batch if row >= 0]]
            assert len(batch) >= 1
            assert (len(real) * real.max(initial=0) if padded else real.sum()) <= 700
    # One micro-batch less would not do for the largest step.
    if dealing.micro_batches > 1:
        assert not all(
            fits(lengths[order[first : first + 14]], ranks * (dealing.micro_batches - 1), 700, padded)
            for order in orders
            for first in (0, 14, 28)
        )


def test_a_last_step_is_never_of_more_micro_batches_than_others():
    """Which the trainer would take for two."""
    lengths = np.array([10] * 8 + [90] * 3)
    dealing = TokenDealing.of_epochs([list(range(11))], lengths, True, 100, 8, ranks=1)
    assert (dealing.micro_batches, dealing.last) == (3, 3)
    assert [len(dealing.deal(rows, 1)[0]) for rows in (list(range(8)), [8, 9, 10])] == [3, 3]


def test_an_epoch_that_was_not_counted_is_named():
    lengths = np.array([10] * 8 + [90] * 8)
    dealing = TokenDealing.of_epochs([[*range(0, 16, 2), *range(1, 16, 2)]], lengths, True, 200, 8, ranks=1)
    with pytest.raises(InputError, match="does not fit in .* micro-batches of 200 tokens, .* set trainer.max_epochs"):
        dealing.deal(list(range(8, 16)), 1)


@pytest.mark.parametrize("padded", [False, True])
def test_tokens_against_every_way_of_cutting(padded):
    """The smallest limit that rows are found to fit in: of padded ones, cut by length, the best there is."""
    for seed in range(30):
        lengths = np.sort(ragged(9, seed))[::-1].copy()
        limits = range(int(lengths.max()), int(lengths.sum()) * 9)
        found = next(limit for limit in limits if fits(lengths, 3, limit, padded))
        cuts = itertools.combinations(range(1, 9), 2)
        parts = [np.split(lengths, cut) for cut in cuts]
        best = min(max(len(part) * part.max() if padded else part.sum() for part in each) for each in parts)
        assert found == best if padded else found <= 1.1 * best


TOKENS = {"global_batch_size": 16, "max_tokens": 150}
DEALT = [
    {"strategy": strategy, "dtype": "float64", "loss": "DFTLoss", "batch_size": 2}
    | {"accumulate": accumulate, "data": data}
    for strategy in ("ddp", "fsdp2")
    for accumulate, data in ((4, {}), (4, {"padding_free": True}), (1, TOKENS), (1, {**TOKENS, "padding_free": True}))
]


@pytest.fixture(scope="module")
def two_processes():
    return on_two_processes(step_gradient, DEALT)


@pytest.mark.parametrize("index", range(len(DEALT)), ids=[f"{case['strategy']} {case['data']}" for case in DEALT])
def test_gradients_are_those_of_one_micro_batch(two_processes, index):
    """Of 16 rows in one process, in float64."""
    expected = step_gradient(16, 1, "float64", "DFTLoss")
    accumulate, data = DEALT[index]["accumulate"], DEALT[index]["data"]
    micro_batches = 2 * accumulate if accumulate > 1 else 1  # of tokens, the data module says how many
    here = step_gradient(2, micro_batches, "float64", "DFTLoss", data=data)
    for found in (two_processes[index], here):
        for gradient, whole in zip(found, expected, strict=True):
            assert float((gradient - whole).norm() / whole.norm()) < 1e-10


def test_a_fit_in_micro_batches_of_tokens(caplog):
    class Watch(CausalLMModule):
        def training_step(self, batch, batch_idx):
            seen.append((self.trainer.global_step, batch["layout"].num_tokens, batch["input_ids"].numel()))
            return super().training_step(batch, batch_idx)

    seen = []
    data = arithmetic_data(40, **{**TOKENS, "max_tokens": 200}, shuffle=True)
    fit = trainer(max_epochs=2, max_steps=-1)
    caplog.set_level("INFO")
    fit.fit(Watch(TINY_ARITHMETIC, schedule={"decay": "constant"}), datamodule=data)
    assert fit.global_step == 6  # of 16, 16 and 8 rows
    assert all(size <= 200 for _, _, size in seen)
    tokens = int(data.splits.lengths("train").sum())
    assert sum(number for _, number, _ in seen if number > 2) == 2 * tokens
    by_step = [len([each for each in seen if each[0] == step]) for step in range(6)]
    assert by_step[:2] == by_step[3:5] == [fit.accumulate_grad_batches] * 2
    assert by_step[2] == by_step[5] <= by_step[0]
    step = f"16 rows in 1 processes x {fit.accumulate_grad_batches} micro-batches of at most 200 tokens"
    assert step in caplog.text


@pytest.mark.parametrize(
    ("options", "trained", "message"),
    [
        ({"max_tokens": 30}, {}, r"data.train: row \d+ has \d+ tokens, and a micro-batch at most 30 .*max_tokens"),
        ({"max_tokens": 200}, {"max_epochs": -1, "max_steps": -1}, "set trainer.max_epochs or trainer.max_steps"),
        ({"max_tokens": 200}, {"accumulate_grad_batches": 99}, "16 rows are .* micro-batches of at most 200 tokens"),
        ({"max_tokens": 200}, {"limit_train_batches": 0.5}, "trainer.limit_train_batches would cut a step apart"),
        ({"max_tokens": 200}, {"overfit_batches": 2}, "trainer.overfit_batches takes rows in their own order"),
    ],
)
def test_what_does_not_fit_is_said(options, trained, message):
    data = arithmetic_data(40, global_batch_size=16, **options)
    with pytest.raises(InputError, match=message):
        trainer(**{"max_epochs": 1, "max_steps": -1, **trained}).fit(CausalLMModule(TINY_ARITHMETIC), datamodule=data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batches": {"max_tokens": 100}}, "set global_batch_size, the rows of a step"),
        ({"batches": {"max_tokens": 100}, "global_batch_size": 8, "streaming": {}}, "leave streaming out"),
        (
            {"batches": {"max_tokens": 100, "packing": "bfd"}, "global_batch_size": 8},
            "leave group_by_length out, and packing",
        ),
        ({"batches": {"max_tokens": 100, "group_by_length": True}}, "leave group_by_length out"),
        ({"batches": {"max_tokens": 0}}, "max_tokens must be at least 1"),
    ],
)
def test_options_that_contradict(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        InstructionDataModule(ArithmeticRows(4), **options)


def test_a_loader_without_a_trainer_has_every_row():
    data = arithmetic_data(20, **TOKENS)
    data.load("fit")
    batches = list(data.train_dataloader())
    assert sum(int((batch["labels"] != -100).sum()) for batch in batches) == sum(
        sum(label != -100 for label in row["labels"][1:]) for row in data.splits.tokenized("train")
    )
    assert max(batch["input_ids"].numel() for batch in batches) <= 150
