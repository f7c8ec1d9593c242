"""Every family on the shelf, found by listing: what its file says is true of a small model with its oddities on."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from mohawkify.data.packing import Batch
from mohawkify.errors import UnknownFamilyError
from mohawkify.families.adapter import Logits
from mohawkify.families.decoder_layers import find_layers
from mohawkify.families.projections import read_attention
from mohawkify.families.registry import adapter_names, load_adapter
from mohawkify.objectives.hidden_state import HiddenStateObjective
from mohawkify.objectives.logits import LogitsObjective
from mohawkify.objectives.matrix import MatrixObjective
from mohawkify.objectives.objective import Runner, TeacherStudent, model_inputs
from mohawkify.objectives.trainable import part_of_parameters
from mohawkify.ops.chunked_kl import chunked_distill_loss
from mohawkify.ops.losses import distill_loss
from mohawkify.planning.planning import plan
from mohawkify.recipe.loading import load_recipe
from mohawkify.recipe.schema import AlignRecipe, DistillRecipe, OptimizerRecipe, OrientRecipe, StudentRecipe
from mohawkify.student.build import build_student, design_student
from mohawkify.teacher.capture import LayerCall, capture_attention, layer_hooks
from mohawkify.teacher.lm_head import run_to_lm_head, verify_head
from mohawkify.teacher.resolve import ResolvedTeacher, resolve_teacher
from mohawkify.train.engines.engine import LocalEngine
from tests.close import assert_close
from tests.conftest import ROOT
from tests.tiny import packed, stir, tiny_pair, tiny_teacher

LAYERS = 2
BORDERS = {"one-document": (0,), "packed": (0, 9, 10)}
STAGE = {"tokens": 1000, "sequence_length": 24, "batch_sequences": 2, "learning_rate": 1e-3}


@dataclass
class Case:
    """One family: its teacher, a student grafted everywhere, and what was inspected."""

    name: str
    pair: TeacherStudent
    found: ResolvedTeacher

    def attentions(self, model: nn.Module) -> dict[int, nn.Module]:
        adapter = self.pair.adapter
        return {i: getattr(layer, adapter.attention) for i, layer in enumerate(find_layers(model, adapter.layers))}

    def heard(self, batch: Batch) -> list[LayerCall]:
        """The calls of the teacher's attention modules as stage 1 hears them."""
        teacher, calls = self.pair.teacher, []
        with (
            torch.no_grad(),
            capture_attention(teacher, self.pair.adapter),
            layer_hooks(self.attentions(teacher), calls.append),
        ):
            teacher(**model_inputs(teacher, batch, self.pair.spec))
        return calls


@pytest.fixture(scope="module", params=adapter_names())
def case(request, tmp_path_factory) -> Case:
    folder = tmp_path_factory.mktemp(request.param)
    pair = tiny_pair(request.param, folder, num_hidden_layers=LAYERS)
    return Case(request.param, pair, resolve_teacher(str(folder)))


def test_the_file_describes_its_family(case):
    adapter = load_adapter(case.name)
    assert adapter.title
    assert adapter.examples
    assert adapter.notes
    assert all(sentence.endswith(".") for sentence in adapter.notes)


def test_inspected_facts_are_the_configurations(case):
    spec, config = case.found.spec, case.found.config
    assert spec.model_type == case.name == config.model_type
    assert (spec.num_hidden_layers, spec.num_attention_heads, spec.hidden_size) == (
        LAYERS,
        config.num_attention_heads,
        32,
    )
    assert spec.vocab_size == config.vocab_size
    assert spec.max_position_embeddings == 128
    with torch.device("meta"):
        model = getattr(transformers, case.pair.adapter.model_class)(config)
    assert spec.num_parameters == model.num_parameters() == case.pair.teacher.num_parameters()
    assert spec.tie_word_embeddings == (model.get_output_embeddings().weight is model.get_input_embeddings().weight)
    biases = {name for name, _ in case.attentions(model)[0].named_parameters() if name.endswith("bias")}
    assert bool(spec.attention_biases) == any("norm" not in name for name in biases)


