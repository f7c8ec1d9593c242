"""Tiny GGUF files, written from random teachers as llama.cpp's converter writes those of real ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from transformers import PreTrainedModel

from tests.bytes_tokenizer import BOS, EOS, NUM_BYTES, bytes_tokenizer
from tests.tiny import tiny_teacher

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
# Rows of 32 numbers, so that a block of any type fits.
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 259}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": BOS, "eos_token_id": EOS}
LLAMA = {"attention_bias": False, "mlp_bias": False, "head_dim": 16}
LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 9, "layer_types": None}
WINDOW = {"attention.sliding_window": 9}
# Of each case: ggml's architecture, the family, the changes to its tiny configuration, and further keys of the file.
CASES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", "llama", {**LLAMA, "rope_parameters": None}, {"rope.dimension_count": 16}),
    "llama3": (
        "llama",
        "llama",
        {
            **LLAMA,
            "tie_word_embeddings": False,
            "rope_parameters": {**LLAMA3, "rope_theta": 5e5, "original_max_position_embeddings": 8192},
            "max_position_embeddings": 131072,
        },
        {"rope.dimension_count": 16},
    ),
    "qwen2": ("qwen2", "qwen2", {"use_sliding_window": False, "layer_types": None}, {}),
    "qwen3": ("qwen3", "qwen3", {"head_dim": 16, "attention_bias": False}, {"attention.key_length": 16}),
    "phi3": ("phi3", "phi3", {"sliding_window": 9}, {**WINDOW, "rope.dimension_count": 8}),
    "gemma2": (
        "gemma2",
        "gemma2",
        GEMMA,
        {**WINDOW, "attention.key_length": 16, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "gemma3": (
        "gemma3",
        "gemma3_text",
        {**GEMMA, "rope_parameters": None, "num_hidden_layers": 6},
        {**WINDOW, "attention.key_length": 16},
    ),
}


def tiny_model(case: str) -> PreTrainedModel:
    """The random teacher of a case."""
    _, family, changes, _ = CASES[case]
    return tiny_teacher(family, **{**SIZES, **changes})


def write_gguf(
    path: Path,
    case: str = "llama",
    model: PreTrainedModel | None = None,
    kind: str = "F32",
    change: Callable[[dict[str, Any], dict[str, np.ndarray]], None] = lambda metadata, tensors: None,
) -> Path:
    """Write a teacher as a GGUF file.

    Args:
        path: where.
        case: which of `CASES`.
        model: the teacher; None makes one.
        kind: ggml's type of the matrices; all else is F32.
        change: receives metadata and tensors, and may damage them.
    """
    model, architecture = model or tiny_model(case), CASES[case][0]
    metadata = {**_settings(case, model.config), **tokenizer_lists()}
    tensors = _tensors(architecture, model)
    change(metadata, tensors)
    writer = gguf.GGUFWriter(path, architecture, use_temp_file=False)
    for key, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif key == "general.architecture":
            writer.kv_data[0][key].value = value
        else:
            kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
            kinds[type(value)](key, value)
    quantised = gguf.GGMLQuantizationType[kind]
    for name, tensor in tensors.items():
        if tensor.ndim > 1 and kind != "F32":
            writer.add_tensor(name, gguf.quantize(tensor, quantised), raw_dtype=quantised)
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tokenizer_lists() -> dict[str, Any]:
    """The tokenizer of bytes, with one merge, as GGUF's metadata."""
    vocabulary = bytes_tokenizer().get_vocab()
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [*sorted(vocabulary, key=vocabulary.__getitem__), "Ġt"],
        "tokenizer.ggml.token_type": [1] * NUM_BYTES + [3, 3, 1],
        "tokenizer.ggml.merges": ["Ġ t"],
        "tokenizer.ggml.bos_token_id": BOS,
        "tokenizer.ggml.eos_token_id": EOS,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": TEMPLATE,
    }


def _settings(case: str, config: Any) -> dict[str, Any]:
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    settings: Mapping[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(rope["rope_theta"]),
        **CASES[case][3],
    }
    architecture = CASES[case][0]
    return {f"{architecture}.{key}": value for key, value in settings.items()}


def _tensors(architecture: str, model: PreTrainedModel) -> dict[str, np.ndarray]:
    """The tensors under ggml's names, changed as llama.cpp's converter changes them."""
    config: Any = model.config
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    tensors = {}
    for name, parameter in model.named_parameters():
        ggml = table.get_name(name, try_suffixes=(".weight", ".bias"))
        assert ggml is not None, name
        tensor = parameter.detach().float().numpy()
        for key, heads in (("attn_q.", config.num_attention_heads), ("attn_k.", config.num_key_value_heads)):
            if architecture == "llama" and key in ggml:  # the halves of each head's rotation, interleaved
                tensor = tensor.reshape(heads, 2, -1, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)
        if architecture.startswith("gemma") and ggml.endswith("norm.weight"):
            tensor = tensor + 1
        tensors[ggml] = np.ascontiguousarray(tensor)
    if "factor" in config.rope_parameters:
        tensors["rope_freqs.weight"] = _rope_factors(config.rope_parameters, config.head_dim)
    return tensors


def _rope_factors(rope: Mapping[str, Any], head_dim: int) -> np.ndarray:
    """Llama 3.1's scaling as llama.cpp's converter writes it."""
    length, low, high = (
        rope[key] for key in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    factors = []
    for pair in range(0, head_dim, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (pair / head_dim)
        if wavelength < length / high:
            factors.append(1.0)
        elif wavelength > length / low:
            factors.append(rope["factor"])
        else:
            smooth = (length / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, dtype=np.float32)
