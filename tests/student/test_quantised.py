"""Students under quantisers that replace linear layers: they lose no more than their teachers do."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, QuantoConfig, TorchAoConfig

import mohawkify.auto  # noqa: F401 - AutoModelForCausalLM loads students
from mohawkify.mixers.kinds import mixer_class, mixer_kinds, mixers_of
from mohawkify.recipe.loading import apply_overrides, load_recipe
from mohawkify.train.conversion import ConvertOptions
from mohawkify.train.trainer import convert
from tests.close import assert_close
from tests.finished import WITHOUT_MOHAWKIFY, answer, run_python
from tests.tiny import packed, stir, tiny_pair

BRIEF = ["stages.orient.tokens=10k", "stages.align.tokens=70k", "stages.distill.tokens=70k", "evaluation.tokens=8k"]
WORST = 1.5  # times what the same quantiser does to the teacher


class Packed(nn.Module):
    """What quantisers put in the place of a linear layer, without any loss: a weight that is no matrix of floats.

    Args:
        linear: the layer that is replaced.
        name: of the attribute that holds the bytes.
    """

    def __init__(self, linear: nn.Linear, name: str) -> None:
        super().__init__()
        self.name, self.bias = name, linear.bias
        setattr(self, name, nn.Parameter(linear.weight.detach().view(torch.uint8), requires_grad=False))

    def forward(self, hidden: Tensor) -> Tensor:
        assert hidden.is_floating_point()
        return F.linear(hidden, getattr(self, self.name).view(torch.float32), self.bias)


@torch.no_grad()
@pytest.mark.parametrize("name", ["weight", "W_q"])
@pytest.mark.parametrize("mixer", ["discrete_mamba2", "mamba2"])
def test_packed_layers_compute_the_same(mixer: str, name: str, tmp_path: Path) -> None:
    student = stir(tiny_pair("llama", tmp_path, student={"mixer": mixer, "keep": {"layers": (1,)}}).student)
    ids = packed(length=20).input_ids
    exact = student(ids).logits
    for module in list(student.modules()):
        for child, linear in list(module.named_children()):
            if isinstance(linear, nn.Linear):
                setattr(module, child, Packed(linear, name))
    assert sum(isinstance(module, Packed) for module in mixers_of(student)["model.layers.0.self_attn"].modules()) == 5
    first = student(ids[:, :15], use_cache=True)
    rest = [student(ids[:, t : t + 1], past_key_values=first.past_key_values, use_cache=True) for t in range(15, 20)]
    assert_close("logits", torch.cat([first.logits, *(one.logits for one in rest)], dim=1), exact)


@pytest.mark.parametrize("kind", mixer_kinds())
def test_no_quantiser_finds_what_must_stay_precise(kind: str) -> None:
    mixer = mixer_class(kind)
    made: Any = mixer(16, mixer.config_class(num_heads=2, head_dim=8), 0)
    for path, module in made.named_modules():
        if isinstance(module, nn.Linear):
            names = [f".{path}.{name}" for name, _ in module.named_parameters()]
            assert not any(re.search(pattern, name) for pattern in made.precise_parameters for name in names), path


def torchao(name: str) -> Callable[[], TorchAoConfig]:
    def make() -> TorchAoConfig:
        import torchao.quantization

        return TorchAoConfig(getattr(torchao.quantization, name)())

    return make


QUANTISERS: dict[str, tuple[str, Callable[[], Any]]] = {
    "int8": ("bitsandbytes", lambda: BitsAndBytesConfig(load_in_8bit=True)),
    "nf4": ("bitsandbytes", lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")),
    "fp4": ("bitsandbytes", lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4")),
    "torchao-int8": ("torchao", torchao("Int8WeightOnlyConfig")),
    "torchao-int8-activations": ("torchao", torchao("Int8DynamicActivationInt8WeightConfig")),
    "torchao-float8": ("torchao", torchao("Float8WeightOnlyConfig")),
    "quanto-int8": ("optimum.quanto", lambda: QuantoConfig(weights="int8")),
    "quanto-int4": ("optimum.quanto", lambda: QuantoConfig(weights="int4")),
}


@pytest.fixture(scope="module")
def folders(stories_teacher: Path, stories_text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """stories260k and a student of it after a minute of training."""
    run = tmp_path_factory.mktemp("quantised") / "run"
    convert(str(stories_teacher), apply_overrides(load_recipe("stories"), BRIEF), ConvertOptions(output=run))
    return stories_teacher, run / "final"


@torch.no_grad()
def log_odds(folder: Path, ids: Tensor, **options: Any) -> Tensor:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # that form takes widths of whole 32s only; this MLP has 172
    return model(ids).logits.float().log_softmax(-1)


@pytest.mark.full
@pytest.mark.parametrize("name", QUANTISERS)
def test_a_quantiser_does_no_more_to_a_student_than_to_its_teacher(
    name: str, folders: tuple[Path, Path], stories_text: Path
) -> None:
    package, options = QUANTISERS[name]
    pytest.importorskip(
        package, reason=f"needs {package.replace('.', '-')}, a quantiser of transformers", exc_type=ImportError
    )
    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    lines = (stories_text / "valid.jsonl").read_text().splitlines()
    stories = [tokenizer(json.loads(line)["text"]).input_ids[:128] for line in lines]
    ids = torch.tensor([story for story in stories if len(story) == 128][:12])
    divergence = []
    for folder in folders:
        exact, quantised = log_odds(folder, ids), log_odds(folder, ids, quantization_config=options())
        divergence.append(float((exact.exp() * (exact - quantised)).sum(-1).mean()))
    teacher, student = divergence
    assert 0 < student <= WORST * teacher, (student, teacher)


LOAD_ALONE = f"""{WITHOUT_MOHAWKIFY}
import json, torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
model = AutoModelForCausalLM.from_pretrained(
    sys.argv[1], trust_remote_code=True, dtype=torch.float32, quantization_config=BitsAndBytesConfig(load_in_8bit=True)
)
with torch.no_grad():
    print(json.dumps(model(torch.tensor(json.loads(sys.argv[2]))).logits.log_softmax(-1).tolist()))
"""


@pytest.mark.full
def test_an_exported_folder_does_the_same_alone(folders: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'mohawkify[quant]'")
    ids = torch.randint(3, 500, (1, 24), generator=torch.Generator().manual_seed(0))
    expected = log_odds(folders[1], ids, quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    alone = answer(run_python(LOAD_ALONE, tmp_path, str(folders[1]), json.dumps(ids.tolist())))
    assert_close("log odds", torch.tensor(alone), expected)
