"""The command line: help at once, the lines of the pages, plans of real teachers, and the whole way on a tiny one."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest

from mohawkify import __version__, api
from mohawkify.cli import showcase
from mohawkify.cli.main import main
from mohawkify.cli.options import own_text
from mohawkify.cli.plan_tables import plan_text
from mohawkify.exporters.export import TARGETS
from mohawkify.families.registry import adapter_names
from mohawkify.recipe.bundled import recipe_names
from mohawkify.recipe.loading import apply_overrides, load_recipe, parse_recipe
from tests.commands import RECIPE, make_recipe, make_teacher, run, run_well
from tests.conftest import ROOT
from tools.cli_docs import with_reference

SCRIPT = Path(sys.executable).parent / "mohawkify"
PROMISED = (
    "mohawkify convert meta-llama/Llama-3.2-1B-Instruct --recipe llamba-1b",
    "mohawkify eval",
    "mohawkify export --target mlx-q4",
)
# Totals of the real configurations, as ../shared/data/README.md states them.
PARAMETERS = {
    "Llama-3.2-1B-Instruct": 1_235_814_400,
    "Llama-3.2-3B-Instruct": 3_212_749_824,
    "Llama-3.1-8B-Instruct": 8_030_261_248,
    "Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen3-8B": 8_190_735_360,
    "SmolLM2-135M": 134_515_008,
}


def commands_of(group: click.Group = main, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every command, with the groups it stands in."""
    found = [path]
    for name, command in group.commands.items():
        found += commands_of(command, (*path, name)) if isinstance(command, click.Group) else [(*path, name)]
    return found


def parse(line: str) -> tuple[str, dict[str, Any]]:
    """Parse a line as a shell and click would, without running it: the command and its parameters."""
    program, *arguments = shlex.split(line, comments=True)
    assert program == "mohawkify"
    context = main.make_context(program, arguments)
    command: click.Command = main
    rest = [*context._protected_args, *context.args]
    while isinstance(command, click.Group):
        name, command, rest = command.resolve_command(context, rest)
        context = command.make_context(name, rest, parent=context)
        rest = [*context._protected_args, *context.args]
    return context.command_path.removeprefix("mohawkify "), context.params


def lines_of(page: str) -> list[str]:
    """The commands that a page shows."""
    text = (ROOT / page).read_text(encoding="utf-8")
    lines = re.findall(r"^ {4}(mohawkify .+)$", text, flags=re.MULTILINE)
    # Some have words of explanation behind, or the file that a shell writes their output to.
    return [re.split(r" {2,}(?=[a-z])| > ", line)[0].strip() for line in lines]


@pytest.mark.parametrize("command_path", commands_of(), ids=" ".join)
def test_every_command_and_option_has_help(command_path):
    text = run_well(*command_path, "--help").stdout
    command: click.Command = main
    for name in command_path:
        command = command.commands[name]
    assert command.help
    assert command.help.splitlines()[0] in " ".join(text.split())
    options = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
    assert options
    assert all(option.help for option in options)


def test_help_and_light_commands_load_nothing_heavy():
    light = [[*command_path, "--help"] for command_path in commands_of()] + [
        ["families"],
        ["recipes", "ls"],
        ["recipes", "show", "demo"],
    ]
    code = f"""
import sys
from mohawkify.cli.main import main
for arguments in {light!r}:
    try:
        main(arguments)
    except SystemExit as end:
        assert end.code == 0, arguments
sys.exit(", ".join({{"torch", "transformers", "datasets", "numpy", "huggingface_hub"}} & sys.modules.keys()) or 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_commands_import_models_without_scipy_and_search_their_files_once():
    code = """
