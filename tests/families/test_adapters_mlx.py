"""Every family through the MLX exports: all layers grafted, hybrids, text, quantised, and what is refused."""

from __future__ import annotations

import numpy
import pytest
import torch

from mohawkify.errors import ExportError
from mohawkify.exporters.export import export_run
from mohawkify.families.registry import adapter_names, load_adapter
from mohawkify.mixers.mamba2 import DiscreteMamba2
from mohawkify.student.save import is_precise
from tests.families.layouts import each_family
from tests.finished import finished_run

pytest.importorskip("mlx_lm", reason="needs mlx-lm: pip install 'mohawkify[mlx]'")

import mlx.core as mx
from mlx_lm import batch_generate, load
from mlx_lm.generate import generate_step

PRECISE = DiscreteMamba2.precise_parameters
LAYERS = 2
LENGTH = 80  # longer than a chunk of either scan
TOLERANCE = 1e-3  # of a logit, absolute; the largest ones are about 10
FAMILIES = [name for name in adapter_names() if load_adapter(name).mlx_module]
WITHOUT = [name for name in adapter_names() if not load_adapter(name).mlx_module]
# Kept layers that look through a window, of families that have none in mlx-lm.
WINDOWS = {("gemma2", 0), ("qwen2", 1)}
# With the last layer kept, the model asks a mixer's memory for the mask; the first one is kept where layers differ.
LAYERS_DIFFER = {"layer_types", "sliding_window", "no_rope_layers"}
HYBRIDS = [
    (name, layer)
    for name in FAMILIES
    for layer in range(LAYERS)
    if layer == LAYERS - 1
    or name == "gpt2"
    or LAYERS_DIFFER & load_adapter(name).tiny_config.keys() - load_adapter(name).mlx_tiny_config.keys()
    if (name, layer) not in WINDOWS
]
# What `mlx_tiny_config` switches off because mlx-lm lacks it: the layer whose attention shows it, or None.
LACKING = {
    "glm": (1, "nats per token away from its run before it is rounded"),
    "gpt2": (None, "mlx-lm's gpt2 cannot hold this student"),
    "gpt_neox": (None, "mlx-lm's gpt_neox cannot hold this student"),
    "mixtral": (0, "layer 0 keeps attention through a sliding window, which mlx-lm's mixtral lacks"),
    "olmoe": (1, "nats per token away from its run before it is rounded"),
    "phi": (0, "mlx-lm's phi cannot hold this student"),
    "phi3": (1, "layer 1 keeps attention through a sliding window, which mlx-lm's phi3 lacks"),
    "phimoe": (0, "layer 0 keeps attention through a sliding window, which mlx-lm's phimoe lacks"),
    "starcoder2": (0, "layer 0 keeps attention through a sliding window, which mlx-lm's starcoder2 lacks"),
}
# Families of which mlx-lm rounds a detail otherwise: beyond rounding in float32, far below it in bfloat16.
COARSE = ("gemma", "gemma3_text", "gpt_bigcode")
MIXTURES = {"granitemoe", "mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe"}
PROMPT = [int(i) for i in numpy.random.default_rng(0).integers(3, 256, size=9)]


def quiet(line):
    """Report to nobody."""


def run_of(folder, family, keep=(), **changes):
    """A finished run of a family, with only what mlx-lm's model of it has; returns the student."""
    # Experts that are narrower stay plain, and MLX runs those on no CPU but in float32.
    wide = {"intermediate_size": 64, "moe_intermediate_size": 64} if family in MIXTURES else {}
    sizes = {"num_hidden_layers": LAYERS, "max_position_embeddings": LENGTH, **wide}
    changes = {**sizes, **load_adapter(family).mlx_tiny_config, **changes}
    return finished_run(folder, family, keep, **changes)


