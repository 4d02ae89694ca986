"""How much memory the fused head takes: chunks by device and vocabulary, aligned rows, gradients scaled in place."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dft_lightning import DFTLoss
from dft_lightning.foreign.torch import has_sigmoid_of_product
from dft_lightning.ops import chunks, linear_token_loss
from dft_lightning.ops import products as products_module
from dft_lightning.ops.call import HeadSettings, ReferenceHead
from dft_lightning.ops.chunks import DEFAULT_CHUNK_BYTES
from dft_lightning.ops.pieces import filled, multiplied, row_pieces, scaled, times_rows, with_pages
from dft_lightning.ops.products import HeadProducts
from dft_lightning.ops.row_math import LogitTransform
from test_linear_head import full_loss, gradients, problem, relative

BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32
GIB = 2**30


class Made(TorchDispatchMode):
    """Dtypes of the tensors of a shape that operations made, views and what they were given left out."""

    def __init__(self, *shape):
        super().__init__()
        self.shape, self.dtypes = shape, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.empty, torch.ops.aten.empty_like, torch.ops.aten._to_copy) and (
            tuple(result.shape) == self.shape
        ):
            self.dtypes.append(result.dtype)
        return result


class Sizes(TorchDispatchMode):
    """Names of the operations that go through so many elements, views left out."""

    def __init__(self, least, below):
        super().__init__()
        self.least, self.below, self.found = least, below, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        outputs = result if isinstance(result, (tuple, list)) else [result]
        sizes = [each.numel() for each in outputs if isinstance(each, torch.Tensor)]
        if not func.is_view and any(self.least <= size < self.below for size in sizes):
            self.found.add(func.overloadpacket)
        return result


def head(n, hidden_size, vocabulary, *, device="cuda", leaf=BFLOAT16, dtype=BFLOAT16, chunk_bytes=None, **options):
    """A head without values: shapes and dtypes are all there is."""
    transform, reference = LogitTransform(), options.get("reference", False)
    settings = HeadSettings(transform, {}, dtype, chunk_bytes, transform if reference else None)
    hidden, weight = (torch.empty(size, hidden_size, dtype=leaf, device=device) for size in (n, vocabulary))
    beside = ReferenceHead(hidden, weight) if reference else None
    return HeadProducts(hidden, weight, None, settings, (True, options.get("wants_weight", True), False), beside)


@pytest.mark.parametrize(
    ("n", "hidden_size", "vocabulary", "free", "options", "expected"),
    [
        # At least 4096 where they take a quarter of the memory that is free, evenly.
        (20000, 2304, 262144, 80, {"leaf": FLOAT32}, [5056] * 3 + [4832]),
        (20000, 2304, 262144, 8.2, {"leaf": FLOAT32}, [4032] * 4 + [3872]),  # 2 GiB and 4096 of them
        (20000, 2304, 262144, 7.9, {"leaf": FLOAT32}, [1280] * 15 + [800]),
        (7000, 2304, 262144, 80, {"leaf": FLOAT32}, [7000]),
        # Without an accumulator as many more as would fit into that, and not one further.
        (4096 + 2 * 4096, 4096, 151936, 80, {}, [12288]),
        (4096 + 2 * 4096 + 1, 4096, 151936, 80, {}, [4160, 4160, 3969]),
        (12288, 4096, 151936, 80, {"leaf": FLOAT32}, [4096] * 3),
        (12288, 4096, 151936, 80, {"dtype": torch.float16, "leaf": torch.float16}, [4096] * 3),
        (12288, 4096, 151936, 80, {"dtype": FLOAT32, "leaf": FLOAT32}, [4096] * 3),
        (12288, 4096, 151936, 10, {}, [4096] * 3),
        # A reference's logits are free memory's, too.
        (4096, 1024, 262144, 15.9, {"reference": True}, [1024] * 4),
        (4096, 1024, 262144, 16.1, {"reference": True}, [4096]),
        # What always could be had, without a look at the memory.
        (8192, 64, 32000, None, {}, [8192]),
        (8192, 4096, 151936, None, {"wants_weight": False}, [2048] * 4),
        (8192, 4096, 151936, None, {"chunk_bytes": 151936 * 2 * 512}, [512] * 16),
    ],
)
def test_chunks_on_cuda(n, hidden_size, vocabulary, free, options, expected, monkeypatch):
    memory = (lambda device: pytest.fail("asked")) if free is None else (lambda device: int(free * GIB))
    monkeypatch.setattr(chunks, "free_memory", memory)
    with FakeTensorMode():
        rows = [rows.stop - rows.start for rows in head(n, hidden_size, vocabulary, **options).chunks()]
    assert rows == expected


def test_free_memory_counts_what_the_allocator_holds(monkeypatch):
    for name, value in (("mem_get_info", (5, 80)), ("memory_reserved", 30), ("memory_allocated", 10)):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert chunks.free_memory(torch.device("cuda")) == 25


@pytest.mark.parametrize(("vocabulary", "given"), [(50257, 640 * 2**20), (50304, None), (151936, None), (50257, 10**7)])
def test_chunk_bytes_are_what_the_buffer_takes(vocabulary, given):
    """Off CUDA 640 MiB; a user's own are obeyed, padding included."""
    device = torch.device("cpu")
    row = chunks.row_stride(vocabulary) * 2
    rows = chunks.chunk_rows(10**6, row, 1, device, given, 10**6)
    assert rows * row <= (given or DEFAULT_CHUNK_BYTES) < (rows + 64) * row
    assert chunks.chunk_rows(10**6, row, 1, device, 1, 0) == 1


