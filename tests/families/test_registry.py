"""The shelf: listing, loading by name, and refusing names before anything is imported."""

import importlib
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest

from mohawkify.errors import RecipeError, UnknownFamilyError, nearest
from mohawkify.families import registry
from mohawkify.families.registry import adapter_names, load_adapter
from mohawkify.recipe.bundled import recipe_names, recipe_text
from tests.conftest import ROOT


def test_recipes_are_the_files_of_the_folder() -> None:
    assert recipe_names() == sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
    assert {"demo", "stories", "phi-mamba", "llamba-1b", "llamba-3b", "llamba-8b"} <= set(recipe_names())


def test_adapters_are_the_files_of_the_folder() -> None:
    bundled = sorted(path.stem for path in (ROOT / "adapters").glob("*.py") if path.stem != "__init__")
    assert bundled
    assert [name for name in adapter_names() if name in bundled] == bundled


@pytest.mark.parametrize("name", adapter_names())
def test_every_adapter_loads_under_its_own_name(name: str) -> None:
    assert load_adapter(name).model_type == name


def test_recipe_text_is_the_file() -> None:
    assert recipe_text("demo") == (ROOT / "recipes" / "demo.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["", "nothing", "../recipes/demo", "demo.yaml", "/etc/passwd", "__init__", "Demo"])
def test_unknown_recipe_is_refused(name: str) -> None:
    with pytest.raises(RecipeError, match="expected one of demo, "):
        recipe_text(name)


def recording(function: Callable[[str], ModuleType], names: list[str]) -> Callable[[str], ModuleType]:
    def recorded(name: str) -> ModuleType:
        names.append(name)
        return function(name)

    return recorded


@pytest.mark.parametrize(
    "model_type",
    [
        "",
        "__init__",
        "../os",
        "os.path",
        "llama.evil",
        "adapters/llama",
        "llama\n",
        "LLAMA",
        "mamba9",
        "\ud800",
        "x" * 9999,
    ],
)
def test_unknown_family_is_refused_without_an_import(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    imported = []
    monkeypatch.setattr(registry.importlib, "import_module", recording(importlib.import_module, imported))
    with pytest.raises(UnknownFamilyError) as caught:
        load_adapter(model_type)
    assert set(imported) == {"mohawkify.adapters"}  # to list the folder
    assert f"one of the {len(adapter_names())} that `mohawkify families` lists" in caught.value.message
    assert len(caught.value.message) < 500
    assert len(caught.value.message.splitlines()) == 1


def test_the_nearest_family_is_named() -> None:
    with pytest.raises(UnknownFamilyError, match=r'"lama".*did you mean llama\?'):
        load_adapter("lama")


def register(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    """Lets another package seem to register an adapter."""
    entry_point = metadata.EntryPoint(name=name, value=value, group=registry.ENTRY_POINT_GROUP)
    monkeypatch.setattr(registry.metadata, "entry_points", lambda group: [entry_point])


def test_a_registered_adapter_is_listed_and_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = (
        "from mohawkify.families.adapter import Adapter\nADAPTER = Adapter('starling', 'Starling', (), (), 'A', 'B')\n"
    )
    (tmp_path / "starling_family.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    register(monkeypatch, "starling", "starling_family:ADAPTER")
    assert "starling" in adapter_names()
    assert load_adapter("starling").title == "Starling"


@pytest.mark.parametrize("value", ["no_such_module:ADAPTER", "json:ADAPTER", "json:dumps"])
def test_a_broken_registration_is_told(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, "starling", value)
    with pytest.raises(UnknownFamilyError, match=f'"starling" is registered as {value}'):
        load_adapter("starling")


def test_a_bundled_adapter_comes_before_a_registered_one(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, "llama", "no_such_module:ADAPTER")
    assert load_adapter("llama").title == "Llama"


@pytest.mark.parametrize(
    ("name", "candidates", "guess"),
    [
        ("lamma", ["llama", "qwen2"], "llama"),
        ("gemma", ["llama", "qwen2"], None),
        ("", ["llama"], None),
        ("x", [], None),
    ],
)
def test_nearest(name: str, candidates: list[str], guess: str | None) -> None:
    assert nearest(name, candidates) == guess


def test_recipes_and_shelf_come_without_torch() -> None:
    code = (
        "import sys; from mohawkify.recipe.loading import load_recipe;"
        "from mohawkify.families.registry import load_adapter;"
        "load_recipe('demo'); load_adapter('llama');"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'datasets')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
