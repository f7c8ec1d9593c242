"""Tokens without a row in the embedding: of no consequence until a text brings one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AddedToken

from mohawkify.errors import INPUT, DataError, TeacherError
from mohawkify.families.registry import adapter_names
from mohawkify.teacher.resolve import resolve_teacher
from mohawkify.teacher.second import require_same_vocabulary
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