@pytest.mark.parametrize(
    ("n", "options", "accumulator"),
    [
        (300, {}, BFLOAT16),
        (300, {"leaf": FLOAT32}, FLOAT32),
        (300, {"leaf": torch.float16, "dtype": torch.float16}, FLOAT32),  # has its scale on it
        (300, {"chunk_bytes": 5000 * 2 * 200}, FLOAT32),
    ],
)
def test_a_single_chunk_needs_no_accumulator(n, options, accumulator):
    """On any device: the weight's gradient is the product, which backward scales where it is."""
    with Made(5000, 64) as made, head(n, 64, 5000, device="meta", **options) as products:
        made.dtypes.clear()  # the weight itself, and what autocast makes of it
        products._make_gradients()
        for rows in products.chunks():
            products.add_gradients(rows, products.kept(rows))
        gradient, factor = products.weight_gradient, torch.empty((), device="meta")
        assert gradient.dtype == accumulator
        assert made.dtypes.count(FLOAT32) == (accumulator == FLOAT32)
        made.dtypes.clear()
        assert scaled(gradient, factor, accumulator, in_place=True) is gradient
        assert made.dtypes == []
        assert scaled(gradient, factor, accumulator, in_place=False) is not gradient
        assert made.dtypes == [accumulator]


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32])
def test_what_is_no_product_is_done_by_one_thread_a_piece_at_a_time(dtype, monkeypatch):
    """Beside other processes each operation on two threads waits for both to have their turn."""
    if dtype == BFLOAT16 and not has_sigmoid_of_product():
        pytest.skip("this CPU has no product of bfloat16 with a sigmoid")
    aten, n, hidden_size, vocabulary = torch.ops.aten, 600, 64, 40000
    hidden = (torch.randn(n, hidden_size) / 8).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, hidden_size, dtype=dtype, requires_grad=True)
    targets = torch.randint(vocabulary, (n,))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(products_module, "_FRESH_TILE_BYTES", 2 * n * vocabulary)
    with Sizes(2**15, n * vocabulary // 4) as sizes:
        linear_token_loss(hidden, weight, targets, DFTLoss()).loss.backward()
    made = {aten.empty, aten.empty_like, aten.detach, aten.view}
    assert sizes.found - made == {aten.mm}
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    with Sizes(2**15, n * vocabulary // 4) as sizes:
        linear_token_loss(hidden, weight, targets, DFTLoss()).loss.backward()
    assert sizes.found - made > {aten.mm}


@pytest.mark.parametrize("with_bias", [False, True])
def test_a_product_without_a_buffer_comes_in_tiles(with_bias, monkeypatch):
    """Of some rows and classes, together those of the whole; none is larger than a tile may be."""
    if not has_sigmoid_of_product():
        pytest.skip("this CPU has no product of bfloat16 with a sigmoid")
    own, sizes = products_module.sigmoid_of_product, []

    def recorded(*args):
        sizes.append(tuple(own(*args).shape))
        return own(*args)

    monkeypatch.setattr(products_module, "sigmoid_of_product", recorded)
    hidden, weight = torch.randn(50, 32, dtype=BFLOAT16), torch.randn(1000, 32, dtype=BFLOAT16)
    bias = torch.randn(1000) if with_bias else None
    settings = HeadSettings(LogitTransform(1.0, None), {}, BFLOAT16, 50 * 1008 * 2, None)
    with HeadProducts(hidden, weight, bias, settings) as products:
        whole = products.sigmoids(slice(0, 50), hidden, 3.0).clone()
        assert sizes == [(50, 1000)]
        monkeypatch.setattr(products_module, "_FRESH_TILE_BYTES", 20 * 130 * 2)
        monkeypatch.setattr(products_module, "_FRESH_TILE_ROWS", 20)
        assert torch.equal(products.sigmoids(slice(0, 50), hidden, 3.0), whole)
        logits = hidden.double() @ weight.double().t() + (0 if bias is None else bias.double())
        torch.testing.assert_close(whole.double(), (logits - 3).sigmoid(), rtol=2**-7, atol=1e-30)
        ragged = [(20, 128)] * 7 + [(20, 104)]
        assert sizes[1:] == [*ragged, *ragged, *[(10, 256)] * 3, (10, 232)]


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32])
def test_pieces_are_the_whole(dtype):
    """Rounded once, whatever the pieces."""
    matrix, factor = torch.randn(70, 3000).to(dtype), torch.randn(70, 1)
    expected = (matrix.double() * factor.double()).to(FLOAT32).to(dtype)
    assert torch.equal(times_rows(matrix, factor, out=torch.empty_like(matrix)), expected)
    assert torch.equal(times_rows(matrix, factor, out=matrix), expected)
    assert filled(50000, 0.5, dtype, matrix.device).unique().tolist() == [0.5]
    assert with_pages((3, 5000), dtype, matrix.device).shape == (3, 5000)
    assert [part.stop - part.start for part in row_pieces(10, 2**15, matrix.device)] == [1] * 10
    assert list(row_pieces(0, 8, matrix.device)) == []


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32, torch.float64])
def test_backward_scales_in_place_unless_the_graph_is_kept(dtype):
    hidden, weight, offset, targets = problem(dtype=dtype)
    leaves = (hidden, weight, offset)

    def loss():
        return linear_token_loss(hidden, weight, targets, DFTLoss(), bias=offset).loss

    value = loss()
    saved = value.grad_fn.saved_tensors[1]
    before, place = saved.clone(), saved.data_ptr()
    kept = gradients(value * 3, leaves, retain_graph=True)
    assert torch.equal(saved, before)
    again = gradients(value * 3, leaves)  # the last, but not the first: what was given before may be the same tensor
    assert torch.equal(saved, before)
    assert all(torch.equal(*pair) for pair in zip(kept, again, strict=True))
    value = loss()
    place = value.grad_fn.saved_tensors[1].data_ptr()
    (value * 3).backward()
    assert weight.grad.data_ptr() == place
    assert all(torch.equal(leaf.grad, gradient) for leaf, gradient in zip(leaves, kept, strict=True))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        value.backward()
    (loss() * 3).backward()  # is added, and leaves what it was added to to the leaf alone
    assert all(relative(leaf.grad, 2 * gradient) < 1e-2 for leaf, gradient in zip(leaves, kept, strict=True))