def test_captured_attention_has_the_inspected_heads_and_windows(case):
    spec = case.found.spec
    for call in case.heard(packed(borders=(0,))):
        q_bhlp, k_bgsp = call.attention.q_bhlp, call.attention.k_bgsp
        assert q_bhlp.shape[1::2] == (spec.num_attention_heads, spec.head_dim)
        assert k_bgsp.shape[1::2] == (spec.num_key_value_heads, spec.head_dim)
        row = call.attention.probabilities()[0, :, 20]
        sees = spec.sliding_window if spec.layer_types[call.layer] == "sliding_attention" else 21
        assert row[:, 21 - sees : 21].min() > 0
        assert row[:, : 21 - sees].sum() == 0 == row[:, 21:].sum()


@pytest.mark.parametrize("borders", BORDERS.values(), ids=BORDERS)
def test_captured_attention_is_the_eager_attention(case, borders):
    batch = packed(borders=borders)
    teacher = tiny_teacher(case.name, attention="eager", num_hidden_layers=LAYERS)
    with torch.no_grad():
        expected = teacher(**model_inputs(teacher, batch, case.pair.spec), output_attentions=True).attentions
    for call, matrix in zip(case.heard(batch), expected, strict=True):
        assert_close(f"attention {call.layer}", call.attention.probabilities(), matrix)


@torch.no_grad()
def test_captured_attention_and_read_weights_make_the_modules_output(case):
    teacher = case.pair.teacher
    for call in case.heard(packed()):
        attention = case.attentions(teacher)[call.layer]
        weights = read_attention(case.pair.adapter, attention)
        values = torch.einsum("bld,gpd->bglp", call.hidden_bld, weights.v_gpd)
        values = values if weights.v_bias_gp is None else values + weights.v_bias_gp[:, None]
        values = clipped(values, teacher.config)
        repeats = weights.q_hpd.shape[0] // weights.v_gpd.shape[0]
        mixed = call.attention.probabilities() @ values.repeat_interleave(repeats, dim=1)
        output = torch.einsum("bhlp,dhp->bld", mixed, weights.out_dhp)
        output = output if weights.out_bias_d is None else output + weights.out_bias_d
        assert_close(f"attention {call.layer}", output, call.output_bld)


@torch.no_grad()
def test_read_queries_and_keys_are_the_captured_ones_up_to_rotation(case):
    adapter, teacher = case.pair.adapter, case.pair.teacher
    for call in case.heard(packed()):
        attention = case.attentions(teacher)[call.layer]
        if any("norm" in name for name, _ in attention.named_parameters()):
            pytest.skip("norms divide by lengths that no weight holds")
        weights = read_attention(adapter, attention)
        # Some families scale the queries themselves and hand over a scale of 1.
        q_bhlp = call.attention.q_bhlp * (call.attention.scaling / weights.scaling)
        for weight, bias, captured in (
            (weights.q_hpd, weights.q_bias_hp, q_bhlp),
            (weights.k_gpd, weights.k_bias_gp, call.attention.k_bgsp),
        ):
            features = torch.einsum("bld,hpd->bhlp", call.hidden_bld, weight)
            features = clipped(features if bias is None else features + bias[:, None], teacher.config)
            assert_close("length", features.norm(dim=-1), captured.norm(dim=-1))


def clipped(features: Tensor, config: object) -> Tensor:
    """Queries, keys and values as families with ``clip_qkv`` bound them."""
    limit = getattr(config, "clip_qkv", None) or getattr(getattr(config, "attn_config", None), "clip_qkv", None)
    return features.clamp(-limit, limit) if limit else features


def test_every_teacher_tensor_is_copied_or_belongs_to_replaced_attention(case):
    teacher, student = case.pair.teacher.state_dict(), case.pair.student.state_dict()
    adapter = case.pair.adapter
    replaced = tuple(f"{adapter.layers}.{index}.{adapter.attention}." for index in range(LAYERS))
    kept = {name for name in teacher if not name.startswith(replaced)}
    assert kept == {name for name in student if not name.startswith(replaced)}
    for name in kept:
        assert torch.equal(teacher[name], student[name]), name


def test_every_parameter_has_a_part_and_norms_are_found(case):
    parts = part_of_parameters(case.pair.student, case.pair.spec)
    assert parts.keys() == dict(case.pair.student.named_parameters()).keys()
    adapter, student = case.pair.adapter, case.pair.student
    mixers = tuple(f"{adapter.layers}.{index}.{adapter.attention}." for index in range(LAYERS))
    for name, part in parts.items():
        assert (part == "mixer") == name.startswith(mixers)
        if part not in ("mixer", "norm") and student.get_parameter(name).dim() == 1:
            assert name.endswith("bias") or "act_fn" in name, f"{name} counts as {part}"


