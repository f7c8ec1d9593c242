"""The student: grafting keeps everything else the teacher's, and every path through a mixer gives the same result."""

from __future__ import annotations

import inspect
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import DynamicCache, Gemma2PreTrainedModel, StaticCache
from transformers.utils import find_labels

from mohawkify.errors import RecipeError
from mohawkify.families.adapter import AttentionWeights
from mohawkify.families.decoder_layers import find_layers
from mohawkify.families.projections import read_projections
from mohawkify.files.atomic import atomic_directory
from mohawkify.mixers.mamba2 import DiscreteMamba2, DiscreteMamba2Config
from mohawkify.mixers.start_attention import spread_decay_bias, start_from_attention
from mohawkify.student.build import build_student, float_on
from mohawkify.student.save import load_student, save_student
from mohawkify.teacher.load import load_teacher
from mohawkify.teacher.resolve import resolve_teacher
from tests.bytes_tokenizer import bytes_tokenizer
from tests.close import assert_close
from tests.tiny import FAMILIES, packed, stir, tiny_pair, tiny_teacher


@pytest.fixture(params=FAMILIES)
def pair(request, tmp_path):
    pair = tiny_pair(request.param, tmp_path, student={"keep": {"layers": (1,)}})
    pair.student.eval()
    return pair


def test_everything_but_the_grafted_attention_is_the_teachers(pair):
    teacher, student = pair.teacher.state_dict(), pair.student.state_dict()
    unused = {name for name in teacher if name not in student}
    assert unused == {name for name in teacher if ".layers.0.self_attn." in name or ".layers.2.self_attn." in name}
    for name in teacher.keys() & student.keys():
        assert torch.equal(teacher[name], student[name]), name
    new = {name for name in student if name not in teacher}
    assert all(".layers.0.self_attn." in name or ".layers.2.self_attn." in name for name in new)


@torch.no_grad()
def test_with_the_attention_put_back_the_logits_are_the_teachers(pair):
    batch = packed()
    for index in pair.spec.mixer_layers:
        find_layers(pair.student, "model.layers")[index].self_attn = find_layers(pair.teacher, "model.layers")[
            index
        ].self_attn
    inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}
    assert torch.equal(pair.student(**inputs).logits, pair.teacher(**inputs).logits)


@torch.no_grad()
def test_token_by_token_equals_the_full_pass(pair):
    ids = packed(length=37).input_ids
    full = pair.student(ids, use_cache=False).logits
    out = pair.student(ids[:, :20], use_cache=True)
    pieces = [out.logits]
    for t in range(20, 37):
        pieces.append(pair.student(ids[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True).logits)
    assert_close("logits", torch.cat(pieces, 1), full)


@torch.no_grad()
def test_left_padding_changes_nothing(pair):
    ids = packed(length=30).input_ids
    mask = torch.ones_like(ids)
    mask[1, :11] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    padded = pair.student(ids, attention_mask=mask, position_ids=positions, use_cache=True)
    single = pair.student(ids[1:, 11:], use_cache=True)
    assert_close("logits", padded.logits[1:, 11:], single.logits)
    next_id = torch.tensor([[5], [5]])
    mask = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], 1)
    after = pair.student(
        next_id, attention_mask=mask, position_ids=mask.sum(-1, keepdim=True) - 1,
        past_key_values=padded.past_key_values, use_cache=True,
    )  # fmt: skip
    after_single = pair.student(next_id[1:], past_key_values=single.past_key_values, use_cache=True)
    assert_close("next logits", after.logits[1:], after_single.logits)


PADDINGS = {"left": [0] * 11 + [1] * 19, "right": [1] * 19 + [0] * 11, "between": [1] * 9 + [0] * 11 + [1] * 10}


