"""How long a model's sequences can be: some families have learned positions, or a table of them, and no more."""

from __future__ import annotations

from typing import Any

from torch import nn

LENGTH_KEYS = ("max_seq_len", "max_position_embeddings")  # the longest sequence; MPT has the first
_MOST_SPARE_ROWS = 16  # OPT's table of positions has two rows more, BioGPT's too


def declared_length(config: Any) -> int:
    """The longest sequence that a model was made for, in tokens."""
    return next(getattr(config, key) for key in LENGTH_KEYS if getattr(config, key, None))


def longest_sequence(model: Any) -> int | None:
    """The longest sequence that a teacher or a student can compute; None where positions are computed for any length.

    Args:
        model: on any device; meta is enough.
    """
    length, embedding = declared_length(model.config), model.get_input_embeddings()
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and m is not embedding]
    is_learned = any(0 <= table.num_embeddings - length <= _MOST_SPARE_ROWS for table in tables)
    # MPT's own key: its ALiBi is laid out for that length.
    return length if is_learned or getattr(model.config, "max_seq_len", None) else None
