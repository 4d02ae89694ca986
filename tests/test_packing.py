"""Packed rows: what comes together, what is learnt of it, and that it is what the same rows padded give."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import at_hand
from dft_lightning import CausalLMModule, DFTLoss, InstructionDataModule
from dft_lightning.data import ArithmeticRows, MixedRows
from dft_lightning.data.batches.collating import Collator, PackedRows
from dft_lightning.data.batches.packing import Pieces, cut, pack, whole
from dft_lightning.data.batches.sampling import RowSampler
from dft_lightning.errors import InputError
from small_runs import TINY_ARITHMETIC, arithmetic_data, data_options, trainer
from test_padding_free import GEMMA3, GPT2, LLAMA, QWEN2, SequenceMean, loss_and_gradient, rows

# -- what comes together ---------------------------------------------------------------------------------------------


def contents(packs):
    return [list(packs[row]) for row in range(len(packs))]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), max_size=120), st.integers(0, 3))
def test_every_piece_is_in_one_row_and_no_row_is_too_long(lengths, seed):
    packs = pack(whole(lengths), 40, seed)
    found = contents(packs)
    assert sorted(piece for row in found for piece in row) == [(i, 0, length) for i, length in enumerate(lengths)]
    assert all(sum(stop for _, _, stop in row) <= 40 for row in found)
    assert contents(pack(whole(lengths), 40, seed)) == found


def best_fit_decreasing(lengths, max_length):
    """The plain method: each piece into the fullest row that has room."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, room in enumerate(rooms) if room >= length]
        best = min(fitting, key=lambda i: rooms[i], default=None)
        if best is None:
            rooms.append(max_length - length)
        else:
            rooms[best] -= length
    return len(rooms)


@pytest.mark.parametrize(
    "draw",
    [
        lambda g: g.integers(1, 257, 800),
        lambda g: np.clip(g.lognormal(4, 0.7, 800), 1, 256).astype(int),
        lambda g: g.integers(130, 257, 300),
        lambda g: np.concatenate([g.integers(200, 257, 100), g.integers(2, 20, 900)]),
        lambda g: np.full(300, 80),
        lambda g: g.integers(25, 140, 800),
    ],
    ids=["uniform", "lognormal", "long", "two_kinds", "equal", "short"],
)
def test_rows_are_as_full_as_by_best_fit_decreasing(draw):
    lengths = draw(np.random.default_rng(0))
    plain, ours = best_fit_decreasing(lengths.tolist(), 256), len(pack(whole(lengths), 256))
    assert ours <= plain * 1.01
    assert ours >= lengths.sum() / 256


def test_rows_like_gsm8k_are_99_percent_full():
    lengths = np.clip(np.random.default_rng(0).normal(217, 70, 7000), 97, 570).astype(int)
    assert pack(whole(lengths), 1024).efficiency(1024) > 0.99
    assert lengths.sum() / 1024 / best_fit_decreasing(lengths.tolist(), 1024) < 0.985  # what the plain method gives


def test_seeds_pack_otherwise():
    lengths = np.random.default_rng(0).integers(5, 60, 200)
    assert contents(pack(whole(lengths), 128, seed=0)) != contents(pack(whole(lengths), 128, seed=1))


def test_a_piece_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="pieces must have 1 to 8 tokens, got 2 to 9"):
        pack(whole([2, 9]), 8)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=50), max_size=8), st.integers(2, 12))
def test_cutting_loses_no_target_and_counts_none_twice(targets, max_length):
    """The first token of a document or piece is never a target; all the others that are, stay."""
    documents = [np.array(flags) for flags in targets]
    pieces = cut([len(flags) for flags in documents], max_length, lambda i: documents[i])
    seen = []
    for index, start, stop in zip(pieces.index, pieces.start, pieces.stop, strict=True):
        assert stop - start <= max_length
        seen += [(int(index), place) for place in range(start + 1, stop) if documents[index][place]]
    expected = [(i, place) for i, flags in enumerate(documents) for place in range(1, len(flags)) if flags[place]]
    assert sorted(seen) == expected


