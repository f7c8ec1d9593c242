"""Continue a prompt with a model, greedily or by sampling; text is handed on as it comes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from mohawkify.data.tokenize import require_rows
from mohawkify.errors import UsageError
from mohawkify.families.positions import longest_sequence

# Settings that a teacher's published generation_config.json may hold, and that make other tokens likely.
CHANGES_PROBABILITIES = (
    "repetition_penalty", "no_repeat_ngram_size", "min_length", "min_new_tokens", "suppress_tokens",
    "begin_suppress_tokens", "bad_words_ids", "sequence_bias", "forced_bos_token_id", "forced_eos_token_id",
    "exponential_decay_length_penalty", "guidance_scale", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff",
)  # fmt: skip


@dataclass(frozen=True)
class GenerateOptions:
    """How a text is continued.

    Args:
        max_tokens: the most tokens to write; the model may end sooner, and does at the last of learned positions.
        temperature: 0 takes the most probable token every time; above 0, tokens are sampled.
        seed: of the sampling.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    seed: int = 0


def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    options: GenerateOptions = GenerateOptions(),
    on_text: Callable[[str], None] = lambda text: None,
) -> str:
    """Continue a prompt.

    Args:
        model: a student or a teacher.
        tokenizer: of both.
        prompt: where the text begins, exactly as given: no chat template is put around it.
        options: length and sampling; of the model's own generation settings the special tokens alone count.
        on_text: receives each piece of new text as it comes.

    Returns:
        All of the new text.

    Raises:
        UsageError: the prompt is no text, gives no token to begin with, or as many as the model has learned positions.
        DataError: it has a token for which the model has no row.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"the prompt holds half of a surrogate pair at position {error.start}, expected text"
        ) from error
    inputs = tokenizer(prompt, return_tensors="pt")
    if inputs["input_ids"].numel() == 0:
        raise UsageError("the prompt is empty, expected some text", hint="this tokenizer adds no token of its own")
    require_rows(inputs["input_ids"], tokenizer, model.config.vocab_size)
    length, window = inputs["input_ids"].shape[1], longest_sequence(model)
    if window is not None and length >= window:
        raise UsageError(f"the prompt has {length:,} tokens, expected fewer than the model's {window:,} positions")
    pieces: list[str] = []

    def keep(text: str) -> None:
        pieces.append(text)
        on_text(text)

    drawing: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if options.temperature > 0:
        drawing = {"do_sample": True, "temperature": options.temperature, "top_p": 1.0, "top_k": 0}
    drawing |= dict.fromkeys(CHANGES_PROBABILITIES)
    torch.manual_seed(options.seed)
    writer: Any = model.eval()  # `generate` is missing from transformers' types
    with torch.inference_mode():
        writer.generate(
            input_ids=inputs["input_ids"].to(model.device),
            attention_mask=inputs["attention_mask"].to(model.device),
            max_new_tokens=options.max_tokens if window is None else min(options.max_tokens, window - length),
            num_beams=1,
            pad_token_id=0,  # one row needs no padding; without an id, generate warns
            streamer=_Pieces(tokenizer, keep),
            **drawing,
        )
    return "".join(pieces)


class _Pieces(TextStreamer):
    """Hands text on as soon as its tokens make whole words."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by the base class, which would print."""
        if text:
            self._on_text(text)
