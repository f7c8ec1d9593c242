"""The shape of the repository: who may import whom, who may write files, and what is never called.

The sources are read as syntax trees, not imported; one test starts a fresh Python to see what the light modules load.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "mohawkify"
LONGEST_FILE = 500
MOST_FILES_ON_TOP = 8

# A module imports only from lines above its own; names are relative to the package, the longest one that fits counts,
# and a package's modules may import each other. Two names on a line do not know each other.
RANKS = (
    ("errors", "text_tables"),
    ("files",),
    ("recipe",),
    ("demo",),
    ("distributed",),
    ("ops",),
    ("families",),
    ("mixers",),
    ("teacher",),
    ("data",),
    ("student",),
    ("run",),
    ("objectives",),
    ("train.engines",),
    ("planning",),
    ("evaluation",),
    ("adapters", "auto"),
    ("train",),
    ("analysis",),
    ("exporters",),
    ("serving",),
    ("api",),
    ("doctor",),
    ("bench",),
    ("cli",),
    ("__main__",),
)

# Who may import a package that is optional, or that only one corner of the code should know.
FENCES = {
    "triton": "ops/triton_*",
    "fla": "ops/libraries.py",
    "mamba_ssm": "ops/libraries.py",
    **dict.fromkeys(("mlx", "mlx_lm"), "*/mlx*"),
    **dict.fromkeys(("fastapi", "starlette", "uvicorn"), "serving/openai_server.py"),
    "lm_eval": "evaluation/harness*",
    "gguf": "teacher/gguf*",
    "click": "cli/*",
    "accelerate": "train/*",
    "deepspeed": "train/*",
}

# Functions outside files/atomic.py that write files themselves. Those of the first lines get a temporary folder from
# atomic.atomic_directory; the lock's file is never renamed; the last is save_pretrained, which belongs to no run.
WRITERS = {
    *("run/checkpoint.py:save_tensors", "data/write_corpus.py:_write_shard", "data/write_corpus.py:_link_shards"),
    *("student/save.py:save_student", "student/save.py:_write_code", "student/save.py:save_tokenizer"),
    *("exporters/export.py:export_run", "exporters/mlx.py:write_mlx", "data/teacher_logits.py:_write_records"),
    "exporters/card_facts.py:carry_licence",
    "exporters/llamba.py:write_llamba",
    "exporters/granite_hybrid.py:write_mamba2",
    "evaluation/harness_tasks.py:load_tasks",  # a folder for what datasets makes of rows, gone when they are in memory
    "teacher/gguf.py:_write",
    *("files/lock.py:_take_lock", "files/lock.py:_lock_file"),
    "student/save.py:_saving_code",
}
WRITING_METHODS = {
    *("write_text", "write_bytes", "touch", "mkdir", "rmdir", "rename", "unlink", "symlink_to", "hardlink_to", "chmod"),
    *("save_file", "save_pretrained", "save_torch_state_dict", "to_json_file", "tofile"),
    *("save_model", "save_config", "save_safetensors", "save_weights", "save_gguf"),
}
WRITING_CALLS = {
    *("json.dump", "numpy.save", "numpy.savez", "numpy.savez_compressed", "numpy.savetxt", "logging.FileHandler"),
    *(f"os.{name}" for name in ("open", "rename", "renames", "replace", "remove", "unlink", "mkdir", "makedirs")),
    *(f"os.{name}" for name in ("rmdir", "removedirs", "link", "symlink", "truncate", "ftruncate", "chmod", "pwrite")),
    *(f"os.{name}" for name in ("write", "writev", "pwritev", "sendfile", "copy_file_range", "mkfifo", "utime")),
    *(f"shutil.{name}" for name in ("copy", "copy2", "copyfile", "copytree", "move", "rmtree", "make_archive")),
    *("shutil.copyfileobj", "shutil.unpack_archive", "tempfile.TemporaryFile", "tempfile.SpooledTemporaryFile"),
    *(f"tempfile.{name}" for name in ("mkstemp", "mkdtemp", "NamedTemporaryFile", "TemporaryDirectory")),
}
# What writes if its mode says so: the mode's place among the arguments, and whether it writes without one.
MODES = {
    **dict.fromkeys(("open", "io.open", "os.fdopen", "io.FileIO", "gzip.open", "zipfile.ZipFile"), (1, False)),
    "numpy.memmap": (2, True),
}

LIGHT_MODULES = (
    *("errors", "teacher.teacher_spec", "student.student_spec", "families.adapter", "families.registry"),
    *(
        "recipe.strict_yaml",
        "recipe.schema",
        "files.atomic",
        "run.checkpoint",
        "run.folder",
        "planning.planner",
        "cli.main",
    ),
)
HEAVY_MODULES = ("torch", "transformers", "datasets", "lm_eval", "mlx")


@cache
def source_files() -> dict[str, Path]:
    """Every module of the installed package by its dotted name; `adapters/` and `recipes/` lie beside it."""
    files = {}
    for folder, package in ((PACKAGE, PACKAGE), ("adapters", f"{PACKAGE}.adapters"), ("recipes", f"{PACKAGE}.recipes")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            files[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return files


def shown(path: Path) -> str:
    """A path as messages and the tables above write it: relative to the package, or to the repository."""
    return path.relative_to(ROOT / PACKAGE if (ROOT / PACKAGE) in path.parents else ROOT).as_posix()


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def running_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes below one but those that only the type checker sees."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for other in child.orelse:
                yield other
                yield from running_nodes(other)
            continue
        yield child
        yield from running_nodes(child)


def imports_of(module: str, path: Path) -> list[tuple[str, int]]:
    """What a module imports at any depth, as (dotted name, line); a name that is a module counts as that module."""
    found = []
    for node in running_nodes(tree_of(path)):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
                base = ".".join(package[: len(package) - node.level + 1] + ([base] if base else []))
            for alias in node.names:
                full = f"{base}.{alias.name}"
                found.append((full if full in source_files() else base, node.lineno))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                found.append((first.value, node.lineno))
    return found


def rank_entry(module: str) -> str | None:
    """The name in `RANKS` that stands for a module."""
    name = module.removeprefix(f"{PACKAGE}.")
    entries = [entry for line in RANKS for entry in line if name == entry or name.startswith(f"{entry}.")]
    return max(entries, key=len, default=None)


def rank(entry: str) -> int:
    return next(number for number, line in enumerate(RANKS) if entry in line)


def own_imports() -> Iterator[tuple[str, str, str]]:
    """(module, imported module, place) for every import of one module of the package by another."""
    for module, path in source_files().items():
        for name, line in imports_of(module, path):
            if name in source_files() and PACKAGE not in (name, module):  # its own `__getattr__` imports the API late
                yield module, name, f"{shown(path)}:{line}"


def dotted_names(tree: ast.Module) -> dict[str, str]:
    """What the imported names of a file stand for: `np` for numpy, `load` for torch.load."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.split(".")[0]
                names |= {alias.asname: alias.name} if alias.asname else {top: top}
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def called_name(call: ast.Call, names: dict[str, str]) -> str:
    """The dotted name that is called, aliases resolved: `torch.load`, `path.open`."""
    text = ast.unparse(call.func)
    head, dot, rest = text.partition(".")
    return f"{names.get(head, head)}{dot}{rest}"


