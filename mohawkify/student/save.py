"""A student as a self-contained Hugging Face folder, and back.

The folder carries the code it needs: copies of the files below and a generated `modeling_mohawk.py`, so that
transformers loads it with ``trust_remote_code=True`` where mohawkify is not installed. Where it is, its own classes are
registered and no code of the folder runs.
"""

from __future__ import annotations

import copy
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import cache, wraps
from inspect import getsource
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from mohawkify.errors import CheckpointError, ExportError, is_out_of_memory
from mohawkify.families.adapter import Adapter
from mohawkify.families.autodetect import find_classes
from mohawkify.files.safetensors_headers import read_tensors
from mohawkify.mixers.kinds import Mixer, mixer_class
from mohawkify.student.build import classes_for
from mohawkify.student.graft import precise_parameters
from mohawkify.student.layer_spec import mixer_layers, read_layer_specs
from mohawkify.teacher.generation_settings import plain_generation
from mohawkify.teacher.load import misfit
from mohawkify.teacher.no_remote_code import never_ask
from mohawkify.teacher.validate import (
    require_config,
    require_generation_settings,
    require_plain_weights,
    require_room,
    require_settings,
    require_token_ids,
    without_code,
)

TYPE_PREFIX = "mohawk_"
MODEL_FILE = "modeling_mohawk"
# Modules that travel with every student; those of its mixers come beside them.
CARRIED_MODULES = (
    "mohawkify.families.decoder_layers",
    "mohawkify.mixers.attention_heads",
    "mohawkify.mixers.mixer",
    *(f"mohawkify.student.{name}" for name in ("cache", "graft", "layer_spec")),
)

_OUR_IMPORT = re.compile(r"^from mohawkify(?:\.\w+)*\.(\w+) import", re.MULTILINE)
_MODEL_TEXT = '''"""The student's classes for transformers; written by mohawkify."""

from transformers import {config}, {model}

# All of the folder's code is named here: transformers 5.5.0 fetches what this file imports and no more.
{imports}
from .graft import GraftedModel, grafted_forward


class Mohawk{config}({config}):
    model_type = "{model_type}"


class Mohawk{model}(GraftedModel, {model}):
    config_class = Mohawk{config}
    forward = grafted_forward({model})
'''


