"""The layout of the released Llamba checkpoints: a student's tensors and sizes under its names, and back.

Of a layer the input projections are one matrix, with rows x | B | C | z | a_log, and the convolutions one, x | B | C.
Read from cartesia-ai/edge (Apache-2.0): `cartesia_pytorch/Llamba`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel

from mohawkify.errors import ExportError, TeacherError
from mohawkify.families.adapter import Adapter
from mohawkify.families.registry import load_adapter
from mohawkify.files.safetensors_headers import FLOAT_BYTES, read_tensors
from mohawkify.mixers.kinds import mixers_of
from mohawkify.recipe.schema import StudentRecipe
from mohawkify.student.build import classes_for, design_student, student_config
from mohawkify.student.layer_spec import read_layer_specs
from mohawkify.student.save import family_of, saved_tensors
from mohawkify.student.student_spec import StudentSpec
from mohawkify.teacher.meta_model import lay_out
from mohawkify.teacher.validate import require_config

MODEL_TYPE = "llamba"
EPSILON = 1e-5  # of the norms of its layers, whatever the configuration says
POSITIONS = 131_072  # of Llama 3; a student without attention has no limit, and Llamba's configuration names none
VOCABULARY_MULTIPLE = 8
EMBEDDING, HEAD = "backbone.embedding.weight", "lm_head.weight"
ENDS = {"embedding.weight": "model.embed_tokens.weight", "final_layernorm.weight": "model.norm.weight"}
NORMS_AND_MLP = (
    "input_layernorm.weight", "post_attention_layernorm.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight",
    "mlp.down_proj.weight",
)  # fmt: skip
MIXER = {"z_bias": "z_bias", "D": "d", "out_proj.weight": "out_proj.weight"}
PROJECTIONS = tuple(f"{name}_proj.weight" for name in ("x", "b", "c", "z", "decay"))
CONVOLUTIONS = tuple(f"{name}_conv" for name in ("x", "b", "c"))
ACTIVATIONS = {"identity": "none", "silu": "silu", "swish": "silu"}
# Some files spell keys as the Mamba family or as transformers does.
_SPELLINGS = {
    "hidden_size": "d_model", "num_hidden_layers": "n_layer", "tie_word_embeddings": "tie_embeddings",
    "rms_norm_eps": "norm_epsilon",
}  # fmt: skip


def require_llamba(student: PreTrainedModel) -> None:
    """Refuse a student that the layout has no place for; raises ExportError that names the key which would help."""
    model: Any = student
    mixers = mixers_of(student)
    sizes, config = next(iter(mixers.values())).config, model.config
    inner, adapter = sizes.num_heads * sizes.head_dim, family_of(config.model_type)
    reasons = {
        "attention that is kept, expected mixers alone": (
            any(layer.attention_heads for layer in read_layer_specs(config.mixer)),
            "student.keep: {}",
        ),
        "a learned bias on the decay": (getattr(sizes, "decay_bias", True), "student.decay_bias: false"),
        "writes that are multiplied by the decay": (
            getattr(sizes, "write", "plain") != "plain",
            "student.write: plain",
        ),
        "a norm behind the gate": (getattr(sizes, "gated_norm", False), "student.gated_norm: false"),
        f"{inner} inner channels, expected a multiple of the model's width {config.hidden_size}": (
            inner % config.hidden_size != 0,
            None,
        ),
        f"norms with epsilon {getattr(config, 'rms_norm_eps', None)}, expected RMS norms with {EPSILON}": (
            getattr(config, "rms_norm_eps", None) != EPSILON,
            None,
        ),
        f"MLPs with {getattr(config, 'hidden_act', None)}, expected silu": (
            getattr(config, "hidden_act", None) != "silu",
            None,
        ),
    }
    for what, (is_so, hint) in reasons.items():
        if is_so:
            raise ExportError(f"Llamba's layout has no place for {what}", hint=hint or "export to hf instead")
    left = saved_tensors(student).keys() - _names(config.num_hidden_layers, adapter).keys()
    if left:
        raise ExportError(
            f"Llamba's layout has no place for {sorted(left)[0]} of {adapter.title}", hint="export to hf instead"
        )


def llamba_tensors(student: PreTrainedModel) -> dict[str, Tensor]:
    """A student's tensors under Llamba's names."""
    model: Any = student
    own = saved_tensors(student)
    names = _names(model.config.num_hidden_layers, family_of(model.config.model_type))
    parts: dict[str, list[Tensor]] = {}
    for name in names:  # in the order of the rows
        if name in own:
            parts.setdefault(names[name], []).append(own[name])
    return {
        name: (torch.cat(tensors).unsqueeze(1) if name.endswith("conv1d.weight") else torch.cat(tensors)).contiguous()
        for name, tensors in parts.items()
    }


def write_llamba(student: PreTrainedModel, folder: Path, dtype: torch.dtype) -> dict[str, tuple[int, ...]]:
    """Write weights and configuration; returns the shape of every tensor by name."""
    tensors = llamba_tensors(student)
    save_torch_state_dict({name: tensor.to(dtype) for name, tensor in tensors.items()}, folder, max_shard_size="5GB")
    (folder / "config.json").write_text(json.dumps(llamba_config(student), indent=2) + "\n", encoding="utf-8")
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def llamba_config(student: PreTrainedModel) -> dict[str, Any]:
    """The content of Llamba's config.json."""
    model: Any = student
    config, sizes = model.config, next(iter(mixers_of(student).values())).config
    return {
        "model_type": MODEL_TYPE,
        "vocab_size": config.vocab_size,
        "d_model": config.hidden_size,
        "n_layer": config.num_hidden_layers,
        "tie_embeddings": config.tie_word_embeddings,
        # A vocabulary of another size must not be padded: the tensors have no more rows.
        "pad_vocab_size_multiple": 1 if config.vocab_size % VOCABULARY_MULTIPLE else VOCABULARY_MULTIPLE,
        "lm_head_bias": False,
        "norm_epsilon": EPSILON,
        "resid_dropout": 0.0,
        "mlp_cfg": {"intermediate_size": config.intermediate_size, "bias": False, "act_fn": "silu"},
        "ssm_cfg": {
            "d_state": sizes.state_size,
            "n_v_heads": sizes.num_heads,
            "n_qk_heads": sizes.num_heads,
            "d_conv": sizes.conv_kernel,
            "expand": sizes.num_heads * sizes.head_dim // config.hidden_size,
            "chunk_size": 128,
            "activation": "silu" if sizes.conv_activation == "silu" else "identity",
            "bias": False,
        },
    }


