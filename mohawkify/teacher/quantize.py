"""Teachers in 8 or 4 bits, by transformers' own quantiser for bitsandbytes, on CUDA and on CPUs alike."""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import torch
from torch import nn

from mohawkify.errors import MissingExtraError, TeacherError

ROWS_ON_CPUS = 32  # bitsandbytes packs 4-bit weights in blocks of so many rows for CPUs, and stops at any other number


def require_quantiser(bits: int) -> None:
    """Refuse a teacher in so many bits where nothing can quantise it.

    Raises:
        MissingExtraError: bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingExtraError("bitsandbytes", "quant", f"a teacher in {bits} bits")


def quantiser_options(bits: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """The arguments of ``from_pretrained`` that quantise weights while they are loaded.

    Args:
        bits: 8 (LLM.int8) or 4 (NF4, scales quantised too).
        dtype: the precision that products are computed in.
        device: where the model runs; it cannot be moved afterwards.

    Raises:
        MissingExtraError: bitsandbytes is not installed.

    Source: LLM.int8 (arXiv 2208.07339); QLoRA (arXiv 2305.14314) for NF4.
    """
    require_quantiser(bits)
    from transformers import BitsAndBytesConfig

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it repeats a note about dtypes at every product
    if bits == 8:
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    return {"quantization_config": config, "device_map": {"": device}}


def require_sound_quantisation(model: nn.Module, bits: int) -> None:
    """Refuse what bitsandbytes would trip over, or not have quantised at all, before anything is computed.

    Raises:
        TeacherError: nothing was quantised; or 4-bit weights on a CPU whose rows cannot be packed.
    """
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    kind = Linear8bitLt if bits == 8 else Linear4bit
    quantised = {name: module for name, module in model.named_modules() if isinstance(module, kind)}
    if not quantised:
        raise TeacherError(f"the teacher has no weights that bitsandbytes can take in {bits} bits")
    for name, module in quantised.items():
        rows = module.out_features
        if bits == 4 and module.weight.device.type == "cpu" and rows % ROWS_ON_CPUS:
            raise TeacherError(
                f"{name} has {rows} rows, expected a multiple of {ROWS_ON_CPUS} for 4 bits on a CPU",
                hint="take the teacher in 8 bits, or on a GPU",
            )
