"""Any content of a run's small files: read as before, or one clear error; nothing outside the folder is opened.

The doctor reports of each the error that reading it raises, and raises none itself.
"""

from __future__ import annotations

import json
import shutil
import sys
from functools import cache
from pathlib import Path
from random import Random
from tempfile import mkdtemp
from typing import Any

import pytest
import torch

from mohawkify.doctor.check_folder import check_folder
from mohawkify.errors import CheckpointError, MohawkifyError
from mohawkify.files import atomic
from mohawkify.files.manifest import sealed
from mohawkify.run.checkpoint import load_tensors, newest_valid, restore_rng, save_checkpoint
from mohawkify.run.folder import RunFolder, finished_run
from tests.files.faults import content_of
from tests.fuzz.campaign import require_message, run_campaign
from tests.fuzz.folders import changed, decode, encode, inside
from tests.fuzz.mutate import PATHS, mutate_bytes, mutate_json, mutate_lines, odd_value, render, render_twice

STEP = "checkpoints/step-00000004"
JUDGED = 0.25  # of the inputs are shown to the doctor too, who reads all of the run
BYTES = "every byte as it was written"
STATE = {
    "identity": "0" * 64,
    "text": {"train": "1" * 64},
    "training_state": {"stage": "align", "stage_step": 3, "global_step": 4, "tokens": 512, "seconds": {"orient": 1.5}},
}
RESULTS = {
    "teacher": {"perplexity": 8.25},
    "stages": {"init": {"tokens": 0, "perplexity": 90.5, "kl": 3.0, "top1": 0.25, "seconds": 0.0}},
    "evaluation_tokens": 200,
}
LAYER = {"kind": "discrete_mamba2", "mixer_heads": 4, "attention_heads": 0}
FACTS = {"source": "demo", "folder": "/nowhere/teacher", "files": {"config.json": "2" * 64}, "num_hidden_layers": 3}
RECIPE = """\
name: tiny
description: a few steps of every stage
student: {init: attention}
stages:
  orient: {tokens: 128, sequence_length: 16, batch_sequences: 4, learning_rate: 1e-3}
  align: {tokens: 128, sequence_length: 16, batch_sequences: 4, learning_rate: 1e-3}
  distill: {tokens: 192, sequence_length: 16, batch_sequences: 4, learning_rate: 1e-3}
"""
LINES = [{"stage": "orient", "step": step, "loss": 0.5, "learning_rate": 1e-3} for step in range(3)]


def make_run(folder: Path) -> Path:
    """Write a finished run with files of a few bytes."""
    torch.manual_seed(0)
    save_checkpoint(
        folder / "checkpoints",
        global_step=4,
        model_tensors={"weight": torch.ones(2)},
        optimizer_tensors={"weight.moment": torch.zeros(2)},
        state=STATE,
    )
    (folder / "final").mkdir()
    (folder / "recipe.yaml").write_text(RECIPE)
    for name, value in (("results", RESULTS), ("teacher", FACTS), ("student", {"name": "x", "layer_specs": [LAYER]})):
        atomic.write_json(folder / f"{name}.json", value)
    for line in LINES:
        atomic.append_line(folder / "metrics.jsonl", line)
    return folder


@cache
def originals() -> dict[str, bytes]:
    """The files of such a run, the same for every process."""
    folder = Path(mkdtemp())
    try:
        return content_of(make_run(folder / "run"))
    finally:
        shutil.rmtree(folder)


def draw(rng: Random) -> bytes:
    """One file with other content; a checkpoint's sometimes with a manifest that fits it again."""
    files = originals()
    name = rng.choice([*(name for name in files if not name.endswith((".safetensors", ".lock"))), f"{STEP}/state.json"])
    data = files[name]
    kind = rng.random()
    if kind < 0.25:
        data = mutate_bytes(rng, data)
    elif name.endswith(".yaml"):
        data = mutate_lines(rng, data.decode()).encode("utf-8", "surrogatepass")
    elif name.endswith(".jsonl"):
        lines = [render(mutate_json(rng, line)) if rng.random() < 0.5 else render(line) for line in LINES]
        data = ("\n".join(lines) + rng.choice(("\n", "", "\n\n"))).encode("utf-8", "surrogatepass")
    elif kind < 0.3:
        data = render(odd_value(rng)).encode("utf-8", "surrogatepass")
    else:
        value = _mutated_manifest(rng, data) if name.endswith("manifest.json") else mutate_json(rng, json.loads(data))
        data = (render_twice(rng, value) if rng.random() < 0.05 else render(value)).encode("utf-8", "surrogatepass")
    is_sealed = name.startswith(STEP) and rng.random() < 0.5
    return encode({name: data}, sealed=is_sealed, judged=rng.random() < JUDGED)