# -- batches ---------------------------------------------------------------------------------------------------------


def items(data, sizes):
    """Packs of so many of the rows each."""
    found, place = [], 0
    for size in sizes:
        found.append({"documents": data[place : place + size]})
        place += size
    return found


def test_a_packed_batch_by_hand():
    first = {"input_ids": [5, 6, 7], "labels": [5, 6, 7], "weights": [0, 0.5, 2]}
    second, third = ({"input_ids": ids, "labels": ids, "weights": None} for ids in ([8, 9], [3]))
    batch = Collator(0)([{"documents": [first, second]}, {"documents": [third]}])
    layout = batch.pop("layout")
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [[5, 6, 7, 8, 9], [3, 0, 0, 0, 0]],
        "labels": [[-100, 6, 7, -100, 9], [-100] * 5],
        "position_ids": [[0, 1, 2, 0, 1], [0, 0, 0, 0, 0]],  # each token of padding is a document
        "token_weight": [[0, 0.5, 2, 1, 1], [1, 0, 0, 0, 0]],
    }
    assert (layout.num_tokens, layout.documents) == (6, [3, 2, 1, 1, 1, 1, 1])


def packed_result(model, attention, padding_free, data, loading=None, **options):
    torch.manual_seed(0)
    loading = {"attn_implementation": attention, **(loading or {})}
    module = CausalLMModule(model, loading=loading, **{"loss": DFTLoss(), **options})
    module.configure_model()
    batch = Collator(0, padding_free=padding_free)(items(data, (2, 3)))
    output = module.token_output(batch, statistics=["entropy"])
    output.loss.backward()
    return output, torch.cat([p.grad.flatten() for p in module.parameters()])


@pytest.mark.parametrize(
    ("model", "attention", "padding_free", "options"),
    [
        *((model, attention, False, {}) for model in (LLAMA, QWEN2, GPT2, GEMMA3) for attention in ("sdpa", "eager")),
        (LLAMA, "documents", True, {}),
        (LLAMA, "sdpa", False, {"loading": {"head": "full"}}),
        (LLAMA, "sdpa", False, {"loss": SequenceMean()}),
        (LLAMA, "sdpa", False, {"loss": SequenceMean(), "loading": {"head": "full"}}),
        (LLAMA, "documents", True, {"loss": SequenceMean(), "loading": {"head": "full"}}),
    ],
)
def test_losses_and_gradients_are_those_of_the_same_rows_padded(model, attention, padding_free, options):
    expected, expected_gradient = loss_and_gradient(model, False, "eager", **options)
    output, gradient = packed_result(model, attention, padding_free, rows(), **options)
    for name in ("loss", "log_prob", "weight", "entropy"):
        torch.testing.assert_close(getattr(output, name), getattr(expected, name), rtol=1e-5, atol=1e-5)
    assert (gradient - expected_gradient).norm() < 1e-5 * expected_gradient.norm()


def test_a_real_model():
    folder, data = str(at_hand("models/stories260K")), rows(vocabulary=512, lengths=(40, 90, 7, 120, 33))
    expected, expected_gradient = loss_and_gradient(folder, False, "eager", data=data)
    for attention, padding_free in (("sdpa", False), ("documents", True)):
        output, gradient = packed_result(folder, attention, padding_free, data)
        torch.testing.assert_close(output.log_prob, expected.log_prob, rtol=1e-5, atol=1e-5)
        assert (gradient - expected_gradient).norm() < 1e-5 * expected_gradient.norm()


