"""A student as GraniteMoeHybrid in MLX, to be quantised; a plain one mlx-lm opens in the form of transformers."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx_lm.models import granitemoehybrid

from mohawkify.errors import ExportError
from mohawkify.exporters.granite_hybrid import OTHER_TARGET, PRECISE, mamba2_tensors, mamba2_values
from mohawkify.student.save import is_precise


class Model(granitemoehybrid.Model):
    """mlx-lm's model, with the precision of its parts."""

    def cast_predicate(self, path: str) -> bool:
        """Whether a parameter follows the model's precision."""
        return not is_precise(path, PRECISE)

    def quant_predicate(self, path: str, module: Any) -> bool | dict[str, Any]:
        """In 8 bits where rows of the decay lie among the others: its errors compound."""
        return {"group_size": 64, "bits": 8} if path.endswith(".mamba.in_proj") else True


def build_mlx_granite(stock: Any) -> tuple[Any, dict[str, Any]]:
    """The model in float32, and its configuration as mlx-lm reads it.

    Args:
        stock: what `build_mamba2` returned.

    Raises:
        ExportError: it keeps attention that mlx-lm's model lacks.
    """
    config = mamba2_values(stock, "float32")
    rope = (config.get("rope_parameters") or {}).get("rope_type", "default")
    if rope != "default" and stock.model.rotary_emb is not None:
        raise ExportError(f"mlx-lm's granitemoehybrid has no rotation of the kind {rope}", hint=OTHER_TARGET)
    model = Model(granitemoehybrid.ModelArgs.from_dict(config))
    weights = {name: mx.array(tensor.numpy()) for name, tensor in mamba2_tensors(stock).items()}
    model.load_weights(list(model.sanitize(weights).items()), strict=True)
    model.eval()
    mx.eval(model.parameters())
    return model, config
