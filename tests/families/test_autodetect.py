"""Families without a file: autodetected by their modules and verified on their weights, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

from mohawkify.errors import TeacherError, UnknownFamilyError
from mohawkify.families.autodetect import autodetect
from mohawkify.families.registry import adapter_names, load_adapter
from mohawkify.recipe.schema import StudentRecipe
from mohawkify.student.build import build_student, design_student
from mohawkify.student.verify import verify_family
from mohawkify.teacher.resolve import resolve_teacher
from tests.bytes_tokenizer import BOS, EOS, bytes_tokenizer
from tests.commands import make_recipe, run, run_well
from tests.tiny import COMMON, randomise, tiny_config, tiny_teacher

PLAIN = [
    name
    for name in adapter_names()
    if not (load_adapter(name).capture or load_adapter(name).reads_mask or load_adapter(name).read_weights)
]
FUSED = {
    "phi3": "qkv_proj",
    "gpt_neox": "query_key_value",
    "gpt2": "c_attn",
    "mpt": "Wqkv",
    "falcon": "query_key_value",
}
BYTES = {"vocab_size": 258, "bos_token_id": BOS, "eos_token_id": EOS, "num_hidden_layers": 2}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 24}


def unwritten_teacher(model_type: str, folder: Path, **values: Any) -> Path:
    """A random teacher of a family that has no file, with a tokenizer of bytes and text beside it."""
    model_class = getattr(transformers, CAUSAL[model_type])
    config = model_class.config_class(**{**COMMON, **BYTES, **values})
    randomise(model_class(config)).save_pretrained(folder)
    bytes_tokenizer().save_pretrained(folder)
    (folder / "text.txt").write_text("<|endoftext|>".join(f"The cat {n} sat on the mat {n * n}." for n in range(60)))
    return folder


@pytest.mark.parametrize("name", PLAIN)
def test_autodetection_agrees_with_the_files(name):
    written = load_adapter(name)
    found = autodetect(name, tiny_config(name, num_hidden_layers=2).to_dict())
    for field in ("model_class", "config_class", "layers", "attention", "out_proj"):
        assert getattr(found, field) == getattr(written, field), field
    assert found.qk_norms is None  # how unknown norms keep their weights is not known
    assert found.autodetected
    assert not written.autodetected


@pytest.mark.parametrize("name", FUSED)
def test_what_is_not_found_is_named(name):
    values = tiny_config(name, num_hidden_layers=2).to_dict()
    with pytest.raises(UnknownFamilyError, match=f"no child of its layers has linear q_proj.*{FUSED[name]}"):
        autodetect(name, values)


@pytest.mark.parametrize(
    ("model_type", "values", "wording"),
    [
        ("flint", {}, "parameters of unknown meaning: sinks"),
        ("afmoe", {}, "parameters of unknown meaning: gate_proj"),
        ("xglm", {}, "XGLMAttention does not attend through transformers' interface"),
        ("olmo_hybrid", {}, "layer 0 is recurrent already"),
        ("kimi_linear", {}, "layer 0 is recurrent already"),
        ("gemma4", {}, "is not a plain causal language model"),
        ("moshi", {}, "no child of its layers has linear q_proj"),
        ("jais2", {"num_attention_heads": "many"}, "cannot be laid out"),
    ],
)
def test_modules_of_another_kind_are_refused(model_type, values, wording):
    with pytest.raises(UnknownFamilyError, match=wording) as caught:
        autodetect(model_type, {**COMMON, "num_experts": 4, "num_hidden_layers": 2, **values})
    assert len(caught.value.message.splitlines()) == 1


@pytest.mark.parametrize(
    ("model_type", "wording"),
    [
        ("modernbert", "it is an encoder, which sees the future"),
        ("xlm-roberta", "it is an encoder, which sees the future"),
        ("longt5", "it has an encoder and a decoder"),
        ("llava_onevision", "it reads more than text"),
        ("bloom", "adds the residual itself"),
        ("starling", "mohawkify families"),
    ],
)
def test_other_kinds_of_models_are_refused_from_the_configuration(tmp_path, model_type, wording):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "hidden_size": 32}))
    refused = run("inspect", tmp_path)
    assert refused.exit_code == 64
    assert wording in refused.stderr
    assert refused.stdout == ""


def test_an_unwritten_family_goes_the_whole_way(tmp_path):
    teacher = unwritten_teacher("granitemoeshared", tmp_path / "teacher", **EXPERTS)
    told = json.loads(run_well("inspect", teacher, "--json").stdout)
    assert "No file in adapters/" in told["notes"][0]
    assert "model.layers holds the 2 decoder layers" in told["notes"][1]
    assert "q_proj, k_proj, v_proj, o_proj" in told["notes"][2]
    out = tmp_path / "run"
    done = run_well("convert", teacher, "--recipe", make_recipe(tmp_path), "--output", out)
    assert "proving what its modules say on the weights" in done.stderr
    assert json.loads(run_well("eval", out, "--json").stdout)["student"]["kl"] > 0
    run_well("export", out, "--target", "hf", "--output", tmp_path / "hf")
    run_well("doctor", teacher)
    refused = run("export", out, "--target", "mlx", "--output", tmp_path / "mlx")
    assert refused.exit_code == 73
    assert "hf" in refused.stderr


def verify(model_type: str, teacher: Any, folder: Path) -> None:
    """Convert a teacher as if its family had no file."""
    teacher.save_pretrained(folder)
    adapter = autodetect(model_type, teacher.config.to_dict())
    spec = resolve_teacher(str(folder)).spec
    student_spec = design_student("tiny", spec, teacher.config, adapter, StudentRecipe(state_size=8))
    student = build_student(teacher, adapter, student_spec, "attention", seed=0)
    verify_family(teacher, student, adapter, 97)


@pytest.mark.parametrize("name", sorted(set(PLAIN) - {"olmo", "olmoe", "opt"}))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_true_family_passes_verification(name, dtype, tmp_path):
    verify(name, tiny_teacher(name, num_hidden_layers=2).to(dtype), tmp_path)


@pytest.mark.parametrize(
    ("name", "wording"),
    [
        ("olmo", "layer 0 is not its matrix times its values"),  # it clips the values
        ("opt", "layer 0 attends across the border of two documents"),
        ("nemotron", "its decoder layers keep padding_mask from their attention"),
    ],
)
def test_a_wrong_family_fails_verification(name, wording, tmp_path):
    with pytest.raises(TeacherError, match=wording):
        verify(name, tiny_teacher(name, num_hidden_layers=2), tmp_path)


@pytest.mark.parametrize(
    ("family", "values"), [("gemma3_text", {"use_bidirectional_attention": True}), ("llama", {"is_causal": False})]
)
def test_a_teacher_that_sees_the_future_is_refused(tmp_path, family, values):
    tiny_teacher(family, num_hidden_layers=2).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    refused = run("inspect", tmp_path)
    assert refused.exit_code == 66
    assert "its attention sees the future" in refused.stderr


def test_a_family_that_fails_verification_leaves_no_finished_run(tmp_path):
    teacher = unwritten_teacher("biogpt", tmp_path / "teacher")
    refused = run("convert", teacher, "--recipe", make_recipe(tmp_path), "--output", tmp_path / "run")
    assert refused.exit_code == 64
    assert "reading the text" not in refused.stderr, "verified before hours of tokenising"
    assert "attends across the border of two documents" in refused.stderr
    assert not (tmp_path / "run" / "final").exists()
    assert "attends across the border of two documents" in run("doctor", teacher).stdout
