"""The MLX targets: a folder that mlx-lm loads and runs, plain or quantised."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Mapping
from importlib import resources, util
from pathlib import Path, PosixPath
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from mohawkify.errors import ExportError, MissingExtraError
from mohawkify.exporters.contents import USUAL_GROUP, Packing, Quantised
from mohawkify.families.adapter import Adapter
from mohawkify.mixers.kinds import mixers_of
from mohawkify.student.layer_spec import read_layer_specs
from mohawkify.student.save import family_of, saved_tensors
from mohawkify.teacher.validate import without_code

MODEL_FILE = "mlx_model.py"
GROUP_SIZES = (USUAL_GROUP, 32)  # weights that share a scale; the first that divides a weight's rows is taken
HEAD = "lm_head.weight"
# Where 4 bits cost most, as in mlx-lm's own mixed recipes: values, what MLPs add to the stream, embedding and head.
FINER_BITS = 6
FINER = re.compile(r"(^|\.)(x_proj|v_proj|down_proj|fc2|dense_4h_to_h|mlp\.c_proj|output_linear|lm_head|embed_out)$")


def require_mlx(values: Mapping[str, Any], is_stock: bool) -> None:
    """Refuse at once what no MLX target can hold.

    Args:
        values: the content of the student's config.json.
        is_stock: whether it is to be a model that needs no code, whatever its family.

    Raises:
        MissingExtraError: mlx-lm is not installed.
        ExportError: mlx-lm does not have the student's family.
    """
    if util.find_spec("mlx_lm") is None:
        raise MissingExtraError("mlx_lm", "mlx", "exporting to MLX")
    adapter = family_of(values.get("model_type", ""))
    if adapter.mlx_module is None and not is_stock:
        raise ExportError(f"mlx-lm has no model of the family {adapter.title}", hint="export to hf instead")


def build_mlx(values: Mapping[str, Any], student: PreTrainedModel) -> tuple[Any, dict[str, Any]]:
    """Build a student as mlx-lm's model of the family with mixers.

    Args:
        values: the content of the student's config.json; of a family that mlx-lm has.
        student: the student in float32.

    Returns:
        The model in float32, and its configuration as mlx-lm reads it.

    Raises:
        ExportError: mlx-lm's model of the family cannot hold this student, or its mixers have no counterpart.
    """
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from mohawkify.exporters import mlx_model

    without = {mixer.kind for mixer in mixers_of(student).values() if not mixer.has_mlx}
    if without:
        raise ExportError(f"the mixer {without.pop()} has no counterpart in MLX", hint="export to hf instead")
    adapter = family_of(values["model_type"])
    config = _mlx_config(values, adapter)
    teacher = _teacher_modules(values, adapter)
    try:
        model = mlx_model.Model(mlx_model.ModelArgs.from_dict(config))
        weights = model.sanitize(_published_weights(student, adapter, teacher, model.mixer_paths()))
        parameters: Any = tree_flatten(model.parameters())
        for name, value in parameters:
            if name not in weights and name.endswith(".bias"):
                weights[name] = mx.zeros_like(value)  # the family's projections have none, mlx-lm's always do
            elif name not in weights and name == HEAD:
                weights[name] = weights[teacher.all_tied_weights_keys[HEAD]]
        model.load_weights(list(weights.items()), strict=True)
    except (ValueError, TypeError, KeyError, IndexError, AssertionError, AttributeError) as error:
        first = " ".join(str(error).split())
        raise ExportError(
            f"mlx-lm's {adapter.mlx_module} cannot hold this student: {first[:300]}", hint="export to hf instead"
        ) from error
    _require_windows(model, config)
    model.eval()
    mx.eval(model.parameters())
    return model, config


def shapes_of(model: Any) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a model, by the name that it has in a file."""
    from mlx.utils import tree_flatten

    parameters: Any = tree_flatten(model.parameters())
    return {name: tuple(value.shape) for name, value in parameters}


