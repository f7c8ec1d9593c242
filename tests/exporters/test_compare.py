"""What an export must agree with before it is kept: its run's logits, and the tensors its target and precision name."""

from __future__ import annotations

from dataclasses import replace
from math import nan

import pytest
import torch
from safetensors.torch import load_file, save_file

from mohawkify.errors import ExportError
from mohawkify.exporters import export
from mohawkify.exporters.compare import (
    TIE,
    Agreement,
    compare,
    require_agreement,
    require_same_model,
)
from mohawkify.exporters.contents import Packing, Quantised, Stored, expected_tensors, require_contents
from mohawkify.exporters.export import export_run
from mohawkify.exporters.texts import sample_ids
from mohawkify.mixers.mamba2 import DiscreteMamba2
from tests.finished import finished_run

PRECISE = DiscreteMamba2.precise_parameters
GOOD = Agreement(
    max_logit_difference=0.0,
    scale=8.0,
    kl=0.0,
    top1=1.0,
    near_top1=1.0,
    run_perplexity=9.0,
    perplexity=9.0,
    tokens=640,
)
IDS = torch.randint(0, 16, (2, 40), generator=torch.Generator().manual_seed(0))
LOGITS = torch.randn(40, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run and its student."""
    folder = tmp_path_factory.mktemp("run")
    return folder, finished_run(folder)


def same(ids_bl):
    """A model that says the same of every text."""
    return LOGITS[None]


def test_an_export_that_computes_something_else_is_refused(run):
    _, student = run
    ids = sample_ids(student)
    assert torch.equal(ids, sample_ids(student))
    with torch.no_grad():
        reference = student(ids).logits

    def logits(noise):
        return lambda one: student(one).logits + noise * torch.randn(one.shape[1], 258)

    equal = compare(logits(0.0), logits(0.0), ids)
    assert (equal.max_logit_difference, equal.kl, equal.top1, equal.near_top1) == (0.0, 0.0, 1.0, 1.0)
    assert equal.scale == pytest.approx(reference.abs().max().item(), rel=1e-5)
    require_agreement(equal, "float32", None)
    rounding = compare(logits(0.0), logits(0.01), ids)
    require_agreement(rounding, "bfloat16", None)
    with pytest.raises(ExportError, match="logits differ"):
        require_agreement(rounding, "float32", None)
    with pytest.raises(ExportError, match="nats per token away"):
        require_agreement(compare(logits(0.0), logits(5.0), ids), "bfloat16", 4)


@pytest.mark.parametrize("value", [nan, float("inf"), -float("inf")])
def test_logits_that_are_not_finite_are_refused_on_both_sides(value):
    def broken(ids_bl):
        logits = LOGITS.clone()
        logits[7, 3] = value
        return logits[None]

    with pytest.raises(ExportError, match="the export computes logits that are not finite"):
        compare(same, broken, IDS)
    with pytest.raises(ExportError, match="the run computes logits that are not finite"):
        compare(broken, same, IDS)


def test_a_run_that_computes_no_numbers_is_refused_before_anything_is_written(run, tmp_path, monkeypatch):
    load = export.load_student

    def load_broken(folder, *dtype, **kwargs):
        student = load(folder, *dtype)
        with torch.no_grad():
            student.get_output_embeddings().weight[5] = nan
        return student

    monkeypatch.setattr(export, "load_student", load_broken)
    with pytest.raises(ExportError, match="the run computes logits that are not finite"):
        export_run(run[0], "hf", tmp_path / "out", report=lambda line: None)
    assert list(tmp_path.iterdir()) == []


def test_a_figure_that_is_not_a_number_is_no_agreement():
    for bits in (None, 8, 4):
        require_agreement(GOOD, "bfloat16", bits)
        with pytest.raises(ExportError, match="nats per token"):
            require_agreement(replace(GOOD, kl=nan), "bfloat16", bits)
    with pytest.raises(ExportError, match="no near choice"):
        require_agreement(replace(GOOD, near_top1=nan), "bfloat16", None)
    with pytest.raises(ExportError, match="logits differ"):
        require_agreement(replace(GOOD, max_logit_difference=nan), "float32", None)
    with pytest.raises(ExportError, match="before it is rounded"):
        require_same_model(replace(GOOD, kl=nan))


def with_leads(lead):
    """Logits whose first choice, token 1, leads token 2 by so many nats."""
    logits = torch.full((40, 16), -20.0)
    logits[:, 1], logits[:, 2] = lead, 0.0
    return lambda ids_bl: logits[None]


def test_a_near_choice_is_not_held_against_a_bf16_export():
    near = compare(with_leads(TIE - 0.1), with_leads(-0.1), IDS)
    assert (near.top1, near.near_top1) == (0.0, 1.0)
    far = compare(with_leads(TIE + 0.1), with_leads(-0.1), IDS)
    assert (far.top1, far.near_top1) == (0.0, 0.0)
    require_agreement(replace(GOOD, top1=0.9, near_top1=0.97), "bfloat16", None)
    require_agreement(replace(GOOD, near_top1=0.9), "bfloat16", 8)
    with pytest.raises(ExportError, match=r"no near choice of its run for 3\.10% of the tokens, allowed 3\.0%"):
        require_agreement(replace(GOOD, near_top1=0.969), "bfloat16", None)


def test_perplexities_are_those_of_the_text_behind_the_first_token():
    def flat(ids_bl):
        return torch.zeros(1, 40, 16)

    found = compare(same, flat, IDS)
    losses = [torch.nn.functional.cross_entropy(LOGITS[:-1], ids[1:]) for ids in IDS]
    assert found.run_perplexity == pytest.approx(torch.stack(losses).mean().exp().item())
    assert found.perplexity == pytest.approx(16.0)


SHAPES = {
    "model.embed.weight": (10, 64),
    "model.norm.weight": (64,),
    "model.x_proj.weight": (8, 64),
    "model.narrow.weight": (8, 24),
    "model.decay_proj.weight": (4, 64),
    "model.mixer.d": (4,),
}


def test_what_an_export_must_hold_follows_from_target_and_precision():
    assert expected_tensors(SHAPES, "bfloat16", None, PRECISE) == {
        name: Stored("F32" if name.endswith((".decay_proj.weight", ".d")) else "BF16", shape)
        for name, shape in SHAPES.items()
    }
    packed = {"model.embed": Packing(8, 32), "model.decay_proj": Packing(4, 64)}
    assert expected_tensors(SHAPES, "bfloat16", Quantised(4, packed, ["model.narrow"]), PRECISE) == {
        "model.embed.weight": Stored("U32", (10, 16)),
        "model.embed.scales": Stored("BF16", (10, 2)),
        "model.embed.biases": Stored("BF16", (10, 2)),
        "model.norm.weight": Stored("BF16", (64,)),
        # Nobody said that it was quantised: a 4-bit export that leaves it out is none.
        "model.x_proj.weight": Stored("U32", (8, 8)),
        "model.x_proj.scales": Stored("BF16", (8, 1)),
        "model.x_proj.biases": Stored("BF16", (8, 1)),
        "model.narrow.weight": Stored("BF16", (8, 24)),
        "model.decay_proj.weight": Stored("F32", (4, 64)),
        "model.mixer.d": Stored("F32", (4,)),
    }


TENSORS = {"a.weight": torch.zeros(4, 3, dtype=torch.bfloat16), "a.d": torch.zeros(4)}
EXPECTED = {"a.weight": Stored("BF16", (4, 3)), "a.d": Stored("F32", (4,))}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"a.weight": TENSORS["a.weight"].float()}, "holds a.weight as F32 of 4 x 3, expected BF16 of 4 x 3"),
        ({"a.d": TENSORS["a.d"].bfloat16()}, "holds a.d as BF16 of 4, expected F32 of 4"),
        ({"a.weight": TENSORS["a.weight"].T.contiguous()}, "holds a.weight as BF16 of 3 x 4, expected BF16 of 4 x 3"),
        ({"b": torch.zeros(())}, "holds b as F32 of one number, expected nothing"),
        ({"a.d": None}, "holds a.d as nothing, expected F32 of 4"),
    ],
)
def test_tensors_that_are_not_as_they_should_be_are_refused(tmp_path, change, says):
    save_file(TENSORS, tmp_path / "model.safetensors")
    table = {"BF16": {"tensors": 1, "elements": 12}, "F32": {"tensors": 1, "elements": 4}}
    assert require_contents(tmp_path, EXPECTED) == table
    changed = {name: tensor for name, tensor in {**TENSORS, **change}.items() if tensor is not None}
    save_file(changed, tmp_path / "model.safetensors")
    with pytest.raises(ExportError, match=says):
        require_contents(tmp_path, EXPECTED)


def test_a_damaged_file_of_an_export_is_refused(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:-2])
    with pytest.raises(ExportError, match="is damaged or truncated"):
        require_contents(tmp_path, EXPECTED)


def rewritten(save, change):
    """A function that writes an export, and then changes its tensors."""

    def write(*arguments):
        result = save(*arguments)
        file = next(each for each in arguments if hasattr(each, "joinpath")) / "model.safetensors"
        save_file(change(load_file(file)), file, metadata={"format": "pt"})
        return result

    return write


def test_an_export_of_the_wrong_precision_is_refused_before_it_appears(run, tmp_path, monkeypatch):
    whole = rewritten(export.save_student, lambda tensors: {name: each.float() for name, each in tensors.items()})
    monkeypatch.setattr(export, "save_student", whole)
    with pytest.raises(ExportError, match=r"as F32 of .*, expected BF16") as refusal:
        export_run(run[0], "hf", tmp_path / "out", report=lambda line: None)
    assert refusal.value.exit_code == 73
    assert list(tmp_path.iterdir()) == []


def test_an_mlx_export_that_quantises_nothing_or_too_much_is_refused(tmp_path, monkeypatch):
    pytest.importorskip("mlx_lm", reason="needs mlx-lm: pip install 'mohawkify[mlx]'")
    from mohawkify.exporters import mlx as mlx_target
    from mohawkify.exporters import mlx_model

    finished_run(tmp_path, hidden_size=64, intermediate_size=96, num_attention_heads=8)
    quantise = mlx_target._quantise
    monkeypatch.setattr(mlx_target, "_quantise", lambda model, config, bits: Quantised(bits))
    with pytest.raises(ExportError, match=r"embed_tokens\.biases as nothing, expected BF16"):
        export_run(tmp_path, "mlx-q4", tmp_path / "out", report=lambda line: None)
    monkeypatch.setattr(mlx_target, "_quantise", quantise)
    monkeypatch.setattr(mlx_model.GraftedModel, "quant_predicate", lambda self, path, module: True)
    with pytest.raises(ExportError, match=r"decay_proj\.biases as .*, expected nothing"):
        export_run(tmp_path, "mlx-q4", tmp_path / "out", report=lambda line: None)
    assert not (tmp_path / "out").exists()
