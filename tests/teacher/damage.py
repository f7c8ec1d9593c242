"""Ways to damage a teacher's folder; a test does one of them to a copy and expects the teacher to be refused."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
NORM, HEAD, EMBEDDING = "model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"

Damage = Callable[[Path], object]


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def config(**changes: Any) -> Damage:
    return lambda folder: edit_json(folder / "config.json", **changes)


def tokenizer_config(**changes: Any) -> Damage:
    return lambda folder: edit_json(folder / "tokenizer_config.json", **changes)


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def work(folder: Path) -> None:
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return work


def header(change: Callable[[dict[str, Any]], object]) -> Damage:
    """Edit the header of the weights as text, whatever the official writer would say."""

    def work(folder: Path) -> None:
        data = (folder / WEIGHTS).read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        entries = json.loads(data[8 : 8 + length])
        change(entries)
        text = json.dumps(entries).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return work


def raw(name: str, change: Callable[[bytes], bytes]) -> Damage:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def sharded(then: Damage = lambda folder: None, **places: str) -> Damage:
    """Cut the weights in two with an index, then do more; ``places`` are entries of the index that are changed."""

    def work(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        names = sorted(tensors)
        halves = (names[: len(names) // 2], names[len(names) // 2 :])
        index: dict[str, Any] = {"metadata": {}, "weight_map": {}}
        for shard, half in zip(SHARDS, halves, strict=True):
            save_file({name: tensors[name] for name in half}, folder / shard)
            index["weight_map"] |= dict.fromkeys(half, shard)
        (folder / WEIGHTS).unlink()
        (folder / INDEX).write_text(json.dumps(index))
        then(folder)
        edited = json.loads((folder / INDEX).read_text())
        edited["weight_map"] |= places
        (folder / INDEX).write_text(json.dumps(edited))

    return work


def duplicate(folder: Path) -> None:
    first, second = (load_file(folder / shard) for shard in SHARDS)
    save_file({**second, **dict([next(iter(first.items()))])}, folder / SHARDS[1])


def link_out(name: str) -> Damage:
    """Move a file of the folder out of it and leave a link."""

    def work(folder: Path) -> None:
        target = folder.parent / f"outside-{name}"
        shutil.move(folder / name, target)
        (folder / name).symlink_to(target)

    return work


def set_tensor(entries: dict[str, Any], **changes: Any) -> None:
    entries[NORM] = {**entries[NORM], **changes}


def twice_in_the_header(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    text = data[8 : 8 + length].rstrip()
    entry = json.dumps({NORM: json.loads(text)[NORM]}).encode()
    text = text[:-1] + b"," + entry[1:]
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def half(folder: Path) -> None:
    weights(lambda t: t.update({name: t[name][:1].clone() for name in list(t) if t[name].dim() == 2}))(folder)


def shift_ids(vocabulary: dict[str, int], by: int) -> None:
    vocabulary["a"] += by


def tokenizer(change: Callable[[dict[str, Any]], object]) -> Damage:
    def work(folder: Path) -> None:
        content = json.loads((folder / "tokenizer.json").read_text())
        change(content)
        (folder / "tokenizer.json").write_text(json.dumps(content))

    return work


def outside_tokenizer(folder: Path) -> Path:
    target = folder.parent / "tokenizer.4.0.0.json"
    shutil.copy(folder / "tokenizer.json", target)
    return target


def swap_ids(content: dict[str, Any]) -> None:
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
