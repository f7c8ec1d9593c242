"""Decoding: one token at a time gives what the whole sequence gives, and the memory stays where it is."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mohawkify.mixers.mamba2 import DiscreteMamba2, DiscreteMamba2Config
from mohawkify.ops.conv import causal_conv
from mohawkify.ops.decode import decode_step
from mohawkify.ops.scan import scan_recurrent
from mohawkify.student.cache import RecurrentLayer
from tests.close import assert_close
from tests.tiny import packed, tiny_pair

BATCH, HEADS, HEAD_WIDTH, STATE_WIDTH = 2, 3, 5, 7


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Random numbers from a seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("num_taps", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_steps_equal_convolution_and_recurrence(num_taps, dtype):
    length, wide, narrow = 6, HEADS * HEAD_WIDTH, HEADS * STATE_WIDTH
    num_features = wide + 2 * narrow
    u_blf = normal(BATCH, length, num_features, seed=1, dtype=dtype)
    z_blf, a_log_blh = normal(BATCH, length, wide, seed=2, dtype=dtype), normal(BATCH, length, HEADS, seed=3)
    weight_fk, bias_f = normal(num_features, num_taps, seed=4), normal(num_features, seed=5)
    z_bias_f, d_h = normal(wide, seed=6), normal(HEADS, seed=7)
    tail_bkf = normal(BATCH, num_taps - 1, num_features, seed=8, dtype=dtype)
    precise = torch.promote_types(dtype, torch.float32)
    state = normal(BATCH, HEADS, HEAD_WIDTH, STATE_WIDTH, seed=9, dtype=precise)

    exact, tail = causal_conv(u_blf.double(), weight_fk, bias_f, tail_bkf.double())
    x, b, c = (t.unflatten(-1, (HEADS, -1)) for t in exact.split([wide, narrow, narrow], dim=-1))
    y, final = scan_recurrent(x, b, c, -F.softplus(a_log_blh), state.double())
    expected = (y + d_h[:, None] * x).flatten(2) * F.silu(z_blf.double() + z_bias_f)

    places = tail_bkf.data_ptr(), state.data_ptr()
    own = [t.to(precise) for t in (weight_fk, bias_f, z_bias_f, d_h, a_log_blh)]
    outputs = [
        decode_step(
            *u_blf[:, t].split([wide, narrow, narrow], dim=-1), z_blf[:, t], own[4][:, t], (own[0], own[1]),
            own[2], own[3], tail_bkf, state,
        )
        for t in range(length)
    ]  # fmt: skip
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    assert_close("output", torch.stack(outputs, 1), expected, tolerance)
    assert_close("state", state, final, tolerance)
    assert torch.equal(tail_bkf.double(), tail)
    assert places == (tail_bkf.data_ptr(), state.data_ptr())


def mixer(num_taps: int = 4) -> DiscreteMamba2:
    """A mixer in float64 with nothing at its start value."""
    ours = DiscreteMamba2(16, DiscreteMamba2Config(HEADS, HEAD_WIDTH, True, False, STATE_WIDTH, num_taps), 0).double()
    with torch.no_grad():
        for index, parameter in enumerate(ours.parameters()):
            parameter.copy_(0.4 * normal(*parameter.shape, seed=index))
    return ours


def fresh() -> Any:
    """A cache of one recurrent layer."""
    return SimpleNamespace(layers=[RecurrentLayer()])


@torch.no_grad()
@pytest.mark.parametrize("prefill", [0, 1, 2, 3, 37])
@pytest.mark.parametrize("num_taps", [1, 4])
def test_prefill_and_steps_equal_the_whole(prefill, num_taps):
    ours, hidden = mixer(num_taps), normal(BATCH, 45, 16)
    whole, _ = ours(hidden)
    cache = fresh()
    pieces = [ours(hidden[:, :prefill], past_key_values=cache)[0]] if prefill else []
    pieces += [ours(hidden[:, t : t + 1], past_key_values=cache)[0] for t in range(prefill, 45)]
    assert_close("output", torch.cat(pieces, 1), whole)
    assert cache.layers[0].num_tokens == 45


@torch.no_grad()
def test_padding_and_documents_are_handed_over():
    ours, hidden = mixer(), normal(BATCH, 12, 16)
    keep = torch.ones(BATCH, 12)
    keep[1, :7] = 0
    positions = torch.arange(12).expand(BATCH, -1).clone()
    positions[0, 10:] = torch.arange(2)
    cache = fresh()
    ours(hidden, past_key_values=cache, padding_mask=keep, position_ids=positions)
    after, _ = ours(normal(BATCH, 1, 16, seed=1), past_key_values=cache)
    for row, begin in ((0, 10), (1, 7)):
        alone = fresh()
        ours(hidden[row : row + 1, begin:], past_key_values=alone)
        expected, _ = ours(normal(BATCH, 1, 16, seed=1)[row : row + 1], past_key_values=alone)
        assert_close(f"row {row}", after[row : row + 1], expected)
        assert_close(
            f"state of row {row}",
            cache.layers[0].states["recurrent_states"][row],
            alone.layers[0].states["recurrent_states"][0],
        )


@torch.no_grad()
def test_padding_leaves_the_memory_alone_step_by_step():
    ours, hidden = mixer(), normal(BATCH, 12, 16)
    keep = torch.ones(BATCH, 12, dtype=torch.long)
    keep[1, :5] = 0
    keep[0, 7:9] = 0
    whole, stepwise = fresh(), fresh()
    expected, _ = ours(hidden, past_key_values=whole, padding_mask=keep)
    for t in range(12):
        found, _ = ours(hidden[:, t : t + 1], past_key_values=stepwise, padding_mask=keep[:, : t + 1])
        real = keep[:, t] != 0
        assert_close(f"output {t}", found[real, 0], expected[real, t])
    assert_close("state", stepwise.layers[0].states["recurrent_states"], whole.layers[0].states["recurrent_states"])
    assert_close("tail", stepwise.layers[0].states["conv_states"], whole.layers[0].states["conv_states"])


@torch.no_grad()
def test_memory_stays_in_place():
    ours, cache = mixer(), fresh()
    layer = cache.layers[0]
    places = set()
    for length in (9, 1, 1, 4, 1):
        ours(normal(BATCH, length, 16), past_key_values=cache)
        places.add((layer.states["conv_states"].data_ptr(), layer.states["recurrent_states"].data_ptr()))
    layer.reset()
    first, _ = ours(normal(BATCH, 1, 16), past_key_values=cache)
    places.add((layer.states["conv_states"].data_ptr(), layer.states["recurrent_states"].data_ptr()))
    assert len(places) == 1
    assert_close("after reset", first, ours(normal(BATCH, 1, 16))[0])
    layer.reset()
    ours(normal(5, 1, 16), past_key_values=cache)
    assert layer.states["recurrent_states"].shape[0] == layer.states["conv_states"].shape[0] == 5


@torch.no_grad()
def test_rows_are_selected_and_a_copy_is_its_own():
    ours, cache = mixer(), fresh()
    hidden, token = normal(BATCH, 9, 16), normal(1, 1, 16, seed=1)
    ours(hidden, past_key_values=cache)
    kept = copy.deepcopy(cache)
    ours(token.expand(BATCH, -1, -1), past_key_values=cache)
    kept.layers[0].reorder_cache(torch.tensor([1, 1]))
    kept.layers[0].batch_repeat_interleave(2)
    found, _ = ours(token.expand(4, -1, -1), past_key_values=kept)
    expected, _ = ours(torch.cat([hidden[1:], token], 1))
    assert_close("chosen row", found, expected[:, -1:].expand(4, -1, -1))
    with pytest.raises(ValueError, match="cannot be cropped"):
        kept.layers[0].crop(1)


def test_a_cache_of_inference_mode_goes_on_outside():
    ours, cache, hidden = mixer(), fresh(), normal(BATCH, 9, 16)
    with torch.inference_mode():
        ours(hidden[:, :7], past_key_values=cache)
        first, _ = ours(hidden[:, 7:8], past_key_values=cache)
    with torch.no_grad():
        second, _ = ours(hidden[:, 8:], past_key_values=cache)
        assert_close("output", torch.cat([first, second], 1), ours(hidden)[0][:, 7:])


def test_steps_can_be_differentiated():
    ours, cache, hidden = mixer(), fresh(), normal(BATCH, 6, 16)
    pieces = [ours(hidden[:, t : t + 1], past_key_values=cache)[0] for t in range(6)]
    found = torch.autograd.grad(torch.cat(pieces, 1).sin().sum(), list(ours.parameters()))
    expected = torch.autograd.grad(ours(hidden)[0].sin().sum(), list(ours.parameters()))
    for (name, _), one, other in zip(ours.named_parameters(), found, expected, strict=True):
        assert_close(name, one, other)


class Largest(TorchDispatchMode):
    """The most numbers of any tensor that is made, not written in place or viewed."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in known:
            self.numbers = max(self.numbers, result.numel())
        return result


