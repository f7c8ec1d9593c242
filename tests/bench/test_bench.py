"""The benchmarks in their quick form: what they find is complete, and a wrong result gets no speed."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest
import torch

from mohawkify.bench import operators as bench_ops
from mohawkify.bench import peers
from mohawkify.bench import training as bench_train
from mohawkify.bench.cases import FOREIGN, KERNELS, find_cases, make_inputs, run_form, task_of
from mohawkify.bench.decoding import QUICK, Models, require_same_by_steps, student_cache
from mohawkify.bench.markdown import Bound, Measure, markdown
from mohawkify.bench.measure import Timing, peak_in_child, side_by_side
from mohawkify.errors import MohawkifyError, NumericsError
from mohawkify.evaluation.line_plot import line_plot
from tests.commands import run

CPU = torch.device("cpu")


def silent(line: str) -> None:
    """Take a line of progress."""


@pytest.mark.parametrize("name", ["scan", "orient", "distill", "conv", "decode_step"])
def test_every_form_agrees_with_its_definition(name):
    case = find_cases(CPU)[name]
    errors = bench_ops.check_errors(case, case.quick, torch.float32, CPU)
    assert errors.keys() == case.forms.keys()
    assert all(error < 1e-5 for error in errors.values()), errors
    assert case.base in case.forms


@pytest.mark.parametrize("case", KERNELS)
def test_the_kernels_are_where_the_cases_look_for_them(case):
    pytest.importorskip("triton")
    assert case in find_cases(torch.device("cpu"))
    assert peers.find_function(*KERNELS[case]) is not None


def test_peers_are_given_the_same_tensors():
    forms = find_cases(CPU)["scan"].forms
    assert {FOREIGN + name for name in ("ssd_minimal", "ssd_subtracting", "transformers")} <= forms.keys()


def test_a_peer_that_gives_the_divergence_alone_is_judged_by_it(monkeypatch):
    def divergence(student, student_head, teacher, teacher_head):
        ours, theirs = (
            torch.log_softmax(pair[0] @ pair[1].T, -1) for pair in ((student, student_head), (teacher, teacher_head))
        )
        return torch.nn.functional.kl_div(ours, theirs, log_target=True, reduction="batchmean")

    monkeypatch.setattr(
        peers, "distill_peers", lambda device: {"right": divergence, "wrong": lambda *i: 1.001 * divergence(*i)}
    )
    case = find_cases(CPU)["distill"]
    errors = bench_ops.check_errors(case, case.quick, torch.float32, CPU)
    assert errors[FOREIGN + "right"] < 1e-5
    assert errors[FOREIGN + "wrong"] > 5e-4


@pytest.mark.parametrize("own", [True, False], ids=["ours", "a-peers"])
def test_a_wrong_form_gets_no_speed(monkeypatch, own):
    case = find_cases(CPU)["scan"]

    def wrong(inputs):
        y, state = case.forms["chunked"](inputs)
        return y * (1 + 1e-4), state

    name = "wrong" if own else FOREIGN + "wrong"
    broken = replace(case, forms={**case.forms, name: wrong})
    cases = {**find_cases(CPU), "scan": broken}
    monkeypatch.setattr(bench_ops, "find_cases", lambda device: cases)
    if own:
        monkeypatch.setattr(bench_ops, "side_by_side", lambda *arguments: pytest.fail("something was timed"))
        with pytest.raises(NumericsError, match=r"scan, wrong: found an error of .*, allowed 1e-05"):
            bench_ops.bench_operators(CPU, quick=True, report=silent)
        return
    found = bench_ops.bench_operators(CPU, quick=True, report=silent)
    row = next(row for row in found["rows"] if row["form"] == name)
    assert row["error"] > 1e-5
    assert "seconds" not in row


def test_a_result_that_is_not_finite_is_an_error():
    case = find_cases(CPU)["scan"]
    broken = replace(case, forms={"chunked": lambda i: tuple(t * float("nan") for t in case.forms["chunked"](i))})
    with pytest.raises(NumericsError, match="error of inf"):
        bench_ops.require_small({"scan": bench_ops.check_errors(broken, case.quick, torch.float32, CPU)}, torch.float32)


def test_stages_and_their_definitions_agree():
    found = bench_train.bench_training("demo", CPU, batch=2, length=48, quick=True, report=silent)
    assert [(row["stage"], row["form"]) for row in found["rows"]] == [
        (stage, form) for stage in ("orient", "align", "distill") for form in ("mohawkify", "direct")
    ]
    for row in found["rows"]:
        assert row["tokens_per_second"] > 0
        assert sum(row["shares"].values()) == pytest.approx(1.0)
        assert row["peak_bytes"] is None
    own, direct = ([row["loss"] for row in found["rows"] if row["form"] == form] for form in ("mohawkify", "direct"))
    assert own == pytest.approx(direct, rel=1e-5)
    assert len(found["measures"]) == 3


def test_stages_that_differ_get_no_speed():
    with pytest.raises(NumericsError, match=r"align: found a loss of 2, 2\.01 by its definition"):
        bench_train.require_same({"align": {"mohawkify": 2.0, "direct": 2.01}})
    with pytest.raises(NumericsError, match="loss of nan"):
        bench_train.require_same({"align": {"mohawkify": float("nan"), "direct": 2.01}})


def test_a_step_leaves_the_weights_alone():
    workload = bench_train.Workload.make("demo", 1, 16, CPU)
    before = {name: p.clone() for name, p in workload.models.student.named_parameters()}
    for form in ("mohawkify", "direct"):
        workload.step("distill", form)()
    assert all(torch.equal(before[name], p) for name, p in workload.models.student.named_parameters())


def test_a_student_that_steps_wrongly_gets_no_speed():
    student = Models.make(QUICK, CPU).student
    assert require_same_by_steps(student, CPU) < 1e-5
    layer = student.model.layers[0].self_attn
    layer.step = lambda *inputs, **options: 1.001 * type(layer).step(*inputs, **options)
    with pytest.raises(NumericsError, match="decoding: token by token"):
        require_same_by_steps(student, CPU)


def test_a_filled_cache_is_as_large_as_a_real_one():
    student = Models.make(QUICK, CPU).student
    with torch.inference_mode():
        real = student(torch.zeros(3, 5, dtype=torch.long), use_cache=True).past_key_values
    for made, layer in zip(student_cache(student, 3, 5).layers, real.layers, strict=True):
        for name, state in made.states.items():
            assert (state.shape, state.dtype) == (layer.states[name].shape, layer.states[name].dtype)


@pytest.mark.full
def test_memory_is_measured_in_a_process_of_its_own():
    case = find_cases(CPU)["orient"]
    sizes = {"batch": 1, "length": 1024, "heads": 4, "head_dim": 16, "state_size": 16}
    matrix = 4 * 1024 * 1024 * 4
    assert peak_in_child(task_of(case, "direct", sizes)) > 3 * matrix
    with pytest.raises(MohawkifyError, match="could not be measured"):
        peak_in_child(task_of(case, "no such form", sizes))


def test_forms_are_timed_in_turn():
    order: list[str] = []
    timings = side_by_side({name: lambda name=name: order.append(name) for name in "ab"}, 3, CPU)
    assert "".join(order) == "abababab"
    assert {name: len(timing.seconds) for name, timing in timings.items()} == {"a": 3, "b": 3}
    assert Timing((1.0, 8.0, 3.0)).over(Timing((2.0, 2.0, 2.0))) == 1.5
    assert Timing((1.0, 8.0, 3.0)).median == 3.0
    assert Timing((1.0, 5.0, 2.0)).spread == 2.0


def test_measures_know_their_side():
    assert Measure("speed", 1.5, Bound.AT_LEAST, 1.5).hit
    assert not Measure("speed", 1.49, Bound.AT_LEAST, 1.5).hit
    assert Measure("memory", 0.125, Bound.AT_MOST, 0.125).hit
    assert not Measure("memory", 0.126, Bound.AT_MOST, 0.125).hit


def test_plots_are_sound():
    curves = {"a <b>": [(8.0, 20.0), (512.0, 3.0)], "none": []}
    root = ElementTree.fromstring(line_plot("batch & more", "tokens/s", curves))
    assert root.tag.endswith("svg")
    assert sum(each.tag.endswith("circle") for each in root.iter()) == 2
    ElementTree.fromstring(line_plot("x", "y", {"none": []}))


def test_the_command_writes_what_it_prints(tmp_path):
    done = run("bench", "decode", "--quick", "--json", "--output", str(tmp_path / "out"))
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert json.loads((tmp_path / "out" / "decode.json").read_text()) == found
    assert (tmp_path / "out" / "decode.md").read_text() == markdown("decode", found)
    assert {path.name for path in (tmp_path / "out").glob("*.svg")} == {
        f"{figure}-{key}.svg" for figure in ("batches", "contexts") for key in ("tokens_per_second", "cache_bytes")
    }
    assert {row["model"] for row in found["contexts"]} == {"student", "teacher", "teacher, static cache"}
    sizes = {row["cache_bytes"] for row in found["contexts"] if row["model"] == "student"}
    assert len(sizes) == 1
    assert {(row["batch"], row["context"]) for row in found["together"]} == {(2, 64)}
    over = [each["measure"] for each in found["measures"] if "over the teacher" in each["measure"]]
    teachers = ("teacher", "teacher, static cache")
    assert over == [f"decoding: speed over the {name} at 64, batch {batch}" for batch in (1, 2) for name in teachers]


def test_memory_that_is_not_there_is_a_result(monkeypatch):
    from mohawkify.bench import decoding

    monkeypatch.setattr(decoding, "available_bytes", lambda device: 40_000)
    rows = decoding._rows(Models.make(QUICK, CPU), 1, 256, 1)
    assert [("says" in row, "seconds" in row) for row in rows] == [(True, False)] * 3
    assert all(row["says"].startswith("out of memory: needs ") for row in rows)


def test_the_gate_decides_the_exit_code(monkeypatch):
    monkeypatch.setattr(bench_ops, "ALLOWED_ERROR", {torch.float32: 1e-12})
    done = run("bench", "ops", "--quick")
    assert done.exit_code == 65
    assert done.stdout == ""
    assert "allowed 1e-12" in done.stderr


def test_inputs_are_the_same_every_time():
    case = find_cases(CPU)["scan"]
    first, learned = make_inputs(case, case.quick, torch.float32, CPU)
    second, _ = make_inputs(case, case.quick, torch.float32, CPU)
    assert all(torch.equal(first[name], second[name]) for name in first)
    one, two = (run_form(case.forms["chunked"], inputs, learned) for inputs in (first, second))
    assert all(torch.equal(one[name], two[name]) for name in one)
