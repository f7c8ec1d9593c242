"""Saving, loading and exporting a student for transformers, with and without mohawkify."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from mohawkify.errors import CheckpointError, ExportError, UsageError
from mohawkify.exporters import export
from mohawkify.exporters.card import model_card
from mohawkify.exporters.export import export_run
from mohawkify.families.registry import load_adapter
from mohawkify.mixers.mamba2 import DiscreteMamba2
from mohawkify.run.folder import RunFolder
from mohawkify.student.save import is_precise, load_student, register_family, save_student
from tests.bytes_tokenizer import bytes_tokenizer
from tests.close import assert_close
from tests.finished import WITHOUT_MOHAWKIFY, answer, finished_run, run_python, tiny_student

PRECISE = DiscreteMamba2.precise_parameters
PROMPT = torch.randint(3, 256, (1, 21), generator=torch.Generator().manual_seed(3))

USE_STUDENT = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
torch.set_num_threads(1)
trust = {trust}
found = {{}}
for folder in json.loads(sys.argv[1]):
    model = AutoModelForCausalLM.from_pretrained(folder, **trust)
    tokenizer = AutoTokenizer.from_pretrained(folder, **trust)
    ids = torch.tensor(json.loads(sys.argv[2]))
    settings = dict(max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=257)
    def write(ids, **more):
        return model.generate(ids, **settings, **more)[:, ids.shape[1]:].tolist()
    short = ids[:, 6:]
    padded = torch.cat([ids, torch.nn.functional.pad(short, (6, 0), value=257)])
    mask = torch.ones_like(padded); mask[1, :6] = 0
    text = pipeline("text-generation", model=folder, **trust)(
        "Once upon a time", max_new_tokens=8, do_sample=False, return_full_text=False)[0]["generated_text"]
    prompt = tokenizer("Once upon a time", return_tensors="pt").input_ids
    found[folder] = dict(
        logits=model(ids).logits[0, -1].tolist(),
        module=type(model).__module__,
        dtypes=sorted({{str(p.dtype) for p in model.parameters()}}),
        greedy=write(ids), uncached=write(ids, use_cache=False), chunked=write(ids, prefill_chunk_size=8),
        beam=write(ids, num_beams=3), beam_uncached=write(ids, num_beams=3, use_cache=False),
        short=write(short), batch=write(padded, attention_mask=mask),
        pipeline=text,
        direct=tokenizer.decode(model.generate(prompt, max_new_tokens=8, do_sample=False)[0, prompt.shape[1]:],
                                skip_special_tokens=True),
    )
print(json.dumps(found))
"""
TRUSTED = WITHOUT_MOHAWKIFY + USE_STUDENT.format(trust="dict(trust_remote_code=True)")
REGISTERED = "import mohawkify.auto\n" + USE_STUDENT.format(trust="{}")

