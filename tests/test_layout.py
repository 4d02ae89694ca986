"""What the host knows of a batch: where targets, documents and padding are, and that it is of this batch."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader

from conftest import TINY_LLAMA
from dft_lightning import CausalLMModule, DFTLoss, FocalLoss, SequenceDFTLoss
from dft_lightning.data.batches.collating import Collator
from dft_lightning.errors import InputError
from dft_lightning.models.documents import ModelChecks
from dft_lightning.models.layout import BatchLayout, layout_of, with_layout
from dft_lightning.models.row_checks import check_rows
from dft_lightning.ops import linear_token_loss, logits_token_loss
from small_runs import GradientRecorder, trainer

ROWS = [
    {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, 7, -100, 9]},
    {"input_ids": [10, 11], "labels": [-100, 11]},
    {"input_ids": [12, 13, 14], "labels": [-100, 13, 14], "weights": [0, 0.5, 2.0]},
]


def test_of_padded_rows_by_hand():
    layout = Collator(0)(ROWS)["layout"]
    assert layout.shape == (3, 5)
    assert layout.target_index.tolist() == [1, 3, 5, 10, 11]  # the tokens before 7, 9, 11, 13 and 14
    assert (layout.num_targets, layout.num_tokens, layout.max_length) == (5, 10, 5)
    assert (layout.smallest_target, layout.largest_target) == (7, 14)
    assert layout.documents == layout.lengths.tolist() == [5, 2, 3]
    assert layout.sequence_index().tolist() == [0] * 5 + [1] * 5 + [2] * 5


def test_of_joined_rows_by_hand():
    layout = Collator(0, padding_free=True)(ROWS)["layout"]
    assert layout.shape == (1, 10)
    assert layout.target_index.tolist() == [1, 3, 5, 7, 8]
    assert (layout.num_targets, layout.num_tokens, layout.max_length) == (5, 10, 5)
    assert layout.documents == [5, 2, 3]
    assert layout.cu_seq_lens.tolist() == [0, 5, 7, 10]
    assert layout.sequence_index().tolist() == [0] * 5 + [1] * 2 + [2] * 3


def test_without_targets_and_with_other_masks():
    labels = torch.full((2, 3), -100)
    layout = BatchLayout(labels, torch.tensor([[0, 1, 1], [1, 1, 1]]))
    assert (layout.num_targets, layout.largest_target, layout.num_tokens) == (0, -1, 5)
    assert layout.documents is None  # padded on the left
    assert not layout.differs({"labels": labels}, 7)
    assert BatchLayout(labels, torch.ones(2, 1, 3, 3)).documents is None
    assert BatchLayout(labels).documents == [3, 3]


@pytest.mark.parametrize("padding_free", [False, True])
def test_moves_with_its_batch(padding_free):
    """As Lightning and a loader with pinned memory move what has tensors and is none."""
    from lightning.fabric.utilities.apply_func import move_data_to_device
    from lightning.pytorch.utilities.data import extract_batch_size

    batch = Collator(0, padding_free=padding_free)(ROWS)
    moved = move_data_to_device(batch, torch.device("meta"))["layout"]
    assert moved.target_index.is_meta
    assert moved.lengths.is_meta
    assert moved.documents == batch["layout"].documents
    assert not batch["layout"].target_index.is_meta
    assert extract_batch_size(batch) == len(batch["labels"])
    cloned = {name: value.clone() for name, value in batch.items()}["layout"]
    assert cloned.target_index is not batch["layout"].target_index
    assert torch.equal(cloned.target_index, batch["layout"].target_index)
    assert batch["layout"][:1] is None  # of a part it is made anew


CHANGES = {
    "a target more": lambda batch: batch["labels"].view(-1)[:2].fill_(3),
    "a target less": lambda batch: batch["labels"].masked_fill_(batch["labels"] == 9, -100),
    "another place": lambda batch: batch["labels"].copy_(batch["labels"].roll(1, 1)),
    "no class": lambda batch: batch["labels"].masked_fill_(batch["labels"] == 9, 97),
    "padding": lambda batch: batch["attention_mask"][0, 4:].zero_() if "attention_mask" in batch else None,
    "positions": lambda batch: batch["position_ids"][0, 4:].zero_() if "position_ids" in batch else None,
    "another kind": lambda batch: batch.update(position_ids=batch.pop("attention_mask", None)),
}


@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_tells_a_changed_batch(change, padding_free):
    batch = Collator(0, padding_free=padding_free)(ROWS)
    assert not batch["layout"].differs(batch, 97)
    before = {name: value.clone() for name, value in batch.items() if isinstance(value, torch.Tensor)}
    CHANGES[change](batch)
    changed = any(batch.get(name) is None or not torch.equal(batch[name], value) for name, value in before.items())
    assert bool(batch["layout"].differs(batch, 97)) == changed
    if change != "another kind":
        assert not layout_of({**batch, "layout": None}).differs(batch, 98)


class Changing(GradientRecorder):
    """Learns one token less of each row than its data module says."""

    leaves_out = True

    def training_step(self, batch, batch_idx):
        batch = {name: value for name, value in batch.items() if name != "layout" or not self.leaves_out}
        batch["labels"] = batch["labels"].masked_fill(batch["labels"] == 9, -100)
        return super().training_step(batch, batch_idx)


def test_a_step_whose_batch_was_changed_is_refused():
    """By one line, before the optimizer steps; without the layout the batch is taken as it is."""

    def fit(module_class, rows):
        torch.manual_seed(0)
        module = module_class(TINY_LLAMA, loss=DFTLoss())
        trainer().fit(module, DataLoader(rows, batch_size=3, collate_fn=Collator(0)))
        return module

    Changing.leaves_out = True
    own = fit(Changing, ROWS).gradients[0]
    fewer = [{**row, "labels": [-100 if label == 9 else label for label in row["labels"]]} for row in ROWS]
    assert torch.equal(own, fit(GradientRecorder, fewer).gradients[0])
    Changing.leaves_out = False
    module = Changing(TINY_LLAMA, loss=DFTLoss())
    with pytest.raises(InputError, match=r"a batch was changed after it was made, .*leave that out where you change"):
        trainer().fit(module, DataLoader(ROWS, batch_size=3, collate_fn=Collator(0)))
    assert module.trainer.global_step == 0


class OwnStep(CausalLMModule):
    """Takes the objective by itself, of a batch with a target less."""

    def training_step(self, batch, batch_idx):
        batch["labels"] = batch["labels"].masked_fill(batch["labels"] == 9, -100)
        return self.token_output(batch).loss


def test_a_step_of_ones_own_of_a_changed_batch_is_refused():
    module = OwnStep(TINY_LLAMA)
    with pytest.raises(InputError, match="a batch was changed after it was made"):
        trainer().fit(module, DataLoader(ROWS, batch_size=3, collate_fn=Collator(0)))
    assert module.trainer.global_step == 0


def test_an_evaluation_of_a_changed_batch_is_refused():
    module = CausalLMModule(TINY_LLAMA)
    module.configure_model()
    batch = Collator(0)(ROWS)
    batch["labels"][0, 1] = 4
    with torch.no_grad(), pytest.raises(InputError, match="a batch was changed"):
        module.token_output(batch)
    batch |= {name: batch[name][:, :4] for name in ("input_ids", "labels", "attention_mask", "token_weight")}
    with pytest.raises(InputError, match=r"labels are \[3, 4\] and the batch's 'layout' is of \[3, 5\]"):
        module.token_output(batch)


@pytest.mark.parametrize("head", ["fused", "full"])
@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize("loss", [DFTLoss(), SequenceDFTLoss()], ids=repr)
def test_a_batch_with_and_without_its_layout_is_the_same(head, padding_free, loss):
    module = CausalLMModule(TINY_LLAMA, loss=loss, loading={"head": head})
    module.configure_model()
    batch = Collator(0, padding_free=padding_free)(ROWS)
    own, found = (module.token_output(each) for each in (batch, {**batch, "layout": None}))
    for name in ("loss", "log_prob", "weight", "correct"):
        torch.testing.assert_close(getattr(own, name), getattr(found, name), rtol=1e-6, atol=0)


def test_targets_whose_places_are_known_are_not_looked_for():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 4, 8, generator=generator, dtype=torch.float64)
    weight = torch.randn(11, 8, generator=generator, dtype=torch.float64)
    targets = torch.tensor([[3, -100, 10, -100], [-100, 0, -100, 5]])
    index = torch.tensor([0, 2, 5, 7])
    elsewhere = torch.where(targets == -100, 7, targets)  # what stands where there is no target does not count
    factors = torch.rand(2, 4, generator=generator, dtype=torch.float64)

    def of_hidden(targets, **options):
        leaf = hidden.flatten(0, 1).clone().requires_grad_()
        output = linear_token_loss(
            leaf, weight, targets.flatten(), FocalLoss(), token_weight=factors.flatten(), **options
        )
        output.loss.backward()
        return output.loss.detach(), leaf.grad

    def of_logits(targets, **options):
        leaf = (hidden @ weight.T).requires_grad_()
        output = logits_token_loss(leaf, targets, FocalLoss(), token_weight=factors, **options)
        output.loss.backward()
        return output.loss.detach(), leaf.grad

    for function in (of_hidden, of_logits):
        for expected, found in zip(function(targets), function(elsewhere, target_index=index), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)


def run_with(model, **options):
    """Last hidden states of ragged rows, with their mask and as the module runs them; and whether there was a mask."""
    module = CausalLMModule({**TINY_LLAMA, **model}, **options)
    module.configure_model()
    module.eval()
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(1, 97, (length,), generator=generator).tolist() for length in (23, 9, 17)]
    batch = Collator(0)([{"input_ids": row, "labels": row} for row in rows])
    given = ModelChecks().before_batch(module.model, batch)
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        both = [
            module.model(input_ids=batch["input_ids"], attention_mask=mask).logits[real]
            for mask in (batch["attention_mask"], given.get("attention_mask"))
        ]
    return both, "attention_mask" in given


@pytest.mark.parametrize(
    "model", [{}, {"model_type": "qwen2"}, {"model_type": "mistral", "sliding_window": 8}], ids=str
)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_rows_padded_on_the_right_need_no_mask(model, attention):
    (masked, unmasked), has_mask = run_with(model, loading={"attn_implementation": attention})
    assert not has_mask
    torch.testing.assert_close(unmasked, masked, rtol=0, atol=2e-6)


def test_a_mask_stays_where_a_model_needs_it():
    """The auxiliary loss of experts is a mean over the tokens that it leaves."""
    experts = {"model_type": "mixtral", "num_local_experts": 4, "output_router_logits": True}
    assert run_with(experts)[1]
    assert not run_with({**experts, "output_router_logits": False})[1]
    # ALiBi's positions are made of the mask, and are the same without where nothing stands on the left.
    assert not check_rows(
        built({"model_type": "bloom", "hidden_size": 16, "n_layer": 1, "n_head": 2, "vocab_size": 97})
    )
    left = with_layout({"labels": torch.ones(2, 3).long(), "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]])})
    given = ModelChecks().before_batch(built(TINY_LLAMA), {"input_ids": left["labels"], **left})
    assert "attention_mask" in given  # not right padding: what stands in it counts


def built(model):
    module = CausalLMModule(model)
    module.configure_model()
    return module.model


def test_looking_at_the_future_alone_is_no_reason_for_a_mask():
    class NeedsMask(torch.nn.Module):
        """Averages over the tokens of the mask: what is padding counts where there is none."""

        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(97, 97)

        def forward(self, input_ids, attention_mask=None, use_cache=False):
            scale = 1.0 if attention_mask is None else attention_mask.float().cumsum(1).clamp(max=1).unsqueeze(-1)
            offset = 1.0 if attention_mask is None else 0.0
            return type("Output", (), {"logits": self.table(input_ids) * scale + offset})

    assert check_rows(NeedsMask())