def student_keeping(case: Case, layers: tuple[int, ...]) -> PreTrainedModel:
    """A student of the case's teacher that keeps the attention of some layers."""
    recipe = StudentRecipe(state_size=16, init="attention", keep={"layers": layers})
    adapter = case.pair.adapter
    spec = design_student("tiny", case.found.spec, case.found.config, adapter, recipe)
    return build_student(case.pair.teacher, adapter, spec, "attention", seed=0)


@pytest.fixture(scope="module")
def first_kept(case):
    return student_keeping(case, (0,))


@torch.no_grad()
def test_with_its_attention_kept_the_student_is_the_teacher(case, first_kept):
    student, teacher = copy.deepcopy(first_kept), case.pair.teacher
    layers = find_layers(student, case.pair.adapter.layers)
    setattr(layers[1], case.pair.adapter.attention, case.attentions(teacher)[1])
    batch = packed()
    logits = student(**model_inputs(student, batch, case.pair.spec)).logits
    assert torch.equal(logits, teacher(**model_inputs(teacher, batch, case.pair.spec)).logits)


@pytest.mark.full
@pytest.mark.parametrize("name", ["orient", "align", "align-mixer", "distill"])
def test_every_stage_lowers_its_loss(case, name, tmp_path):
    models = tiny_pair(case.name, tmp_path, init="identity", num_hidden_layers=LAYERS)
    objective = {
        "orient": lambda: MatrixObjective(models, OrientRecipe(**STAGE)),
        "align": lambda: HiddenStateObjective(models, AlignRecipe(**STAGE)),
        "align-mixer": lambda: HiddenStateObjective(models, AlignRecipe(target="mixer", **STAGE)),
        "distill": lambda: LogitsObjective(models, DistillRecipe(**STAGE)),
    }[name]()
    engine = LocalEngine(models.student, objective.parameters(), OptimizerRecipe(), "fp32", torch.device("cpu"))
    losses = []
    for _ in range(20):
        losses.append(objective.run(packed(), Runner(engine.backward))["loss"].item())
        engine.step(1e-3)
    assert losses[-1] < losses[0]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((), id="all-grafted", marks=pytest.mark.full),
        pytest.param((0,), id="first-kept"),
        pytest.param((1,), id="last-kept", marks=pytest.mark.full),
    ],
)
def student(case, first_kept, request):
    return stir(copy.deepcopy(first_kept) if request.param == (0,) else student_keeping(case, request.param))


@torch.no_grad()
def test_token_by_token_and_by_pieces_equal_the_full_pass(student):
    ids = packed(length=31).input_ids
    full = student(ids, use_cache=False).logits
    for cuts in ([*range(20, 32)], [7, 13, 31]):
        pieces, cache, begin = [], None, 0
        for end in cuts:
            out = student(ids[:, begin:end], past_key_values=cache, use_cache=True)
            cache, begin = out.past_key_values, end
            pieces.append(out.logits)
        assert_close(f"cut at {cuts}", torch.cat(pieces, 1), full, tolerance=1e-4)


@torch.no_grad()
def test_padding_on_both_sides_leaves_the_states_of_single_rows(student):
    ids = packed(length=30).input_ids
    mask = torch.ones_like(ids)
    mask[1, :11], mask[1, 25:] = 0, 0
    positions = (mask.cumsum(-1) - 1) * mask
    padded = student(ids, attention_mask=mask, position_ids=positions, use_cache=True)
    single = student(ids[1:, 11:25], use_cache=True)
    assert_close("logits", padded.logits[1:, 11:25], single.logits, tolerance=1e-4)
    for ours, alone in zip(padded.past_key_values.layers, single.past_key_values.layers, strict=True):
        for name, state in getattr(alone, "states", {}).items():
            assert_close(name, ours.states[name][1:], state, tolerance=1e-4)


@torch.no_grad()
def test_a_left_padded_batch_equals_single_rows(student):
    ids = packed(length=30).input_ids
    mask = torch.ones_like(ids)
    mask[1, :11] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    padded = student(ids, attention_mask=mask, position_ids=positions, use_cache=True)
    single = student(ids[1:, 11:], use_cache=True)
    assert_close("logits", padded.logits[1:, 11:], single.logits, tolerance=1e-4)
    assert_close("the whole row", padded.logits[:1], student(ids[:1], use_cache=False).logits, tolerance=1e-4)
    next_id = torch.tensor([[5], [5]])
    mask = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], 1)
    after = student(
        next_id, attention_mask=mask, position_ids=mask.sum(-1, keepdim=True) - 1,
        past_key_values=padded.past_key_values, use_cache=True,
    )  # fmt: skip
    after_single = student(next_id[1:], past_key_values=single.past_key_values, use_cache=True)
    assert_close("next logits", after.logits[1:], after_single.logits, tolerance=1e-4)


