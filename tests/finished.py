"""Finished runs of tiny random students, and Python processes that have never heard of mohawkify."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from transformers import PreTrainedModel

from mohawkify.files.atomic import atomic_directory, write_json, write_text
from mohawkify.recipe.schema import StudentRecipe
from mohawkify.student.build import build_student, design_student
from mohawkify.student.save import save_student
from mohawkify.student.student_spec import StudentSpec
from mohawkify.teacher.resolve import resolve_teacher
from tests.bytes_tokenizer import EOS, bytes_tokenizer
from tests.commands import RECIPE
from tests.tiny import save_teacher, tiny_teacher

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"

# The first line of a foreign process: importing mohawkify fails as where it is not installed.
WITHOUT_MOHAWKIFY = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "mohawkify":
            raise ModuleNotFoundError(f"No module named {name!r}")
sys.meta_path.insert(0, Absent())
"""


Keep = tuple[int, ...] | dict[str, Any]  # the layers of `student.keep`, or all of it


def tiny_student(
    family: str,
    folder: Path,
    keep: Keep = (),
    mixer: str = "discrete_mamba2",
    options: Mapping[str, Any] = MappingProxyType({}),
    **changes: Any,
) -> tuple[PreTrainedModel, Any]:
    """A random student whose every parameter is off its start value, and its facts; the teacher goes to ``folder``.

    ``options`` are further keys of a recipe's ``student``; the changes are of the teacher's configuration.
    """
    teacher = tiny_teacher(family, vocab_size=258, bos_token_id=256, eos_token_id=257, **changes)
    save_teacher(teacher, folder)
    found = resolve_teacher(str(folder))
    kept = keep if isinstance(keep, dict) else {"layers": keep}
    recipe = StudentRecipe(**{"state_size": 16, "keep": kept, "mixer": mixer, **options})
    spec = design_student("tiny", found.spec, found.config, found.adapter, recipe)
    student = build_student(teacher, found.adapter, spec, "attention", seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return student.eval(), spec


def finished_run(
    folder: Path,
    family: str = "llama",
    keep: Keep = (),
    template: str | None = TEMPLATE,
    **changes: Any,
) -> PreTrainedModel:
    """Write what a finished conversion leaves behind, of `tiny_student` with these arguments; returns the student."""
    student, spec = tiny_student(family, folder / "teacher-folder", keep, **changes)
    write_run(folder, student, spec, template)
    return student


def write_run(folder: Path, student: PreTrainedModel, spec: StudentSpec, template: str | None) -> None:
    """Write what a finished conversion of a student by the recipe of tests leaves behind."""
    with atomic_directory(folder / "final") as final:
        save_student(student, bytes_tokenizer(chat_template=template), final)
    metrics = {"tokens": 1000, "perplexity": 12.5, "kl": 0.25, "top1": 0.75, "seconds": 1.0}
    write_json(folder / "results.json", {"name": "tiny", "teacher": {"perplexity": 10.0}, "stages": {"init": metrics}})
    write_json(folder / "student.json", spec.to_json())
    teacher = str((folder / "teacher-folder").resolve())
    write_json(folder / "teacher.json", {"source": teacher, "folder": teacher, "files": {}})
    write_text(folder / "recipe.yaml", RECIPE)


CHATML = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


@torch.no_grad()
def scripted_run(folder: Path, text: str, template: str = CHATML) -> None:
    """Write the run of a student that answers with ``text`` whatever it is told.

    Args:
        folder: of the run.
        text: signs of one byte, none of them twice; if it ends with the line end that stands in front of an answer, the
            answer begins anew and never ends.
    """
    student, spec = tiny_student("llama", folder / "teacher-folder", hidden_size=64, tie_word_embeddings=False)
    for name, parameter in student.named_parameters():
        if "out_proj." in name or "down_proj." in name:
            parameter.zero_()  # the layers add nothing: the last token alone decides
        elif name.endswith("norm.weight"):
            parameter.fill_(1.0)
    embedding, head = student.model.embed_tokens.weight, student.lm_head.weight
    embedding.zero_()
    head.zero_()
    tokens = bytes_tokenizer()("\n" + text).input_ids[-len(text) - 1 :]
    places = {token: place for place, token in enumerate(dict.fromkeys(tokens), start=1)}
    follows = dict(itertools.pairwise(tokens))
    for token in range(len(embedding)):
        place = places.get(token, 0)
        embedding[token, place] = 1.0
        head[follows.get(token, EOS), place] = 1.0
    write_run(folder, student, spec, template)


def run_python(code: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh process that starts in ``folder``; its module caches stay there too."""
    environment = {**os.environ, "HF_HOME": str(folder / "hf-home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def answer(done: subprocess.CompletedProcess[str]) -> Any:
    """The JSON that a process wrote as its last line."""
    return json.loads(done.stdout.splitlines()[-1])
