"""Tasks through lm-eval: real questions, a real model as teacher and student; and what is refused before it runs."""

from __future__ import annotations

import copy
import functools
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from mohawkify.errors import DataError, MissingExtraError, NumericsError, UsageError
from mohawkify.evaluation import harness
from mohawkify.evaluation.harness import run_tasks
from mohawkify.evaluation.harness_tasks import PRESETS, load_preset, load_tasks
from tests.conftest import ROOT, SHARED_DATA
from tests.evaluation.conftest import ACCURACY, CHOICE, WriteTask

pytest.importorskip("lm_eval", reason="needs the extra `eval`")

PERPLEXITY = {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}
LAST_WORD = {
    "output_type": "loglikelihood",
    "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
    "doc_to_target": "{{' '+text.split(' ')[-1]}}",
    "metric_list": [PERPLEXITY, ACCURACY],
}
SCIENCE = {
    **CHOICE,
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_choice": "{{choices.text}}",
    "doc_to_target": "{{choices.label.index(answerKey)}}",
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Matrices this small only lose by being shared out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def teacher(stories_teacher: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(stories_teacher)


@pytest.fixture(scope="module")
def tokenizer(stories_teacher: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(stories_teacher)


def run(teacher: PreTrainedModel, tokenizer: Any, tasks: list[Any], **changes: Any) -> dict[str, Any]:
    found = {name: changes.pop(name) for name in ("num_fewshot", "include_path") if name in changes}
    settings: dict[str, Any] = {"batch_size": 8, "limit": 6, **changes}
    models = settings.pop("models", {"teacher": teacher, "student": teacher})
    return run_tasks(models, tokenizer, load_tasks([str(task) for task in tasks], **found), **settings)


def benchmark(name: str) -> Path:
    return SHARED_DATA / "benchmarks" / name


def test_a_model_keeps_all_of_itself(teacher: Any, tokenizer: Any, write_task: WriteTask) -> None:
    tasks = [
        write_task("local_hellaswag", benchmark("hellaswag.jsonl"), CHOICE),
        write_task("local_lambada", benchmark("lambada_openai.jsonl"), LAST_WORD),
        write_task("local_arc", benchmark("arc_easy.jsonl"), SCIENCE),
    ]
    teacher.train()
    padding = tokenizer.pad_token
    student = copy.deepcopy(teacher)
    found = run(teacher, tokenizer, tasks, models={"teacher": teacher, "student": student}, limit=16)
    assert list(found["tasks"]) == ["local_hellaswag", "local_lambada", "local_arc"]
    assert found["subtasks"] == {}
    for task in found["tasks"].values():
        assert (task["version"], task["num_fewshot"], task["samples"]) == (3.0, 0, 16)
        for metrics in task["metrics"].values():
            assert metrics["student"] == metrics["teacher"]
            assert metrics["retention"] == (100.0 if metrics["teacher"] else None)
    metrics = {name: sorted(task["metrics"]) for name, task in found["tasks"].items()}
    assert metrics["local_hellaswag"] == metrics["local_arc"] == ["acc", "acc_norm"]
    assert metrics["local_lambada"] == ["acc", "perplexity"]
    assert 0 < found["tasks"]["local_hellaswag"]["metrics"]["acc"]["teacher"] < 1
    assert found["window"] == 512
    assert found["limit"] == 16
    assert found["seeds"] == harness.SEEDS
    assert found["lm_eval"].startswith("0.4")
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert teacher.training, "the mode before is the mode after"
    assert tokenizer.pad_token == padding


def test_retention_has_the_direction_of_the_metric(teacher: Any, tokenizer: Any, write_task: WriteTask) -> None:
    generator = torch.Generator().manual_seed(5)
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.5 * parameter.std() * torch.randn(parameter.shape, generator=generator))
    task = write_task("local_lambada", benchmark("lambada_openai.jsonl"), LAST_WORD)
    found = run(teacher, tokenizer, [task], models={"teacher": teacher, "student": student})
    perplexity = found["tasks"]["local_lambada"]["metrics"]["perplexity"]
    assert perplexity["higher_is_better"] is False
    assert perplexity["student"] > perplexity["teacher"]
    assert perplexity["retention"] == pytest.approx(100 * perplexity["teacher"] / perplexity["student"])
    assert perplexity["retention"] < 100


def test_more_shots_are_asked_and_recorded(
    teacher: Any, tokenizer: Any, write_task: WriteTask, questions: Path
) -> None:
    task = write_task("ours", questions, CHOICE)
    found = run(teacher, tokenizer, [task], num_fewshot=1)
    assert found["tasks"]["ours"]["num_fewshot"] == found["num_fewshot"] == 1
    fixed = write_task("fixed", questions, CHOICE, num_fewshot=0)
    with pytest.raises(UsageError, match="fixed at 0 solved examples, 1 were asked for"):
        run(teacher, tokenizer, [fixed], num_fewshot=1)


def test_a_student_alone_has_no_retention(teacher: Any, tokenizer: Any, write_task: WriteTask, questions: Path) -> None:
    task = write_task("ours", questions, CHOICE)
    found = run(teacher, tokenizer, [task], models={"student": teacher})
    assert found["tasks"]["ours"]["metrics"]["acc"].keys() == {"higher_is_better", "student"}


def test_a_group_is_one_line_and_its_members_are_beside(
    teacher: Any, tokenizer: Any, write_task: WriteTask, questions: Path, tmp_path: Path
) -> None:
    write_task("first", questions, CHOICE)
    write_task("second", questions, {**CHOICE, "doc_to_text": "So: {{query}}"})
    aggregate = [{"metric": "acc", "weight_by_size": True}]
    group = {"group": "pair", "task": ["first", "second"], "aggregate_metric_list": aggregate}
    (tmp_path / "pair.yaml").write_text(yaml.safe_dump(group), encoding="utf-8")
    found = run(teacher, tokenizer, ["pair"], include_path=tmp_path)
    assert list(found["tasks"]) == ["pair"]
    assert sorted(found["subtasks"]) == ["first", "second"]
    members = [task["metrics"]["acc"]["teacher"] for task in found["subtasks"].values()]
    assert found["tasks"]["pair"]["metrics"]["acc"]["teacher"] == pytest.approx(sum(members) / 2)
    with pytest.raises(UsageError, match="first is asked for twice"):
        run(teacher, tokenizer, ["pair", "first"], include_path=tmp_path)


def test_the_llamba_preset_runs_on_local_copies(
    teacher: Any, tokenizer: Any, write_task: WriteTask, questions: Path, tmp_path: Path
) -> None:
    for name in PRESETS["llamba"].metrics:
        write_task(name, questions, LAST_WORD if name == "lambada_openai" else CHOICE)
    models = {"teacher": teacher, "student": teacher}
    found = run_tasks(models, tokenizer, load_preset("llamba", tmp_path), batch_size=8, limit=2)
    chosen = [found["tasks"][task]["metrics"][metric]["teacher"] for task, metric in PRESETS["llamba"].metrics.items()]
    assert len(chosen) == 8
    assert found["num_fewshot"] == 0
    assert found["preset"]["average"]["teacher"] == pytest.approx(sum(chosen) / 8)
    assert found["preset"]["average"]["retention"] == 100.0
    with pytest.raises(UsageError, match="no preset named 'lamba'"):
        load_preset("lamba")


def test_the_task_file_of_the_page_works(
    teacher: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    row = next(line for line in page.splitlines() if line.startswith('    {"query"'))
    task = yaml.safe_load(page.partition("```yaml\n")[2].partition("```")[0])
    (tmp_path / "questions.jsonl").write_text(row, encoding="utf-8")
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    found = run(teacher, tokenizer, ["mine.yaml"])
    assert found["tasks"]["my_questions"]["samples"] == 1
    assert list(found["tasks"]["my_questions"]["metrics"]) == ["acc", "acc_norm"]


def test_windows_must_be_equal(teacher: Any, tokenizer: Any, write_task: WriteTask, questions: Path) -> None:
    student = copy.deepcopy(teacher)
    student.config.max_position_embeddings = 1024
    with pytest.raises(UsageError, match="teacher 512, student 1024"):
        run(
            teacher, tokenizer, [write_task("ours", questions, CHOICE)], models={"teacher": teacher, "student": student}
        )


def test_an_answer_longer_than_the_window_is_refused_before_the_first_forward_pass(
    teacher: Any, tokenizer: Any, write_task: WriteTask, tmp_path: Path
) -> None:
    data = tmp_path / "long.jsonl"
    rows = [
        {"query": "A", "endings": ["b.", "c."], "label": 0},
        {"query": "A", "endings": ["very " * 600, "b."], "label": 1},
    ]
    data.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    model = copy.deepcopy(teacher)
    calls: list[int] = []
    model.register_forward_pre_hook(lambda module, args: calls.append(1))
    with pytest.raises(DataError, match=r"an answer of \d+ tokens does not fit the models' window of 512: 'very"):
        run(model, tokenizer, [write_task("long", data, CHOICE)])
    assert calls == []


def test_contexts_that_are_cut_are_counted(teacher: Any, tokenizer: Any, write_task: WriteTask, tmp_path: Path) -> None:
    data = tmp_path / "long.jsonl"
    rows = [{"query": text, "endings": ["day.", "night."], "label": 0} for text in ("One", "Once upon a time " * 200)]
    data.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    assert run(teacher, tokenizer, [write_task("long", data, CHOICE)])["truncated_requests"] == 2


def test_a_metric_that_is_no_number_is_an_error(
    teacher: Any, tokenizer: Any, write_task: WriteTask, questions: Path
) -> None:
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        student.model.norm.weight[0] = float("nan")
    task = write_task("words", questions, LAST_WORD)
    with pytest.raises(NumericsError, match="perplexity of the student on words is nan"):
        run(teacher, tokenizer, [task], models={"teacher": teacher, "student": student})


def test_code_in_a_task_file_is_refused_and_not_run(
    teacher: Any, tokenizer: Any, write_task: WriteTask, questions: Path, tmp_path: Path
) -> None:
    (tmp_path / "utils.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\ndef text(doc): return 'x'\n", encoding="utf-8"
    )
    direct = write_task("direct", questions, CHOICE)
    direct.write_text(direct.read_text() + "process_docs: !function utils.text\n", encoding="utf-8")
    outer = write_task("outer", questions, CHOICE, include="inner.yaml")
    (tmp_path / "inner.yaml").write_text("description: !function utils.text\n", encoding="utf-8")
    for tasks, include_path in (([direct], None), ([outer], None), (["direct"], tmp_path), (["arc_easy"], tmp_path)):
        with pytest.raises(UsageError, match=r"found a tag \(!\)") as caught:
            run(teacher, tokenizer, tasks, include_path=include_path)
        assert caught.value.exit_code == 2
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"unsafe_code": True}, "has the key unsafe_code"),
        ({"class": "os.system"}, "has the key class"),
        ({"use_prompt": "other.yaml:all"}, "has the key use_prompt"),
        ({"process_results": "utils.run"}, "has the key process_results"),
        ({"metric_list": [{"metric": "./mine.py"}]}, "has the metric ./mine.py, which lm-eval does not have"),
        ({"metric_list": [{**ACCURACY, "hf_evaluate": True}]}, "has the metric acc, "),
        ({"metric_list": 5}, "metric_list: Input should be a valid list, found '5'"),
        ({"metric_list": [{"metric": "acc", "x": 1}]}, "has the key metric_list.0.x"),
        ({"generation_kwargs": {"custom_generate": "./evil"}}, "has the key generation_kwargs.custom_generate"),
        ({"generation_kwargs": {"trust_remote_code": True}}, "has the key generation_kwargs.trust_remote_code"),
        ({"filter_list": [{"name": "a", "filter": [{"function": "custom"}]}]}, "Input should be 'regex'"),
        ({"dataset_kwargs": {"cache_dir": "/x"}}, "has the key dataset_kwargs.cache_dir"),
        ({"dataset_kwargs": {"trust_remote_code": True}}, "has the key dataset_kwargs.trust_remote_code"),
        ({"dataset_kwargs": {"data_files": "/etc/passwd"}}, "passwd lies outside of"),
        ({"dataset_kwargs": {"data_files": ["../x.jsonl"]}}, "cannot be read: No such file"),
        ({"dataset_kwargs": {"data_files": {"test": "out.jsonl"}}}, "out.jsonl lies outside of"),
        ({"dataset_kwargs": {"data_files": {"test": "pipe"}}}, "pipe is not a plain file"),
        ({"dataset_path": "pandas"}, "dataset_path: found 'pandas', expected a dataset of the Hub"),
        ({"dataset_path": "../data"}, "dataset_path: found '../data'"),
        ({"dataset_path": "here/data"}, "dataset_path: found 'here/data'"),
        ({"dataset_path": "some/dataset"}, "data_files: expected none for a dataset of the Hub"),
        ({"repeats": 100_000}, "repeats: Input should be less than"),
        ({"group": "g", "task": [{"alias": "x"}]}, "lists {'alias': 'x'} in a group"),
        ({"task": None}, "has neither a task: nor a group: name"),
        ({"include": "ours.yaml"}, "includes itself"),
        ({"include": "nowhere.yaml"}, "nowhere.yaml cannot be read: No such file"),
        ({"include": "../outside.yaml"}, "outside.yaml lies outside of"),
        ({"include": "circle.yaml"}, "circle.yaml cannot be read: "),
        ({"include": "pipe"}, "pipe is not a plain file"),
        ({"include": 3}, "includes 3, expected the name of a file"),
    ],
)
def test_task_files_that_are_refused(
    changes: dict[str, Any],
    reason: str,
    teacher: Any,
    tokenizer: Any,
    write_task: WriteTask,
    questions: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = questions.parent
    (folder.parent / "outside.yaml").write_text("description: x\n", encoding="utf-8")
    (folder.parent / "out.jsonl").write_text("{}\n", encoding="utf-8")
    (folder / "out.jsonl").symlink_to(folder.parent / "out.jsonl")
    (folder / "circle.yaml").symlink_to(folder / "circle.yaml")
    (folder / "here" / "data").mkdir(parents=True)
    os.mkfifo(folder / "pipe")
    monkeypatch.chdir(folder)
    task = write_task("ours", questions, CHOICE, **changes)
    with pytest.raises(UsageError, match=reason):
        run(teacher, tokenizer, [task])


def test_code_in_a_task_inside_a_group_is_refused(
    teacher: Any, tokenizer: Any, write_task: WriteTask, questions: Path, tmp_path: Path
) -> None:
    inline = yaml.safe_load(write_task("inline", questions, CHOICE, unsafe_code=True).read_text())
    group = tmp_path / "group.yaml"
    group.write_text(yaml.safe_dump({"group": "outer", "task": [inline]}), encoding="utf-8")
    with pytest.raises(UsageError, match="has the key unsafe_code"):
        run(teacher, tokenizer, [group])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: [", "bad.yaml:1: not valid YAML"),
        ("- a", "holds list"),
        ("\0", "expected printable text"),
        ("a: &a [x]\nb: *a", "bad.yaml:1: found an anchor or alias"),
        ("task: " + "[" * 3000, "nested more than 16 levels deep"),
        ("group: g\ntask: [g]", "the group g is a member of itself"),
    ],
)
def test_files_that_are_no_tasks(text: str, reason: str, teacher: Any, tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=reason):
        run(teacher, tokenizer, [path])


