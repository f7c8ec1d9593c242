"""A teacher is what it claims to be, or the command refuses it in seconds with one line and leaves nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mohawkify.errors import INPUT, RECIPE, TeacherError
from mohawkify.families.registry import adapter_names
from mohawkify.files.atomic import read_json, remove_directory, write_json
from mohawkify.files.safetensors_headers import read_tensors, require_own_files
from mohawkify.teacher.resolve import read_config
from mohawkify.teacher.validate import require_config
from tests.commands import copy_of, make_recipe, make_teacher, run, run_well
from tests.files.faults import content_of
from tests.teacher.damage import (
    EMBEDDING,
    HEAD,
    INDEX,
    NORM,
    SHARDS,
    WEIGHTS,
    Damage,
    config,
    duplicate,
    half,
    header,
    link_out,
    outside_tokenizer,
    raw,
    set_tensor,
    sharded,
    shift_ids,
    swap_ids,
    tokenizer,
    tokenizer_config,
    twice_in_the_header,
    weights,
)

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
SECONDS = 5
STEPS = {"orient": 64, "align": 0, "distill": 64}
SHORT = (
    *("convert", "tiny-llama", "--recipe", "tiny.yaml", "--output", "out"),
    *(part for stage, tokens in STEPS.items() for part in ("--set", f"stages.{stage}.tokens={tokens}")),
)


@pytest.fixture(scope="module")
def whole_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny teacher with nothing wrong; tests damage copies."""
    teacher = make_teacher(tmp_path_factory.mktemp("material") / "tiny-llama", tie_word_embeddings=False)
    run("inspect", teacher)  # loads the libraries, which the tests' clocks shall not count
    return teacher


