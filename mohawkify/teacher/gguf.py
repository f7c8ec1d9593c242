"""Teachers in GGUF files: each is read once, into a folder of the user's cache that is a teacher like any other."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from mohawkify.errors import MohawkifyError, StorageError, TeacherError, quoted
from mohawkify.files.atomic import MANIFEST_NAME, atomic_directory, file_sha256, write_json
from mohawkify.files.disk import clear_errors
from mohawkify.files.manifest import read_manifest
from mohawkify.files.safetensors_headers import SINGLE_FILE
from mohawkify.teacher.gguf_header import GgufFile, read_gguf, require_gguf
from mohawkify.teacher.gguf_settings import ROPE_FACTORS, generation_settings, read_settings, require_all_read
from mohawkify.teacher.gguf_tokenizer import read_tokenizer, require_tokens
from mohawkify.teacher.tokenizer import load_tokenizer
from mohawkify.teacher.tokenizer_files import GENERATION_FILE

if TYPE_CHECKING:
    from mohawkify.teacher.resolve import ResolvedTeacher

# Part of the folder's name: raise it when the same file would be read as something else.
_READING = 1
_PLAIN = ("F32", "F16", "BF16")


def read_once(path: Path, resolve: Callable[[str], ResolvedTeacher]) -> Path:
    """The folder with the teacher of a GGUF file, in the user's cache; made when the file is first met.

    Args:
        path: the file.
        resolve: resolves a folder, and so validates it; `resolve_teacher`.

    Raises:
        TeacherError: the file is damaged, or a model or tokenizer that cannot be read from it.
        MissingExtraError: the package ``gguf`` is not installed.
        StorageError: the cache cannot be written.
    """
    require_gguf()
    digest = file_sha256(path)
    folder = _cache() / f"{digest}-{_READING}"
    if (folder / MANIFEST_NAME).is_file():
        return folder
    file = read_gguf(path)
    needed = sum(4 * math.prod(tensor.shape) for tensor in file.tensors.values())
    facts = {
        "file": path.name,
        "sha256": digest,
        "types": dict(Counter(tensor.kind for tensor in file.tensors.values())),
        "quantised": any(tensor.kind not in _PLAIN for tensor in file.tensors.values()),
        "read_by": {name: version(name) for name in ("mohawkify", "transformers", "gguf")},
    }
    try:
        with atomic_directory(folder, facts=facts, needed=needed) as temporary, _said_of(path, temporary):
            _write(file, temporary, resolve)
    except StorageError as error:
        if (folder / MANIFEST_NAME).is_file():  # another process was faster
            return folder
        error.hint = f"its teacher takes {needed:,} bytes there, once; XDG_CACHE_HOME names another place"
        raise
    return folder


def gguf_facts(folder: Path) -> dict[str, Any]:
    """What is recorded of the GGUF file that a folder was read from: its hash, and its tensors' types."""
    with clear_errors("read", folder):
        return read_manifest(folder / MANIFEST_NAME)["facts"]


def require_unchanged(folder: Path, hashes: Mapping[str, str]) -> None:
    """Refuse a folder of the cache that is no longer what was read from its GGUF file.

    Args:
        folder: the folder.
        hashes: the sha256 of its files by name, as they are now.

    Raises:
        TeacherError: names a file that changed.
    """
    with clear_errors("read", folder):
        written = read_manifest(folder / MANIFEST_NAME)["files"]
    for name, digest in hashes.items():
        if written.get(name, {}).get("sha256") != digest:
            raise TeacherError(
                f"{folder / name} has changed since it was read from the GGUF file",
                hint=f"remove {folder}: the same command reads the file again",
            )


def _cache() -> Path:
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:
        raise StorageError("this user has no home folder", hint="set XDG_CACHE_HOME to a folder for caches") from error
    return home / "mohawkify" / "gguf"


@contextmanager
def _said_of(path: Path, temporary: Path) -> Iterator[None]:
    """Let errors about the unfinished folder name the file that it is read from."""
    try:
        yield
    except MohawkifyError as error:
        error.message = error.message.replace(str(temporary), str(path))
        error.args = (error.message,)
        raise


