"""The MLX targets: a folder that mlx-lm loads and runs, plain or quantised."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import resources, util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mohawkify.errors import ExportError, MissingExtraError
from mohawkify.student.save import family_of

MODEL_FILE = "mlx_model.py"
GROUP_SIZES = (64, 32)  # weights that share a scale; the first that divides a weight's rows is taken


def require_mlx() -> None:
    """Raise MissingExtraError where mlx-lm is not installed."""
    if util.find_spec("mlx_lm") is None:
        raise MissingExtraError("mlx_lm", "mlx", "exporting to MLX")


def write_mlx(final: Path, directory: Path, dtype: str, bits: int | None) -> list[str]:
    """Write model, configuration and code; the tokenizer is the caller's.

    Args:
        final: the student's Hugging Face folder.
        directory: an existing, empty folder.
        dtype: of everything but the precise parameters and the quantised weights.
        bits: of the quantised weights; None quantises nothing.

    Returns:
        Modules that stay plain because no group size divides their width.

    Raises:
        ExportError: mlx-lm does not have the student's family.
    """
    import mlx.core as mx
    from mlx.utils import tree_map_with_path
    from mlx_lm.utils import save_config, save_model

    config = _mlx_config(final)
    model = _load(final, config)
    _require_windows(model, config)

    def cast(name: str, value: Any) -> Any:
        follows = model.cast_predicate(name) and mx.issubdtype(value.dtype, mx.floating)
        return value.astype(getattr(mx, dtype)) if follows else value

    model.update(tree_map_with_path(cast, model.parameters()))
    config["dtype"] = dtype
    plain = [] if bits is None else _quantise(model, config, bits)
    save_model(directory, model)
    save_config(config, directory / "config.json")
    for name in (MODEL_FILE, "generation_config.json"):
        source = resources.files("mohawkify.export") if name == MODEL_FILE else final
        (directory / name).write_bytes(source.joinpath(name).read_bytes())
    return plain


def mlx_logits(directory: Path) -> Callable[[Tensor], Tensor]:
    """Load a written MLX folder with mohawkify's own copy of its code; returns the map from token ids to logits."""
    import mlx.core as mx
    import numpy

    model = _load(directory, {"model_file": None})

    def logits(ids_bl: Tensor) -> Tensor:
        return torch.from_numpy(numpy.array(model(mx.array(ids_bl.numpy())).astype(mx.float32)))

    return logits


def _load(directory: Path, overrides: dict[str, Any]) -> Any:
    from mlx_lm.utils import load_model

    from mohawkify.export import mlx_model

    model, _ = load_model(
        directory,
        model_config={**overrides, "model_file": None},
        get_model_classes=lambda config: (mlx_model.Model, mlx_model.ModelArgs),  # type: ignore[arg-type,return-value]
    )
    return model


def _mlx_config(final: Path) -> dict[str, Any]:
    """The student's configuration as mlx-lm reads it."""
    config: dict[str, Any] = json.loads((final / "config.json").read_text(encoding="utf-8"))
    adapter = family_of(config["model_type"])
    if adapter.mlx_module is None:
        raise ExportError(f"mlx-lm has no model of the family {adapter.title}", hint="export to hf instead")
    config.pop("auto_map", None)
    rope = config.pop("rope_parameters", None)
    if rope is not None:
        # mlx-lm's older families read the two keys that transformers 5 has merged into one.
        config["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            config["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    return {**config, "model_file": MODEL_FILE, "mlx_module": adapter.mlx_module}


def _require_windows(model: Any, config: dict[str, Any]) -> None:
    """Refuse a hybrid whose kept attention looks through a window that mlx-lm's model of the family does not have."""
    from mlx_lm.models.cache import KVCache

    kinds = config.get("layer_types") or []
    for index, (kind, memory) in enumerate(zip(kinds, model.make_cache(), strict=False)):
        if kind == "sliding_attention" and type(memory) is KVCache:
            raise ExportError(
                f"layer {index} keeps attention through a sliding window, which mlx-lm's {config['mlx_module']} lacks",
                hint="export to hf instead",
            )


def _quantise(model: Any, config: dict[str, Any], bits: int) -> list[str]:
    """Quantise the projections, the MLPs, embedding and head in place, and say so in the configuration."""
    import mlx.nn as nn

    quantisation: dict[str, Any] = {"group_size": GROUP_SIZES[0], "bits": bits, "mode": "affine"}
    plain: list[str] = []

    def choose(path: str, module: Any) -> bool | dict[str, Any]:
        if not hasattr(module, "to_quantized") or not model.quant_predicate(path, module):
            return False
        sizes = [size for size in GROUP_SIZES if module.weight.shape[-1] % size == 0]
        if not sizes:
            plain.append(path)
            return False
        chosen = {"group_size": sizes[0], "bits": bits, "mode": "affine"}
        if sizes[0] != GROUP_SIZES[0]:
            quantisation[path] = chosen
        return chosen

    nn.quantize(model, GROUP_SIZES[0], bits, class_predicate=choose)
    config["quantization"] = quantisation
    return plain