def _mutated_manifest(rng: Random, data: bytes) -> Any:
    manifest = json.loads(data)
    if rng.random() < 0.5:
        manifest["files"][rng.choice(PATHS)] = rng.choice(list(manifest["files"].values()))
        return manifest
    return mutate_json(rng, manifest)


def _seal(folder: Path, name: str) -> None:
    """Let a checkpoint's manifest fit its files, or itself, as whoever made it up would."""
    manifest = folder / STEP / atomic.MANIFEST_NAME
    if not name.endswith(atomic.MANIFEST_NAME):
        manifest.unlink()
        atomic._write_manifest(folder / STEP, {"checkpoint_format": 1, "global_step": 4})
        return
    try:
        body = json.loads(manifest.read_bytes())
        if isinstance(body, dict):
            manifest.write_bytes(sealed({key: body[key] for key in body if key != "sha256"}, manifest))
    except (ValueError, RecursionError, MohawkifyError):
        pass  # it is not strict JSON: nothing to seal


def read_all(folder: Path, name: str) -> Any:
    """Read a run's file with the functions that do."""
    run = RunFolder(folder)
    if name.startswith(STEP):
        found = newest_valid(run.checkpoints, lambda line: None)
        if found is not None:
            tensors = {group: load_tensors(found, group) for group in ("model", "optimizer", "rng")}  # type: ignore[arg-type]
            restore_rng(tensors["rng"])
        return None if found is None else json.dumps(found.state)
    if name == "recipe.yaml":
        return run.recipe().name
    if name == "metrics.jsonl":
        return len(atomic.read_lines(run.metrics_file))
    if name == "results.json":
        results = finished_run(folder).results()
        assert isinstance(results["stages"], dict)
        assert isinstance(results["teacher"], dict)
        return len(results["stages"])
    value = atomic.read_json(folder / name)
    run.write_results({"teacher": value, "stages": {}})  # what was read can be written
    (folder / "results.json").write_bytes(originals()["results.json"])
    return value


@pytest.fixture
def run_folder(folder: Path) -> Path:
    folder = make_run(folder / "run")
    for name in originals():
        read_all(folder, name)  # what is imported once does not count
    return folder


def test_any_small_file(run_folder: Path) -> None:
    expected = read_all(run_folder, STEP)

    def check(case: bytes) -> None:
        changes, facts = decode(case)
        (name,) = changes
        is_sealed = facts["sealed"]
        with changed(run_folder, {**originals()}, {**changes, **_manifest(name)}):
            (run_folder / name).write_bytes(changes[name] or b"")
            if is_sealed:
                _seal(run_folder, name)
            # What was made up may name a teacher anywhere, which the doctor reads.
            with inside(run_folder, only_written=True):
                checks = check_folder(run_folder)["checks"] if facts.get("judged", True) else []
            part = f"{STEP}: {BYTES}" if name.startswith(STEP) else name
            is_valid = {check["name"]: check["passed"] for check in checks}.get(part)
            with inside(run_folder):
                try:
                    found = read_all(run_folder, name)
                except MohawkifyError as error:
                    require_message(error)
                    assert not is_valid, "the doctor calls valid what is refused"
                    return
        if name.startswith(STEP):
            assert is_valid in (None, found is not None)
            same = changes[name] == originals()[name]
            assert is_sealed or found == (expected if same else None)

    run_campaign("run-files", 1500, draw, check)


def _manifest(name: str) -> dict[str, bytes]:
    """A checkpoint's manifest is brought back after each case, since sealing changes it."""
    manifest = f"{STEP}/{atomic.MANIFEST_NAME}"
    return {manifest: originals()[manifest]} if name.startswith(STEP) else {}


def _depths_at_the_limit() -> range:
    """Nestings that Python reads and may not be able to write; which these are depends on how deep the caller is."""
    depth = sys.getrecursionlimit()
    while True:
        try:
            json.loads("[" * depth + "]" * depth)
        except RecursionError:
            depth -= 1
        else:
            return range(depth - 15, depth + 2)


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_a_manifest_nested_to_the_limit_is_passed_over(run_folder: Path, opening: str, closing: str) -> None:
    manifest = f"{STEP}/{atomic.MANIFEST_NAME}"
    for depth in _depths_at_the_limit():
        text = f'{{"format": "mohawkify-manifest", "facts": {opening * depth}0{closing * depth}}}'
        with changed(run_folder, originals(), {manifest: text.encode()}):
            assert read_all(run_folder, STEP) is None


def test_a_damaged_checkpoint_is_named(run_folder: Path) -> None:
    with changed(run_folder, originals(), {f"{STEP}/state.json": b"{}"}), pytest.raises(CheckpointError):
        atomic.verify_directory(run_folder / STEP)
