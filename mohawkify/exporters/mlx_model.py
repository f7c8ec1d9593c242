"""A student in MLX: mlx-lm's own model of the teacher's family, with mixers in place of its attention.

This file travels with every MLX export. mlx-lm runs it by its path, so it is one file, imports nothing of mohawkify,
and has the names that mlx-lm uses: `ModelArgs.from_dict` and `Model`.

Shapes: b batch, l target position, s source position, d model width, h heads, p head width, n state width,
f features (h * p or h * n), k taps.
"""

import importlib
import math
import re
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import ArraysCache, CacheList, KVCache

CHUNK_LENGTH = 64
NORM_EPSILON = 1e-5
_MODULE_NAME = re.compile(r"[a-z0-9_]+")


def scan_chunked(
    x_blhp: mx.array, b_blhn: mx.array, c_blhn: mx.array, log_decay_blh: mx.array, state_bhpn: mx.array
) -> tuple[mx.array, mx.array]:
    """Map a sequence: ``state[t] = exp(log_decay[t]) state[t-1] + x[t] B[t]``, ``y[t] = state[t] C[t]``, by chunks.

    Args:
        x_blhp: inputs, float32 like everything here.
        b_blhn: input maps.
        c_blhn: output maps.
        log_decay_blh: logarithm of the decay, at most 0.
        state_bhpn: the state to continue from.

    Returns:
        y (b, l, h, p) and the final state.

    Source: Mamba-2 (arXiv 2405.21060), section 6, with the decay given directly (Llamba, arXiv 2502.14458, section 3).
    """
    outputs = []
    for begin in range(0, x_blhp.shape[1], CHUNK_LENGTH):
        chunk = slice(begin, begin + CHUNK_LENGTH)
        x_bhlp, b_bhln, c_bhln, log_decay_bhl = (
            t[:, chunk].swapaxes(1, 2) for t in (x_blhp, b_blhn, c_blhn, log_decay_blh)
        )
        length = x_bhlp.shape[2]
        # Summed only over the tokens between, never as a difference of long sums: float32 is enough.
        later_ls = mx.tril(mx.ones((length, length), dtype=mx.bool_), -1)
        between_bhls = mx.cumsum(mx.where(later_ls, log_decay_bhl[..., None], 0.0), axis=-2)
        decay_bhls = mx.tril(mx.exp(between_bhls))
        from_start_bhl1 = mx.exp(mx.cumsum(log_decay_bhl, axis=-1))[..., None]

        y_bhlp = ((c_bhln @ b_bhln.swapaxes(-1, -2)) * decay_bhls) @ x_bhlp
        y_bhlp = y_bhlp + (c_bhln * from_start_bhl1) @ state_bhpn.swapaxes(-1, -2)
        added_bhpn = (x_bhlp * decay_bhls[..., -1, :, None]).swapaxes(-1, -2) @ b_bhln
        state_bhpn = from_start_bhl1[:, :, -1:] * state_bhpn + added_bhpn
        outputs.append(y_bhlp.swapaxes(1, 2))
    return mx.concatenate(outputs, axis=1), state_bhpn


def scan_step(
    x_blhp: mx.array, b_blhn: mx.array, c_blhn: mx.array, log_decay_blh: mx.array, state_bhpn: mx.array
) -> tuple[mx.array, mx.array]:
    """The same map for one token: the step of decoding."""
    decay_bh11 = mx.exp(log_decay_blh[:, 0])[..., None, None]
    state_bhpn = decay_bh11 * state_bhpn + x_blhp[:, 0, :, :, None] * b_blhn[:, 0, :, None, :]
    return (state_bhpn @ c_blhn[:, 0, :, :, None]).squeeze(-1)[:, None], state_bhpn


class DepthwiseConv(nn.Module):
    """One short causal convolution and what follows it."""

    def __init__(self, num_features: int, num_taps: int, activation: str) -> None:
        super().__init__()
        self.activation = activation
        self.weight = mx.zeros((num_features, num_taps))
        self.bias = mx.zeros((num_features,))

    def __call__(self, padded_blf: mx.array) -> mx.array:
        """Convolve inputs that begin with the k - 1 before them."""
        num_taps = self.weight.shape[1]
        length = padded_blf.shape[1] - num_taps + 1
        y_blf = self.bias
        for tap in range(num_taps):
            y_blf = y_blf + self.weight[:, tap] * padded_blf[:, tap : tap + length]
        return nn.silu(y_blf) if self.activation == "silu" else y_blf