@pytest.fixture
def teacher(whole_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the teacher in the current folder, a recipe beside it."""
    monkeypatch.chdir(tmp_path)
    make_recipe(tmp_path)
    return copy_of(whole_teacher, tmp_path / "tiny-llama")


def refused(code: int, says: str, teacher: str = "tiny-llama") -> list[str]:
    """Convert a teacher, which must be refused with one clean line at once; nothing may be left behind.

    `doctor` must say the same of it.
    """
    before = content_of(Path.cwd())
    began = time.perf_counter()
    result = run("convert", teacher, "--recipe", "tiny.yaml", "--output", "out")
    assert time.perf_counter() - began < SECONDS
    lines = [line for line in result.stderr.splitlines() if line.startswith(("error: ", "hint: "))]
    assert result.exit_code == code, result.stderr
    assert [line.split(":")[0] for line in lines] in (["error"], ["error", "hint"])
    assert says in lines[0]
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    doctor = run("doctor", teacher, "--json")
    assert doctor.exit_code == INPUT, "doctor calls sound what is refused"
    if "not finite" not in says:  # the one finds the tensor in its file, the other the parameter
        assert lines[0].removeprefix("error: ") in [check["error"] for check in json.loads(doctor.stdout)["checks"]]
    assert content_of(Path.cwd()) == before
    return lines


def converted() -> None:
    """Convert the teacher, which must work; `doctor` must say so too."""
    run_well(*SHORT)
    run_well("doctor", "tiny-llama")


DAMAGED = "damaged or truncated"
DAMAGES: dict[str, tuple[Damage, str]] = {
    "missing tensor": (weights(lambda t: t.pop(NORM)), f"lacks tensor {NORM}"),
    "missing embedding": (weights(lambda t: t.pop(EMBEDDING)), f"lacks tensor {EMBEDDING}"),
    "missing layer": (
        weights(lambda t: [t.pop(name) for name in list(t) if ".layers.2." in name]),
        "lacks tensor model.layers.2.",
    ),
    "extra tensor": (weights(lambda t: t.update({"stray": torch.ones(1)})), "unexpected tensor stray"),
    "extra layer": (
        weights(lambda t: t.update({k.replace(".2.", ".3."): v.clone() for k, v in t.items() if ".layers.2." in k})),
        "unexpected tensor model.layers.3.",
    ),
    "misshapen tensor": (weights(lambda t: t.update({NORM: torch.ones(3)})), f"wrong shape for tensor {NORM}"),
    "turned tensor": (
        weights(lambda t: t.update({EMBEDDING: t[EMBEDDING].T.contiguous()})),
        f"wrong shape for tensor {EMBEDDING}",
    ),
    "nan": (weights(lambda t: t[NORM].view(-1)[3:4].fill_(torch.nan)), f"not finite in {NORM}"),
    "infinity": (weights(lambda t: t[HEAD].view(-1)[-1:].fill_(-torch.inf)), f"not finite in {HEAD}"),
    "beyond float32": (
        weights(lambda t: t.update({NORM: t[NORM].double().fill_(1e300)})),
        f"not finite in {NORM}",
    ),
    "tied, with a head of its own": (config(tie_word_embeddings=True), "(tie_word_embeddings true), but lm_head"),
    "tied, with a head of another dtype": (
        lambda folder: [config(tie_word_embeddings=True)(folder), weights(lambda t: t.update({HEAD: t[HEAD].half()}))],
        "(tie_word_embeddings true), but lm_head",
    ),
    "not tied, without a head": (weights(lambda t: t.pop(HEAD)), "(tie_word_embeddings false), but the weights lack"),
    "integers": (weights(lambda t: t.update({NORM: t[NORM].to(torch.int32)})), f"tensor {NORM} as I32"),
    "bytes": (weights(lambda t: t.update({HEAD: t[HEAD].to(torch.uint8)})), f"tensor {HEAD} as U8"),
    "float8": (
        weights(lambda t: t.update({HEAD: t[HEAD].to(torch.float8_e4m3fn)})),
        f"tensor '{HEAD}' as 'F8_E4M3'",
    ),
    "complex": (weights(lambda t: t.update({NORM: t[NORM].to(torch.complex64)})), "as 'C64'"),
    "unknown dtype": (header(lambda h: set_tensor(h, dtype="Q4")), "as 'Q4'"),
    "half as many numbers": (half, "the weights hold"),
    # files
    "empty": (raw(WEIGHTS, lambda data: b""), "is empty"),
    "pointer": (raw(WEIGHTS, lambda data: POINTER), "is a git-lfs pointer"),
    "truncated": (raw(WEIGHTS, lambda data: data[:-1000]), DAMAGED),
    "longer": (raw(WEIGHTS, lambda data: data + b"\0"), DAMAGED),
    "only a length": (raw(WEIGHTS, lambda data: data[:8]), DAMAGED),
    "half a length": (raw(WEIGHTS, lambda data: data[:3]), DAMAGED),
    "header beyond the file": (raw(WEIGHTS, lambda data: struct.pack("<Q", len(data)) + data[8:]), "header claims"),
    "header of 2^63": (raw(WEIGHTS, lambda data: struct.pack("<Q", 1 << 63) + data[8:]), "header claims"),
    "header of 11 MB": (
        raw(WEIGHTS, lambda data: struct.pack("<Q", 11_000_000) + b" " * 11_000_100),
        "a header of 11,000,000 bytes",
    ),
    "header is a list": (raw(WEIGHTS, lambda data: struct.pack("<Q", 2) + b"[]"), "no JSON object"),
    "header is nested": (raw(WEIGHTS, lambda data: struct.pack("<Q", 90_000) + b"[" * 90_000), DAMAGED),
    "header is no text": (raw(WEIGHTS, lambda data: struct.pack("<Q", 4) + b"\xff" * 4), DAMAGED),
    "tensor twice in a header": (twice_in_the_header, "appears twice"),
    "tensors overlap": (header(lambda h: set_tensor(h, data_offsets=h[HEAD]["data_offsets"])), DAMAGED),
    "tensor beyond the file": (header(lambda h: set_tensor(h, data_offsets=[1 << 40, (1 << 40) + 128])), DAMAGED),
    "negative offset": (header(lambda h: set_tensor(h, data_offsets=[-128, 0])), "has no shape or offsets"),
    "negative size": (header(lambda h: set_tensor(h, shape=[-32])), "has no shape or offsets"),
    "absurd size": (header(lambda h: set_tensor(h, shape=[1 << 62, 1 << 62])), "which do not fit its shape"),
    "no shape": (header(lambda h: h[NORM].pop("shape")), "is incomplete"),
    "shape of text": (header(lambda h: set_tensor(h, shape="32")), "has no shape or offsets"),
    # shards
    "tensor in two shards": (sharded(duplicate), "lies in two files"),
    "shard not in the index": (
        sharded(lambda folder: save_file({"x": torch.ones(1)}, folder / "model-00003-of-00003.safetensors")),
        "is not listed",
    ),
    "single file beside an index": (
        sharded(lambda folder: save_file({"x": torch.ones(1)}, folder / WEIGHTS)),
        "is not listed",
    ),
    "missing shard": (sharded(lambda folder: (folder / SHARDS[1]).unlink()), "is missing"),
    "shard is a folder": (
        sharded(lambda folder: [(folder / SHARDS[1]).unlink(), (folder / SHARDS[1]).mkdir()]),
        "is missing",
    ),
    "empty shard": (sharded(raw(SHARDS[1], lambda data: b"")), "is empty"),
    "pointer as a shard": (sharded(raw(SHARDS[0], lambda data: POINTER)), "is a git-lfs pointer"),
    "pointer as the index": (sharded(raw(INDEX, lambda data: data)), "is a git-lfs pointer"),
    "index entry without a tensor": (sharded(stray=SHARDS[0]), "which lacks it"),
    "index entry of the other shard": (sharded(**{NORM: SHARDS[0]}), "which lacks it"),
    "tensor not in the index": (
        sharded(
            lambda folder: save_file({**load_file(folder / SHARDS[0]), "stray": torch.ones(1)}, folder / SHARDS[0])
        ),
        "does not list",
    ),
    "index without a map": (
        lambda folder: [sharded()(folder), (folder / INDEX).write_text('{"metadata": {}, "weight_map": []}')],
        "has no weight_map",
    ),
    "index without metadata": (
        lambda folder: [sharded()(folder), raw(INDEX, lambda data: data.replace(b'"metadata"', b'"facts"'))(folder)],
        "has no metadata",
    ),
    "index is a list": (lambda folder: [sharded()(folder), (folder / INDEX).write_text("[]")], "has no weight_map"),
    "index is no JSON": (lambda folder: [sharded()(folder), (folder / INDEX).write_text("{")], "is not strict JSON"),
    # configuration
    "10^12 wide": (config(hidden_size=10**12), "hidden_size is"),
    "10^9 layers": (config(num_hidden_layers=10**9), "num_hidden_layers is"),
    "10^9 labels": (config(num_labels=10**9), "num_labels is"),
    "10^30 positions": (config(max_position_embeddings=10**30), "max_position_embeddings is"),
    "no layers": (config(num_hidden_layers=0), "expected at least 1"),
    "negative width": (config(hidden_size=-32), "expected at least 1"),
    "no heads": (config(num_attention_heads=0), "expected at least 1"),
    "a thousand times the weights": (config(intermediate_size=2**20, num_hidden_layers=100), "the weights hold"),
    "nested deep": (config(rope_scaling=json.loads('{"a":' * 30 + "1" + "}" * 30)), "is nested deeper"),
    "pointer as config": (raw("config.json", lambda data: POINTER), "is a git-lfs pointer"),
    "config of 11 MB": (raw("config.json", lambda data: data + b" " * 11_000_000), "bytes, expected a configuration"),
    "known quantisation": (config(quantization_config={"quant_method": "gptq", "bits": 4}), "quantization_config"),
    "unknown quantisation": (config(quantization_config={"quant_method": "os.system"}), "quantization_config"),
    "quantisation as text": (config(quantization_config="x" * 10_000), "tiny-llama/config.json"),
    "other weights": (config(transformers_weights="../outside.safetensors"), "transformers_weights"),
    "other weights inside": (config(transformers_weights="pytorch_model.bin"), "transformers_weights"),
    # the folder
    "weights elsewhere": (link_out(WEIGHTS), "leads out of the folder"),
    "config elsewhere": (link_out("config.json"), "leads out of the folder"),
    "tokenizer elsewhere": (link_out("tokenizer.json"), "leads out of the folder"),
    "link in a circle": (lambda folder: (folder / "a.json").symlink_to("a.json"), "leads out of the folder"),
    "templates elsewhere": (
        lambda folder: (folder / "additional_chat_templates").symlink_to(folder.parent),
        "leads out of the folder",
    ),
    "adapter beside a model": (
        lambda folder: (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "../other"}'),
        "adapter_config.json",
    ),
    "adapter alone": (
        lambda folder: [
            (folder / WEIGHTS).rename(folder / "adapter_model.safetensors"),
            (folder / "adapter_config.json").write_text("{}"),
        ],
        "adapter_config.json",
    ),
    "pickle": (lambda folder: (folder / WEIGHTS).rename(folder / "pytorch_model.bin"), "a pickle"),
    "gguf": (lambda folder: (folder / WEIGHTS).rename(folder / "model.gguf"), "GGUF only"),
    "weights are a pipe": (
        lambda folder: [(folder / WEIGHTS).unlink(), os.mkfifo(folder / WEIGHTS)],
        "holds no weights",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_teacher_that_is_not_what_it_claims(teacher: Path, damage: str) -> None:
    work, says = DAMAGES[damage]
    work(teacher)
    if damage == "pointer as the index":
        (teacher / INDEX).write_bytes(POINTER)
    lines = refused(INPUT, says)
    if "pointer" in damage:
        assert "git lfs pull" in lines[1]


TOKENIZERS: dict[str, tuple[Damage, str]] = {
    "none": (lambda folder: (folder / "tokenizer.json").unlink(), "no usable tokenizer"),
    "no JSON": (raw("tokenizer.json", lambda data: data[:-100]), DAMAGED),
    "empty": (raw("tokenizer.json", lambda data: b""), DAMAGED),
    "pointer": (raw("tokenizer.json", lambda data: POINTER), "is a git-lfs pointer"),
    "a list": (raw("tokenizer.json", lambda data: b"[]"), "expected a JSON object"),
    "no model": (tokenizer(lambda t: t.pop("model")), "no usable tokenizer"),
    "unknown model": (tokenizer(lambda t: t["model"].update(type="Oracle")), "no usable tokenizer"),
    "unknown pre-tokenizer": (tokenizer(lambda t: t["pre_tokenizer"].update(type="Oracle")), "no usable tokenizer"),
    "merge of unknown tokens": (
        tokenizer(lambda t: t["model"].update(merges=[["q\u0120", "zz"]])),
        "no usable tokenizer",
    ),
    "id beyond the vocabulary": (tokenizer(lambda t: shift_ids(t["model"]["vocab"], 1000)), "rows"),
    "negative id": (tokenizer(lambda t: shift_ids(t["model"]["vocab"], -1000)), "no usable tokenizer"),
    "two tokens with one id": (tokenizer(lambda t: shift_ids(t["model"]["vocab"], 1)), "to two tokens"),
    "token twice": (
        raw("tokenizer.json", lambda data: data.replace(b'"vocab": {', b'"vocab": {"a": 5, "a": 6, ', 1)),
        DAMAGED,
    ),
    "settings are no JSON": (raw("tokenizer_config.json", lambda data: b"{"), DAMAGED),
    "settings are a list": (raw("tokenizer_config.json", lambda data: b"[]"), "expected a JSON object"),
    "file outside by version": (
        lambda folder: tokenizer_config(fast_tokenizer_files=[f"../{outside_tokenizer(folder).name}"])(folder),
        "expected tokenizer.json alone",
    ),
    "elsewhere": (link_out("tokenizer_config.json"), "leads out of the folder"),
}


@pytest.mark.parametrize("damage", TOKENIZERS)
def test_a_tokenizer_that_does_not_belong(teacher: Path, damage: str) -> None:
    work, says = TOKENIZERS[damage]
    work(teacher)
    refused(INPUT, says)


INDEX_NAMES = [
    *("../model.safetensors", "../tiny-llama/model.safetensors", "./model.safetensors", "sub/model.safetensors"),
    *("sub/../model.safetensors", "sub/../../model.safetensors", "..", ".", "", "/", "/tmp/model.safetensors"),
    *("//server/share/model.safetensors", "\\\\server\\share\\model.safetensors", "..\\model.safetensors"),
    *("sub\\model.safetensors", "C:\\model.safetensors", "C:/model.safetensors", "C:model.safetensors"),
    *("file:///tmp/model.safetensors", "https://example.com/model.safetensors", "~/model.safetensors"),
    *("$HOME/model.safetensors", "%2e%2e/model.safetensors", "..%2fmodel.safetensors", "\0", "model.safetensors\0"),
    *("model.safetensors\0.safetensors", "model\n.safetensors", " model.safetensors", "model.safetensors "),
    *("\uff0e\uff0e/model.safetensors", "\u2025/model.safetensors", ".model.safetensors", "-model.safetensors"),
    *("\ud800.safetensors", "\x1b[2Jmodel.safetensors", "pytorch_model.bin", "model.SAFETENSORS", "/dev/zero"),
    *("/proc/self/environ", "a/" * 5000 + "model.safetensors", None, 1, True, ["model.safetensors"], {"a": "b"}),
]


@pytest.mark.parametrize("name", INDEX_NAMES, ids=lambda name: repr(name)[:40].encode("ascii", "replace").decode())
def test_an_index_that_leads_astray(teacher: Path, name: object) -> None:
    tensors = load_file(teacher / WEIGHTS)
    # The weights lie where transformers would look for them, so that only a refusal keeps them from being loaded.
    shutil.copy(teacher / WEIGHTS, teacher.parent / WEIGHTS)
    (teacher / "sub").mkdir()
    shutil.copy(teacher / WEIGHTS, teacher / "sub" / WEIGHTS)
    (teacher / WEIGHTS).unlink()
    (teacher / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, name)}))
    refused(INPUT, "expected a .safetensors file inside the folder")


def fake_types() -> Iterator[str]:
    """Fifty names that no family has."""
    yield from (
        "../../etc/passwd",
        "../adapters/llama",
        "/etc/passwd",
        "./llama",
        "adapters/llama",
        "llama/",
        "llama.py",
    )
    yield from ("os", "os.path", "os.system", "mohawkify.adapters.llama", "adapters.llama", "..llama", ".", "..", "")
    yield from (
        "subprocess",
        "antigravity",
        "this",
        "__init__",
        "__main__",
        "_private",
        "llama.ADAPTER",
        "llama:ADAPTER",
    )
    yield from ("Llama", "LLAMA", " llama", "llama ", "llama\n", "llama\0", "ll\u0430ma", "\uff4clama", "llama\u200b")
    yield from ("\U0001f999", "\u202elama", "\ud800", "\x1b[31mllama", "ll-ama", "llama;qwen2", "llama,qwen2", "lama")
    yield from ("qwen", "C:\\llama", "%6c%6cama", "$HOME", "!!python/name:os.system", "{{7*7}}", "a" * 10_000)
    yield from ("../" * 3333, "llama" * 2000)


def test_fifty_unknown_families(teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = list(fake_types())
    assert len(names) == len(set(names)) >= 50
    config(model_type="nothing")(teacher)
    refused(RECIPE, "mohawkify families")
    looked_for: list[str] = []

    class Listener:
        def find_spec(self, name: str, path: object = None, target: object = None) -> None:
            looked_for.append(name)

    monkeypatch.setattr(sys, "meta_path", [Listener(), *sys.meta_path])
    for name in names:
        config(model_type=name)(teacher)
        (line, *_) = refused(RECIPE, f"expected one of the {len(adapter_names())} that `mohawkify families` lists")
        assert line.isprintable()
        assert len(line) < 400
        if name in ("lama", "Llama", "ll-ama", "llama "):
            assert "did you mean llama?" in line
    assert looked_for == []


@pytest.mark.parametrize("value", [None, 5, ["llama"], {"llama": 1}, True])
def test_a_family_that_is_no_name(teacher: Path, value: object) -> None:
    config(model_type=value)(teacher)
    refused(INPUT, "has no model_type")


def test_whole_teachers_pass(teacher: Path, tmp_path: Path) -> None:
    """What published teachers have, and what looks odd but is fine."""
    names = set(read_tensors(teacher))
    sharded()(teacher)
    for extra in ("consolidated.safetensors", "vision.safetensors"):  # some models lie there in two formats
        save_file({"tok_embeddings.weight": torch.ones(1)}, teacher / extra)
    assert set(read_tensors(teacher)) == names
    tokenizer_config(tokenizer_file="/home/somebody/tokenizer.json", special_tokens_map_file="/home/x.json")(teacher)
    config(_attn_implementation_internal="evil/kernel", auto_map={"AutoConfig": "evil.Config"})(teacher)
    converted()


def test_no_part_of_a_configuration_names_code(teacher: Path) -> None:
    kernel = {"_attn_implementation": "evil/kernel", "attn_implementation": "evil/kernel", "auto_map": {"A": "evil.B"}}
    config(text_config={"inner": kernel, **kernel}, rope_scaling=None, **kernel)(teacher)
    found = read_config(teacher / "config.json")[1]
    assert "text_config" in found.to_dict()
    assert "evil" not in found.to_json_string()


def test_the_cache_of_the_hub_is_links_and_works(whole_teacher: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--someone--tiny" / "snapshots" / "0123abcd"
    blobs = tmp_path / "models--someone--tiny" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(whole_teacher.iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    assert set(read_tensors(snapshot)) == set(load_file(whole_teacher / WEIGHTS))
    link = tmp_path / "link"
    link.symlink_to(snapshot)  # a folder that is reached by a link is where it leads
    require_own_files(link)
    (snapshot / "chat_template.jinja").symlink_to("../../../elsewhere")
    with pytest.raises(TeacherError, match="leads out of the folder"):
        require_own_files(snapshot)


def test_published_configurations_pass(teacher_configs: Path) -> None:
    for file in sorted(teacher_configs.glob("*.json")):
        require_config(file)


@pytest.mark.parametrize("kind", ["tied", "tied in another dtype", "padded"])
def test_tied_and_padded_teachers_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.chdir(tmp_path)
    make_recipe(tmp_path)
    changes = {"vocab_size": 320} if kind == "padded" else {"tie_word_embeddings": True}
    folder = make_teacher(tmp_path / "tiny-llama", **changes)
    if kind == "tied":  # the head may be written too, if it is the embedding
        weights(lambda t: t.update({HEAD: t[EMBEDDING].clone()}))(folder)
    elif kind == "tied in another dtype":
        weights(lambda t: t.update({EMBEDDING: t[EMBEDDING].bfloat16(), HEAD: t[EMBEDDING].bfloat16().float()}))(folder)
    converted()


def test_a_run_keeps_its_tokenizer(teacher: Path) -> None:
    """Two ids swapped, or other merges of the same number: same sizes, other text. The run remembers the files."""
    run_well(*SHORT)
    before = content_of(Path("out"))
    original = (teacher / "tokenizer.json").read_bytes()
    for change in (swap_ids, lambda content: content["model"].update(ignore_merges=True)):
        tokenizer(change)(teacher)
        result = run(*SHORT)
        assert result.exit_code == 2
        assert "holds a run with another teacher" in result.stderr
        result = run("eval", "out")
        assert result.exit_code == INPUT
        assert "tokenizer.json differs" in result.stderr
        assert content_of(Path("out")) == before
        (teacher / "tokenizer.json").write_bytes(original)
    run_well(*SHORT)


@pytest.mark.parametrize("name", ["special_tokens_map.json", "generation_config.json"])
def test_a_run_keeps_what_else_decides_how_text_is_cut(teacher: Path, name: str) -> None:
    """transformers takes special tokens from special_tokens_map.json also where tokenizer.json has others."""
    file = teacher / name
    file.write_text("{}")
    run_well(*SHORT)
    for change in (lambda: file.write_text("{ }"), file.unlink):
        change()
        result = run(*SHORT)
        assert result.exit_code == 2
        assert f"holds a run with another {name} of its teacher" in result.stderr
        result = run("eval", "out")
        assert result.exit_code == INPUT
        assert f"{name} differs" in result.stderr
        assert run("doctor", "out").exit_code == INPUT
    file.write_text("{}")
    run_well(*SHORT)


def test_a_run_that_was_begun_before_these_files_were_recorded_goes_on(teacher: Path) -> None:
    run_well(*SHORT)
    (teacher / "merges.txt").write_text("")
    facts = read_json(Path("out/teacher.json"))
    del facts["text_files"]
    write_json(Path("out/teacher.json"), facts)
    run_well(*SHORT)
    assert run("doctor", "out").exit_code == 0
    remove_directory(Path("out/final"))
    run_well(*SHORT)  # it goes on from its checkpoints, whose identity is what it was, and records them from now on
    assert read_json(Path("out/teacher.json"))["text_files"].keys() >= {"merges.txt"}
    assert run("doctor", "out").exit_code == 0