def test_an_attention_that_finds_documents_in_one_row_alone_is_refused(monkeypatch):
    """What flash attention does with several rows; one row passes."""
    from transformers import masking_utils

    find = masking_utils.find_packed_sequence_indices
    alone = lambda position_ids: find(position_ids) if len(position_ids) == 1 else None  # noqa: E731
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", alone)
    with pytest.raises(
        InputError, match=r"with attn_implementation sdpa does not keep .* set data.batches.padding_free: true"
    ):
        packed_result(LLAMA, "sdpa", False, rows())
    packed_result(LLAMA, "sdpa", True, rows())


def test_documents_attention_takes_one_row():
    with pytest.raises(InputError, match="documents takes one row at a time: set data.batches.padding_free: true"):
        packed_result(LLAMA, "documents", False, rows())


# -- runs ------------------------------------------------------------------------------------------------------------


def run(num_workers=0, max_steps=4, **options):
    torch.manual_seed(0)
    module = CausalLMModule(TINY_ARITHMETIC, loss=DFTLoss(), loading={"dtype": "float64"})
    data = arithmetic_data(40, batch_size=2, packing="bfd", max_length=256, num_workers=num_workers, **options)
    one = trainer(max_steps=max_steps, precision="64-true", log_every_n_steps=1)
    one.fit(module, datamodule=data)
    return module, data, one


def test_the_same_for_any_number_of_workers():
    (first, data, _), (second, _, _) = run(), run(num_workers=2)
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
    seen = sorted(row for pack_ in contents(data.packs) for row, _, _ in pack_)
    assert seen == list(range(40))


def test_an_epoch_is_the_same_tokens_packed_or_not():
    """One epoch in one step: gradients are those of all rows padded, to float64's last digits."""
    gradients = []
    for options in ({"packing": "bfd", "max_length": 256}, {}, {"packing": "bfd_split", "max_length": 2000}):
        torch.manual_seed(0)
        module = CausalLMModule(TINY_ARITHMETIC, loss=DFTLoss(), loading={"dtype": "float64"})
        data = arithmetic_data(24, batch_size=24, **options)
        data.setup("fit")
        module.configure_model()
        (batch,) = data.train_dataloader()
        output = module.token_output(batch)
        (output.loss / len(output.log_prob)).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in module.parameters()]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(gradients[2], gradients[1], rtol=1e-10, atol=1e-14)


def test_long_rows_are_cut_off_or_into_pieces():
    for packing, truncated in (("bfd", 9), ("bfd_split", 0)):
        data = arithmetic_data(12, packing=packing, max_length=16, batch_size=1)
        data.sources["validation"] = data.sources["train"]
        data.setup("fit")
        assert data.splits.counts["train"].truncated == truncated
        assert data.splits.counts["validation"].truncated == 9  # these are never packed
        targets = sum(int((batch["labels"] != -100).sum()) for batch in data.train_dataloader())
        whole_targets = sum(label != -100 for labels in data.splits.tokenized("train")["labels"] for label in labels)
        assert targets == whole_targets
        assert all(batch["input_ids"].shape[1] <= 16 for batch in data.train_dataloader())


def test_losses_of_whole_sequences_are_refused_where_rows_are_split():
    data = arithmetic_data(12, packing="bfd_split", max_length=64)
    with pytest.raises(InputError, match=r"SequenceMean reads whole sequences .* bfd_split cuts them: use bfd"):
        trainer().fit(CausalLMModule(TINY_ARITHMETIC, loss=SequenceMean()), datamodule=data)


def test_options_that_contradict():
    for options, expected in (
        ({"packing": "bfd"}, "packing needs max_length"),
        ({"packing": "bfd", "max_length": 8, "group_by_length": True}, "leave group_by_length out"),
        ({"packing": "wrapped", "max_length": 8}, "packing must be one of None, bfd, bfd_split"),
    ):
        with pytest.raises(ValueError, match=expected):
            InstructionDataModule("rows.jsonl", **data_options(**options))


