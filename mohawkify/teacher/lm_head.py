"""How hidden states become logits: a model run up to its head, for losses that take a few tokens' logits at a time.

It serves teachers and students alike: a student's head is its teacher's.

Shapes: b batch, l length, d model width, v vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mohawkify.errors import UnknownFamilyError
from mohawkify.families.adapter import Adapter
from mohawkify.ops.chunked_kl import LMHeadInput, head_logits

NUM_TOKENS = 16  # of the verification
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # of the largest logit; a wrong adapter is off by about 1


def run_to_lm_head(model: PreTrainedModel, adapter: Adapter, **inputs: Any) -> LMHeadInput:
    """Run a model up to its head.

    Args:
        model: a teacher or student.
        adapter: its family, which describes the logits.
        inputs: what the model would be called with.
    """
    logits, config = adapter.logits, model.config
    assert logits.unknown is None
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    hidden_bld: Tensor = model.base_model(**inputs).last_hidden_state
    scale = 1.0 if logits.multiplier is None else float(getattr(config, logits.multiplier))
    scale = scale if logits.divisor is None else scale / float(getattr(config, logits.divisor))
    softcap = None if logits.softcap is None else getattr(config, logits.softcap)
    return LMHeadInput(hidden_bld, head.weight, head.bias, scale, softcap)


@torch.no_grad()
def verify_head(teacher: PreTrainedModel, adapter: Adapter, vocab_size: int) -> None:
    """Check on one row of random tokens that a family's logits are as its adapter describes them.

    Args:
        teacher: loaded.
        adapter: its family.
        vocab_size: token ids are drawn below it.

    Raises:
        UnknownFamilyError: they are not.
    """
    if adapter.logits.unknown is not None:
        return  # nothing is said
    generator = torch.Generator().manual_seed(0)
    ids_bl = torch.randint(vocab_size, (1, NUM_TOKENS), generator=generator).to(teacher.device)
    expected_blv = teacher(input_ids=ids_bl, use_cache=False).logits
    logits_blv = head_logits(run_to_lm_head(teacher, adapter, input_ids=ids_bl, use_cache=False))
    error = (logits_blv - expected_blv.float()).abs().max() / expected_blv.float().abs().max()
    if not error <= TOLERANCE[expected_blv.dtype]:
        raise UnknownFamilyError(
            f"the logits of this {adapter.model_type} are not what the family's file says of them"
            f" (they differ by {error:.2g})",
            hint="docs/adapters.md explains the field logits; Logits(unknown=...) leaves them to the model",
        )