def load_llamba(folder: Path, name: str) -> tuple[PreTrainedModel, StudentSpec]:
    """Load a Llamba checkpoint as a student of a Llama, in float32 on the CPU.

    Args:
        folder: config.json and safetensors.
        name: of the student.

    Returns:
        The student in evaluation mode, and its facts.

    Raises:
        TeacherError: it is no such checkpoint, or damaged.
        CheckpointError: config.json is not strict JSON.
    """
    path = folder / "config.json"
    config, recipe = read_llamba_config(path)
    found = _read(folder)
    embedding = found.get(EMBEDDING)
    config.vocab_size = 0 if embedding is None else len(embedding)  # padded, unlike what some files say
    adapter = load_adapter("llama")
    _, teacher = lay_out(str(folder), path, config, adapter)
    spec = design_student(name, teacher, config, adapter, recipe)
    student: Any = classes_for(adapter)[1](student_config(config, adapter, spec.mixer_entry())).float()
    if config.tie_word_embeddings and torch.equal(found.get(HEAD, embedding), embedding):  # type: ignore[arg-type]
        found.pop(HEAD, None)
    expected = {key: tuple(tensor.shape) for key, tensor in llamba_tensors(student).items()}
    for key in sorted(expected.keys() | found.keys()):
        shape = tuple(found[key].shape) if key in found else None
        if shape != expected.get(key):
            raise TeacherError(
                f"{folder} holds {key} as {shape or 'nothing'}, expected {expected.get(key) or 'nothing'}",
                hint="weights and config.json are of different models: fetch them again",
            )
        if not found[key].isfinite().all():
            raise TeacherError(f"{folder} holds {key} with values that are not finite")
    with torch.no_grad():
        own = student.state_dict()
        rows: dict[str, int] = {}
        for ours, theirs in _names(config.num_hidden_layers, adapter).items():
            if ours in own and theirs in found:
                begin = rows.get(theirs, 0)
                rows[theirs] = begin + len(own[ours])
                own[ours].copy_(found[theirs][begin : rows[theirs]].reshape(own[ours].shape))
        student.tie_weights()
    return student.eval(), spec


