"""The metrics that compare a student with its teacher, on a real teacher and real text; and how they are shown."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from mohawkify.data.validation import EvaluationBatch, evaluation_batches
from mohawkify.errors import DataError, NumericsError
from mohawkify.evaluation import fidelity, speed
from mohawkify.evaluation.fidelity import Fidelity, evaluating, measure_fidelity, measure_perplexity
from mohawkify.evaluation.report import console_table, markdown_report
from mohawkify.evaluation.speed import decode_speed
from mohawkify.families.registry import adapter_names
from tests.tiny import COMMON, randomise, tiny_pair, tiny_teacher

CPU = torch.device("cpu")
BOS, WINDOW = 1, 512


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Matrices this small only lose by being shared out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def teacher(stories_teacher: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(stories_teacher).eval()


@pytest.fixture(scope="module")
def rows(stories_teacher: Path, stories_text: Path) -> list[np.ndarray]:
    tokenizer = AutoTokenizer.from_pretrained(stories_teacher, model_max_length=100_000)
    stories = (stories_text / "tinystories.txt").read_text(encoding="utf-8").split("<|endoftext|>")
    ids = [[BOS, *tokenizer(s.strip(), add_special_tokens=False).input_ids] for s in stories if s.strip()]
    return [np.array(story[:WINDOW], dtype=np.uint32) for story in ids]


@pytest.fixture(scope="module")
def student(teacher: PreTrainedModel) -> PreTrainedModel:
    """The teacher with every weight moved a little, each layer differently."""
    moved = copy.deepcopy(teacher)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.add_(0.15 * parameter.std() * torch.randn(parameter.shape, generator=generator))
    return moved


def naive_figures(student: PreTrainedModel, teacher: PreTrainedModel, rows: list[np.ndarray]) -> dict[str, float]:
    """The definitions word for word: one row after another, one token after another, in float64."""
    student_loss, teacher_loss, kl, same = [], [], [], []
    for row in rows:
        ids = torch.from_numpy(row.astype(np.int64))
        with torch.no_grad():
            ours = torch.softmax(student(input_ids=ids[None]).logits[0].double(), dim=-1)
            theirs = torch.softmax(teacher(input_ids=ids[None]).logits[0].double(), dim=-1)
        for t in range(len(ids) - 1):
            student_loss.append(-math.log(ours[t, ids[t + 1]]))
            teacher_loss.append(-math.log(theirs[t, ids[t + 1]]))
            kl.append(float((theirs[t] * (theirs[t] / ours[t]).log()).sum()))
            same.append(float(ours[t].argmax() == theirs[t].argmax()))
    return {
        "tokens": len(kl),
        "perplexity": math.exp(np.mean(student_loss)),
        "teacher_perplexity": math.exp(np.mean(teacher_loss)),
        "kl": float(np.mean(kl)),
        "top1": float(np.mean(same)),
    }


def assert_figures(found: Fidelity, expected: dict[str, float], tolerance: float) -> None:
    assert found.tokens == expected["tokens"]
    for name in ("perplexity", "teacher_perplexity", "kl", "top1"):
        assert getattr(found, name) == pytest.approx(expected[name], rel=0, abs=tolerance), name


def test_teacher_against_itself_gives_the_known_perplexity(teacher: PreTrainedModel, rows: list[np.ndarray]) -> None:
    found = measure_fidelity(teacher, teacher, evaluation_batches(rows, 8), device=CPU)
    assert found.tokens == 70_407
    assert found.kl == pytest.approx(0.0, abs=1e-7)
    assert found.top1 == 1.0
    assert found.perplexity == pytest.approx(4.426, abs=0.005)
    assert found.teacher_perplexity == found.perplexity
    assert found.seconds > 0


def test_figures_are_those_of_the_definitions(
    student: PreTrainedModel, teacher: PreTrainedModel, rows: list[np.ndarray]
) -> None:
    rows = rows[:12]
    expected = naive_figures(student, teacher, rows)
    assert expected["kl"] > 0.05
    assert expected["top1"] < 0.95
    for batch_size in (1, 8):  # 8: rows of many lengths, padded
        found = measure_fidelity(student, teacher, evaluation_batches(rows, batch_size), device=CPU)
        assert_figures(found, expected, tolerance=1e-6 * expected["perplexity"])
        assert found.kl == pytest.approx(expected["kl"], rel=0, abs=1e-6)


def test_padding_and_chunks_change_nothing(
    student: PreTrainedModel, teacher: PreTrainedModel, rows: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows[12:24]
    alone = measure_fidelity(student, teacher, evaluation_batches(rows, 1), device=CPU)
    together = measure_fidelity(student, teacher, evaluation_batches(rows, 8), device=CPU)
    assert_figures(together, vars(alone), tolerance=1e-6)
    vocab_size = teacher.config.vocab_size
    monkeypatch.setattr(fidelity, "MAX_COPY_BYTES", 7 * 4 * vocab_size * 5)  # five tokens at a time
    assert_figures(measure_fidelity(student, teacher, evaluation_batches(rows, 8), device=CPU), vars(alone), 1e-6)


def test_kl_is_from_teacher_to_student(student: PreTrainedModel, teacher: PreTrainedModel, rows: list[Any]) -> None:
    forward = measure_fidelity(student, teacher, evaluation_batches(rows[:4], 4), device=CPU)
    backward = measure_fidelity(teacher, student, evaluation_batches(rows[:4], 4), device=CPU)
    assert forward.perplexity == pytest.approx(backward.teacher_perplexity, rel=1e-9)
    assert abs(forward.kl - backward.kl) > 1e-4


def test_teacher_alone(teacher: PreTrainedModel, student: PreTrainedModel, rows: list[np.ndarray]) -> None:
    both = measure_fidelity(student, teacher, evaluation_batches(rows[:4], 4), device=CPU)
    assert measure_perplexity(teacher, evaluation_batches(rows[:4], 4)) == pytest.approx(
        both.teacher_perplexity, rel=1e-9
    )


@pytest.mark.parametrize("family", ["gemma2", "cohere", "granite", "phi", "granitemoeshared"])
def test_figures_with_heads_of_every_kind(family: str, tmp_path: Path) -> None:
    """Soft-cap, factor, divisor, bias; and a family without a file, whose logits are its model's own."""
    if family in adapter_names():
        pair = tiny_pair(family, tmp_path, num_hidden_layers=2)
        student, teacher = pair.student, pair.teacher
    else:
        model_class = transformers.GraniteMoeSharedForCausalLM
        config = model_class.config_class(**COMMON, num_local_experts=4, num_experts_per_tok=2, logits_scaling=4.0)
        student, teacher = randomise(model_class(config)), randomise(model_class(config))
        with torch.no_grad():
            student.lm_head.weight.mul_(-1.0)
    rows = random_rows(9, 5, 12)
    found = measure_fidelity(student, teacher, evaluation_batches(rows, 2), device=CPU)
    expected = naive_figures(student, teacher, rows)
    assert expected["kl"] > 0.05
    assert_figures(found, expected, 1e-5 * expected["perplexity"])


