"""Stage 3's loss: chunks of tokens against the definition on all logits, for every kind of head and teacher."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mohawkify.errors import UsageError
from mohawkify.families.autodetect import NO_FILE
from mohawkify.families.registry import load_adapter
from mohawkify.objectives.logits import LogitsObjective
from mohawkify.objectives.objective import Runner
from mohawkify.ops import constants
from mohawkify.ops.chunked_kl import LMHeadInput, chunked_distill_loss, head_logits
from mohawkify.ops.constants import chunk_tokens
from mohawkify.ops.losses import TopK, distill_loss, distill_loss_top_k
from mohawkify.recipe.schema import DistillRecipe
from mohawkify.teacher.lm_head import run_to_lm_head, verify_head
from tests.close import assert_close
from tests.tiny import packed, tiny_pair, tiny_teacher

BATCH, LENGTH, STUDENT_WIDTH, TEACHER_WIDTH, VOCABULARY = 2, 7, 5, 8, 37
EXACT = 1e-12
STUDENTS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.3},
    "softcap": {"softcap": 1.5},
    "all": {"bias": True, "scale": 2.5, "softcap": 2.0},
}
TEACHERS = ("head", "capped-head", "top-1", "top-5", "all-but-one", "all")


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def student_head(
    *, bias: bool = False, scale: float = 1.0, softcap: float | None = None, dtype: torch.dtype = torch.float64
) -> LMHeadInput:
    return LMHeadInput(
        random(BATCH, LENGTH, STUDENT_WIDTH, seed=1, dtype=dtype).requires_grad_(),
        random(VOCABULARY, STUDENT_WIDTH, seed=2, dtype=dtype).requires_grad_(),
        random(VOCABULARY, seed=3, dtype=dtype).requires_grad_() if bias else None,
        scale,
        softcap,
    )


def teacher_head(softcap: float | None = None, dtype: torch.dtype = torch.float64) -> LMHeadInput:
    hidden_bld = random(BATCH, LENGTH, TEACHER_WIDTH, seed=4, dtype=dtype)
    return LMHeadInput(hidden_bld, random(VOCABULARY, TEACHER_WIDTH, seed=5, dtype=dtype), softcap=softcap)


def keep_top(logits_blv: Tensor, k: int) -> TopK:
    """The k likeliest tokens and the mass of the others, added up from themselves."""
    log_blv = logits_blv.log_softmax(-1)
    ids_blk = log_blv.topk(k).indices
    log_rest_bl = log_blv.scatter(-1, ids_blk, -torch.inf).logsumexp(-1)
    return TopK(ids_blk, log_blv.gather(-1, ids_blk), log_rest_bl)


def teacher_of(kind: str) -> LMHeadInput | TopK:
    if kind in ("head", "capped-head"):
        return teacher_head(3.0 if kind == "capped-head" else None)
    k = {"top-1": 1, "top-5": 5, "all-but-one": VOCABULARY - 1, "all": VOCABULARY}[kind]
    return keep_top(head_logits(teacher_head()), k)


def counted() -> Tensor:
    counts_bl = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    counts_bl[0, [0, 3]] = counts_bl[1, 4:] = False
    return counts_bl


def direct(
    student: LMHeadInput, teacher: LMHeadInput | TopK, counts_bl: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The same by the definitions, on all logits."""
    if isinstance(teacher, TopK):
        return distill_loss_top_k(head_logits(student), teacher, counts_bl)
    return distill_loss(head_logits(student), head_logits(teacher), counts_bl, temperature)


def metrics(
    function, student: LMHeadInput, teacher: LMHeadInput | TopK, counts_bl: Tensor, temperature: float = 1.0
) -> list[Tensor]:
    """Loss, KL and the gradients of what learns, the loss weighted as an engine does."""
    loss, kl = function(student, teacher, counts_bl, temperature)
    learning = [t for t in (student.hidden_bld, student.weight_vd, student.bias_v) if t is not None and t.requires_grad]
    return [loss.detach(), kl, *torch.autograd.grad(2.5 * loss, learning)]


