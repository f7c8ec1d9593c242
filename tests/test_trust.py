"""The table of SECURITY.md, proved: strangers' files are read while every file, import and process is written down.

Python reports what it opens; what the Rust of safetensors and tokenizers opens it does not see. That no path leads them
out of a folder is the business of teacher/test_validate.py.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from mohawkify.errors import INPUT, RECIPE, USAGE
from tests.commands import RECIPE as RECIPE_TEXT
from tests.commands import copy_of, make_recipe, make_teacher, run_well
from tests.conftest import ROOT
from tests.teacher.damage import INDEX, WEIGHTS, edit_json

SHORT = ("--set", "stages.align.tokens=0", "--set", "stages.distill.tokens=64", "--set", "stages.orient.tokens=64")
HAS_TASKS = find_spec("lm_eval") is not None
HAS_MLX = find_spec("mlx_lm") is not None
# What a process of Python with these libraries reads whatever it works on.
SYSTEM = (
    "/dev/null",
    "/dev/urandom",
    "/dev/shm",
    "/proc",
    "/sys",
    "/etc/localtime",
    "/usr/share/zoneinfo",
    "/etc/mime.types",
)
SYSTEM += (
    "/etc/os-release",
    "/usr/lib/os-release",
    "/etc/ld.so.cache",
    "/etc/ssl",
    "/usr/lib/ssl",
    "/etc/nsswitch.conf",
)


@dataclass(frozen=True)
class Case:
    """A command on strangers' files.

    Args:
        arguments: of the command line.
        codes: the exit codes that are right.
        says: part of its error, if it ends with one.
    """

    arguments: tuple[str, ...]
    codes: tuple[int, ...] = (0,)
    says: str = ""


def convert(*more: str, teacher: str = "teacher", recipe: str = "tiny.yaml", output: str) -> tuple[str, ...]:
    return ("convert", teacher, "--recipe", recipe, "--output", output, *SHORT, *more)


RECIPES = {
    "object": "name: !!python/object/apply:os.system ['touch CANARY']",
    "name": "name: !!python/name:os.system x",
    "module": "name: !!python/module:os x",
    "function": "name: !function canary.run",
    "include": "name: !include /etc/passwd",
    "alias": "name: &a tiny\ndescription: *a",
    "bomb": "a: &a [x, x, x]\nb: &b [*a, *a, *a]\nc: [*b, *b, *b]",
    "merge": "<<: {name: tiny}",
    "traversal": "student: {name: ../../outside/taken}",
    "absolute": "student: {name: OUTSIDE/taken}",
    "documents": "---\nname: one\n---\nname: two",
    "long": "name: " + "x" * 300_000,
}
# Keys of a checkpoint's state, of results and of a student's configuration, each set to paths that lead out.
RUN_FILES = ("plan.json", "results.json", "student.json")
TEXTS = ("shards", "named")
CASES = {
    "convert": Case(convert(output="converted")),
    "convert an upload with its own tokenizer code": Case(
        convert(teacher="tokenizer-code", output="x1"), (0, INPUT), "no usable tokenizer"
    ),
    "convert a tokenizer that is a processor with code": Case(
        convert(teacher="processor", output="x3"), (INPUT,), "tokenizer_class is 'AutoProcessor'"
    ),
    "prepare with a tokenizer that is a pickled model": Case(
        ("data", "prepare", "pickled-tokenizer", "--recipe", "tiny.yaml", "--output", "x3"),
        (INPUT,),
        "tokenizer_class is 'AutoModelForCausalLM'",
    ),
    "convert a tokenizer of other files": Case(
        convert(teacher="tokenizer-elsewhere", output="x3"), (INPUT,), "special_"
    ),
    "generate with a processor in the student": Case(("generate", "processor-run", "once"), (INPUT,), "AutoProcessor"),
    "export a student with a processor": Case(
        ("export", "processor-run", "--target", "hf", "--output", "x3"), (INPUT,), "AutoProcessor"
    ),
    "generate with settings that call for code": Case(("generate", "settings", "once")),
    "convert only a pickle": Case(convert(teacher="pickle", output="x2"), (INPUT,), "a pickle"),
    "convert an adapter": Case(convert(teacher="adapter", output="x3"), (INPUT,), "adapter_config.json"),
    "convert with a template that attacks": Case(
        convert("--set", "data.train=[{path: rows.jsonl, chat: messages}]", output="x4"), (INPUT,), "chat template"
    ),
    **{
        f"recipe {name}": Case(convert(recipe=f"{name}.yaml", output="x5"), (RECIPE,), f"{name}.yaml")
        for name in RECIPES
    },
    "resume with paths in the manifest": Case(convert(output="manifest"), (0,), ""),
    "eval": Case(("eval", "run")),
    "eval with paths in every file of the run": Case(("eval", "paths"), (0, INPUT)),
    "generate with other code in the student": Case(("generate", "code", "once")),
    "export hf": Case(("export", "code", "--target", "hf", "--output", "export-hf")),
    "generate with an index that leads out": Case(("generate", "index", "once"), (INPUT,), "inside the folder"),
    "generate with a kernel in the student": Case(("generate", "kernel", "once")),
    "export a student with a kernel": Case(("export", "kernel", "--target", "hf", "--output", "export-kernel")),
    "eval text whose shards lie outside": Case(("eval", "shards"), (INPUT,), "does not say what a corpus holds"),
    "show text whose shards lie outside": Case(("data", "inspect", "shards"), (INPUT,), "not say what a corpus holds"),
    "show text that names a model of the Hub": Case(("data", "inspect", "named")),
    "eval a quantised student": Case(("eval", "quantised"), (INPUT,), "quantization_config"),
    "generate with links in the student": Case(("generate", "links", "once"), (INPUT,)),
}
if HAS_MLX:
    CASES["export mlx"] = Case(("export", "code", "--target", "mlx-q8", "--output", "export-mlx"))
    for target in ("mlx", "mlx-q4"):
        arguments = ("export", "kernel", "--target", target, "--output", f"export-kernel-{target}")
        CASES[f"export a student with a kernel to {target}"] = Case(arguments)
if HAS_TASKS:
    TASKS = {
        "function": "found a tag",
        "class": "has the key class",
        "answers": "has the key unsafe_code",
        "script": "dataset_path",
        "pandas": "dataset_path",
        "writing": "has the key generation_kwargs.custom_generate",
        "outside": "outside of",
        "including": "outside of",
        "caching": "has the key dataset_kwargs.cache_dir",
    }
    CASES |= {
        f"task {name}": Case(("eval", "run", "--tasks", f"task-{name}.yaml"), (USAGE,), says)
        for name, says in TASKS.items()
    }
    CASES["task whose text runs code"] = Case(("eval", "run", "--tasks", "task-template.yaml"), (INPUT,), "unsafe")
    CASES["task that is asked"] = Case(("eval", "run", "--tasks", "task-plain.yaml", "--limit", "3"))


@dataclass(frozen=True)
class Outcome:
    """What the process did.

    Args:
        root: the folder of it all; the commands ran in ``work``.
        done: exit code, output and errors by the name of the case.
        events: what was written down, by the name of the case; what came before the first is under "".
    """

    root: Path
    done: dict[str, dict[str, Any]]
    events: dict[str, list[list[str]]]

    def all(self, *kinds: str) -> Iterator[tuple[str, list[str]]]:
        for name, events in self.events.items():
            for event in events:
                if event[0] in kinds:
                    yield name, event


def payload(root: Path) -> str:
    return f"open({str(root / 'CANARY')!r}, 'a').write(__name__)\n"


def plant(folder: Path, root: Path) -> None:
    """Put code beside data, under the names that some loader somewhere would import or unpickle."""
    for name in ("modeling_x", "configuration_x", "tokenization_x", "sitecustomize", "conftest", "__init__", "setup"):
        (folder / f"{name}.py").write_text(payload(root))
    for name in (folder.name, "usercustomize", "torch", "yaml", "canary", "custom_generate/generate", "evil/evil"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / f"{name}.py").write_text(payload(root))
    pickle = f"cos\nsystem\n(S'touch {root / 'CANARY'}'\ntR.".encode()
    for name in ("pytorch_model.bin", "rng_state.pth", "training_args.bin", "optimizer.pt", "scheduler.pt", "x.pkl"):
        (folder / name).write_bytes(pickle)


def make_strangers_teacher(folder: Path, root: Path) -> None:
    """A teacher that is whole, among files and keys that would run code."""
    make_teacher(folder)
    plant(folder, root)
    classes = {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X", "AutoModel": "modeling_x.X"}
    edit_json(
        folder / "config.json",
        auto_map=classes,
        attn_implementation="evil/kernel",
        _attn_implementation="evil/kernel",
        _attn_implementation_internal="evil/kernel",
        _experts_implementation_internal="evil/kernel",
        custom_pipelines={"text-generation": {"impl": "modeling_x.X", "pt": ["AutoModelForCausalLM"]}},
        model_file="modeling_x.py",
        _name_or_path="../../outside",
        tokenizer_class="../tokenization_x.X",
    )
    edit_json(folder / "generation_config.json", custom_generate="evil", _from_model_config=True)
    (folder / "chat_template.jinja").write_text(
        "{{ cycler.__init__.__globals__.os.system('touch " + str(root / "CANARY") + "') }}"
    )
    (folder / "data.py").write_text(payload(root))


def make_processor(folder: Path, root: Path) -> None:
    """Let the tokenizer's class be one that reads a file with code in it, and asks before it runs that."""
    edit_json(folder / "tokenizer_config.json", tokenizer_class="AutoProcessor")
    (folder / "processor_config.json").write_text(json.dumps({"auto_map": {"AutoProcessor": "processing_x.X"}}))
    (folder / "processing_x.py").write_text(payload(root))