@torch.no_grad()
@pytest.mark.parametrize("clamp", [0, 1], ids=["positions-from-0", "positions-from-1"])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("keep", [{}, {"layers": (1,)}], ids=["mixers", "hybrid"])
@pytest.mark.parametrize("family", ["llama", "stablelm"])  # padding by keyword, and from the mask of attention
def test_a_padded_prompt_leaves_the_memory_of_the_prompt_alone(family, keep, padding, clamp, tmp_path):
    student = stir(tiny_pair(family, tmp_path, student={"keep": keep}).student)
    real = torch.tensor(PADDINGS[padding], dtype=torch.bool)
    ids, more = packed(length=30).input_ids, packed(length=7).input_ids
    mask = torch.stack([torch.ones(30, dtype=torch.long), real.long()])
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    positions = positions.masked_fill(mask == 0, clamp)
    padded = student(ids, attention_mask=mask, position_ids=positions, use_cache=True)
    rows = [student(ids[:1], use_cache=True), student(ids[1:, real], use_cache=True)]
    assert_close("logits", padded.logits[1, real], rows[1].logits[0], tolerance=1e-5)
    for begin, end in ((0, 1), (1, 2), (2, 7)):  # token by token, and several at once
        mask = torch.cat([mask, torch.ones(2, end - begin, dtype=mask.dtype)], 1)
        after = student(
            more[:, begin:end], attention_mask=mask, position_ids=(mask.cumsum(-1) - 1)[:, begin - end :],
            past_key_values=padded.past_key_values, use_cache=True,
        ).logits  # fmt: skip
        for index, row in enumerate(rows):
            alone = student(more[index : index + 1, begin:end], past_key_values=row.past_key_values, use_cache=True)
            assert_close(f"row {index}, tokens from {begin}", after[index], alone.logits[0], tolerance=1e-5)


@torch.no_grad()
def test_packed_documents_equal_separate_ones(pair):
    batch = packed(length=24, borders=(0, 9, 10))
    logits = pair.student(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
    for begin, end in ((0, 9), (9, 10), (10, 24)):
        alone = pair.student(input_ids=batch.input_ids[:, begin:end], use_cache=False).logits
        assert_close(f"document {begin}", logits[:, begin:end], alone)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prefill_chunk_size": 4}, {"use_cache": False}], ids=str)
def test_generate(pair, options):
    ids = packed(length=13).input_ids
    mask = torch.ones_like(ids)
    settings = {"attention_mask": mask, "max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    found = pair.student.generate(ids, **settings, **options)
    expected = pair.student.generate(ids, **{**settings, **options, "use_cache": False, "prefill_chunk_size": None})
    assert torch.equal(found, expected)


def test_generate_makes_the_logits_of_the_last_token_only(pair):
    shapes = []
    pair.student.lm_head.register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape)))
    pair.student.generate(packed(length=13, batch=1).input_ids, max_new_tokens=2, min_new_tokens=2, pad_token_id=0)
    assert shapes == [(1, 1, 97)] * 2


def test_labels_give_the_loss_of_the_teachers_family(pair):
    assert find_labels(type(pair.student)) == ["labels"]
    assert inspect.signature(type(pair.student).forward) == inspect.signature(type(pair.teacher).forward)
    ids = packed(length=13).input_ids
    labels = ids.masked_fill(ids % 3 == 0, -100)
    for model in (pair.student, pair.teacher):
        out = model(ids, labels=labels)
        expected = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        assert_close("loss", out.loss, expected)
        out = model(ids, labels=labels, num_items_in_batch=torch.tensor(7))
        assert_close("loss of a part of the step", out.loss, expected * (labels[:, 1:] != -100).sum() / 7)


@torch.no_grad()
def test_arguments_by_place_are_those_of_the_teacher(pair):
    ids = packed(length=13).input_ids
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    assert torch.equal(pair.student(ids, mask).logits, pair.student(ids, attention_mask=mask).logits)


