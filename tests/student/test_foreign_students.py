"""A finished student from elsewhere is looked at as a teacher is: one line in time, or a model that writes text."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from mohawkify.errors import CheckpointError, MohawkifyError, TeacherError
from mohawkify.evaluation.generation import GenerateOptions, generate_text
from mohawkify.exporters.card import model_card
from mohawkify.exporters.mlx import require_mlx
from mohawkify.run.folder import RunFolder
from mohawkify.student.save import load_student
from mohawkify.teacher.generation_settings import plain_generation
from mohawkify.teacher.load import load_teacher
from mohawkify.teacher.resolve import read_config, resolve_teacher
from mohawkify.teacher.tokenizer import load_tokenizer
from mohawkify.teacher.validate import require_config
from tests.commands import copy_of
from tests.finished import finished_run
from tests.teacher.damage import edit_json

MIXER = {"kind": "discrete_mamba2", "mixer_heads": 4, "attention_heads": 0}
SECONDS = 3  # of the processor
EXPORT = {
    "dtype": "bfloat16", "tokens": 5, "kl": 0.0, "top1": 1.0, "max_logit_difference": 0.0, "run_perplexity": 12.5,
    "perplexity": 13.0, "dtypes": {}, "plain": [], "text": "held-out text",
}  # fmt: skip


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    finished_run(folder)
    return folder


@pytest.fixture
def run(whole_run: Path, tmp_path: Path) -> RunFolder:
    """A copy to spoil."""
    return RunFolder(copy_of(whole_run, tmp_path / "run"))


def refused(run: RunFolder, says: str) -> None:
    began = time.process_time()
    with pytest.raises(MohawkifyError, match=says):
        load_student(run.final)
    assert time.process_time() - began < SECONDS


CONFIGURATIONS: dict[str, tuple[dict[str, Any], str]] = {
    "20,000 layers": ({"num_hidden_layers": 20_000}, "num_hidden_layers is 2e\\+04"),
    "500 layers": ({"num_hidden_layers": 500, "intermediate_size": 2**20}, "parameters, the weights hold"),
    "a width beyond all": ({"intermediate_size": 2 * 10**7}, "intermediate_size is 2e\\+07"),
    "a width beyond its weights": ({"intermediate_size": 10**6}, "parameters, the weights hold"),
    "a state beyond its weights": (
        {"mixer": {"layers": "model.layers", "attention": "self_attn", "layer_specs": [MIXER],
                   "config": {"head_dim": 2**20, "state_size": 16}}},
        "parameters, the weights hold",
    ),
    "a method": ({"save_pretrained": "x"}, "'save_pretrained', which is no setting"),
    "a first token below zero": ({"bos_token_id": -1}, "bos_token_id"),
    "a last token beyond the vocabulary": ({"eos_token_id": [1, 10**6]}, "eos_token_id"),
    "another file": ({"configuration_files": ["../x.json"]}, "configuration_files"),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIGURATIONS)
def test_a_configuration_that_no_student_has(run: RunFolder, case: str) -> None:
    changes, says = CONFIGURATIONS[case]
    edit_json(run.final / "config.json", **changes)
    refused(run, says)


@pytest.mark.parametrize("text", ["[]", "5", "null", "{", '{"model_type": ["mohawk_llama"]}'])
def test_a_configuration_that_is_none(run: RunFolder, text: str) -> None:
    (run.final / "config.json").write_text(text)
    refused(run, "config.json|expected a student")
    with pytest.raises(MohawkifyError, match=r"config.json|expected a student|mlx"):
        require_mlx(require_config(run.final / "config.json"), is_stock=False)


CALLS = {
    "custom_generate": "evil",
    "stop_strings": ["a"],
    "dola_layers": "low",
    "constraints": [1],
    "num_beams": 4,
    "token_healing": True,
    "prompt_lookup_num_tokens": 3,
    "assistant_confidence_threshold": 0.4,
    "max_time": 1e-9,
    "force_words_ids": [[1]],
    "cache_implementation": "static",
    "watermarking_config": {"bias": 2.0},
    "x": "y",
}


@pytest.mark.parametrize("key", CALLS)
def test_generation_settings_that_do_more_than_draw_are_dropped(run: RunFolder, key: str) -> None:
    edit_json(run.final / "generation_config.json", **{key: CALLS[key]})
    student = load_student(run.final)
    assert getattr(student.generation_config, key, None) == getattr(GenerationConfig(), key, None)
    tokenizer = load_tokenizer(run.final, student.config.vocab_size)
    generate_text(student, tokenizer, "once", GenerateOptions(max_tokens=3))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("eos_token_id", "x"), ("eos_token_id", [1, 10**6]), ("bos_token_id", -1), ("max_length", -1)),
        *(("temperature", "hot"), ("top_k", 1.5), ("do_sample", "yes"), ("repetition_penalty", -2)),
    ],
)
def test_generation_settings_with_a_value_that_is_none(run: RunFolder, key: str, value: Any) -> None:
    for folder, load in ((run.final, load_student), (run.path / "teacher-folder", load_a_teacher)):
        edit_json(folder / "generation_config.json", **{key: value})
        with pytest.raises((CheckpointError, TeacherError), match=key):
            load(folder)


@pytest.mark.parametrize("text", ["[", "[]", "5", "NaN"])
def test_generation_settings_that_are_none(run: RunFolder, text: str) -> None:
    for folder, load in ((run.final, load_student), (run.path / "teacher-folder", load_a_teacher)):
        (folder / "generation_config.json").write_text(text)
        with pytest.raises(TeacherError, match=r"generation_config\.json"):
            load(folder)


def load_a_teacher(folder: Path) -> object:
    return load_teacher(resolve_teacher(str(folder)), dtype=torch.float32, device=torch.device("cpu"))


def test_the_usual_generation_settings_are_kept() -> None:
    usual = {
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.9,
        "top_k": 20,
        "bos_token_id": 1,
        "eos_token_id": [2, 3],
    }
    kept = plain_generation(GenerationConfig(**usual, max_new_tokens=2048, pad_token_id=-1), 97)
    assert {key: getattr(kept, key) for key in usual} == usual
    assert (kept.max_new_tokens, kept.pad_token_id) == (2048, None)


@pytest.mark.parametrize(
    "key", ["save_pretrained", "to_dict", "to_json_string", "to_diff_dict", "update", "__class__", "__dict__"]
)
def test_a_teacher_with_a_method_for_a_setting_is_refused_at_once(run: RunFolder, key: str) -> None:
    path = run.path / "teacher-folder" / "config.json"
    edit_json(path, **{key: "x"})
    with pytest.raises(TeacherError, match=f"'{key}', which is no setting"):
        read_config(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [("bos_token_id", -1), ("bos_token_id", 10**6), ("eos_token_id", 258), ("eos_token_id", [1, -1])],
)
def test_a_teacher_with_a_token_that_its_vocabulary_lacks(run: RunFolder, key: str, value: Any) -> None:
    path = run.path / "teacher-folder" / "config.json"
    edit_json(path, **{key: value})
    with pytest.raises(TeacherError, match=key):
        read_config(path)


def test_layers_by_other_names_are_counted(tmp_path: Path) -> None:
    """Families multiply their layers by numbers of their own; lists of sizes hold sizes too."""
    for key, value in (
        *(("num_layers_per_stack", 10**6), ("H_cycles", 10**6), ("num_codebooks", 10**7), ("altup_num_inputs", 10**7)),
        *(("intermediate_size", [10**12] * 3), ("num_attention_heads_per_layer", [10**9])),
    ):
        path = tmp_path / "config.json"
        path.write_text(json.dumps({"model_type": "hrm_text", key: value}))
        with pytest.raises(TeacherError, match=f"{key} is"):
            read_config(path)


FACTS: dict[str, tuple[str, Any]] = {
    "student is a list": ("student.json", []),
    "name is a number": ("student.json", {"name": 5}),
    "layers are a number": ("student.json", {"layer_specs": 5}),
    "layers are numbers": ("student.json", {"layer_specs": [5]}),
    "a layer of both kinds": ("student.json", {"layer_specs": [MIXER | {"attention_heads": 4}]}),
    "parameters are a text": ("student.json", {"num_parameters": "many"}),
    "source is a list": ("teacher.json", {"source": [], "folder": "x", "files": {}}),
    "teacher is a list": ("teacher.json", []),
    "results without metrics": ("results.json", {"teacher": {}, "stages": {"init": {}}}),
    "results of texts": ("results.json", {"teacher": {"perplexity": "low"}, "stages": {}}),
    "results of lists": ("results.json", {"teacher": {}, "stages": {"init": [1]}}),
    "results of a name": ("results.json", {"teacher": {}, "stages": {}, "name": ["x"]}),
    "results of odd phases": (
        "results.json",
        {"teacher": {}, "stages": {"init": {"tokens": 1, "perplexity": 1, "kl": 1, "top1": 1, "phases": [5]}}},
    ),
}


@pytest.mark.parametrize("case", FACTS)
def test_facts_that_no_card_can_be_made_of(run: RunFolder, case: str) -> None:
    name, content = FACTS[case]
    (run.path / name).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=name):
        model_card(run, "transformers", None, EXPORT)


@pytest.mark.parametrize("source", ["a" * 5000, "a\0b", "/" + "b" * 300])
def test_a_source_that_is_no_name_is_refused(run: RunFolder, source: str) -> None:
    edit_json(run.teacher_file, source=source)
    with pytest.raises(TeacherError, match="is no name of a file") as caught:
        model_card(run, "transformers", None, EXPORT)
    assert len(caught.value.message) < 300


def test_a_long_source_is_no_bug(run: RunFolder) -> None:
    edit_json(run.teacher_file, source="c/" * 4000)
    assert "mohawkify" in model_card(run, "transformers", None, EXPORT)


def test_a_teacher_may_have_a_mixer_of_its_own(run: RunFolder) -> None:
    from mohawkify.student.build import student_config

    path = run.path / "teacher-folder" / "config.json"
    edit_json(path, mixer={"a": 1})
    _, config, adapter = read_config(path)
    assert student_config(config, adapter, {"layers": "ours"}).mixer == {"layers": "ours"}
