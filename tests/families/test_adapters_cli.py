"""Every family on the shelf through the real command line, from its configuration to an export; and those refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from mohawkify.errors import UnknownFamilyError
from mohawkify.families.registry import adapter_names
from mohawkify.families.unsupported import UNSUPPORTED
from tests.bytes_tokenizer import BOS, EOS, bytes_tokenizer
from tests.commands import run, run_well
from tests.families.layouts import each_family
from tests.tiny import save_teacher, tiny_teacher

RECIPE = """
name: tiny
description: two steps of every stage
student: {init: attention, state_size: 8, keep: {layers: [0]}}
data:
  train: [{path: "teacher:text.txt"}]
stages:
  orient: {tokens: 64, sequence_length: 16, batch_sequences: 2, learning_rate: 1e-3}
  align: {tokens: 64, sequence_length: 16, batch_sequences: 2, learning_rate: 1e-3}
  distill: {tokens: 64, sequence_length: 16, batch_sequences: 2, learning_rate: 1e-3}
compute: {precision: fp32, device: cpu}
evaluation: {tokens: 100, sequence_length: 32, batch_sequences: 2}
"""
SIZES: dict[str, Any] = {
    "num_hidden_layers": 2,
    "vocab_size": 264,  # transformers gives the tokenizers of some families a token of its own
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "router_jitter_noise": 0.5,  # PhiMoE's router learns only from scores this close, which few tokens rarely have
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in adapter_names()} | {
    "opt-350m": ("opt", {"word_embed_proj_dim": 24, "do_layer_norm_before": False}),  # a narrower embedding
}
STAGES = ("orient", "align", "distill")


@pytest.fixture(params=each_family(CASES))
def teacher(request, tmp_path, monkeypatch):
    """A random teacher with a tokenizer and text in the current folder, beside a recipe; the name of its case."""
    family, changes = CASES[request.param]
    monkeypatch.chdir(tmp_path)
    save_teacher(tiny_teacher(family, **SIZES, **changes), Path("teacher"))
    bytes_tokenizer().save_pretrained("teacher")
    stories = [f"The cat {number} sat on the mat {number * number}." for number in range(60)]
    Path("teacher", "text.txt").write_text("<|endoftext|>".join(stories))
    Path("tiny.yaml").write_text(RECIPE)
    return request.param


def test_the_whole_way(teacher):
    family, _ = CASES[teacher]
    assert run_well("inspect", "teacher").stdout.startswith("teacher: ")
    inspected = json.loads(run_well("inspect", "teacher", "--json").stdout)
    parts = {part["part"]: part for part in inspected["parts"]}
    facts = inspected["teacher"]
    assert (facts["model_type"], facts["num_hidden_layers"]) == (family, 2)
    assert sum(part["replaced"] + part["copied"] for part in parts.values()) == facts["num_parameters"]
    assert sum(part["mixer"] + part["copied"] for part in parts.values()) == inspected["student"]["num_parameters"]
    assert parts["embedding"]["copied"] == facts["embedding_parameters"]
    assert parts["norm"]["copied"] <= 2 * facts["hidden_size"]
    assert ("projections at the ends" in parts) == (teacher == "opt-350m")
    assert facts["active_parameters"] <= facts["num_parameters"]

    assert family in run_well("plan", "teacher", "--recipe", "tiny.yaml").stdout
    planned = json.loads(run_well("plan", "teacher", "--recipe", "tiny.yaml", "--json").stdout)
    assert {name: row["steps"] for name, row in planned["stages"].items()} == dict.fromkeys(STAGES, 2)
    assert all(row["flops"] > 0 for row in planned["stages"].values())
    assert planned["stages"]["distill"]["trainable_parameters"] == planned["student"]["num_parameters"]

    folder = Path(run_well("convert", "teacher", "--recipe", "tiny.yaml").stdout.strip())
    results = json.loads((folder / "results.json").read_text())
    assert list(results["stages"]) == ["init", *STAGES]
    assert all(0 < stage["kl"] < math.inf for stage in results["stages"].values())

    measured = json.loads(run_well("eval", "--json").stdout)
    assert measured["student"] == pytest.approx(results["student"], rel=1e-5)
    assert 0 < measured["student"]["kl"] < math.inf

    exported = json.loads(run_well("export", "--target", "hf", "--json").stdout)
    assert exported["directory"] == str(folder / "exports" / "hf")
    assert 0 < exported["kl"] < 0.1
    texts = [AutoTokenizer.from_pretrained(place)("The cat").input_ids for place in ("teacher", exported["directory"])]
    assert texts[0] == texts[1]

    written = run_well("generate", "The cat", "--max-tokens", 4, "--teacher").stdout
    assert written.startswith("teacher: The cat")
    assert "\nstudent: The cat" in written


# Published sizes, with the totals that their authors state: 47 billion parameters, of which a token meets 13 billion.
MIXTRAL = {
    "model_type": "mixtral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8,
    "num_experts_per_tok": 2, "max_position_embeddings": 32768, "tie_word_embeddings": False,
}  # fmt: skip
MOE = [name for name in adapter_names() if "moe" in name or name == "mixtral"]


def plan_of(folder: Path, **values: Any) -> dict[str, Any]:
    """The plan of a teacher that is nothing but a configuration."""
    (folder / "config.json").write_text(json.dumps(values))
    return json.loads(run_well("plan", folder / "config.json", "--recipe", "llamba-8b", "--json").stdout)


def test_only_the_chosen_experts_cost_time_and_all_cost_memory(tmp_path):
    eight, sixteen = (plan_of(tmp_path, **{**MIXTRAL, "num_local_experts": number}) for number in (8, 16))
    assert eight["teacher"]["num_parameters"] == 46_702_792_704
    assert eight["teacher"]["active_parameters"] == 12_879_925_248
    assert sixteen["flops"] == pytest.approx(eight["flops"], rel=1e-3)
    assert sixteen["peak_memory_bytes"] > 1.8 * eight["peak_memory_bytes"]
    text = run_well("plan", tmp_path / "config.json", "--recipe", "llamba-8b").stdout
    assert "of them for one token" in text


@pytest.mark.parametrize("family", adapter_names())
def test_experts_are_told_from_other_weights(family, tmp_path):
    save_teacher(tiny_teacher(family, **SIZES), tmp_path)
    facts = json.loads(run_well("inspect", tmp_path, "--json").stdout)["teacher"]
    assert (facts["active_parameters"] < facts["num_parameters"]) == (family in MOE)


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_a_family_that_cannot_be_converted_is_refused_with_its_reason(name, tmp_path):
    assert name in CONFIG_MAPPING_NAMES
    (tmp_path / "config.json").write_text(json.dumps({"model_type": name}))
    refused = run("inspect", tmp_path / "config.json")
    assert refused.exit_code == UnknownFamilyError.exit_code
    assert f"the family {name} cannot be converted: {UNSUPPORTED[name]}" in refused.stderr
    assert "docs/families.md" in refused.stderr
