"""Classes that a gradient threshold leaves out: which they are, what that does to gradients, and what it must not."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import one_hot

from dft_lightning import CausalLMModule, CrossEntropyLoss, DFTLoss, FocalLoss, TokenLoss
from dft_lightning.losses import GEMLoss, ReferenceKLLoss, SequenceDFTLoss
from dft_lightning.modules.monitors import logged_by_module
from dft_lightning.ops import (
    ReferenceHead,
    linear_token_loss,
    logits_token_loss,
    pieces,
    release_scratch,
    torch_kernels,
)
from small_runs import TINY_ARITHMETIC, arithmetic_data, trainer

TOKENS, CLASSES, WIDTH, THRESHOLD = 40, 600, 12, 2.0**-9


class Regularised(TokenLoss):
    """With a gradient that is no multiple of ``softmax - onehot``."""

    needs = ("entropy",)

    def token_loss(self, stats):
        return -stats.log_prob - 0.2 * stats.entropy


def inputs(dtype=torch.float64, classes=CLASSES, mean=0.5):
    """A head that is often sure, whose weights have something in common, as those of language models have."""
    weight = torch.randn(classes, WIDTH, dtype=torch.float64) + mean
    targets = torch.randint(classes, (TOKENS,))
    hidden = torch.randn(TOKENS, WIDTH, dtype=torch.float64) + 0.4 * weight[targets]
    bias = torch.randn(classes, dtype=torch.float64)
    return [tensor.to(dtype) for tensor in (hidden, weight, bias)], targets


def gradients(leaves, targets, loss, threshold, **options):
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    hidden, weight, bias = leaves
    options = {"normalizer": 7.0, **options}
    output = linear_token_loss(hidden, weight, targets, loss, bias=bias, gradient_threshold=threshold, **options)
    output.loss.backward()
    return output, [leaf.grad for leaf in leaves]


def raw_gradient(leaves, targets, loss, *, logit_scale=1.0, logit_softcap=None, token_weight=None, reference=None):
    """``[n, V]``, the gradient of each token's loss with respect to the product, by autograd of its logits."""
    hidden, weight, bias = leaves
    product = (hidden @ weight.t() + bias).requires_grad_()
    logits = product if logit_softcap is None else logit_softcap * torch.tanh(product / logit_softcap)
    beside = None if reference is None else (reference.hidden @ reference.weight.t()).unsqueeze(1)
    output = logits_token_loss(
        (logit_scale * logits).unsqueeze(1), targets.unsqueeze(1), loss, reference_logits=beside,
        token_weight=None if token_weight is None else token_weight.unsqueeze(1), step=0,
    )  # fmt: skip
    return torch.autograd.grad(output.loss, product)[0]


CASES = {
    "CE": (CrossEntropyLoss(), {}),
    "DFT": (DFTLoss(), {}),
    "focal": (FocalLoss(), {}),
    "entropy": (Regularised(), {}),
    "tempered": (GEMLoss(), {}),
    "reference": (ReferenceKLLoss(), {"reference": True}),
    "scale": (DFTLoss(), {"logit_scale": -1.5}),
    "softcap": (CrossEntropyLoss(), {"logit_softcap": 8.0}),
    "weights": (DFTLoss(), {"token_weight": torch.linspace(-1, 2, TOKENS, dtype=torch.float64)}),
}


