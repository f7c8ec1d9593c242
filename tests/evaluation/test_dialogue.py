"""Conversations: a turn reads what is new alone, and its state is that of the whole text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mohawkify.errors import DataError, MohawkifyError, UsageError
from mohawkify.evaluation.dialogue import Dialogue
from mohawkify.evaluation.generation import GenerateOptions
from tests.bytes_tokenizer import bytes_tokenizer
from tests.close import assert_close
from tests.finished import CHATML, tiny_student

# Writes earlier answers in capitals, as others leave out thoughts: what was written is no longer in the text.
REWRITING = CHATML.replace("m.content }}", "m.content | upper if m.role == 'assistant' else m.content }}")
NEW = "<s>user\nIs it?</s>\n<s>assistant\n"  # tokens of a second message: a byte each, but the marks
HASH = "0" * 64
SHORT = GenerateOptions(max_tokens=9)


def dialogue(folder: Path, keep: tuple[int, ...] = (), template: str | None = CHATML, **more: Any) -> Dialogue:
    student, _ = tiny_student("llama", folder / "teacher", keep)
    return Dialogue(student, bytes_tokenizer(chat_template=template), HASH, more.pop("options", SHORT), **more)


def num_tokens(text: str) -> int:
    return len(bytes_tokenizer()(text, add_special_tokens=False).input_ids)


def counted(talk: Dialogue) -> list[int]:
    """The tokens of every forward pass from now on."""
    counts: list[int] = []
    embedding: Any = talk._model.get_input_embeddings()
    embedding.register_forward_hook(lambda module, args, out: counts.append(args[0].shape[1]))
    return counts


def require_whole_state(talk: Dialogue) -> None:
    """The memory is that of all tokens of the conversation, read at once."""
    read, model = talk._after, talk._model
    assert len(read.ids) - 1 <= read.num_read <= len(read.ids)
    ids = torch.tensor([[*read.ids[: read.num_read], 65]])
    with torch.no_grad():
        assert_close(
            "logits",
            model(ids[:, -1:], past_key_values=read.cache).logits[:, 0],
            model(ids, use_cache=False).logits[:, -1],
        )


@pytest.mark.parametrize("keep", [(), (1,)])
def test_a_turn_reads_what_is_new_alone(tmp_path, keep):
    talk = dialogue(tmp_path, keep, system="Be brief.")
    first = talk.reply("The cat sat on the mat. " * 5)
    counts = counted(talk)
    written = len(talk._after.ids) - talk._after.num_read
    talk.reply("Is it?")
    read = sum(counts) - SHORT.max_tokens + 1  # without those of its answer, the last of which is not read
    assert read == written + num_tokens("</s>\n" + NEW)
    assert [message["role"] for message in talk.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert talk.messages[2]["content"] == first
    require_whole_state(talk)


def test_a_turn_goes_on_from_before_the_answer_where_the_template_writes_it_in_another_way(tmp_path):
    talk = dialogue(tmp_path, template=REWRITING)
    answer = talk.reply("The cat sat on the mat. " * 5)
    counts = counted(talk)
    talk.reply("Is it?")
    assert sum(counts) - SHORT.max_tokens + 1 <= 1 + num_tokens(answer.upper() + "</s>\n" + NEW)
    assert answer.upper() in talk._after.text
    require_whole_state(talk)


def test_forgetting_leaves_the_instructions(tmp_path):
    talk = dialogue(tmp_path, system="Be brief.")
    first = talk.reply("Hello")
    talk.reply("And you?")
    talk.reset()
    assert talk.messages == [{"role": "system", "content": "Be brief."}]
    assert talk.reply("Hello") == first


@pytest.mark.parametrize("keep", [(), (1,)])
def test_a_saved_conversation_goes_on_as_if_it_had_not_stopped(tmp_path, keep):
    talk = dialogue(tmp_path, keep)
    with pytest.raises(UsageError, match="the conversation is empty"):
        talk.save(tmp_path / "state")
    talk.reply("Hello")
    talk.save(tmp_path / "state")
    options = GenerateOptions(max_tokens=9, load_state=tmp_path / "state")
    later = dialogue(tmp_path / "later", keep, options=options)
    counts = counted(later)
    assert later.reply("Is it?") == talk.reply("Is it?")
    assert sum(counts) < num_tokens(later._after.text) - num_tokens("<s>user\nHello</s>\n")
    assert later.messages == talk.messages
    with pytest.raises(UsageError, match="a saved state and a system prompt"):
        dialogue(tmp_path / "again", keep, options=options, system="Be brief.")


def test_an_answer_can_be_stopped_between_two_tokens(tmp_path):
    talk = dialogue(tmp_path, options=GenerateOptions(max_tokens=500))
    asked: list[int] = []
    talk.reply("Hello", is_stopped=lambda: asked.append(0) or len(asked) == 7)
    assert len(asked) == 7
    talk.reply("Go on", is_stopped=lambda: True)
    require_whole_state(talk)


@pytest.mark.parametrize(
    ("template", "text", "says"),
    [
        (None, "", "has no chat template"),
        ("{{ raise_exception('no system here') }}", "Hello", "refuses the conversation: no system here"),
        (CHATML, "h\udce9llo", "half of a surrogate pair"),
    ],
)
def test_what_cannot_be_answered_is_refused(tmp_path, template, text, says):
    with pytest.raises(MohawkifyError, match=says):
        dialogue(tmp_path, template=template).reply(text)


def test_a_conversation_stays_as_it_was_after_a_refusal(tmp_path):
    talk = dialogue(tmp_path)
    talk.reply("Hello")
    before = list(talk.messages)
    talk._tokenizer.chat_template = "{{ raise_exception('enough') }}"
    with pytest.raises(DataError, match="enough"):
        talk.reply("Is it?")
    talk._tokenizer.chat_template = CHATML
    assert talk.messages == before
    talk.reply("Is it?")
    require_whole_state(talk)
