"""Stages train what they declare and nothing else; the schedule is a pure function; the engine continues exactly."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from mohawkify.distributed.process_group import World
from mohawkify.errors import CheckpointError, NumericsError
from mohawkify.objectives.hidden_state import HiddenStateObjective
from mohawkify.objectives.logits import LogitsObjective
from mohawkify.objectives.matrix import MatrixObjective
from mohawkify.objectives.objective import Runner
from mohawkify.objectives.trainable import part_of_parameters
from mohawkify.recipe.schema import AlignRecipe, DistillRecipe, OptimizerRecipe, OrientRecipe, ScheduleRecipe
from mohawkify.student.build import checkpoint_activations
from mohawkify.train.checks import require_finite, require_gradients
from mohawkify.train.engines.engine import LocalEngine
from mohawkify.train.schedule import learning_rate
from tests.tiny import FAMILIES, packed, tiny_pair

STAGE = {"tokens": 1000, "sequence_length": 24, "batch_sequences": 2, "learning_rate": 1e-3}
CPU = torch.device("cpu")


def stages(pair):
    """The stages in the variants that differ in what they train."""
    return {
        "orient": MatrixObjective(pair, OrientRecipe(**STAGE)),
        "orient-values": MatrixObjective(pair, OrientRecipe(weighting="values", **STAGE)),
        "align-block": HiddenStateObjective(pair, AlignRecipe(**STAGE)),
        "align-mixer": HiddenStateObjective(pair, AlignRecipe(target="mixer", **STAGE)),
        "distill": LogitsObjective(pair, DistillRecipe(**STAGE)),
        "distill-no-mlp": LogitsObjective(pair, DistillRecipe(train=("mixer", "norm", "embedding", "head"), **STAGE)),
    }


@pytest.mark.parametrize("name", ["orient", "align-block", "align-mixer", "distill", "distill-no-mlp"])
@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_declared_parameters_change_and_all_of_them(family, name, tmp_path):
    pair = tiny_pair(family, tmp_path, student={"keep": {"layers": (1,), "heads": ((0, 1), (0, 2))}})
    stage = stages(pair)[name]
    before = {n: p.detach().clone() for n, p in pair.student.named_parameters()}
    declared = stage.parameters()
    engine = LocalEngine(stage.models.student, declared, OptimizerRecipe(weight_decay=0.5), "fp32", CPU)
    stage.run(packed(), Runner(engine.backward))
    require_gradients(engine, declared, World(), "the test")
    engine.step(1e-3)
    changed = {n for n, p in pair.student.named_parameters() if not torch.equal(p, before[n])}
    assert changed == set(declared)


def test_orient_trains_exactly_what_the_matrix_is_made_of(tmp_path):
    pair = tiny_pair("llama", tmp_path)
    names = {name.split("self_attn.")[1] for name in MatrixObjective(pair, OrientRecipe(**STAGE)).parameters()}
    assert names == {
        "b_proj.weight", "c_proj.weight", "decay_proj.weight", "decay_proj.bias",
        "b_conv.weight", "b_conv.bias", "c_conv.weight", "c_conv.bias", "d",
    }  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_has_a_part(family, tmp_path):
    pair = tiny_pair(family, tmp_path, student={"keep": {"layers": (1,), "heads": ((0, 1), (0, 2))}})
    parts = part_of_parameters(pair.student, pair.spec)
    by_part: dict[str, list[str]] = {}
    for name, part in parts.items():
        by_part.setdefault(part, []).append(name)
    assert set(by_part) == {"mixer", "attention", "norm", "mlp", "embedding"} | (
        set() if family == "llama" else {"head"}
    )
    assert all(".mlp." in name for name in by_part["mlp"])
    attention = ("model.layers.1.self_attn.", "model.layers.0.self_attn.attention.")
    assert all(name.startswith(attention) for name in by_part["attention"])
    assert "model.norm.weight" in by_part["norm"]


@pytest.mark.parametrize("name", ["orient", "orient-values", "align-block", "align-mixer", "distill"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_stage_lowers_its_loss(family, name, tmp_path):
    pair = tiny_pair(family, tmp_path)
    stage = stages(pair)[name]
    engine = LocalEngine(stage.models.student, stage.parameters(), OptimizerRecipe(), "fp32", CPU)
    losses = []
    for _ in range(20):
        losses.append(stage.run(packed(), Runner(engine.backward))["loss"].item())
        engine.step(3e-3)
    assert losses[-1] < 0.95 * losses[0]


def test_micro_batches_add_up_to_the_batch(tmp_path):
    pair = tiny_pair("llama", tmp_path)
    batch = packed(batch=4)
    for stage in stages(pair).values():
        gradients = []
        for micro in (4, 1):
            engine = LocalEngine(stage.models.student, stage.parameters(), OptimizerRecipe(), "fp32", CPU)
            engine.adamw.zero_grad()
            for first in range(0, 4, micro):
                part = type(batch)(*(t[first : first + micro] for t in batch))
                stage.run(part, Runner(lambda loss, e=engine, share=micro / 4: e.backward(loss * share)))
            gradients.append({n: p.grad.clone() for n, p in stage.parameters().items()})
            engine.adamw.zero_grad()
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-3, atol=1e-4, msg=name)


def test_activation_checkpointing_changes_nothing(tmp_path):
    pair = tiny_pair("llama", tmp_path)
    for name in ("align-block", "distill"):
        gradients = []
        for checkpointing in (False, True):
            if checkpointing:
                checkpoint_activations(pair.student, pair.spec.layers)
            else:
                pair.student.gradient_checkpointing_disable()
            pair.student.zero_grad()
            stage = stages(pair)[name]
            stage.run(packed(), Runner(torch.Tensor.backward))
            gradients.append({n: p.grad.clone() for n, p in stage.parameters().items()})
        assert all(torch.equal(gradients[0][n], gradients[1][n]) for n in gradients[0])


def test_bf16_runs_on_float32_master_weights(tmp_path):
    pair = tiny_pair("llama", tmp_path)
    pair.teacher.to(torch.bfloat16)
    for stage in stages(pair).values():
        engine = LocalEngine(stage.models.student, stage.parameters(), OptimizerRecipe(), "bf16", CPU)
        with engine.autocast():
            metrics = stage.run(packed(), Runner(engine.backward))
        assert torch.isfinite(metrics["loss"])
        assert engine.step(1e-3) > 0
        assert all(p.dtype == torch.float32 for p in stage.parameters().values())


def test_engine_state_continues_bit_for_bit(tmp_path):
    results = []
    for interrupted in (False, True):
        pair = tiny_pair("llama", tmp_path / str(interrupted))
        stage = stages(pair)["distill"]
        engine = LocalEngine(stage.models.student, stage.parameters(), OptimizerRecipe(), "fp32", CPU)
        for step in range(6):
            if interrupted and step == 3:
                saved = {name: tensor.clone() for name, tensor in engine.state().items()}
                engine = LocalEngine(stage.models.student, stage.parameters(), OptimizerRecipe(), "fp32", CPU)
                engine.load_state(saved)
            stage.run(packed(), Runner(engine.backward))
            engine.step(1e-2)
        results.append({n: p.detach().clone() for n, p in pair.student.named_parameters()})
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_engine_refuses_foreign_state(tmp_path):
    stage = stages(tiny_pair("llama", tmp_path))["orient"]
    engine = LocalEngine(stage.models.student, stage.parameters(), OptimizerRecipe(), "fp32", CPU)
    with pytest.raises(CheckpointError, match="which this stage does not train"):
        engine.load_state({"exp_avg/model.norm.weight": torch.zeros(32)})


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(tmp_path):
    stage = stages(tiny_pair("llama", tmp_path))["orient"]
    engine = LocalEngine(stage.models.student, stage.parameters(), OptimizerRecipe(), "fp32", CPU)
    stage.run(packed(), Runner(engine.backward))
    before = {n: p.detach().clone() for n, p in stage.parameters().items()}
    next(iter(stage.parameters().values())).grad.view(-1)[0] = float("nan")
    norm = engine.step(1e-3)
    with pytest.raises(NumericsError, match="the gradient norm is nan"):
        require_finite({"the gradient norm": norm}, "step 1", {}, [])
    assert all(torch.equal(p, before[n]) for n, p in stage.parameters().items())


def test_a_parameter_without_gradient_is_named():
    layer = torch.nn.Linear(3, 2)
    engine = LocalEngine(layer, dict(layer.named_parameters()), OptimizerRecipe(), "fp32", CPU)
    layer.weight.grad, layer.bias.grad = torch.zeros(2, 3), torch.ones(2)
    with pytest.raises(NumericsError, match=r"^weight has no gradient at step 1"):
        require_gradients(engine, ["bias", "weight"], World(), "step 1")


def test_schedule():
    schedule = ScheduleRecipe(warmup=0.1, decay=0.2, floor=1e-8)
    rates = [learning_rate(step, 100, 1.0, schedule) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == 1.0
    assert rates[10:80] == [1.0] * 70
    assert rates[80] < 1.0
    assert all(earlier > later for earlier, later in pairwise(rates[79:]))
    assert rates[99] == pytest.approx(1e-8 + (1 - 1e-8) / 21)
    assert [learning_rate(step, 1, 1.0, ScheduleRecipe()) for step in range(1)] == [1.0]
