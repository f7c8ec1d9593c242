"""Solved examples in front of questions, where they come from and how many there are; and where tasks lie."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from mohawkify.errors import DataError, UsageError
from mohawkify.evaluation.harness_tasks import load_tasks
from tests.evaluation.conftest import CHOICE, WriteTask

pytest.importorskip("lm_eval", reason="needs the extra `eval`")


def write_rows(path: Path, number: int) -> Path:
    rows = [{"query": f"Question {count} is", "endings": ["alpha", "beta"], "label": 0} for count in range(number)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def contexts(task: Path, num_fewshot: int) -> list[str]:
    """The text in front of the answers of a task over `write_rows`, in the order of its questions."""
    loaded = next(iter(load_tasks([str(task)], num_fewshot).tasks.values()))
    loaded.set_fewshot_seed(1234)
    loaded.build_all_requests(rank=0, world_size=1)
    return [request.args[0] for request in loaded.instances[::2]]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"fewshot_config": {"sampler": "first_n"}},
        {"fewshot_config": {"split": "test"}},
        {"test_split": None, "validation_split": "test"},
        {"test_split": None, "validation_split": "test", "fewshot_split": "test"},
        {"fewshot_split": "again", "dataset_kwargs": {"data_files": {"test": "rows.jsonl", "again": "rows.jsonl"}}},
    ],
    ids=["test rows alone", "the first rows", "named", "validation rows", "validation rows named", "one file twice"],
)
def test_a_question_is_never_its_own_example(changes: dict[str, Any], write_task: WriteTask, tmp_path: Path) -> None:
    task = write_task("ours", write_rows(tmp_path / "rows.jsonl", 8), CHOICE, **changes)
    for number, context in enumerate(contexts(task, 7)):
        assert context.count(f"Question {number} is") == 1
        assert context.count("alpha") == 7
    with pytest.raises(UsageError, match="has 7 rows to take solved examples from beside the question itself, 8 were"):
        load_tasks([str(task)], 8)


def test_rows_that_are_there_twice_are_excluded_twice(write_task: WriteTask, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", 3)
    rows.write_text(rows.read_text() + "\n" + rows.read_text().splitlines()[0])
    task = write_task("ours", rows, CHOICE)
    assert [context.count("alpha") for context in contexts(task, 2)] == [2] * 4
    assert [context.count("Question 0 is") for context in contexts(task, 2)][::3] == [1, 1]
    with pytest.raises(UsageError, match="has 2 rows to take solved examples from"):
        load_tasks([str(task)], 3)


def test_examples_of_other_rows_are_those_of_lm_eval(write_task: WriteTask, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", 2)
    others = write_rows(tmp_path / "others.jsonl", 9)
    others.write_text("\n".join(others.read_text().splitlines()[2:]))
    files = {"data_files": {"test": "rows.jsonl", "train": "others.jsonl"}}
    changes = {"training_split": "train", "dataset_kwargs": files}
    task = write_task("ours", tmp_path / "rows.jsonl", CHOICE, **changes)
    drawn = random.Random(1234)
    for context in contexts(task, 3):
        expected = [f"Question {number} is alpha" for number in drawn.sample(range(2, 9), 3)]
        assert context.split("\n\n")[:-1] == expected
    with pytest.raises(UsageError, match="has 7 rows to take solved examples from, 8 were asked for"):
        load_tasks([str(task)], 8)


def test_examples_that_a_task_wants_itself_are_checked_too(write_task: WriteTask, questions: Path) -> None:
    task = write_task("ours", questions, CHOICE, num_fewshot=2)
    with pytest.raises(UsageError, match=r"ours has 1 rows .* 2 were asked for"):
        load_tasks([str(task)])
    sample = {"query": "Max ran", "endings": ["home.", "x."], "label": 0, "text": "x"}
    task = write_task("given", questions, CHOICE, fewshot_config={"samples": [sample]})
    with pytest.raises(UsageError, match="given has 1 rows to take solved examples from, 2 were asked for"):
        load_tasks([str(task)], 2)
    task = write_task("picked", questions, CHOICE, fewshot_config={"fewshot_indices": [1]})
    with pytest.raises(UsageError, match=r"has the key fewshot_config\.fewshot_indices"):  # lm-eval ignores it
        load_tasks([str(task)])


def test_whole_texts_take_no_examples(write_task: WriteTask, questions: Path) -> None:
    whole = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"}
    task = write_task("whole", questions, {**whole, "metric_list": [{"metric": "word_perplexity"}]})
    with pytest.raises(UsageError, match="whole scores whole texts, which take no solved examples; 1 were asked for"):
        load_tasks([str(task)], 1)


def test_a_folder_like_a_pattern_is_a_folder(write_task: WriteTask, tmp_path: Path) -> None:
    task = write_task("ours", write_rows(tmp_path / "rows.jsonl", 3), CHOICE)
    folder = tmp_path / "tasks [1]*?"
    folder.mkdir()
    for file in (task, tmp_path / "rows.jsonl"):
        file.rename(folder / file.name)
    assert len(contexts(folder / task.name, 1)) == 3
    assert len(load_tasks(["ours"], include_path=folder).tasks["ours"].eval_docs) == 3


def test_local_questions_need_no_cache(
    write_task: WriteTask, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = write_task("ours", questions, CHOICE)
    write_task("inside", questions, CHOICE)
    (tmp_path / "group.yaml").write_text(yaml.safe_dump({"group": "both", "task": ["inside"]}))
    (tmp_path / "taken").write_text("a file where the cache should be")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "taken" / "cache")
    for found in (load_tasks([str(task)]), load_tasks(["both"], include_path=tmp_path)):
        assert [len(task.eval_docs) for task in found.tasks.values()] == [2]
    hub = {"dataset_path": "some/questions", "dataset_kwargs": None}
    with monkeypatch.context() as patch:
        patch.setattr("datasets.load_dataset", lambda **_: os.mkdir(tmp_path / "taken" / "cache"))
        with pytest.raises(DataError, match="cannot be loaded: NotADirectoryError") as caught:
            load_tasks([str(write_task("far", questions, CHOICE, **hub))])
    assert caught.value.hint == "set HF_HOME to a folder that can be written"