def save_student(
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    directory: Path,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a student with its tokenizer and its code.

    Args:
        student: the model; it is not changed.
        tokenizer: its teacher's tokenizer; None leaves it to the caller.
        directory: an existing, empty folder; make it with `atomic.atomic_directory`.
        dtype: of the weights; None keeps theirs. Its mixers' `precise_parameters` never go below float32.
    """
    model: Any = student  # transformers' types lack the grafted class
    dtype = dtype or model.dtype
    adapter = family_of(model.config.model_type)
    weights = {
        name: tensor.to(_saved_dtype(name, tensor, dtype, model.config)).contiguous()
        for name, tensor in saved_tensors(model).items()
    }
    save_torch_state_dict(weights, directory, max_shard_size="5GB")

    config = copy.deepcopy(model.config)
    config.dtype = dtype
    config.architectures = [f"Mohawk{adapter.model_class}"]
    config.auto_map = _auto_map(adapter)
    config.name_or_path = ""  # may be a path of this machine
    config.save_pretrained(directory)
    # Not save_pretrained: it refuses sampling settings without do_sample, which published teachers have.
    model.generation_config.to_json_file(directory / "generation_config.json")
    if tokenizer is not None:
        save_tokenizer(tokenizer, directory)
    _write_code(adapter, config.mixer, directory)


def saved_tensors(student: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors that a student is saved as, by name: one that is another's under a second name is left out."""
    model: Any = student
    return {name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys}


def weight_bytes(student: PreTrainedModel, dtype: torch.dtype | None = None) -> int:
    """The size of the weights on the disk as `save_student` writes them; the rest of the folder is small."""
    dtype = dtype or student.dtype
    kept = saved_tensors(student).items()
    return sum(tensor.numel() * _saved_dtype(name, tensor, dtype, student.config).itemsize for name, tensor in kept)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write a tokenizer without what transformers notes about where it was loaded from."""
    tokenizer.save_pretrained(directory)
    file = directory / "tokenizer_config.json"
    facts = json.loads(file.read_text(encoding="utf-8"))
    for key in ("is_local", "local_files_only", "name_or_path"):
        facts.pop(key, None)
    file.write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load_student(
    directory: Path, dtype: torch.dtype = torch.float32, config_values: Mapping[str, Any] | None = None
) -> PreTrainedModel:
    """Load a folder written by `save_student` with mohawkify's own classes; its code is not run.

    Args:
        directory: the folder.
        dtype: precision of the weights; the mixers' `precise_parameters` stay in float32.
        config_values: the content of config.json; None reads it.

    Returns:
        The student on the CPU, in evaluation mode.

    Raises:
        UnknownFamilyError: there is no adapter for the student's teacher.
        TeacherError: sizes that no model has, or keys that are no settings.
        CheckpointError: not a student, or damaged: tensors missing, left over or misshapen.
    """
    never_ask()
    path = directory / "config.json"
    values = without_code(require_config(path) if config_values is None else config_values)
    config_class, model_class = register_family(family_of(values.get("model_type", "")))
    require_settings(path, values, config_class)
    require_generation_settings(directory)
    try:
        require_plain_weights(path, values)
        tensors = read_tensors(directory)  # transformers would follow an index out of the folder
        require_token_ids(path, config_class(**values))
        with torch.device("meta"):
            require_room(path, model_class(config_class(**values)), tensors)
        student, info = model_class.from_pretrained(
            directory, config=config_class(**values), dtype=dtype, local_files_only=True, use_safetensors=True,
            trust_remote_code=False, output_loading_info=True, ignore_mismatched_sizes=True,
        )  # fmt: skip
        student.generation_config = plain_generation(student.generation_config, student.config.vocab_size)
    except Exception as error:  # transformers and safetensors have no common class for what a file can do to them
        if is_out_of_memory(error):
            raise
        raise CheckpointError(
            f"the student in {directory} could not be loaded: {' '.join(str(error).split())[:300]}",
            hint="its files are damaged or incomplete: copy them again, or convert again into another --output",
        ) from error
    problem = misfit(info)
    if problem is not None:
        raise CheckpointError(f"the student in {directory} {problem}")
    return student.eval()


def family_of(model_type: str) -> Adapter:
    """The family of a student's teacher, by the student's model type; raises CheckpointError if it is none."""
    if not isinstance(model_type, str) or not model_type.startswith(TYPE_PREFIX):
        raise CheckpointError(f"found a model of type {model_type!r}, expected a student of type {TYPE_PREFIX}...")
    return find_classes(model_type.removeprefix(TYPE_PREFIX))


@cache
def register_family(adapter: Adapter) -> tuple[Any, Any]:
    """Register a family's students with transformers' Auto classes; returns their configuration and model class."""
    config_class, model_class = classes_for(adapter)
    model_class.save_pretrained = _saving_code(adapter, model_class.save_pretrained)
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
    return config_class, model_class


def is_precise(name: str, patterns: Iterable[str]) -> bool:
    """Whether a parameter stays in float32 whatever the student's precision, by its `precise_parameters`."""
    return any(re.search(pattern, name) for pattern in patterns)


def _saving_code(adapter: Adapter, save_pretrained: Callable[..., None]) -> Callable[..., None]:
    """A ``save_pretrained`` that writes the student's code too, without which only mohawkify could load the folder."""

    @wraps(save_pretrained)
    def save(self: Any, save_directory: str | Path, is_main_process: bool = True, **kwargs: Any) -> None:
        if is_main_process:  # of several that save one model together
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            _write_code(adapter, self.config.mixer, Path(save_directory))
        self.config.auto_map = _auto_map(adapter)
        save_pretrained(self, save_directory, is_main_process=is_main_process, **kwargs)

    return save


def _auto_map(adapter: Adapter) -> dict[str, str]:
    """Where transformers finds the classes in a student's folder."""
    return {
        "AutoConfig": f"{MODEL_FILE}.Mohawk{adapter.config_class}",
        "AutoModelForCausalLM": f"{MODEL_FILE}.Mohawk{adapter.model_class}",
    }


def _saved_dtype(name: str, tensor: Tensor, dtype: torch.dtype, config: Any) -> torch.dtype:
    """The precision in which a tensor is written."""
    if not tensor.is_floating_point():
        return tensor.dtype
    return torch.promote_types(dtype, torch.float32) if is_precise(name, precise_parameters(config.mixer)) else dtype


def _carried_code(mixer: dict[str, Any]) -> dict[str, str]:
    """The text of every module that travels with a student, by the name it has in the folder."""
    specs = read_layer_specs(mixer)
    kinds = [mixer_class(kind) for kind in {specs[index].kind for index in mixer_layers(specs)}]
    names = {*CARRIED_MODULES, *(name for kind in kinds for name in (*_defining_modules(kind), *kind.code))}
    modules = [sys.modules[name] for name in sorted(names)]  # all imported: by the mixers, or by this module
    short = [module.__name__.rpartition(".")[2] for module in modules]
    twice = next((name for name in short if short.count(name) > 1), None)
    if twice is not None:
        raise ExportError(
            f"the student's mixers bring two modules named {twice}, which would be one file of its folder",
            hint="rename the module of the mixer that another package registers",
        )
    return {m.__name__.rpartition(".")[2]: _OUR_IMPORT.sub(r"from .\1 import", getsource(m)) for m in modules}


def _defining_modules(kind: type[Mixer]) -> set[str]:
    """The modules of a mixer and of what it is derived from."""
    return {base.__module__ for base in kind.__mro__ if issubclass(base, Mixer)}


def _write_code(adapter: Adapter, mixer: dict[str, Any], directory: Path) -> None:
    code = _carried_code(mixer)
    for name, text in code.items():
        (directory / f"{name}.py").write_text(text, encoding="utf-8")
    text = _MODEL_TEXT.format(
        config=adapter.config_class,
        model=adapter.model_class,
        model_type=TYPE_PREFIX + adapter.model_type,
        imports="\n".join(f"from .{name} import __name__ as _{name}" for name in code),
    )
    (directory / f"{MODEL_FILE}.py").write_text(text, encoding="utf-8")
