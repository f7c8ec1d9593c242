"""Exporting a student for mlx-lm: the same logits, the same text alone and in a batch, quantised and not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy
import pytest
import torch

from mohawkify.errors import ExportError, MissingExtraError
from mohawkify.exporters import mlx as mlx_target
from mohawkify.exporters.export import export_run
from mohawkify.families.registry import load_adapter
from mohawkify.mixers.mamba2 import DiscreteMamba2
from mohawkify.student.save import is_precise, save_student
from tests.bytes_tokenizer import bytes_tokenizer
from tests.close import assert_close
from tests.finished import WITHOUT_MOHAWKIFY, finished_run, run_python

pytest.importorskip("mlx_lm", reason="needs mlx-lm: pip install 'mohawkify[mlx]'")

import mlx.core as mx
from mlx_lm import batch_generate, load
from mlx_lm.generate import generate_step

PRECISE = DiscreteMamba2.precise_parameters
ROPE = {
    "rope_type": "llama3", "rope_theta": 300.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
CASES = {
    "llama-untied": {"family": "llama", "tie_word_embeddings": False},
    "llama-first-kept": {"family": "llama", "keep": (0,), "rope_parameters": ROPE},
    "llama-middle-kept": {"family": "llama", "keep": (1,), "num_key_value_heads": 1},
    "qwen2-kept": {"family": "qwen2", "keep": (0,)},
    "qwen3-kept": {"family": "qwen3", "keep": (2,)},
    "llama-heads": {"family": "llama", "keep": {"heads": ((0, 1), (1, 0), (1, 1), (2, 2))}, "rope_parameters": ROPE},
    "qwen3-heads-and-layer": {"family": "qwen3", "keep": {"layers": (2,), "heads": ((1, 0), (1, 2), (1, 3))}},
    "mamba2-kept": {"family": "qwen2", "keep": (0,), "mixer": "mamba2"},
}
PROMPTS = [[int(i) for i in numpy.random.default_rng(n).integers(3, 256, size=n)] for n in (70, 2, 9, 31)]


def quiet(line):
    """Report to nobody."""


@pytest.fixture(scope="module", params=CASES)
def exported(request, tmp_path_factory):
    """A student, and its float32 export loaded as mlx-lm loads it."""
    folder = tmp_path_factory.mktemp(request.param)
    student = finished_run(folder, **CASES[request.param])
    result = export_run(folder, "mlx", folder / "out", dtype="float32", report=quiet)
    assert result["max_logit_difference"] < 1e-3
    model, tokenizer = load(str(folder / "out"), trust_remote_code=True)
    return student, model, tokenizer


def write(model, prompt, num_tokens=10, **settings):
    """Greedy tokens."""
    steps = generate_step(mx.array(prompt), model, max_tokens=num_tokens, **settings)
    return [int(token) for token, _ in steps]


def test_float32_logits_equal_the_students(exported):
    student, model, _ = exported
    ids = torch.randint(3, 256, (2, 150), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = student(ids, use_cache=False).logits
    found = torch.from_numpy(numpy.array(model(mx.array(ids.numpy()))))
    # Of the largest logit: with sharp random attention mlx-lm's own kept layers round worse than the mixers (measured).
    assert_close("logits", found, expected, tolerance=1e-4)


def test_text_equals_the_students_for_every_prefill_step(exported):
    student, model, _ = exported
    expected = student.generate(
        torch.tensor(PROMPTS[:1]),
        max_new_tokens=10,
        min_new_tokens=10,
        do_sample=False,
        eos_token_id=-1,
        pad_token_id=0,
    )[0, len(PROMPTS[0]) :].tolist()
    assert write(model, PROMPTS[0]) == expected
    for step in (1, 3, 64):
        assert write(model, PROMPTS[0], prefill_step_size=step) == expected


@pytest.mark.parametrize("step", [4, 2048])
def test_a_batch_of_unequal_prompts_equals_single_runs(exported, step):
    _, model, tokenizer = exported
    tokenizer.eos_token_ids = set()
    batch = batch_generate(model, tokenizer, PROMPTS, max_tokens=8, return_token_ids=True, prefill_step_size=step)
    assert batch.token_ids == [write(model, prompt, 8) for prompt in PROMPTS]


def test_kept_windows_and_kept_full_attention_each_see_their_own_mask():
    from mohawkify.exporters.mlx_model import Model, ModelArgs

    config = {
        "model_type": "mohawk_llama", "mlx_module": "llama", "hidden_size": 32, "num_hidden_layers": 4,
        "intermediate_size": 48, "num_attention_heads": 4, "rms_norm_eps": 1e-5, "vocab_size": 64, "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "mixer": {
            "attention": "self_attn",
            "layer_specs": [{"mixer_heads": heads, "attention_heads": 4 - heads} for heads in (4, 4, 0, 0)],
            "config": {
                "head_dim": 8, "state_size": 16, "conv_kernel": 4, "decay_bias": True, "out_bias": False,
                "write": "plain", "conv_activation": "none", "gated_norm": False,
            },
        },
    }  # fmt: skip
    mx.random.seed(0)
    model = Model(ModelArgs.from_dict(config))
    ids = mx.random.randint(0, 64, (1, 40))
    whole = torch.from_numpy(numpy.array(model(ids)))
    for step in (1, 3, 7, 40):
        cache = model.make_cache()
        parts = [model(ids[:, begin : begin + step], cache=cache) for begin in range(0, 40, step)]
        assert_close(f"steps of {step}", torch.from_numpy(numpy.array(mx.concatenate(parts, axis=1))), whole)


@pytest.mark.parametrize(
    ("mixer", "target", "bits", "largest_kl"),
    [
        ("discrete_mamba2", "mlx-q8", 8, 0.02),
        ("discrete_mamba2", "mlx-q4", 4, 0.5),
        ("mamba2", "mlx-q4", 4, 1.5),  # of random weights, whose small outputs the norm makes as large as any
    ],
)
def test_quantised_exports_keep_the_decay_precise(tmp_path, mixer, target, bits, largest_kl):
    finished_run(tmp_path, "llama", mixer=mixer, hidden_size=64, intermediate_size=96, num_attention_heads=8, keep=(1,))
    result = export_run(tmp_path, target, tmp_path / "out", report=quiet)
    assert 0 < result["kl"] < largest_kl
    weights = mx.load(str(tmp_path / "out" / "model.safetensors"))
    assert {name for name, weight in weights.items() if weight.dtype == mx.float32} == {
        name for name in weights if is_precise(name, PRECISE)
    }
    quantised = {name.removesuffix(".scales") for name in weights if name.endswith(".scales")}
    mixer = {f"model.layers.{i}.self_attn.{name}_proj" for i in (0, 2) for name in ("x", "b", "c", "z", "out")}
    mlp = {f"model.layers.{i}.mlp.{name}_proj" for i in range(3) for name in ("gate", "up", "down")}
    kept = {f"model.layers.1.self_attn.{name}_proj" for name in "qkvo"}
    assert quantised == mixer | mlp | kept | {"model.embed_tokens"}
    assert result["plain"] == []
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization"]["bits"] == bits
    assert config["quantization"]["model.layers.0.mlp.down_proj"]["group_size"] == 32  # 96 is no multiple of 64
    finer = {"model.embed_tokens", *(name for name in quantised if name.endswith((".x_proj", ".down_proj", ".v_proj")))}
    stored = {name for name in quantised if config["quantization"].get(name, {"bits": bits})["bits"] == max(bits, 6)}
    assert stored == (finer if bits == 4 else quantised)
    assert config["model_file"] == "mlx_model.py"
    assert "auto_map" not in config


def test_only_keys_of_the_family_reach_the_export():
    values = {"hidden_size": 32, "x": 1, "auto_map": {}, "_attn_implementation": "e/k"}
    assert mlx_target._student_config(values, load_adapter("llama")) == {"hidden_size": 32}


def test_weights_that_no_group_size_divides_stay_plain_and_are_named_also_in_a_folder_like_a_pattern(tmp_path):
    folder, lines = tmp_path / "run [1]*" / "out[2]", []
    finished_run(folder.parent)
    result = export_run(folder.parent, "mlx-q4", folder, report=lines.append)
    assert result["plain"] == [f"model.layers.{i}.mlp.down_proj" for i in range(3)]
    assert "model.layers.0.mlp.down_proj" in (folder / "README.md").read_text()
    assert (
        lines[-1]
        == f"warning: mlx-lm takes {folder} for a pattern, because of *, ? or [ in it: move the export to use it"
    )
    with pytest.raises(FileNotFoundError):
        load(str(folder), trust_remote_code=True)  # which is why
    folder.rename(tmp_path / "out")
    load(str(tmp_path / "out"), trust_remote_code=True)


COMMAND_LINE = (
    WITHOUT_MOHAWKIFY + "import runpy; sys.argv[0] = 'mlx_lm'; runpy.run_module('mlx_lm', run_name='__main__')"
)
ARGUMENTS = ("generate", "--trust-remote-code", "--ignore-chat-template", "--temp", "0", "--verbose", "False")


@pytest.mark.full
def test_mlx_lm_writes_the_students_text_without_mohawkify(tmp_path, stories_teacher):
    from mohawkify.files.atomic import atomic_directory, write_json
    from mohawkify.recipe.loading import dump_recipe, load_recipe
    from mohawkify.recipe.schema import StudentRecipe
    from mohawkify.student.build import build_student, design_student
    from mohawkify.teacher.load import load_teacher
    from mohawkify.teacher.resolve import resolve_teacher
    from mohawkify.teacher.tokenizer import load_tokenizer

    found = resolve_teacher(str(stories_teacher))
    teacher = load_teacher(found, dtype=torch.float32, device=torch.device("cpu"))
    spec = design_student("stories", found.spec, found.config, found.adapter, StudentRecipe(state_size=16))
    student = build_student(teacher, found.adapter, spec, "attention", 0).eval()
    tokenizer = load_tokenizer(stories_teacher, 512)
    with atomic_directory(tmp_path / "final") as final:
        save_student(student, tokenizer, final)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(load_recipe("stories")))
    write_json(tmp_path / "results.json", {"teacher": {}, "stages": {}})
    write_json(tmp_path / "teacher.json", {"source": str(stories_teacher), "folder": str(stories_teacher), "files": {}})
    for target, dtype in (("mlx-q4", None), ("mlx", "float32")):
        export_run(tmp_path, target, tmp_path / target, dtype=dtype, report=quiet)
        for file in (tmp_path / target).iterdir():
            for path in (str(tmp_path), str(stories_teacher), str(Path.home()), str(Path.cwd())):
                assert path.encode() not in file.read_bytes(), f"{file.name} holds {path}"

    prompt = "Once upon a time"
    arguments = (*ARGUMENTS, "--prompt", prompt, "--max-tokens", "24", "--model")
    assert run_python(COMMAND_LINE, tmp_path, *arguments, str(tmp_path / "mlx-q4")).stdout.strip() != ""
    text = run_python(COMMAND_LINE, tmp_path, *arguments, str(tmp_path / "mlx")).stdout
    ids = torch.tensor([tokenizer.encode(prompt)])
    written = student.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=2)[0, ids.shape[1] :]
    assert text.strip() == tokenizer.decode(written, skip_special_tokens=True).strip() != ""


def test_what_mlx_cannot_run_is_refused(tmp_path, monkeypatch):
    finished_run(tmp_path, "qwen2", keep=(1,))
    with pytest.raises(ExportError, match="layer 1 keeps attention through a sliding window"):
        export_run(tmp_path, "mlx", tmp_path / "out", report=quiet)
    monkeypatch.setattr(mlx_target.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="needs mlx_lm") as refusal:
        export_run(tmp_path, "mlx", tmp_path / "out", report=quiet)
    assert refusal.value.hint == 'pip install "mohawkify[mlx]"'
    assert not (tmp_path / "out").exists()


def test_the_shipped_code_refuses_a_module_that_is_not_mlx_lms():
    from mohawkify.exporters.mlx_model import ModelArgs

    with pytest.raises(ValueError, match="expected the name of a module"):
        ModelArgs.from_dict({"mlx_module": "..os"})


def test_the_configuration_names_the_bytes_tokenizers_end(tmp_path):
    finished_run(tmp_path)
    export_run(tmp_path, "mlx", tmp_path / "out", dtype="float32", report=quiet)
    _, tokenizer = load(str(tmp_path / "out"), trust_remote_code=True)
    assert tokenizer.eos_token_ids == {bytes_tokenizer().eos_token_id}
