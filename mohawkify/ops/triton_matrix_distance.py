"""Stage 1 in Triton: distance and gradients of docs/math.md (16) over square tiles; neither matrix is ever stored.

Three launches, whatever the length. `_normalise` finds the logarithm of every softmax's denominator. `_side` then walks
over the tiles below the diagonal twice: by rows, which gives the distance, the gradient of C and the row sums of W, and
by columns, which gives the gradient of B and the column sums. The two are one kernel: seen from its columns, a tile of
both matrices is the transpose, queries and keys change places, and so do C and B. Nothing is added atomically.

Off the diagonal the decay of a tile is a factor for each row times one for each column; only the tiles on the diagonal
need decays pair by pair. Products run in the inputs' dtype (under autocast in its dtype), all else is float32.

Shapes: b batch, h query heads, g key heads, l target, s source, p head width, n state width. A kernel's program owns a
tile of rows (or columns) and visits others.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from mohawkify.ops.mixing_matrices import AttentionMatrix, MixingMatrix
from mohawkify.ops.scan import LOWEST_LOG_DECAY
from mohawkify.ops.triton_tiles import (
    TRITON_DTYPES,
    describe_mask,
    float32_products,
    grid,
    in_dtype,
    on_device,
    place,
    product_dtype,
    square_tiles,
    tile_width,
)

LOG2_E = math.log2(math.e)


@triton.jit
def _rows(begin_ptr, begin, length, stride, width, COUNT: tl.constexpr, TILE: tl.constexpr):
    """Rows from ``begin`` on, zeros beyond the length and the width; the base is int64, offsets in the tile int32."""
    rows = tl.arange(0, COUNT)
    columns = tl.arange(0, TILE)
    return tl.load(
        begin_ptr + tl.cast(begin, tl.int64) * stride + (rows * stride)[:, None] + columns[None, :],
        mask=(begin + rows < length)[:, None] & (columns < width)[None, :],
        other=0.0,
    )


@triton.jit
def _square(
    begin_ptr, own_begin, other_begin, own_stride, other_stride, inside, OWN: tl.constexpr, OTHER: tl.constexpr
):
    """A tile of a matrix that is read with any strides, such as the transpose of the mask."""
    base = begin_ptr + tl.cast(own_begin, tl.int64) * own_stride + tl.cast(other_begin, tl.int64) * other_stride
    offsets = (tl.arange(0, OWN) * own_stride)[:, None] + (tl.arange(0, OTHER) * other_stride)[None, :]
    return tl.load(base + offsets, mask=inside, other=0)


@triton.jit
def _scores(
    products,
    bias_ptr,
    own_begin,
    other_begin,
    bias_own_stride,
    bias_other_stride,
    inside,
    scale,
    ceiling,
    OWN: tl.constexpr,
    OTHER: tl.constexpr,
):
    """Products to scores in base 2, docs/math.md (17): scaled, capped, biased; the host folded the constants."""
    scores = products * scale
    if ceiling is not None:
        scores = ceiling * (1.0 - 2.0 / (tl.exp(scores) + 1.0))  # ceiling * tanh(scores / 2)
    if bias_ptr is not None:
        bias = _square(bias_ptr, own_begin, other_begin, bias_own_stride, bias_other_stride, inside, OWN, OTHER)
        scores += bias.to(tl.float32) * 1.4426950408889634
    return scores


@triton.jit
def _normalise(
    q_ptr,
    k_ptr,
    first_ptr,
    mask_ptr,
    bias_ptr,
    logarithm_ptr,
    squared_ptr,
    scale,
    ceiling,
    length,
    heads,
    p_width,
    first_stride_b,
    first_stride_h,
    mask_stride_b,
    mask_stride_h,
    mask_stride_l,
    mask_stride_s,
    bias_stride_b,
    bias_stride_h,
    bias_stride_l,
    bias_stride_s,
    GROUP: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    OWN: tl.constexpr,
    OTHER: tl.constexpr,
    TILE_P: tl.constexpr,
):
    """The base-2 logarithm of each row's softmax denominator, and the row's sum of squared probabilities."""
    own_tile, pair = place(tl.cdiv(length, OWN))
    batch, head = pair // heads, pair % heads
    own_begin = own_tile * OWN
    own = own_begin + tl.arange(0, OWN)
    q = _rows(q_ptr + pair * length * p_width, own_begin, length, p_width, p_width, OWN, TILE_P).to(DTYPE)
    keys = k_ptr + (batch * (heads // GROUP) + head // GROUP) * length * p_width
    first_begin = first_ptr + batch * first_stride_b + head * first_stride_h
    first = tl.load(first_begin + own, mask=own < length, other=0)
    if mask_ptr is not None:
        mask_ptr += batch * mask_stride_b + head * mask_stride_h
    if bias_ptr is not None:
        bias_ptr += batch * bias_stride_b + head * bias_stride_h
    largest = tl.full((OWN,), float("-inf"), tl.float32)
    total = tl.zeros((OWN,), tl.float32)
    squared = tl.zeros((OWN,), tl.float32)
    for other_begin in range(0, tl.minimum(own_begin + OWN, length), OTHER):
        other = other_begin + tl.arange(0, OTHER)
        k = _rows(keys, other_begin, length, p_width, p_width, OTHER, TILE_P).to(DTYPE)
        allowed = (own[:, None] >= other[None, :]) & (own[:, None] < length) & (other[None, :] >= first[:, None])
        if mask_ptr is not None:
            allowed &= _square(mask_ptr, own_begin, other_begin, mask_stride_l, mask_stride_s, allowed, OWN, OTHER) != 0
        products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        scores = _scores(
            products, bias_ptr, own_begin, other_begin, bias_stride_l, bias_stride_s, allowed, scale, ceiling,
            OWN, OTHER,
        )  # fmt: skip
        scores = tl.where(allowed, scores, float("-inf"))
        peak = tl.maximum(largest, tl.max(scores, 1))
        # Rows without an allowed source so far have no peak to subtract.
        base = tl.where(peak == float("-inf"), 0.0, peak)
        kept = tl.exp2(largest - base)
        weights = tl.exp2(scores - base[:, None])
        total = total * kept + tl.sum(weights, 1)
        squared = squared * kept * kept + tl.sum(weights * weights, 1)
        largest = peak
    tl.store(logarithm_ptr + pair * length + own, largest + tl.log2(total), mask=own < length)
    tl.store(squared_ptr + pair * length + own, squared / (total * total), mask=own < length)


@triton.jit
def _side(
    own_qk_ptr,
    other_qk_ptr,
    own_bc_ptr,
    other_bc_ptr,
    high_ptr,
    low_ptr,
    document_ptr,
    d_ptr,
    first_ptr,
    mask_ptr,
    bias_ptr,
    logarithm_ptr,
    gradient_ptr,
    weighted_ptr,
    squared_ptr,
    diagonal_ptr,
    scale,
    ceiling,
    length,
    heads,
    p_width,
    n_width,
    first_stride_b,
    first_stride_h,
    mask_stride_b,
    mask_stride_h,
    mask_stride_own,
    mask_stride_other,
    bias_stride_b,
    bias_stride_h,
    bias_stride_own,
    bias_stride_other,
    OWN_GROUP: tl.constexpr,
    OTHER_GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    OWN: tl.constexpr,
    OTHER: tl.constexpr,
    TILE_P: tl.constexpr,
    TILE_N: tl.constexpr,
):
    """The gradient of C and the row sums of W and R * R, docs/math.md (30); without ROWS that of B and column sums."""
    own_tile, pair = place(tl.cdiv(length, OWN))
    batch, head = pair // heads, pair % heads
    own_begin = own_tile * OWN
    own = own_begin + tl.arange(0, OWN)
    own_inside = own < length
    own_qk_begin = own_qk_ptr + (batch * (heads // OWN_GROUP) + head // OWN_GROUP) * length * p_width
    other_qk_begin = other_qk_ptr + (batch * (heads // OTHER_GROUP) + head // OTHER_GROUP) * length * p_width
    own_qk = _rows(own_qk_begin, own_begin, length, p_width, p_width, OWN, TILE_P).to(DTYPE)
    bc_begin = (batch * length * heads + head) * n_width
    bc_stride = heads * n_width
    own_bc = _rows(own_bc_ptr + bc_begin, own_begin, length, bc_stride, n_width, OWN, TILE_N)
    first_begin = first_ptr + batch * first_stride_b + head * first_stride_h
    if mask_ptr is not None:
        mask_ptr += batch * mask_stride_b + head * mask_stride_h
    if bias_ptr is not None:
        bias_ptr += batch * bias_stride_b + head * bias_stride_h
    high_begin, low_begin = high_ptr + pair * length, low_ptr + pair * length
    if document_ptr is not None:
        document_ptr += batch * length
    logarithm_begin = logarithm_ptr + pair * length

    # Between tiles the decay is split at the last position before the own rows, or at the last of the own columns.
    if ROWS:
        split = tl.maximum(own_begin - 1, 0)
        own_logarithm = tl.load(logarithm_begin + own, mask=own_inside, other=0.0)
        own_first = tl.load(first_begin + own, mask=own_inside, other=0)
        sign = 1.0
    else:
        split = tl.minimum(own_begin + OWN, length) - 1
        sign = -1.0
    own_high = tl.load(high_begin + own, mask=own_inside, other=0.0)
    own_low = tl.load(low_begin + own, mask=own_inside, other=0.0)
    split_high, split_low = tl.load(high_begin + split), tl.load(low_begin + split)
    own_near = own_inside
    if document_ptr is not None:
        own_document = tl.load(document_ptr + own, mask=own_inside, other=-1)
        split_document = tl.load(document_ptr + split)
        own_near = own_near & (own_document == split_document)
    own_exponent = sign * ((own_high - split_high) + (own_low - split_low))
    own_factor = tl.exp(tl.where(own_near, own_exponent, float("-inf")))
    scaled_bc = (own_bc.to(tl.float32) * own_factor[:, None]).to(DTYPE)
    own_bc = own_bc.to(DTYPE)
    skip = tl.load(d_ptr + head).to(tl.float32)
    gradient = tl.zeros((OWN, TILE_N), tl.float32)
    weighted = tl.zeros((OWN,), tl.float32)
    squared = tl.zeros((OWN,), tl.float32)
    diagonal = tl.zeros((OWN,), tl.float32)

    # First the tiles off the diagonal, then those on it: a loop each, written once.
    for ON_DIAGONAL in tl.static_range(0, 2):
        if ON_DIAGONAL:
            gradient *= own_factor[:, None]
            first, last = own_begin, tl.minimum(own_begin + OWN, length)
        elif ROWS:
            first, last = 0, own_begin
        else:
            first, last = own_begin + OWN, length
        for other_begin in range(first, last, OTHER):
            other = other_begin + tl.arange(0, OTHER)
            other_inside = other < length
            other_qk = _rows(other_qk_begin, other_begin, length, p_width, p_width, OTHER, TILE_P).to(DTYPE)
            other_bc = _rows(other_bc_ptr + bc_begin, other_begin, length, bc_stride, n_width, OTHER, TILE_N).to(DTYPE)
            reached = own_inside[:, None] & other_inside[None, :]
            if ON_DIAGONAL:
                if ROWS:
                    reached = reached & (own[:, None] >= other[None, :])
                else:
                    reached = reached & (own[:, None] <= other[None, :])
            if ROWS:
                allowed = reached & (other[None, :] >= own_first[:, None])
            else:
                other_first = tl.load(first_begin + other, mask=other_inside, other=0)
                allowed = reached & (own[:, None] >= other_first[None, :])
            if mask_ptr is not None:
                square = _square(
                    mask_ptr, own_begin, other_begin, mask_stride_own, mask_stride_other, reached, OWN, OTHER
                )
                allowed &= square != 0
            products = tl.dot(own_qk, tl.trans(other_qk), input_precision=PRECISION)
            scores = _scores(
                products, bias_ptr, own_begin, other_begin, bias_stride_own, bias_stride_other, reached, scale,
                ceiling, OWN, OTHER,
            )  # fmt: skip
            if ROWS:
                scores -= own_logarithm[:, None]
            else:
                scores -= tl.load(logarithm_begin + other, mask=other_inside, other=0.0)[None, :]
            probabilities = tl.where(allowed, tl.exp2(scores), 0.0)

            other_high = tl.load(high_begin + other, mask=other_inside, other=0.0)
            other_low = tl.load(low_begin + other, mask=other_inside, other=0.0)
            if document_ptr is not None:
                other_document = tl.load(document_ptr + other, mask=other_inside, other=-1)
            if ON_DIAGONAL:
                if document_ptr is not None:
                    reached = reached & (own_document[:, None] == other_document[None, :])
                exponent = (own_high[:, None] - other_high[None, :]) + (own_low[:, None] - other_low[None, :])
                decay = tl.exp(tl.where(reached, sign * exponent, float("-inf")))
                matrix = tl.dot(own_bc, tl.trans(other_bc), input_precision=PRECISION) * decay
                is_diagonal = (own[:, None] == other[None, :]) & own_inside[:, None]
                rest = matrix - probabilities + tl.where(is_diagonal, skip, 0.0)
                # The diagonal does not decay: it is left out of W rather than cancelled.
                weighted += tl.sum(tl.where(is_diagonal, 0.0, rest * matrix), 1)
                if ROWS:
                    diagonal += tl.sum(tl.where(is_diagonal, rest, 0.0), 1)
            else:
                other_near = other_inside
                if document_ptr is not None:
                    other_near = other_near & (other_document == split_document)
                other_exponent = sign * ((split_high - other_high) + (split_low - other_low))
                decay = tl.exp(tl.where(other_near, other_exponent, float("-inf")))[None, :]
                matrix = tl.dot(scaled_bc, tl.trans(other_bc), input_precision=PRECISION) * decay
                rest = matrix - probabilities
                weighted += tl.sum(rest * matrix, 1)
            if ROWS:
                squared += tl.sum(rest * rest, 1)
            gradient = tl.dot((rest * decay).to(DTYPE), other_bc, gradient, input_precision=PRECISION)

    gradient_offsets = (tl.arange(0, OWN) * bc_stride)[:, None] + tl.arange(0, TILE_N)[None, :]
    tl.store(
        gradient_ptr + bc_begin + tl.cast(own_begin, tl.int64) * bc_stride + gradient_offsets,
        gradient,
        mask=own_inside[:, None] & (tl.arange(0, TILE_N) < n_width)[None, :],
    )
    tl.store(weighted_ptr + pair * length + own, weighted, mask=own_inside)
    if ROWS:
        tl.store(squared_ptr + pair * length + own, squared, mask=own_inside)
        tl.store(diagonal_ptr + pair * length + own, diagonal, mask=own_inside)


class _Launch:
    """One call's kernels: the inputs as they take them, and the constants they are compiled with."""

    def __init__(
        self, mixing: MixingMatrix, attention: AttentionMatrix, document_starts_bl: Tensor | None, dtype: torch.dtype
    ) -> None:
        self.b_blhn, self.c_blhn = in_dtype(mixing.b_blhn, dtype), in_dtype(mixing.c_blhn, dtype)
        self.q_bhlp, self.k_bgsp = in_dtype(attention.q_bhlp, dtype), in_dtype(attention.k_bgsp, dtype)
        self.d_h = mixing.d_h.contiguous()
        self.batch, self.length, self.heads, self.n_width = self.b_blhn.shape
        self.p_width = self.q_bhlp.shape[-1]
        shape = (self.batch, self.heads, self.length, self.length)
        self.first_bhl, self.mask_bhls = describe_mask(attention.mask_bhls)
        self.first_bhl = self.first_bhl.expand(shape[:3])
        if self.mask_bhls is not None:
            self.mask_bhls = self.mask_bhls.expand(shape)
        self.bias_bhls = None if attention.bias_bhls is None else attention.bias_bhls.expand(shape)
        # Sums over the whole sequence, as two float32 each: their differences are exact to float32.
        cumulative_bhl = mixing.log_decay_blh.transpose(1, 2).double().clamp(min=LOWEST_LOG_DECAY).cumsum(-1)
        self.high_bhl = cumulative_bhl.float().contiguous()
        self.low_bhl = (cumulative_bhl - self.high_bhl).float().contiguous()
        self.document_bl = None if document_starts_bl is None else document_starts_bl.cumsum(-1, dtype=torch.int32)
        if attention.softcap is None:
            self.scale, self.ceiling = attention.scaling * LOG2_E, None
        else:
            self.scale, self.ceiling = 2 * attention.scaling / attention.softcap, attention.softcap * LOG2_E
        own, other = square_tiles(self.p_width, self.n_width, dtype)
        self.group = self.heads // self.k_bgsp.shape[1]
        self.grid = grid(triton.cdiv(self.length, own), self.batch * self.heads)
        self.constants = {
            "DTYPE": TRITON_DTYPES[dtype],
            "PRECISION": float32_products(),
            "OWN": own,
            "OTHER": other,
            "TILE_P": tile_width(self.p_width),
            "num_warps": 8 if own >= 64 else 4,
            # Reading a bias ahead as well takes more than 99 KB in float32.
            "num_stages": 1 if dtype == torch.float32 and self.bias_bhls is not None else 2,
        }

    def empty(self) -> Tensor:
        """A float32 number per head and position."""
        return torch.empty_like(self.high_bhl)

    def strides(self, rows: bool) -> list[int]:
        """The strides of first sources, mask and bias, the own positions before the others."""
        found = list(self.first_bhl.stride()[:2])
        for tensor in (self.mask_bhls, self.bias_bhls):
            batch, head, row, column = (0, 0, 0, 0) if tensor is None else tensor.stride()
            found += [batch, head, row, column] if rows else [batch, head, column, row]
        return found

    def normalise(self) -> tuple[Tensor, Tensor]:
        """The rows' denominators (b, h, l) as base-2 logarithms, and their sums of squared probabilities."""
        logarithm_bhl, squared_bhl = self.empty(), self.empty()
        _normalise[self.grid](
            *(self.q_bhlp, self.k_bgsp, self.first_bhl, self.mask_bhls, self.bias_bhls, logarithm_bhl, squared_bhl),
            *(self.scale, self.ceiling, self.length, self.heads, self.p_width),
            *self.strides(rows=True),
            GROUP=self.group,
            **self.constants,
        )
        return logarithm_bhl, squared_bhl

    def side(self, logarithm_bhl: Tensor, *, rows: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The gradient of C (b, l, h, n), or of B, times N; sums of W, R * R and R's diagonal (b, h, l)."""
        own = (self.q_bhlp, self.c_blhn) if rows else (self.k_bgsp, self.b_blhn)
        other = (self.k_bgsp, self.b_blhn) if rows else (self.q_bhlp, self.c_blhn)
        gradient_blhn = torch.empty_like(self.b_blhn, dtype=torch.float32)
        weighted_bhl, squared_bhl, diagonal_bhl = self.empty(), self.empty(), self.empty()
        _side[self.grid](
            *(own[0], other[0], own[1], other[1], self.high_bhl, self.low_bhl, self.document_bl, self.d_h),
            *(self.first_bhl, self.mask_bhls, self.bias_bhls, logarithm_bhl),
            *(gradient_blhn, weighted_bhl, squared_bhl, diagonal_bhl),
            *(self.scale, self.ceiling, self.length, self.heads, self.p_width, self.n_width),
            *self.strides(rows),
            OWN_GROUP=1 if rows else self.group,
            OTHER_GROUP=self.group if rows else 1,
            ROWS=rows,
            TILE_N=tile_width(self.n_width),
            **self.constants,
        )
        return gradient_blhn, weighted_bhl, squared_bhl, diagonal_bhl


def orient_loss_triton(
    mixing: MixingMatrix, attention: AttentionMatrix, document_starts_bl: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`matrix_distance.orient_loss` on a GPU, for states and heads of at most 256 and a mask that is causal."""
    dtype = product_dtype(mixing.b_blhn, mixing.c_blhn, attention.q_bhlp, attention.k_bgsp)
    loss, relative = _OrientLoss.apply(*mixing, attention, document_starts_bl, dtype)
    return loss, relative


class _OrientLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        b_blhn: Tensor,
        c_blhn: Tensor,
        log_decay_blh: Tensor,
        d_h: Tensor,
        attention: AttentionMatrix,
        document_starts_bl: Tensor | None,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        with on_device(b_blhn):
            launch = _Launch(MixingMatrix(b_blhn, c_blhn, log_decay_blh, d_h), attention, document_starts_bl, dtype)
            logarithm_bhl, attention_squared_bhl = launch.normalise()
            dc_blhn, from_rows_bhl, squared_bhl, diagonal_bhl = launch.side(logarithm_bhl, rows=True)
            db_blhn, from_columns_bhl, _, _ = launch.side(logarithm_bhl, rows=False)
        norm_bh = squared_bhl.sum(-1, dtype=torch.float64).sqrt()
        share_bh = torch.where(norm_bh > 0, 1.0 / norm_bh, 0.0) / norm_bh.numel()
        difference_bhl = from_rows_bhl.double() - from_columns_bhl
        # Every difference reaches all log-decays between source and target: a running sum from the end.
        log_decay_bhl = difference_bhl.flip(-1).cumsum(-1).flip(-1) * share_bh.unsqueeze(-1)
        share_b1h1 = share_bh.float()[:, None, :, None]
        ctx.save_for_backward(
            db_blhn.mul_(share_b1h1).to(b_blhn.dtype),
            dc_blhn.mul_(share_b1h1).to(c_blhn.dtype),
            log_decay_bhl.transpose(1, 2).to(log_decay_blh.dtype),
            (diagonal_bhl.sum(-1, dtype=torch.float64) * share_bh).sum(0).to(d_h.dtype),
        )
        relative = (norm_bh / attention_squared_bhl.sum(-1, dtype=torch.float64).sqrt()).mean().float()
        ctx.mark_non_differentiable(relative)
        return norm_bh.mean().float(), relative

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return *(saved * gradients[0] for saved in ctx.saved_tensors), None, None, None