@torch.no_grad()
def test_a_step_allocates_nothing_of_the_states_size():
    ours = DiscreteMamba2(16, DiscreteMamba2Config(4, 32, True, False, 32), 0)
    cache = fresh()
    ours(torch.randn(64, 3, 16), past_key_values=cache)
    with Largest() as largest:
        ours(torch.randn(64, 1, 16), past_key_values=cache)
    features = cache.layers[0].states["conv_states"].shape[0] * cache.layers[0].states["conv_states"].shape[-1]
    assert 0 < largest.numbers <= features
    assert features < cache.layers[0].states["recurrent_states"].numel() / 10


@torch.no_grad()
def test_a_step_is_one_graph(tmp_path):
    student = tiny_pair("llama", tmp_path).student.eval()
    ids = packed(length=20).input_ids
    expected = student(ids, use_cache=False).logits[:, 12:]
    cache = student(ids[:, :12], use_cache=True).past_key_values
    step = torch.compile(student, fullgraph=True, backend="eager")
    found = [
        step(ids[:, t : t + 1], position_ids=torch.full((2, 1), t), past_key_values=cache, use_cache=True).logits
        for t in range(12, 20)
    ]
    assert_close("logits", torch.cat(found, 1), expected)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.enable_grad])
def test_a_cache_of_any_mode_can_be_reset_outside(mode):
    ours, cache, hidden = mixer(), fresh(), normal(BATCH, 9, 16)
    with mode():
        ours(hidden[:, :7], past_key_values=cache)
    cache.layers[0].reset()
    with torch.no_grad():
        found, _ = ours(hidden, past_key_values=cache)
        assert_close("output", found, ours(hidden)[0])
    assert not cache.layers[0].states["recurrent_states"].requires_grad
