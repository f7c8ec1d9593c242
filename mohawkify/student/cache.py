"""The student's cache for generation: a fixed-size state per mixer, keys and values where attention was kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicSlidingWindowLayer

from mohawkify.mixers.mixer import StateSpec
from mohawkify.student.layer_spec import LayerSpec, mixer_layers, read_layer_specs


class RecurrentLayer(CacheLayerMixin):
    """The states of one mixer.

    Their size does not depend on the number of tokens seen, and they are updated in place, so that a step of decoding
    allocates no state and a captured step (CUDA graphs) finds it where it was.

    Attributes:
        states: the tensors of the mixer's `state_spec` by name, each with the batch in front.
        num_tokens: tokens seen.
    """

    is_compileable = False
    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.states: dict[str, Tensor] = {}
        self.reset()

    def reset(self) -> None:
        """Start again with zeros, in the same tensors where they can be written to."""
        if all(_writable(state) and not state.requires_grad for state in self.states.values()):
            for state in self.states.values():
                state.zero_()
        else:
            self.states = {}
        self.num_tokens = 0
        self.is_initialized = False

    def write(self, states: Mapping[str, Tensor], num_new_tokens: int) -> None:
        """Store the states after ``num_new_tokens`` more tokens: in the tensors there are, if they fit."""
        self.states = {name: _stored(self.states.get(name), state) for name, state in states.items()}
        self.advance(num_new_tokens)

    def advance(self, num_new_tokens: int) -> None:
        """Count tokens whose effect is already in the states."""
        self.num_tokens += num_new_tokens
        self.is_initialized = True

    def in_place(self, spec: Mapping[str, StateSpec], like: Tensor) -> dict[str, Tensor]:
        """The states that a single token updates in place; zeros where nothing was seen yet.

        Args:
            spec: the mixer's `state_spec`.
            like: a projected token (b, features), whose batch, device and precision the states have.
        """
        if self.num_tokens == 0:
            precise = torch.promote_types(like.dtype, torch.float32)
            for name, (shape, is_precise) in spec.items():
                dtype = precise if is_precise else like.dtype
                self.states[name] = _zeros(self.states.get(name), (len(like), *shape), dtype, like.device)
        if not all(_writable(state) for state in self.states.values()):
            self.states = {name: state.clone() for name, state in self.states.items()}
        return self.states

    def get_seq_length(self) -> int:
        """Number of tokens seen."""
        return self.num_tokens

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def get_max_cache_shape(self) -> int:
        """The same, under its name in transformers before 5.20."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset that the model's mask for kept attention is built with."""
        return self.num_tokens + query_length, 0

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to prepare: the mixer's first call fills the layer."""

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise TypeError("a recurrent layer holds a state, not keys and values")

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse: the last tokens cannot be taken out of a state."""
        if tokens_to_remove != 0:
            raise ValueError("a recurrent state cannot be cropped: it does not hold its past tokens")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow a beam search's choice of rows."""
        for name, state in self.states.items():
            self.states[name] = state.index_select(0, beam_idx.to(state.device))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        self.reorder_cache(indices.nonzero().squeeze(-1) if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self.states = {name: state.repeat_interleave(repeats, dim=0) for name, state in self.states.items()}


class WindowLayer(DynamicSlidingWindowLayer):
    """The keys and values of the last tokens, for attention that the student narrows itself.

    The model builds its mask as for all tokens, since the family knows no window there.
    """

    is_sliding = False

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of a mask over all tokens."""
        return self.cumulative_length + query_length, 0


class BothLayer(RecurrentLayer):
    """The states of a mixer, and the keys and values of the heads beside it.

    Args:
        kept: the layer for keys and values.
    """

    def __init__(self, kept: Any) -> None:
        self.kept = kept
        self.is_sliding = kept.is_sliding
        super().__init__()

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add keys and values, and return those to attend to."""
        keys, values = self.kept.update(*args, **kwargs)
        return keys, values

    def get_seq_length(self) -> int:
        """Number of tokens seen, by attention, which comes before the mixer."""
        return int(self.kept.get_seq_length())

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the mask of the kept heads."""
        length, offset = self.kept.get_mask_sizes(query_length)
        return length, offset

    def reset(self) -> None:
        """Start again with nothing."""
        super().reset()
        if self.kept.is_initialized:
            self.kept.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow a beam search's choice of rows."""
        super().reorder_cache(beam_idx)
        self.kept.reorder_cache(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        super().reorder_cache(indices.nonzero().squeeze(-1) if indices.dtype == torch.bool else indices)
        self.kept.batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        super().batch_repeat_interleave(repeats)
        self.kept.batch_repeat_interleave(repeats)


def kept_of(layer: Any) -> Any:
    """The keys and values of a layer of `StudentCache`; None where it keeps no attention."""
    return layer.kept if isinstance(layer, BothLayer) else None if isinstance(layer, RecurrentLayer) else layer


def _layer(spec: LayerSpec, kept: Any) -> Any:
    """The memory of one layer; ``kept`` is that of the family's attention."""
    if spec.window is not None:
        kept = WindowLayer(spec.window)
    if not spec.mixer_heads:
        return kept
    return BothLayer(kept) if spec.attention_heads else RecurrentLayer()


def _zeros(old: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The old tensor, which `RecurrentLayer.reset` has cleared, or a new one where that does not fit."""
    if old is not None and (old.shape, old.dtype, old.device) == (shape, dtype, device):
        return old
    return torch.zeros(shape, dtype=dtype, device=device)


def _stored(old: Tensor | None, new: Tensor) -> Tensor:
    """Copy into the old tensor, or keep the new one where that cannot be."""
    if (
        old is None
        or (old.shape, old.dtype, old.device) != (new.shape, new.dtype, new.device)
        or new.requires_grad
        or old.requires_grad
        or not _writable(old)
    ):
        return new
    return old.copy_(new)


def _writable(tensor: Tensor) -> bool:
    """Whether a tensor can be written to: one made in inference mode cannot outside of it."""
    return torch.compiler.is_compiling() or not tensor.is_inference() or torch.is_inference_mode_enabled()


class StudentCache(Cache):
    """A layer of memory for every decoder layer of a student.

    The student's forward leaves its ``padding_mask`` here, (b, at least l) and 0 at padding, or None.

    Args:
        config: the student's configuration; ``config.mixer["layer_specs"]`` lists the recurrent layers.
    """

    padding_mask: Tensor | None = None

    def __init__(self, config: Any) -> None:
        kept = DynamicCache(config=config).layers  # with the windows of every family
        specs = read_layer_specs(config.mixer)
        super().__init__(layers=[_layer(spec, each) for spec, each in zip(specs, kept, strict=True)])


def require_states(cache: Any, config: Any) -> None:
    """Give an empty `DynamicCache` of transformers the layers of a `StudentCache`; refuse every other foreign cache.

    In place, since the caller goes on with the cache that it handed over.

    Args:
        cache: what a student is called with; a `StudentCache` is left as it is, also one of another copy of this file.
        config: the student's configuration.

    Raises:
        ValueError: the cache has no states for the mixers, and cannot get them.
    """
    first = mixer_layers(read_layer_specs(config.mixer))[0]
    layers = getattr(cache, "layers", [])
    if first < len(layers) and hasattr(layers[first], "states"):
        return
    if type(cache) is DynamicCache and not cache.offloading and cache.get_seq_length() == 0:
        cache.layers = StudentCache(config).layers
        return
    raise ValueError(
        f"found past_key_values of type {type(cache).__name__}, which hold no states for this student's mixers,"
        " expected a StudentCache, an empty DynamicCache or None"
    )
