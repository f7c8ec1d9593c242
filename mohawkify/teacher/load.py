"""Load a teacher and prove that it is what it claims to be; transformers alone fills gaps with random numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from mohawkify.errors import TeacherError
from mohawkify.storage import file_sha256, read_json
from mohawkify.teacher.inspect import read_config

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"


def weight_files(folder: Path) -> list[Path]:
    """The teacher's safetensors files, each inside the folder, present and readable to its end.

    Raises:
        TeacherError: no safetensors, a path that leaves the folder, a missing shard, a damaged or truncated file.
    """
    index = folder / INDEX_FILE
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise TeacherError(f"{index} has no weight_map")
        names = sorted(set(weight_map.values()))
        for name in names:
            if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
                raise TeacherError(f"{index} names {name!r}, expected a .safetensors file inside the folder")
    elif (folder / SINGLE_FILE).is_file():
        names = [SINGLE_FILE]
    else:
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        found = f"only {pickles[0]}, a pickle," if pickles else "no weights,"
        raise TeacherError(
            f"{folder} holds {found} expected {SINGLE_FILE}" + ("" if pickles else " or shards with an index"),
            hint="convert it to safetensors first: pickles can run code and are never read" if pickles else None,
        )
    files = [folder / name for name in names]
    for file in files:
        if not file.is_file():
            raise TeacherError(f"{file} is missing; {INDEX_FILE} names it", hint="download the teacher again")
        try:
            with safe_open(str(file), framework="pt") as opened:
                opened.keys()
        except (SafetensorError, OSError) as error:
            raise TeacherError(
                f"{file} is damaged or truncated ({error})", hint="download or copy the file again"
            ) from error
    return files


def teacher_hashes(folder: Path) -> dict[str, str]:
    """The sha256 of every file that decides what the teacher computes, recorded in the run."""
    files = [*weight_files(folder), folder / "config.json"]
    files += [folder / name for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")]
    return {file.name: file_sha256(file) for file in files if file.is_file()}


def load_teacher(folder: Path, *, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Load the frozen teacher.

    Args:
        folder: a Hugging Face folder with safetensors.
        dtype: the precision it computes in.
        device: where it runs.

    Raises:
        TeacherError: damaged files; tensors that are missing, left over, misshapen or not finite.
    """
    weight_files(folder)
    config, adapter = read_config(folder / "config.json")
    model_class = getattr(transformers, adapter.model_class)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what does not fit is said below, in one line
    try:
        teacher, info = model_class.from_pretrained(
            folder, config=config, dtype=dtype, attn_implementation=attention_implementation(model_class),
            use_safetensors=True, local_files_only=True, trust_remote_code=False, output_loading_info=True,
            ignore_mismatched_sizes=True,
        )  # fmt: skip
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise TeacherError(f"{folder} could not be loaded: {' '.join(str(error).split())[:300]}") from error
    finally:
        logging.set_verbosity(verbosity)
    for problem, wording in (
        ("missing_keys", "lacks"),
        ("unexpected_keys", "has unexpected"),
        ("mismatched_keys", "has a wrong shape for"),
    ):
        names = sorted(name if isinstance(name, str) else str(name[0]) for name in info[problem])
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise TeacherError(
                f"the teacher in {folder} {wording} tensor {names[0]}{more}",
                hint="the weights do not fit config.json: is the download complete?",
            )
    for name, parameter in teacher.named_parameters():
        if not torch.isfinite(parameter).all():
            raise TeacherError(f"the teacher in {folder} has values that are not finite in {name}")
    return teacher.to(device).eval().requires_grad_(False)


def attention_implementation(model_class: Any) -> str:
    """The attention implementation that every machine has: fused where the family can, else its own plain one."""
    return "sdpa" if model_class._supports_sdpa else "eager"


def load_tokenizer(folder: Path, vocabulary_size: int) -> PreTrainedTokenizerBase:
    """Load the teacher's tokenizer and check that every token has a row in the embedding.

    Raises:
        TeacherError: no tokenizer, or token ids beyond the vocabulary.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise TeacherError(
            f"{folder} has no usable tokenizer ({' '.join(str(error).split())[:200]})",
            hint="expected tokenizer.json beside the weights",
        ) from error
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if not 0 <= largest < vocabulary_size:
        raise TeacherError(
            f"the tokenizer has token id {largest}, but the model's vocabulary has {vocabulary_size} rows",
            hint="tokenizer and weights belong to different models",
        )
    return tokenizer