def write_mlx(model: Any, config: dict[str, Any], directory: Path, dtype: str, bits: int | None) -> Quantised | None:
    """Write model, configuration and code; the tokenizer and the settings of generation are the caller's.

    Args:
        model: what `build_mlx` returned; it is rounded in place.
        config: its configuration, completed in place.
        directory: an existing, empty folder.
        dtype: of everything but the precise parameters and the quantised weights.
        bits: of the quantised weights; None quantises nothing.

    Returns:
        What was quantised and what was not; None where nothing was to be.
    """
    import mlx.core as mx
    from mlx.utils import tree_map_with_path
    from mlx_lm.utils import save_config, save_model

    def cast(name: str, value: Any) -> Any:
        follows = model.cast_predicate(name) and mx.issubdtype(value.dtype, mx.floating)
        return value.astype(getattr(mx, dtype)) if follows else value

    model.update(tree_map_with_path(cast, model.parameters()))
    config["dtype"] = dtype
    quantised = None if bits is None else _quantise(model, config, bits)
    save_model(directory, model)
    save_config(config, directory / "config.json")
    if "model_file" in config:
        code = resources.files("mohawkify.exporters").joinpath(MODEL_FILE)
        (directory / MODEL_FILE).write_bytes(code.read_bytes())
    return quantised


class _Literal(PosixPath):
    """A folder whose name is no pattern: mlx-lm looks for weights with a pattern that begins with it."""

    def __truediv__(self, name: Any) -> Any:
        return Path(glob.escape(str(self)) if glob.has_magic(name) else self, name)


def load_mlx(directory: Path) -> Any:
    """Load a written MLX folder with mohawkify's own copy of its code, to compute its logits here."""
    from mlx_lm.utils import load_model

    from mohawkify.exporters import mlx_model

    if not (directory / MODEL_FILE).is_file():
        return load_model(_Literal(directory))[0]  # a model that mlx-lm has
    model, _ = load_model(
        _Literal(directory),
        model_config={"model_file": None},
        get_model_classes=lambda config: (mlx_model.Model, mlx_model.ModelArgs),  # type: ignore[arg-type,return-value]
    )
    return model


def mlx_logits(model: Any) -> Callable[[Tensor], Tensor]:
    """The map from token ids (b, l) to a model's logits (b, l, v), both as torch has them."""
    import mlx.core as mx
    import numpy

    from mohawkify.exporters.mlx_on_cpu import use_torch_on_cpu

    use_torch_on_cpu(model)

    def logits(ids_bl: Tensor) -> Tensor:
        return torch.from_numpy(numpy.array(model(mx.array(ids_bl.numpy())).astype(mx.float32)))

    return logits


def _teacher_modules(values: Mapping[str, Any], adapter: Adapter) -> Any:
    """The teacher's own model on the meta device: transformers needs it for the names of published tensors."""
    config = _student_config(values, adapter)
    for key in ("model_type", "architectures", "mixer"):
        config.pop(key, None)
    with torch.device("meta"):
        return getattr(transformers, adapter.model_class)(getattr(transformers, adapter.config_class)(**config))


def _published_weights(
    student: PreTrainedModel, adapter: Adapter, teacher: Any, mixer_paths: dict[int, str]
) -> dict[str, Any]:
    """The student's tensors under the names that the family's published checkpoints have, mixers' under mlx-lm's."""
    import mlx.core as mx

    mixers = {f"{adapter.layers}.{index}.{adapter.attention}.": f"{path}." for index, path in mixer_paths.items()}
    weights = revert_weight_conversion(teacher, saved_tensors(student))
    published: dict[str, Any] = {}
    while weights:  # one at a time: both copies of a large student need not fit
        name, tensor = weights.popitem()
        prefix = next((prefix for prefix in mixers if name.startswith(prefix)), None)
        name = name.removeprefix(adapter.mlx_prefix) if prefix is None else mixers[prefix] + name.removeprefix(prefix)
        published[name] = mx.array(tensor.float().numpy())
    return published


def _student_config(values: Mapping[str, Any], adapter: Adapter) -> dict[str, Any]:
    """The keys of a student's configuration that its family has; others could run code or have no meaning."""
    family = getattr(transformers, adapter.config_class)
    known = {*family().to_dict(), *family.attribute_map, "mixer"}
    return {key: value for key, value in without_code(values).items() if key in known}


def _mlx_config(values: Mapping[str, Any], adapter: Adapter) -> dict[str, Any]:
    """The student's configuration as mlx-lm reads it: transformers' keys, and beside them the older names."""
    config = _student_config(values, adapter)
    for alias, name in getattr(transformers, adapter.config_class).attribute_map.items():
        if name in config:
            config.setdefault(alias, config[name])
    config["mixer"]["counts_tokens"] = adapter.mlx_counts_tokens
    if config.get("head_dim") is None:
        config["head_dim"] = config["mixer"]["config"]["head_dim"]
    config |= _older_rope(config.pop("rope_parameters", None) or {})
    if not any(layer.attention_heads for layer in read_layer_specs(config["mixer"])):
        config["rope_scaling"] = None  # nothing rotates any more, and mlx-lm refuses kinds that it does not have
    config |= _older_layers(config)
    if adapter.mlx_config is not None:
        config |= adapter.mlx_config(config)
    return {**config, "model_file": MODEL_FILE, "mlx_module": adapter.mlx_module}