CASES = {
    "llama": {"family": "llama", "tie_word_embeddings": False},
    "llama-hybrid": {"family": "llama", "keep": {"layers": (1,), "heads": ((0, 1), (2, 0), (2, 3)), "window": 16}},
    "qwen2-hybrid": {"family": "qwen2", "keep": (0, 1)},  # layer 1 looks through a window of 5 tokens
    "qwen3": {"family": "qwen3"},
    "mamba2-hybrid": {"family": "qwen2", "keep": (0,), "mixer": "mamba2"},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run and its student."""
    folder = tmp_path_factory.mktemp("run")
    return folder, finished_run(folder)


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Float32 exports of every case, beside their students."""
    made = {}
    for name, case in CASES.items():
        folder = tmp_path_factory.mktemp(name)
        student = finished_run(folder, **case)
        result = export_run(folder, "hf", folder / "out", dtype="float32", report=lambda line: None)
        assert result["max_logit_difference"] == 0.0
        made[str(folder / "out")] = student
    return made


def foreign_use(code, exports, folder):
    return answer(run_python(code, folder, json.dumps(list(exports)), json.dumps(PROMPT.tolist())))


@pytest.fixture(scope="module")
def bf16_export(run, tmp_path_factory):
    """A bfloat16 export and what was measured of it."""
    folder = tmp_path_factory.mktemp("bf16") / "out"
    return folder, export_run(run[0], "hf", folder, report=lambda line: None)


@pytest.mark.full
@pytest.mark.parametrize(("code", "module"), [(TRUSTED, "transformers_modules"), (REGISTERED, "mohawkify")])
def test_transformers_uses_an_export_in_a_fresh_process(exports, bf16_export, tmp_path, code, module):
    answers = foreign_use(code, [*exports, str(bf16_export[0])], tmp_path)
    in_bf16 = answers.pop(str(bf16_export[0]))
    assert in_bf16["dtypes"] == ["torch.bfloat16", "torch.float32"]
    assert len(in_bf16["greedy"][0]) == len(in_bf16["beam"][0]) == 12
    for folder, found in answers.items():
        with torch.no_grad():
            expected = exports[folder](PROMPT).logits[0, -1]
        assert_close(folder, torch.tensor(found["logits"]), expected)
        assert found["module"].startswith(module)
        assert found["greedy"] == found["uncached"] == found["chunked"]
        assert found["beam"] == found["beam_uncached"]
        assert found["batch"] == found["greedy"] + found["short"]
        assert found["pipeline"] == found["direct"] != ""


LOAD_STUDENT = (
    WITHOUT_MOHAWKIFY
    + """
import json, torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
print(json.dumps(model(torch.tensor(json.loads(sys.argv[2]))).logits[0, -1].tolist()))
"""
)


@pytest.mark.full
def test_a_student_saved_by_transformers_still_brings_its_code(run, tmp_path):
    folder, student = run
    register_family(load_adapter("llama"))
    again = AutoModelForCausalLM.from_pretrained(folder / "final")
    again.save_pretrained(tmp_path / "again")
    found = answer(run_python(LOAD_STUDENT, tmp_path, str(tmp_path / "again"), json.dumps(PROMPT.tolist())))
    with torch.no_grad():
        assert_close("logits", torch.tensor(found), student(PROMPT).logits[0, -1])


def test_a_bf16_export_keeps_its_precise_parameters_in_float32(bf16_export):
    folder, result = bf16_export
    assert result["dtype"] == "bfloat16"
    assert 0 < result["kl"] < 0.01
    assert result["bytes"] == sum(f.stat().st_size for f in folder.iterdir() if f.name != "manifest.json")
    weights = load_file(folder / "model.safetensors")
    in_float32 = {name for name, weight in weights.items() if weight.dtype == torch.float32}
    assert in_float32 == {name for name in weights if is_precise(name, PRECISE)} != set()


def test_is_precise_names_the_decay_the_convolutions_and_the_small_vectors(run):
    _, student = run
    prefix = "model.layers.0.self_attn."
    precise = {
        name.removeprefix(prefix)
        for name, _ in student.named_parameters()
        if is_precise(name, PRECISE) and prefix in name
    }
    assert precise == {
        "decay_proj.weight", "decay_proj.bias", "d", "z_bias", "x_conv.weight", "x_conv.bias", "b_conv.weight",
        "b_conv.bias", "c_conv.weight", "c_conv.bias",
    }  # fmt: skip


def test_saving_in_bf16_leaves_the_callers_student_alone(tmp_path):
    student, _ = tiny_student("llama", tmp_path / "teacher")
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    (tmp_path / "saved").mkdir()
    save_student(student, bytes_tokenizer(), tmp_path / "saved", torch.bfloat16)
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
    assert getattr(student.config, "auto_map", None) is None
    assert student.config.dtype != torch.bfloat16


def test_a_saved_student_loads_with_equal_logits_and_tokenizer(run):
    folder, student = run
    loaded = load_student(folder / "final")
    assert torch.equal(loaded(PROMPT).logits, student(PROMPT).logits)
    assert loaded.config.mixer == student.config.mixer
    tokenizer = AutoTokenizer.from_pretrained(folder / "final")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "user: hi\n"


def test_the_code_in_the_folder_is_ours_but_for_its_imports(run):
    folder, _ = run
    from mohawkify.mixers import mamba2

    original = Path(mamba2.__file__).read_text().splitlines()
    carried = (folder / "final" / "mamba2.py").read_text().splitlines()
    changed = [(a, b) for a, b in zip(original, carried, strict=True) if a != b]
    assert changed == [
        (
            "from mohawkify.mixers.mixer import Mixer, MixerConfig, PreciseLinear, StateSpec, register_mixer",
            "from .mixer import Mixer, MixerConfig, PreciseLinear, StateSpec, register_mixer",
        ),
        ("from mohawkify.ops.constants import scan_chunk_length", "from .constants import scan_chunk_length"),
        ("from mohawkify.ops.conv import causal_conv", "from .conv import causal_conv"),
        ("from mohawkify.ops.decode import decode_step", "from .decode import decode_step"),
        ("from mohawkify.ops.scan import MixingMatrix, scan_chunked", "from .scan import MixingMatrix, scan_chunked"),
    ]
    for file in (folder / "final").glob("*.py"):
        assert "import mohawkify" not in file.read_text()
        assert "from mohawkify" not in file.read_text()


def test_the_model_file_imports_every_other_file_itself(run):
    final = run[0] / "final"
    imported = re.findall(r"^from \.(\w+) import", (final / "modeling_mohawk.py").read_text(), re.MULTILINE)
    assert set(imported) == {file.stem for file in final.glob("*.py")} - {"modeling_mohawk"}


def test_a_teachers_odd_sampling_settings_do_not_stop_saving(tmp_path):
    student, _ = tiny_student("llama", tmp_path / "teacher")
    student.generation_config = GenerationConfig(do_sample=False, temperature=0.6, eos_token_id=[256, 257])
    (tmp_path / "saved").mkdir()
    save_student(student, bytes_tokenizer(), tmp_path / "saved")
    assert load_student(tmp_path / "saved").generation_config.eos_token_id == [256, 257]


@pytest.fixture
def damaged(run, tmp_path):
    """A copy of a saved student to damage: its folder and its tensors."""
    shutil.copytree(run[0] / "final", tmp_path / "final")
    return tmp_path / "final", load_file(tmp_path / "final" / "model.safetensors")


def test_missing_unexpected_and_misshapen_tensors_are_refused(damaged):
    folder, weights = damaged
    name = "model.layers.1.self_attn.decay_proj.weight"
    for change, message in (
        ({k: v for k, v in weights.items() if k != name}, f"lacks tensor {name}"),
        ({**weights, "extra.weight": torch.zeros(2)}, "has an unexpected tensor extra.weight"),
        ({**weights, name: torch.zeros(3, 3)}, f"has a wrong shape for tensor {name}"),
    ):
        save_file(change, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=message):
            load_student(folder)


def test_truncated_weights_and_foreign_models_are_refused(damaged):
    folder, _ = damaged
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="could not be loaded"):
        load_student(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match="found a model of type 'llama'"):
        load_student(folder)