def require_same_logits(student, model):
    ids = torch.randint(3, 256, (2, LENGTH), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = student(ids, use_cache=False).logits
    found = torch.from_numpy(numpy.array(model(mx.array(ids.numpy()))))
    assert found.shape == expected.shape
    assert (found - expected).abs().max().item() < TOLERANCE


def require_same_text(student, model):
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    expected = student.generate(torch.tensor([PROMPT]), **settings)[0, len(PROMPT) :].tolist()
    for step in (4, 2048):
        steps = generate_step(mx.array(PROMPT), model, max_tokens=8, prefill_step_size=step)
        assert [int(token) for token, _ in steps] == expected


@pytest.fixture(scope="module", params=each_family(FAMILIES))
def grafted(request, tmp_path_factory):
    """A family, a run of it without any attention, and the student."""
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, folder, run_of(folder, request.param)


def test_logits_and_text_equal_the_grafted_students(grafted):
    _, folder, student = grafted
    export_run(folder, "mlx", folder / "mlx", dtype="float32", report=quiet)
    model, _ = load(str(folder / "mlx"), trust_remote_code=True)
    require_same_logits(student, model)
    require_same_text(student, model)


def test_quantised_exports_keep_the_decay_precise_and_quantise_experts(grafted):
    family, folder, _ = grafted
    result = export_run(folder, "mlx-q4", folder / "mlx-q4", report=quiet)
    assert result["kl"] < 2
    weights = mx.load(str(folder / "mlx-q4" / "model.safetensors"))
    assert {name for name, weight in weights.items() if weight.dtype == mx.float32} == {
        name for name in weights if is_precise(name, PRECISE)
    }
    quantised = {name.removesuffix(".scales") for name in weights if name.endswith(".scales")}
    assert not any(name.endswith("decay_proj") for name in quantised)
    for name in ("x_proj", "b_proj", "c_proj", "z_proj"):
        assert (
            sum(path.endswith(f".{name}") for path in quantised)
            == LAYERS + (name == "c_proj" and any(path.endswith("mlp.c_proj") for path in quantised)) * LAYERS
        )
    assert any("switch_mlp" in name for name in quantised) == (family in MIXTURES)
    model, _ = load(str(folder / "mlx-q4"), trust_remote_code=True)
    assert mx.isfinite(model(mx.array([PROMPT]))).all()


@pytest.mark.parametrize(("family", "layer"), [each_family([name], layer)[0] for name, layer in HYBRIDS])
def test_logits_and_text_equal_the_hybrid_students(tmp_path, family, layer):
    student = run_of(tmp_path, family, keep=(layer,))
    export_run(tmp_path, "mlx", tmp_path / "out", dtype="float32", report=quiet)
    model, _ = load(str(tmp_path / "out"), trust_remote_code=True)
    require_same_logits(student, model)
    require_same_text(student, model)


@pytest.mark.full
@pytest.mark.parametrize("keep", [(), (0,), (1,)], ids=["all-grafted", "first-kept", "last-kept"])
def test_learned_positions_of_a_batch_are_those_of_single_runs(tmp_path, keep):
    run_of(tmp_path, "gpt2", keep)
    export_run(tmp_path, "mlx", tmp_path / "out", dtype="float32", report=quiet)
    model, tokenizer = load(str(tmp_path / "out"), trust_remote_code=True)
    tokenizer.eos_token_ids = set()
    prompts = [[int(i) for i in numpy.random.default_rng(n).integers(3, 256, size=n)] for n in (40, 2, 9)]
    alone = [[int(token) for token, _ in generate_step(mx.array(each), model, max_tokens=6)] for each in prompts]
    for step in (4, 2048):
        batch = batch_generate(model, tokenizer, prompts, max_tokens=6, return_token_ids=True, prefill_step_size=step)
        assert batch.token_ids == alone


@pytest.mark.full
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("glm4", {"tie_word_embeddings": True}),
        ("helium", {"tie_word_embeddings": True}),
        ("qwen2_moe", {"tie_word_embeddings": True}),
        ("stablelm", {"tie_word_embeddings": True}),
        ("phimoe", {"attention_bias": False, "lm_head_bias": False}),
        ("starcoder2", {"use_bias": False}),
        ("gpt_neox", {"attention_bias": False}),
        ("gpt_bigcode", {"n_inner": None}),
        ("exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * LAYERS}),
        ("cohere2", {"layer_types": ["full_attention"] * LAYERS}),
    ],
)
def test_what_mlx_lm_asks_for_and_a_teacher_need_not_have_is_filled_in(tmp_path, family, changes):
    student = run_of(tmp_path, family, keep=(1,), **changes)
    export_run(tmp_path, "mlx", tmp_path / "out", dtype="float32", report=quiet)
    model, _ = load(str(tmp_path / "out"), trust_remote_code=True)
    require_same_logits(student, model)