def _older_rope(rope: dict[str, Any]) -> dict[str, Any]:
    """The keys that transformers 5 has merged into ``rope_parameters``, for one kind of layers or for each."""
    older: dict[str, Any] = {"rope_scaling": None}
    if "sliding_attention" in rope:
        older["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    rope = rope.get("full_attention", rope)
    for key in ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings"):
        if key in rope:
            older[key] = rope[key]
    kind = rope.get("rope_type", "default")
    if kind != "default":
        older["rope_scaling"] = {**{key: value for key, value in rope.items() if key != "rope_theta"}, "type": kind}
    return older


def _older_layers(config: dict[str, Any]) -> dict[str, Any]:
    """The layers with a window, in the two forms that mlx-lm's models read."""
    kinds = list(_layer_kinds(config))
    if not config.get("layer_types"):
        # mlx-lm's llama needs a full layer, and of one without attention it does not matter.
        for index, layer in enumerate(read_layer_specs(config["mixer"])):
            kinds[index] = kinds[index] if layer.attention_heads else "full_attention"
    older: dict[str, Any] = {"layer_types": kinds}
    if "full_attention" in kinds:
        older["sliding_window_pattern"] = kinds.index("full_attention") + 1
    return older


def _layer_kinds(config: dict[str, Any]) -> list[str]:
    """The kind of attention that each of the teacher's layers has, as `TeacherSpec.layer_types`."""
    window, layers = config.get("sliding_window"), config["num_hidden_layers"]
    kinds: list[str] = config.get("layer_types") or ["sliding_attention" if window else "full_attention"] * layers
    return kinds


def _require_windows(model: Any, config: dict[str, Any]) -> None:
    """Refuse a hybrid whose kept attention has another window in mlx-lm's model of the family.

    The comparison of logits would not notice: its text is shorter than the windows of published models.
    """
    from mlx_lm.models.cache import CacheList, KVCache, RotatingKVCache

    layers = zip(read_layer_specs(config["mixer"]), config["layer_types"], model.make_cache(), strict=True)
    for index, (layer, kind, memory) in enumerate(layers):
        if not layer.attention_heads:
            continue
        if isinstance(memory, CacheList):
            _, memory = memory.caches
        own = config["sliding_window"] if kind == "sliding_attention" else None
        window = own if layer.window is None else layer.window
        found = memory.max_size if isinstance(memory, RotatingKVCache) else None
        if found != window or not isinstance(memory, KVCache | RotatingKVCache):
            through = "everything" if window is None else "a sliding window"
            raise ExportError(
                f"layer {index} keeps attention through {through}, which mlx-lm's {config['mlx_module']} lacks",
                hint="export to hf instead",
            )


def _quantise(model: Any, config: dict[str, Any], bits: int) -> Quantised:
    """Quantise the projections, MLPs or experts, embedding and head in place, and record it in the configuration."""
    import mlx.nn as nn

    common: dict[str, Any] = {"group_size": GROUP_SIZES[0], "bits": bits, "mode": "affine"}
    quantisation: dict[str, Any] = dict(common)
    quantised = Quantised(bits)

    def choose(path: str, module: Any) -> bool | dict[str, Any]:
        wanted = hasattr(module, "to_quantized") and model.quant_predicate(path, module)
        if not wanted:
            return False
        sizes = [size for size in GROUP_SIZES if module.weight.shape[-1] % size == 0]
        if not sizes:
            quantised.plain.append(path)
            return False
        # mlx-lm uses more bits for modules of some families that lose much.
        least = wanted["bits"] if isinstance(wanted, dict) else 0
        is_finer = isinstance(module, nn.Embedding) or FINER.search(path) is not None
        own = {"bits": max(bits, least, FINER_BITS if is_finer else 0)}
        chosen = {**common, **own, "group_size": sizes[0]}
        quantised.packed[path] = Packing(chosen["bits"], chosen["group_size"])
        if chosen != common:
            quantisation[path] = chosen
        return chosen

    nn.quantize(model, GROUP_SIZES[0], bits, class_predicate=choose)
    config["quantization"] = quantisation
    return quantised
