"""Students of every family on the shelf: saved, loaded and exported, they compute what they did, mohawkify or not."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from mohawkify.exporters.export import export_run
from mohawkify.families.registry import adapter_names
from mohawkify.mixers.kinds import mixers_of
from mohawkify.mixers.mamba2 import DiscreteMamba2
from mohawkify.student.save import is_precise, load_student
from tests.close import TOLERANCE, assert_close
from tests.families.layouts import REPRESENTATIVES
from tests.finished import WITHOUT_MOHAWKIFY, finished_run, run_python

# Exports are compared on texts of 160 tokens, for which learned positions must suffice; MPT has its own key.
SIZES = {"num_hidden_layers": 2, "max_position_embeddings": 256, "max_seq_len": 256}
PRECISE = DiscreteMamba2.precise_parameters
PROMPT = torch.randint(3, 256, (1, 21), generator=torch.Generator().manual_seed(3))

# A process costs seconds, so one of each kind serves all families; it reads folders and writes what they compute.
IN_A_FRESH_PROCESS = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import save_file
torch.set_num_threads(1)
{load}
ids = torch.tensor(json.loads(sys.argv[2]))
found = {{}}
for name, folder in json.loads(sys.argv[1]).items():
    model = load(folder)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # in a file they lie at any address, by which some kernels round
    with torch.no_grad():
        found[f"{{name}}.logits"] = model(ids).logits.float()
    found[f"{{name}}.greedy"] = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    found[f"{{name}}.precise"] = torch.tensor(sum(p.numel() for p in model.parameters() if p.dtype == torch.float32))
assert ("mohawkify" in sys.modules) is {knows_us}
save_file(found, "found.safetensors")
"""
LOADED_BY_US = IN_A_FRESH_PROCESS.format(
    load="from mohawkify.student.save import load_student\nload = lambda folder: load_student(Path(folder))",
    knows_us=True,
)
LOADED_BY_TRANSFORMERS = WITHOUT_MOHAWKIFY + IN_A_FRESH_PROCESS.format(
    load="from transformers import AutoModelForCausalLM\n"
    "load = lambda folder: AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)",
    knows_us=False,
)


# The processes of a group are shared by its families.
GROUPS = [
    (tuple(name for name in adapter_names() if name in REPRESENTATIVES), []),
    (tuple(name for name in adapter_names() if name not in REPRESENTATIVES), pytest.mark.full),
]
each_family_of_a_group = pytest.mark.parametrize(
    ("everything", "family"),
    [pytest.param(group, name, id=name, marks=marks) for group, marks in GROUPS for name in group],
    indirect=["everything"],
    scope="module",
)


@dataclass
class Made:
    """What was written of one family's student, which keeps the attention of layer 0.

    Args:
        student: the student in memory.
        folders: where its final, its float32 and its bfloat16 export lie.
        results: what both exports said of themselves.
    """

    student: PreTrainedModel
    folders: dict[str, Path]
    results: dict[str, dict[str, Any]]

    def expected(self) -> tuple[Tensor, Tensor]:
        """Logits and greedy text of the student in memory."""
        student: Any = self.student
        with torch.no_grad():
            logits = student(PROMPT).logits
        return logits, student.generate(PROMPT, max_new_tokens=8, do_sample=False, pad_token_id=0)


@pytest.fixture(scope="module")
def everything(request, tmp_path_factory) -> dict[str, Made]:
    made = {}
    for family in request.param:
        run = tmp_path_factory.mktemp(family)
        student = finished_run(run, family, keep=(0,), **SIZES)
        folders, results = {"final": run / "final"}, {}
        for dtype in ("float32", "bfloat16"):
            folders[dtype] = run / dtype
            results[dtype] = export_run(run, "hf", folders[dtype], dtype=dtype, report=lambda line: None)
        made[family] = Made(student, folders, results)
    return made


def computed(code: str, everything: dict[str, Made], folder: Path, *kinds: str) -> dict[str, Tensor]:
    folders = {f"{family}.{kind}": str(made.folders[kind]) for family, made in everything.items() for kind in kinds}
    run_python(code, folder, json.dumps(folders), json.dumps(PROMPT.tolist()))
    return load_file(folder / "found.safetensors")


@pytest.fixture(scope="module")
def by_us(everything, tmp_path_factory) -> dict[str, Tensor]:
    return computed(LOADED_BY_US, everything, tmp_path_factory.mktemp("by-us"), "final")


@pytest.fixture(scope="module")
def by_transformers(everything, tmp_path_factory) -> dict[str, Tensor]:
    folder = tmp_path_factory.mktemp("by-transformers")
    return computed(LOADED_BY_TRANSFORMERS, everything, folder, "float32", "bfloat16")


@each_family_of_a_group
def test_a_saved_student_computes_the_same_in_a_fresh_process(everything, by_us, family):
    logits, greedy = everything[family].expected()
    assert torch.equal(by_us[f"{family}.final.logits"], logits)
    assert torch.equal(by_us[f"{family}.final.greedy"], greedy)


@each_family_of_a_group
def test_an_export_computes_the_same_where_mohawkify_is_absent(everything, by_transformers, family):
    logits, greedy = everything[family].expected()
    assert everything[family].results["float32"]["max_logit_difference"] == 0.0
    assert torch.equal(by_transformers[f"{family}.float32.logits"], logits)
    assert torch.equal(by_transformers[f"{family}.float32.greedy"], greedy)


@each_family_of_a_group
def test_a_bf16_export_is_near_and_only_its_mixers_keep_float32(everything, by_transformers, family):
    made = everything[family]
    assert 0 < made.results["bfloat16"]["kl"] < 0.03
    weights = load_file(made.folders["bfloat16"] / "model.safetensors")
    in_float32 = {name for name, weight in weights.items() if weight.dtype == torch.float32}
    mixers = {id(parameter) for mixer in mixers_of(made.student).values() for parameter in mixer.parameters()}
    own = {name for name, parameter in made.student.named_parameters() if id(parameter) in mixers}
    assert in_float32 == {name for name in own if is_precise(name, PRECISE)}
    assert len(in_float32) == len(PRECISE) + 6  # weights and biases of three convolutions and the decay
    assert by_transformers[f"{family}.bfloat16.precise"] == sum(weights[name].numel() for name in in_float32)
    ours: Any = load_student(made.folders["bfloat16"], torch.bfloat16)
    with torch.no_grad():
        logits = ours(PROMPT).logits.float()
    assert torch.isfinite(logits).all()
    assert_close("logits", by_transformers[f"{family}.bfloat16.logits"], logits, TOLERANCE[torch.bfloat16])
    greedy = by_transformers[f"{family}.bfloat16.greedy"]
    assert torch.equal(greedy[:, : PROMPT.shape[1]], PROMPT)
    assert greedy.shape[1] > PROMPT.shape[1]
