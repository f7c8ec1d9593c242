"""How well a model reads the stories: perplexity and recall, on whole stories each with the context it was told in."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

IGNORED = -100


@torch.inference_mode()
def perplexity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stories: list[str], batch_size: int = 16
) -> float:
    """Return exp of the mean negative log-likelihood per token, every story on its own, `</s>` included."""
    total_loss, total_tokens = 0.0, 0
    for start in range(0, len(stories), batch_size):
        batch = stories[start : start + batch_size]
        documents = [[*tokenizer(story)["input_ids"], tokenizer.eos_token_id] for story in batch]
        logits_blv = model(right_pad(documents, fill=0), use_cache=False).logits.float()
        targets_bl = right_pad(documents, fill=IGNORED)[:, 1:]
        total_loss += functional.cross_entropy(
            logits_blv[:, :-1].flatten(0, 1), targets_bl.flatten(), ignore_index=IGNORED, reduction="sum"
        ).item()
        total_tokens += int((targets_bl != IGNORED).sum())
    return math.exp(total_loss / total_tokens)


@torch.inference_mode()
def recall_accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: list[tuple[str, str]],
    batch_size: int = 16,
) -> float:
    """Return the share of questions (prompt, answer) whose every answer token is the model's first choice.

    That is the share that greedy decoding would answer word for word.
    """
    right = 0
    for start in range(0, len(questions), batch_size):
        documents, targets = [], []
        for prompt, answer in questions[start : start + batch_size]:
            prompt_tokens = tokenizer(prompt)["input_ids"]
            answer_tokens = tokenizer(answer, add_special_tokens=False)["input_ids"]
            documents.append(prompt_tokens + answer_tokens)
            targets.append([IGNORED] * len(prompt_tokens) + answer_tokens)
        chosen_bl = model(right_pad(documents, fill=0), use_cache=False).logits[:, :-1].argmax(dim=-1)
        targets_bl = right_pad(targets, fill=IGNORED)[:, 1:]
        right += int(((chosen_bl == targets_bl) | (targets_bl == IGNORED)).all(dim=-1).sum())
    return right / len(questions)


def right_pad(rows: list[list[int]], fill: int) -> torch.Tensor:
    """Return the rows as one tensor; after a story, causal attention keeps the filling from changing anything."""
    return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=fill)