def test_questions_that_cannot_be_read(teacher: Any, tokenizer: Any, write_task: WriteTask, questions: Path) -> None:
    task = write_task("ours", questions, CHOICE)
    questions.write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match=r"questions of task .*ours\.yaml cannot be loaded"):
        run(teacher, tokenizer, [task])
    questions.unlink()
    with pytest.raises(UsageError, match=r"questions\.jsonl cannot be read: No such file"):
        run(teacher, tokenizer, [task])


def test_rows_that_do_not_fit_the_templates(
    teacher: Any, tokenizer: Any, write_task: WriteTask, questions: Path
) -> None:
    rows = [json.loads(line) for line in questions.read_text(encoding="utf-8").splitlines()]
    rows[1]["endings"] = None
    questions.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with pytest.raises(DataError, match="lm-eval cannot run the tasks"):
        run(teacher, tokenizer, [write_task("ours", questions, CHOICE)])


def test_two_files_of_one_name(teacher: Any, tokenizer: Any, write_task: WriteTask, questions: Path) -> None:
    task = write_task("ours", questions, CHOICE)
    (task.parent / "other.yaml").write_text(task.read_text().replace("{{query}}", "So: {{query}}"), encoding="utf-8")
    with pytest.raises(UsageError, match="is a second task file named ours"):
        run(teacher, tokenizer, ["ours"], include_path=task.parent)
    (task.parent / "other.yaml").unlink()
    assert run(teacher, tokenizer, [task], include_path=task.parent)["tasks"]["ours"]["samples"] == 2