@pytest.mark.parametrize("chunk", [None, 13])
@pytest.mark.parametrize("name", CASES)
def test_what_is_left_out_and_what_that_does(name, chunk):
    """Which classes by autograd of the logits, what of each token's gradient, and the errors within their bounds."""
    loss, options = CASES[name]
    leaves, targets = inputs()
    hidden, weight, _ = leaves
    if "reference" in options:
        options = {"reference": ReferenceHead(hidden * 0.9, weight)}
    rows = TOKENS if chunk is None else chunk
    in_chunks = {**options, "chunk_bytes": rows * (CLASSES + 8) // 16 * 16 * 8}
    exact, whole = gradients(leaves, targets, loss, 0.0, **in_chunks)
    output, found = gradients(leaves, targets, loss, THRESHOLD, **in_chunks)
    assert exact.dropped is None
    assert torch.equal(output.loss, exact.loss)
    assert torch.equal(output.log_prob, exact.log_prob)
    raw = raw_gradient(leaves, targets, loss, **options)
    left_out = torch.empty_like(raw, dtype=torch.bool)
    parts = [slice(start, start + rows) for start in range(0, TOKENS, rows)]
    for part in parts:
        largest, wanted = raw[part].abs().amax(0), one_hot(targets[part], CLASSES).any(0)
        left_out[part] = (largest < THRESHOLD * (1 - 2**-6)) & ~wanted
    assert 0.05 < left_out.float().mean() < 0.99
    dropped = (raw.abs() * left_out).sum(-1)
    torch.testing.assert_close(output.dropped, dropped, rtol=1e-9, atol=1e-12)
    # The weight's and the bias's gradients are the whole ones of the classes that are left.
    of_rest = [raw.masked_fill(left_out, 0).t() @ hidden / 7, raw.masked_fill(left_out, 0).sum(0) / 7]
    torch.testing.assert_close(found[1:], of_rest, rtol=1e-9, atol=1e-12)
    errors = [a - b for a, b in zip(found, whole, strict=True)]
    bound = torch.stack([dropped[i] * weight[left_out[i]].norm(dim=1).max() for i in range(TOKENS)]) / 7
    of_hidden = errors[0].norm(dim=1)
    assert (of_hidden <= bound + 1e-13).all()
    assert of_hidden.max() > 1e-6
    assert errors[1].norm() <= (dropped * hidden.norm(dim=1)).sum() / 7
    assert errors[2].abs().sum() <= dropped.sum() / 7 * (1 + 1e-9)


def test_the_mean_of_what_is_left_out_is_given_back():
    """Weighted by the classes' largest gradients; where the weights have something in common, that takes the hidden
    gradient's error down."""
    leaves, targets = inputs(mean=2.0)
    weight = leaves[1]
    whole, found = (gradients(leaves, targets, CrossEntropyLoss(), each)[1][0] for each in (0.0, THRESHOLD))
    raw = raw_gradient(leaves, targets, CrossEntropyLoss())
    left_out = (raw.abs().amax(0) < THRESHOLD * (1 - 2**-6)) & ~one_hot(targets, CLASSES).any(0)
    share = raw.abs().amax(0) * left_out
    mean = share @ weight / share.sum()
    without = raw.masked_fill(left_out, 0) @ weight
    torch.testing.assert_close(found, (without + torch.outer(raw @ left_out.double(), mean)) / 7, rtol=1e-9, atol=1e-12)
    assert (found - whole).norm() < 0.5 * (without / 7 - whole).norm()


@pytest.mark.parametrize(("cosine", "given_back"), [(-0.9, True), (-0.96, False)])
def test_a_mean_has_to_be_nearer_by_more_than_its_distances_are_rounded(cosine, given_back):
    """Of two classes of length 1 that count alike, the square of their distance from it is (1 - cosine) / 2."""
    weight = torch.zeros(3, 3, dtype=torch.float64)
    weight[0, 2], weight[1, 0] = 9.0, 1.0
    weight[2, :2] = torch.tensor([cosine, math.sqrt(1 - cosine**2)])
    leaves = [weight[:1].clone() / 9, weight, torch.zeros(3, dtype=torch.float64)]
    output, found = gradients(leaves, torch.tensor([0]), CrossEntropyLoss(), 0.1, normalizer=1.0)
    expected = -output.dropped * weight[0] + (output.dropped * (weight[1] + weight[2]) / 2 if given_back else 0)
    torch.testing.assert_close(found[0][0], expected, rtol=1e-9, atol=1e-30)


def test_no_mean_is_given_back_that_is_farther_from_a_class_than_nothing():
    """Many alike and one that is as long and points the other way: their mean is twice as far from it as 0 is."""
    weight = torch.zeros(100, 2, dtype=torch.float64)
    weight[2:99, 0], weight[99, 0], weight[0, 1] = 1.0, -1.0, 30.0
    hidden, targets = torch.tensor([[0.0, 1.0]], dtype=torch.float64), torch.tensor([0])
    leaves = [hidden, weight, torch.zeros(100, dtype=torch.float64)]
    output, found = gradients(leaves, targets, CrossEntropyLoss(), 0.1, normalizer=1.0)
    assert output.dropped > 0
    at_target = -output.dropped * weight[0]  # all that is left
    torch.testing.assert_close(found[0][0], at_target.squeeze(), rtol=1e-9, atol=1e-30)


def test_how_far_a_class_is_from_the_mean_is_its_whole_distance():
    """Here the mean is nearly as far from one class as that is from 0: a little more, and the bound would break."""
    weight = torch.zeros(100, 3, dtype=torch.float64)
    weight[2:, 0], weight[1, 1], weight[0, 2] = 1.0, 1.0, 1.0
    hidden = torch.tensor([[4.0, 0.0, 8.0], [-9.0, 4.0, 8.0]], dtype=torch.float64)
    leaves, targets = [hidden, weight, torch.zeros(100, dtype=torch.float64)], torch.zeros(2, dtype=torch.long)
    exact, whole = gradients(leaves, targets, CrossEntropyLoss(), 0.0, normalizer=1.0)
    output, found = gradients(leaves, targets, CrossEntropyLoss(), 0.5, normalizer=1.0)
    assert exact.dropped is None
    assert (output.dropped > 0).all()
    assert ((found[0] - whole[0]).norm(dim=1) <= output.dropped * (1 + 1e-12)).all()


@pytest.mark.parametrize("loss", [CrossEntropyLoss(), Regularised()], ids=["scaled rows", "made"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5), (torch.bfloat16, 2.0**-7)], ids=str
)
def test_next_to_nothing_is_known_as_exactly(dtype, tolerance, loss):
    """What is dropped is the sum of what is, and no difference of sums of whole rows, whose rounding is larger."""
    weight = torch.full((1000, 1), -20.0, dtype=torch.float64)
    weight[:7, 0] = torch.linspace(-0.375, 0.375, 7)
    hidden, targets = torch.ones(1, 1, dtype=torch.float64), torch.tensor([0])
    leaves = [hidden, weight, torch.zeros(1000, dtype=torch.float64)]
    lost = raw_gradient(leaves, targets, loss)[0, 7:].abs().sum()
    assert 1e-7 < lost < 1e-5
    output, _ = gradients([leaf.to(dtype) for leaf in leaves], targets, loss, 2.0**-20)
    torch.testing.assert_close(output.dropped[0].double(), lost, rtol=tolerance, atol=0)