def writes(call: ast.Call, names: dict[str, str]) -> bool:
    """Whether a call creates, changes or removes files by itself."""
    name = called_name(call, names)
    last = name.rpartition(".")[2]
    if name.startswith(f"{PACKAGE}."):  # a function of ours is judged where it is defined
        return False
    if name in WRITING_CALLS:
        return True
    if name in MODES or (last == "open" and isinstance(call.func, ast.Attribute)):
        position, writes_without = MODES.get(name, (0, False))
        modes = [keyword.value for keyword in call.keywords if keyword.arg == "mode"] or call.args[position:][:1]
        written = (not isinstance(mode, ast.Constant) or set(str(mode.value)) & set("wax+") for mode in modes)
        return any(written) if modes else writes_without
    if last == "replace" and isinstance(call.func, ast.Attribute):  # of a path: that of a string takes two
        return len(call.args) == 1 and not call.keywords
    return last in WRITING_METHODS


def writers(tree: ast.Module) -> dict[str, int]:
    """The functions and classes of a file that write, each with a line where they do."""
    names = dotted_names(tree)
    found = {}
    for node in tree.body:
        for child in ast.walk(node):
            if isinstance(child, ast.Call) and writes(child, names):
                found[getattr(node, "name", "<module>")] = child.lineno
    return found


def assert_none(wrong: Iterable[str], advice: str = "") -> None:
    """Fail with one finding per line, which pytest would shorten."""
    lines = sorted(wrong)
    assert not lines, "\n".join([advice, *lines])


def test_every_module_has_a_rank() -> None:
    empty = {PACKAGE, f"{PACKAGE}.recipes"}  # a docstring each
    without = {module for module in source_files() if rank_entry(module) is None}
    assert_none(without - empty, "say in RANKS who may import the new module")


def test_every_rank_has_a_module() -> None:
    used = {rank_entry(module) for module in source_files()}
    assert_none({entry for line in RANKS for entry in line} - used)


def test_modules_import_lower_ranks_only() -> None:
    wrong = []
    for module, imported, place in own_imports():
        ours, theirs = rank_entry(module), rank_entry(imported)
        if ours is None or theirs is None or (ours != theirs and rank(theirs) >= rank(ours)):
            wrong.append(f"{place}: {module} imports {imported}")
    assert_none(wrong)


def test_imports_have_no_cycles() -> None:
    graph: dict[str, set[str]] = {}
    for module, imported, _ in own_imports():
        graph.setdefault(module, set()).add(imported)
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the cycle


def test_nobody_imports_an_adapter_by_name() -> None:
    wrong = [place for _, imported, place in own_imports() if imported.startswith(f"{PACKAGE}.adapters.")]
    assert_none(wrong, "registry.load_adapter finds adapters by listing")


