"""Token losses in transformers.Trainer."""

from __future__ import annotations

import pytest
import torch
from transformers.modeling_outputs import CausalLMOutput

from dft_lightning import CrossEntropyLoss, DFTLoss, compute_loss_func


def published_dft(logits, labels, num_items):
    """The reference implementation: shift, cross-entropy per token, times the detached probability."""
    shifted, targets = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    per_token = torch.nn.functional.cross_entropy(shifted, targets, reduction="none", ignore_index=-100)
    weight = torch.exp(-per_token).detach()
    return (per_token * weight).sum() / num_items


@pytest.mark.parametrize("as_dict", [True, False])
def test_equals_the_published_dft(as_dict):
    logits = torch.randn(2, 5, 7, dtype=torch.float64)
    labels = torch.tensor([[-100, -100, 3, 4, 1], [-100, 2, 2, -100, -100]])
    before = labels.clone()
    outputs = {"logits": logits} if as_dict else CausalLMOutput(logits=logits)
    function = compute_loss_func(DFTLoss())
    torch.testing.assert_close(function(outputs, labels, num_items_in_batch=9), published_dft(logits, labels, 9))
    torch.testing.assert_close(function(outputs, labels, torch.tensor(9)), published_dft(logits, labels, 9))
    # evaluation passes no count: the mean over the 5 targets
    torch.testing.assert_close(function(outputs, labels), published_dft(logits, labels, 5))
    assert torch.equal(labels, before)


def test_all_ignored_is_zero_with_a_gradient():
    logits = torch.randn(1, 3, 4, requires_grad=True)
    value = compute_loss_func(DFTLoss())({"logits": logits}, torch.full((1, 3), -100))
    assert value == 0
    value.backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_other_reductions_are_refused():
    with pytest.raises(ValueError, match="leave ignore_index and reduction of CrossEntropyLoss"):
        compute_loss_func(CrossEntropyLoss(reduction="sum"))


def test_a_step_without_targets_is_zero():
    logits = torch.randn(1, 3, 4, requires_grad=True)
    for count in (0, torch.tensor(0)):
        assert compute_loss_func(DFTLoss())({"logits": logits}, torch.full((1, 3), -100), count) == 0