def test_exports_name_no_path_of_this_machine(run, tmp_path):
    folder, _ = run
    export_run(folder, "hf", tmp_path / "out", report=lambda line: None)
    for file in (tmp_path / "out").iterdir():
        data = file.read_bytes()
        for path in (str(folder.parent), str(tmp_path), str(Path.home()), str(Path.cwd())):
            assert path.encode() not in data, f"{file.name} holds {path}"


RESULT = {
    "dtype": "bfloat16", "kl": 0.0, "top1": 0.9, "max_logit_difference": 0.5, "tokens": 640, "run_perplexity": 12.5,
    "text": "held-out text",
    "perplexity": 13.0, "dtypes": {"BF16": {"tensors": 3, "elements": 1234}}, "plain": [],
}  # fmt: skip


def test_the_card_shows_the_measured_quality_and_the_teachers_folder_name(run):
    folder, _ = run
    card = model_card(RunFolder(folder), "mlx", 4, {**RESULT, "kl": 0.0123, "plain": ["a.b"]})
    assert "made from teacher-folder with mohawkify: attention in 3 layers" in card
    assert "| after init | 1,000 | 12.500 | 0.2500 | 0.7500 |" in card
    assert "KL 0.012 nats per token" in card
    assert "neither 64 nor 32 divides their width: a.b" in card
    assert "perplexity 12.5 of the run, 13 of this export" in card
    assert "- 3 tensors of BF16: 1,234 values" in card
    assert "base_model" not in card


def test_a_hub_teacher_becomes_the_cards_base_model(run, tmp_path):
    shutil.copytree(run[0], tmp_path / "run")
    (tmp_path / "run" / "teacher.json").write_text(
        '{"source": "meta-llama/Llama-3.2-1B", "folder": "cache", "files": {}}'
    )
    card = model_card(RunFolder(tmp_path / "run"), "transformers", None, RESULT)
    assert "base_model: meta-llama/Llama-3.2-1B" in card


def test_bad_requests_are_refused_and_write_nothing(run, tmp_path):
    folder, _ = run
    used = tmp_path / "used"
    used.mkdir()
    (used / "precious.txt").write_text("mine")
    with pytest.raises(ExportError, match="is not empty") as refusal:
        export_run(folder, "hf", used, report=lambda line: None)
    assert refusal.value.hint
    with pytest.raises(UsageError, match="did you mean mlx-q4"):
        export_run(folder, "mlxq4", tmp_path / "out", report=lambda line: None)
    with pytest.raises(UsageError, match="expected one of bfloat16, float32"):
        export_run(folder, "hf", tmp_path / "out", dtype="int8", report=lambda line: None)
    with pytest.raises(UsageError, match="not a finished run"):
        export_run(used, "hf", tmp_path / "out", report=lambda line: None)
    assert [path.name for path in tmp_path.rglob("*")] == ["used", "precious.txt"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_export_leaves_nothing(run, tmp_path, monkeypatch, error):
    def stop(*arguments):
        raise error

    monkeypatch.setattr(export, "compare", stop)
    with pytest.raises(BaseException):  # noqa: B017, PT011 - the disk's error arrives as a StorageError
        export_run(run[0], "hf", tmp_path / "out", report=lambda line: None)
    assert list(tmp_path.iterdir()) == []
