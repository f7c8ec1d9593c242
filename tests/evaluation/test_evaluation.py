"""Evaluations of a finished run: what they were measured with, what is refused first, and stopping on the way."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from mohawkify.evaluation import evaluation as evaluation
from mohawkify.evaluation.response_cache import ResponseCache
from mohawkify.files.atomic import file_sha256
from mohawkify.files.lock import run_lock
from tests.commands import make_recipe, make_teacher, run, run_well

pytest.importorskip("lm_eval", reason="needs the extra `eval`")

NUM_QUESTIONS = 6
TASKS = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_target": "{{q}}",
        "doc_to_text": "",
        "metric_list": [{"metric": "word_perplexity"}],
    },
    "written": {
        "output_type": "generate_until",
        "doc_to_target": "{{choices[gold]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
}
ASK = ("eval", "run", "--tasks", ",".join(f"{name}.yaml" for name in TASKS), "--batch-size", 1)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, and three tasks over the same questions."""
    folder = tmp_path_factory.mktemp("evaluation")
    make_teacher(folder / "tiny-llama", num_hidden_layers=2)
    make_recipe(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_well("convert", "tiny-llama", "--recipe", "tiny.yaml", "--output", "run")
    write_questions(folder, NUM_QUESTIONS)
    for name, settings in TASKS.items():
        kwargs = {"data_files": {"test": "questions.jsonl"}}
        task = {"task": name, "dataset_path": "json", "dataset_kwargs": kwargs, "test_split": "test"}
        text = yaml.safe_dump({**task, "doc_to_text": "{{q}}", **settings, "metadata": {"version": 1.0}})
        (folder / f"{name}.yaml").write_text(text)
    return folder


@pytest.fixture
def inside(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The workplace as working directory, its run as it was afterwards."""
    monkeypatch.chdir(workplace)
    shutil.copytree("run", "untouched")
    yield workplace
    shutil.rmtree(workplace / "run")
    os.rename(workplace / "untouched", workplace / "run")


def write_questions(folder: Path, number: int) -> None:
    rows = [{"q": f"{count} cats and", "choices": ["a dog", "a hen"], "gold": count % 2} for count in range(number)]
    rows[0]["q"] = "many cats " * 60  # more than the window holds
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))


def evaluate(*more: Any) -> dict[str, Any]:
    return dict(json.loads(run_well(*ASK, "--json", *more).stdout))


def test_a_stopped_evaluation_does_not_ask_again(inside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    undisturbed = evaluate()
    assert undisturbed["tasks"]["truncated_requests"] == 2  # the two answers of the long question
    before = Path("run/eval.json").read_bytes()
    kept: list[str] = []
    add = ResponseCache.add_partial
    stop_at = 17  # of 2 x 24: the teacher's first two tasks and a part of the third are answered

    def keep(self: ResponseCache, kind: str, request: Any, answer: Any) -> None:
        if len(kept) == stop_at:
            os.kill(os.getpid(), signal.SIGINT)
        kept.append(kind)
        add(self, kind, request, answer)

    with monkeypatch.context() as patch:
        patch.setattr(ResponseCache, "add_partial", keep)
        stopped = run(*ASK)
        assert stopped.exit_code == 130, stopped.stderr
        assert stopped.stderr.splitlines()[-2:] == [
            "error: stopped before all was measured; the responses so far are kept",
            "hint: the same command continues it",
        ]
        assert Path("run/eval.json").read_bytes() == before
        assert len(kept) == stop_at
        kept.clear()
        stop_at = -1
        continued = evaluate()
    assert len(kept) == 2 * 4 * NUM_QUESTIONS - 17
    assert {task["sha256"] for task in continued["tasks"]["tasks"].values()} == {
        task["sha256"] for task in undisturbed["tasks"]["tasks"].values()
    }
    assert continued == undisturbed
    assert not Path("run/responses").exists()


@pytest.mark.full
def test_a_terminated_evaluation_goes_on(inside: Path) -> None:
    write_questions(inside, 600)
    command = [sys.executable, "-m", "mohawkify", *map(str, ASK)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        while not any(file.stat().st_size > 2000 for file in Path("run").glob("responses/*.jsonl")):
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        errors = process.communicate(timeout=60)[1]
    finally:
        process.kill()
        write_questions(inside, NUM_QUESTIONS)
    assert process.returncode == 143, errors
    assert "the responses so far are kept" in errors
    assert not Path("run/eval.json").exists()
    result = run_well(*ASK)
    assert "responses of the teacher are there already, from an evaluation that was stopped" in result.stderr


def test_answers_of_another_student_or_batch_size_are_not_taken(inside: Path) -> None:
    Path("run/responses").mkdir()
    for name in ("teacher", "student"):
        Path(f"run/responses/{name}-0123456789abcdef.jsonl").write_text('{"request": "x", "answer": 1.0}\n')
    assert "are there already" not in run_well(*ASK).stderr


@pytest.mark.parametrize("answer", ['"nan"', "[1]", "[NaN, true]", "null", "[-1.0, 1]", "{}"])
def test_an_answer_that_is_none_is_asked_again(tmp_path: Path, answer: str) -> None:
    answers = ResponseCache(tmp_path / "responses.jsonl")
    answers.add_partial("loglikelihood", ("a", "b"), (-1.5, True))
    assert ResponseCache(tmp_path / "responses.jsonl").find("loglikelihood", ("a", "b")) == (-1.5, True)
    line = json.loads((tmp_path / "responses.jsonl").read_text())
    text = json.dumps({**line, "answer": "ANSWER"}).replace('"ANSWER"', answer)
    (tmp_path / "responses.jsonl").write_text(text.replace("NaN", '"nan"') + "\n")
    for kind in ("loglikelihood", "loglikelihood_rolling"):
        assert ResponseCache(tmp_path / "responses.jsonl").find(kind, ("a", "b")) is None


def test_figures_say_what_they_were_measured_with(inside: Path) -> None:
    found = evaluate()
    facts = found["provenance"]
    for name, folder in (("student", Path("run/final")), ("teacher", Path("tiny-llama"))):
        assert facts[name]["files"]["model.safetensors"] == file_sha256(folder / "model.safetensors")
        assert facts[name]["files"]["tokenizer.json"] == file_sha256(folder / "tokenizer.json")
        assert facts[name]["precision"] == "float32"
    assert facts["device"] == "cpu"
    assert {"mohawkify", "torch", "transformers"} == facts["versions"].keys()
    hashes = {name: task["sha256"] for name, task in found["tasks"]["tasks"].items()}
    rows = Path("questions.jsonl").read_text()
    Path("questions.jsonl").write_text(rows.replace('"gold": 1', '"gold": 0'))
    try:
        others = {name: task["sha256"] for name, task in evaluate()["tasks"]["tasks"].items()}
    finally:
        Path("questions.jsonl").write_text(rows)
    assert all(len(hashes[name]) == 64 and hashes[name] != others[name] for name in TASKS)
    assert len(facts["text"]) == 64


def test_tasks_are_refused_before_a_model_is_loaded(inside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "load_run_models", lambda *_: pytest.fail("a model was loaded"))
    monkeypatch.setattr(evaluation, "run_teacher", lambda *_: pytest.fail("the teacher was hashed"))
    Path("unsafe.yaml").write_text(Path("choice.yaml").read_text() + "unsafe_code: true\n")
    result = run("eval", "run", "--tasks", "unsafe.yaml")
    assert (result.exit_code, "has the key unsafe_code" in result.stderr) == (2, True)
    assert run("eval", "run", "--tasks", "nowhere.yaml").exit_code == 2


def test_two_evaluations_do_not_meet(inside: Path) -> None:
    with run_lock(Path("run")):
        result = run(*ASK)
    assert result.exit_code == 2
    assert "is working in run" in result.stderr


def test_other_text_is_measured_as_if_the_run_had_held_it_out(inside: Path) -> None:
    own = json.loads(run_well("eval", "run", "--json").stdout)
    (inside / "other.txt").write_text("one two three four five six seven\n\n" * 40)
    other = json.loads(run_well("eval", "run", "--validation", "other.txt", "--json").stdout)
    assert other["student"]["kl"] != own["student"]["kl"]
    assert other["overrides"] == ["data.validation=- path: other.txt\n"]
    few = ("eval", "run", "--validation", "other.txt", "--set", "evaluation.tokens=20", "--json")
    assert json.loads(run_well(*few).stdout)["evaluation_tokens"] < other["evaluation_tokens"]
    assert json.loads(run_well("eval", "run", "--json").stdout)["student"] == own["student"]
    for wrong, says in (
        ("stages.distill.tokens=1k", "expected data.validation or a key of evaluation"),
        ("evaluation.tokens=20", "expected other text beside it"),
    ):
        refused = run("eval", "run", "--set", wrong)
        assert refused.exit_code == 2
        assert says in refused.stderr


def test_text_that_was_removed_is_tokenised_again(inside: Path) -> None:
    shutil.rmtree("run/corpora")
    found = json.loads(run_well("eval", "run", "--json").stdout)
    assert found["evaluation_tokens"] == json.loads(Path("run/results.json").read_text())["evaluation_tokens"]


def test_a_run_needs_neither_its_place_nor_its_text(
    inside: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = json.loads(run_well("eval", "run", "--json").stdout)
    for name in ("run", "tiny-llama"):
        shutil.copytree(name, tmp_path / "moved" / name)
    (tmp_path / "moved" / "tiny-llama" / "text.txt").unlink()
    corpora = sorted((tmp_path / "moved" / "run" / "corpora").iterdir())
    monkeypatch.chdir(tmp_path)
    command = ("eval", "moved/run", "--json", "--tasks", inside / "choice.yaml", "--teacher", "moved/tiny-llama")
    result = run_well(*command)
    assert "warning" not in result.stderr
    after = json.loads(result.stdout)
    assert {key: after[key] for key in before} == before
    assert sorted((tmp_path / "moved" / "run" / "corpora").iterdir()) == corpora
    run_well("eval", "moved/run", "--against", "none")

    shutil.rmtree(tmp_path / "moved" / "run" / "corpora")
    monkeypatch.setattr(evaluation, "run_tasks", lambda *_, **__: pytest.fail("questions were asked first"))
    result = run(*command)
    assert (result.exit_code, "there is no file or folder" in result.stderr) == (66, True)


def test_a_teacher_that_is_gone_is_asked_for(inside: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = json.loads(Path("run/teacher.json").read_text())
    Path("run/teacher.json").write_text(json.dumps({**facts, "folder": str(tmp_path / "gone")}))
    monkeypatch.chdir(tmp_path)
    result = run("eval", inside / "run")
    assert result.exit_code == 66
    assert f"the teacher of {inside}/run is no longer in {tmp_path}/gone" in result.stderr
    assert "hint: name the folder where it is now with --teacher" in result.stderr
