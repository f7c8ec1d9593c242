"""The provenance of metrics: versions, and the hashes of models, tokenizer and text."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import transformers
from transformers import PreTrainedModel

from mohawkify import __version__
from mohawkify.files import atomic
from mohawkify.files.manifest import MANIFEST_NAME
from mohawkify.run.folder import RunFolder


def provenance(run: RunFolder, models: Mapping[str, PreTrainedModel], device: torch.device) -> dict[str, Any]:
    """The provenance of a run's models, which are loaded and so checked already.

    Args:
        run: a finished run.
        models: those that are measured, by name: ``student``, and ``teacher`` where it is compared with.
        device: where they compute.

    Returns:
        ``versions`` by package, ``device``, and for each model its ``precision`` and the sha256 of its ``files``; the
        tokenizer, which both use, lies with the student's.
    """
    manifest = atomic.read_json(run.final / MANIFEST_NAME)
    files = {
        "teacher": run.teacher()["files"],
        "student": {name: entry["sha256"] for name, entry in manifest["files"].items()},
    }
    return {
        "versions": {
            "mohawkify": __version__,
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
        },
        "device": device.type,
        **{
            name: {"precision": str(model.dtype).removeprefix("torch."), "files": files[name]}
            for name, model in models.items()
        },
    }


def text_sha256(rows: Sequence[np.ndarray]) -> str:
    """Hash rows of token ids and where each of them ends."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(len(row).to_bytes(8, "little") + row.astype("<u4").tobytes())
    return digest.hexdigest()
