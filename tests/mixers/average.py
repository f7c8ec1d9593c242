"""A mixer from outside of mohawkify, in one file: every head averages its values with a fixed decay."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mohawkify.mixers.mixer import Mixer, MixerConfig, StateSpec, register_mixer


@register_mixer
class Average(Mixer):
    """The running average of the values, with a half-life of 1 token in the first head to 2^(h - 1) in the last."""

    kind = "average"
    title = "running-average"

    def __init__(self, hidden_size: int, config: MixerConfig, layer_idx: int) -> None:
        super().__init__(hidden_size, config, layer_idx)
        inner = config.num_heads * config.head_dim
        self.value_proj = nn.Linear(hidden_size, inner, bias=False)
        self.out_proj = nn.Linear(inner, hidden_size, bias=config.out_bias)

    def reset_parameters(self) -> None:
        """As torch does."""
        self.value_proj.reset_parameters()
        self.out_proj.reset_parameters()

    def state_spec(self) -> dict[str, StateSpec]:
        """The averages (h, p)."""
        return {"averages": StateSpec((self.config.num_heads, self.config.head_dim), is_precise=True)}

    def mix(
        self,
        hidden_bld: Tensor,
        states: Mapping[str, Tensor] | None,
        document_starts_bl: Tensor | None,
        keep_bl: Tensor | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Mixer.mix`."""
        heads = self.config.num_heads
        value_blhp = self.value_proj(hidden_bld).unflatten(-1, (heads, -1)).float()
        decay_h1 = 0.5 ** (0.5 ** torch.arange(heads, device=hidden_bld.device)).unsqueeze(-1)
        average_bhp = torch.zeros_like(value_blhp[:, 0]) if states is None else states["averages"]
        outputs = []
        for t in range(hidden_bld.shape[1]):
            if document_starts_bl is not None:
                average_bhp = average_bhp * ~document_starts_bl[:, t, None, None]
            new_bhp = decay_h1 * average_bhp + (1 - decay_h1) * value_blhp[:, t]
            keep_b11 = True if keep_bl is None else keep_bl[:, t, None, None] != 0
            average_bhp = torch.where(torch.as_tensor(keep_b11), new_bhp, average_bhp)
            outputs.append(average_bhp)
        output_blf = torch.stack(outputs, dim=1).flatten(2).to(hidden_bld.dtype)
        return self.out_proj(output_blf), {"averages": average_bhp}


def start_from_values(mixer: Average, weights: object, num_layers: int) -> None:
    """Take the values and the output projection of the attention that is replaced."""
    repeats = mixer.config.num_heads // len(weights.v_gpd)  # type: ignore[attr-defined]
    mixer.reset_parameters()
    with torch.no_grad():
        mixer.value_proj.weight.copy_(weights.v_gpd.repeat_interleave(repeats, dim=0).flatten(0, 1))  # type: ignore[attr-defined]
        mixer.out_proj.weight.copy_(weights.out_dhp.flatten(1))  # type: ignore[attr-defined]


Average.starts = {**Mixer.starts, "attention": start_from_values}
