"""The seam: a mixer from outside, in one registered file, is planned, converted, saved, loaded and run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import mohawkify
from mohawkify.errors import ExportError, RecipeError
from mohawkify.mixers.kinds import mixers_of
from mohawkify.mixers.mixer import mixer_class, register_mixer
from mohawkify.recipe.schema import StudentRecipe
from mohawkify.student.layer_spec import LayerSpec
from mohawkify.student.save import load_student
from mohawkify.train.conversion import ConvertOptions
from tests.close import assert_close
from tests.commands import make_recipe, make_teacher
from tests.conftest import ROOT
from tests.finished import WITHOUT_MOHAWKIFY, answer, run_python
from tests.mixers.average import Average
from tests.test_structure import assert_none, own_imports
from tests.tiny import tiny_pair

NO_MATRIX = "stages.orient.tokens=0"
AVERAGE = ("student.mixer=average", "student.state_size=64", NO_MATRIX)
LOAD_ALONE = f"""{WITHOUT_MOHAWKIFY}
import json, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.float32)
ids = torch.tensor(json.loads(sys.argv[2]))
with torch.no_grad():
    logits = model(ids).logits.double().tolist()
print(json.dumps({{"logits": logits, "text": model.generate(ids, max_new_tokens=6, do_sample=False).tolist()}}))
"""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_recipe(tmp_path_factory.mktemp("recipe")))


def test_a_mixer_from_outside_is_converted_saved_loaded_and_run(teacher: Path, recipe: str, tmp_path: Path) -> None:
    planned = mohawkify.plan(str(teacher), recipe, [*AVERAGE, "student.keep.layers=[1]"])
    assert planned["student"]["state_elements"] == 2 * 32
    assert LayerSpec(**planned["student"]["layer_specs"][0]) == LayerSpec("average", 4, 0)
    options = ConvertOptions(output=tmp_path / "run")
    run = mohawkify.convert(str(teacher), recipe, [*AVERAGE, "student.keep.layers=[1]"], options)
    assert list(json.loads((tmp_path / "run" / "results.json").read_text())["stages"]) == ["init", "align", "distill"]
    mohawkify.export(run, "hf", tmp_path / "out", dtype="float32")
    assert "running-average" in (tmp_path / "out" / "README.md").read_text()
    assert not (tmp_path / "out" / "mamba2.py").exists()

    student: Any = load_student(tmp_path / "out")
    assert [type(mixer) for mixer in mixers_of(student).values()] == [Average, Average]
    ids = torch.randint(3, 250, (1, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = student(ids).logits
        memory, parts = None, []
        for t in range(9):
            output = student(ids[:, t : t + 1], past_key_values=memory, use_cache=True)
            memory, parts = output.past_key_values, [*parts, output.logits]
        text = student.generate(ids, max_new_tokens=6, do_sample=False).tolist()
    assert_close("token by token", torch.cat(parts, dim=1), whole)
    alone = answer(run_python(LOAD_ALONE, tmp_path, str(tmp_path / "out"), json.dumps(ids.tolist())))
    assert torch.equal(torch.tensor(alone["logits"], dtype=torch.float64), whole.double())
    assert alone["text"] == text


def test_only_the_folder_of_mixers_imports_a_kind() -> None:
    kind, folder = "mohawkify.mixers.mamba2", "mohawkify.mixers."
    assert_none(place for module, name, place in own_imports() if name == kind and not module.startswith(folder))


def test_the_page_shows_the_mixer() -> None:
    assert (ROOT / "tests/mixers/average.py").read_text() in (ROOT / "docs/mixers.md").read_text()


def test_stage_1_of_a_mixer_without_a_matrix_is_refused(teacher: Path, recipe: str) -> None:
    with pytest.raises(RecipeError, match=r"stages\.orient\.tokens: found 128, expected 0: the mixer average has no"):
        mohawkify.plan(str(teacher), recipe, [*AVERAGE[:2]])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("student.mixer=mambo2", "found a mixer of the kind 'mambo2', expected one of .*mamba2.*did you mean mamba2"),
        ("student.mixer=attention", "found a mixer of the kind 'attention'"),
        ("student.gated_norm=true", "student.gated_norm: found True, but running-average has no such option"),
        ("student.state_size=8", "student.state_size: found 8, but running-average has no such option"),
    ],
)
def test_what_a_mixer_does_not_have_is_refused(teacher: Path, recipe: str, setting: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        mohawkify.plan(str(teacher), recipe, [*AVERAGE, setting])


def test_a_start_that_a_mixer_does_not_have_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Average, "starts", {"identity": Average.starts["identity"]})
    student = {"mixer": "average", "state_size": StudentRecipe().state_size}
    with pytest.raises(RecipeError, match=r"student\.init: found attention, expected one of identity"):
        tiny_pair("llama", tmp_path / "a", student=student)
    tiny_pair("llama", tmp_path / "b", init="identity", student=student)


def test_an_installed_package_registers_a_mixer(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    from mohawkify.mixers import mixer

    monkeypatch.setattr(mixer, "_KINDS", {})
    entry_point = metadata.EntryPoint("average", "tests.mixers.average:Average", mixer.ENTRY_POINT_GROUP)
    found = metadata.EntryPoints([entry_point])
    monkeypatch.setattr(metadata, "entry_points", lambda **selection: found.select(**selection))
    assert mixer.mixer_kinds() == ["average"]
    assert mixer_class("average") is Average
    with pytest.raises(ValueError, match="expected one of average"):
        mixer_class("mamba2")


def test_an_export_to_mlx_is_refused_without_a_counterpart(tmp_path: Path) -> None:
    pytest.importorskip("mlx_lm", reason="needs mlx-lm: pip install 'mohawkify[mlx]'")
    from mohawkify.exporters.mlx import build_mlx

    student = {"mixer": "average", "state_size": StudentRecipe().state_size}
    made = tiny_pair("llama", tmp_path, student=student).student
    with pytest.raises(ExportError, match="the mixer average has no counterpart in MLX"):
        build_mlx(made.config.to_dict(), made)


def test_a_kind_belongs_to_one_class():
    with pytest.raises(ValueError, match="found a second mixer of the kind 'mamba2'"):
        register_mixer(type("Other", (Average,), {"kind": "mamba2"}))
