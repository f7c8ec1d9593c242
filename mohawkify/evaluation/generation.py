"""Continue a prompt with a model, greedily or by sampling; text is handed on as it comes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from mohawkify.data.tokenize import require_rows
from mohawkify.errors import UsageError
from mohawkify.families.positions import longest_sequence
from mohawkify.student.cache import StudentCache
from mohawkify.student.saved_state import ReadText

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
        save_state: a new file for what the student remembers of the prompt.
        load_state: such a file, whose text the prompt goes on with.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    seed: int = 0
    save_state: Path | None = None
    load_state: Path | None = None


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
        UsageError: see `read_on`.
        DataError: likewise.
    """
    return write_on(model, tokenizer, read_on(model, tokenizer, ReadText(), prompt), options, on_text)


def read_on(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, read: ReadText, text: str, *, special: bool = True
) -> ReadText:
    """Put more text behind one that is read already.

    The tokens are those of the whole text, unless they cut what is read in another way: a state cannot be taken back,
    so then a token ends where the new text begins.

    Args:
        read: the text so far, and its memory, which goes over to the result.
        text: what follows.
        special: whether the tokenizer puts its special tokens around the whole.

    Raises:
        UsageError: the text is no text, gives no token to go on with, or more than the model has learned positions.
        DataError: it has a token for which the model has no row.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"the prompt holds half of a surrogate pair at position {error.start}, expected text"
        ) from error
    tokens: Any = tokenizer(read.text + text, add_special_tokens=special)
    ids: list[int] = tokens["input_ids"]
    if ids[: read.num_read] != read.ids[: read.num_read]:
        ids = read.ids + tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) <= read.num_read:
        raise UsageError("the prompt is empty, expected some text", hint="this tokenizer adds no token of its own")
    require_rows(ids, tokenizer, model.config.vocab_size)
    window = longest_sequence(model)
    if window is not None and len(ids) >= window:
        raise UsageError(f"the prompt has {len(ids):,} tokens, expected fewer than the model's {window:,} positions")
    return ReadText(read.text + text, ids, read.cache, read.messages)


@torch.inference_mode()
def remember(student: PreTrainedModel, read: ReadText) -> None:
    """Let a student read all tokens but the last one, from which it goes on."""
    model: Any = student
    read.cache = read.cache or StudentCache(student.config)
    ids = read.ids[read.num_read : -1]
    if ids:
        model(torch.tensor([ids], device=student.device), past_key_values=read.cache, **_one_logit(model))


def _one_logit(model: Any) -> dict[str, int]:
    """Spares the logits of a long text, where the family's model can."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def write_on(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    read: ReadText,
    options: GenerateOptions,
    on_text: Callable[[str], None] = lambda text: None,
    is_stopped: Callable[[], bool] = lambda: False,
) -> str:
    """Continue a text, whose tokens and memory are moved on; see `generate_text`.

    Args:
        read: the text; a student's memory is used if there is one.
        is_stopped: asked after every token; True ends the text there.
    """
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
    ids_bl, window = torch.tensor([read.ids], device=model.device), longest_sequence(model)
    with torch.inference_mode():
        written = writer.generate(
            input_ids=ids_bl,
            attention_mask=torch.ones_like(ids_bl),
            past_key_values=read.cache,
            max_new_tokens=options.max_tokens if window is None else min(options.max_tokens, window - len(read.ids)),
            num_beams=1,
            pad_token_id=0,  # one row needs no padding; without an id, generate warns
            streamer=_Pieces(tokenizer, keep),
            stopping_criteria=[lambda ids_bl, scores: torch.tensor([is_stopped()], device=ids_bl.device)],
            **drawing,
        )
    read.ids, read.text = written[0].tolist(), read.text + "".join(pieces)
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