def random_rows(*lengths: int) -> list[np.ndarray]:
    return [np.random.default_rng(length).integers(3, 97, length).astype(np.uint32) for length in lengths]


def test_progress_counts_predicted_tokens() -> None:
    model = tiny_teacher("llama")
    seen: list[int] = []
    measure_fidelity(model, model, evaluation_batches(random_rows(9, 5, 4), 2), device=CPU, progress=seen.append)
    assert seen == [8 + 4, 8 + 4 + 3]


def test_modes_are_restored() -> None:
    model = tiny_teacher("llama").train()
    frozen = model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    with evaluating(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
    assert [module.training for module in model.modules()] == before
    assert model.training
    assert not frozen.training
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_a_number_that_is_none_is_an_error(whose: str) -> None:
    models = {"student": tiny_teacher("llama"), "teacher": tiny_teacher("llama")}
    with torch.no_grad():
        models[whose].model.norm.weight[0] = float("nan")
    with pytest.raises(NumericsError, match=whose):
        measure_fidelity(**models, batches=evaluation_batches(random_rows(6), 1), device=CPU)


def test_text_without_a_prediction_is_an_error() -> None:
    model = tiny_teacher("llama")
    single = EvaluationBatch(torch.tensor([[5, 0]]), torch.tensor([[True, False]]))
    for batches in ([], [single]):
        with pytest.raises(DataError, match="no token to predict"):
            measure_fidelity(model, model, batches, device=CPU)


def test_speed_generates_all_tokens_one_by_one() -> None:
    model = tiny_teacher("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every token ties, so the first id wins: make it the end of the text
    model.generation_config.eos_token_id = 0
    lengths: list[int] = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    per_second = decode_speed(model, CPU)
    assert lengths == [speed.PROMPT_TOKENS, *[1] * (speed.NEW_TOKENS - 1)] * (1 + speed.REPEATS)
    assert 1 < per_second < 1e6


RESULTS: dict[str, Any] = {
    "name": "stories-mohawk",
    "evaluation_tokens": 20_480,
    "teacher": {"perplexity": 3.3101},
    "stages": {
        "init": {"tokens": 0, "perplexity": 12345.678, "kl": 3.5, "top1": 0.25, "seconds": 0.0},
        "distill": {"tokens": 1_200_000, "perplexity": 3.78, "kl": 0.13996, "top1": 0.836, "seconds": 93.4},
    },
    "student": {"perplexity": 3.78, "kl": 0.13996, "top1": 0.836},
    "tasks": {
        "limit": 100,
        "window": 512,
        "truncated_requests": 0,
        "tasks": {
            "a|b": {
                "num_fewshot": 0,
                "samples": 100,
                "metrics": {
                    "acc": {"higher_is_better": True, "teacher": 0.5, "student": 0.45, "retention": 90.0},
                    "perplexity": {"higher_is_better": False, "teacher": 30.0, "student": 40.0, "retention": 75.0},
                },
            }
        },
    },
    "speed": {"teacher_tokens_per_second": 200.0, "student_tokens_per_second": 312.0},
    "sizes": {"teacher": "1.06 MB", "mlx-q4": "400 bytes"},
}


def test_console_table_shows_every_part() -> None:
    text = console_table(RESULTS)
    blocks = {block.splitlines()[0]: [line.split() for line in block.splitlines()[2:]] for block in text.split("\n\n")}
    held = blocks["Held-out text (20,480 predicted tokens)"]
    assert held[1] == ["teacher", "-", "3.310", "1.000", "-", "-", "-"]
    assert held[2] == ["after", "init", "0", "12,346", "3,730", "3.5000", "0.2500", "0.0"]
    assert held[3] == ["after", "distill", "1,200,000", "3.780", "1.142", "0.1400", "0.8360", "93"]
    assert held[4] == ["student", "-", "3.780", "1.142", "0.1400", "0.8360", "-"]
    tasks = blocks["Tasks (the first 100 questions of each)"]
    assert tasks[1] == ["a|b", "acc", "0", "100", "0.5000", "0.4500", "90.0"]
    assert tasks[2] == ["a|b", "perplexity", "(lower", "is", "better)", "0", "100", "30.00", "40.00", "75.0"]
    assert blocks["Generation"][2] == ["student", "312", "1.56"]
    assert blocks["On disk"][1:] == [["teacher", "1.06", "MB"], ["mlx-q4", "400", "bytes"]]


def test_average_of_a_preset_stars_its_metrics() -> None:
    average = {"teacher": 0.5, "student": 0.45, "retention": 90.0}
    preset = {"name": "llamba", "metrics": {"a|b": "acc"}, "average": average}
    lines = console_table({"tasks": {**RESULTS["tasks"], "preset": preset}}).splitlines()
    assert [line.split() for line in lines if "*" in line] == [
        ["a|b", "acc", "*", "0", "100", "0.5000", "0.4500", "90.0"],
        ["llamba:", "average", "*", "-", "-", "0.5000", "0.4500", "90.0"],
    ]


def test_columns_are_aligned() -> None:
    block = console_table({key: RESULTS[key] for key in ("teacher", "stages")}).splitlines()[1:]
    assert len({len(line) for line in block}) == 1  # the last column is flush right in every line
    page = markdown_report(RESULTS)
    for table in page.split("\n\n"):
        if table.startswith("|"):
            assert len({len(line) for line in table.splitlines()}) == 1


def test_what_was_not_measured_is_left_out() -> None:
    assert console_table({"teacher": {}, "stages": {}}) == ""
    text = console_table({"student": {"perplexity": 5.0}})
    assert text.split() == ["Held-out", "text", "perplexity", "-------", "----------", "student", "5.000"]


def test_markdown_report_is_a_page() -> None:
    page = markdown_report(RESULTS)
    assert page.startswith("# Results of stories-mohawk\n\n## Held-out text")
    assert r"| a\|b |" in page
    assert [line for line in page.splitlines() if line.startswith("## ")][1:] == [
        "## Tasks (the first 100 questions of each)",
        "## Generation",
        "## On disk",
    ]


def test_report_needs_no_torch() -> None:
    code = "import sys, mohawkify.evaluation.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