def test_rotations_that_mlx_lm_lacks_do_not_matter_where_nothing_rotates(tmp_path):
    rope = {"rope_type": "yarn", "rope_theta": 300.0, "factor": 4.0, "original_max_position_embeddings": 32}
    student = run_of(tmp_path / "grafted", "qwen2_moe", rope_parameters=rope)
    export_run(tmp_path / "grafted", "mlx", tmp_path / "out", dtype="float32", report=quiet)
    model, _ = load(str(tmp_path / "out"), trust_remote_code=True)
    require_same_logits(student, model)
    run_of(tmp_path / "hybrid", "qwen2_moe", keep=(0,), rope_parameters=rope)
    with pytest.raises(ExportError, match="mlx-lm's qwen2_moe cannot hold this student: rope_scaling"):
        export_run(tmp_path / "hybrid", "mlx", tmp_path / "hybrid-out", report=quiet)


@pytest.mark.parametrize(("family", "layer"), sorted(WINDOWS))
def test_a_kept_window_that_mlx_lm_lacks_is_refused(tmp_path, family, layer):
    finished_run(tmp_path, family, (layer,), num_hidden_layers=LAYERS)
    with pytest.raises(ExportError, match=f"layer {layer} keeps attention through a sliding window") as refusal:
        export_run(tmp_path, "mlx", tmp_path / "out", report=quiet)
    assert "hf" in refusal.value.hint


def test_a_kept_full_layer_that_mlx_lm_windows_is_refused(tmp_path):
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    finished_run(tmp_path, "cohere2", (2,), layer_types=kinds)
    with pytest.raises(ExportError, match="layer 2 keeps attention through everything"):
        export_run(tmp_path, "mlx", tmp_path / "out", report=quiet)


@pytest.mark.parametrize("family", each_family(LACKING))
def test_what_mlx_lm_lacks_is_refused_before_rounding_hides_it(tmp_path, family):
    layer, wording = LACKING[family]
    finished_run(tmp_path, family, () if layer is None else (layer,), num_hidden_layers=LAYERS)
    with pytest.raises(ExportError, match=wording) as refusal:
        export_run(tmp_path, "mlx-q4", tmp_path / "out", report=quiet)
    assert "hf" in refusal.value.hint
    assert not (tmp_path / "out").exists()


@pytest.mark.full
@pytest.mark.parametrize("family", COARSE)
def test_what_mlx_lm_rounds_otherwise_is_exported_in_bfloat16(tmp_path, family):
    finished_run(tmp_path, family, (0,), num_hidden_layers=LAYERS)
    assert export_run(tmp_path, "mlx", tmp_path / "bfloat16", report=quiet)["kl"] < 0.1
    with pytest.raises(ExportError, match="logits differ") as refusal:
        export_run(tmp_path, "mlx", tmp_path / "float32", dtype="float32", report=quiet)
    assert "hf" in refusal.value.hint


def test_every_change_of_a_sample_is_accounted_for():
    changed = {name for name in FAMILIES if load_adapter(name).mlx_tiny_config}
    assert changed == {*LACKING, *COARSE}


@pytest.mark.parametrize("family", WITHOUT)
def test_a_family_that_mlx_lm_lacks_is_refused_before_anything_is_loaded(tmp_path, family):
    finished_run(tmp_path, family, num_hidden_layers=LAYERS)
    lines: list[str] = []
    for target in ("mlx", "mlx-q4"):
        with pytest.raises(ExportError, match="mlx-lm has no model of the family") as refusal:
            export_run(tmp_path, target, tmp_path / "out", report=lines.append)
        assert refusal.value.hint == "export to hf instead"
    assert lines == []