def _write(file: GgufFile, folder: Path, resolve: Callable[[str], ResolvedTeacher]) -> None:
    """Write a GGUF file's teacher into a folder; what is small is validated before the tensors are read."""
    from safetensors.torch import save_file

    require_tokens(file)
    values = read_settings(file)
    write_json(folder / "config.json", values)
    teacher = resolve(str(folder))
    require_all_read(file, teacher.config)
    names = _names(file, teacher.modules)
    write_json(folder / GENERATION_FILE, generation_settings(file))
    read_tokenizer(file).save_pretrained(folder)
    load_tokenizer(folder, teacher.spec.vocab_size, values)
    save_file(_tensors(file, names, values), folder / SINGLE_FILE, metadata={"format": "pt"})
    assert teacher.tensors, "validated as those of other folders are"


def _names(file: GgufFile, model: nn.Module) -> dict[str, str]:
    """The model's name of every tensor; both sides must have all of them, in the same shapes."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    hint = "the file is damaged, or of another model than its metadata say"
    architecture = next(key for key, name in MODEL_ARCH_NAMES.items() if name == file.metadata["general.architecture"])
    table = get_tensor_name_map(architecture, model.config.num_hidden_layers)  # type: ignore[union-attr, arg-type]
    names: dict[str, str] = {}
    for name, parameter in model.named_parameters():
        ours = table.get_name(name, try_suffixes=(".weight", ".bias")) or name
        tensor = file.tensors.get(ours)
        if tensor is None:
            raise TeacherError(f"{file.path} lacks tensor {ours} ({name})", hint=hint)
        if tensor.shape != tuple(parameter.shape):
            expected = list(parameter.shape)
            raise TeacherError(
                f"{file.path} holds tensor {ours} with the sizes {list(tensor.shape)}, expected {expected}", hint=hint
            )
        names[ours] = name
    for name in file.tensors:
        if name not in names and name != ROPE_FACTORS:
            raise TeacherError(
                f"{file.path} holds tensor {quoted(name)}, for which transformers' {type(model).__name__} has no place",
                hint="use the model's Hugging Face folder or Hub id",
            )
    _require_types(file)
    return names


def _require_types(file: GgufFile) -> None:
    """Refuse a type that the package gguf knows but cannot turn into numbers, by trying a block of it."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    for kind in sorted({tensor.kind for tensor in file.tensors.values()}):
        number = GGMLQuantizationType[kind]
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[number][1]), np.uint8), number)
        except NotImplementedError as error:
            name = next(name for name, tensor in file.tensors.items() if tensor.kind == kind)
            raise TeacherError(
                f"{file.path} holds tensor {name} as {kind}, which the package gguf cannot turn into numbers",
                hint="take a file in another type, such as Q8_0",
            ) from error


def _tensors(file: GgufFile, names: Mapping[str, str], values: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Every tensor under the model's name, in float32, which holds all of ggml's types exactly."""
    from gguf import GGMLQuantizationType, dequantize
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

    # It undoes what llama.cpp has done to the tensors of this architecture.
    processor = TENSOR_PROCESSORS.get(file.metadata["general.architecture"], TensorProcessor)(config=dict(values))
    content = np.memmap(file.path, np.uint8, "r")
    found: dict[str, torch.Tensor] = {}
    with tqdm(file.tensors.items(), f"reading {file.path.name}, once", delay=1.0, leave=False, disable=None) as tensors:
        for name, tensor in tensors:
            if name == ROPE_FACTORS:
                continue
            stored = content[tensor.begin : tensor.end].reshape(*tensor.shape[:-1], -1)
            with np.errstate(all="ignore"):  # what is not finite is refused below
                numbers = dequantize(stored, GGMLQuantizationType[tensor.kind])
                numbers = processor.process(weights=numbers, name=name).weights
            if not np.isfinite(numbers).all():
                raise TeacherError(f"{file.path} has values that are not finite in tensor {name}")
            found[names[name]] = torch.from_numpy(np.require(numbers, np.float32, ["C", "O", "W"]))
    return found
