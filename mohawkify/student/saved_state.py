"""What a student has read, in a file: the states of its mixers, and the keys and values of attention that was kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from mohawkify.errors import CheckpointError, TeacherError, UsageError
from mohawkify.files.atomic import write_bytes
from mohawkify.files.disk import clear_errors
from mohawkify.files.manifest import MANIFEST_NAME, read_manifest
from mohawkify.files.safetensors_headers import read_header
from mohawkify.files.strict_json import parse_json
from mohawkify.student.cache import StudentCache, WindowLayer, kept_of

FORMAT = "mohawkify-state-1"
_IDS = "token_ids"
_WRITES = "`mohawkify generate --save-state` writes one"
_FIELDS = {"format", "model", "text", "messages", "num_read", "sha256"}


@dataclass
class ReadText:
    """A text that a model goes on with, and what the model remembers of it.

    Args:
        text: all of it.
        ids: its tokens.
        cache: the memory of all tokens or of the first ones; None for a teacher's, which is not kept.
        messages: of the conversation that the text is; empty where it is none.
    """

    text: str = ""
    ids: list[int] = field(default_factory=list)
    cache: StudentCache | None = None
    messages: list[dict[str, str]] = field(default_factory=list)

    @property
    def num_read(self) -> int:
        """How many of the tokens are in the memory."""
        return 0 if self.cache is None else int(self.cache.get_seq_length())


def model_hash(student: Path) -> str:
    """The hash of a finished student's folder, which covers each of its files; raises CheckpointError."""
    return str(read_manifest(student / MANIFEST_NAME)["sha256"])


def require_new_file(path: Path) -> None:
    """Refuse to write over a file; raises UsageError."""
    if path.exists() or path.is_symlink():
        raise UsageError(f"{path} exists already", hint="choose another name for the state")


def save_state(path: Path, read: ReadText, model: str) -> None:
    """Write a state.

    Args:
        path: a new file.
        read: what is written; a part of it has been read.
        model: `model_hash` of the student.

    Raises:
        UsageError: the file exists, or a layer's memory is of a kind that cannot be saved.
        StorageError: it could not be written.
    """
    require_new_file(path)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in _tensors(read.cache).items()}
    tensors[_IDS] = torch.tensor(read.ids)
    texts = {
        "format": FORMAT,
        "model": model,
        "text": read.text,
        "messages": json.dumps(read.messages),
        "num_read": str(read.num_read),
    }
    write_bytes(path, safetensors.torch.save(tensors, texts | {"sha256": _digest(texts, tensors)}))


@torch.inference_mode()
def load_state(path: Path, student: Any, model: str) -> ReadText:
    """Read a state, on the student's device.

    Args:
        path: a file that `save_state` wrote.
        student: the model that goes on with it.
        model: its `model_hash`.

    Raises:
        CheckpointError: it is no state, damaged, incomplete, or of another model.
    """
    texts, tensors = _read(path)
    if texts["model"] != model:
        raise CheckpointError(
            f"{path} was saved with another model, {texts['model'][:12]}..., expected {model[:12]}... of this run",
            hint="name the run that it was saved with",
        )
    ids, num_read = tensors.pop(_IDS).tolist(), int(texts["num_read"])
    cache = StudentCache(student.config)
    if not (0 < num_read <= len(ids) and min(ids) >= 0 and max(ids) < student.config.vocab_size):
        raise _damaged(path, "its tokens are not of this model")
    # One token read anew shows which tensors there must be, whatever the family.
    probe = StudentCache(student.config)
    student(torch.tensor([ids[:1]], device=student.device), past_key_values=probe)
    expected = _tensors(probe)
    if expected.keys() != tensors.keys():
        raise _damaged(path, "its tensors are not those of this model's layers")
    for name, like in expected.items():
        shape = list(like.shape)
        if name.endswith((".keys", ".values")):
            window = getattr(kept_of(cache.layers[_layer_of(name)]), "sliding_window", None)
            shape[-2] = num_read if window is None else min(num_read, window - 1)
        found = tensors[name]
        if found.dtype != like.dtype or list(found.shape) != shape or not found.isfinite().all():
            raise _damaged(path, f"{name} has another shape or type than this model's, or is not finite")
        tensors[name] = found.to(student.device)
    for index, layer in enumerate(cache.layers):
        _fill(layer, {name.split(".")[1]: each for name, each in tensors.items() if _layer_of(name) == index}, num_read)
    return ReadText(texts["text"], ids, cache, json.loads(texts["messages"]))


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The texts and tensors of a file, which are as they were written."""
    if not path.is_file():
        raise CheckpointError(f"{path} is no file, expected a saved state", hint=_WRITES)
    with clear_errors("read", path):
        try:
            tensors = read_header(path)
        except TeacherError as error:
            raise CheckpointError(f"expected a saved state: {error.message}", hint=_WRITES) from error
        with safe_open(path, framework="pt") as file:
            texts: dict[str, str] = file.metadata() or {}
            if texts.get("format") != FORMAT or texts.keys() != _FIELDS or _IDS not in tensors:
                raise CheckpointError(f"{path} holds no saved state", hint=_WRITES)
            loaded = {name: file.get_tensor(name) for name in tensors}
    if texts.pop("sha256") != _digest(texts, loaded):
        raise _damaged(path, "its content does not have the hash that it carries")
    messages = parse_json(texts["messages"].encode(), f"{path}, its messages")
    if not texts["num_read"].isdecimal() or not all(_is_message(each) for each in messages):
        raise _damaged(path, "its conversation is none")
    return texts, loaded


def _is_message(value: Any) -> bool:
    return (
        isinstance(value, dict) and value.keys() == {"role", "content"} and all(type(v) is str for v in value.values())
    )


def _digest(texts: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(dict(texts), sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _tensors(cache: Any) -> dict[str, Tensor]:
    """The tensors of a student's memory, by ``<layer>.<name>``."""
    found: dict[str, Tensor] = {}
    for index, layer in enumerate(cache.layers):
        states, kept = dict(getattr(layer, "states", {})), kept_of(layer)
        if kept is not None:
            _require_known(index, kept)
            states |= {"keys": kept.keys, "values": kept.values}
        found |= {f"{index}.{name}": tensor for name, tensor in states.items()}
    return found


def _require_known(index: int, layer: Any) -> None:
    if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer, WindowLayer) or not layer.is_initialized:
        raise UsageError(
            f"layer {index} keeps an attention whose memory is a {type(layer).__name__}, expected keys and values",
            hint="states of this student cannot be saved",
        )


def _layer_of(name: str) -> int:
    return int(name.split(".")[0])


def _fill(layer: Any, tensors: dict[str, Tensor], num_read: int) -> None:
    kept = kept_of(layer)
    if kept is not None:
        keys, values = tensors.pop("keys"), tensors.pop("values")
        kept.lazy_initialization(keys, values)
        kept.keys, kept.values = keys, values
        if hasattr(kept, "cumulative_length"):
            kept.cumulative_length = num_read
    if hasattr(layer, "states"):
        layer.states = tensors
        layer.advance(num_read)


def _damaged(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{path} is damaged: {reason}", hint="save the state again")
