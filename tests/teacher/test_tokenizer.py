"""A tokenizer cuts text as its tokenizer.json says; tokens without a row are of no consequence until a text has one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import AddedToken, AutoTokenizer
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from mohawkify.errors import INPUT, DataError, TeacherError
from mohawkify.families.registry import adapter_names
from mohawkify.student.save import save_tokenizer
from mohawkify.teacher.resolve import resolve_teacher
from mohawkify.teacher.tokenizer import load_tokenizer
from mohawkify.train.second_teacher import require_same_vocabulary
from tests.bytes_tokenizer import bytes_tokenizer
from tests.commands import copy_of, make_recipe, make_teacher, run, run_well
from tests.finished import tiny_student
from tests.fuzz.test_teacher_config import config_of
from tests.teacher.damage import edit_json

ROWS = 258
IMAGE = "<image_soft_token>"  # as in the published gemma-3-1b-it
SAYS = f"the text has the token '{IMAGE}' (id {ROWS}), but the model's vocabulary has {ROWS} rows"

COMMANDS = (("convert",), ("data", "prepare"), ("cache-logits", "--stage-phase", "train", "--top-k", "3"))


@pytest.fixture(scope="module")
def whole_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher whose tokenizer has two tokens behind the last row, one of them for padding."""
    folder = make_teacher(tmp_path_factory.mktemp("material") / "teacher")
    tokenizer = bytes_tokenizer()
    tokenizer.add_tokens([AddedToken(IMAGE, special=True)])
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    for name in ("config.json", "generation_config.json"):
        edit_json(folder / name, pad_token_id=ROWS)
    make_recipe(folder.parent)
    return folder


@pytest.fixture
def teacher(whole_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy in the current folder, a recipe beside it."""
    copy_of(whole_teacher.parent, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work" / "teacher"


def test_tokens_without_a_row_do_not_matter(teacher: Path) -> None:
    run_well("doctor", teacher)
    for command in COMMANDS[1:]:
        run_well(*command, teacher, "--recipe", "tiny.yaml", "--output", command[-1])
    run_well("convert", teacher, "--recipe", "tiny.yaml", "--output", "run")
    run_well("eval", "run")
    run_well("export", "run", "--target", "hf", "--output", "hf")
    run_well("generate", "run", "Once", "--teacher", "--max-tokens", "4")
    refused = run("generate", "run", f"Once {IMAGE}")
    assert refused.exit_code == INPUT
    assert SAYS in refused.stderr


@pytest.mark.parametrize("command", COMMANDS, ids="-".join)
def test_a_text_that_brings_one_is_refused(teacher: Path, command: tuple[str, ...]) -> None:
    (teacher / "text.txt").write_text(f"The cat sat.<|endoftext|>An image: {IMAGE}" + "<|endoftext|>x" * 900)
    refused = run(*command, teacher, "--recipe", "tiny.yaml", "--output", "out")
    assert refused.exit_code == INPUT
    lines = [line for line in refused.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert SAYS in lines[0]


def test_what_every_text_brings_has_a_row(teacher: Path) -> None:
    edit_json(teacher / "tokenizer_config.json", bos_token=IMAGE)
    with pytest.raises(TeacherError, match=f"bos_token '{IMAGE}' has id {ROWS}"):
        _ = resolve_teacher(str(teacher)).tokenizer
    make_teacher(Path("small"), vocab_size=97, bos_token_id=1, eos_token_id=2)
    with pytest.raises(TeacherError, match="token id 257, but the model's vocabulary has 97 rows"):
        _ = resolve_teacher("small").tokenizer


@pytest.mark.parametrize("family", adapter_names())
def test_a_padding_token_behind_the_last_row_is_none(tmp_path: Path, family: str) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**config_of(family), "pad_token_id": 97}))
    assert resolve_teacher(str(file)).config.pad_token_id is None


def test_two_teachers_may_lack_rows_for_the_same_tokens(teacher: Path) -> None:
    plain = make_teacher(Path("plain"))
    found = [resolve_teacher(str(folder)).tokens for folder in (teacher, plain)]
    require_same_vocabulary(*found, ("x", "y"))
    padded = make_teacher(Path("padded"), vocab_size=264)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (padded / name).write_bytes((teacher / name).read_bytes())
    with pytest.raises(TeacherError, match=f"id {ROWS} is '{IMAGE}' in padded and has no token in teacher"):
        require_same_vocabulary(resolve_teacher("padded").tokens, found[0], ("padded", "teacher"))


def test_questions_are_padded_by_a_token_that_has_a_row(tmp_path: Path) -> None:
    harness_model = pytest.importorskip("mohawkify.evaluation.harness_model", reason="needs the extra `eval`")
    student, _ = tiny_student("llama", tmp_path)
    tokenizer = bytes_tokenizer()
    tokenizer.add_tokens([AddedToken(IMAGE, special=True)])
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    model = harness_model.CheckedLM(student, tokenizer, 2, None)
    ids, mask = model.tok_batch_encode(["a", "longer"])
    assert ids.max() < ROWS
    assert mask.sum() < mask.numel()
    assert model.tok_encode("a")
    for encode in (model.tok_encode, lambda text: model.tok_batch_encode([text])):
        with pytest.raises(DataError, match="has the token"):
            encode(f"a {IMAGE}")


TEXTS = (
    "x=(a);\n\n  foo_bar DON'T it's 12345 \t(b).",  # a published report's
    *(
        " a",
        "  a b",
        "a ",
        "a\n b",
        "\u2581a",
        "1234 12",
        "caf\u00e9 cafe\u0301",
        "\u65e5\u672c \U0001f999",
        "<s>a </s> b",
    ),
)
CLASSES = sorted({name for key in adapter_names() if (name := TOKENIZER_MAPPING_NAMES.get(key))})


def byte_level() -> Tokenizer:
    """Every digit apart, as many models of today; GPT-2's class would take 12 as one token."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*symbols, "12", "\u0120a", "<s>", "</s>"])}
    backend = Tokenizer(BPE(vocab=vocabulary, merges=[("1", "2"), ("\u0120", "a")]))
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.decoder = decoders.ByteLevel()
    return backend


def sentence_piece() -> Tokenizer:
    """A blank in front of every text, as Llama 2 has it; transformers' class leaves it out where there is one."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "b", "\u2581a"]
    vocabulary = {token: index for index, token in enumerate(pieces)}
    merges = [("\u2581", "a")]
    backend = Tokenizer(BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return backend


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("make", [byte_level, sentence_piece])
def test_text_is_cut_as_the_file_says(tmp_path: Path, make: Any, kind: str) -> None:
    own = make()
    own.add_special_tokens(["<s>", "</s>"])
    own.save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": kind, "bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text(json.dumps(config_of("llama")))
    found = load_tokenizer(tmp_path, 300)
    save_tokenizer(found, tmp_path)
    for tokenizer in (found, load_tokenizer(tmp_path, 300), AutoTokenizer.from_pretrained(tmp_path)):
        for text in TEXTS:
            ids = own.encode(text, add_special_tokens=False).ids
            assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids, text
            assert tokenizer.decode(ids) == own.decode(ids, skip_special_tokens=False)
        assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")


def test_a_prefix_that_the_file_does_not_have_is_refused(tmp_path: Path) -> None:
    byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps(config_of("llama")))
    settings = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(
        TeacherError, match=r"add_prefix_space is True, which makes \['\u0120a'\] of 'a'.*makes \['a'\]"
    ):
        load_tokenizer(tmp_path, 300)
