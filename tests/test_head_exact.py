"""bfloat16 whose logits are not rounded: log-probs, statistics and gradients where logits are as large as real ones."""

from __future__ import annotations

import math
import weakref

import pytest
import torch

from dft_lightning import AnchoredLoss, CrossEntropyLoss, DFTLoss, GEMLoss, ReferenceKLLoss, TargetSFTLoss
from dft_lightning.losses import Statistic, statistics_from_logits
from dft_lightning.ops import ReferenceHead, exponentials, linear_token_loss, linear_token_statistics
from dft_lightning.ops.products import HeadProducts
from test_head_float16 import WholeSequences
from test_linear_head import AllStatistics, Anchored, EntropyWeighted, full_logits, gradients, relative

STATISTICS = ("entropy", "mean_log_prob", "sum_squared_prob", Statistic("top_k_entropy", k=5), "reference_kl")
LOSSES = [CrossEntropyLoss(), CrossEntropyLoss(0.1), DFTLoss(), EntropyWeighted(), AllStatistics(), Anchored()]
LOSSES += [GEMLoss(), GEMLoss(form="logsigmoid"), TargetSFTLoss(0.5), ReferenceKLLoss("reverse")]
BFLOAT16 = torch.bfloat16


def peaked(n=160, hidden_size=64, vocabulary=700, seed=0, largest=30.0):
    """Leaves in bfloat16 whose logits are as large as those of language models, and as near to each other; targets as
    likely as the model says."""
    generator = torch.Generator().manual_seed(seed)
    weight = 0.3 * torch.randn(vocabulary, hidden_size, generator=generator)
    hidden = torch.randn(n, hidden_size, generator=generator)
    weight[:, 0] = hidden[:, 0] = (largest - 7) ** 0.5
    leaves = [leaf.to(BFLOAT16) for leaf in (hidden, weight, 0.3 * torch.randn(vocabulary, generator=generator))]
    targets = full_logits(*leaves).float().softmax(-1).multinomial(1, generator=generator).squeeze(-1)
    return [leaf.requires_grad_() for leaf in leaves], targets


def exact_loss(loss, leaves, targets, reference=None, scale=1.0, softcap=None):
    """In float64, of the same values."""
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    theirs = None
    if reference is not None:
        parts = (reference.hidden, reference.weight, reference.bias)
        theirs = full_logits(*(part.double() for part in parts), reference.logit_scale, reference.logit_softcap)
    logits = full_logits(*exact, scale, softcap)
    stats = statistics_from_logits(logits, targets, (*loss.needs, *STATISTICS[:4]), reference_logits=theirs)
    return loss.token_loss(stats).mean(), exact, stats


def reference_of(leaves, seed=5):
    """A model that is near."""
    generator = torch.Generator().manual_seed(seed)
    moved = [leaf.detach() * (1 + 0.1 * torch.randn(leaf.shape, generator=generator)) for leaf in leaves]
    return ReferenceHead(*(leaf.to(BFLOAT16) for leaf in moved))


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
@pytest.mark.parametrize(
    "transform", [{}, {"logit_scale": 0.5}, {"logit_scale": 0.7}, {"logit_softcap": 35.0}], ids=str
)
def test_losses_statistics_and_gradients(loss, transform):
    """Straight from the product where the transform allows, and by blocks in float32 where it does not."""
    leaves, targets = peaked()
    reference = reference_of(leaves)
    scale, softcap = transform.get("logit_scale", 1.0), transform.get("logit_softcap")
    expected, exact, stats = exact_loss(loss, leaves, targets, reference, scale, softcap)
    output = linear_token_loss(
        *leaves[:2], targets, loss, bias=leaves[2], reference=reference, statistics=STATISTICS, normalizer=len(targets),
        chunk_bytes=2 * 704 * 60, **transform,
    )  # fmt: skip
    assert (output.log_prob.double() - stats.log_prob).square().mean().sqrt() < 1.5e-3
    for name in ("entropy", "mean_log_prob", "sum_squared_prob", "top_k_entropy"):
        difference = getattr(output, name).double() - getattr(stats, name)
        assert difference.square().mean().sqrt() < 2e-3, name
    assert torch.equal(output.correct, full_logits(*exact, scale, softcap).argmax(-1) == targets)
    assert output.loss.item() == pytest.approx(expected.item(), rel=2e-3)
    for own, theirs in zip(gradients(output.loss, leaves), gradients(expected, exact), strict=True):
        assert relative(own, theirs) < 6e-3


