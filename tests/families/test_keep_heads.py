"""Kept heads of every family: what they compute beside a mixer is what they computed in the teacher."""

from __future__ import annotations

import copy

import pytest
import torch

from mohawkify.errors import RecipeError
from mohawkify.families.decoder_layers import find_layers
from mohawkify.families.projections import read_attention
from mohawkify.families.registry import adapter_names
from mohawkify.mixers.attention_heads import output_projection
from mohawkify.mixers.kinds import mixers_of
from mohawkify.objectives.objective import model_inputs
from mohawkify.teacher.capture import LayerCall, layer_hooks
from tests.close import assert_close
from tests.families.layouts import each_family
from tests.tiny import packed, tiny_pair

FUSED = ("falcon", "gpt2", "gpt_bigcode", "gpt_neox", "mpt", "phi3")
NORMED = ("olmo2", "olmo3", "olmoe", "stablelm")


@torch.no_grad()
@pytest.mark.parametrize("heads", [(1,), (0, 1, 3)], ids=str)
@pytest.mark.parametrize("family", each_family(sorted({*adapter_names()} - {*FUSED, *NORMED})))
def test_kept_heads_compute_what_they_did_in_the_teacher(family, heads, tmp_path):
    keep = {"heads": tuple((0, head) for head in heads)}
    pair = tiny_pair(family, tmp_path, student={"keep": keep}, num_hidden_layers=2)
    attention = getattr(find_layers(pair.teacher, pair.adapter.layers)[0], pair.adapter.attention)
    for mixer in mixers_of(pair.student).values():
        mixer.out_proj.weight.zero_()
        if mixer.out_proj.bias is not None:
            mixer.out_proj.bias.zero_()
    calls: list[LayerCall] = []
    with layer_hooks({0: attention}, calls.append):
        pair.teacher.base_model(**model_inputs(pair.teacher, packed(), pair.spec))
    (call,) = calls
    alone, width = copy.deepcopy(attention), read_attention(pair.adapter, attention).q_hpd.shape[1]
    out = output_projection(alone)
    is_kept = torch.zeros(out.in_features // width)
    is_kept[list(heads)] = 1
    out.weight.mul_(is_kept.repeat_interleave(width))
    out.bias = None
    expected = alone(call.hidden_bld, *call.further, **call.arguments)[0]
    both = getattr(find_layers(pair.student, pair.adapter.layers)[0], pair.adapter.attention)
    assert_close("output", both(call.hidden_bld, *call.further, **call.arguments)[0], expected, tolerance=1e-5)


@pytest.mark.parametrize("family", each_family([*FUSED, *NORMED]))
def test_families_whose_heads_cannot_be_cut_are_refused(family, tmp_path):
    with pytest.raises(RecipeError, match=r"student.keep.heads: found a \w+, which has .*cannot be kept one by one"):
        tiny_pair(family, tmp_path, student={"keep": {"heads": ((0, 1),)}}, num_hidden_layers=2)