def make_data(work: Path) -> None:
    """Rows whose further columns name files, as datasets of images do."""
    paths = {"file_name": "../outside/secret.txt", "image": {"path": "../outside/secret.txt", "bytes": None}}
    talk = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hello yourself."}]
    rows = [{"text": f"The dog {i} ran after the ball {i * i}.", "messages": talk, **paths} for i in range(60)]
    (work / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (work / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: ../outside/*\n---\n")


def make_tasks(work: Path) -> None:
    task = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}},
        "test_split": "test",
        "doc_to_text": "{{text}}",
        "doc_to_target": " x",
        "output_type": "loglikelihood",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    writing = {"output_type": "generate_until", "metric_list": [{**task["metric_list"][0], "metric": "exact_match"}]}
    attack = '{{ cycler.__init__.__globals__.os.system("touch CANARY") }}'
    others: dict[str, dict[str, Any]] = {
        "plain": {},
        "class": {"class": "canary.Run"},
        "answers": {"unsafe_code": True},
        "template": {"doc_to_text": attack},
        "script": {"dataset_path": "./teacher/data.py"},
        "pandas": {"dataset_path": "pandas", "dataset_kwargs": {"data_files": "pickle/pytorch_model.bin"}},
        "writing": {**writing, "generation_kwargs": {"custom_generate": "./custom_generate"}},
        "outside": {"dataset_kwargs": {"data_files": {"test": "../outside/secret.json"}}},
        "including": {"include": "../outside/secret.json"},
        "caching": {"dataset_kwargs": {"data_files": {"test": "rows.jsonl"}, "cache_dir": "../outside/cache"}},
    }
    for name, changes in others.items():
        (work / f"task-{name}.yaml").write_text(json.dumps({"task": name, **task, **changes}))
    (work / "task-function.yaml").write_text("task: function\ndoc_to_text: !function canary.run\n")


def reseal(folder: Path, **more: Any) -> None:
    """Give a folder a manifest that fits its files, as whoever edits a run can."""
    from mohawkify.files import atomic

    facts = json.loads((folder / atomic.MANIFEST_NAME).read_text())["facts"]
    (folder / atomic.MANIFEST_NAME).unlink()
    atomic._write_manifest(folder, {**facts, **more})


def make_strangers_text(work: Path) -> None:
    """Runs whose tokenised text says that it lies elsewhere, or was made for a model that would have to be fetched."""
    for name, changes in (("shards", {"shards": ["../../../../outside"]}), ("named", {"teacher": "someone/model"})):
        for folder in (work / name / "corpora").iterdir():
            if folder.is_dir():
                reseal(folder, **changes)


def make_strangers_runs(work: Path, root: Path) -> None:
    """A finished run, and copies of it that were tampered with by someone who knows the formats."""
    out = "../../../outside/secret.json"
    names = ("paths", "code", "links", "manifest", "index", "kernel", "quantised", "processor-run", "settings")
    for name in (*names, *TEXTS):
        copy_of(work / "run", work / name)
    for name in RUN_FILES:
        file = work / "paths" / name
        edit_json(
            file, name="../../outside/taken", path=out, folder="/etc/passwd", output=str(root / "outside" / "taken")
        )
    edit_json(work / "paths" / "teacher.json", model_type="../../outside/evil", source="../../outside")
    plant(work / "paths", root)

    for file in (work / "code" / "final").glob("*.py"):
        file.write_text(payload(root))
    (work / "code" / "final" / "chat_template.jinja").write_text("{{ x.__class__ }}")
    reseal(work / "code" / "final")

    final = work / "index" / "final"
    tensors = load_file(final / WEIGHTS)
    shutil.move(final / WEIGHTS, root / "outside" / "student.safetensors")
    places = dict.fromkeys(tensors, "../../../outside/student.safetensors")
    (final / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    reseal(final)

    keys = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal", "experts_implementation")
    edit_json(work / "kernel" / "final" / "config.json", **dict.fromkeys(keys, "evil/kernel"))
    (work / "kernel" / "final" / "chat_template.jinja").write_text("{{ messages }}")
    reseal(work / "kernel" / "final")
    edit_json(work / "quantised" / "final" / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    reseal(work / "quantised" / "final")

    make_processor(work / "processor-run" / "final", root)
    reseal(work / "processor-run" / "final")
    final = work / "settings" / "final"
    calls = {"custom_generate": "../outside", "prompt_lookup_num_tokens": 3, "dola_layers": "low", "constraints": [1]}
    edit_json(final / "generation_config.json", **calls, assistant_confidence_threshold=0.4, stop_strings=["a"])
    (final / "custom_generate").mkdir()
    (final / "custom_generate" / "generate.py").write_text(payload(root))
    reseal(final)

    final = work / "links" / "final"
    shutil.move(final / WEIGHTS, root / "outside" / WEIGHTS)
    (final / WEIGHTS).symlink_to(root / "outside" / WEIGHTS)

    make_strangers_text(work)
    shutil.rmtree(work / "manifest" / "final")
    for step in (work / "manifest" / "checkpoints").iterdir():
        edit_json(
            step / "manifest.json", files={out: {"bytes": 2, "sha256": "0" * 64}, str(root / "outside/secret.txt"): {}}
        )
        (step / "rng_state.pth").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    (work / "manifest" / "checkpoints" / "latest").write_text(out)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    root = tmp_path_factory.mktemp("trust")
    work = root / "work"
    for name in ("work", "outside", "home", "tmp", "hub"):
        (root / name).mkdir()
    (root / "outside" / "secret.txt").write_text("a secret")
    (root / "outside" / "secret.json").write_text("{}")
    make_strangers_teacher(work / "teacher", root)
    for name in ("tokenizer-code", "pickle", "adapter", "processor", "pickled-tokenizer", "tokenizer-elsewhere"):
        copy_of(work / "teacher", work / name)
    make_processor(work / "processor", root)
    edit_json(work / "pickled-tokenizer" / "tokenizer_config.json", tokenizer_class="AutoModelForCausalLM")
    secret = {"tokenizer_file": str(root / "outside" / "secret.json"), "vocab_file": "../outside/secret.json"}
    (work / "tokenizer-elsewhere" / "special_tokens_map.json").write_text(json.dumps(secret))
    edit_json(work / "tokenizer-code" / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_x.X", None]})
    (work / "pickle" / WEIGHTS).unlink()
    (work / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "../outside"}))
    make_data(work)
    make_recipe(work)
    file = work / "tiny.yaml"
    file.write_text(file.read_text().replace('"teacher:text.txt"', "rows.jsonl, text: text"))
    for name, text in RECIPES.items():
        text = text.replace("OUTSIDE", str(root / "outside")).replace("CANARY", str(root / "CANARY"))
        kept = [line for line in RECIPE_TEXT.splitlines() if line.partition(":")[0] not in text]
        (work / f"{name}.yaml").write_text("\n".join([*kept, text, ""]))
    make_tasks(work)
    plant(work, root)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        run_well(*convert(output="run"))
    make_strangers_runs(work, root)

    commands, events = root / "commands.json", root / "events.json"
    commands.write_text(json.dumps([case.arguments for case in CASES.values()]))
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith(("PYTEST", "HF_", "XDG"))},
        "HOME": str(root / "home"),
        "TMPDIR": str(root / "tmp"),
        "HF_HOME": str(root / "hub"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    # -P: as with the installed command, the current folder is no place for modules.
    process = subprocess.run(
        [sys.executable, "-P", str(ROOT / "tests" / "audited.py"), str(commands), str(events)],
        cwd=work, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False, timeout=200,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    found = json.loads(events.read_text())
    by_case: dict[str, list[list[str]]] = {"": []}
    names, present = list(CASES), ""
    for event in found["events"]:
        if event[0] == "command":
            present = names[int(event[1])]
            by_case[present] = []
        else:
            by_case[present].append(event)
    return Outcome(root, dict(zip(names, found["done"], strict=True)), by_case)


def assert_none(wrong: list[str]) -> None:
    assert not wrong, "\n".join(sorted(set(wrong)))


@pytest.mark.parametrize("name", CASES)
def test_every_command_ends_as_it_should(outcome: Outcome, name: str) -> None:
    case, done = CASES[name], outcome.done[name]
    assert done["code"] in case.codes, done["err"][-2000:]
    errors = [line for line in done["err"].splitlines() if line.startswith("error: ")]
    assert len(errors) == (1 if done["code"] else 0)
    if errors:
        assert case.says in errors[0]
    assert "Traceback" not in done["err"]


def test_the_ear_hears(outcome: Outcome) -> None:
    """What must be found if anything is: the files that were asked for, the libraries' own code and imports."""
    opened = {path for _, (_, path) in outcome.all("open")}
    for name in ("teacher/config.json", "teacher/tokenizer_config.json", "rows.jsonl", "tiny.yaml", "run/results.json"):
        assert str(outcome.root / "work" / name) in opened
    assert any(path.endswith("metrics.jsonl") for _, (_, path) in outcome.all("write"))
    assert any(event[1] == "mohawkify.train.trainer" for _, event in outcome.all("import"))
    assert any(event[1].endswith("jinja2/sandbox.py") for _, event in outcome.all("exec"))


def test_no_code_of_theirs_has_run(outcome: Outcome) -> None:
    assert not (outcome.root / "CANARY").exists()
    assert not list((outcome.root / "work").rglob("CANARY"))
    assert_none([f"{name}: {event}" for name, event in outcome.all("exec", "compile") if str(outcome.root) in event[1]])
    assert_none([f"{name}: {event}" for name, event in outcome.all("import") if str(outcome.root) in event[2]])
    theirs = {path.stem for path in (outcome.root / "work").rglob("*.py")} - {"torch", "yaml", "__init__", "setup"}
    theirs -= {"cache", "mixer", "grafting", "conv", "scan", "conftest", "generate"}  # names that others have too
    assert_none([f"{name}: {event}" for name, event in outcome.all("import") if event[1] in theirs])


def test_nothing_was_unpickled_and_no_process_started(outcome: Outcome) -> None:
    found = [
        f"{name}: {event}"
        for name, event in outcome.all("pickle", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn",
                                       "os.spawn", "os.fork", "os.forkpty", "pty.spawn")
    ]  # fmt: skip
    assert_none(found)


def test_nothing_was_reached(outcome: Outcome) -> None:
    events = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request")
    assert_none([f"{name}: {event}" for name, event in outcome.all(*events)])


def test_only_their_folders_were_read(outcome: Outcome) -> None:
    own = {sys.prefix, sys.base_prefix, *sysconfig.get_paths().values(), str(ROOT)}
    allowed = [os.path.realpath(path) for path in own] + [*own, *SYSTEM]
    allowed += [str(outcome.root / name) for name in ("work", "tmp", "hub")]
    found = []
    for name, (_, path) in outcome.all("open", "write"):
        if not any(path == each or path.startswith(f"{each}/") for each in allowed):
            found.append(f"{name}: {path}")
    assert_none(found)


def test_their_code_and_pickles_were_not_even_opened(outcome: Outcome) -> None:
    found = []
    for name, (_, path) in outcome.all("open"):
        inside = Path(path).is_relative_to(outcome.root / "work") and path.endswith(
            (".pth", ".pt", ".pkl", ".py", ".bin")
        )
        # A run's own tokens are .bin, and a student's own code is hashed, never run; exports are written here.
        is_ours = any(part in path for part in ("/corpora/", "/final/", "/.tmp-", "/export-"))
        if inside and not is_ours:
            found.append(f"{name}: {path}")
    assert_none(found)


def test_only_what_was_asked_for_was_written(outcome: Outcome) -> None:
    outputs = ("converted", "manifest", "run", "paths", "code", "export-", "x1", "x2", "x3", "x4", "x5")
    allowed = [str(outcome.root / "work" / name) for name in outputs] + [str(outcome.root / n) for n in ("tmp", "hub")]
    allowed += [str(outcome.root / "work" / name) for name in (".tmp-export", "quantised/.lock")] + ["/dev/null"]
    locks = [f"{name}/{file}" for name in TEXTS for file in (".lock", "corpora/.")] + ["kernel/corpora/."]
    allowed += [str(outcome.root / "work" / name) for name in locks]
    found = [f"{name}: {path}" for name, (_, path) in outcome.all("write") if not path.startswith(tuple(allowed))]
    assert_none(found)
    assert sorted(path.name for path in (outcome.root / "outside").iterdir()) == sorted(
        [WEIGHTS, "student.safetensors", "secret.json", "secret.txt"]
    )
    assert not list((outcome.root / "home").iterdir())


def test_exports_hold_nothing_of_this_machine(outcome: Outcome) -> None:
    exports = sorted((outcome.root / "work").glob("export-*"))
    assert len(exports) == (5 if HAS_MLX else 2)
    for folder in exports:
        for file in folder.rglob("*"):
            content = file.read_bytes() if file.is_file() else b""
            for secret in (str(outcome.root), str(Path.home()) + "/", "CANARY", "evil/kernel"):
                assert secret.encode() not in content, file
