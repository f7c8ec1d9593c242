"""How fast a model generates."""

from __future__ import annotations

import statistics
import time
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from mohawkify.errors import UsageError
from mohawkify.evaluation.fidelity import evaluating

REPEATS = 3


def decode_speed(
    model: PreTrainedModel, *, prompt_tokens: int, new_tokens: int, batch_size: int = 1, device: torch.device
) -> dict[str, Any]:
    """Time greedy generation through `generate` with the model's own cache.

    One warm-up, then the median of three runs. The time includes the reading of the prompt, so a short prompt and many
    new tokens show the decoding speed, and a long prompt shows what a user waits for.

    Args:
        model: a causal language model on ``device``.
        prompt_tokens: length of the (random) prompt.
        new_tokens: tokens to generate per sequence; generation does not stop early.
        batch_size: sequences generated side by side.
        device: where the model is.

    Returns:
        ``tokens_per_second`` over all sequences, the median ``seconds``, and the four sizes it was measured with.

    Raises:
        UsageError: a size is not positive.
    """
    sizes = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "batch_size": batch_size}
    for name, size in sizes.items():
        if size < 1:
            raise UsageError(f"{name} is {size}, expected 1 or more")
    generator = torch.Generator().manual_seed(0)
    shape = (batch_size, prompt_tokens)
    prompt_ids_bl = torch.randint(model.config.vocab_size, shape, generator=generator).to(device)
    with evaluating(model):
        _generate_seconds(model, prompt_ids_bl, new_tokens)
        seconds = statistics.median(_generate_seconds(model, prompt_ids_bl, new_tokens) for _ in range(REPEATS))
    return {
        "tokens_per_second": batch_size * new_tokens / seconds,
        "seconds": seconds,
        **sizes,
        "repeats": REPEATS,
    }


def _generate_seconds(model: PreTrainedModel, prompt_ids_bl: torch.Tensor, new_tokens: int) -> float:
    _wait_for(prompt_ids_bl.device)
    begin = time.perf_counter()
    output_ids_bl = cast(Any, model).generate(  # its type hints take the method for a tensor
        input_ids=prompt_ids_bl,
        attention_mask=torch.ones_like(prompt_ids_bl),
        do_sample=False,
        num_beams=1,
        use_cache=True,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        pad_token_id=0,  # no row ends early, so nothing is padded; without an id, generate warns
    )
    _wait_for(prompt_ids_bl.device)
    seconds = time.perf_counter() - begin
    generated = output_ids_bl.shape[1] - prompt_ids_bl.shape[1]
    if generated != new_tokens:
        raise UsageError(
            f"the model generated {generated} tokens, expected {new_tokens}",
            hint="its generation_config.json may stop it; remove stop strings and time limits there",
        )
    return seconds


def _wait_for(device: torch.device) -> None:
    """Wait until a GPU has finished its queue, so that the time includes it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
