"""The student's cache for generation: a fixed-size state per mixer, the usual cache where attention was kept."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from mohawkify.student.layer_spec import mixer_layers, read_layer_specs


class RecurrentLayer(CacheLayerMixin):
    """One mixer's memory: the last inputs of its convolutions and its state.

    Its size does not depend on the number of tokens seen, and its tensors are moved on in place, so that a step of
    decoding allocates no state and a captured step (CUDA graphs) finds it where it was.

    Shapes: b batch, k convolution taps, f convolved features (x, B and C side by side), h heads, p head width,
    n state width.
    """

    is_compileable = False
    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.tail_bkf: torch.Tensor | None = None
        self.state_bhpn: torch.Tensor | None = None
        self.reset()

    def reset(self) -> None:
        """Forget everything; the tensors stay where they can be written to."""
        memories = [memory for memory in (self.tail_bkf, self.state_bhpn) if memory is not None]
        if all(_writable(memory) and not memory.requires_grad for memory in memories):
            for memory in memories:
                memory.zero_()
        else:
            self.tail_bkf = self.state_bhpn = None
        self.num_tokens = 0
        self.is_initialized = False

    def write(self, tail_bkf: torch.Tensor, state_bhpn: torch.Tensor, num_new_tokens: int) -> None:
        """Store the memory after ``num_new_tokens`` more tokens: into the tensors there are, if they fit."""
        self.tail_bkf = _stored(self.tail_bkf, tail_bkf)
        self.state_bhpn = _stored(self.state_bhpn, state_bhpn)
        self.advance(num_new_tokens)

    def advance(self, num_new_tokens: int) -> None:
        """Count tokens that were already worked into the memory in place."""
        self.num_tokens += num_new_tokens
        self.is_initialized = True

    def step_memory(
        self, tail_shape: tuple[int, ...], state_shape: tuple[int, ...], like: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The tensors that a single token moves on in place.

        Args:
            tail_shape: (b, k - 1, f).
            state_shape: (b, h, p, n).
            like: a projected token, whose device and precision the convolution's inputs have.

        Returns:
            ``tail_bkf`` and ``state_bhpn``, zeros where nothing was seen yet.
        """
        precise = torch.promote_types(like.dtype, torch.float32)
        if self.num_tokens == 0:
            self.tail_bkf = _zeros(self.tail_bkf, tail_shape, like.dtype, like.device)
            self.state_bhpn = _zeros(self.state_bhpn, state_shape, precise, like.device)
        assert self.tail_bkf is not None
        assert self.state_bhpn is not None
        if not _writable(self.state_bhpn):
            self.tail_bkf, self.state_bhpn = self.tail_bkf.clone(), self.state_bhpn.clone()
        return self.tail_bkf, self.state_bhpn

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

    def update(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        raise TypeError("a recurrent layer holds a state, not keys and values")

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse: a state cannot forget its last tokens."""
        if tokens_to_remove != 0:
            raise ValueError("a recurrent state cannot be cropped: it does not hold its past tokens")

    def _select(self, index: torch.Tensor) -> None:
        if self.state_bhpn is not None and self.tail_bkf is not None:
            self.tail_bkf = self.tail_bkf.index_select(0, index.to(self.tail_bkf.device))
            self.state_bhpn = self.state_bhpn.index_select(0, index.to(self.state_bhpn.device))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Follow a beam search's choice of rows."""
        self._select(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows."""
        self._select(indices.nonzero().squeeze(-1) if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        if self.state_bhpn is not None and self.tail_bkf is not None:
            self.tail_bkf = self.tail_bkf.repeat_interleave(repeats, dim=0)
            self.state_bhpn = self.state_bhpn.repeat_interleave(repeats, dim=0)


def _zeros(old: torch.Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The old tensor, which `RecurrentLayer.reset` has cleared, or a new one where that does not fit."""
    if old is not None and (old.shape, old.dtype, old.device) == (shape, dtype, device):
        return old
    return torch.zeros(shape, dtype=dtype, device=device)


def _stored(old: torch.Tensor | None, new: torch.Tensor) -> torch.Tensor:
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


def _writable(tensor: torch.Tensor) -> bool:
    """Whether a tensor can be written to: one made in inference mode cannot outside of it."""
    return torch.compiler.is_compiling() or not tensor.is_inference() or torch.is_inference_mode_enabled()


class StudentCache(Cache):
    """A layer of memory for every decoder layer of a student.

    The student's forward leaves its ``padding_mask`` here, (b, at least l) and 0 at padding, or None.

    Args:
        config: the student's configuration; ``config.mixer["layer_specs"]`` says which layers are recurrent.
    """

    padding_mask: torch.Tensor | None = None

    def __init__(self, config: Any) -> None:
        kept = DynamicCache(config=config).layers  # with the windows of every family
        grafted = mixer_layers(read_layer_specs(config.mixer))
        super().__init__(layers=[RecurrentLayer() if index in grafted else each for index, each in enumerate(kept)])


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
    if first < len(layers) and hasattr(layers[first], "state_bhpn"):
        return
    if type(cache) is DynamicCache and not cache.offloading and cache.get_seq_length() == 0:
        cache.layers = StudentCache(config).layers
        return
    raise ValueError(
        f"found past_key_values of type {type(cache).__name__}, which hold no states for this student's mixers,"
        " expected a StudentCache, an empty DynamicCache or None"
    )
