"""`mohawkify doctor FOLDER`: valid folders pass, every damage is named, and torch is loaded for teachers alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mohawkify.data import corpus
from mohawkify.doctor.check_folder import check_folder
from mohawkify.files import atomic
from tests.commands import copy_of, make_recipe, make_teacher, run, run_well
from tests.teacher.damage import edit_json


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A folder with a teacher, a finished run of it, an export, its text, and logits of it."""
    folder = tmp_path_factory.mktemp("work")
    make_teacher(folder / "teacher")
    recipe = make_recipe(folder)
    run_well("convert", folder / "teacher", "--recipe", recipe, "--output", folder / "run")
    run_well("export", folder / "run", "--target", "hf", "--output", folder / "export")
    arguments = (folder / "teacher", "--recipe", recipe, "--output")
    run_well("data", "prepare", *arguments, folder / "text")
    run_well("cache-logits", *arguments, folder / "logits", "--stage-phase", "train", "--top-k", "3")
    return folder


def checkpoint_of(folder: Path) -> Path:
    return max((folder / "run" / "checkpoints").iterdir())


def corpus_of(folder: Path) -> Path:
    return min((folder / "text").glob("[!.]*"))


PARTS = {
    "teacher": ("teacher", lambda folder: folder / "teacher"),
    "run": ("run", lambda folder: folder / "run"),
    "checkpoint": ("checkpoint", checkpoint_of),
    "student": ("student or export", lambda folder: folder / "run" / "final"),
    "export": ("student or export", lambda folder: folder / "export"),
    "text": ("prepared text", lambda folder: folder / "text"),
    "corpus": ("prepared text", corpus_of),
    "logits": ("teacher logits", lambda folder: folder / "logits"),
}
MODELS = ("teacher", "run", "checkpoint", "student", "export")


@pytest.mark.parametrize("part", PARTS)
def test_what_is_as_it_was_written_is_valid(work, part):
    kind, place = PARTS[part]
    found = json.loads(run_well("doctor", place(work), "--json").stdout)
    assert found["kind"] == kind
    assert found["valid"]
    assert found["checks"]
    assert "valid" in run_well("doctor", place(work)).stdout


@pytest.mark.parametrize("part", MODELS)
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
    assert "INVALID" in refused.stdout
    assert "model.safetensors" in refused.stdout
    assert not check_folder(folder)["valid"]


def content_below(folder: Path, pattern: str) -> Path:
    """The first file of a pattern."""
    return min(folder.rglob(pattern))


@pytest.mark.parametrize(
    ("part", "pattern"),
    [
        ("text", "shard-*/tokens.bin"),
        ("text", "shard-*/offsets.bin"),
        ("corpus", "shard-*/tokens.bin"),
        ("logits", "about/sequences.bin"),
        ("logits", "about/vocabulary.json"),
        ("logits", "shard-*/records.bin"),
        ("logits", "corpora/*/shard-*/tokens.bin"),
    ],
)
def test_damaged_text_and_logits_are_named(work, tmp_path, part, pattern):
    copy_of(work, tmp_path / "work")
    folder = PARTS[part][1](tmp_path / "work")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    file = content_below(folder, pattern)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x10
    file.write_bytes(content)
    refused = run("doctor", folder)
    assert refused.exit_code == 66
    assert file.name in refused.stdout
    assert before.keys() == set(folder.rglob("*")), "the doctor has written something"


def test_text_that_was_noted_as_checked_is_hashed_all_the_same(work, tmp_path):
    folder = corpus_of(copy_of(work, tmp_path / "work"))
    stamps = {file: file.stat() for file in folder.rglob("*.bin")}
    for file, before in stamps.items():
        content = file.read_bytes()
        file.write_bytes(bytes(len(content)))
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    note = {"files": corpus._stamps(folder), corpus.LARGEST_ID: 0}
    atomic.write_json(folder.parent / f".checked-{folder.name}.json", note)
    corpus.checked_facts(folder)  # as a conversion would, which trusts the note
    assert not check_folder(folder)["valid"]
    assert not check_folder(folder.parent)["valid"]


def test_text_elsewhere_that_a_run_notes_is_judged(work, tmp_path):
    copy_of(work, tmp_path / "work")
    corpora, text = tmp_path / "work" / "run" / "corpora", corpus_of(tmp_path / "work")
    note = corpora / f"{text.name}.json"
    facts = atomic.read_json(text / atomic.MANIFEST_NAME)["facts"]
    atomic.write_json(note, {"folder": str(text), "fingerprint": facts["fingerprint"]})
    assert check_folder(tmp_path / "work" / "run")["valid"]
    atomic.write_json(note, {"folder": str(text), "fingerprint": "0" * 64})
    assert said(tmp_path / "work" / "run") == [f"{text} holds other text than when the run began"]
    atomic.write_json(note, {"folder": str(tmp_path / "gone"), "fingerprint": "0" * 64})
    assert "which is not there" in said(tmp_path / "work" / "run")[0]


def test_logits_that_lack_a_shard_are_not_valid(work, tmp_path):
    folder = copy_of(work / "logits", tmp_path / "logits")
    shutil.rmtree(min(folder.glob("shard-*")))
    assert said(folder) == [f"{folder} lacks 1 of 1 shards of teacher logits"]


def pipe(file: Path) -> None:
    os.mkfifo(file)


def device(file: Path) -> None:
    file.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [pipe, device])
