"""The text on which an export is compared with its run: the run's held-out text, or what the student itself writes.

Shapes: b sequences, l length.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mohawkify.data.stage_text import TextReader, is_prepared
from mohawkify.errors import DataError, RecipeError
from mohawkify.exporters.compare import require_finite_run
from mohawkify.families.positions import declared_length
from mohawkify.run.folder import RunFolder

HELD_OUT, WRITTEN = "held-out text", "text that the student wrote"
LENGTH = 160  # longer than a chunk of either scan; less where the model has fewer positions
NUM_HELD_OUT, NUM_WRITTEN = 8, 4


def comparison_texts(
    run: RunFolder, student: Any, tokenizer: Any, report: Callable[[str], None]
) -> tuple[str, list[Tensor]]:
    """The texts that student and export both read.

    Args:
        run: the finished run.
        student: its student.
        tokenizer: its tokenizer.
        report: receives a line where held-out text is recorded but gone.

    Returns:
        `HELD_OUT` where the run has it, else `WRITTEN`; and token ids (l,) of each text.

    Raises:
        ExportError: the student writes, and computes logits that are not finite.
    """
    try:
        rows = _held_out(run, student.config.vocab_size, tokenizer)
    except (DataError, RecipeError) as error:
        report(f"warning: {error.message}: comparing on {WRITTEN}")
        rows = []
    if rows:
        return HELD_OUT, [torch.from_numpy(row[:LENGTH].astype(np.int64)) for row in rows[:NUM_HELD_OUT]]
    return WRITTEN, list(sample_ids(student))


def _held_out(run: RunFolder, vocab_size: int, tokenizer: Any) -> list[np.ndarray]:
    """The rows of a run's held-out text, those first that fill a text; none where the run does not say what it read."""
    recorded = run.text()
    known = recorded.get("validation", recorded.get("train"))
    if known is None or not is_prepared(known["key"], run.corpora, run.corpora):
        return []
    reader = TextReader(
        run.recipe(), tokenizer, run.corpora, Path(run.teacher()["folder"]), vocab_size, recorded=recorded
    )
    return sorted(reader.held_out(), key=lambda row: -min(len(row), LENGTH))


@torch.no_grad()
def sample_ids(student: Any, seed: int = 0) -> Tensor:
    """Let the student write, sampling at temperature 1 from its start token; returns token ids (b, l).

    Raises:
        ExportError: it computes logits that are not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    first = student.config.bos_token_id
    length = min(LENGTH, declared_length(student.config))
    ids_bl = torch.full((NUM_WRITTEN, 1), 0 if first is None else first)
    memory, newest = None, ids_bl
    for _ in tqdm(range(1, length), f"writing {WRITTEN}", delay=1.0, leave=False, disable=None):
        output = student(newest, past_key_values=memory, use_cache=True, logits_to_keep=1)
        require_finite_run(output.logits)
        memory = output.past_key_values
        newest = torch.multinomial(output.logits[:, -1].float().softmax(-1), 1, generator=generator)
        ids_bl = torch.cat([ids_bl, newest], dim=1)
    return ids_bl
