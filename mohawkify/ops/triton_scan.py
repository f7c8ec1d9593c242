"""The scan in Triton: the chunks of docs/math.md (9) and (10), forward and backward, on tensor cores.

Two kernels make the forward pass and three the backward one, whatever the length. `_walk` carries a state from chunk
to chunk and leaves the state before each: forwards over (x, B) it makes S, backwards over (dy, C) the gradient of S.
`_outputs` and `_gradients` then treat all chunks at once. States are recomputed in the backward pass, never saved.
Nothing is added atomically: equal inputs give equal bits.

Products run in the inputs' dtype (under autocast in its dtype) and are summed in float32; decays are differences of
sums within one chunk, taken in float64, and the running state is float32.

Shapes: b batch, l length, h heads, p head width, n state width, m chunks, i target and j source within a chunk.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from mohawkify.ops.triton_tiles import (
    TRITON_DTYPES,
    float32_products,
    grid,
    in_dtype,
    on_device,
    place,
    product_dtype,
    tile_width,
)


@triton.jit
def _cumulative(log_decay_ptr, starts_ptr, row, chunk_begin, length, head, heads, CHUNK: tl.constexpr):
    """Running sums of a chunk's log-decay in float64, and the number of documents begun; padding is neutral."""
    offsets = tl.arange(0, CHUNK)
    inside = chunk_begin + offsets < length
    log_decay = tl.load(log_decay_ptr + (row + chunk_begin + offsets) * heads + head, mask=inside, other=0.0)
    # As `scan.LOWEST_LOG_DECAY`; compared this way round, what is not a number stays so.
    log_decay = tl.where(log_decay < -1000.0, -1000.0, log_decay)
    cumulative = tl.cumsum(log_decay.to(tl.float64), 0)
    total = tl.sum(log_decay.to(tl.float64), 0)
    document = tl.zeros((CHUNK,), tl.int32)
    last_document = 0
    if starts_ptr is not None:
        begins = tl.load(starts_ptr + row + chunk_begin + offsets, mask=inside, other=0).to(tl.int32)
        document = tl.cumsum(begins, 0)
        last_document = tl.sum(begins, 0)
    return cumulative, total, document, last_document


@triton.jit
def _from_carry(cumulative, document, starts_ptr):
    """The share of the state before the chunk that reaches each target."""
    factor = tl.exp(cumulative.to(tl.float32))
    if starts_ptr is not None:
        factor = tl.where(document == 0, factor, 0.0)
    return factor


@triton.jit
def _to_end(cumulative, total, document, last_document, starts_ptr):
    """How much of each source reaches the chunk's end."""
    factor = tl.exp((total - cumulative).to(tl.float32))
    if starts_ptr is not None:
        factor = tl.where(document == last_document, factor, 0.0)
    return factor


@triton.jit
def _across(total, last_document, starts_ptr):
    """How much of the state survives the whole chunk."""
    factor = tl.exp(total.to(tl.float32))
    if starts_ptr is not None:
        factor = tl.where(last_document == 0, factor, 0.0)
    return factor


@triton.jit
def _decay_between(cumulative, document, starts_ptr, REVERSE: tl.constexpr, CHUNK: tl.constexpr):
    """The decay from source j to target i (i, j), in REVERSE (j, i); 0 where j is after i or in another document.

    The sums are split into two float32 each, whose differences are exact to float32 without float64 tiles.
    """
    offsets = tl.arange(0, CHUNK)
    high = cumulative.to(tl.float32)
    low = (cumulative - high.to(tl.float64)).to(tl.float32)
    difference = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
    if REVERSE:
        reached = offsets[:, None] <= offsets[None, :]
        difference = -difference
    else:
        reached = offsets[:, None] >= offsets[None, :]
    if starts_ptr is not None:
        reached = reached & (document[:, None] == document[None, :])
    return tl.exp(tl.where(reached, difference, float("-inf")))


