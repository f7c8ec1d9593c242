"""`mohawkify doctor FOLDER`: sound folders pass, every damage is named, and torch is never loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mohawkify.verdict import judge
from tests.commands import copy_of, make_recipe, make_teacher, run, run_well


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A folder with a teacher, a finished run of it, and an export."""
    folder = tmp_path_factory.mktemp("work")
    make_teacher(folder / "teacher")
    recipe = make_recipe(folder)
    run_well("convert", folder / "teacher", "--recipe", recipe, "--output", folder / "run")
    run_well("export", folder / "run", "--target", "hf", "--output", folder / "export")
    return folder


def checkpoint_of(folder: Path) -> Path:
    return max((folder / "run" / "checkpoints").iterdir())


PARTS = {
    "teacher": ("teacher", lambda folder: folder / "teacher"),
    "run": ("run", lambda folder: folder / "run"),
    "checkpoint": ("checkpoint", checkpoint_of),
    "student": ("student or export", lambda folder: folder / "run" / "final"),
    "export": ("student or export", lambda folder: folder / "export"),
}


@pytest.mark.parametrize("part", PARTS)
def test_what_is_as_it_was_written_is_sound(work, part):
    kind, place = PARTS[part]
    found = json.loads(run_well("doctor", place(work), "--json").stdout)
    assert found["kind"] == kind
    assert found["sound"]
    assert found["findings"]
    assert "sound" in run_well("doctor", place(work)).stdout


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damaged_weights_are_named(work, tmp_path, part, damage):
    copy_of(work, tmp_path / "work")
    folder = PARTS[part][1](tmp_path / "work")
    weights = (folder / "final" if part == "run" else folder) / "model.safetensors"
    content = bytearray(weights.read_bytes())
    if damage == "flip":
        # In a teacher, which has no manifest yet, only what is no number any more can be noticed.
        content[-1 if part != "teacher" else 7] ^= 0x10
        weights.write_bytes(content)
    elif damage == "truncate":
        weights.write_bytes(content[:-3])
    else:
        weights.unlink()
    refused = run("doctor", folder)
    assert refused.exit_code == 66
    assert "REFUSED" in refused.stdout
    assert "model.safetensors" in refused.stdout
    assert not judge(folder)["sound"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_found_in_every_type(work, tmp_path, dtype, value):
    folder = copy_of(work / "teacher", tmp_path / "teacher")
    file = folder / "model.safetensors"
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    assert judge(folder)["sound"]
    tensors["model.norm.weight"][3] = value
    save_file(tensors, file, metadata={"format": "pt"})
    bad = [finding for finding in judge(folder)["findings"] if not finding["sound"]]
    assert [finding["says"] for finding in bad] == [
        "model.norm.weight in model.safetensors holds a value that is not finite"
    ]


def test_what_is_never_read_is_listed(work, tmp_path):
    folder = copy_of(work / "teacher", tmp_path / "teacher")
    for name in ("pytorch_model.bin", "modeling_evil.py", "rng_state.pth"):
        (folder / name).write_text("raise SystemExit")
    found = judge(folder)
    assert found["sound"]
    assert found["never_read"] == ["modeling_evil.py", "pytorch_model.bin", "rng_state.pth"]
    assert "never read or run: modeling_evil.py" in run_well("doctor", folder).stdout


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    refused = run("doctor", tmp_path / "nowhere")
    assert refused.exit_code == 2
    assert "no such folder" in refused.stderr


def test_what_mohawkify_neither_writes_nor_reads_is_not_sound(work, tmp_path):
    for folder in (tmp_path, work / "run" / "checkpoints"):
        refused = run("doctor", folder)
        assert refused.exit_code == 66
        assert "nothing that mohawkify writes or reads" in refused.stdout


def edit_recipe(folder: Path) -> None:
    file = folder / "run" / "recipe.yaml"
    file.write_text(file.read_text().replace("seed: 0", "seed: 1"))


def edit_teacher(folder: Path) -> None:
    facts = folder / "run" / "teacher.json"
    told = json.loads(facts.read_text())
    told["folder"] = str(folder / "teacher")
    facts.write_text(json.dumps(told))
    (folder / "teacher" / "config.json").write_text((folder / "teacher" / "config.json").read_text() + " ")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (edit_recipe, "belongs to another recipe or teacher"),
        (edit_teacher, "is not the file that the run was made from"),
        (lambda folder: (folder / "run" / "metrics.jsonl").unlink(), "metrics.jsonl is missing or empty"),
    ],
)
def test_a_run_that_a_command_would_refuse_is_not_sound(work, tmp_path, damage, says):
    copy_of(work, tmp_path / "work")
    damage(tmp_path / "work")
    refused = run("doctor", tmp_path / "work" / "run")
    assert refused.exit_code == 66
    assert says in refused.stdout


@pytest.mark.parametrize("part", PARTS)
def test_torch_is_not_loaded(work, part):
    code = (
        "import sys\nfrom mohawkify.cli import main\n"
        "try:\n    main()\nfinally:\n    assert not {'torch', 'transformers', 'mlx'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "doctor", str(PARTS[part][1](work))], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
