"""Llamba checkpoints in and out: a hand-made one means what its recurrence says, and comes back byte for byte."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from mohawkify.recipe.schema import StudentRecipe
from mohawkify.run.folder import RunFolder
from mohawkify.student.save import load_student
from tests.bytes_tokenizer import bytes_tokenizer
from tests.close import assert_close
from tests.commands import make_recipe, make_teacher, run, run_well
from tests.finished import finished_run

LAYERS, WIDTH, HEADS, STATE, INNER, ROWS, TAPS = 2, 32, 4, 8, 32, 264, 4
FEATURES = INNER + 2 * HEADS * STATE  # of the convolution: x, B and C
CONFIG: dict[str, Any] = {
    "model_type": "llamba",
    "vocab_size": 258,  # padded to 264 rows
    "d_model": WIDTH,
    "n_layer": LAYERS,
    "tie_embeddings": False,
    "pad_vocab_size_multiple": 8,
    "lm_head_bias": False,
    "norm_epsilon": 1e-5,
    "resid_dropout": 0.0,
    "mlp_cfg": {"intermediate_size": 48, "bias": False, "act_fn": "silu"},
    "ssm_cfg": {
        "d_state": STATE, "n_v_heads": HEADS, "n_qk_heads": HEADS, "expand": 1, "chunk_size": 128,
        "activation": "identity", "bias": False,
    },
}  # fmt: skip


def weights(dtype: torch.dtype, is_tied: bool = False) -> dict[str, Tensor]:
    """Random weights under the published names."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, around: float = 0.0) -> Tensor:
        return (around + 0.3 * torch.randn(*shape, generator=generator)).to(dtype)

    made = {
        "backbone.embedding.weight": random(ROWS, WIDTH),
        "backbone.final_layernorm.weight": random(WIDTH, around=1.0),
    }
    for index in range(LAYERS):
        layer = {
            "input_layernorm.weight": random(WIDTH, around=1.0),
            "post_attention_layernorm.weight": random(WIDTH, around=1.0),
            "mixer.in_proj.weight": random(FEATURES + INNER + HEADS, WIDTH),
            "mixer.z_bias": random(INNER, around=1.0),
            "mixer.conv1d.weight": random(FEATURES, 1, TAPS),
            "mixer.conv1d.bias": random(FEATURES),
            "mixer.D": random(HEADS, around=1.0),
            "mixer.out_proj.weight": random(WIDTH, INNER),
            "mlp.gate_proj.weight": random(48, WIDTH),
            "mlp.up_proj.weight": random(48, WIDTH),
            "mlp.down_proj.weight": random(WIDTH, 48),
        }
        made |= {f"backbone.layers.{index}.{name}": tensor for name, tensor in layer.items()}
    return made if is_tied else made | {"lm_head.weight": random(ROWS, WIDTH)}