def test_a_factor_is_not_rounded_to_the_gradients_dtype():
    """As a GPU would round a scalar tensor, by what torch says of the product's dtype, and the CPU would not."""

    class Products(TorchDispatchMode):
        dtypes = ()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket == torch.ops.aten.mul:
                self.dtypes += (torch.result_type(*args[:2]),)
            return func(*args, **(kwargs or {}))

    gradient = torch.randn(1000).bfloat16()
    factor = torch.tensor(1 / 3)
    expected = (gradient.double() * factor.double()).bfloat16()
    with Products() as mode:
        own = multiplied(gradient, factor, out=torch.empty_like(gradient))
    assert mode.dtypes == (FLOAT32,)
    assert torch.equal(own, expected)
    assert torch.equal(scaled(gradient, factor, BFLOAT16, in_place=False), expected)
    assert torch.equal(scaled(gradient, factor, BFLOAT16, in_place=True), expected)


@pytest.mark.parametrize("vocabulary", [1, 16, 50, 50257])
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32])
def test_rows_of_logits_are_aligned(vocabulary, dtype):
    hidden, weight, bias, _ = problem(5, 8, vocabulary, dtype=dtype)
    transform = LogitTransform()
    settings = HeadSettings(transform, {}, dtype, None, transform)
    beside = ReferenceHead(hidden.detach(), weight.detach())
    with torch.no_grad(), HeadProducts(hidden, weight, bias, settings, reference=beside) as products:
        for head in (products, products.reference):
            for logits in (head.kept(slice(1, 4)), *map(head.logits, head.blocks(slice(1, 4)))):
                assert logits.shape[1] == vocabulary
                assert logits.stride() == (-(-vocabulary // 16) * 16, 1)
                assert logits.data_ptr() % 16 == 0


@pytest.mark.parametrize("vocabulary", [50257, 151665])
def test_vocabularies_that_16_does_not_divide(vocabulary):
    hidden, weight, bias, targets = leaves = problem(7, 8, vocabulary, spread=0.3)
    output = linear_token_loss(hidden, weight, targets, DFTLoss(), bias=bias, chunk_bytes=vocabulary * 8 * 3)
    expected = full_loss(*leaves, DFTLoss())
    assert relative(output.loss.detach(), expected.detach()) < 1e-13
    for own, reference in zip(gradients(output.loss, leaves[:3]), gradients(expected, leaves[:3]), strict=True):
        assert relative(own, reference) < 1e-12