@pytest.mark.parametrize(("package", "pattern"), FENCES.items())
def test_fences(package: str, pattern: str) -> None:
    wrong = [
        f"{shown(path)}:{line}"
        for module, path in source_files().items()
        for name, line in imports_of(module, path)
        if name.split(".")[0] == package and not fnmatch(shown(path), pattern)
    ]
    assert_none(wrong, f"only {pattern} may import {package}")


def test_no_file_is_long() -> None:
    paths = [*source_files().values(), *sorted((ROOT / "tests").rglob("*.py"))]
    lengths = {path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines()) for path in paths}
    assert {name: length for name, length in lengths.items() if length > LONGEST_FILE} == {}


def test_few_files_lie_on_top() -> None:
    assert len([path for path in (ROOT / PACKAGE).iterdir() if path.suffix == ".py"]) <= MOST_FILES_ON_TOP


def test_every_module_has_a_name_of_its_own() -> None:
    stems = [path.stem for path in (ROOT / PACKAGE).rglob("*.py") if path.name != "__init__.py"]
    assert_none({stem for stem in stems if stems.count(stem) > 1})


def test_packages_are_the_folders() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    inside = {path.parent.relative_to(ROOT).as_posix() for path in (ROOT / PACKAGE).rglob("__init__.py")}
    beside = {f"{PACKAGE}.{folder}": folder for folder in ("adapters", "recipes")}
    assert settings["packages"] == sorted({name.replace("/", ".") for name in inside} | beside.keys())
    assert settings["package-dir"] == beside
    folders = {path.parent.relative_to(ROOT).as_posix() for path in (ROOT / PACKAGE).rglob("*.py")}
    assert folders == inside, "a folder with modules needs an __init__.py"


def test_files_are_written_by_storage_alone() -> None:
    found = {
        f"{shown(path)}:{function}": line
        for path in source_files().values()
        if shown(path) != "files/atomic.py"
        for function, line in writers(tree_of(path)).items()
    }
    assert_none(f"{place} in line {line}" for place, line in found.items() if place not in WRITERS)
    assert_none(WRITERS - found.keys(), "no longer writes: take it out of WRITERS")


@pytest.mark.parametrize(
    "text",
    [
        "open(p, 'w')",
        "open(p, mode='ab')",
        "open(p, mode)",
        "p.open('r+b')",
        "import os\nos.write(1, b'')",
        "from os import fdopen\nfdopen(f, 'wb')",
        "import numpy as np\nnp.memmap(p, dtype='u1', mode='w+', shape=3)",
        "import numpy as np\nnp.memmap(p)",
        "p.write_text(t)",
        "p.replace(q)",
        "import os\nos.replace(p, q)",
        "from os import remove\nremove(p)",
        "import numpy as np\nnp.save(p, x)",
        "from safetensors.torch import save_file\nsave_file(x, p)",
        "model.save_pretrained(p)",
        "class A:\n    def f(self):\n        import shutil\n        shutil.rmtree(p)",
    ],
)
def test_the_search_finds_what_writes(text: str) -> None:
    assert writers(ast.parse(text))


def test_the_search_leaves_reading_alone() -> None:
    text = "open(p)\np.open('rb')\nname.replace('a', 'b')\nreplace(x, y=1)\np.read_text()\n"
    text += "import os, numpy\nos.fdopen(f)\nos.fdopen(f, 'rb')\nnumpy.memmap(p, mode='r')\n"
    assert writers(ast.parse(f"from mohawkify.files import atomic\natomic.write_text(p, t)\n{text}")) == {}


def test_light_modules_load_nothing_heavy() -> None:
    code = f"""
import importlib, sys
for name in {LIGHT_MODULES!r}:
    importlib.import_module("{PACKAGE}." + name)
    heavy = [package for package in {HEAVY_MODULES!r} if package in sys.modules]
    if heavy:
        sys.exit(f"{{name}} loads {{', '.join(heavy)}}")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


MOST_ARGUMENTS = 6
# Functions with more: mathematics of operators, forward passes of autograd, kernels and commands, which have a
# parameter for every tensor or option.
MANY_ARGUMENTS = {
    *("cli/*:*", "ops/*:*", "mixers/*:__init__"),
    # The second is the interface of transformers; the first's tensors are told apart by their keywords.
    *("run/checkpoint.py:save_checkpoint", "teacher/capture.py:capturing_attention"),
}


def test_functions_take_few_arguments() -> None:
    wrong = []
    for path in source_files().values():
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                names = [argument.arg for argument in arguments if argument.arg not in ("self", "cls")]
                place = f"{shown(path)}:{node.name}"
                if len(names) > MOST_ARGUMENTS and not any(fnmatch(place, pattern) for pattern in MANY_ARGUMENTS):
                    wrong.append(f"{place} takes {len(names)} arguments")
    assert_none(wrong, f"expected at most {MOST_ARGUMENTS}: pass a small frozen dataclass")