def make_llamba(folder: Path, tensors: dict[str, Tensor], tokenizer: bool = True, **changes: Any) -> Path:
    """Write a checkpoint."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    save_file(tensors, folder / "model.safetensors")
    if tokenizer:
        bytes_tokenizer().save_pretrained(folder)
    return folder


def recurrence(tensors: dict[str, Tensor], ids: Tensor, activation: Any = lambda u: u) -> Tensor:
    """The logits (l, v), token after token in float64, straight from the layout's definition."""
    t = {name: tensor.double() for name, tensor in tensors.items()}

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean() + 1e-5) * weight

    states = [torch.zeros(HEADS, INNER // HEADS, STATE, dtype=torch.float64) for _ in range(LAYERS)]
    tails = [torch.zeros(FEATURES, TAPS, dtype=torch.float64) for _ in range(LAYERS)]
    logits = []
    for token in ids.tolist():
        hidden = t["backbone.embedding.weight"][token]
        for index in range(LAYERS):
            layer = {
                name.removeprefix(f"backbone.layers.{index}."): tensor
                for name, tensor in t.items()
                if name.startswith(f"backbone.layers.{index}.")
            }
            projected = layer["mixer.in_proj.weight"] @ norm(hidden, layer["input_layernorm.weight"])
            mixed, z, a_log = projected.split([FEATURES, INNER, HEADS])
            tails[index] = torch.cat([tails[index][:, 1:], mixed.unsqueeze(1)], dim=1)
            mixed = activation(
                (tails[index] * layer["mixer.conv1d.weight"].squeeze(1)).sum(1) + layer["mixer.conv1d.bias"]
            )
            x, b, c = mixed.split([INNER, HEADS * STATE, HEADS * STATE])
            x, b, c = x.view(HEADS, -1), b.view(HEADS, STATE), c.view(HEADS, STATE)
            decay = torch.exp(-F.softplus(a_log)).view(HEADS, 1, 1)
            states[index] = decay * states[index] + x.unsqueeze(2) * b.unsqueeze(1)
            y = (states[index] * c.unsqueeze(1)).sum(2) + layer["mixer.D"].unsqueeze(1) * x
            hidden = hidden + layer["mixer.out_proj.weight"] @ (y.flatten() * F.silu(z + layer["mixer.z_bias"]))
            inner = norm(hidden, layer["post_attention_layernorm.weight"])
            gate = F.silu(layer["mlp.gate_proj.weight"] @ inner)
            hidden = hidden + layer["mlp.down_proj.weight"] @ (gate * (layer["mlp.up_proj.weight"] @ inner))
        final = norm(hidden, t["backbone.final_layernorm.weight"])
        logits.append(t.get("lm_head.weight", t["backbone.embedding.weight"]) @ final)
    return torch.stack(logits)


@torch.no_grad()
@pytest.mark.parametrize(
    ("dtype", "is_tied", "changes"),
    [
        (torch.float32, False, {}),
        (torch.bfloat16, True, {"tie_embeddings": True}),
        (torch.float32, False, {"ssm_cfg": {**CONFIG["ssm_cfg"], "activation": "silu"}}),
    ],
)
def test_a_checkpoint_computes_what_its_recurrence_says_and_comes_back_byte_for_byte(tmp_path, dtype, is_tied, changes):
    tensors = weights(dtype, is_tied)
    folder = make_llamba(tmp_path / "llamba", tensors, **changes)
    run_well("import", folder, "--output", tmp_path / "run")
    student = load_student(RunFolder(tmp_path / "run").checked_final())
    ids = torch.randint(258, (40,), generator=torch.Generator().manual_seed(1))
    activation = F.silu if "ssm_cfg" in changes else lambda u: u
    assert_close("logits", student(ids.unsqueeze(0)).logits[0], recurrence(tensors, ids, activation).float())
    steps = student(ids[:20].unsqueeze(0), use_cache=True)
    later = student(ids[20:21].unsqueeze(0), past_key_values=steps.past_key_values).logits[0]
    assert_close("a step", later, recurrence(tensors, ids[:21], activation)[-1:].float())
    name = str(dtype).removeprefix("torch.")
    run_well("export", tmp_path / "run", "--target", "llamba", "--dtype", name)
    export = tmp_path / "run" / "exports" / "llamba"
    back = load_file(export / "model.safetensors")
    assert back.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert back[key].dtype == tensor.dtype
        assert torch.equal(back[key], tensor), key
    config = json.loads((export / "config.json").read_text())
    assert config == {
        **CONFIG,
        **changes,
        "vocab_size": ROWS,
        "ssm_cfg": {**config["ssm_cfg"], **changes.get("ssm_cfg", {})},
    }
    run_well("import", export, "--output", tmp_path / "again")
    again = load_student(RunFolder(tmp_path / "again").checked_final())
    assert torch.equal(again(ids.unsqueeze(0)).logits, student(ids.unsqueeze(0)).logits)


def test_both_spellings_of_keys_are_read(tmp_path):
    tensors = weights(torch.float32, is_tied=True)
    make_llamba(tmp_path / "one", tensors, tie_embeddings=True)
    names = {"d_model": "hidden_size", "n_layer": "num_hidden_layers", "tie_embeddings": "tie_word_embeddings"}
    config = {names.get(key, key): value for key, value in {**CONFIG, "tie_embeddings": True}.items()}
    spelt = {
        f"model.{name}".replace("embedding.weight", "embeddings.weight"): tensor.squeeze(1)
        if "conv1d.w" in name
        else tensor
        for name, tensor in tensors.items()
    }
    spelt["lm_head.weight"] = tensors["backbone.embedding.weight"].clone()
    make_llamba(tmp_path / "two", spelt)
    (tmp_path / "two" / "config.json").write_text(json.dumps({"config": config}))
    for name in ("one", "two"):
        run_well("import", tmp_path / name, "--output", tmp_path / f"run-{name}")
    one, two = (load_file(tmp_path / f"run-{name}" / "final" / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_an_imported_run_is_measured_and_talked_with(tmp_path):
    teacher = make_teacher(tmp_path / "teacher", vocab_size=ROWS)
    folder = make_llamba(tmp_path / "llamba", weights(torch.float32), tokenizer=False)
    refused = run("import", folder, "--output", tmp_path / "run")
    assert refused.exit_code == 66
    assert "--teacher" in refused.stderr.splitlines()[-1]
    recipe = make_recipe(tmp_path)
    run_well("import", folder, "--output", tmp_path / "run", "--teacher", teacher, "--recipe", recipe)
    assert "perplexity" in run_well("eval", tmp_path / "run").stdout
    assert run_well("generate", tmp_path / "run", "The cat", "--max-tokens", 5).stdout.startswith("The cat")
    assert RunFolder(tmp_path / "run").recipe().student.state_size == STATE
    assert run_well("doctor", tmp_path / "run").exit_code == 0
    assert "is not empty" in run("import", folder, "--output", tmp_path / "run").stderr


@pytest.mark.parametrize(
    ("says", "change"),
    [
        ("expected llamba", {"model_type": "llama"}),
        ("has a n_qk_heads", {"ssm_cfg": {**CONFIG["ssm_cfg"], "n_qk_heads": 2}}),
        ("has a norm_epsilon", {"norm_epsilon": 1e-6}),
        ("has a lm_head_bias", {"lm_head_bias": True}),
        ("as d_model, expected a count", {"d_model": "wide"}),
        ("backbone.layers.2.", {"n_layer": 3}),
        ("backbone.layers.1.", {"n_layer": 1}),
        ("lm_head.weight as", {"tie_embeddings": True}),
    ],
)
def test_what_is_no_such_checkpoint_is_one_line(tmp_path, says, change):
    folder = make_llamba(tmp_path / "llamba", weights(torch.float32), **change)
    refused = run("import", folder, "--output", tmp_path / "run")
    assert refused.exit_code == 66, refused.stderr
    assert says in refused.stderr
    assert not (tmp_path / "run").exists()


def test_a_damaged_checkpoint_is_one_line(tmp_path):
    tensors = weights(torch.float32)
    tensors["backbone.layers.0.mixer.D"][1] = torch.nan
    make_llamba(tmp_path / "nan", tensors)
    whole = (make_llamba(tmp_path / "cut", weights(torch.float32)) / "model.safetensors").read_bytes()
    (tmp_path / "cut" / "model.safetensors").write_bytes(whole[:-9])
    for name, says in (("nan", "mixer.D with values that are not finite"), ("cut", "is damaged or truncated")):
        refused = run("import", tmp_path / name, "--output", tmp_path / "run")
        assert (refused.exit_code, says in refused.stderr) == (66, True)


def test_students_that_the_layout_has_no_place_for_are_told_the_key(tmp_path, monkeypatch):
    def refused(name: str, says: str, **changes: Any) -> None:
        finished_run(tmp_path / name, **changes)
        done = run("export", tmp_path / name, "--target", "llamba")
        assert done.exit_code == 73
        assert says in done.stderr
        assert not (tmp_path / name / "exports").exists()

    refused("biased", "hint: student.decay_bias: false")
    refused("hybrid", "hint: student.keep: {}", keep=(1,))
    monkeypatch.setattr("tests.finished.StudentRecipe", partial(StudentRecipe, decay_bias=False))
    refused("decaying", "hint: student.write: plain", mixer="mamba2")
    refused("epsilon", "norms with epsilon 1e-06, expected RMS norms with 1e-05", rms_norm_eps=1e-6)
    refused("biases", "has no place for model.layers.0", rms_norm_eps=1e-5)  # the tiny Llama has biases


def test_a_student_of_another_family_without_a_particularity_leaves_as_well(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.finished.StudentRecipe", partial(StudentRecipe, decay_bias=False))
    finished_run(tmp_path / "run", family="qwen2", rms_norm_eps=1e-5)
    run_well("export", tmp_path / "run", "--target", "llamba", "--dtype", "float32")
    run_well("import", tmp_path / "run" / "exports" / "llamba", "--output", tmp_path / "again")
    ids = torch.arange(30).unsqueeze(0)
    one, two = (load_student(RunFolder(tmp_path / name).checked_final()) for name in ("run", "again"))
    with torch.no_grad():
        assert_close("logits", two(ids).logits, one(ids).logits)
