"""Load a teacher and prove that it is what it claims to be; transformers alone fills gaps with random numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.utils import logging

from mohawkify.errors import TeacherError, is_out_of_memory
from mohawkify.families.decoder_layers import attention_implementation
from mohawkify.files.atomic import file_sha256
from mohawkify.teacher.generation_settings import plain_generation
from mohawkify.teacher.inspect import read_config
from mohawkify.teacher.no_remote_code import never_ask
from mohawkify.teacher.quantize import quantiser_options, require_sound_quantisation
from mohawkify.teacher.tokenizer_files import OF_THE_TEACHER
from mohawkify.teacher.validate import (
    INTEGER_BYTES,
    ClaimedTensor,
    read_tensors,
    require_config,
    require_generation_settings,
    require_plain_weights,
    require_room,
    same_content,
)


def weight_files(folder: Path) -> list[Path]:
    """The teacher's safetensors files, all that they claim compared with what is there.

    Raises:
        TeacherError: no safetensors, names or links that leave the folder, damaged files, an index that disagrees with
            them, quantised weights.
    """
    files = sorted({tensor.file for tensor in read_tensors(folder).values()})
    require_plain_weights(folder / "config.json", require_config(folder / "config.json"))
    for file in files:
        try:
            with safe_open(str(file), framework="pt") as opened:
                opened.keys()
        except (SafetensorError, OSError) as error:
            raise TeacherError(
                f"{file} is damaged or truncated ({error})", hint="download or copy the file again"
            ) from error
    return files


def teacher_hashes(folder: Path) -> dict[str, str]:
    """The sha256 of every file that decides what the teacher computes, recorded in the run.

    Raises:
        TeacherError: the files are not the model that config.json describes.
    """
    files = [*weight_files(folder), folder / "config.json"]
    require_fit(folder)
    files += [folder / name for name in OF_THE_TEACHER]
    return {file.name: file_sha256(file) for file in files if file.is_file()}


def load_teacher(folder: Path, *, dtype: torch.dtype, device: torch.device, bits: int | None = None) -> PreTrainedModel:
    """Load the frozen teacher.

    Args:
        folder: a Hugging Face folder with safetensors.
        dtype: the precision it computes in.
        device: where it runs.
        bits: 8 or 4: its weights are quantised on the way, embedding and head excepted; None leaves them.

    Raises:
        TeacherError: damaged files; tensors that are missing, left over, misshapen or not finite.
        MissingExtraError: the quantiser is not installed.
    """
    never_ask()
    quantiser = quantiser_options(bits, dtype, device) if bits else {}
    weight_files(folder)
    require_fit(folder)
    require_generation_settings(folder)
    config, adapter = read_config(folder / "config.json")
    model_class = getattr(transformers, adapter.model_class)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what does not fit is said below, in one line
    try:
        teacher, info = model_class.from_pretrained(
            folder, config=config, dtype=dtype, attn_implementation=attention_implementation(model_class, config),
            use_safetensors=True, local_files_only=True, trust_remote_code=False, output_loading_info=True,
            ignore_mismatched_sizes=True, **quantiser,
        )  # fmt: skip
    except Exception as error:  # transformers and safetensors have no common class for what a file can do to them
        if is_out_of_memory(error):
            raise
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
    try:
        teacher.generation_config = plain_generation(teacher.generation_config, teacher.config.vocab_size)
    except ValueError as error:
        raise TeacherError(f"the generation settings of the teacher in {folder} are wrong: {error}") from error
    if bits:
        require_sound_quantisation(teacher, bits)
    else:
        teacher = teacher.to(device)
    return teacher.eval().requires_grad_(False)


def require_fit(folder: Path) -> None:
    """Refuse weights that are not those of the model in config.json, before any memory is taken for it.

    Raises:
        TeacherError: too few numbers for the parameters; a head that contradicts tie_word_embeddings; integers where
            the model has weights.
    """
    path = folder / "config.json"
    config, adapter = read_config(path)
    with torch.device("meta"):
        model = getattr(transformers, adapter.model_class)(config)
    tensors = read_tensors(folder)
    require_room(path, model, tensors)
    _require_head(path, model, tensors)
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, tensor in tensors.items():
        is_weight = name.endswith(".weight") or name in names or f"{model.base_model_prefix}.{name}" in names
        if tensor.dtype in INTEGER_BYTES and is_weight:
            raise TeacherError(
                f"{tensor.file} holds tensor {name} as {tensor.dtype}, expected floating-point numbers",
                hint="quantised weights cannot be trained against: use the teacher's plain version",
            )


def _require_head(path: Path, model: Any, tensors: dict[str, ClaimedTensor]) -> None:
    """Refuse a tie_word_embeddings that the weights contradict: transformers would make up a head, or drop one."""
    names = {id(module): name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None:
        return
    is_tied = head.weight is embedding.weight
    head_name, embedding_name = (f"{names[id(module)]}.weight" for module in (head, embedding))
    prefix = f"{model.base_model_prefix}."
    found_embedding = tensors.get(embedding_name) or tensors.get(embedding_name.removeprefix(prefix))
    # Some families' files have other names than their modules, such as embed_out; the shape of a head is rare.
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    renamed = (
        tensor
        for name, tensor in tensors.items()
        if tensor.shape == tuple(head.weight.shape) and not {name, prefix + name} & known
    )
    found_head = tensors.get(head_name) or next(renamed, None)
    if found_embedding is None:
        return  # said in other words when the weights are loaded
    if found_head is None and not is_tied:
        raise TeacherError(
            f"{path} says that head and embedding differ (tie_word_embeddings false), but the weights lack {head_name}",
            hint="is the download complete? If the model's head is its embedding, set tie_word_embeddings to true",
        )
    if found_head is not None and is_tied and not same_content(found_head, found_embedding):
        raise TeacherError(
            f"{path} says that head and embedding are one (tie_word_embeddings true), but {head_name} in the weights"
            f" differs from {embedding_name}",
            hint="set tie_word_embeddings to false if the model has a head of its own",
        )