@torch.no_grad()
def test_packed_documents_equal_separate_ones(case):
    batch, spec = packed(length=24, borders=(0, 9, 10)), case.pair.spec
    for model in (case.pair.teacher, case.pair.student):
        logits = model(**model_inputs(model, batch, spec)).logits
        for begin, end in ((0, 9), (9, 10), (10, 24)):
            alone = model(input_ids=batch.input_ids[:, begin:end], use_cache=False).logits
            assert_close(f"document {begin}", logits[:, begin:end], alone)


def test_greedy_text_of_a_padded_batch_equals_single_text(student):
    ids = packed(length=9).input_ids
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    options = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4, "pad_token_id": 0}
    batch = student.generate(ids, attention_mask=mask, **options)
    single = student.generate(ids[1:, 4:], attention_mask=mask[1:, 4:], **options)
    assert batch[1, 9:].tolist() == single[0, 5:].tolist()
    assert torch.equal(batch, student.generate(ids, attention_mask=mask, prefill_chunk_size=1, **options))


def test_the_loss_from_hidden_states_is_that_of_the_models_logits(case):
    adapter, spec, batch = case.pair.adapter, case.pair.spec, packed()
    assert adapter.logits.unknown is None, "stage 3 holds all logits of this family at once: say why here"
    batch.loss_mask[:, [0, 7, 20]] = False
    teacher, student = copy.deepcopy(case.pair.teacher).double(), copy.deepcopy(case.pair.student).double()
    for model in (teacher, student):
        model.set_experts_implementation("eager")  # the grouped products of experts have no float64
    parameters = dict(student.requires_grad_().named_parameters())
    inputs = model_inputs(student, batch, spec)
    with torch.no_grad():
        teacher_head = run_to_lm_head(teacher, adapter, **model_inputs(teacher, batch, spec))
        teacher_blv = teacher(**model_inputs(teacher, batch, spec)).logits
    found = chunked_distill_loss(run_to_lm_head(student, adapter, **inputs), teacher_head, batch.loss_mask)
    expected = distill_loss(student(**inputs).logits, teacher_blv, batch.loss_mask)
    assert_close("loss", found[0], expected[0])
    assert_close("KL", found[1], expected[1])
    assert found[1] > 1e-3, "teacher and student are the same: this says nothing"
    tensors = list(parameters.values())
    ours, theirs = (torch.autograd.grad(loss, tensors, allow_unused=True) for loss, _ in (found, expected))
    for name, gradient, truth in zip(parameters, ours, theirs, strict=True):
        assert (gradient is None) == (truth is None), name
        if gradient is not None and truth.any():
            # Norms and rotations compute in float32 whatever the weights are.
            assert_close(name, gradient / truth.abs().max(), truth / truth.abs().max(), tolerance=1e-5)


def test_the_head_is_verified_on_the_weights(case):
    teacher, adapter = case.pair.teacher, case.pair.adapter
    verify_head(teacher, adapter, 97)
    said = (adapter.logits.multiplier, adapter.logits.divisor, adapter.logits.softcap)
    is_odd = any(getattr(teacher.config, key) is not None for key in said if key is not None)
    for wrong in (Logits(multiplier="hidden_size"), *([Logits()] if is_odd else [])):
        with pytest.raises(UnknownFamilyError, match="are not what the family's file says"):
            verify_head(teacher, replace(adapter, logits=wrong), 97)


def test_real_configurations_are_planned_with_transformers_own_parameter_count(teacher_configs):
    recipe = load_recipe("llamba-1b")
    configs = sorted(teacher_configs.glob("*.json"))
    assert len(configs) >= 12
    for config in configs:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(config))
        assert plan(str(config), recipe)["teacher"]["num_parameters"] == model.num_parameters(), config.stem


def test_the_readme_counts_the_families_right():
    num_files = len([path for path in (ROOT / "adapters").glob("*.py") if path.stem != "__init__"])
    assert f"\n- {num_files} families of teachers have a file" in (ROOT / "README.md").read_text(encoding="utf-8")