@triton.jit
def _walk(
    value_ptr,
    key_ptr,
    log_decay_ptr,
    starts_ptr,
    first_ptr,
    carried_ptr,
    last_ptr,
    length,
    heads,
    num_chunks,
    p_width,
    n_width,
    REVERSE: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE_P: tl.constexpr,
    TILE_N: tl.constexpr,
):
    """Carry a state over all chunks, docs/math.md (10), or with REVERSE its gradient, (25)."""
    p_tile, pair = place(tl.cdiv(p_width, TILE_P))
    head = pair % heads
    row = (pair // heads) * length
    offsets = tl.arange(0, CHUNK)
    p = p_tile * TILE_P + tl.arange(0, TILE_P)
    n = tl.arange(0, TILE_N)
    state_mask = (p[:, None] < p_width) & (n[None, :] < n_width)
    state_offsets = p[:, None] * n_width + n[None, :]
    state_size = p_width * n_width
    state = tl.zeros((TILE_P, TILE_N), tl.float32)
    if first_ptr is not None:
        state = tl.load(first_ptr + pair * state_size + state_offsets, mask=state_mask, other=0.0).to(tl.float32)
    for step in range(num_chunks):
        chunk = step
        if REVERSE:
            chunk = num_chunks - 1 - step
        carried = carried_ptr + (pair * num_chunks + chunk) * state_size + state_offsets
        tl.store(carried, state.to(carried_ptr.dtype.element_ty), mask=state_mask)
        begin = chunk * CHUNK
        inside = begin + offsets < length
        first = (row + begin) * heads + head
        # Values are read transposed: (p, token).
        value = tl.load(
            value_ptr + first * p_width + (offsets * heads * p_width)[None, :] + p[:, None],
            mask=inside[None, :] & (p[:, None] < p_width),
            other=0.0,
        )
        key = tl.load(
            key_ptr + first * n_width + (offsets * heads * n_width)[:, None] + n[None, :],
            mask=inside[:, None] & (n[None, :] < n_width),
            other=0.0,
        )
        cumulative, total, document, last_document = _cumulative(
            log_decay_ptr, starts_ptr, row, begin, length, head, heads, CHUNK
        )
        if REVERSE:
            weight = _from_carry(cumulative, document, starts_ptr)
        else:
            weight = _to_end(cumulative, total, document, last_document, starts_ptr)
        weighted = (key.to(tl.float32) * weight[:, None]).to(DTYPE)
        state = state * _across(total, last_document, starts_ptr)
        state = tl.dot(value.to(DTYPE), weighted, state, input_precision=PRECISION)
    tl.store(last_ptr + pair * state_size + state_offsets, state, mask=state_mask)


@triton.jit
def _outputs(
    value_ptr,
    key_ptr,
    query_ptr,
    log_decay_ptr,
    starts_ptr,
    carried_ptr,
    output_ptr,
    length,
    heads,
    num_chunks,
    p_width,
    n_width,
    REVERSE: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE_P: tl.constexpr,
    TILE_N: tl.constexpr,
):
    """The outputs of one chunk of one head, docs/math.md (9), or with REVERSE the gradients of its inputs, (26).

    Values, keys and queries are x, B and C, in reverse dy, C and B: what was a source is a target then.
    """
    chunk, pair = place(num_chunks)
    head = pair % heads
    row = (pair // heads) * length
    begin = chunk * CHUNK
    offsets = tl.arange(0, CHUNK)
    n = tl.arange(0, TILE_N)
    inside = begin + offsets < length
    first = (row + begin) * heads + head  # bases are int64, offsets within a tile int32: half the registers
    key_offsets = (offsets * heads * n_width)[:, None] + n[None, :]
    key_mask = inside[:, None] & (n[None, :] < n_width)
    key = tl.load(key_ptr + first * n_width + key_offsets, mask=key_mask, other=0.0).to(DTYPE)
    query = tl.load(query_ptr + first * n_width + key_offsets, mask=key_mask, other=0.0).to(DTYPE)
    cumulative, total, document, last_document = _cumulative(
        log_decay_ptr, starts_ptr, row, begin, length, head, heads, CHUNK
    )
    decay = _decay_between(cumulative, document, starts_ptr, REVERSE, CHUNK)
    matrix = (tl.dot(query, tl.trans(key), input_precision=PRECISION) * decay).to(DTYPE)
    if REVERSE:
        from_carry = _to_end(cumulative, total, document, last_document, starts_ptr)
    else:
        from_carry = _from_carry(cumulative, document, starts_ptr)
    carried = carried_ptr + (pair * num_chunks + chunk) * p_width * n_width
    for p_begin in range(0, p_width, TILE_P):
        p = p_begin + tl.arange(0, TILE_P)
        value_offsets = (offsets * heads * p_width)[:, None] + p[None, :]
        value_mask = inside[:, None] & (p[None, :] < p_width)
        value = tl.load(value_ptr + first * p_width + value_offsets, mask=value_mask, other=0.0).to(DTYPE)
        # The state is read transposed: (n, p).
        state = tl.load(
            carried + p[None, :] * n_width + n[:, None],
            mask=(p[None, :] < p_width) & (n[:, None] < n_width),
            other=0.0,
        ).to(DTYPE)
        output = tl.dot(query, state, input_precision=PRECISION) * from_carry[:, None]
        output = tl.dot(matrix, value, output, input_precision=PRECISION)
        tl.store(output_ptr + first * p_width + value_offsets, output.to(output_ptr.dtype.element_ty), mask=value_mask)


@triton.jit
def _gradients(
    x_ptr,
    b_ptr,
    c_ptr,
    log_decay_ptr,
    starts_ptr,
    dy_ptr,
    carried_ptr,
    carried_gradient_ptr,
    db_ptr,
    dc_ptr,
    dlog_decay_ptr,
    length,
    heads,
    num_chunks,
    p_width,
    n_width,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE_P: tl.constexpr,
    TILE_N: tl.constexpr,
):
    """The gradients of one chunk's B, C and log-decays, docs/math.md (27) to (29)."""
    chunk, pair = place(num_chunks)
    head = pair % heads
    row = (pair // heads) * length
    begin = chunk * CHUNK
    offsets = tl.arange(0, CHUNK)
    n = tl.arange(0, TILE_N)
    inside = begin + offsets < length
    first = (row + begin) * heads + head  # bases are int64, offsets within a tile int32: half the registers
    key_begin = first * n_width
    key_offsets = (offsets * heads * n_width)[:, None] + n[None, :]
    key_mask = inside[:, None] & (n[None, :] < n_width)
    b = tl.load(b_ptr + key_begin + key_offsets, mask=key_mask, other=0.0).to(DTYPE)
    c = tl.load(c_ptr + key_begin + key_offsets, mask=key_mask, other=0.0).to(DTYPE)
    cumulative, total, document, last_document = _cumulative(
        log_decay_ptr, starts_ptr, row, begin, length, head, heads, CHUNK
    )
    outer = tl.zeros((CHUNK, CHUNK), tl.float32)  # dy_i . x_j
    db = tl.zeros((CHUNK, TILE_N), tl.float32)
    dc = tl.zeros((CHUNK, TILE_N), tl.float32)
    surviving = tl.zeros((TILE_P,), tl.float32)
    state_begin = (pair * num_chunks + chunk) * p_width * n_width
    for p_begin in range(0, p_width, TILE_P):
        p = p_begin + tl.arange(0, TILE_P)
        x_offsets = (offsets * heads * p_width)[:, None] + p[None, :]
        x_mask = inside[:, None] & (p[None, :] < p_width)
        x = tl.load(x_ptr + first * p_width + x_offsets, mask=x_mask, other=0.0).to(DTYPE)
        dy = tl.load(dy_ptr + first * p_width + x_offsets, mask=x_mask, other=0.0).to(DTYPE)
        state_offsets = p[:, None] * n_width + n[None, :]
        state_mask = (p[:, None] < p_width) & (n[None, :] < n_width)
        state = tl.load(carried_ptr + state_begin + state_offsets, mask=state_mask, other=0.0).to(DTYPE)
        dstate = tl.load(carried_gradient_ptr + state_begin + state_offsets, mask=state_mask, other=0.0).to(DTYPE)
        outer = tl.dot(dy, tl.trans(x), outer, input_precision=PRECISION)
        dc = tl.dot(dy, state, dc, input_precision=PRECISION)
        db = tl.dot(x, dstate, db, input_precision=PRECISION)
        surviving += tl.sum(state.to(tl.float32) * dstate.to(tl.float32), 1)

    dc = dc * _from_carry(cumulative, document, starts_ptr)[:, None]
    db = db * _to_end(cumulative, total, document, last_document, starts_ptr)[:, None]
    entering = tl.sum(c.to(tl.float32) * dc, 1)
    leaving = tl.sum(b.to(tl.float32) * db, 1)
    outer *= _decay_between(cumulative, document, starts_ptr, False, CHUNK)
    matrix = tl.dot(c, tl.trans(b), input_precision=PRECISION)
    # The diagonal does not decay; left out rather than cancelled.
    weighted = tl.where(offsets[:, None] > offsets[None, :], outer * matrix, 0.0)
    dcumulative = tl.sum(weighted, 1) - tl.sum(weighted, 0) + entering - leaving
    at_end = tl.sum(leaving, 0) + tl.sum(surviving, 0) * _across(total, last_document, starts_ptr)
    dlog_decay = tl.cumsum(dcumulative, 0, reverse=True) + at_end
    tl.store(
        dlog_decay_ptr + (row + begin + offsets) * heads + head,
        dlog_decay.to(dlog_decay_ptr.dtype.element_ty),
        mask=inside,
    )
    decayed = outer.to(DTYPE)
    dc = tl.dot(decayed, b, dc, input_precision=PRECISION)
    db = tl.dot(tl.trans(decayed), c, db, input_precision=PRECISION)
    tl.store(dc_ptr + key_begin + key_offsets, dc.to(dc_ptr.dtype.element_ty), mask=key_mask)
    tl.store(db_ptr + key_begin + key_offsets, db.to(db_ptr.dtype.element_ty), mask=key_mask)


class _Shape(NamedTuple):
    """The sizes of a call, and how its kernels are compiled."""

    batch: int
    length: int
    heads: int
    p_width: int
    n_width: int
    dtype: torch.dtype

    @property
    def is_narrow(self) -> bool:
        """Whether tiles are kept small, so that they fit into registers."""
        return self.dtype == torch.float32 or self.n_width > 128

    @property
    def chunk(self) -> int:
        return 32 if self.is_narrow else 64

    @property
    def num_chunks(self) -> int:
        return triton.cdiv(self.length, self.chunk)

    def sizes(self) -> tuple[int, ...]:
        """The sizes that every kernel takes."""
        return self.length, self.heads, self.num_chunks, self.p_width, self.n_width

    def constants(self) -> dict[str, Any]:
        """The tiles and the arithmetic."""
        return {
            "DTYPE": TRITON_DTYPES[self.dtype],
            "PRECISION": float32_products(),
            "CHUNK": self.chunk,
            "TILE_P": min(tile_width(self.p_width), 32 if self.is_narrow else 64),
            "TILE_N": tile_width(self.n_width),
        }

    def staged(self) -> dict[str, Any]:
        """The constants of a kernel that walks over tiles of p; it reads ahead only if there are several."""
        constants = self.constants()
        return constants | {"num_stages": 1 if self.p_width <= constants["TILE_P"] else 2}


def scan_triton(
    x_blhp: Tensor,
    b_blhn: Tensor,
    c_blhn: Tensor,
    log_decay_blh: Tensor,
    state_bhpn: Tensor | None = None,
    document_starts_bl: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same map as `scan.scan_chunked`, on a GPU: arguments and results as in `scan.scan_recurrent`.

    x, B and C are float32, bfloat16 or float16, the log-decay is float32, and the state width n at most 256.

    Source: Mamba-2 (arXiv 2405.21060), section 6; docs/math.md (9), (10) and (25) to (29).
    """
    dtype = product_dtype(x_blhp, b_blhn, c_blhn)
    return _Scan.apply(x_blhp, b_blhn, c_blhn, log_decay_blh, state_bhpn, document_starts_bl, dtype)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_blhp: Tensor,
        b_blhn: Tensor,
        c_blhn: Tensor,
        log_decay_blh: Tensor,
        state_bhpn: Tensor | None,
        document_starts_bl: Tensor | None,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        inputs = [*(in_dtype(t, dtype) for t in (x_blhp, b_blhn, c_blhn)), log_decay_blh.contiguous()]
        starts = None if document_starts_bl is None else document_starts_bl.contiguous().view(torch.uint8)
        first = None if state_bhpn is None else state_bhpn.contiguous()
        batch, length, heads, p_width = x_blhp.shape
        shape = _Shape(batch, length, heads, p_width, b_blhn.shape[-1], dtype)
        carried, last = _carry(inputs[0], inputs[1], inputs[3], starts, first, shape, reverse=False)
        y_blhp = torch.empty_like(inputs[0], dtype=x_blhp.dtype)
        with on_device(y_blhp):
            _outputs[grid(shape.num_chunks, shape.batch * shape.heads)](
                *inputs,
                starts,
                carried,
                y_blhp,
                *shape.sizes(),
                REVERSE=False,
                **shape.staged(),
            )
        ctx.save_for_backward(*inputs, starts, first)
        ctx.shape = shape
        ctx.dtypes = [t.dtype for t in (x_blhp, b_blhn, c_blhn, log_decay_blh)]
        ctx.set_materialize_grads(False)
        return y_blhp, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        x, b, c, log_decay, starts, first = ctx.saved_tensors
        shape: _Shape = ctx.shape
        dy = torch.zeros_like(x) if gradients[0] is None else in_dtype(gradients[0], shape.dtype)
        dlast = None if gradients[1] is None else gradients[1].contiguous()
        carried, _ = _carry(x, b, log_decay, starts, first, shape, reverse=False)
        carried_gradient, dfirst = _carry(dy, c, log_decay, starts, dlast, shape, reverse=True)
        dx, db, dc, dlog_decay = (
            torch.empty_like(t, dtype=dtype) for t, dtype in zip((x, b, c, log_decay), ctx.dtypes, strict=True)
        )
        every_chunk = grid(shape.num_chunks, shape.batch * shape.heads)
        with on_device(x):
            _outputs[every_chunk](
                *(dy, c, b, log_decay, starts, carried_gradient, dx),
                *shape.sizes(),
                REVERSE=True,
                **shape.staged(),
            )
            _gradients[every_chunk](
                *(x, b, c, log_decay, starts, dy, carried, carried_gradient, db, dc, dlog_decay),
                *shape.sizes(),
                **shape.staged(),
                num_warps=4 if shape.is_narrow else 8,
            )
        return dx, db, dc, dlog_decay, None if first is None else dfirst.to(first.dtype), None, None


def _carry(
    value_blhp: Tensor,
    key_blhn: Tensor,
    log_decay_blh: Tensor,
    document_starts_bl: Tensor | None,
    first_bhpn: Tensor | None,
    shape: _Shape,
    *,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """The states before the chunks (b, h, m, p, n) in the products' dtype, and the one after the last, in float32."""
    batch, heads, p_width, n_width = shape.batch, shape.heads, shape.p_width, shape.n_width
    carried = value_blhp.new_empty(batch, heads, shape.num_chunks, p_width, n_width, dtype=shape.dtype)
    last = value_blhp.new_empty(batch, heads, p_width, n_width, dtype=torch.float32)
    constants = shape.constants()
    with on_device(value_blhp):
        _walk[grid(triton.cdiv(p_width, constants["TILE_P"]), batch * heads)](
            *(value_blhp, key_blhn, log_decay_blh, document_starts_bl, first_bhpn, carried, last),
            *shape.sizes(),
            REVERSE=reverse,
            **constants,
        )
    return carried, last
