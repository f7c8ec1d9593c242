"""Hybrids: what a recipe keeps of attention, its cache, and its window."""

from __future__ import annotations

import pytest
import torch

from mohawkify.errors import RecipeError
from mohawkify.families.decoder_layers import find_layers
from mohawkify.mixers.attention_heads import key_heads, windowed
from mohawkify.ops.mixing_matrices import AttentionMatrix
from mohawkify.student.cache import kept_of
from mohawkify.student.layer_spec import LayerSpec
from tests.close import assert_close
from tests.tiny import packed, stir, tiny_pair

HEADS = {"heads": ((0, 1), (1, 3), (1, 0))}
HYBRIDS = {
    "heads": HEADS,
    "heads-window": {**HEADS, "window": 6},
    "layer-window": {"layers": (1,), "window": 6},
    "heads-and-layer": {"layers": (1,), "heads": ((0, 0), (0, 1), (0, 2))},
}


@pytest.fixture(params=HYBRIDS)
def keep(request):
    return HYBRIDS[request.param]


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_token_by_token_and_by_pieces_equals_the_full_pass(family, keep, tmp_path):
    if family == "gpt2" and "heads" in keep:
        pytest.skip("GPT-2 keeps layers only")
    student = stir(tiny_pair(family, tmp_path, student={"keep": keep}, num_hidden_layers=2).student)
    ids = packed(length=37).input_ids
    full = student(ids, use_cache=False).logits
    for cuts in ([*range(20, 38)], [3, 15, 37]):
        pieces, cache, begin = [], None, 0
        for end in cuts:
            out = student(ids[:, begin:end], past_key_values=cache, use_cache=True)
            cache, begin = out.past_key_values, end
            pieces.append(out.logits)
        assert_close(f"cut at {cuts}", torch.cat(pieces, 1), full, tolerance=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_padding_and_packing_change_nothing(family, keep, tmp_path):
    student = stir(tiny_pair(family, tmp_path, student={"keep": keep}, num_hidden_layers=2).student)
    ids = packed(length=30).input_ids
    mask = torch.ones_like(ids)
    mask[1, :11] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    padded = student(ids, attention_mask=mask, position_ids=positions, use_cache=True)
    single = student(ids[1:, 11:], use_cache=True)
    assert_close("padded", padded.logits[1:, 11:], single.logits, tolerance=1e-4)
    mask = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], 1)
    after = student(
        ids[:, :1], attention_mask=mask, position_ids=mask.sum(-1, keepdim=True) - 1,
        past_key_values=padded.past_key_values,
    )  # fmt: skip
    alone = student(ids[1:, :1], past_key_values=single.past_key_values)
    assert_close("after padding", after.logits[1:], alone.logits, tolerance=1e-4)
    batch = packed(length=24, borders=(0, 9, 10))
    logits = student(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
    for begin, end in ((0, 9), (9, 10), (10, 24)):
        document = student(batch.input_ids[:, begin:end], use_cache=False).logits
        assert_close(f"document {begin}", logits[:, begin:end], document, tolerance=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"prefill_chunk_size": 4}], ids=str)
def test_generate(keep, options, tmp_path):
    student = stir(tiny_pair("llama", tmp_path, student={"keep": keep}).student)
    ids = packed(length=13).input_ids
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "min_new_tokens": 8, "pad_token_id": 0}
    found = student.generate(ids, do_sample=False, **settings, **options)
    expected = student.generate(
        ids, do_sample=False, **settings, **{**options, "use_cache": False, "prefill_chunk_size": None}
    )
    assert torch.equal(found, expected)


@torch.no_grad()
def test_the_cache_holds_what_the_plan_says(keep, tmp_path):
    pair = tiny_pair("llama", tmp_path, student={"keep": keep})
    for length in (4, 40):
        cache = pair.student(packed(length=length).input_ids, use_cache=True).past_key_values
        kept = [layer for layer in map(kept_of, cache.layers) if layer is not None]
        elements = sum(layer.keys.numel() + layer.values.numel() for layer in kept)
        # A window's current token is in the cache for the length of its step only.
        expected = pair.spec.cache_elements(length)
        if "window" in keep and length > keep["window"]:
            expected = expected * (keep["window"] - 1) // keep["window"]
        assert elements == 2 * expected
        cache.reset()


def test_the_window_is_a_band_of_the_mask():
    mask = windowed(None, 5, 2, 3, torch.device("cpu"))
    keys = [[int(key) for key in row.nonzero()] for row in mask[0, 0]]
    assert keys == [[0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 5], [4, 5, 6]]
    assert windowed(None, 1, 2, 3, torch.device("cpu")) is None
    added = windowed(torch.zeros(1, 1, 5, 9), 5, 2, 3, torch.device("cpu"))
    assert torch.equal(added[0, 0] == 0, torch.ones(5, 7, dtype=torch.bool).triu())


def test_key_heads_are_shared_where_they_can_be():
    assert key_heads((0, 1, 2, 3), 2) == (0, 1)
    assert key_heads((0, 2, 3), 2) == (0, 1, 1)
    assert key_heads((5,), 3) == (1,)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"layers": (3,)}, "student.keep.layers: found layer 3, expected layers 0 to 2"),
        ({"heads": ((3, 0),)}, "student.keep.heads: found layer 3, expected layers 0 to 2"),
        ({"heads": ((0, 4),)}, "student.keep.heads: found head 4, expected heads 0 to 3"),
        ({"heads": ((0, 2),), "layers": (0,)}, "found a head of layer 0, which student.keep.layers keeps"),
        ({"layers": (0, 1, 2)}, "student.keep: found every layer, expected at least one with a mixer"),
    ],
)
def test_what_cannot_be_kept_is_refused(keep, message, tmp_path):
    with pytest.raises(RecipeError, match=message):
        tiny_pair("llama", tmp_path, student={"keep": keep})


def test_all_heads_of_a_layer_are_the_layer(tmp_path):
    pair = tiny_pair("llama", tmp_path, student={"keep": {"heads": tuple((1, head) for head in range(4))}})
    assert pair.spec.layer_specs[1] == LayerSpec("attention", 0, 4)
    assert find_layers(pair.student, "model.layers")[1].self_attn.q_proj.out_features == 32


def test_the_matrices_of_some_heads_are_those_of_all():
    length, chosen = 7, (0, 3, 5)
    q, k, bias = torch.randn(2, 6, length, 4), torch.randn(2, 3, length, 4), torch.randn(1, 6, 1, length)
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    whole = AttentionMatrix(q, k, 0.5, mask, 3.0, bias, value_norms_bgs=torch.rand(2, 3, length))
    some = whole.of_heads(chosen)
    assert_close("matrices", some.probabilities(), whole.probabilities()[:, chosen])
    assert torch.equal(some.column_weights(), whole.column_weights()[:, chosen])
