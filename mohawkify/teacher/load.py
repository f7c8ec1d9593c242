"""Load a teacher's weights, and refuse what does not fit: transformers alone fills gaps with random values."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel
from transformers.utils import logging

from mohawkify.errors import TeacherError, is_out_of_memory
from mohawkify.families.decoder_layers import attention_implementation
from mohawkify.teacher.generation_settings import plain_generation
from mohawkify.teacher.no_remote_code import never_ask
from mohawkify.teacher.quantize import quantiser_options, require_sound_quantisation
from mohawkify.teacher.resolve import ResolvedTeacher
from mohawkify.teacher.validate import require_generation_settings


def load_teacher(
    teacher: ResolvedTeacher, *, dtype: torch.dtype, device: torch.device, bits: int | None = None
) -> PreTrainedModel:
    """Load the frozen teacher.

    Args:
        teacher: resolved; its configuration is not read again.
        dtype: the precision it computes in.
        device: where it runs; ``meta`` compares names and shapes alone.
        bits: 8 or 4: its weights are quantised on the way, embedding and head excepted; None leaves them.

    Raises:
        TeacherError: damaged files; tensors that are missing, left over, misshapen or not finite.
        MissingExtraError: the quantiser is not installed.
    """
    never_ask()
    is_unread = device.type == "meta"
    quantiser = quantiser_options(bits, dtype, device) if bits else {}
    folder, config = teacher.require_folder(), copy.deepcopy(teacher.config)
    assert teacher.tensors, "validated before transformers reads them"
    require_generation_settings(folder)
    model_class = getattr(transformers, teacher.adapter.model_class)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # misfits become one line below
    try:
        model, info = model_class.from_pretrained(
            folder, config=config, dtype=dtype, attn_implementation=attention_implementation(model_class, config),
            use_safetensors=True, local_files_only=True, trust_remote_code=False, output_loading_info=True,
            ignore_mismatched_sizes=True, **({"device_map": "meta"} if is_unread else quantiser),
        )  # fmt: skip
    except Exception as error:  # transformers and safetensors have no common class for what a file can do to them
        if is_out_of_memory(error):
            raise
        raise TeacherError(f"{folder} could not be loaded: {' '.join(str(error).split())[:300]}") from error
    finally:
        logging.set_verbosity(verbosity)
    problem = misfit(info)
    if problem is not None:
        raise TeacherError(
            f"the teacher in {folder} {problem}", hint="the weights do not fit config.json: is the download complete?"
        )
    for name, parameter in model.named_parameters():
        if not is_unread and not torch.isfinite(parameter).all():
            raise TeacherError(f"the teacher in {folder} has values that are not finite in {name}")
    try:
        model.generation_config = plain_generation(model.generation_config, model.config.vocab_size)
    except ValueError as error:
        raise TeacherError(f"the generation settings of the teacher in {folder} are wrong: {error}") from error
    if bits:
        require_sound_quantisation(model, bits)
    else:
        model = model.to(device)
    return model.eval().requires_grad_(False)


def misfit(info: Mapping[str, Any]) -> str | None:
    """The first misfit of weights and model in the loading info of ``from_pretrained``; None where they fit."""
    for key, wording in (
        ("missing_keys", "lacks"),
        ("unexpected_keys", "has an unexpected"),
        ("mismatched_keys", "has a wrong shape for"),
    ):
        names = sorted(name if isinstance(name, str) else str(name[0]) for name in info[key])
        if names:
            return f"{wording} tensor {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
    return None
