"""Any change to safetensors files, their index and configuration: refused, or every tensor as it was."""

from __future__ import annotations

import json
import shutil
import tempfile
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from mohawkify.doctor.check_folder import check_folder
from mohawkify.errors import CheckpointError, TeacherError, UsageError
from mohawkify.files import atomic
from mohawkify.files.safetensors_headers import INDEX_FILE, read_tensors
from mohawkify.run.checkpoint import load_tensors, newest_valid, restore_rng, save_checkpoint
from mohawkify.teacher.load import load_teacher
from mohawkify.teacher.resolve import resolve_teacher
from mohawkify.teacher.validate import require_config, require_plain_weights
from tests.files.faults import content_of
from tests.fuzz.campaign import require_message, run_campaign
from tests.fuzz.folders import changed, decode, encode, inside
from tests.fuzz.mutate import NUMBERS, PATHS, mutate_bytes, mutate_json, odd_value, render, render_twice
from tests.tiny import tiny_teacher

DTYPES = ("F32", "F16", "BF16", "F64", "I8", "U8", "I64", "BOOL", "F8_E4M3", "F4", "C64", "U16", "f32", "", 3, None)
STEP = "step-00000004"
GROUPS = ("model", "optimizer", "rng")
JUDGED = 0.02  # of the inputs are loaded and shown to the doctor too
MODEL = {"a.weight": (4, 3), "a.bias": (3,), "b.weight": (2, 2)}
FACTS = {"checkpoint_format": 1, "global_step": 4}


def make_checkpoint(folder: Path) -> None:
    """Write a checkpoint of a few tensors, the same bytes every time."""
    torch.manual_seed(0)
    model = {name: torch.randn(shape) for name, shape in MODEL.items()}
    moments = {f"{name}.moment": tensor.square() for name, tensor in model.items()}
    save_checkpoint(folder, global_step=4, model_tensors=model, optimizer_tensors=moments, state={"stage": "align"})


def make_teacher(folder: Path) -> None:
    """Write a teacher in two or three shards with an index."""
    tiny_teacher("llama", num_hidden_layers=1).save_pretrained(folder, max_shard_size="20KB")


@cache
def files_of(make: Any) -> dict[str, bytes]:
    """What a function writes into a folder."""
    folder = Path(tempfile.mkdtemp())
    try:
        make(folder)
        return content_of(folder)
    finally:
        shutil.rmtree(folder)


def mutate_safetensors(rng: Random, data: bytes) -> bytes:
    """Change a safetensors file one to four times: what the header says of tensors, its length, or the bytes."""
    for _ in range(rng.choice((1, 1, 2, 3, 4))):
        length = int.from_bytes(data[:8], "little")
        try:
            header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
            names = [name for name in header if isinstance(header[name], dict) and "data_offsets" in header[name]]
        except (ValueError, RecursionError, TypeError, IndexError):  # an earlier change left no object
            names = []
        kind = rng.randrange(12)
        if kind < 9 and names:
            try:
                text = _mutated_header(rng, kind, header, rng.choice(names))
            except RecursionError:  # an earlier change made it too deep for Python's writer
                return data
            data = len(text).to_bytes(8, "little") + text + body
        elif kind == 9:
            number = rng.choice((*(abs(number) % 2**64 for number in NUMBERS), length + 1, length - 1, 10**8))
            data = (number % 2**64).to_bytes(8, "little") + data[8:]
        elif kind == 10:
            data = mutate_bytes(rng, data, 1)
        else:
            end = rng.randrange(len(data) + 1)
            data = rng.choice((data[:end], data[:end] + bytes(len(data) - end), data + rng.randbytes(9), b""))
    return data


def _mutated_header(rng: Random, kind: int, header: dict[str, Any], name: str) -> bytes:
    entry, other = header[name], header[rng.choice(list(header))]
    if kind == 0:
        entry["dtype"] = rng.choice(DTYPES)
    elif kind == 1:
        shape = entry.get("shape")
        entry["shape"] = rng.choice(
            (shape[::-1] if isinstance(shape, list) else [], [*NUMBERS[:3]], [2**63], odd_value(rng))
        )
    elif kind == 2:
        begin, end = rng.choice(NUMBERS), rng.choice(NUMBERS)
        place = other.get("data_offsets") if isinstance(other, dict) else other
        entry["data_offsets"] = rng.choice(([begin, end], [0, end], place, odd_value(rng)))
    elif kind == 3:
        header[rng.choice((*PATHS, name.upper(), f"{name}.x"))] = header.pop(name)
    elif kind == 4:
        header["__metadata__"] = rng.choice(({"a": 1}, odd_value(rng), {"format": "tf"}, {"format": "pt" * 9999}))
    elif kind == 5:
        del header[name]
    elif kind == 6 and isinstance(other, dict):
        header[name], header[next(iter(header))] = other, entry
    elif kind == 7:
        return render_twice(rng, header).encode("utf-8", "surrogatepass")
    else:
        header = mutate_json(rng, header)
    return render(header).encode("utf-8", "surrogatepass") + b" " * rng.choice((0, 0, 1, 8))


