"""How fast a model generates."""

from __future__ import annotations

import statistics
import time
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mohawkify.distributed.device import wait_for
from mohawkify.errors import UsageError
from mohawkify.evaluation.fidelity import evaluating

PROMPT_TOKENS, NEW_TOKENS = 16, 64
REPEATS = 3


def decode_speed(model: PreTrainedModel, device: torch.device) -> float:
    """Time greedy generation of one sequence, through `generate` with the model's own cache.

    Args:
        model: a causal language model on ``device``.
        device: where the model is.

    Returns:
        New tokens per second: of the median of three runs, after a warm-up. Reading the prompt is included.

    Raises:
        UsageError: the model ends sooner, as its own generation settings may tell it to.
    """
    generator = torch.Generator().manual_seed(0)
    prompt_ids_bl = torch.randint(model.config.vocab_size, (1, PROMPT_TOKENS), generator=generator).to(device)
    with evaluating(model):
        _generate_seconds(model, prompt_ids_bl)
        return NEW_TOKENS / statistics.median(_generate_seconds(model, prompt_ids_bl) for _ in range(REPEATS))


def _generate_seconds(model: PreTrainedModel, prompt_ids_bl: Tensor) -> float:
    wait_for(prompt_ids_bl.device)
    begin = time.perf_counter()
    output_ids_bl = cast(Any, model).generate(  # its type hints take the method for a tensor
        input_ids=prompt_ids_bl,
        attention_mask=torch.ones_like(prompt_ids_bl),
        do_sample=False,
        num_beams=1,
        use_cache=True,
        min_new_tokens=NEW_TOKENS,
        max_new_tokens=NEW_TOKENS,
        pad_token_id=0,  # one row needs no padding; without an id, generate warns
    )
    wait_for(prompt_ids_bl.device)
    seconds = time.perf_counter() - begin
    generated = output_ids_bl.shape[1] - PROMPT_TOKENS
    if generated != NEW_TOKENS:
        raise UsageError(
            f"the model generated {generated} tokens, expected {NEW_TOKENS}",
            hint="its generation_config.json may stop it; remove stop strings and time limits there",
        )
    return seconds