@pytest.mark.parametrize("name", ["run/plan.json", "run/teacher.json", "run/metrics.jsonl", "run/final/config.json"])
def test_what_has_no_end_is_not_read(work, tmp_path, make, name):
    copy_of(work, tmp_path / "work")
    file = tmp_path / "work" / name
    file.unlink(missing_ok=True)
    make(file)
    top = tmp_path / "work" / name.split("/")[0]
    assert any("not a plain file" in says or "leads out of" in says for says in said(top)), said(top)


def test_a_teacher_that_is_a_folder_of_devices_is_not_hashed(work, tmp_path):
    copy_of(work, tmp_path / "work")
    edit_json(tmp_path / "work" / "run" / "teacher.json", folder="/dev", files={"zero": "0" * 64})
    assert any("zero: not a plain file" in says for says in said(tmp_path / "work" / "run"))


def test_nothing_in_a_folder_steers_the_terminal(work, tmp_path):
    folder = copy_of(work / "teacher", tmp_path / "teacher")
    (folder / "evil\x1b[2J.bin").write_bytes(b"")
    assert "\x1b" not in run("doctor", folder).output


def said(folder: Path) -> list[str]:
    """What the doctor says of a folder that is not valid."""
    return [check["error"] for check in check_folder(folder)["checks"] if not check["passed"]]


def seal(folder: Path, **facts: object) -> None:
    """Let a folder's manifest fit its files again, as whoever wrote them would."""
    manifest = folder / atomic.MANIFEST_NAME
    facts = atomic.read_json(manifest)["facts"] | facts
    manifest.unlink()
    atomic._write_manifest(folder, facts)


def of_another_step(checkpoint: Path) -> None:
    seal(checkpoint, global_step=3)


def of_another_format(checkpoint: Path) -> None:
    seal(checkpoint, checkpoint_format=99)


def with_a_list_as_state(checkpoint: Path) -> None:
    (checkpoint / "state.json").write_text("[]")
    seal(checkpoint)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (of_another_step, "was written as the checkpoint of step 3"),
        (of_another_format, "has checkpoint format 99, this mohawkify reads format 1"),
        (with_a_list_as_state, "state.json is not a JSON object"),
    ],
)
def test_a_checkpoint_that_no_run_continues_from_is_not_valid(work, tmp_path, damage, says):
    checkpoint = checkpoint_of(copy_of(work, tmp_path / "work"))
    damage(checkpoint)
    for folder in (checkpoint, tmp_path / "work" / "run"):
        assert [says in line for line in said(folder)] == [True]


@pytest.mark.parametrize(
    "name", ["plan.json", "student.json", "eval.json", "results.json", "teacher.json", "text.json"]
)
def test_a_file_of_a_run_that_holds_a_list_is_not_valid(work, tmp_path, name):
    folder = copy_of(work / "run", tmp_path / "run")
    (folder / name).write_text("[]")
    assert any(name in line for line in said(folder))


def test_a_teachers_configuration_that_is_a_list_is_refused(work, tmp_path):
    folder = copy_of(work / "teacher", tmp_path / "teacher")
    (folder / "config.json").write_text("[]")
    assert set(said(folder)) == {f"{folder / 'config.json'} holds a list, expected a JSON object"}
    for command in ("inspect", "doctor"):
        assert run(command, folder).exit_code == 66


def test_a_students_configuration_that_is_a_list_is_refused(work, tmp_path):
    copy_of(work, tmp_path / "work")
    final = tmp_path / "work" / "run" / "final"
    (final / "config.json").write_text("[]")
    seal(final)
    for target in ("hf", "mlx"):
        refused = run("export", tmp_path / "work" / "run", "--target", target, "--output", tmp_path / target)
        assert refused.exit_code == 66
        assert "config.json holds a list, expected a JSON object" in refused.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_found_in_every_type(work, tmp_path, dtype, value):
    folder = copy_of(work / "teacher", tmp_path / "teacher")
    file = folder / "model.safetensors"
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    assert check_folder(folder)["valid"]
    tensors["model.norm.weight"][3] = value
    save_file(tensors, file, metadata={"format": "pt"})
    bad = [check for check in check_folder(folder)["checks"] if not check["passed"]]
    assert [check["error"] for check in bad] == [
        "model.norm.weight in model.safetensors holds a value that is not finite"
    ]


def test_what_is_never_read_is_listed(work, tmp_path):
    folder = copy_of(work / "teacher", tmp_path / "teacher")
    for name in ("pytorch_model.bin", "modeling_evil.py", "rng_state.pth"):
        (folder / name).write_text("raise SystemExit")
    found = check_folder(folder)
    assert found["valid"]
    assert found["never_read"] == ["modeling_evil.py", "pytorch_model.bin", "rng_state.pth"]
    assert "never read or run: modeling_evil.py" in run_well("doctor", folder).stdout


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    refused = run("doctor", tmp_path / "nowhere")
    assert refused.exit_code == 2
    assert "no such folder" in refused.stderr


def test_what_mohawkify_neither_writes_nor_reads_is_not_valid(work, tmp_path):
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
def test_a_run_that_a_command_would_refuse_is_not_valid(work, tmp_path, damage, says):
    copy_of(work, tmp_path / "work")
    damage(tmp_path / "work")
    refused = run("doctor", tmp_path / "work" / "run")
    assert refused.exit_code == 66
    assert says in refused.stdout


@pytest.mark.parametrize("part", [part for part in PARTS if part != "teacher"])
def test_torch_is_not_loaded(work, part):
    code = (
        "import sys\nfrom mohawkify.cli.main import main\n"
        "try:\n    main()\nfinally:\n    assert not {'torch', 'transformers', 'mlx'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "doctor", str(PARTS[part][1](work))], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
