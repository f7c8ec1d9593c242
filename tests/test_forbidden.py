"""What the package never does, however it is written: run code that a file holds, or unpickle it; and its versions.

The sources are read as syntax trees. What is named counts, not only what is called: an alias is a name too.
"""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch

import pytest

from tests.test_structure import ROOT, assert_none, dotted_names, shown, source_files, tree_of

FORBIDDEN_MODULES = {
    *("pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "runpy", "code", "pty"),
    *("torch.serialization", "torch.package", "torch.hub", "torch.jit", "torch.distributed.checkpoint"),
}
FORBIDDEN_NAMES = {
    *("eval", "exec", "compile", "__import__", "torch.load", "torch.save"),
    *("os.system", "os.popen", "os.exec*", "os.spawn*", "os.posix_spawn*", "os.fork*"),
    *("subprocess.getoutput", "subprocess.getstatusoutput"),
    *("yaml.load", "yaml.load_all", "yaml.full_load*", "yaml.unsafe_load*", "yaml.Loader", "yaml.UnsafeLoader"),
    *("*.extractall", "*.unpack_archive", "*.read_pickle", "*.to_pickle", "*.load_state_dict_from_url"),
    # torch's collectives of objects pickle them.
    *("*.*_gather_object", "*.gather_object", "*.broadcast_object_list", "*.scatter_object_list"),
    *("*.send_object_list", "*.recv_object_list"),
}
FORBIDDEN_TRUE = {"shell", "trust_remote_code", "allow_pickle"}
# What is safe in a named place only, where every argument is looked at.
PLACES = {
    "*.from_pretrained": {
        "teacher/tokenizer.py",
        "teacher/load.py",
        "student/save.py",
        "exporters/granite_hybrid.py",  # the folder that was just written
    },
    "transformers.Auto*": {"teacher/tokenizer.py", "student/save.py"},
    "importlib.import_module": {
        "families/registry.py",
        "exporters/mlx_model.py",
        "bench/peers.py",
    },  # names that were looked up
    "multiprocessing*": {"data/tokenize_workers.py"},  # pickles what processes of one command hand each other
    "concurrent.futures.Process*": {"data/tokenize_workers.py"},
    "concurrent.futures.process*": {"data/tokenize_workers.py"},
}


def module_names(node: ast.AST) -> Iterator[str]:
    """The modules that a node imports, by statement or by call."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and not node.level:
        yield node.module or ""
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
        yield from (each.value for each in node.args[:1] if isinstance(each, ast.Constant))


def mentioned(node: ast.AST, names: dict[str, str]) -> Iterator[str]:
    """The dotted names that a node stands for, aliases resolved: `torch.load`; by `getattr` too."""
    text = ""
    if isinstance(node, ast.Name | ast.Attribute):
        text = ast.unparse(node)
    elif (
        isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "builtins.getattr") and len(node.args) > 1
    ):
        name = node.args[1]
        text = f"{ast.unparse(node.args[0])}.{name.value}" if isinstance(name, ast.Constant) else ""
    if text:
        head, dot, rest = text.partition(".")
        yield f"{names.get(head, head)}{dot}{rest}".removeprefix("builtins.").removeprefix("__builtins__.")


def forbidden(tree: ast.Module, place: str = "") -> list[tuple[str, int]]:
    """What a file names or switches on that it must not, as (name, line)."""
    names = dotted_names(tree)
    allowed = {pattern for pattern, places in PLACES.items() if place in places}
    patterns = [pattern for pattern in (*FORBIDDEN_NAMES, *PLACES) if pattern not in allowed]
    found = []
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        for module in module_names(node):
            if any(module == each or module.startswith(f"{each}.") for each in FORBIDDEN_MODULES):
                found.append((module, line))
        for name in (*mentioned(node, names), *module_names(node)):
            found += [(name, line) for pattern in patterns if fnmatch(name, pattern)]
        for key, value in switches(node):
            if key in FORBIDDEN_TRUE and (not isinstance(value, ast.Constant) or value.value):
                found.append((f"{key}={ast.unparse(value)}", value.lineno))
    return found


def switches(node: ast.AST) -> Iterator[tuple[object, ast.expr]]:
    """The keywords of a call, or the entries of a dictionary that may become some."""
    if isinstance(node, ast.Call):
        yield from ((keyword.arg, keyword.value) for keyword in node.keywords)
    elif isinstance(node, ast.Dict):
        yield from ((getattr(key, "value", None), value) for key, value in zip(node.keys, node.values, strict=True))


def test_nothing_forbidden_is_named() -> None:
    assert_none(
        f"{shown(path)}:{line}: {name}"
        for path in source_files().values()
        for name, line in forbidden(tree_of(path), shown(path))
    )


def test_the_named_places_are_used() -> None:
    by_place = {shown(path): tree_of(path) for path in source_files().values()}
    unused = []
    for pattern, places in PLACES.items():
        for place in places:
            used = {name for name, _ in forbidden(by_place[place])}
            if not any(fnmatch(name, pattern) for name in used):
                unused.append(f"{pattern} in {place}")
    assert_none(unused, "take these out of PLACES")


@pytest.mark.parametrize(
    "text",
    [
        "torch.load(f)",
        "from torch import load as get\nget(f)",
        "import torch as t\nt.save(x, f)",
        "read = torch.load",
        "getattr(torch, 'load')(f)",
        "torch.serialization.load(f)\nimport torch.serialization",
        "from torch import serialization",
        "import torch.jit",
        "from torch.jit import load",
        "import pickle",
        "from pickle import loads",
        "import importlib\nimportlib.import_module('pickle')",
        "import importlib\nimportlib.import_module(name)",
        "from importlib import import_module as get\nget(name)",
        "__import__('pickle')",
        "eval('1')",
        "run = exec",
        "import builtins\nbuiltins.exec(text)",
        "getattr(builtins, 'eval')",
        "compile(text, 'x', 'exec')",
        "import runpy",
        "import os\nos.execv(path, [])",
        "from os import spawnlp\nspawnlp(0, 'x')",
        "import os\nos.fork()",
        "import subprocess\nsubprocess.getoutput('x')",
        "import pandas as pd\npd.read_pickle(f)",
        "frame.to_pickle(f)",
        "import shutil\nshutil.unpack_archive(f)",
        "archive.extractall(folder)",
        "torch.distributed.all_gather_object(found, x)",
        "import torch.distributed as dist\ndist.broadcast_object_list(found)",
        "torch.distributed.gather_object(x)",
        "import torch.distributed.checkpoint",
        "import multiprocessing",
        "from concurrent.futures import ProcessPoolExecutor",
        "yaml.load(text, Loader=yaml.SafeLoader)",
        "yaml.unsafe_load_all(text)",
        "subprocess.run(text, shell=True)",
        "Model.from_pretrained(x)",
        "from transformers import AutoTokenizer",
        "Model.from_pretrained(x, trust_remote_code=True)",
        "Model.from_pretrained(x, trust_remote_code=flag)",
        "Model.from_pretrained(x, **{'trust_remote_code': True})",
    ],
)
def test_the_search_finds_what_is_forbidden(text: str) -> None:
    assert forbidden(ast.parse(text))


@pytest.mark.parametrize("place", ["teacher/load.py", "data/tokenize_workers.py"])
def test_a_named_place_may_do_only_what_it_is_named_for(place: str) -> None:
    text = "Model.from_pretrained(x, trust_remote_code=False)\nimport multiprocessing\n"
    assert len(forbidden(ast.parse(text), place)) == 1
    assert forbidden(ast.parse("Model.from_pretrained(x, trust_remote_code=True)"), "teacher/load.py")


def test_the_search_leaves_the_rest_alone() -> None:
    text = "model.eval()\nyaml.safe_load(t)\ntorch.loads(x)\nre.compile('x')\ntorch.compile(m)\nself.exec(x)\n"
    assert forbidden(ast.parse(text)) == []


def test_the_versions_of_the_page_are_those_that_are_installed() -> None:
    page = (ROOT / "SECURITY.md").read_text(encoding="utf-8").partition("## Versions")[2]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    floors = dict(re.match(r"([\w.-]+)(?:\[.*\])?\s*(?:>=([\d.]+))?", line).groups() for line in lines)
    rows = re.findall(r"^\| ([\w-]+) \| ([\d.]+) \|", page, re.MULTILINE)
    assert rows
    by_name = {name.lower(): floor for name, floor in floors.items() if floor}
    assert {name: by_name.get(name.lower()) for name, _ in rows} == dict(rows)