def read_llamba_config(path: Path) -> tuple[LlamaConfig, StudentRecipe]:
    """The Llama whose attention a Llamba replaces, and its mixers.

    Raises:
        TeacherError: it is not Llamba's, or has what no student has.
    """
    values = require_config(path)
    values = values["config"] if isinstance(values.get("config"), dict) else values  # as PyTorchModelHubMixin nests it
    values = {_SPELLINGS.get(key, key): value for key, value in values.items()}
    if values.get("model_type", MODEL_TYPE) != MODEL_TYPE or not isinstance(values.get("ssm_cfg"), dict):
        raise TeacherError(
            f"{path} is of a model of type {str(values.get('model_type'))[:60]}, expected {MODEL_TYPE}",
            hint="`mohawkify convert` takes Transformers; only Llamba checkpoints are imported",
        )
    mixer, mlp = values["ssm_cfg"], values.get("mlp_cfg")
    mlp = mlp if isinstance(mlp, dict) else {}
    width, heads = _count(path, values, "d_model"), _count(path, mixer, "n_v_heads")
    inner = width * _count(path, mixer, "expand", 1)
    unknown = {
        "n_qk_heads": mixer.get("n_qk_heads", heads) != heads,
        "bias": bool(mixer.get("bias", False)) or bool(mlp.get("bias", False)),
        "lm_head_bias": bool(values.get("lm_head_bias", False)),
        "act_fn": mlp.get("act_fn", "silu") != "silu",
        "activation": mixer.get("activation", "identity") not in ACTIVATIONS,
        "norm_epsilon": values.get("norm_epsilon", EPSILON) != EPSILON,
        "n_v_heads": inner % heads != 0,
    }
    wrong = [key for key, is_so in unknown.items() if is_so]
    if wrong:
        raise TeacherError(f"{path} has a {wrong[0]} that students here do not have")
    config = LlamaConfig(
        vocab_size=_count(path, values, "vocab_size"),
        hidden_size=width,
        num_hidden_layers=_count(path, values, "n_layer"),
        intermediate_size=_count(path, mlp, "intermediate_size"),
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=inner // heads,
        rms_norm_eps=EPSILON,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=values.get("tie_embeddings") is True,
    )
    recipe = StudentRecipe(
        init="identity",
        state_size=_count(path, mixer, "d_state"),
        conv_kernel=_count(path, mixer, "d_conv", 4),
        decay_bias=False,
        conv_activation=ACTIVATIONS[mixer.get("activation", "identity")],  # type: ignore[arg-type]
    )
    return config, recipe


def _count(path: Path, values: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = values.get(key, default)
    if type(value) is not int or not 0 < value < 2**31:
        raise TeacherError(f"{path} has {str(value)[:40]} as {key}, expected a count")
    return value


def _read(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder by Llamba's names, in float32."""
    tensors: dict[str, Tensor] = {}
    for name, header in read_tensors(folder).items():
        if header.dtype not in FLOAT_BYTES:
            raise TeacherError(f"{folder} holds {name} as {header.dtype}, expected plain weights")
        with safe_open(header.file, framework="pt") as file:
            tensor = file.get_tensor(name).float()
        known = re.sub(r"^(model\.)?(?=backbone\.)|^model\.(?=lm_head)", "", name).replace("embeddings.", "embedding.")
        tensors[known] = tensor.unsqueeze(1) if known.endswith("conv1d.weight") and tensor.dim() == 2 else tensor
    return tensors


def _names(num_layers: int, adapter: Adapter) -> dict[str, str]:
    """The tensor of Llamba's that each of a student's is in, those that share one in the order of their rows."""
    names = {ours: f"backbone.{theirs}" for theirs, ours in ENDS.items()} | {HEAD: HEAD}
    for index in range(num_layers):
        layer, theirs = f"{adapter.layers}.{index}.", f"backbone.layers.{index}."
        mixer = f"{layer}{adapter.attention}."
        names |= {layer + name: theirs + name for name in NORMS_AND_MLP}
        names |= {mixer + ours: f"{theirs}mixer.{name}" for name, ours in MIXER.items()}
        names |= {mixer + name: f"{theirs}mixer.in_proj.weight" for name in PROJECTIONS}
        for part in ("weight", "bias"):
            names |= {f"{mixer}{name}.{part}": f"{theirs}mixer.conv1d.{part}" for name in CONVOLUTIONS}
    return names