FAR = [ReferenceKLLoss("reverse"), TargetSFTLoss(0.1), TargetSFTLoss(0.9), GEMLoss(beta=3.0)]


@pytest.mark.parametrize("loss", FAR, ids=repr)
@pytest.mark.parametrize("gap", [20.0, 60.0, 80.0])
def test_classes_far_below_the_likeliest(loss, gap):
    """Which count by their logarithms: as far down as bfloat16 has numbers."""
    leaves, targets = peaked(n=60)
    bias = (leaves[2].detach().float() - gap * (torch.arange(700) % 3 == 0)).to(BFLOAT16)
    reference = ReferenceHead(leaves[0].detach(), leaves[1].detach() * 0.5, bias)
    expected, exact, _ = exact_loss(loss, leaves, targets, reference)
    output = linear_token_loss(*leaves[:2], targets, loss, bias=leaves[2], reference=reference, normalizer=len(targets))
    assert output.loss.item() == pytest.approx(expected.item(), rel=5e-3)
    for own, theirs in zip(gradients(output.loss, leaves), gradients(expected, exact), strict=True):
        assert relative(own, theirs) < 1e-2


@pytest.mark.parametrize("loss", FAR, ids=repr)
def test_float16_has_no_numbers_for_these(loss, monkeypatch):
    monkeypatch.setattr("dft_lightning.ops.linear_head._product_dtype", lambda *leaves: torch.float16)
    leaves, targets = peaked(n=8)
    with pytest.raises(ValueError, match="in which classes count that float16 has no numbers for: take bfloat16"):
        linear_token_loss(*leaves[:2], targets, loss, reference=reference_of(leaves[:2]))


def test_rounded_logits_are_much_worse():
    """Else the test above would show nothing."""
    leaves, targets = peaked()
    expected, exact, stats = exact_loss(DFTLoss(), leaves, targets)
    logits = full_logits(*leaves).float()
    log_prob = logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    assert (log_prob.double() - stats.log_prob).square().mean().sqrt() > 2e-2
    plain = -(log_prob.detach().exp() * log_prob).mean()
    assert relative(gradients(plain, leaves)[1], gradients(expected, exact)[1]) > 1e-2


@pytest.fixture
def again(monkeypatch):
    """How many rows were taken by float32."""
    counts, own = [], exponentials._again
    monkeypatch.setattr(exponentials, "_again", lambda *args: (counts.append(len(args[2])), own(*args)))
    if not exponentials.has_sigmoid_of_product():
        pytest.skip("oneDNN has no bfloat16 on this processor")
    return counts


@pytest.mark.parametrize("loss", [DFTLoss(), AllStatistics(), Anchored()], ids=repr)
def test_rows_far_from_the_others(loss, again):
    """Largest logits of 1 to 3000 in one chunk, targets that no sigmoid reaches, and a chunk without likely targets."""
    leaves, targets = peaked(n=40)
    hidden = leaves[0].detach() * torch.logspace(-1.5, 2, 40).unsqueeze(-1).to(BFLOAT16)
    leaves[0] = hidden.requires_grad_()
    targets[::3] = full_logits(*leaves).argmin(-1)[::3]
    for some in (slice(0, 40), slice(0, 40, 3)):
        chosen, own = targets[some], [leaves[0].detach()[some].requires_grad_(), *leaves[1:]]
        reference = reference_of(own) if isinstance(loss, Anchored) else None
        expected, exact, stats = exact_loss(loss, own, chosen, reference)
        output = linear_token_loss(*own[:2], chosen, loss, bias=own[2], reference=reference, normalizer=len(chosen))
        torch.testing.assert_close(output.log_prob.double(), stats.log_prob, rtol=1e-5, atol=4e-3)
        assert output.loss.item() == pytest.approx(expected.item(), rel=1e-2)
        for ours, theirs in zip(gradients(output.loss, own), gradients(expected, exact), strict=True):
            assert relative(ours, theirs) < 1e-2
    assert sum(again) > 5


