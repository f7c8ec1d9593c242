"""The embedded demo: a tiny pretrained teacher and the little stories it was trained on."""

from __future__ import annotations

from pathlib import Path

from mohawkify.demo.stories import split_stories

__all__ = ["TEACHER_DIRECTORY", "split_stories"]

TEACHER_DIRECTORY: Path = Path(__file__).parent / "teacher"
"""A Hugging Face folder: config, bf16 weights, tokenizer and model card."""
