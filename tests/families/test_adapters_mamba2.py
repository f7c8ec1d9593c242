"""Every family that claims the target mamba2, grafted and hybrid, in transformers' own GraniteMoeHybrid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from mohawkify.errors import ExportError
from mohawkify.exporters.export import export_run
from mohawkify.families.registry import adapter_names, load_adapter
from tests.families.layouts import each_family
from tests.finished import finished_run

FAMILIES = [name for name in adapter_names() if load_adapter(name).mamba2]
FULL = {"head_dim": 8, "sliding_window": None, "layer_types": ["full_attention"] * 4}
# What a small model of the family has that Granite's attention lacks: changed where layers keep theirs.
HYBRIDS: dict[str, dict[str, Any]] = {
    "granite": {},
    "llama": {},
    "ministral": {**FULL, "sliding_window": 5},  # transformers asks for one that no layer has
    "mistral": {"head_dim": 8, "sliding_window": None},
    "qwen2": {"use_sliding_window": False, "sliding_window": None},
    "seed_oss": {"head_dim": 8},
    "smollm3": {"no_rope_layers": [0, 1, 0, 1]},
}
GRAFTED: dict[str, dict[str, Any]] = {"ernie4_5": {"use_bias": False}}
REFUSED = {
    "ministral": "layer 0 keeps, which looks through a window",
    "mistral": "layer 0 keeps, which looks through a window",
    "qwen2": "layer 2 keeps, which looks through a window",
    "seed_oss": "layer 0 keeps, which has heads that are not together as wide as the model",
    "smollm3": "layer 0 keeps, which rotates, unlike that of another kept layer",
}
PROMPTS = [torch.randint(3, 256, (1, n), generator=torch.Generator().manual_seed(n)) for n in (21, 4)]


def quiet(line: str) -> None:
    """Report to nobody."""


def exported(folder: Path, family: str, keep: tuple[int, ...], **changes: Any) -> tuple[Any, Any]:
    """A student whose writes are by decay, and its export as transformers loads it."""
    student = finished_run(folder, family, keep, options={"write": "decay"}, **changes)
    export_run(folder, "mamba2", folder / "out", dtype="float32", report=quiet)
    return student, AutoModelForCausalLM.from_pretrained(folder / "out", dtype=torch.float32)


def require_same_text(student: Any, model: Any) -> None:
    """Two prompts alone and as one batch."""
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected = [student.generate(ids, **settings)[:, ids.shape[1] :] for ids in PROMPTS]
    for ids, wanted in zip(PROMPTS, expected, strict=True):
        assert torch.equal(model.generate(ids, **settings)[:, ids.shape[1] :], wanted)
    longest = PROMPTS[0].shape[1]
    padded = [torch.nn.functional.pad(ids, (longest - ids.shape[1], 0)) for ids in PROMPTS]
    mask = torch.cat([torch.arange(longest)[None] >= longest - ids.shape[1] for ids in PROMPTS]).long()
    batch = model.generate(torch.cat(padded), attention_mask=mask, **settings)[:, longest:]
    assert torch.equal(batch, torch.cat(expected))


@pytest.mark.parametrize("family", each_family(FAMILIES))
def test_a_student_without_attention_writes_the_same_text(tmp_path: Path, family: str) -> None:
    student, model = exported(tmp_path, family, (), num_hidden_layers=2, **GRAFTED.get(family, {}))
    assert model.config.num_hidden_layers == 3  # the last one is zeros with the attention that caches ask for
    require_same_text(student, model)


@pytest.mark.parametrize("family", each_family(HYBRIDS))
def test_a_hybrid_with_two_kept_layers_writes_the_same_text(tmp_path: Path, family: str) -> None:
    student, model = exported(tmp_path, family, (0, 2), num_hidden_layers=4, **HYBRIDS[family])
    assert model.config.num_hidden_layers == 4
    require_same_text(student, model)


def test_every_family_whose_attention_fits_is_tried_with_some_kept() -> None:
    assert set(HYBRIDS) == {name for name in FAMILIES if load_adapter(name).mamba2 == "hybrids"}


@pytest.mark.parametrize("family", each_family(name for name in FAMILIES if name not in ("granite", "llama")))
def test_kept_attention_that_does_not_fit_is_refused(tmp_path: Path, family: str) -> None:
    changes = {
        "ministral": {"layer_types": ["sliding_attention", "full_attention"] * 2},
        "smollm3": {"no_rope_layers": [1, 0, 0, 1]},
    }
    finished_run(tmp_path, family, (0, 2), options={"write": "decay"}, num_hidden_layers=4, **changes.get(family, {}))
    wording = REFUSED.get(family, f"layer 0 keeps, which is that of {load_adapter(family).title}")
    with pytest.raises(ExportError, match=wording) as refusal:
        export_run(tmp_path, "mamba2", tmp_path / "out", report=quiet)
    assert "student.keep.layers: []" in (refusal.value.hint or "")
