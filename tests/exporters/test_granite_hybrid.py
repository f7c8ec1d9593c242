"""The target mamba2: a student as a model that engines have, without code; what is refused, quantised and trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mohawkify.errors import ExportError
from mohawkify.exporters.export import export_run
from tests.finished import WITHOUT_MOHAWKIFY, answer, finished_run, run_python

LOAD = (
    WITHOUT_MOHAWKIFY
    + """
import json, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
ids = AutoTokenizer.from_pretrained(sys.argv[1])("Once upon a time", return_tensors="pt").input_ids
written = model.generate(ids, max_new_tokens=256, min_new_tokens=256, do_sample=False, pad_token_id=0)
print(json.dumps([type(model).__module__, ids.tolist(), written[0, ids.shape[1]:].tolist()]))
"""
)


def quiet(line: str) -> None:
    """Report to nobody."""


def run_of(folder: Path, keep: tuple[int, ...] = (), family: str = "llama", **changes: Any) -> Any:
    """A finished run whose writes are by decay; returns the student."""
    return finished_run(folder, family, keep, options={"write": "decay"}, **changes)


def test_a_fresh_process_without_mohawkify_writes_the_students_text_and_no_code_is_there(tmp_path: Path) -> None:
    student = run_of(tmp_path)
    result = export_run(tmp_path, "mamba2", tmp_path / "out", dtype="float32", report=quiet)
    assert result["kl"] < 1e-5
    assert result["max_logit_difference"] < 1e-5 * max(1, result["scale"])
    assert not list((tmp_path / "out").glob("*.py"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "granitemoehybrid"
    assert config["layer_types"] == ["mamba"] * 3 + ["attention"]
    assert "auto_map" not in config
    module, ids, written = answer(run_python(LOAD, tmp_path, str(tmp_path / "out")))
    assert module.startswith("transformers.")
    settings = {"max_new_tokens": 256, "min_new_tokens": 256, "do_sample": False, "pad_token_id": 0}
    assert student.generate(torch.tensor(ids), **settings)[0, len(ids[0]) :].tolist() == written
    card = (tmp_path / "out" / "README.md").read_text()
    assert "trust_remote_code" not in card
    assert "vllm serve" in card


def test_bfloat16_rounds_no_more_than_it_must(tmp_path: Path) -> None:
    run_of(tmp_path, keep=(1,))
    stock = export_run(tmp_path, "mamba2", tmp_path / "out", report=quiet)
    own = export_run(tmp_path, "hf", tmp_path / "hf", report=quiet)
    assert 0 < stock["kl"] < 10 * own["kl"]
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    precise = {name for name, tensor in tensors.items() if tensor.dtype == torch.float32}
    assert precise == {name for name in tensors if name.endswith((".A_log", ".D", ".dt_bias"))}
    for name, tensor in tensors.items():
        if name.endswith("mamba.norm.weight"):
            assert torch.equal(tensor.float().log2() % 1, torch.zeros(len(tensor)))  # powers of two


def test_heads_that_do_not_fill_the_width_are_filled_up_with_zeros(tmp_path: Path) -> None:
    run_of(tmp_path, family="qwen3")  # 4 heads of 12 beside a width of 32
    result = export_run(tmp_path, "mamba2", tmp_path / "out", dtype="float32", report=quiet)
    assert result["kl"] < 1e-5
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["mamba_n_heads"], config["mamba_d_head"], config["mamba_expand"]) == (8, 12, 3)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({}, "student.write: decay"),
        ({"write": "decay", "conv_activation": "silu"}, "student.conv_activation: none"),
        ({"write": "decay", "gated_norm": True}, "student.gated_norm: false"),
    ],
)
def test_a_mixer_that_is_another_is_refused_with_its_key(tmp_path: Path, options: dict[str, Any], key: str) -> None:
    finished_run(tmp_path, options=options)
    lines: list[str] = []
    with pytest.raises(ExportError, match="GraniteMoeHybrid has no counterpart of student") as refusal:
        export_run(tmp_path, "mamba2", tmp_path / "out", report=lines.append)
    assert key in (refusal.value.hint or "")
    assert len(lines) == 1


def test_a_family_that_is_another_is_refused(tmp_path: Path) -> None:
    run_of(tmp_path, family="gemma2", num_hidden_layers=2)
    with pytest.raises(ExportError, match="has no layers like those of Gemma 2"):
        export_run(tmp_path, "mamba2", tmp_path / "out", report=quiet)


def test_kept_heads_and_windows_are_refused_with_their_keys(tmp_path: Path) -> None:
    for name, keep, key in (
        ("heads", {"heads": [(1, 0), (1, 1)]}, "student.keep.heads: []"),
        ("window", {"layers": [1], "window": 8}, "student.keep.window: null"),
    ):
        run_of(tmp_path / name, keep=keep)  # type: ignore[arg-type]
        with pytest.raises(ExportError, match="GraniteMoeHybrid has no counterpart of the") as refusal:
            export_run(tmp_path / name, "mamba2", tmp_path / "out", report=quiet)
        assert key in (refusal.value.hint or "")


def test_what_is_left_over_is_refused(tmp_path: Path) -> None:
    run_of(tmp_path, family="ernie4_5")
    with pytest.raises(ExportError, match=r"no place for the student's model\.layers\.0\.mlp\.down_proj\.bias"):
        export_run(tmp_path, "mamba2", tmp_path / "out", report=quiet)


@pytest.mark.parametrize(("target", "bits", "largest_kl"), [("mamba2-mlx-q8", 8, 0.05), ("mamba2-mlx-q4", 4, 1.0)])
def test_mlx_lm_opens_it_plain_and_quantised(tmp_path: Path, target: str, bits: int, largest_kl: float) -> None:
    pytest.importorskip("mlx_lm", reason="needs mlx-lm: pip install 'mohawkify[mlx]'")
    import mlx.core as mx
    import numpy
    from mlx_lm import load
    from mlx_lm.generate import generate_step

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 8}
    student = run_of(tmp_path, keep=(1,), rope_parameters={"rope_type": "default", "rope_theta": 300.0}, **sizes)
    export_run(tmp_path, "mamba2", tmp_path / "plain", dtype="float32", report=quiet)
    model, _ = load(str(tmp_path / "plain"))
    prompt = torch.randint(3, 256, (1, 70), generator=torch.Generator().manual_seed(3))
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected = student.generate(prompt, **settings)[0, 70:].tolist()
    assert [int(token) for token, _ in generate_step(mx.array(prompt[0].numpy()), model, max_tokens=12)] == expected

    result = export_run(tmp_path, target, tmp_path / "out", report=quiet)
    assert 0 < result["kl"] < largest_kl
    model, _ = load(str(tmp_path / "out"))
    assert numpy.isfinite(numpy.array(model(mx.array(prompt.numpy())).astype(mx.float32))).all()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization"]["bits"] == bits
    assert config["quantization"].get("model.layers.0.mamba.in_proj", {"bits": bits})["bits"] == 8


def test_rotations_that_mlx_lm_lacks_are_refused_where_layers_keep_attention(tmp_path: Path) -> None:
    pytest.importorskip("mlx_lm", reason="needs mlx-lm: pip install 'mohawkify[mlx]'")
    run_of(tmp_path, keep=(1,))  # the rotations of Llama 3
    with pytest.raises(ExportError, match="mlx-lm's granitemoehybrid has no rotation of the kind llama3"):
        export_run(tmp_path, "mamba2-mlx-q4", tmp_path / "out", report=quiet)
