"""Learned positions end: longer sequences are refused before anything is done, and generation stops there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from mohawkify.errors import RECIPE, UsageError
from mohawkify.evaluation.generation import GenerateOptions, generate_text
from mohawkify.families.positions import longest_sequence
from tests.bytes_tokenizer import BOS, EOS, bytes_tokenizer
from tests.commands import make_recipe, make_teacher, run, run_well
from tests.families.test_autodetect import unwritten_teacher
from tests.finished import tiny_student
from tests.tiny import save_teacher, tiny_teacher

WINDOW = 24
FAMILIES = ("gpt2", "gpt_bigcode", "opt", "mpt")
BYTES = {"vocab_size": 258, "bos_token_id": BOS, "eos_token_id": EOS}


def window_of(family: str) -> dict[str, Any]:
    return {"max_seq_len" if family == "mpt" else "max_position_embeddings": WINDOW}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 with few positions, a Llama of the same vocabulary, a recipe."""
    folder = tmp_path_factory.mktemp("work")
    make_teacher(folder / "llama")
    save_teacher(tiny_teacher("gpt2", **BYTES, **window_of("gpt2")), folder / "gpt2")
    bytes_tokenizer().save_pretrained(folder / "gpt2")
    (folder / "gpt2" / "text.txt").write_bytes((folder / "llama" / "text.txt").read_bytes())
    make_recipe(folder)
    return folder


@pytest.mark.parametrize("family", [*FAMILIES, "biogpt", "llama", "falcon"])
def test_the_longest_sequence_is_what_a_model_can_compute(family: str, tmp_path: Path) -> None:
    if family == "biogpt":
        unwritten_teacher(family, tmp_path, **window_of(family))
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    else:
        model = tiny_teacher(family, **window_of(family))
    limit = longest_sequence(model)
    assert limit == (None if family in ("llama", "falcon") else WINDOW)
    model(torch.randint(3, 97, (1, WINDOW if limit else 3 * WINDOW)))
    if limit:
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.randint(3, 97, (1, WINDOW + 1)))


TEXT = ("--set", "data.final_phase=[{path: 'teacher:text.txt'}]")
SHORT = ("--set", "evaluation.sequence_length=16")


@pytest.mark.parametrize(
    ("teacher", "changes", "key"),
    [
        ("gpt2", (), "evaluation.sequence_length"),
        ("gpt2", (*SHORT, "--set", "stages.align.sequence_length=32"), "stages.align.sequence_length"),
        (
            "gpt2",
            (*SHORT, *TEXT, "--set", "stages.distill.final_phase={tokens: 64, sequence_length: 32}"),
            "stages.distill.final_phase.sequence_length",
        ),
        (
            "llama",
            (*TEXT, "--set", "stages.distill.final_phase={tokens: 64, sequence_length: 32, teacher: gpt2}"),
            "stages.distill.final_phase.sequence_length",
        ),
    ],
)
def test_longer_sequences_are_refused_at_the_start(
    work: Path, monkeypatch: pytest.MonkeyPatch, teacher: str, changes: tuple[str, ...], key: str
) -> None:
    monkeypatch.chdir(work)
    for command in ("convert", "plan")[: 2 if teacher == "gpt2" else 1]:
        more = ("--output", "out") if command == "convert" else ()
        refused = run(command, teacher, "--recipe", "tiny.yaml", *more, *changes)
        assert refused.exit_code == RECIPE
        assert f"{key}: found 32, expected at most {WINDOW}, the learned positions of gpt2" in refused.stderr
        assert not Path("out").exists()


def test_logits_of_longer_sequences_are_refused_at_the_start(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(work)
    arguments = ("--for", "llama", "--recipe", "tiny.yaml", "--stage-phase", "train", "--output", "logits")
    refused = run("cache-logits", "gpt2", *arguments, "--set", "stages.distill.sequence_length=32")
    assert refused.exit_code == RECIPE
    assert f"stages.distill.sequence_length: found 32, expected at most {WINDOW}" in refused.stderr


def test_a_run_within_the_positions_works(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(work)
    told = json.loads(run_well("plan", "llama", "--recipe", "tiny.yaml", "--json").stdout)
    assert told
    lengths = [f"stages.{stage}.sequence_length={WINDOW}" for stage in ("orient", "align", "distill")]
    settings = [part for text in (*lengths, f"evaluation.sequence_length={WINDOW}") for part in ("--set", text)]
    run_well("convert", "gpt2", "--recipe", "tiny.yaml", "--output", "run", *settings)
    assert run_well("generate", "run", "Once", "--teacher", "--max-tokens", "500").exit_code == 0


@pytest.mark.parametrize("family", [*FAMILIES, "llama"])
def test_generation_stops_at_the_last_position(family: str, tmp_path: Path) -> None:
    student, _ = tiny_student(family, tmp_path, **window_of(family))
    student.generation_config.eos_token_id = None
    tokenizer = bytes_tokenizer()
    for model in (student, tiny_teacher(family, **BYTES, **window_of(family))):
        model.generation_config.eos_token_id = None
        passes: list[int] = []
        hook = model.get_input_embeddings().register_forward_hook(
            lambda module, inputs, output, into=passes: into.append(inputs[0].shape[1])
        )
        generate_text(model, tokenizer, "Once", GenerateOptions(max_tokens=60))
        hook.remove()
        assert len(passes) == (60 if family == "llama" else WINDOW - len("Once"))
        if family != "llama":
            with pytest.raises(UsageError, match=f"has {WINDOW} tokens, expected fewer than the model's {WINDOW} pos"):
                generate_text(model, tokenizer, "x" * WINDOW)