def test_rows_of_a_language_model_need_no_second_product(again):
    leaves, targets = peaked(n=400)
    linear_token_loss(*leaves[:2], targets, DFTLoss(), bias=leaves[2])
    assert again == []


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_shows(bad):
    leaves, targets = peaked(n=8)
    with torch.no_grad():
        leaves[0][3, 2] = bad
    output = linear_token_loss(*leaves[:2], targets, DFTLoss(), bias=leaves[2])
    assert output.log_prob.isfinite().tolist() == [row != 3 for row in range(8)]
    assert not output.correct[3]
    assert not gradients(output.loss, leaves)[1].isfinite().all()


@pytest.mark.parametrize("where", ["weight", "bias"])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_class_of_nan_that_is_no_target_shows(where, sign):
    leaves, targets = peaked(n=8)
    targets[:] = 3
    with torch.no_grad():
        leaves[1 if where == "weight" else 2][7] = math.copysign(math.nan, sign)
    output = linear_token_loss(*leaves[:2], targets, DFTLoss(), bias=leaves[2])
    assert output.log_prob.isnan().all()


def test_chunks_do_not_pile_up(monkeypatch):
    """What is kept of a chunk is gone before the next is computed."""
    alive, own = [], HeadProducts.sigmoids

    def sigmoids(self, *args):
        assert all(each() is None for each in alive)
        result = own(self, *args)
        alive.append(weakref.ref(result))
        return result

    monkeypatch.setattr(HeadProducts, "sigmoids", sigmoids)
    leaves, targets = peaked(n=40)
    for loss in (DFTLoss(), AllStatistics(), WholeSequences()):
        output = linear_token_loss(*leaves[:2], targets, loss, bias=leaves[2], chunk_bytes=2 * 704 * 10)
        output.loss.backward()
    with torch.no_grad():
        linear_token_statistics(*leaves[:2], targets, bias=leaves[2], chunk_bytes=2 * 704 * 10)
    assert not alive or len(alive) >= 4 * 5


def test_many_ties():
    """More than are looked at: a head of zeros, whose likeliest class is the first."""
    hidden, weight = torch.ones(50, 8, dtype=BFLOAT16), torch.zeros(300, 8, dtype=BFLOAT16)
    output = linear_token_loss(hidden, weight, torch.arange(50), DFTLoss())
    assert output.correct.tolist() == [True] + [False] * 49