def test_packs_share_out_over_ranks():
    data = arithmetic_data(30, packing="bfd", max_length=200, batch_size=1)
    data.setup("fit")
    dataset = PackedRows(data.splits.tokenized("train"), data.packs, 0)
    shares = [list(RowSampler(dataset, 2, rank, shuffle=True)) for rank in range(2)]
    assert sorted(i for share in shares for i in share if i >= 0) == list(range(len(data.packs)))
    filler = Collator(0)([dataset[-1]])
    assert (filler["labels"] == -100).all()
    assert filler["position_ids"].tolist() == [[0, 1]]


def test_pieces_of_documents_are_taken_from_the_rows():
    data = arithmetic_data(3)
    data.setup("fit")
    pieces = Pieces(np.array([2, 0]), np.array([1, 0]), np.array([4, 3]))
    (item,) = (PackedRows(data.splits.tokenized("train"), pack(pieces, 8), 0)[0],)
    found = sorted((document["input_ids"], document["labels"]) for document in item["documents"])
    table = data.splits.tokenized("train")
    assert found == sorted((table[i]["input_ids"][a:b], table[i]["labels"][a:b]) for i, a, b in ((2, 1, 4), (0, 0, 3)))


# -- weights and sources ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["fused", "full"])
@pytest.mark.parametrize("packed", [False, True])
def test_weights_multiply_the_loss_and_leave_the_divisor(head, packed):
    """Against each target's own loss, from the model's logits in float64."""
    generator = torch.Generator().manual_seed(3)
    data = [
        {**row, "weights": None if i == 1 else torch.rand(len(row["labels"]), generator=generator).tolist()}
        for i, row in enumerate(rows())
    ]
    torch.manual_seed(0)
    module = CausalLMModule(LLAMA, loss=DFTLoss(), loading={"dtype": "float64", "head": head})
    module.configure_model()
    output = module.token_output(Collator(0)(items(data, (2, 3)) if packed else data))
    expected, slopes = [], []
    for row in data:
        ids = torch.tensor(row["input_ids"])
        log_probs = module.model(ids[None]).logits[0].log_softmax(-1)
        weights = row["weights"] or [1.0] * len(ids)
        for place in range(1, len(ids)):
            if row["labels"][place] != -100:
                log_prob = log_probs[place - 1, ids[place]]
                weight = torch.tensor(weights[place], dtype=torch.float32).double()
                expected.append(-weight * log_prob.exp().detach() * log_prob)
                slopes.append(weight * log_prob.exp().detach())
    torch.testing.assert_close(output.loss, torch.stack(expected).sum(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(output.weight, torch.stack(slopes), rtol=1e-10, atol=1e-12)
    assert len(output.log_prob) == len(expected)


@pytest.mark.parametrize("options", [{}, {"packing": "bfd", "max_length": 300}])
def test_each_source_is_logged_by_name(options):
    """The means of a mixture are those of its parts, weighed by their targets; each part's is that of it alone."""
    parts = {"easy": ArithmeticRows(7, max_digits=3), "hard": ArithmeticRows(5, min_digits=5, seed=2)}
    torch.manual_seed(0)
    module = CausalLMModule(TINY_ARITHMETIC, loss=DFTLoss(), loading={"dtype": "float64"}, optimizer={"lr": 0.0})

    def train_and_validate(source):
        data = InstructionDataModule(
            source, source, batch_size=12, **data_options(tokenizer="asset://arithmetic-base", **options)
        )
        one = trainer(max_epochs=1, precision="64-true", log_every_n_steps=1, limit_val_batches=None)
        one.fit(module, datamodule=data)
        return {name: float(value) for name, value in one.callback_metrics.items()}

    mixed = train_and_validate(MixedRows(parts))
    alone = {name: train_and_validate(source) for name, source in parts.items()}
    for stage in ("train", "val"):
        for kind in ("loss", "nll"):
            for name in parts:
                assert mixed[f"{stage}/{kind}/{name}"] == pytest.approx(alone[name][f"{stage}/{kind}"], rel=1e-9)
            counts = {name: alone[name][f"{stage}/target_tokens"] for name in parts}
            mean = sum(mixed[f"{stage}/{kind}/{name}"] * counts[name] for name in parts) / sum(counts.values())
            assert mixed[f"{stage}/{kind}"] == pytest.approx(mean, rel=1e-9)
    assert not any(name.endswith("/easy") for name in alone["hard"])


def test_rows_of_a_length_come_together_on_any_number_of_ranks():
    lengths = torch.randint(1, 100, (203,), generator=torch.Generator().manual_seed(0))

    def order(num_replicas, rank):
        sampler = RowSampler(range(203), num_replicas, rank, shuffle=True, seed=1, lengths=lengths, group_size=8)
        return list(sampler)

    alone = order(1, 0)
    assert sorted(alone) == list(range(203))
    groups = lengths[torch.tensor(alone[:200])].view(-1, 8)
    spread = (groups.max(1).values - groups.min(1).values).float().mean()
    assert spread < 5  # 77 in groups of 8 at random
    assert lengths[alone[0]] == lengths[torch.tensor(alone[:200])].max()
    together = [index for step in zip(order(2, 0), order(2, 1), strict=True) for index in step]
    assert together[:203] == alone


# -- attentions that do not train on a CPU ---------------------------------------------------------------------------


def varlen(module, query, key, value, attention_mask, position_ids=None, **options):
    """Documents as transformers finds them for flash attention, then sdpa for each."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.modeling_flash_attention_utils import _is_packed_sequence, prepare_fa_kwargs_from_position_ids

    options.pop("is_causal", None)
    if not _is_packed_sequence(position_ids, batch_size=len(query)):
        return sdpa_attention_forward(module, query, key, value, None, **options)
    (starts, _), _ = prepare_fa_kwargs_from_position_ids(position_ids)
    lengths = starts.diff().tolist()
    documents = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    return torch.cat([sdpa_attention_forward(module, *d, None, **options)[0] for d in documents], dim=1), None


def test_flash_attention_finds_the_documents_of_one_row():
    """By transformers' own detection; of several rows it finds none, which the check at the start says."""
    from transformers import AttentionInterface

    AttentionInterface.register("varlen", varlen)
    expected, expected_gradient = loss_and_gradient(LLAMA, False, "eager")
    output, gradient = packed_result(LLAMA, "varlen", True, rows())
    torch.testing.assert_close(output.log_prob, expected.log_prob, rtol=1e-5, atol=1e-5)
    assert (gradient - expected_gradient).norm() < 1e-5 * expected_gradient.norm()
    with pytest.raises(InputError, match=r"varlen does not keep .* apart.* set data.batches.padding_free: true"):
        packed_result(LLAMA, "varlen", False, rows())


def uncompiled_flex(module, query, key, value, attention_mask, scaling=None, **options):
    """torch's flex attention under transformers' mask for it, without the compiler, which fails on this CPU."""
    from torch.nn.attention.flex_attention import flex_attention

    output = flex_attention(query, key, value, block_mask=attention_mask, enable_gqa=True, scale=scaling)
    return output.transpose(1, 2).contiguous(), None


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_keeps_documents_apart():
    """Forward only: torch has no backward of it on the CPU."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import flex_attention_mask

    AttentionInterface.register("uncompiled", uncompiled_flex)
    AttentionMaskInterface.register("uncompiled", flex_attention_mask)
    results = []
    for attention in ("eager", "uncompiled"):
        torch.manual_seed(0)
        module = CausalLMModule(LLAMA, loading={"attn_implementation": attention})
        module.configure_model()
        with torch.compiler.set_stance("force_eager"):  # of the mask, which takes half a minute to compile
            results.append(module.token_output(Collator(0)(items(rows(), (2, 3)))).log_prob)
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)