class DiscreteMamba2(nn.Module):
    """The mixers discrete_mamba2 and mamba2; their tensors have the names they have in the Hugging Face folder.

    Args:
        hidden_size: model width.
        num_heads: heads of the mixer.
        config: the entry ``mixer.config`` of config.json.
    """

    def __init__(self, hidden_size: int, num_heads: int, config: dict[str, Any]) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.state_size = num_heads, config["head_dim"], config["state_size"]
        self.num_lags, self.write_by_decay = config["conv_kernel"] - 1, config["write"] == "decay"
        conv = (config["conv_kernel"], config["conv_activation"])
        inner, state = self.num_heads * self.head_dim, self.num_heads * self.state_size
        self.x_proj = nn.Linear(hidden_size, inner, bias=False)
        self.b_proj = nn.Linear(hidden_size, state, bias=False)
        self.c_proj = nn.Linear(hidden_size, state, bias=False)
        self.z_proj = nn.Linear(hidden_size, inner, bias=False)
        self.decay_proj = nn.Linear(hidden_size, self.num_heads, bias=config["decay_bias"])
        self.x_conv = DepthwiseConv(inner, *conv)
        self.b_conv = DepthwiseConv(state, *conv)
        self.c_conv = DepthwiseConv(state, *conv)
        self.z_bias = mx.zeros((inner,))
        self.d = mx.ones((self.num_heads,))
        if config["gated_norm"]:
            self.norm = nn.RMSNorm(inner, eps=NORM_EPSILON)
        self.out_proj = nn.Linear(inner, hidden_size, bias=config["out_bias"])

    def __call__(self, hidden_bld: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        """Map hidden states as the attention module did, and move the memory on.

        Args:
            hidden_bld: hidden states.
            mask: the mask the model built for attention; not needed here.
            cache: a `GraftedMemory`, or None. Its arrays are the tail of the convolutions, the state, and in the first
                layer of a family with learned positions the number of tokens seen, without padding.
        """
        memory = ArraysCache(size=2) if cache is None else cache.arrays
        batch, length, _ = hidden_bld.shape
        keep_bl = memory.make_mask(length)
        features_blf = mx.concatenate([self.x_proj(hidden_bld), self.b_proj(hidden_bld), self.c_proj(hidden_bld)], -1)
        if keep_bl is not None:
            features_blf = mx.where(keep_bl[..., None], features_blf, 0)
        padded_blf = self._extend_tail(memory, features_blf)

        inner, state_features = self.x_conv.weight.shape[0], self.b_conv.weight.shape[0]
        parts = mx.split(padded_blf, [inner, inner + state_features], axis=-1)
        x_blhp, b_blhn, c_blhn = (
            conv(part).astype(mx.float32).reshape(batch, length, self.num_heads, -1)
            for conv, part in zip((self.x_conv, self.b_conv, self.c_conv), parts, strict=True)
        )
        log_decay_blh = -nn.softplus(self.decay_proj(hidden_bld).astype(mx.float32))
        if keep_bl is not None:
            # A padded token neither writes to the state nor lets it decay.
            x_blhp = mx.where(keep_bl[..., None, None], x_blhp, 0)
            log_decay_blh = mx.where(keep_bl[..., None], log_decay_blh, 0)

        if self.write_by_decay:
            b_blhn = b_blhn * -log_decay_blh[..., None]
        state_bhpn = memory[1]
        if state_bhpn is None:
            state_bhpn = mx.zeros((batch, self.num_heads, self.head_dim, self.state_size), dtype=mx.float32)
        scan = scan_step if length == 1 else scan_chunked
        y_blhp, memory[1] = scan(x_blhp, b_blhn, c_blhn, log_decay_blh, state_bhpn)
        if len(memory.cache) == 3:
            seen_b = mx.zeros((batch,), dtype=mx.int32) if memory[2] is None else memory[2]
            memory[2] = seen_b + (length if keep_bl is None else keep_bl.sum(-1))
        memory.advance(length)

        y_blhp = y_blhp + self.d[:, None] * x_blhp
        gate_blf = nn.silu(self.z_proj(hidden_bld) + self.z_bias)
        gated_blf = y_blhp.reshape(batch, length, inner) * gate_blf
        if "norm" in self:
            gated_blf = self.norm(gated_blf)
        return self.out_proj(gated_blf.astype(hidden_bld.dtype))

    def _extend_tail(self, memory: Any, features_blf: mx.array) -> mx.array:
        """Put the last inputs of the previous call in front, and keep the last of this one, before any padding."""
        batch, length, width = features_blf.shape
        tail_bkf = memory[0]
        if tail_bkf is None:
            tail_bkf = mx.zeros((batch, self.num_lags, width), dtype=features_blf.dtype)
        padded_blf = mx.concatenate([tail_bkf, features_blf], axis=1)
        if memory.lengths is None:
            memory[0] = padded_blf[:, length:]
        else:
            first_b = mx.clip(memory.lengths, 0, length)
            positions_bk = first_b[:, None] + mx.arange(self.num_lags)
            memory[0] = mx.take_along_axis(padded_blf, positions_bk[..., None], axis=1)
        return padded_blf


class GraftedMemory:
    """The cache of a grafted layer in the form that the family's model expects.

    The model may take its attention mask from any layer's cache, so this one has the mask of a layer of the same kind
    that kept its attention. Where there is none, the mask is not used.
    """

    def __init__(self, arrays: ArraysCache, kept: Any) -> None:
        self.arrays, self.kept = arrays, kept

    def make_mask(self, *args: Any, **kwargs: Any) -> Any:
        """The mask for kept attention."""
        return None if self.kept is None else self.kept.make_mask(*args, **kwargs)

    @property
    def offset(self) -> Any:
        """The next token's position, which models with learned positions read from the first layer's cache."""
        offset_b = mx.zeros((1,), dtype=mx.int32) if self.arrays[2] is None else self.arrays[2]
        if self.arrays.left_padding is not None:
            offset_b = offset_b - mx.maximum(self.arrays.left_padding, 0)
        return offset_b if offset_b.size > 1 else offset_b.item()


class MixerBesideAttention(nn.Module):
    """A mixer and the heads of attention that its layer keeps: the sum of their outputs."""

    def __init__(self, mixer: DiscreteMamba2, attention: Any) -> None:
        super().__init__()
        self.mixer, self.attention = mixer, attention

    def __call__(self, hidden_bld: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        """Map hidden states as the attention module did; ``cache`` is a `GraftedMemory`, or None."""
        attended_bld = self.attention(hidden_bld, mask, None if cache is None else cache.kept)
        return self.mixer(hidden_bld, mask, cache) + attended_bld


def cut_heads(attention: Any, heads: list[int], head_dim: int) -> None:
    """Give an attention module the sizes of some of its query heads and their keys; its weights come from the file.

    Raises:
        ValueError: the family's module keeps its heads in another form.
    """
    inputs = ("q_proj", "k_proj", "v_proj")
    outputs = [n for n, m in attention.children().items() if isinstance(m, nn.Linear) and n not in inputs]
    if len(outputs) != 1 or not all(isinstance(attention.get(name), nn.Linear) for name in inputs):
        raise ValueError(f"{type(attention).__name__} has no queries, keys and values in matrices of their own")
    num_heads, num_keys = (attention[name].weight.shape[0] // head_dim for name in inputs[:2])
    groups = [head // (num_heads // num_keys) for head in heads]
    repeats = math.gcd(*(groups.count(group) for group in groups))
    kept, keys, width = len(heads), len(heads) // repeats, attention[outputs[0]].weight.shape[0]
    for name, count in zip(inputs, (kept, keys, keys), strict=True):
        attention[name] = nn.Linear(attention[name].weight.shape[1], count * head_dim, bias="bias" in attention[name])
    attention[outputs[0]] = nn.Linear(kept * head_dim, width, bias=False)
    for names, count in (
        (("n_heads", "num_heads", "num_attention_heads"), kept),
        (("n_kv_heads", "num_key_value_heads"), keys),
        (("repeats", "num_key_value_groups"), repeats),
    ):
        for name in names:
            if hasattr(attention, name):
                setattr(attention, name, count)


def _layers_with(mixer: dict[str, Any], heads: str) -> list[int]:
    return [index for index, layer in enumerate(mixer["layer_specs"]) if layer.get(heads)]


FamilyModel: Any = object  # the second base brings mlx-lm's


class GraftedModel(FamilyModel):
    """The additions of a student to its teacher's model: the first base; mlx-lm's model of the family is the second."""

    def __init__(self, args: Any) -> None:
        super().__init__(args)
        mixer, layers = args.mixer, self.layers
        grafted, kept = _layers_with(mixer, "mixer_heads"), _layers_with(mixer, "attention_heads")
        for index in grafted:
            attention, layer = getattr(layers[index], mixer["attention"]), mixer["layer_specs"][index]
            module: Any = DiscreteMamba2(args.hidden_size, layer["mixer_heads"], mixer["config"])
            facts = dict(vars(attention))
            if index in kept:
                cut_heads(attention, layer["heads"], mixer["config"]["head_dim"])
                module = MixerBesideAttention(module, attention)
            for name, fact in facts.items():
                vars(module).setdefault(name, fact)  # the family's model may read its attention's attributes
            setattr(layers[index], mixer["attention"], module)
        # Layers of one kind have one kind of cache.
        kinds = [type(cache) for cache in self._family_caches()]
        self._same_kind = {
            index: index if index in kept else next((each for each in kept if kinds[each] == kinds[index]), None)
            for index in grafted
        }

    def __call__(self, inputs: mx.array, cache: Any = None, **kwargs: Any) -> mx.array:
        """As the family's model."""
        if cache is not None:
            # Of layers with both, the states and the keys and values.
            parts = [each.caches if isinstance(each, CacheList) else (each, each) for each in cache]
            cache = list(cache)
            for index, same in self._same_kind.items():
                cache[index] = GraftedMemory(parts[index][0], None if same is None else parts[same][1])
        return super().__call__(inputs, cache, **kwargs)

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """As the family's model, without the mixers' tensors, whose names may be those of its own."""
        paths, family = tuple(f"{path}." for path in self.mixer_paths().values()), super()
        mixers = {name: weights.pop(name) for name in list(weights) if name.startswith(paths)}
        return {**(family.sanitize(weights) if hasattr(family, "sanitize") else weights), **mixers}

    def mixer_paths(self) -> dict[int, str]:
        """The path in this model of what stands at the attention's place in every grafted layer."""
        paths = {id(module): path for path, module in self.named_modules()}
        attention = self.args.mixer["attention"]
        return {index: paths[id(getattr(self.layers[index], attention))] for index in self._same_kind}

    def make_cache(self) -> list[Any]:
        """A state for every grafted layer, the family's own cache for every layer that kept attention, or both."""
        counts = self.args.mixer.get("counts_tokens", False)
        caches = self._family_caches()
        for index, same in self._same_kind.items():
            arrays = ArraysCache(size=3 if counts and index == 0 else 2)
            caches[index] = CacheList(arrays, caches[index]) if same == index else arrays
        return caches

    def _family_caches(self) -> list[Any]:
        family = super()
        return family.make_cache() if hasattr(family, "make_cache") else [KVCache() for _ in self.layers]

    def quant_predicate(self, path: str, module: Any) -> Any:
        """Whether or how a module may be quantised: by the family's rule, but not the decay, whose errors compound."""
        family = super()
        if path.endswith(".decay_proj"):
            return False
        return family.quant_predicate(path, module) if hasattr(family, "quant_predicate") else True

    def cast_predicate(self, path: str) -> bool:
        """Whether a parameter follows the model's precision; decay, convolutions, d and z_bias stay float32."""
        return re.search(r"\.decay_proj\.|\.[xbc]_conv\.|\.z_bias$|\.d$", path) is None


class ModelArgs:
    """Reads config.json into the family's own arguments."""

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> Any:
        """The family's arguments, with the mixer's entry and the family's module beside them."""
        name = config["mlx_module"]
        if not _MODULE_NAME.fullmatch(name):
            raise ValueError(f"config.json: mlx_module is {name!r}, expected the name of a module of mlx_lm.models")
        family = importlib.import_module(f"mlx_lm.models.{name}")
        args = family.ModelArgs.from_dict(config)
        args.mixer, args.family, args.hidden_size = config["mixer"], family, config["hidden_size"]
        return args


def Model(args: Any) -> Any:
    """Build the student: a class of the teacher's family with mixers grafted in."""
    return type("Model", (GraftedModel, args.family.Model), {})(args)