def set_chunk(monkeypatch: pytest.MonkeyPatch, num_tokens: int) -> None:
    monkeypatch.setattr(constants, "LOGITS_CHUNK_ELEMENTS", num_tokens * VOCABULARY + VOCABULARY // 2)
    assert chunk_tokens(VOCABULARY) == num_tokens


@pytest.mark.parametrize("kind", TEACHERS)
@pytest.mark.parametrize("options", STUDENTS.values(), ids=STUDENTS)
@pytest.mark.parametrize("num_tokens", [1, 3, 8, 9, 100])  # 9 count: cut evenly, with a rest, and not at all
def test_chunks_give_the_definitions_loss_and_gradients(kind, options, num_tokens, monkeypatch):
    set_chunk(monkeypatch, num_tokens)
    found = metrics(chunked_distill_loss, student_head(**options), teacher_of(kind), counted())
    expected = metrics(direct, student_head(**options), teacher_of(kind), counted())
    for name, ours, truth in zip(("loss", "KL", "hidden", "weight", "bias"), found, expected, strict=False):
        assert_close(f"{kind} {name}", ours, truth, tolerance=EXACT)
    assert found[1] > 0.1


@pytest.mark.parametrize("temperature", [0.5, 2.0, 4.0])
@pytest.mark.parametrize("options", STUDENTS.values(), ids=STUDENTS)
def test_temperature(temperature, options, monkeypatch):
    set_chunk(monkeypatch, 2)
    arguments = student_head(**options), teacher_head(3.0), counted(), temperature
    for ours, truth in zip(metrics(chunked_distill_loss, *arguments), metrics(direct, *arguments), strict=True):
        assert_close("temperature", ours, truth, tolerance=EXACT)


def test_a_temperature_with_a_top_k_teacher_is_refused():
    with pytest.raises(UsageError, match=r"found temperature 2 .* expected 1"):
        chunked_distill_loss(student_head(), teacher_of("top-5"), counted(), 2.0)


def test_top_k_is_the_partition_of_listed_tokens_and_all_else():
    student, teacher, counts_bl = head_logits(student_head()).detach(), head_logits(teacher_head()), counted()
    top = keep_top(teacher, 3)

    def merged(logits_blv: Tensor) -> Tensor:
        p_tv = logits_blv[counts_bl].softmax(-1)
        listed_tk = p_tv.gather(-1, top.ids_blk[counts_bl])
        return torch.cat([listed_tk, 1 - listed_tk.sum(-1, keepdim=True)], -1)

    p, q = merged(teacher), merged(student)
    loss, kl = distill_loss_top_k(student, top, counts_bl)
    assert_close("loss", loss, -(p * q.log()).sum(-1).mean(), tolerance=EXACT)
    assert_close("KL", kl, (p * (p / q).log()).sum(-1).mean(), tolerance=EXACT)


@pytest.mark.parametrize("function", [chunked_distill_loss, direct])
def test_all_of_the_vocabulary_listed_is_the_whole_loss(function):
    arguments = student_head(**STUDENTS["all"]), teacher_of("all"), counted()
    assert arguments[1].log_rest_bl.eq(-torch.inf).all()
    found = metrics(function, *arguments)
    for ours, truth in zip(found, metrics(direct, arguments[0], teacher_head(), counted()), strict=True):
        assert_close("all listed", ours, truth, tolerance=EXACT)
    # What rounding leaves beside a whole vocabulary is nothing: there is no token it could belong to.
    rounded = arguments[1]._replace(log_rest_bl=torch.full((BATCH, LENGTH), -16.0, dtype=torch.float64))
    for ours, truth in zip(metrics(function, arguments[0], rounded, counted()), found, strict=True):
        assert torch.equal(ours, truth)


@pytest.mark.parametrize("function", [chunked_distill_loss, direct])
def test_nothing_left_beside_the_listed_tokens_is_the_whole_loss(function):
    student = student_head()
    ids_blk = torch.stack([torch.randperm(VOCABULARY)[:4] for _ in range(BATCH * LENGTH)]).view(BATCH, LENGTH, 4)
    log_blk = random(BATCH, LENGTH, 4, seed=9).log_softmax(-1)
    teacher_blv = torch.full((BATCH, LENGTH, VOCABULARY), -1e4, dtype=torch.float64).scatter(-1, ids_blk, log_blk)
    top = TopK(ids_blk, log_blk, torch.full((BATCH, LENGTH), -torch.inf, dtype=torch.float64))
    loss, kl = distill_loss(head_logits(student), teacher_blv, counted())
    gradients = torch.autograd.grad(2.5 * loss, (student.hidden_bld, student.weight_vd))
    for ours, truth in zip(metrics(function, student, top, counted()), (loss.detach(), kl, *gradients), strict=True):
        assert_close("nothing left", ours, truth, tolerance=EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_student_sure_of_the_listed_tokens_keeps_the_rest(dtype):
    # The student's mass outside the listed tokens is e^-60: one minus the others would make it 0 and the loss infinite.
    hidden = torch.ones(1, 1, 1, dtype=dtype, requires_grad=True)
    weight = torch.tensor([[60.0], [0.0], [0.0], [0.0]], dtype=dtype, requires_grad=True)
    top = TopK(
        torch.tensor([[[0]]]), torch.tensor([[[0.5]]], dtype=dtype).log(), torch.full((1, 1), 0.5, dtype=dtype).log()
    )
    loss, kl, d_hidden, d_weight = metrics(
        chunked_distill_loss, LMHeadInput(hidden, weight), top, torch.ones(1, 1, dtype=torch.bool)
    )
    rest = torch.tensor(60.0, dtype=torch.float64) - torch.tensor(3.0, dtype=torch.float64).log()
    assert_close("loss", loss, (0.5 * rest).to(dtype))
    assert_close("KL", kl, (0.5 * rest - torch.tensor(2.0, dtype=torch.float64).log()).to(dtype))
    assert_close("weight", d_weight, 2.5 * torch.tensor([[0.5], [-1 / 6], [-1 / 6], [-1 / 6]], dtype=dtype))
    assert_close("hidden", d_hidden, torch.full((1, 1, 1), 2.5 * 30, dtype=dtype))


@pytest.mark.parametrize("kind", TEACHERS)
def test_gradients_by_finite_differences(kind, monkeypatch):
    set_chunk(monkeypatch, 4)
    student, counts_bl = student_head(**STUDENTS["all"]), counted()

    def loss(hidden_bld: Tensor, weight_vd: Tensor, bias_v: Tensor) -> Tensor:
        head = student._replace(hidden_bld=hidden_bld, weight_vd=weight_vd, bias_v=bias_v)
        temperature = 1.5 if kind == "head" else 1.0
        return chunked_distill_loss(head, teacher_of(kind), counts_bl, temperature)[0]

    assert torch.autograd.gradcheck(loss, student[:3])


@pytest.mark.parametrize("kind", TEACHERS)
def test_where_no_token_counts_the_loss_and_its_gradients_are_zero(kind):
    found = metrics(chunked_distill_loss, student_head(bias=True), teacher_of(kind), torch.zeros_like(counted()))
    assert not any(figure.any() for figure in found)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_the_loss_is_flat_at_the_teacher(softcap):
    teacher = teacher_head(softcap)
    student = teacher._replace(hidden_bld=teacher.hidden_bld.clone().requires_grad_())
    found = metrics(chunked_distill_loss, student, teacher, counted())
    assert found[1].abs() < 1e-14
    assert found[2].abs().max() < 1e-14


def test_tokens_that_do_not_count_change_nothing():
    teacher, student = teacher_head(), student_head()
    found = metrics(chunked_distill_loss, student, teacher, counted())
    noise = torch.where(counted().unsqueeze(-1), 0.0, torch.nan)
    student = student._replace(hidden_bld=(student.hidden_bld.detach() + noise).requires_grad_())
    again = metrics(chunked_distill_loss, student, teacher._replace(hidden_bld=teacher.hidden_bld + noise), counted())
    for ours, truth in zip(again, found, strict=True):
        assert torch.equal(ours, truth)
    assert not found[2][~counted()].any()


@pytest.mark.parametrize("frozen", ["hidden_bld", "weight_vd", "bias_v"])
def test_what_is_frozen_gets_no_gradient(frozen):
    student, names = student_head(bias=True), ("hidden_bld", "weight_vd", "bias_v")
    expected = dict(zip(names, metrics(direct, student, teacher_head(), counted())[2:], strict=True))
    student = student._replace(**{frozen: getattr(student, frozen).detach()})
    loss, _ = chunked_distill_loss(student, teacher_head(), counted())
    kept = dict(zip(names, loss.grad_fn.saved_tensors, strict=True))
    assert [name for name in names if kept[name] is None] == [frozen], "a frozen head costs no memory"
    (2.5 * loss).backward()
    for name, gradient in expected.items():
        tensor = getattr(student, name)
        if name == frozen:
            assert tensor.grad is None
        else:
            assert_close(name, tensor.grad, gradient, tolerance=EXACT)


def test_without_gradients_only_the_figures_are_made():
    expected = metrics(direct, student_head(), teacher_head(), counted())
    with torch.no_grad():
        loss, kl = chunked_distill_loss(student_head(), teacher_head(), counted())
    assert not loss.requires_grad
    assert_close("loss", loss, expected[0], tolerance=EXACT)
    assert_close("KL", kl, expected[1], tolerance=EXACT)


def test_kl_has_no_gradient():
    loss, kl = chunked_distill_loss(student_head(), teacher_head(), counted())
    assert loss.requires_grad
    assert not kl.requires_grad


def test_the_same_bits_every_time():
    arguments = student_head(bias=True, dtype=torch.float32), teacher_head(dtype=torch.float32), counted()
    first, second = (metrics(chunked_distill_loss, *arguments) for _ in range(2))
    assert all(torch.equal(ours, again) for ours, again in zip(first, second, strict=True))


def sizeable(width: int, seed: int, dtype: torch.dtype) -> LMHeadInput:
    """A head with logits of about 2."""
    hidden_bld = random(2, 61, width, seed=seed, dtype=dtype)
    return LMHeadInput(hidden_bld, (random(1003, width, seed=seed + 1) * 2 * width**-0.5).to(dtype))


def learning(head: LMHeadInput) -> LMHeadInput:
    return head._replace(
        hidden_bld=head.hidden_bld.detach().requires_grad_(), weight_vd=head.weight_vd.detach().requires_grad_()
    )


def errors(found: list[Tensor], truth: list[Tensor]) -> list[float]:
    return [
        float((ours.double() - exact).norm() / exact.norm().clamp_min(1e-12))
        for ours, exact in zip(found, truth, strict=True)
    ]


@pytest.mark.parametrize("form", ["float32", "bf16-autocast", "bf16"])
def test_low_precision_is_no_worse_than_all_logits_at_once(form, monkeypatch):
    """The error against float64 on the very numbers that both forms are given."""
    monkeypatch.setattr(constants, "LOGITS_CHUNK_ELEMENTS", 17 * 1003)
    stored = torch.bfloat16 if form == "bf16" else torch.float32
    student, teacher = learning(sizeable(48, 10, stored)), sizeable(64, 20, stored)
    counts_bl = torch.ones(2, 61, dtype=torch.bool)
    exact = (learning(LMHeadInput(*(t.double() for t in student[:2]))), LMHeadInput(*(t.double() for t in teacher[:2])))
    truth = metrics(direct, *exact, counts_bl)

    def on_all_logits(student: LMHeadInput, teacher: LMHeadInput, counts_bl: Tensor, temperature: float):
        logits = [torch.nn.functional.linear(head.hidden_bld, head.weight_vd) for head in (student, teacher)]
        return distill_loss(*logits, counts_bl, temperature)

    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=form == "bf16-autocast"):
        ours, plain = (metrics(f, student, teacher, counts_bl) for f in (chunked_distill_loss, on_all_logits))
    assert ours[0].dtype == ours[1].dtype == torch.float32
    assert [t.dtype for t in ours] == [t.dtype for t in plain]
    for name, error, allowed in zip(
        ("loss", "KL", "hidden", "weight"), errors(ours, truth), errors(plain, truth), strict=True
    ):
        assert error <= 1.05 * allowed + 5e-7, f"{name}: {error:.3g}, all logits at once {allowed:.3g}"


def test_different_precisions_of_student_and_teacher():
    student, teacher = learning(sizeable(48, 10, torch.float32)), sizeable(64, 20, torch.bfloat16)
    counts_bl = torch.ones(2, 61, dtype=torch.bool)
    found = metrics(chunked_distill_loss, student, teacher, counts_bl)
    for ours, truth in zip(found, metrics(direct, student, teacher, counts_bl), strict=True):
        assert_close("mixed", ours, truth)


def test_the_stage_gives_the_same_by_chunks_and_by_all_logits(tmp_path):
    pair = tiny_pair("gemma2", tmp_path, num_hidden_layers=2)
    recipe = DistillRecipe(tokens=1000, sequence_length=24, batch_sequences=2, learning_rate=1e-3, temperature=2.0)
    unknown = replace(pair, adapter=replace(pair.adapter, logits=NO_FILE))
    batch = packed()
    batch.loss_mask[0, :9] = False
    results = []
    for stage in (LogitsObjective(pair, recipe), LogitsObjective(unknown, recipe)):
        pair.student.zero_grad()
        found = stage.run(batch, Runner(lambda loss: loss.backward()))
        gradients = {name: p.grad.clone() for name, p in pair.student.named_parameters() if p.grad is not None}
        results.append((found, gradients))
    (ours, our_gradients), (theirs, their_gradients) = results
    assert_close("loss", ours["loss"], theirs["loss"])
    assert_close("KL", ours["kl"], theirs["kl"])
    assert our_gradients.keys() == their_gradients.keys()
    for name, truth in their_gradients.items():
        assert_close(name, our_gradients[name], truth, tolerance=1e-4)


@pytest.mark.parametrize(
    ("family", "values"),
    [("gemma3_text", {"final_logit_softcapping": 3.0}), ("gemma2", {"final_logit_softcapping": None})],
)
def test_a_softcap_is_read_from_the_configuration(family, values):
    """What the samples of the families, which tests/families/test_adapters.py goes through, do not switch on or off."""
    teacher, adapter = tiny_teacher(family, num_hidden_layers=2, **values), load_adapter(family)
    verify_head(teacher, adapter, 97)
    head = run_to_lm_head(teacher, adapter, input_ids=packed().input_ids, use_cache=False)
    assert head.softcap == values["final_logit_softcapping"]


MEMORY = """
import sys, torch
from mohawkify.ops import chunked_kl as chunks
from mohawkify.ops import constants
from mohawkify.ops.losses import distill_loss
torch.set_num_threads(1)
form, length, vocabulary, width = sys.argv[1], int(sys.argv[2]), 16000, 32
generator = torch.Generator().manual_seed(0)
hidden, other = (torch.randn(1, length, width, generator=generator) for _ in range(2))
weight = torch.randn(vocabulary, width, generator=generator)
hidden.requires_grad_(), weight.requires_grad_()
counts = torch.ones(1, length, dtype=torch.bool)
constants.LOGITS_CHUNK_ELEMENTS = 64 * vocabulary
student, teacher = chunks.LMHeadInput(hidden, weight), chunks.LMHeadInput(other, weight.detach())

def status(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

def loss(count):
    if form == "direct":
        return distill_loss(*(chunks.head_logits(head) for head in (student, teacher)), count)[0]
    return chunks.chunked_distill_loss(student, teacher, count)[0]

few = torch.zeros_like(counts)
few[:, :2] = True
loss(few).backward() if form == "chunks" else None
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
loss(counts).backward()
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's count of resident memory")
def test_memory_does_not_grow_with_tokens_times_vocabulary():
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}

    def peak(form: str, length: int) -> int:
        command = [sys.executable, "-c", MEMORY, form, str(length)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return int(done.stdout)

    short, long, direct = peak("chunks", 256), peak("chunks", 1024), peak("direct", 1024)
    assert long < 1.15 * short + 2e6
    assert long < direct / 8