import sys
from mohawkify.cli.short_imports import import_models
import_models()
import transformers.models
from transformers.utils.import_utils import create_import_structure_from_path as search
assert search.cache_info().hits == 1, search.cache_info()
assert transformers.models.llama.LlamaForCausalLM.__module__ == "transformers.models.llama.modeling_llama"
sys.exit(", ".join({"scipy", "sklearn"} & sys.modules.keys()) or 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_page_of_commands_is_what_help_says():
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert page == with_reference(page), "renew it with tools.cli_docs.with_reference"


def test_the_lines_that_were_promised_stand_in_the_readme():
    assert lines_of("README.md")[:3] == list(PROMISED)


@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md", "docs/recipes.md"])
def test_the_commands_on_a_page_parse(page):
    lines = lines_of(page)
    assert lines
    for line in lines:
        name, _ = parse(line)
        assert name, line


def test_the_promised_lines_mean_what_they_say():
    (convert, conversion), (evaluate, evaluation), (export, target) = map(parse, PROMISED)
    assert (convert, evaluate, export) == ("convert", "eval", "export")
    assert conversion["recipe_name"] in recipe_names()
    assert conversion["teacher"] == load_recipe(conversion["recipe_name"]).teacher
    assert conversion["output"] is None
    assert (evaluation["run"], evaluation["against"]) == (None, "teacher")
    assert (target["run"], target["output"]) == (None, None)
    assert target["target"] in TARGETS


def test_help_names_every_target():
    text = run_well("export", "--help").stdout
    assert all(re.search(rf"\b{target}\b", text) for target in TARGETS)


@pytest.mark.parametrize(
    "name", ["llamba-1b", *(pytest.param(name, marks=pytest.mark.full) for name in ("llamba-3b", "llamba-8b"))]
)
def test_a_promised_conversion_is_planned_from_the_real_config(teacher_configs, name):
    teacher = load_recipe(name).teacher
    config = teacher_configs / f"{teacher.rsplit('/', 1)[-1]}.json"
    planned = json.loads(run_well("plan", config, "--recipe", name, "--json").stdout)
    assert planned["teacher"]["num_parameters"] == PARAMETERS[config.stem]
    assert planned["tokens"] == pytest.approx({"llamba-1b": 8e9, "llamba-3b": 10e9, "llamba-8b": 12e9}[name], rel=1e-3)
    text = plan_text(planned)
    assert all(stage in text for stage in ("orient", "align", "distill", "estimates", "disk"))


@pytest.mark.parametrize("name", ["Llama-3.2-1B-Instruct", "Qwen2.5-7B-Instruct", "Qwen3-8B", "SmolLM2-135M"])
def test_inspect_accounts_for_every_parameter(teacher_configs, name):
    config = teacher_configs / f"{name}.json"
    found = json.loads(run_well("inspect", config, "--json").stdout)
    parts = found["parts"]
    assert found["teacher"]["num_parameters"] == PARAMETERS[name]
    assert sum(part["replaced"] + part["copied"] for part in parts) == PARAMETERS[name]
    assert sum(part["mixer"] + part["copied"] for part in parts) == found["student"]["num_parameters"]
    layers = [part for part in parts if part["part"].startswith("layer ")]
    assert len(layers) == found["teacher"]["num_hidden_layers"]
    assert all(part["attention"] == "full_attention" for part in layers)
    text = run_well("inspect", config).stdout
    assert f"{PARAMETERS[name]:,}" in text
    assert text.count("orient (mixer), align, distill") == len(layers)


def test_families_for_programs_and_for_people():
    found = json.loads(run_well("families", "--json").stdout)
    assert found["families"] == adapter_names()
    assert all(name in run_well("families").stdout for name in adapter_names())


def test_recipes_are_listed_shown_and_copied(tmp_path):
    assert [
        each["name"] for each in json.loads(run_well("recipes", "ls", "--json").stdout)["recipes"]
    ] == recipe_names()
    text = (ROOT / "recipes" / "llamba-1b.yaml").read_text(encoding="utf-8")
    assert run_well("recipes", "show", "llamba-1b").stdout == text
    copy = tmp_path / "mine.yaml"
    assert run_well("recipes", "cp", "llamba-1b", copy).stdout.strip() == str(copy)
    assert copy.read_text(encoding="utf-8") == text
    copy.write_text("mine")
    assert run("recipes", "cp", "llamba-1b", copy).exit_code == 2
    assert copy.read_text() == "mine"


def test_doctor_tells_what_is_there_and_what_is_missing():
    found = json.loads(run_well("doctor", "--json").stdout)
    assert found["healthy"]
    assert {"torch", "transformers", "click"} <= {package["name"] for package in found["base"]}
    assert {"eval", "mlx", "cuda", "mamba", "dev"} <= found["extras"].keys()
    assert all(extra["brings"] and "pip install" in extra["install"] for extra in found["extras"].values())
    installed = {package["name"] for package in found["extras"]["dev"]["packages"] if package["installed"]}
    assert {"pytest", "ruff"} <= installed
    text = run_well("doctor").stdout
    for extra in found["extras"].values():
        assert (extra["install"] in text) == (bool(extra["packages"]) and not extra["complete"])


def test_version():
    assert run_well("--version").stdout == f"mohawkify, version {__version__}\n"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_name_the_program(shell):
    assert "_MOHAWKIFY_COMPLETE" in run_well("completion", shell).stdout


def test_completion_knows_commands_and_recipes():
    for words, expected in (("mohawkify in", "inspect"), ("mohawkify plan x --recipe stor", "stories")):
        environment = {"_MOHAWKIFY_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        done = subprocess.run([SCRIPT], env=environment, capture_output=True, text=True, check=False)
        assert f"plain,{expected}" in done.stdout.splitlines()


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder in which a tiny teacher has been converted; its conversion's output."""
    folder = tmp_path_factory.mktemp("workplace")
    make_teacher(folder / "tiny-llama")
    make_recipe(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        result = run_well("convert", "tiny-llama", "--recipe", "tiny.yaml", "--set", "seed=3")
    return folder, result


@pytest.fixture
def inside(workplace, monkeypatch):
    """The workplace as the current folder."""
    monkeypatch.chdir(workplace[0])
    return workplace[0]


def test_convert_prints_the_run_and_tells_the_rest_apart(workplace):
    folder, result = workplace
    assert result.stdout == "runs/tiny-llama-mohawk\n"
    assert "after distill: KL" in result.stderr
    run_folder = folder / "runs" / "tiny-llama-mohawk"
    promised = "recipe.yaml plan.json teacher.json student.json metrics.jsonl checkpoints final results.json"
    assert {entry.name for entry in run_folder.iterdir()} >= set(promised.split())
    assert load_recipe(run_folder / "recipe.yaml").seed == 3


def test_convert_again_leaves_a_finished_run_alone(inside):
    again = run_well("convert", "tiny-llama", "--recipe", "tiny.yaml", "--set", "seed=3")
    assert again.stdout == "runs/tiny-llama-mohawk\n"
    assert "already finished" in again.stderr
    assert run("convert", "tiny-llama", "--recipe", "tiny.yaml", "--set", "seed=3", "--resume", "never").exit_code == 2


def test_text_of_ones_own_replaces_the_recipes(inside, tmp_path):
    for name, story in (("train", "A dog ran far. "), ("held", "A bird flew off. ")):
        (tmp_path / f"{name}: 'x'.txt").write_text(story * 60)
    run_well(
        "convert", "tiny-llama", "--recipe", "tiny.yaml", "--output", tmp_path / "run",
        "--data", tmp_path / "train: 'x'.txt", "--validation", tmp_path / "held: 'x'.txt",
        "--set", "stages.align.tokens=0", "--set", "stages.distill.tokens=64",
    )  # fmt: skip
    data = load_recipe(tmp_path / "run" / "recipe.yaml").data
    assert [source.path for source in data.train] == [str(tmp_path / "train: 'x'.txt")]
    assert [source.path for source in data.validation] == [str(tmp_path / "held: 'x'.txt")]


def test_text_of_ones_own_is_held_out_from_itself(inside, tmp_path):
    (tmp_path / "own.txt").write_text("A dog ran far. <|endoftext|>\n" * 60)
    run_well(
        "convert", "tiny-llama", "--recipe", "tiny.yaml", "--output", tmp_path / "run", "--data", tmp_path / "own.txt",
        "--set", "stages.align.tokens=0", "--set", "stages.distill.tokens=64",
    )  # fmt: skip
    assert load_recipe(tmp_path / "run" / "recipe.yaml").data.validation == ()


def test_eval_measures_again_what_the_run_recorded(inside):
    found = json.loads(run_well("eval", "--json").stdout)
    recorded = json.loads(Path("runs/tiny-llama-mohawk/results.json").read_text())
    assert found["student"] == pytest.approx(recorded["student"], rel=1e-5)
    assert found["teacher"]["perplexity"] == pytest.approx(recorded["teacher"]["perplexity"], rel=1e-5)
    assert found["evaluation_tokens"] == recorded["evaluation_tokens"]
    assert json.loads(Path("runs/tiny-llama-mohawk/eval.json").read_text()) == found
    text = run_well("eval", "runs/tiny-llama-mohawk").stdout
    assert "teacher" in text
    assert "perplexity" in Path("runs/tiny-llama-mohawk/eval.md").read_text()


def test_eval_without_the_teacher(inside):
    alone = json.loads(run_well("eval", "--against", "none", "--json").stdout)
    beside = json.loads(run_well("eval", "--json").stdout)
    assert "teacher" not in alone
    assert alone["student"]["perplexity"] == pytest.approx(beside["student"]["perplexity"], rel=1e-5)


def test_eval_says_when_the_text_has_changed(workplace, tmp_path, monkeypatch):
    shutil.copytree(workplace[0], tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    assert "warning" not in run_well("eval").stderr
    (tmp_path / "copy" / "tiny-llama" / "text.txt").write_text("The dog ran. " * 200)
    kept = run_well("eval", "--teacher", "tiny-llama", "--json")  # what the run has tokenised counts
    assert "warning" not in kept.stderr
    shutil.rmtree(tmp_path / "copy" / "runs" / "tiny-llama-mohawk" / "corpora")
    other = run_well("eval", "--teacher", "tiny-llama", "--json")
    assert "warning: the text of data.train has changed since the run" in other.stderr
    hashes = [json.loads(result.stdout)["provenance"]["text"] for result in (kept, other)]
    assert hashes[0] != hashes[1]


def test_eval_asks_the_questions_of_a_task(inside):
    questions = [
        {"q": f"{a} cats and {b} cats", "choices": ["one", "two"], "gold": a % 2} for a in range(3) for b in (1, 2)
    ]
    Path("questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    Path("cats.yaml").write_text(
        "task: cats\ndataset_path: json\n"
        "dataset_kwargs: {data_files: {test: questions.jsonl}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: '{{choices}}'\n"
        "doc_to_target: '{{gold}}'\nmetric_list: [{metric: acc}]\n"
    )
    found = json.loads(run_well("eval", "--tasks", "cats.yaml", "--limit", 4, "--batch-size", 2, "--json").stdout)
    task = found["tasks"]["tasks"]["cats"]
    assert task["samples"] == 4
    assert {"teacher", "student", "retention"} <= task["metrics"]["acc"].keys()


def test_export_and_refuse_to_do_it_twice(inside):
    done = run_well("export", "--target", "hf", "--json")
    facts = json.loads(done.stdout)
    assert facts["directory"] == "runs/tiny-llama-mohawk/exports/hf"
    assert (inside / facts["directory"] / "model.safetensors").is_file()
    again = run("export", "--target", "hf")
    assert again.exit_code == 73
    assert "not empty" in again.stderr
    elsewhere = run_well("export", "runs/tiny-llama-mohawk", "--target", "hf", "--output", "mine", "--dtype", "float32")
    assert elsewhere.stdout == "mine\n"


def test_generate_writes_the_same_text_again(inside):
    texts = [run_well("generate", "The cat", "--max-tokens", 12).stdout for _ in range(2)]
    assert texts[0] == texts[1]
    assert texts[0].startswith("The cat")
    both = run_well("generate", "runs/tiny-llama-mohawk", "The cat", "--max-tokens", 12, "--teacher").stdout
    assert both.startswith("teacher: The cat")
    assert f"\nstudent: {texts[0]}" in both


def test_generate_draws_by_seed(inside):
    def drawn(seed: int) -> str:
        return run_well("generate", "The cat", "--max-tokens", 24, "--temperature", 1.5, "--seed", seed).stdout

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_the_installed_command_keeps_its_outputs_apart(inside):
    done = subprocess.run(
        [SCRIPT, "generate", "The cat", "--max-tokens", "4"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("The cat")


def test_the_demo_runs_and_runs_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_teacher(tmp_path / "demo")  # a local folder comes before the embedded teacher of that name
    monkeypatch.setattr(api, "load_recipe", lambda name: parse_recipe(RECIPE, "tiny.yaml"))
    monkeypatch.setattr(showcase, "SAMPLE_TOKENS", 8)
    first = run_well("demo", "--output", "tour")
    again = run_well("demo", "--output", "tour")
    assert "already finished" in again.stderr
    for result in (first, again):
        assert [line[:5] for line in result.stderr.splitlines() if line.startswith("[")] == [
            f"[{number}/6]" for number in range(1, 7)
        ]
        for words in ("KL", "top-1", "after distill", "tokens/s", "mlx-q4", "tour/final", "tour/exports/hf"):
            assert words in result.stdout
    assert (tmp_path / "tour" / "exports" / "mlx-q4" / "model.safetensors").is_file()


@pytest.mark.parametrize("path", ["a.txt", "\U0001f600.jsonl", "a: b", "*x", "- y", "123", "é\u2028b", " s ", "C:\\x"])
def test_a_path_on_the_command_line_comes_into_the_recipe_as_it_is(path):
    recipe = apply_overrides(load_recipe("demo"), own_text(path, path))
    assert [source.path for source in (*recipe.data.train, *recipe.data.validation)] == [path, path]