@torch.no_grad()
@pytest.mark.parametrize("knows_config", [False, True])
def test_an_empty_foreign_cache_becomes_the_students(pair, knows_config):
    ids = packed(length=13).input_ids
    cache = DynamicCache(config=pair.student.config if knows_config else None)
    pair.student(ids[:, :12], past_key_values=cache)
    found = pair.student(ids[:, 12:], past_key_values=cache).logits
    assert_close("logits", found, pair.student(ids, use_cache=False).logits[:, 12:])
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    written = pair.student.generate(ids, past_key_values=DynamicCache(), **options)
    assert torch.equal(written, pair.student.generate(ids, **options))


@torch.no_grad()
def test_other_caches_are_refused(pair):
    ids = packed(length=13).input_ids
    filled = pair.teacher(ids, use_cache=True).past_key_values
    static = StaticCache(config=pair.student.config, max_cache_len=20)
    for cache, name in ((filled, "DynamicCache"), (static, "StaticCache"), (((None, None),), "tuple")):
        with pytest.raises(ValueError, match=f"found past_key_values of type {name}"):
            pair.student(ids, past_key_values=cache)


def test_a_student_writes_with_its_cache_whatever_its_teacher_does(tmp_path):
    pair = tiny_pair("llama", tmp_path, use_cache=False)
    lengths = []
    pair.student.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    pair.teacher.generation_config.use_cache = False
    student = build_student(pair.teacher, pair.adapter, pair.spec, "attention", seed=0)
    assert student.generation_config.use_cache
    pair.student.generate(packed(length=13, batch=1).input_ids, max_new_tokens=3, min_new_tokens=3, pad_token_id=0)
    assert lengths == [13, 1, 1]
    assert pair.teacher.generation_config.use_cache is False


def test_capped_attention_is_never_fused(tmp_path, monkeypatch):
    monkeypatch.setattr(Gemma2PreTrainedModel, "_supports_sdpa", True)  # as transformers has it before 5.21
    pair = tiny_pair("gemma2", tmp_path / "teacher", student={"keep": {"layers": (1,)}}, num_hidden_layers=2)
    teacher = load_teacher(resolve_teacher(str(tmp_path / "teacher")), dtype=torch.float32, device=torch.device("cpu"))
    with atomic_directory(tmp_path / "student") as folder:
        save_student(pair.student, bytes_tokenizer(), folder)
    for model in (pair.teacher, pair.student, teacher, load_student(tmp_path / "student")):
        assert model.config._attn_implementation == "eager"
    uncapped = tiny_teacher("gemma2", attn_logit_softcapping=None, num_hidden_layers=2)
    assert uncapped.config._attn_implementation == "sdpa"


def test_the_state_does_not_grow(pair):
    ids = packed(length=40).input_ids
    sizes = []
    for length in (5, 40):
        cache = pair.student(ids[:, :length], use_cache=True).past_key_values
        layers = [cache.layers[index] for index in pair.spec.mixer_layers]
        sizes.append(sum(state.numel() for layer in layers for state in layer.states.values()))
    assert sizes[0] == sizes[1] == ids.shape[0] * pair.spec.state_elements


def mixer(state_size: int, decay_bias: bool = True) -> DiscreteMamba2:
    """A mixer of 4 heads of width 8 on a width of 32."""
    torch.manual_seed(0)
    return DiscreteMamba2(32, DiscreteMamba2Config(4, 8, True, False, state_size, 4, decay_bias), 0)


def attention_weights() -> AttentionWeights:
    """The weights of a grouped attention with biases: 4 query heads over 2 key heads."""
    return read_projections(find_layers(tiny_teacher("llama"), "model.layers")[0].self_attn)