@pytest.mark.parametrize("chunk_bytes", [None, 13 * 608 * 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", [DFTLoss(), Regularised()], ids=["scaled rows", "made"])
def test_other_dtypes(dtype, loss, chunk_bytes):
    """The gradients and what is lost are those in float64, by chunk too, but for classes near the threshold."""
    leaves, targets = inputs(dtype)
    options = {} if chunk_bytes is None else {"chunk_bytes": chunk_bytes * dtype.itemsize // 2}
    output, found = gradients(leaves, targets, loss, THRESHOLD, **options)
    in_double = {name: size * 8 // dtype.itemsize for name, size in options.items()}
    of_double, expected = gradients([leaf.double() for leaf in leaves], targets, loss, THRESHOLD, **in_double)
    assert 0.05 < (found[1] != 0).any(1).float().mean() < 0.9
    tolerance = 1e-5 if dtype == torch.float32 else 4e-2
    for own, right in zip(found, expected, strict=True):
        torch.testing.assert_close(own.double(), right, rtol=tolerance, atol=tolerance * float(right.abs().max()))
    assert output.dropped.dtype == torch.float32
    absolute = 1e-6 if dtype == torch.float32 else 2e-3
    torch.testing.assert_close(output.dropped.double(), of_double.dropped, rtol=2 * tolerance, atol=absolute)


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_frozen_parts(frozen):
    leaves, targets = inputs()
    _, expected = gradients(leaves, targets, DFTLoss(), THRESHOLD)
    leaves = [leaf.clone().requires_grad_(i != frozen) for i, leaf in enumerate(leaves)]
    hidden, weight, bias = leaves
    options = {"bias": bias, "gradient_threshold": THRESHOLD, "normalizer": 7.0}
    linear_token_loss(hidden, weight, targets, DFTLoss(), **options).loss.backward()
    for leaf, gradient in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, gradient if leaf.requires_grad else None)


@pytest.mark.parametrize("normalizer", [-7.0, torch.tensor(-7.0, dtype=torch.float64)], ids=["number", "tensor"])
def test_a_normaliser_below_zero_changes_signs_alone(normalizer):
    leaves, targets = inputs()
    expected, right = gradients(leaves, targets, DFTLoss(), THRESHOLD)
    output, found = gradients(leaves, targets, DFTLoss(), THRESHOLD, normalizer=normalizer)
    torch.testing.assert_close(output.dropped, expected.dropped)
    torch.testing.assert_close(found, [-each for each in right])


def test_without_gradients_nothing_is_left_out():
    leaves, targets = inputs()
    with torch.no_grad():
        output = linear_token_loss(*leaves[:2], targets, DFTLoss(), gradient_threshold=THRESHOLD)
    assert output.dropped is None


def test_all_but_targets_may_be_left_out_and_no_token_may_be_there():
    leaves, targets = inputs()
    output, (_, of_weight, _) = gradients(leaves, targets, DFTLoss(), 10.0)
    assert torch.equal((of_weight != 0).any(1), one_hot(targets, CLASSES).any(0))
    assert (output.dropped > 0).all()
    nothing = targets.fill_(-100)
    output, found = gradients(leaves, nothing, DFTLoss(), THRESHOLD)
    assert output.dropped.shape == (0,)
    assert all(not gradient.any() for gradient in found)


def test_a_row_of_nan_is_not_hidden():
    leaves, targets = inputs()
    leaves[0][3] = math.nan
    for loss in (DFTLoss(), Regularised()):
        assert gradients(leaves, targets, loss, THRESHOLD)[1][1].isnan().all()


def test_memory_of_one_chunk_at_a_time():
    """Whatever the number of chunks: of 16, with all classes kept, two chunks and not all logits."""
    release_scratch()
    leaves, targets = inputs(classes=4000)
    gradients(leaves, targets, DFTLoss(), 1e-30, chunk_bytes=3 * 4000 * 8)
    kept = sum(buffer.numel() for buffer in pieces._local.buffers.values() if buffer is not None)
    release_scratch()
    assert kept < 3 * 3 * 4000 * 8 + 6 * 2**20 < TOKENS * 4000 * 8 * 10


@pytest.mark.parametrize("scaled", [True, False])
def test_triton_finds_the_same_largest(scaled):
    triton_kernels = pytest.importorskip("dft_lightning.ops.triton_kernels", reason="Triton is not installed")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        gradient = torch.randn(37, 1030).to(dtype)[:, :1021]
        scale = 1e-9 * torch.randn(37) if scaled else None  # beyond float16
        found, expected = (each.column_largest(gradient, scale) for each in (triton_kernels, torch_kernels))
        by_hand = (gradient.float() * (1 if scale is None else scale[:, None])).abs().amax(0)
        torch.testing.assert_close(found, by_hand, rtol=1e-5, atol=0)
        torch.testing.assert_close(expected, by_hand, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=0)
    gradient[5, 7] = math.nan
    assert triton_kernels.column_largest(gradient, None)[7] == math.inf


@pytest.mark.parametrize(
    ("loss", "threshold", "message"),
    [
        (DFTLoss(), -1e-3, "gradient_threshold must be a number from 0 on, got -0.001"),
        (DFTLoss(), math.nan, "gradient_threshold must be a number from 0 on, got nan"),
        (CrossEntropyLoss(0.1), 1e-3, "label smoothing.* has a gradient at every class, .*: set it to 0"),
        (
            SequenceDFTLoss(),
            1e-3,
            "SequenceDFTLoss with a gradient_threshold of 0.001: .* not pointwise .*: set it to 0",
        ),
    ],
)
def test_what_is_refused(loss, threshold, message):
    leaves, targets = inputs()
    with pytest.raises(ValueError, match=message):
        gradients(leaves, targets, loss, threshold)
    with pytest.raises(ValueError, match=message):
        CausalLMModule(TINY_ARITHMETIC, loss=loss, step={"gradient_threshold": threshold})


def test_the_full_head_has_no_threshold():
    options = {"loading": {"head": "full"}, "step": {"gradient_threshold": 1e-3}}
    with pytest.raises(ValueError, match="gradient_threshold is the fused head's: set loading.head: fused, or it to 0"):
        CausalLMModule(TINY_ARITHMETIC, **options)


def test_a_run_logs_what_is_left_out():
    """The mean over the tokens of a step, whatever the micro-batches; and validation has none."""
    logged = {}
    for name, batch_size, accumulate in (("whole", 4, 1), ("split", 2, 2)):
        torch.manual_seed(0)
        module = CausalLMModule(TINY_ARITHMETIC, loss=DFTLoss(), step={"gradient_threshold": 1e-2})
        run = trainer(max_steps=1, log_every_n_steps=1, accumulate_grad_batches=accumulate)
        run.fit(module, datamodule=arithmetic_data(batch_size=batch_size))
        logged[name] = {key: float(value) for key, value in run.logged_metrics.items() if "dropped" in key}
        assert list(logged[name]) == ["train/head/dropped"]
        assert 0 < logged[name]["train/head/dropped"] < 1
        assert "train/head/dropped" in logged_by_module(run, module.loss, module.step)
