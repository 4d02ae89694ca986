"""The matrix products of a linear head, a chunk of tokens at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import embedding

from dft_lightning.foreign.torch import sigmoid_of_product
from dft_lightning.losses.statistics import raised_dtype
from dft_lightning.ops.call import HeadSettings, ReferenceHead
from dft_lightning.ops.chunks import CUDA_CHUNK_ROWS, chunk_rows, row_stride
from dft_lightning.ops.left_out import Chosen, LeftOut
from dft_lightning.ops.pieces import PIECE_BYTES, add_, filled, row_pieces, scratch, slices, times_rows, with_pages

# Float32 logits beside half precision are those of a chunk's so many parts, but of enough rows for a fast product.
_BLOCKS, _LEAST_ROWS = 8, 512

# Weight-gradient rows whose half-precision product waits to be added to the accumulator (CPU).
_TILE_BYTES = 16 * 2**20

# A tile of a product that has no buffer to go to, and its most rows: enough of either for a fast product (CPU).
_FRESH_TILE_BYTES, _FRESH_TILE_ROWS = 8 * 2**20, 2048


NO_GRADIENTS = (False, False, False)


class HeadProducts:
    """Logits of chunks of tokens, buffers for what is kept of them, and the two gradient products out of that.

    Use as a context manager, which holds the buffers. Logits are float32 (float64 of float64) and never rounded to
    half precision. The weight's gradient is accumulated in float32 for half precision, unless a single chunk's product
    in bfloat16 is all there is to it.

    Args:
        hidden: ``[n, H]``.
        weight: ``[V, H]``.
        bias: ``[V]`` or ``None``.
        settings: the dtype of the products and the size of the buffer of logits.
        wanted: whether to accumulate the gradients of ``hidden``, ``weight`` and ``bias``.
        reference: a reference model's head, whose rows stand beside where a statistic wants them.
        chunk: tokens of a chunk, where the caller knows.
        role: of the buffers: two that are held at once have buffers of their own.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        settings: HeadSettings,
        wanted: tuple[bool, bool, bool] = NO_GRADIENTS,
        reference: ReferenceHead | None = None,
        chunk: int | None = None,
        role: str = "",
    ) -> None:
        self._role = role
        self._hidden, self._weight, self._bias = hidden, weight, bias
        self.dtype, self._raised = settings.dtype, raised_dtype(settings.dtype)
        self._transform = settings.transform
        self._leaves_out = settings.gradient_threshold > 0
        self.device = hidden.device
        self.wanted = wanted
        self.num_tokens, self.vocabulary = hidden.shape[0], weight.shape[0]
        self._stack = ExitStack()
        self._started = False
        self._scale = GradientScale()
        self.hidden_gradient: Tensor | None = None
        self.weight_gradient: Tensor | None = None
        self.bias_gradient: Tensor | None = None
        self._chunk = chunk or self._chunk_rows(settings)
        self.reference: HeadProducts | None = None
        if reference is not None and settings.reference_transform is not None:
            head = (reference.hidden, reference.weight, reference.bias)
            theirs = replace(settings, transform=settings.reference_transform, reference_transform=None)
            self.reference = HeadProducts(*head, theirs, chunk=self._chunk, role="reference ")

    def _chunk_rows(self, settings: HeadSettings) -> int:
        buffers = 1 if settings.reference_transform is None else 2
        row_bytes = row_stride(self.vocabulary) * self.dtype.itemsize
        rows_for_weight = 0
        if self.wanted[1]:
            # Where one chunk needs no accumulator, logits may take its place.
            saved = self._weight.numel() * torch.float32.itemsize if self._rounds_once else 0
            rows_for_weight = CUDA_CHUNK_ROWS + saved // (buffers * row_bytes)
        return chunk_rows(self.num_tokens, row_bytes, buffers, self.device, settings.chunk_bytes, rows_for_weight)

    def __enter__(self) -> HeadProducts:
        self._cast_weight = self._cast("weight", self._weight)
        self._make_gradients()
        if self.reference is not None:
            self._stack.enter_context(self.reference)
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def _scratch(self, role: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return self._stack.enter_context(scratch(self._role + role, shape, dtype, self.device))

    def _rows_of_logits(self, role: str, num_rows: int, dtype: torch.dtype) -> Tensor:
        return self._scratch(role, (num_rows, row_stride(self.vocabulary)), dtype)[:, : self.vocabulary]

    def _cast(self, role: str, tensor: Tensor) -> Tensor:
        if tensor.dtype == self.dtype:
            return tensor
        return self._scratch(role, tuple(tensor.shape), self.dtype).copy_(tensor)

    def _make_gradients(self) -> None:
        raised = self._raised
        wants_hidden, wants_weight, wants_bias = self.wanted
        if wants_hidden:
            # Only an accelerator's product can leave float32 behind; elsewhere the hidden states' own dtype is as good.
            is_raised = self.device.type == "cuda" or self.dtype == torch.float16
            dtype = raised if is_raised else self._hidden.dtype
            self.hidden_gradient = torch.empty(self._hidden.shape, dtype=dtype, device=self.device)
        if wants_weight:
            # A single chunk has nothing to accumulate: the product itself sums in float32 and rounds once.
            dtype = self.dtype if self._rounds_once and self._chunk == self.num_tokens else raised
            self.weight_gradient = with_pages(self._weight.shape, dtype, self.device)
            if self.num_tokens == 0 or self._leaves_out:
                self.weight_gradient.zero_()
        if wants_bias:
            self.bias_gradient = torch.zeros(self.vocabulary, dtype=raised, device=self.device)

    @property
    def _rounds_weight_gradient(self) -> bool:
        """Whether the weight's gradient ends in the dtype of the products."""
        return self._weight.dtype == self.dtype

    @property
    def _rounds_once(self) -> bool:
        """Whether a single chunk needs no float32 beside the weight's gradient; in float16 the scale is to come off."""
        return self._rounds_weight_gradient and self.dtype == torch.bfloat16

    @property
    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of the hidden states, the weight and the bias, as accumulated; ``None`` where not wanted."""
        return self.hidden_gradient, self.weight_gradient, self.bias_gradient

    @property
    def scale(self) -> Tensor | float:
        """What is on the gradients of the weight and the bias, and to be divided off."""
        return self._scale.factor

    def next_scale(self, largest: Tensor) -> Tensor | float:
        """What to multiply the next chunk's gradient by before it is rounded: 1 but for float16.

        Args:
            largest: ``[c]``, what no element of a row exceeds.
        """
        if self.dtype == torch.float16:
            change = self._scale.next(largest)
            for total in (self.weight_gradient, self.bias_gradient):
                if total is not None and self._started:
                    total.mul_(change)
        return self._scale.factor

    def chunks(self) -> Iterator[slice]:
        """Slices of tokens, all but the last of one size."""
        return slices(self.num_tokens, self._chunk)

    def blocks(self, rows: slice) -> Iterator[slice]:
        """Slices of a chunk whose logits are there at once: all of it, or, beside half precision, an eighth."""
        size = self._chunk if self.dtype == self._raised else self._block
        return (slice(rows.start + part.start, rows.start + part.stop) for part in slices(rows.stop - rows.start, size))

    @property
    def _block(self) -> int:
        """Rows whose float32 logits are there at once beside half precision."""
        return min(self._chunk, max(-(-self._chunk // (64 * _BLOCKS)) * 64, _LEAST_ROWS))

    def kept(self, rows: slice) -> Tensor:
        """``[c, V]`` in the dtype of the products, for what is kept of a chunk: where the logits are, if they are of
        that dtype."""
        return self._kept[: rows.stop - rows.start]

    @cached_property
    def _kept(self) -> Tensor:
        return self._rows_of_logits("kept", self._chunk, self.dtype)

    @cached_property
    def _logits(self) -> Tensor:
        return self._rows_of_logits("logits", self._block, self._raised)

    @cached_property
    def _rounded(self) -> Tensor:
        return self._rows_of_logits("rounded", self._block, self.dtype)

    def logits(self, rows: slice) -> Tensor:
        """``[b, V]`` logits of a block before the transform, in float32 or float64, valid until the next call."""
        size = rows.stop - rows.start
        hidden, weight = self._hidden[rows].to(self.dtype), self._cast_weight.t()
        if self.dtype == self._raised:
            out = self._kept[:size]
            if self._bias is None:
                return torch.mm(hidden, weight, out=out)
            return torch.addmm(self._bias.to(self.dtype), hidden, weight, out=out)
        out = self._logits[:size]
        if self.device.type == "cuda":
            _product(hidden, weight, out=out)
        else:
            # A product that rounds its sums, and another of what it took off.
            rounded = torch.mm(hidden, weight, out=self._rounded[:size])
            out.copy_(rounded)
            add_(out, torch.addmm(rounded.neg_(), hidden, weight, out=rounded))
        return out if self._bias is None else out.add_(self._bias)

    # -- by half-precision products that round their sums --

    def scaled_hidden(self, rows: slice, which: Tensor | None = None) -> Tensor:
        """A chunk's hidden states, or ``which`` of them, times the factor of the logits."""
        hidden = self._hidden[rows] if which is None else self._hidden[rows][which]
        hidden = hidden.to(self.dtype)
        return hidden if self._transform.scale == 1.0 else hidden * self._transform.scale

    def sigmoids(self, rows: slice, scaled_hidden: Tensor, base: float) -> Tensor:
        """``[c, V]``, ``sigmoid(z - base)`` of logits that are not rounded before it; on the CPU in bfloat16.

        In tiles, for each product is a fresh tensor: of a few megabytes it has the memory of the one before, where a
        larger one waits for the system to give each of its pages, for longer than the product takes.
        """
        bias, weight, values = self._scaled_bias, self._cast_weight.contiguous(), self.kept(rows)
        shift = filled(self.vocabulary, -base, self._raised, self.device) if bias is None else bias - base
        for some in slices(len(values), _FRESH_TILE_ROWS):
            classes = max(_FRESH_TILE_BYTES // ((some.stop - some.start) * values.itemsize) // 64, 1) * 64
            for part in slices(self.vocabulary, classes):
                values[some, part] = sigmoid_of_product(scaled_hidden[some], weight[part], shift[part])
        return values

    @cached_property
    def has_nan(self) -> bool:
        """Whether some class has a nan in its weight or bias, which is every row's: oneDNN's sigmoid makes 0 of it."""
        of_bias = self._scaled_bias is not None and bool(self._scaled_bias.isnan().any())
        return of_bias or bool(self._cast_weight.sum().isnan())

    def float32_logits(self, scaled_hidden: Tensor) -> Tensor:
        """``[c, V]`` logits by a product in float32, which takes some times as long."""
        hidden = scaled_hidden.to(self._raised)
        logits = hidden.new_empty(len(hidden), self.vocabulary)
        for part in slices(self.vocabulary, max(1, _TILE_BYTES // (hidden.shape[1] * hidden.itemsize))):
            logits[:, part] = hidden @ self._cast_weight[part].to(self._raised).t()
        return logits if self._scaled_bias is None else logits.add_(self._scaled_bias)

    def logits_at(self, rows: slice, classes: Tensor, which: Tensor | None = None) -> Tensor:
        """Logits of some classes ``[c, k]`` of a chunk's rows, or of ``which`` of them, in float32."""
        hidden = self.scaled_hidden(rows, which)
        logits = hidden.new_empty(classes.shape, dtype=self._raised)
        for part in row_pieces(len(classes), classes.shape[1] * hidden.shape[1], self.device):
            weight = embedding(classes[part], self._cast_weight).to(self._raised)
            torch.sum(weight.mul_(hidden[part].unsqueeze(1)), -1, out=logits[part])
        return logits if self._scaled_bias is None else logits.add_(self._scaled_bias[classes])

    def sum_of_logits(self, rows: slice) -> Tensor:
        """``[c]``, the sum of each row's logits in float32: a product with the sum of the classes' weights."""
        logits = self.scaled_hidden(rows).to(self._raised) @ self._weight_sum
        return logits if self._scaled_bias is None else logits.add_(self._scaled_bias.sum())

    @cached_property
    def _weight_sum(self) -> Tensor:
        return float32_sums(self._cast_weight.t())

    @cached_property
    def _scaled_bias(self) -> Tensor | None:
        return None if self._bias is None else self._bias.to(self._raised) * self._transform.scale

    # -- gradients --

    @cached_property
    def left_out(self) -> LeftOut:
        """What chooses the classes of the gradient products, where a threshold leaves some out."""
        return LeftOut(self._cast_weight, lambda a, b, out: _product(a, b, out=out), float32_sums)

    @contextmanager
    def chosen(
        self, gradient: Tensor, targets: Tensor, row_scale: Tensor | None, limit: Tensor | float
    ) -> Iterator[Chosen]:
        """A chunk's gradient at the classes that are not left out, for as long as the context lasts; see there."""
        with ExitStack() as stack:

            def buffer(shape: tuple[int, int]) -> Tensor:
                return stack.enter_context(scratch(self._role + "chosen", shape, self.dtype, self.device))

            yield self.left_out.choose(gradient, targets, row_scale, limit, buffer)

    def add_gradients(self, rows: slice, gradient: Tensor | Chosen, row_scale: Tensor | None = None) -> None:
        """Add what a chunk's gradient with respect to its logits contributes.

        Args:
            rows: of the chunk.
            gradient: ``[c, V]``, or what was chosen of it.
            row_scale: ``[c]``, float32 or float64: factors of its rows, which are cheaper to have on what it is
                multiplied by and on what comes out.
        """
        change, hidden = None if row_scale is None else row_scale.unsqueeze(-1), self._hidden[rows]
        if isinstance(gradient, Chosen):
            factor, weight, classes, gradient = (
                gradient.gradient,
                gradient.weight,
                gradient.classes,
                gradient.of_classes,
            )
        else:
            factor, weight, classes = gradient, self._cast_weight, None
        if self.hidden_gradient is not None:
            own = self.hidden_gradient[rows]
            _product(factor, weight, out=own)
            if change is not None:
                times_rows(own, change, out=own)
            elif self.dtype == torch.float16:
                own.div_(self.scale)
        if change is not None and self.dtype == torch.float16:
            largest = (hidden * change).abs().amax(-1)
            if self.bias_gradient is not None:
                largest = torch.maximum(largest, change.abs().squeeze(-1))
            change = change * self.next_scale(largest)
        if self.bias_gradient is not None:
            self._add_bias_gradient(gradient, change, classes)
        if self.weight_gradient is not None:
            if change is not None:
                hidden = times_rows(hidden, change, out=torch.empty_like(hidden, dtype=self.dtype))
            # A product rounded to half precision is as good as a float32 gradient needs (torch's own autocast rounds
            # too), but a sum of rounded products that is rounded again is not: there the rest is added as well.
            exact, hidden = self._rounds_weight_gradient, hidden.to(self.dtype)
            if classes is None:
                _accumulate(self.weight_gradient, gradient.t(), hidden, add=self._started, exact=exact)
            elif len(classes):
                part = self.weight_gradient.new_empty(len(classes), hidden.shape[1])
                _accumulate(part, gradient.t(), hidden, add=False, exact=exact)
                self.weight_gradient.index_add_(0, classes, part)
        self._started = True

    def _add_bias_gradient(self, gradient: Tensor, change: Tensor | None, classes: Tensor | None) -> None:
        assert self.bias_gradient is not None
        pieces = 16 if self.device.type == "cpu" else 256
        size = max(1, pieces * PIECE_BYTES // (self.vocabulary * self._raised.itemsize))
        for part in slices(len(gradient), size):
            piece = gradient[part].to(self._raised)
            sums = (piece if change is None else piece * change[part]).sum(0)
            if classes is None:
                self.bias_gradient += sums
            else:
                self.bias_gradient.index_add_(0, classes, sums)


def float32_sums(matrix: Tensor, which: Tensor | None = None) -> Tensor:
    """Sums of half-precision rows ``[n, m]`` in float32: a product rounds its sums, and another adds what it took off.

    ``matrix.sum(-1, dtype=torch.float32)`` takes ten times as long on the CPU. Other rows, and those elsewhere, are
    summed by it, or by one product.

    Args:
        matrix: ``[n, m]``.
        which: ``[m]``, 1 at the columns to sum, else 0, in the matrix's dtype; without it all are.
    """
    if matrix.device.type == "cpu" and matrix.dtype == torch.bfloat16:
        ones = filled(matrix.shape[1], 1.0, matrix.dtype, matrix.device) if which is None else which
        ones = ones.unsqueeze(-1)
        rounded = torch.mm(matrix, ones)
        return (rounded.float() + torch.addmm(rounded.neg(), matrix, ones).float()).squeeze(-1)
    if which is None:
        return matrix.sum(-1, dtype=raised_dtype(matrix.dtype))
    sums = matrix.new_empty(len(matrix), 1, dtype=raised_dtype(matrix.dtype))
    _product(matrix, which.unsqueeze(-1), out=sums)
    return sums.squeeze(-1)


class GradientScale:
    """The power of two that a factor of the gradient products is multiplied by before it is rounded to float16.

    Of gradients of logits, or of hidden states times the factors of their rows.

    It brings the largest of a chunk to between 2**14 and 2**15, on the device, without waiting for it.
    """

    def __init__(self) -> None:
        self.factor: Tensor | float = 1.0
        self._largest: Tensor | None = None

    def next(self, largest: Tensor) -> Tensor | float:
        """Take the next chunk in, and return the new factor over the old one, for what was accumulated under that."""
        found = largest.amax().clamp(min=2.0**-100)
        if self._largest is None:
            self._largest = found
        found = torch.maximum(found, self._largest * 2.0**-60)  # sums of the largest stay finite in float32
        self._largest = torch.maximum(found, self._largest)
        before, factor = self.factor, torch.exp2(15 - found.log2().ceil())
        self.factor = torch.where(factor > 0, factor, 1.0)  # inf and nan are the scaler's to see
        return self.factor / before


def _product(a: Tensor, b: Tensor, *, out: Tensor) -> None:
    """``out = a @ b``, without rounding to the inputs' dtype first where the device can."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    elif a.device.type == "cuda":
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        with scratch("product", (a.shape[0], b.shape[1]), a.dtype, a.device) as rounded:
            out.copy_(torch.mm(a, b, out=rounded))


def _accumulate(total: Tensor, a: Tensor, b: Tensor, *, add: bool, exact: bool) -> None:
    """``total += a @ b`` (``total = a @ b`` where not ``add``).

    Where the device can only give the product rounded to half precision, ``exact`` adds what rounding took off, at the
    cost of a second product.
    """
    if total.dtype == a.dtype and add:
        torch.addmm(total, a, b, out=total)
    elif total.dtype == a.dtype:
        torch.mm(a, b, out=total)
    elif a.device.type == "cuda" and add:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    elif a.device.type == "cuda":
        torch.mm(a, b, out_dtype=total.dtype, out=total)
    else:
        _accumulate_tiles(total, a, b, add=add, exact=exact)


def _accumulate_tiles(total: Tensor, a: Tensor, b: Tensor, *, add: bool, exact: bool) -> None:
    """In tiles, so that a rounded product never leaves the cache."""
    width = b.shape[1]
    tile = max(1, min(total.shape[0], _TILE_BYTES // (width * a.dtype.itemsize)))
    with (
        scratch("product", (tile, width), a.dtype, a.device) as product,
        scratch("remainder", (tile, width), a.dtype, a.device) as remainder,
    ):
        for rows in slices(total.shape[0], tile):
            target, factor = total[rows], a[rows]
            rounded = torch.mm(factor, b, out=product[: len(target)])
            if add:
                add_(target, rounded)
            else:
                target.copy_(rounded)
            if exact:
                # The product again, minus its rounded self: summed in float32 inside, rounded where it is small.
                rest = torch.neg(rounded, out=remainder[: len(target)])
                add_(target, torch.addmm(rest, factor, b, out=rest))
