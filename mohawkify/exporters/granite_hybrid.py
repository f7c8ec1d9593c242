"""A student whose writes are by decay as GraniteMoeHybrid, a dense Mamba-2 that engines have: no code travels.

Its recurrence is Mamba-2's with A = -1. The three things that Mamba-2 has beside it are made to vanish: SiLU behind the
convolution is u / 2 for small u, so the taps are tiny; the gated norm of outputs that are tinier still divides by the
root of its epsilon, so its weight has the inverse of all that; and every head is a group of its own.

Shapes: h heads, p head width, n state width, d model width, k taps.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM, PreTrainedModel
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import GraniteMoeHybridRotaryEmbedding

from mohawkify.errors import ExportError
from mohawkify.families.adapter import Adapter
from mohawkify.mixers.kinds import mixer_class, mixers_of
from mohawkify.student.layer_spec import ATTENTION, read_layer_specs
from mohawkify.student.save import family_of, is_precise, saved_tensors

# Of the taps, a power of two, which costs no precision. SiLU(u) = u / 2 (1 + u / 2 ...): of features up to 1,000 it
# changes less than 3e-5, and outputs have its third power, 2^-75, where float32 and bfloat16 end at 2^-126.
TAP_SCALE = 2.0**-24
HALF = TAP_SCALE / 2  # what SiLU makes of it
SHORTEST_KERNEL = 2  # engines take a convolution of one tap for another layout
CHUNK_LENGTH = 256
PRECISE = (r"\.A_log$", r"\.D$", r"\.dt_bias$")
OTHER_TARGET = "export to hf or mlx instead"


def require_mamba2(student: PreTrainedModel) -> None:
    """Refuse a student that is no GraniteMoeHybrid, with the key of the recipe that would change it.

    Raises:
        ExportError: its family, its mixers or its kept attention have no counterpart.
    """
    config: Any = student.config
    adapter = family_of(config.model_type)
    if adapter.mamba2 is None:
        raise ExportError(f"GraniteMoeHybrid has no layers like those of {adapter.title}", hint=OTHER_TARGET)
    for mixer in mixers_of(student).values():
        if not isinstance(mixer, mixer_class("discrete_mamba2")):
            raise _refused(f"the mixer {mixer.kind}", "student.mixer: discrete_mamba2")
        for key, wanted in (("write", "decay"), ("conv_activation", "none"), ("gated_norm", False)):
            found = getattr(mixer.config, key)
            if found != wanted:
                raise _refused(f"student.{key}: {str(found).lower()}", f"student.{key}: {str(wanted).lower()}")
    for index, layer in enumerate(read_layer_specs(config.mixer)):
        if layer.heads:
            raise _refused(f"the heads that layer {index} keeps beside its mixer", "student.keep.heads: []")
        if layer.window is not None:
            raise _refused(f"the window of layer {index}", "student.keep.window: null")
        reason = _misfit(config, adapter, index) if layer.kind == ATTENTION else None
        if reason:
            raise _refused(f"the attention that layer {index} keeps, which {reason},", "student.keep.layers: []")


def _refused(what: str, key: str) -> ExportError:
    return ExportError(f"GraniteMoeHybrid has no counterpart of {what}", hint=f"convert with {key}; or {OTHER_TARGET}")


def _misfit(config: Any, adapter: Adapter, index: int) -> str | None:
    """Why a kept layer's attention is not Granite's, or None."""
    kinds = (
        getattr(config, "layer_types", None)
        or ["sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"]
        * config.num_hidden_layers
    )
    width, heads = config.hidden_size, config.num_attention_heads
    if adapter.mamba2 != "hybrids":
        return f"is that of {adapter.title}"
    if kinds[index] != "full_attention":
        return "looks through a window"
    if (getattr(config, "head_dim", None) or width // heads) * heads != width:
        return "has heads that are not together as wide as the model"
    if len(set(_rotates(config))) > 1:
        return "rotates, unlike that of another kept layer"
    return None


def _rotates(config: Any) -> list[bool]:
    """Of every kept layer whether it rotates queries and keys."""
    layers = read_layer_specs(config.mixer)
    rotates = getattr(config, "no_rope_layers", None) or [1] * len(layers)
    return [bool(rotates[index]) for index, layer in enumerate(layers) if layer.kind == ATTENTION]


def build_mamba2(student: PreTrainedModel) -> Any:
    """The student as transformers' own model, in float32.

    Where the student has no attention, a layer of zeros with one is appended: engines build their caches around one.

    Args:
        student: the student in float32, as `require_mamba2` has it.

    Raises:
        ExportError: it has a tensor that GraniteMoeHybrid has no place for.
    """
    config, left = mamba2_config(student), dict(saved_tensors(student))
    tensors = {name: left.pop(name) for name in ("model.embed_tokens.weight", "model.norm.weight")}
    if not config.tie_word_embeddings:
        tensors["lm_head.weight"] = left.pop("lm_head.weight")
    mixers: dict[int, Any] = {mixer.layer_idx: mixer for mixer in mixers_of(student).values()}
    for index in range(student.config.num_hidden_layers):
        prefix = f"model.layers.{index}."
        own = {name.removeprefix(prefix): left.pop(name) for name in list(left) if name.startswith(prefix)}
        tensors |= {prefix + name: tensor for name, tensor in _layer(own, mixers.get(index), config).items()}
        left |= {prefix + name: tensor for name, tensor in own.items()}
    if left:
        raise ExportError(f"GraniteMoeHybrid has no place for the student's {min(left)}", hint=OTHER_TARGET)
    with torch.device("meta"):
        model = GraniteMoeHybridForCausalLM(config)
    if config.num_hidden_layers > student.config.num_hidden_layers:
        last = f"model.layers.{config.num_hidden_layers - 1}."
        tensors |= {
            name: torch.full(parameter.shape, float(name.endswith("layernorm.weight")))
            for name, parameter in model.state_dict().items()
            if name.startswith(last)
        }
    if config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors, strict=True, assign=True)
    model.tie_weights()
    if model.model.rotary_emb is not None:
        model.model.rotary_emb = GraniteMoeHybridRotaryEmbedding(config)  # its buffers are not among the tensors
    return model.eval()


def mamba2_config(student: PreTrainedModel) -> Any:
    """The configuration of `build_mamba2`'s model."""
    values: Any = student.config
    layers, mixer = read_layer_specs(values.mixer), values.mixer["config"]
    width, head_dim = values.hidden_size, mixer["head_dim"]
    heads = next(layer.mixer_heads for layer in layers if layer.mixer_heads)
    # A multiple of the width: heads of zeros fill it up where it is none.
    expand = next(
        n for n in range(1, heads * head_dim + 1) if n * width >= heads * head_dim and n * width % head_dim == 0
    )
    kinds = ["attention" if layer.kind == ATTENTION else "mamba" for layer in layers]
    rotates, attention = _rotates(values), values.num_attention_heads
    settings: dict[str, Any] = {"num_attention_heads": attention, "num_key_value_heads": values.num_key_value_heads}
    if not rotates:
        kinds.append("attention")
        attention = next(n for n in range(min(attention, width // 2), 0, -1) if width % n == 0 and width // n % 2 == 0)
        settings = {"num_attention_heads": attention, "num_key_value_heads": 1}
    names = ("embedding_multiplier", "logits_scaling", "residual_multiplier")  # Granite's own, 1 elsewhere
    multipliers: dict[str, Any] = {name: float(getattr(values, name, 1.0)) for name in names}
    return GraniteMoeHybridConfig(
        **settings,
        **multipliers,
        attention_multiplier=float(getattr(values, "attention_multiplier", (width // attention) ** -0.5)),
        attention_bias=any(name.endswith("q_proj.bias") for name in saved_tensors(student)),
        position_embedding_type="rope" if all(rotates) else "nope",
        rope_parameters=values.rope_parameters if rotates else None,
        layer_types=kinds,
        num_hidden_layers=len(kinds),
        **{name: getattr(values, name) for name in _SHARED},
        shared_intermediate_size=values.intermediate_size,
        num_local_experts=0,
        num_experts_per_tok=0,
        mamba_n_heads=expand * width // head_dim,
        mamba_n_groups=expand * width // head_dim,
        mamba_d_head=head_dim,
        mamba_d_state=mixer["state_size"],
        mamba_d_conv=max(mixer["conv_kernel"], SHORTEST_KERNEL),
        mamba_expand=expand,
        mamba_chunk_size=CHUNK_LENGTH,
        mamba_conv_bias=True,
        mamba_proj_bias=True,
        time_step_limit=(0.0, 1e9),  # mlx-lm's own would clip small ones
    )


_SHARED = (
    "vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
    "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip


def _layer(own: dict[str, Tensor], mixer: Any, config: Any) -> dict[str, Tensor]:
    """The tensors of a layer under Granite's names; what was used is taken out of ``own``."""
    norms = ("input_layernorm.weight", "post_attention_layernorm.weight")
    made = {name: own.pop(name) for name in norms if name in own}
    parts = [own.pop(name) for name in ("mlp.gate_proj.weight", "mlp.up_proj.weight") if name in own]
    made["shared_mlp.input_linear.weight"] = torch.cat(parts) if parts else own.pop("mlp.gate_up_proj.weight")
    made["shared_mlp.output_linear.weight"] = own.pop("mlp.down_proj.weight")
    if mixer is not None:
        for name in [name for name in own if name.startswith("self_attn.")]:
            del own[name]
        return made | {f"mamba.{name}": tensor for name, tensor in _mixer(mixer, config).items()}
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        weight = made[f"self_attn.{name}.weight"] = own.pop(f"self_attn.{name}.weight")
        if config.attention_bias:
            made[f"self_attn.{name}.bias"] = own.pop(f"self_attn.{name}.bias", torch.zeros(len(weight)))
    return made


@torch.no_grad()
def _mixer(mixer: Any, config: Any) -> dict[str, Tensor]:
    """The tensors of GraniteMoeHybrid's Mamba-2 that compute what the mixer computes."""
    own, width, state = mixer.config, mixer.config.head_dim, mixer.config.state_size

    def filled(tensor: Tensor, features: int) -> Tensor:
        """The rows of all heads, those of the added ones 0."""
        heads = tensor.unflatten(0, (own.num_heads, features))
        added = config.mamba_n_heads - own.num_heads
        return torch.cat([heads, heads.new_zeros(added, *heads.shape[1:])]).flatten(0, 1)

    convs = ((mixer.x_conv, width), (mixer.b_conv, state), (mixer.c_conv, state))
    taps = torch.cat([filled(conv.weight, features) for conv, features in convs])
    projections = (mixer.z_proj, width), (mixer.x_proj, width), (mixer.b_proj, state), (mixer.c_proj, state)
    decay = mixer.decay_proj
    in_proj = torch.cat([*(filled(proj.weight, features) for proj, features in projections), filled(decay.weight, 1)])
    z_bias = filled(mixer.z_bias, width)
    # A power of two in the norm, which no precision rounds; the projection has the rest.
    gain = math.sqrt(config.rms_norm_eps) / HALF**3
    power = 2.0 ** math.floor(math.log2(gain))
    out = filled((mixer.out_proj.weight * (gain / power)).T, width).T.contiguous()
    bias = mixer.out_proj.bias
    return {
        "in_proj.weight": in_proj,
        "in_proj.bias": F.pad(z_bias, (0, len(in_proj) - len(z_bias))),
        "conv1d.weight": F.pad(taps, (config.mamba_d_conv - taps.shape[1], 0)).unsqueeze(1) * TAP_SCALE,
        "conv1d.bias": torch.cat([filled(conv.bias, features) for conv, features in convs]) * TAP_SCALE,
        "dt_bias": filled(torch.zeros_like(mixer.d) if decay.bias is None else decay.bias, 1),
        "A_log": torch.zeros(config.mamba_n_heads),
        "D": filled(mixer.d, 1) * HALF**2,
        "norm.weight": torch.full((len(z_bias),), power),
        "out_proj.weight": out,
        "out_proj.bias": torch.zeros(out.shape[0]) if bias is None else bias,
    }


def mamba2_tensors(model: Any) -> dict[str, Tensor]:
    """The tensors of the model that a file holds: of a tied head only one."""
    tied = model.all_tied_weights_keys
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


def mamba2_values(model: Any, dtype: str) -> dict[str, Any]:
    """The content of config.json, with the names of layers that every engine reads."""
    values = {**model.config.to_dict(), "architectures": [type(model).__name__], "dtype": dtype}
    values["layer_types"] = ["attention" if layer.mamba is None else "mamba" for layer in model.model.layers]
    for key in ("_name_or_path", "transformers_version"):
        values.pop(key, None)
    return values


def write_mamba2(model: Any, folder: Path, dtype: torch.dtype) -> None:
    """Write weights and configuration; the tokenizer and the settings of generation are the caller's.

    Args:
        model: what `build_mamba2` returned.
        folder: an existing, empty folder.
        dtype: of everything but the few numbers in `PRECISE`, which engines that can keep in float32.
    """
    weights = {
        name: (tensor if is_precise(name, PRECISE) else tensor.to(dtype)).contiguous()
        for name, tensor in mamba2_tensors(model).items()
    }
    save_torch_state_dict(weights, folder, max_shard_size="5GB")
    values = mamba2_values(model, str(dtype).removeprefix("torch."))
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def load_mamba2(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Load a folder that was just written, with transformers' own class."""
    model = GraniteMoeHybridForCausalLM.from_pretrained(
        folder, dtype=dtype, local_files_only=True, use_safetensors=True, trust_remote_code=False
    )
    return cast(PreTrainedModel, model.eval())
