"""Bad input: one clear line, a hint, exit code 1 or 2, and nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest
import torch
from safetensors.torch import load_file, save_file

from mohawkify.cli.error_lines import CommandGroup, describe
from mohawkify.cli.main import main
from mohawkify.errors import is_out_of_memory
from mohawkify.files.lock import run_lock
from mohawkify.planning import planning
from tests.commands import RECIPE, copy_of, make_recipe, make_teacher, run, run_well
from tests.conftest import ROOT
from tests.files.faults import content_of


@pytest.fixture(scope="module")
def whole_teacher(tmp_path_factory) -> Path:
    """A tiny teacher with nothing wrong; tests damage copies."""
    return make_teacher(tmp_path_factory.mktemp("material") / "tiny-llama")


@pytest.fixture
def teacher(whole_teacher, tmp_path, monkeypatch) -> Path:
    """A copy of the teacher in the current folder, a recipe beside it."""
    monkeypatch.chdir(tmp_path)
    make_recipe(tmp_path)
    return copy_of(whole_teacher, tmp_path / "tiny-llama")


def refused(*arguments: object, code: int, says: str, leaves: tuple[str, ...] = ()) -> None:
    """Run a command that must fail with one clean line, and change nothing in the current folder but what it leaves."""
    before = content_of(Path.cwd())
    result = run(*arguments)
    lines = result.stderr.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert result.exit_code == code, result.stderr
    assert len(errors) == 1
    assert lines[lines.index(errors[0]) + 1 :] in ([], [line for line in lines if line.startswith("hint: ")][:1])
    assert says in errors[0]
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    after = content_of(Path.cwd())
    assert {name: content for name, content in after.items() if name not in leaves} == before


def convert(*changes: object, teacher: object = "tiny-llama", recipe: object = "tiny.yaml") -> tuple[object, ...]:
    return ("convert", teacher, "--recipe", recipe, *changes)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ((), 2, "Missing argument 'TEACHER'"),
        (("tiny-llama",), 2, "expected exactly one of --recipe, --tokens and --time"),
        (("tiny-llama", "--recipe", "tiny.yaml", "--resume", "perhaps"), 2, "'perhaps' is not one of"),
        (("tiny-llama", "--recipe", "tiny.yaml", "--ouptut", "x"), 2, "Did you mean '--output'?"),
        (("tiny-lama", "--recipe", "tiny.yaml"), 66, "no such teacher: tiny-lama"),
        (("../../etc/passwd", "--recipe", "tiny.yaml"), 66, "no such teacher"),
        (("nobody/nothing", "--recipe", "tiny.yaml"), 66, "no such teacher: nobody/nothing"),
        (("tiny-llama/config.json", "--recipe", "tiny.yaml"), 66, "expected a folder with weights"),
        (("tiny-llama", "--recipe", "llamba-1bb"), 64, "did you mean llamba-1b?"),
        (("tiny-llama", "--recipe", "missing.yaml"), 64, "missing.yaml"),
        (("tiny-llama", "--recipe", "tiny.yaml", "--set", "stages.distil.tokens=5B"), 64, "stages.distill.tokens"),
        (("tiny-llama", "--recipe", "tiny.yaml", "--set", "stages.distill.tokens=many"), 64, "expected a count"),
        (("tiny-llama", "--recipe", "tiny.yaml", "--set", "seed"), 64, "expected key=value"),
        (("tiny-llama", "--recipe", "tiny.yaml", "--set", "student.keep.layers=[7]"), 64, "found layer 7"),
        (("tiny-llama", "--recipe", "tiny.yaml", "--data", "nowhere.txt"), 66, "nowhere.txt"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_a_wrong_command_line(teacher, arguments, code, says):
    refused("convert", *arguments, code=code, says=says)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("batch_sequences: 2", "batch_sequencies: 2", "did you mean evaluation.batch_sequences?"),
        ("tokens: 192", "tokens: 192.5", "expected a count"),
        ("name: tiny", "name: tiny\nname: twice", "tiny.yaml:3"),
        ("device: cpu", "device: tpu", "compute.device"),
        ("name: tiny", "name: !!python/name:os.system tiny", "tag"),
        ("name: tiny", "\tname: tiny", "tiny.yaml"),
    ],
)
def test_a_recipe_with_a_mistake(teacher, old, new, says):
    Path("tiny.yaml").write_text(RECIPE.replace(old, new))
    refused(*convert(), code=64, says=says)


def edit_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def damage_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def corrupt_header(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(b"\xff" * 64 + file.read_bytes()[64:])


def only_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def a_missing_shard(folder: Path) -> None:
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


NORM = "model.norm.weight"
DAMAGES = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "holds no config.json"),
    "config is no JSON": (lambda folder: (folder / "config.json").write_text("{"), "is not strict JSON"),
    "unknown family": (lambda folder: edit_config(folder, model_type="starling"), "mohawkify families"),
    "nearly a family": (lambda folder: edit_config(folder, model_type="lama"), "did you mean llama?"),
    "a student": (lambda folder: edit_config(folder, model_type="mohawk_llama"), "already a student"),
    "impossible config": (lambda folder: edit_config(folder, hidden_size="wide"), "not a valid llama configuration"),
    "truncated": (truncate, "damaged or truncated"),
    "corrupt": (corrupt_header, "damaged or truncated"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no weights"),
    "a pickle": (only_a_pickle, "a pickle"),
    "missing shard": (a_missing_shard, "is missing"),
    "missing tensor": (lambda folder: damage_weights(folder, lambda t: t.pop(NORM)), f"lacks tensor {NORM}"),
    "extra tensor": (
        lambda folder: damage_weights(folder, lambda t: t.update({"stray": torch.ones(1)})),
        "unexpected tensor stray",
    ),
    "misshapen tensor": (
        lambda folder: damage_weights(folder, lambda t: t.update({NORM: torch.ones(3)})),
        f"wrong shape for tensor {NORM}",
    ),
    "not finite": (lambda folder: damage_weights(folder, lambda t: t[NORM].fill_(torch.nan)), "not finite"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "no usable tokenizer"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_teacher(teacher, damage):
    work, says = DAMAGES[damage]
    work(teacher)
    refused(*convert("--output", "out"), code=64 if "family" in damage else 66, says=says)
    assert run("doctor", "tiny-llama").exit_code == 66, "doctor calls sound what is refused"


def test_a_vocabulary_that_does_not_fit(teacher, whole_teacher):
    make_teacher(teacher / "small", vocab_size=97, bos_token_id=1, eos_token_id=2)
    refused(*convert("--output", "out", teacher=teacher / "small"), code=66, says="token id 257")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("empty.txt", b"", "is empty"),
        ("blank.txt", b"  \n\n", "is empty"),
        ("blank.jsonl", b'{"text": " "}\n', "holds no document"),
        ("binary.txt", b"\x00\x01\x02" * 400, "binary"),
        ("latin.txt", "caf\u00e9".encode("latin-1") * 50, "not UTF-8"),
        ("broken.jsonl", b'{"text": "one"}\n{"text": \n', "line 2"),
        ("column.jsonl", b'{"story": "one"}\n', "text"),
        ("empty.parquet", b"", "parquet"),
        ("table.csv", b"text\none\n", "table.csv"),
        ("short.txt", b"a", "hold out"),
    ],
)
def test_text_that_cannot_be_used(teacher, name, content, says):
    Path(name).write_bytes(content)
    refused(*convert("--data", name), code=66, says=says)


def test_an_output_folder_that_holds_something_else(teacher):
    Path("thesis").mkdir()
    Path("thesis/chapter.txt").write_text("important")
    # The lock's file stays: were it removed, two processes could hold two locks of one name.
    refused(*convert("--output", "thesis"), code=2, says="not empty", leaves=("thesis/.lock",))


def test_an_output_folder_that_another_process_holds(teacher):
    Path("busy").mkdir()
    with run_lock(Path("busy")):
        refused(*convert("--output", "busy"), code=2, says="another process")


@pytest.mark.parametrize("output", ["tiny.yaml", "tiny.yaml/run", "/proc/mohawkify-run"])
def test_an_output_that_cannot_be_written(teacher, output):
    if output.startswith("/proc") and not Path("/proc").is_dir():
        pytest.skip("needs /proc, a file system that nobody can write")
    refused(*convert("--output", output), code=74, says=output)


def test_the_corrected_command_works(teacher):
    refused(*convert("--data", "nowhere.txt"), code=66, says="nowhere.txt")
    refused(*convert("--set", "compute.device=cuda"), code=2, says="cuda") if not torch.cuda.is_available() else None
    short = ["--set", "stages.align.tokens=0", "--set", "stages.distill.tokens=64"]
    assert run_well(*convert(*short)).stdout == "runs/tiny-llama-mohawk\n"


@pytest.fixture(scope="module")
def finished(whole_teacher, tmp_path_factory):
    """A folder with a teacher and a finished run."""
    folder = tmp_path_factory.mktemp("finished")
    copy_of(whole_teacher, folder / "tiny-llama")
    make_recipe(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_well(*convert("--set", "stages.align.tokens=0", "--set", "stages.distill.tokens=64", "--output", "run"))
    return folder


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("eval",), 2, "no finished run in runs/"),
        (("eval", "nothing"), 2, "no such run: nothing"),
        (("eval", "tiny-llama"), 2, "not a finished run"),
        (("eval", "run", "--tasks", ""), 2, "names no task"),
        (("eval", "run", "--tasks", "arc_esy.yaml"), 2, "arc_esy.yaml"),
        (("eval", "run", "--limit", "3"), 2, "--limit"),
        (("eval", "run", "--preset", "lamba"), 2, "llamba"),
        (("eval", "run", "--preset", "llamba", "--tasks", "piqa"), 2, "--preset"),
        (("eval", "run", "--teacher", "nowhere"), 66, "no such teacher: nowhere"),
        (("export", "run"), 2, "Missing option '--target'"),
        (("export", "run", "--target", "mlx-q5"), 2, "did you mean mlx-q8?"),
        (("export", "run", "--target", "hf", "--dtype", "int3"), 2, "int3"),
        (("export", "run", "--target", "hf", "--output", "tiny-llama"), 73, "is not empty"),
        (("generate",), 2, "Missing argument"),
        (("generate", "run", "once", "upon"), 2, "expected [RUN] PROMPT"),
        (("generate", "run", "once", "--max-tokens", "0"), 2, "0 is not in the range"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_wrong_use_of_a_run(finished, monkeypatch, arguments, code, says):
    monkeypatch.chdir(finished)
    refused(*arguments, code=code, says=says)


def test_a_teacher_that_changed_since(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(finished)
    other = copy_of(finished / "tiny-llama", tmp_path / "other")
    run_well("eval", "run", "--teacher", other)
    damage_weights(other, lambda tensors: tensors[NORM].mul_(1.5))
    refused("eval", "run", "--teacher", other, code=66, says="model.safetensors differs")


def test_a_missing_extra_names_the_command(finished, monkeypatch):
    monkeypatch.chdir(finished)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    result = run("eval", "run", "--tasks", "piqa")
    assert result.exit_code == 69
    assert result.stderr.splitlines()[-1] == 'hint: pip install "mohawkify[eval]"'


def test_a_damaged_student(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    copy_of(finished / "run", tmp_path / "run")
    truncate(tmp_path / "run" / "final")
    refused("generate", "run", "once", code=66, says="model.safetensors has changed")
    refused("eval", "run", code=66, says="model.safetensors has changed")
    result = run("eval", "run")
    assert "remove run/final: the command that made the run writes it again" in result.stderr
    refused("export", "run", "--target", "hf", code=66, says="model.safetensors has changed")


def test_a_mistyped_verb():
    result = run("convrt", "x")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[0] == "error: No such command 'convrt'. Did you mean 'convert'?"


def test_a_bug_is_one_line_too_and_its_traceback_comes_when_asked_for(monkeypatch):
    def broken(*arguments: object, **more: object) -> None:
        raise ZeroDivisionError("a line\nand another")

    monkeypatch.setattr(planning, "plan", broken)
    plain = run("plan", "x", "--recipe", "demo")
    assert plain.exit_code == 70
    assert plain.stderr.splitlines() == [
        "error: unexpected ZeroDivisionError: a line and another",
        "hint: run it again with --debug for the traceback",
    ]
    for arguments in (("--debug", "plan", "x", "--recipe", "demo"), ("plan", "x", "--recipe", "demo", "--debug")):
        debugged = run(*arguments)
        assert debugged.exit_code == 70
        assert "Traceback" in debugged.stderr
        assert "error: unexpected ZeroDivisionError: a line and another" in debugged.stderr.splitlines()


def test_every_verb_takes_debug_after_its_name():
    def commands(group, *path):
        for name, each in group.commands.items():
            yield (*path, name), each
            if hasattr(each, "commands"):
                yield from commands(each, *path, name)

    found = dict(commands(main))
    assert ("data", "inspect") in found
    lacking = [path for path, each in found.items() if "--debug" not in {o for p in each.params for o in p.opts}]
    assert lacking == []


def test_an_interrupt_ends_with_130(monkeypatch):
    def interrupted(*arguments: object, **more: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(planning, "plan", interrupted)
    result = run("plan", "x", "--recipe", "demo")
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == "error: interrupted"


def test_a_full_memory_is_told_with_a_way_out(monkeypatch):
    def full(*arguments: object, **more: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate 20 GiB")

    monkeypatch.setattr(planning, "plan", full)
    result = run("plan", "x", "--recipe", "demo")
    assert result.exit_code == 71
    assert "micro_batch_sequences" in result.stderr


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("tried to allocate 20 GiB"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: ..."),
    ],
)
def test_every_way_to_run_out_of_memory_is_told_apart_from_damage(teacher, monkeypatch, error):
    assert describe(error)[2] == 71

    def full(*arguments: object, **more: object) -> None:
        raise error

    monkeypatch.setattr("transformers.LlamaForCausalLM.from_pretrained", full)
    assert run(*convert("--output", teacher.parent / "out")).exit_code == 71


@pytest.mark.parametrize(
    "before",
    [("data", "inspect"), ("doctor",), ("convert", "demo", "--recipe", "demo", "--output"), ("recipes", "cp", "demo")],
)
def test_a_path_that_is_too_long_is_no_bug(before):
    result = run(*before, 5000 * "x")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: File name too long: xxx")


def test_a_cpu_without_memory_is_what_torch_calls_it(tmp_path):
    script = "import resource, torch; resource.setrlimit(resource.RLIMIT_AS, (2**34, 2**34)); torch.empty(2**40)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert is_out_of_memory(RuntimeError(done.stderr.splitlines()[-1]))


def test_a_real_process_refuses_cleanly(teacher):
    script = Path(sys.executable).parent / "mohawkify"
    truncate(teacher)
    done = subprocess.run(
        [script, *map(str, convert("--output", "out"))], capture_output=True, text=True, check=False, cwd=teacher.parent
    )
    assert done.returncode == 66
    assert done.stdout == ""
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == ["error", "hint"]
    assert not Path("out").exists()


def test_a_reader_that_leaves_early_is_no_error():
    script = Path(sys.executable).parent / "mohawkify"
    with subprocess.Popen(
        [script, "recipes", "show", "llamba-8b"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""


def test_a_command_line_ends_past_pythons_own_end(monkeypatch, capsys):
    @click.group(cls=CommandGroup)
    def group() -> None:
        """Commands."""

    @group.command()
    def work() -> None:
        """Works."""
        click.echo("done")

    ended: list[object] = []
    monkeypatch.setattr("atexit._run_exitfuncs", lambda: ended.append("goodbye"))
    monkeypatch.setattr("os._exit", ended.append)
    with pytest.raises(SystemExit):
        group.main(["work"])
    assert not ended  # called from Python, which goes on
    monkeypatch.setattr("sys.argv", ["group", "work"])
    with pytest.raises(SystemExit):
        group.main()
    assert ended == ["goodbye", 0]
    assert capsys.readouterr().out == "done\ndone\n"


@pytest.mark.parametrize("words", [("generate", "run", "h\udce9llo"), ("convert", "t", "--output", "n\udce9")])
def test_bytes_that_are_no_text_are_refused_before_anything(words):
    result = run(*words)
    assert result.exit_code == 2
    assert result.stderr.splitlines()[0].startswith("error: found b'")
    assert "on the command line, which is no utf-8 text" in result.stderr


def test_signs_that_a_terminal_lacks_are_escaped():
    code = (
        "import click; from mohawkify.cli.main import main; main.commands['families'].callback = %s; main(['families'])"
    )
    shown = run_python(code % "lambda **_: click.echo('a \u2603')", PYTHONIOENCODING="latin-1")
    assert (shown.returncode, shown.stdout) == (0, "a \\u2603\n")
    asked = run_python(code % "lambda **_: '\u2603'.encode('latin-1')")
    assert asked.returncode == 2
    assert "this system's encoding, latin-1, has no sign" in asked.stderr


def test_python_without_docstrings_is_named():
    for code in ("from mohawkify.cli.main import main; main(['families'])", "import mohawkify.api"):
        done = run_python(code, PYTHONOPTIMIZE="2")
        assert "Python runs with -OO, which drops the docstrings" in done.stderr
    assert run_python("import mohawkify.api", PYTHONOPTIMIZE="1").returncode == 0


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("name", ["file.bin", "link"])
def test_what_is_here_and_no_teacher_is_not_asked_of_the_hub(teacher, monkeypatch, name):
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: pytest.fail("the Hub was asked"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("the Hub was asked"))
    Path("dir").mkdir()
    Path("dir/file.bin").write_text("x")
    Path("dir/link").symlink_to("nowhere")
    for command in (("inspect", f"dir/{name}"), convert(teacher=f"dir/{name}")):
        refused(*command, code=66, says=f"dir/{name} is")


def test_a_cache_that_cannot_be_written_is_named(monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "/home/x/.cache")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    result = run("inspect", "some/model")
    assert (result.exit_code, "hint: set HF_HOME to a folder that can be written" in result.stderr) == (66, True)