def test_a_class_that_has_nearly_everything_and_is_no_target():
    """What is kept of it is rounded, but its ``log p`` is what the others leave it: else the gradient of the entropy is
    off by parts in thirty."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(700, 64, generator=generator)
    likely = torch.randint(0, 700, (160,), generator=generator)
    hidden = weight[likely] + 0.7 * torch.randn(160, 64, generator=generator)
    hidden *= 30 / (hidden @ weight.t()).amax(-1, keepdim=True)
    leaves = [leaf.to(BFLOAT16).requires_grad_() for leaf in (hidden, weight)]
    targets = likely.roll(1)
    for scale in (1.0, 0.7):  # straight from the product, and by blocks
        exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
        logits = full_logits(*exact, None, scale)
        expected = EntropyWeighted().token_loss(statistics_from_logits(logits, targets, ("entropy",))).mean()
        output = linear_token_loss(*leaves, targets, EntropyWeighted(), normalizer=160, logit_scale=scale)
        for own, theirs in zip(gradients(output.loss, leaves), gradients(expected, exact), strict=True):
            assert relative(own, theirs) < 6e-3


def test_a_target_far_above_the_rest(again):
    """One outlier, as a first position may be, does not send the others to float32."""
    leaves, targets = peaked(n=64)
    with torch.no_grad():
        leaves[0][5] *= 5
    _, _, stats = exact_loss(DFTLoss(), leaves, targets)
    output = linear_token_loss(*leaves[:2], targets, DFTLoss(), bias=leaves[2])
    torch.testing.assert_close(output.log_prob.double(), stats.log_prob, rtol=1e-4, atol=4e-3)
    assert again == [1]


@pytest.mark.parametrize("loss", [CrossEntropyLoss(0.1), AnchoredLoss()], ids=repr)
def test_a_cap_that_exponentials_do_not_reach_is_refused(loss):
    leaves, targets = peaked(n=8)
    reference = reference_of(leaves)
    options = {"bias": leaves[2], "reference": reference}
    linear_token_loss(*leaves[:2], targets, loss, logit_softcap=42.0, **options)
    message = r"with a logit_softcap of 43 .* has no gradient in torch.bfloat16, .*head: full"
    with pytest.raises(ValueError, match=message):
        linear_token_loss(*leaves[:2], targets, loss, logit_softcap=43.0, **options)
    linear_token_loss(*leaves[:2], targets, DFTLoss(), logit_softcap=43.0, bias=leaves[2])


def test_banned_classes():
    """By a bias of -inf: they have no part in anything; a banned target has log p = -inf; a class alone has 0."""
    leaves, targets = peaked(n=8, vocabulary=20)
    banned = targets.new_tensor([0, 7])
    targets[:] = 1
    targets[5] = 7
    with torch.no_grad():
        leaves[2][banned] = -math.inf
    _, _, stats = exact_loss(DFTLoss(), leaves, targets)
    output = linear_token_loss(*leaves[:2], targets, DFTLoss(), bias=leaves[2], statistics=["entropy"])
    torch.testing.assert_close(output.log_prob.double(), stats.log_prob, rtol=1e-3, atol=2e-3)
    torch.testing.assert_close(output.entropy.double(), stats.entropy, rtol=1e-3, atol=2e-3)
    assert output.log_prob[5] == -math.inf
    with torch.no_grad():
        leaves[2][:] = -math.inf
        leaves[2][1] = 0.0
    alone = linear_token_loss(leaves[0][:5], leaves[1], targets[:5], CrossEntropyLoss(), bias=leaves[2])
    assert torch.equal(alone.log_prob, torch.zeros(5))
    assert alone.correct.all()


def test_ties_and_near_ties():
    """Classes of equal weights, and ones that bfloat16 cannot tell apart: as argmax of the logits in float32."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(50, 32, generator=generator).to(BFLOAT16)
    weight[20], weight[30] = weight[10], weight[10]
    weight[40] = weight[10]
    weight[40, 0] += 0.01
    hidden = (weight[[10] * 6] * torch.linspace(0.5, 1.5, 6).unsqueeze(-1).to(BFLOAT16)).requires_grad_()
    for target in (10, 20, 30, 40, 3):
        targets = torch.full((6,), target)
        output = linear_token_loss(hidden, weight, targets, DFTLoss())
        assert torch.equal(output.correct, (hidden.float() @ weight.float().t()).argmax(-1) == target)


def test_float32_logits_of_half_precision_by_blocks(monkeypatch):
    """Two products off CUDA, the second of what the first has rounded off."""
    from dft_lightning.ops.call import HeadSettings
    from dft_lightning.ops.row_math import LogitTransform

    leaves, _ = peaked(n=50)
    expected = full_logits(*(leaf.detach().double() for leaf in leaves))
    settings = HeadSettings(LogitTransform(), {}, BFLOAT16, None, None)
    with torch.no_grad(), HeadProducts(*leaves, settings) as products:
        assert list(products.blocks(slice(0, 50))) == [slice(0, 50)]  # few rows make no fast product
        monkeypatch.setattr(HeadProducts, "_block", 7)
        blocks = list(products.blocks(slice(0, 50)))
        assert [block.stop - block.start for block in blocks] == [7] * 7 + [1]
        for block in blocks:
            logits = products.logits(block)
            assert logits.dtype == torch.float32
            assert (logits - expected[block]).abs().max() < 2e-3