def draw_checkpoint(rng: Random) -> bytes:
    """A checkpoint with a changed file; sometimes the manifest is made to fit again."""
    files = files_of(make_checkpoint)
    name = f"{STEP}/{rng.choice(GROUPS)}.safetensors"
    kind = rng.random()
    changes: dict[str, bytes | None]
    if kind < 0.05:
        changes = {name: None}
    elif kind < 0.1:
        changes = {name: files[f"{STEP}/{rng.choice(GROUPS)}.safetensors"]}
    elif kind < 0.15:
        name = rng.choice(list(files))
        changes = {name: mutate_bytes(rng, files[name])}
    else:
        changes = {name: mutate_safetensors(rng, files[name])}
    return encode(changes, sealed=rng.random() < 0.5)


def test_any_checkpoint(folder: Path) -> None:
    make_checkpoint(folder)
    original = files_of(make_checkpoint)
    assert content_of(folder) == original
    expected = _load(folder)

    def check(case: bytes) -> None:
        changes, facts = decode(case)
        manifest = f"{STEP}/{atomic.MANIFEST_NAME}"
        with changed(folder, original, {manifest: original[manifest], **changes}):
            if facts["sealed"]:
                (folder / manifest).unlink()
                atomic._write_manifest(folder / STEP, FACTS)
            with inside(folder):
                try:
                    found = _load(folder)
                except (CheckpointError, UsageError) as error:
                    require_message(error)
                    found = None
        is_same = all(original.get(name) == data for name, data in changes.items())
        assert is_same or facts["sealed"] or found is None, "a changed checkpoint was taken"
        assert found is not None or not is_same, "a whole checkpoint was refused"
        if found is not None and is_same:
            assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())

    run_campaign("tensors-checkpoint", 1500, draw_checkpoint, check)


def _load(folder: Path) -> dict[str, Tensor] | None:
    """All tensors of the newest valid checkpoint, by group and name."""
    found = newest_valid(folder, lambda line: None)
    if found is None:
        return None
    tensors = {f"{group} {name}": tensor for group in GROUPS for name, tensor in load_tensors(found, group).items()}
    restore_rng({name.removeprefix("rng "): tensor for name, tensor in tensors.items() if name.startswith("rng ")})
    return tensors


def draw_teacher(rng: Random) -> bytes:
    """A teacher's folder with a changed shard, index or configuration."""
    files = files_of(make_teacher)
    shards = [name for name in files if name.endswith(".safetensors")]
    kind = rng.random()
    changes: dict[str, bytes | None] = {}
    if kind < 0.5:
        name = rng.choice(shards)
        changes[name] = mutate_safetensors(rng, files[name])
    elif kind < 0.9:
        index = json.loads(files[INDEX_FILE])
        tensors = index["weight_map"]
        name = rng.choice(list(tensors))
        if rng.random() < 0.5:
            tensors[name] = rng.choice((*PATHS, *(f"{path}.safetensors" for path in PATHS), *shards, odd_value(rng)))
        else:
            index = mutate_json(rng, index)
        text = render_twice(rng, index) if rng.random() < 0.05 else render(index)
        changes[INDEX_FILE] = text.encode("utf-8", "surrogatepass")
    elif kind < 0.93:
        changes[rng.choice([*shards, INDEX_FILE])] = None
    elif kind < 0.96:
        name = rng.choice([INDEX_FILE, *shards])
        changes[name] = mutate_bytes(rng, files[name])
    else:
        changes = dict(zip(shards, [files[name] for name in reversed(shards)], strict=True))
    return encode(changes, judged=rng.random() < JUDGED)


@pytest.mark.parametrize(("name", "number"), [("files", 2500), ("loaded", 40)])
def test_any_teacher(folder: Path, name: str, number: int) -> None:
    make_teacher(folder)
    original = files_of(make_teacher)
    assert content_of(folder) == original
    wanted = _state(folder)

    def check(case: bytes) -> None:
        changes, facts = decode(case)
        with changed(folder, original, changes), inside(folder):
            is_judged = facts.get("judged", True) or name == "loaded"
            checks = check_folder(folder)["checks"] if is_judged else []
            is_valid = all(each["passed"] for each in checks if each["name"] != "tokenizer")  # it has none
            try:
                files = {tensor.file for tensor in read_tensors(folder).values()}
                require_plain_weights(folder / "config.json", require_config(folder / "config.json"))
                assert all(file.parent == folder and file.is_file() for file in files)
                if is_judged:
                    found = _state(folder)
                    assert found.keys() == wanted.keys()
                    assert all(tensor.isfinite().all() for tensor in found.values())
                    assert is_valid, "the doctor refuses weights that are loaded"
            except (TeacherError, CheckpointError) as error:  # the second for what is not strict JSON
                require_message(error)
                assert not (is_judged and is_valid), "the doctor calls valid what is refused"

    run_campaign(f"tensors-teacher-{name}", number, draw_teacher, check, most_seconds=2.0)


def _state(folder: Path) -> dict[str, Tensor]:
    return load_teacher(resolve_teacher(str(folder)), dtype=torch.float32, device=torch.device("cpu")).state_dict()