@pytest.mark.parametrize("state_size", [8, 20])
def test_attention_start_is_linear_attention(state_size):
    weights, ours = attention_weights(), mixer(state_size)
    start_from_attention(ours, weights, 3)
    hidden = torch.randn(1, 6, 32)
    parts = ours.matrix_parts(hidden)
    q = torch.einsum("bld,hpd->blhp", hidden, weights.q_hpd) + weights.q_bias_hp
    k = torch.einsum("bld,gpd->blgp", hidden, weights.k_gpd) + weights.k_bias_gp
    k = k.repeat_interleave(2, dim=2)
    keep_h = 1 - parts_decay(ours)
    expected = torch.einsum("blhp,bshp->bhls", q, k) / 8**0.5 * keep_h[:, None, None]
    actual = torch.einsum("blhn,bshn->bhls", parts.c_blhn, parts.b_blhn)
    assert_close("products", actual, expected)
    assert ours.d.abs().max() == 0


@pytest.mark.parametrize("state_size", [3, 8, 20])
@pytest.mark.parametrize("decay_bias", [True, False])
def test_the_attention_start_takes_weights_from_another_device(state_size, decay_bias):
    weights = attention_weights()
    with FakeTensorMode():  # knows every device, computes nothing, and refuses to mix them
        ours = mixer(state_size, decay_bias)
        tensors = {name: t for name, t in vars(weights).items() if isinstance(t, torch.Tensor)}
        on_gpu = {name: torch.empty(t.shape, device="cuda", dtype=torch.bfloat16) for name, t in tensors.items()}
        start_from_attention(ours, float_on(ours.d.device, replace(weights, **on_gpu)), 3)
        assert {parameter.device.type for parameter in ours.parameters()} == {"cpu"}


def parts_decay(ours: DiscreteMamba2) -> torch.Tensor:
    """The decay of every head at a_log = its bias."""
    return torch.sigmoid(-ours.decay_proj.bias.detach())


def test_a_narrow_state_gets_the_best_low_rank_product():
    weights, ours = attention_weights(), mixer(3)
    start_from_attention(ours, weights, 3)
    c = ours.c_proj.weight.detach().unflatten(0, (4, 3))
    b = ours.b_proj.weight.detach().unflatten(0, (4, 3))
    scale = (1 - parts_decay(ours)) / 8**0.5
    for head in range(4):
        exact = weights.q_hpd[head].T @ weights.k_gpd[head // 2] * scale[head]
        u, s, v = torch.linalg.svd(exact)
        best = u[:, :3] * s[:3] @ v[:3]
        assert_close(f"head {head}", c[head].T @ b[head], best)


def test_values_and_output_are_the_attentions_own():
    weights, ours = attention_weights(), mixer(16)
    start_from_attention(ours, weights, 3)
    hidden = torch.randn(1, 1, 32)
    ours.d.data.fill_(1.0)
    ours.c_proj.weight.data.zero_()
    ours.c_conv.bias.data.zero_()
    out, _ = ours(hidden)
    v = (torch.einsum("bld,gpd->blgp", hidden, weights.v_gpd) + weights.v_bias_gp).repeat_interleave(2, dim=2)
    assert_close("output", out, torch.einsum("blhp,dhp->bld", v, weights.out_dhp) + weights.out_bias_d)


def test_published_start_is_the_identity_of_conv_gate_and_skip(tmp_path):
    pair = tiny_pair("llama", tmp_path, init="identity", student={"decay_bias": False})
    ours = find_layers(pair.student, "model.layers")[0].self_attn
    hidden = torch.randn(1, 7, 32)
    ours.c_proj.weight.data.zero_()
    out, _ = ours(hidden)
    assert_close("output", out, ours.out_proj(ours.x_proj(hidden)))


def test_half_lives_are_spread():
    decay = torch.sigmoid(-spread_decay_bias(5, 16.0))
    half_lives = torch.log(torch.tensor(0.5)) / torch.log(decay)
    assert_close("half-lives", half_lives, torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0]))


def test_layers_to_keep_are_checked(tmp_path):
    with pytest.raises(RecipeError, match="found layer 3, expected layers 0 to 2"):
        tiny_pair("llama", tmp_path, student={"keep": {"layers": (3,)}})
    with pytest.raises(RecipeError, match="at least one"):
        tiny_pair("llama", tmp_path, student={"keep": {"layers": (0, 1, 2)}})