def test_no_other_program_is_asked(
    teacher: Any, tokenizer: Any, write_task: WriteTask, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("subprocess.Popen", lambda *command, **_: pytest.fail(f"{command} was started"))
    run(teacher, tokenizer, [write_task("ours", questions, CHOICE)])


@pytest.fixture(scope="module")
def read_index_once() -> Iterator[None]:
    """Reading lm-eval's own 14,000 tasks takes 10 s: the tests that need them share one reading."""
    from lm_eval.tasks._index import TaskIndex

    read = functools.cache(TaskIndex.build)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TaskIndex, "build", staticmethod(lambda paths: dict(read(tuple(paths)))))
        yield


@pytest.mark.usefixtures("read_index_once")
def test_a_misspelt_name_is_refused(teacher: Any, tokenizer: Any) -> None:
    with pytest.raises(UsageError, match="found no task named 'arc_esay'") as caught:
        run(teacher, tokenizer, ["arc_esay"])
    assert caught.value.hint == "did you mean arc_easy?"


@pytest.mark.usefixtures("read_index_once")
@pytest.mark.parametrize("as_member", [False, True])
def test_a_bundled_task_that_runs_code_is_refused(
    as_member: bool, teacher: Any, tokenizer: Any, tmp_path: Path
) -> None:
    task = "humaneval"
    if as_member:
        group = tmp_path / "group.yaml"
        group.write_text(yaml.safe_dump({"group": "ours", "task": ["arc_easy", task]}), encoding="utf-8")
        task = str(group)
    with pytest.raises(UsageError, match="task humaneval runs code that the model writes"):
        run(teacher, tokenizer, [task])


@pytest.mark.usefixtures("read_index_once")
def test_the_presets_tasks_exist() -> None:
    from lm_eval.tasks import TaskManager

    index = TaskManager().task_index
    for preset in PRESETS.values():
        for task, metric in preset.metrics.items():
            settings = index[task].cfg
            listed = settings["aggregate_metric_list" if "group" in settings else "metric_list"]
            assert metric in [each["metric"] for each in listed], task


def test_no_task_and_no_folder(teacher: Any, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no task is named"):
        run(teacher, tokenizer, [])
    with pytest.raises(UsageError, match="no such folder of tasks"):
        run(teacher, tokenizer, ["x"], include_path=tmp_path / "nowhere")


def test_without_lm_eval_the_extra_is_named(teacher: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingExtraError) as caught:
        run(teacher, tokenizer, ["arc_easy"])
    assert caught.value.hint == 'pip install "mohawkify[eval]"'
