"""Conversations: which tokens the assistant wrote, by templates in the style of several families."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mohawkify.data.corpus import Corpus
from mohawkify.data.hub import BEGINNING
from mohawkify.data.packing import packed_batch
from mohawkify.data.sources import RawRow, to_document
from mohawkify.data.tokenize_workers import encode_rows
from mohawkify.data.write_corpus import CorpusRequest, build_corpus
from mohawkify.errors import DataError
from mohawkify.recipe.schema import Source
from tests.bytes_tokenizer import bytes_tokenizer

# In the style of ChatML, Llama 3, Mistral, Phi-3, Gemma, Qwen3 and Vicuna: made for these tests.
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|header|>{{ m.role }}<|/header|>\n\n{{ m.content | trim }}<|eot|>"
    "{% endfor %}{% if add_generation_prompt %}<|header|>assistant<|/header|>\n\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<turn>' + role + '\n' + m.content | trim + '</turn>\n' }}{% endfor %}"
)
QWEN3 = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content.lstrip('\n') + '<|im_end|>\n' }}{% endfor %}"
)
VICUNA = (
    "{% for m in messages %}{{ {'system': '', 'user': 'USER: ', 'assistant': 'ASSISTANT: '}[m.role] + m.content }}"
    "{{ eos_token if m.role == 'assistant' else ' ' }}{% endfor %}"
)
PLAIN = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n\n' }}{% endfor %}"
SPECIALS = ["<|im_start|>", "<|im_end|>", "<|header|>", "<|/header|>", "<|eot|>", "<|end|>", "<turn>", "</turn>"]

# What ends a turn, by template: it belongs to the completion, since the model has to write it.
TEMPLATES = {
    "chatml": (CHATML, "<|im_end|>"),
    "llama3": (LLAMA3, "<|eot|>"),
    "mistral": (MISTRAL, " </s>"),
    "phi3": (PHI3, "<|end|>"),
    "gemma": (GEMMA, "</turn>"),
    "qwen3": (QWEN3, "<|im_end|>"),
    "vicuna": (VICUNA, "</s>"),
    "plain": (PLAIN, ""),
}
TALKS = {
    "one turn": [("user", "Hi"), ("assistant", "Hello there.")],
    "several": [("system", "Be brief."), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d e")],
    "the same words": [("user", "think"), ("assistant", "think"), ("user", "assistant"), ("assistant", "think")],
    "accents": [("user", "où ?"), ("assistant", "là-bas, à gauche 🙂 ."), ("user", "né ?"), ("assistant", "été")],
    "blanks": [("user", " a \n"), ("assistant", " \n b\n\nc \n"), ("user", "x"), ("assistant", "\n")],
    "empty": [("user", "a"), ("assistant", ""), ("user", "b"), ("assistant", "c")],
    "no answer": [("user", "a")],
    "answers first": [("assistant", "Welcome."), ("user", "Hi"), ("assistant", "Hello")],
    "two answers": [("user", "a"), ("assistant", "b"), ("assistant", "c")],
}


def tokenizer_for(template: str, **borders: bool) -> Any:
    tokenizer = bytes_tokenizer(chat_template=template, **borders)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIALS})
    return tokenizer


def messages_of(talk: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in TALKS[talk]]


def row(talk: list[dict[str, str]]) -> RawRow:
    return RawRow("a.jsonl, line 1", talk, BEGINNING)


def completions(template: str, messages: list[dict[str, str]]) -> list[str]:
    """The completions of a conversation, as text."""
    document = to_document(row(messages), Source(path="a.jsonl", chat="talk"), tokenizer_for(template))
    assert document is not None
    return [document.text[start:end] for start, end in document.completions or ()]


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_completions_are_what_the_assistant_wrote_and_its_end(name: str, talk: str) -> None:
    template, ending = TEMPLATES[name]
    found = completions(template, messages_of(talk))
    wanted = [content for role, content in TALKS[talk] if role == "assistant"]
    assert ["".join(text.split()) for text in found] == ["".join((content + ending).split()) for content in wanted]
    # Blanks at the ends are there as the template keeps them: cut by Llama 3's and Gemma's, kept by the others.
    kept = name not in ("llama3", "gemma")
    if talk == "blanks" and kept and name != "qwen3":
        assert found == [content + ending for content in wanted]


def test_completions_equal_those_that_a_template_marks_itself() -> None:
    marked = CHATML.replace(
        "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}",
        "{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}",
    )
    tokenizer = tokenizer_for(marked, bos=False)
    for talk in ("one turn", "several", "accents", "the same words"):
        theirs = tokenizer.apply_chat_template(messages_of(talk), return_dict=True, return_assistant_tokens_mask=True)
        source = Source(path="a.jsonl", chat="talk")
        (ours,) = encode_rows(source, [row(messages_of(talk))], tokenizer_for(CHATML, bos=False, eos=False), 300)
        assert ours is not None
        assert ours.tokens.tolist() == theirs["input_ids"]
        assert ours.completion.astype(int).tolist() == theirs["assistant_masks"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_tokens_are_those_of_the_whole_rendering(name: str) -> None:
    template, _ = TEMPLATES[name]
    tokenizer = tokenizer_for(template)
    for talk in TALKS:
        text = tokenizer.apply_chat_template(messages_of(talk), tokenize=False)
        (found,) = encode_rows(Source(path="a", chat="talk"), [row(messages_of(talk))], tokenizer, 300)
        assert found is not None
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        begun = ids if ids[:1] == [tokenizer.bos_token_id] else [tokenizer.bos_token_id, *ids]
        assert found.tokens.tolist() == begun
        assert len(found.completion) == len(begun)
        assert not found.completion[0]
        wanted = "".join(completions(template, messages_of(talk)))
        # Every byte is a token here, so that the tokens of completions spell exactly the completions.
        assert tokenizer.decode(found.tokens[found.completion]) == wanted


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.content + m.content }}{% endfor %}",
        "{% for m in messages %}{{ m.content[:2] }}{% endfor %}",
        "{% for m in messages %}{{ m.content | length }}{% endfor %}",
        "{% for m in messages | reverse %}{{ m.content[::-1] }}{% endfor %}",
        "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
    ],
)
def test_a_template_that_changes_the_words_is_refused(template: str) -> None:
    with pytest.raises(DataError, match="does not write the assistant's words as they are") as caught:
        completions(template, messages_of("several"))
    assert "loss: all" in str(caught.value.hint)
    source = Source(path="a.jsonl", chat="talk", loss="all")
    document = to_document(row(messages_of("several")), source, tokenizer_for(template))
    assert document is None or document.completions is None


def test_words_that_a_template_writes_in_its_own_way_are_still_told_from_the_rest() -> None:
    assert completions("{% for m in messages %}{{ m.content | upper }}.{% endfor %}", messages_of("several")) == [
        "B",
        "D E",
    ]


def test_words_that_hold_the_marks_themselves() -> None:
    words = "\ue000odd\ue001"
    talk = [{"role": "user", "content": "\ue002"}, {"role": "assistant", "content": words}]
    assert completions(CHATML, talk) == [f"{words}<|im_end|>"]


# --- answers that are more than their words -------------------------------------------------------------------------

# In the style of Qwen3, Qwen2.5, Llama 3.1, Mistral and DeepSeek-R1's small models: made for these tests.
THINKING = """\
{%- set ns = namespace(last=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}
    {%- set content, thoughts = m.content, '' %}
    {%- if m.reasoning_content is string %}{% set thoughts = m.reasoning_content %}
    {%- elif '</think>' in content %}
        {%- set thoughts = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
        {%- set content = content.split('</think>')[-1].lstrip('\n') %}
    {%- endif %}
    {{- '<|im_start|>assistant\n' }}
    {%- if loop.index0 > ns.last and (loop.last or thoughts) %}
        {{- '<think>\n' + thoughts.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
    {%- else %}{{- content }}{%- endif %}
    {%- for call in m.tool_calls or [] %}
        {{- '\n' if content or not loop.first }}
        {{- '<tool_call>\n' + call.function | tojson + '\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\n' }}
{%- elif m.role == 'tool' %}
    {{- '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}
{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
HEADED = (
    "{{ bos_token }}{% for m in messages %}{{ '<|header|>' + m.role + '<|/header|>\n\n' }}{% if m.tool_calls %}"
    "{{ m.tool_calls[0].function | tojson }}{% else %}{{ m.content | trim }}{% endif %}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|header|>assistant<|/header|>\n\n{% endif %}"
)
ALTERNATING = """\
{%- set ns = namespace(index=0) %}{{ bos_token }}
{%- for m in messages %}
    {%- if m.role != 'tool' and m.tool_calls is not defined %}
        {%- if (m.role == 'user') != (ns.index % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
    {%- if m.role == 'user' %}{{- '[INST] ' + m.content + '[/INST]' }}
    {%- elif m.tool_calls is defined %}{{- '[CALLS] ' + m.tool_calls | tojson + eos_token }}
    {%- elif m.role == 'tool' %}{{- '[RESULTS] ' + m.content + '[/RESULTS]' }}
    {%- else %}{{- ' ' + m.content | trim + eos_token }}{%- endif %}
{%- endfor %}"""
FORGETFUL = CHATML.replace("m.content", "m.content.split('</think>')[-1]")

CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
WRITTEN_CALL = '{"name": "f", "arguments": {"x": 1}}'
CALLING = [
    {"role": "user", "content": "1 + 2?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "3"},
    {"role": "assistant", "content": "It is 3."},
]
AGAIN = [{"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes."}]


@pytest.mark.parametrize(
    ("template", "talk", "expected"),
    [
        (THINKING, CALLING, [f"<tool_call>\n{WRITTEN_CALL}\n</tool_call><|im_end|>", "It is 3.<|im_end|>"]),
        (HEADED, CALLING, [f"{WRITTEN_CALL}<|eot|>", "It is 3.<|eot|>"]),
        (HEADED, [*CALLING, *AGAIN], [f"{WRITTEN_CALL}<|eot|>", "It is 3.<|eot|>", "Yes.<|eot|>"]),
        (ALTERNATING, CALLING, [f"[CALLS] {json.dumps([CALL])}</s>", "It is 3.</s>"]),
        (
            THINKING,
            [CALLING[0], {**CALLING[1], "content": "I add.", "reasoning_content": "one plus two"}, *CALLING[2:]],
            [
                f"<think>\none plus two\n</think>\n\nI add.\n<tool_call>\n{WRITTEN_CALL}\n</tool_call><|im_end|>",
                "It is 3.<|im_end|>",
            ],
        ),
    ],
)
def test_calls_of_functions_are_completions(template: str, talk: list[dict[str, Any]], expected: list[str]) -> None:
    assert completions(template, talk) == expected


@pytest.mark.parametrize("key", [None, "reasoning_content", "thinking"])
def test_thoughts_are_completions_where_the_template_writes_them(key: str | None) -> None:
    def answer(thoughts: str, words: str) -> dict[str, str]:
        if key is None:
            return {"role": "assistant", "content": f"<think>\n{thoughts}\n</think>\n\n{words}"}
        return {"role": "assistant", "content": words, key: thoughts}

    talk = [{"role": "user", "content": "1 + 2?"}, answer("one plus two", "It is 3.")]
    thought = "<think>\none plus two\n</think>\n\nIt is 3.<|im_end|>"
    assert completions(THINKING, talk) == [thought]
    # Of an answer before the last question the template leaves the thoughts out, and that is what the teacher reads.
    again = [*talk, {"role": "user", "content": "Sure?"}, answer("three is right", "Yes.")]
    assert completions(THINKING, again) == [
        "It is 3.<|im_end|>",
        "<think>\nthree is right\n</think>\n\nYes.<|im_end|>",
    ]
    # An answer without thoughts gets an empty block from the template, which is not the answer's.
    plain = [*talk, {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes."}]
    assert completions(THINKING, plain) == ["It is 3.<|im_end|>", "Yes.<|im_end|>"]


@pytest.mark.parametrize("begun", ["<think>\n", "<think>\n\n</think>\n\n"])
def test_thoughts_that_the_prompt_for_an_answer_begins_are_its_own(begun: str) -> None:
    prompt = "{{- '<|im_start|>assistant\n' }}{%- endif %}"
    assert prompt in THINKING
    template = THINKING.replace(prompt, prompt.replace("assistant\n", f"assistant\n{begun}"))
    answers = (
        {"role": "assistant", "content": "It is 3.", "reasoning_content": "one plus two"},
        {"role": "assistant", "content": "<think>\none plus two\n</think>\n\nIt is 3."},
    )
    for answer in answers:
        talk = [{"role": "user", "content": "one plus two"}, answer]
        assert completions(template, talk) == ["one plus two\n</think>\n\nIt is 3.<|im_end|>"]
        assert completions(template, [*talk, *AGAIN]) == ["It is 3.<|im_end|>", "Yes.<|im_end|>"]


def test_results_within_the_turn_that_called_are_no_completion() -> None:
    template = (
        "{% for m in messages if m.role != 'tool' %}{{ '<turn>' + m.role + '\n' }}{% if m.tool_calls %}"
        "{{ '<call>' + m.tool_calls[0].function | tojson + '</call>' }}"
        "{% if loop.nextitem is defined %}{{ '<result>' + messages[loop.index].content + '</result>' }}{% endif %}"
        "{% else %}{{ m.content }}{% endif %}{{ '</turn>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<turn>assistant\n' }}{% endif %}"
    )
    assert "<result>3</result></turn>" in tokenizer_for(template).apply_chat_template(CALLING, tokenize=False)
    with pytest.raises(DataError, match="cannot be told from the rest"):
        completions(template, CALLING)


def test_a_template_that_forgets_the_thoughts_of_the_last_answer_is_refused() -> None:
    talk = [{"role": "user", "content": "1 + 2?"}, {"role": "assistant", "content": "<think>\na\n</think>\n\n3."}]
    with pytest.raises(DataError, match="does not write the assistant's words as they are"):
        completions(FORGETFUL, talk)
    assert completions(FORGETFUL, [*talk, *AGAIN]) == ["\n\n3.<|im_end|>", "Yes.<|im_end|>"]


def test_words_that_stand_elsewhere_too_are_found_in_their_turn() -> None:
    words = "<|im_start|>assistant\n1 + 2?"
    talk = [{"role": "user", "content": words}, {"role": "assistant", "content": words, "reasoning_content": words}]
    assert completions(THINKING, [*talk, *AGAIN]) == [f"{words}<|im_end|>", "Yes.<|im_end|>"]


# --- kept on disk, and counted in batches ---------------------------------------------------------------------------


def chat_file(path: Path) -> Path:
    talks = [messages_of(talk) for talk in TALKS if talk != "no answer"] * 3
    path.write_text("".join(json.dumps({"talk": talk, "text": "plain text"}) + "\n" for talk in talks))
    return path


def build(folder: Path, *sources: Source, template: str = LLAMA3) -> Corpus:
    return build_corpus(CorpusRequest(sources, tokenizer_for(template), None, None, 300), folder)


@pytest.mark.parametrize("length", [2, 7, 32, 100])
def test_counts_are_of_completions_in_the_same_sequence_and_document(tmp_path: Path, length: int) -> None:
    corpus = build(tmp_path, Source(path=str(chat_file(tmp_path / "a.jsonl")), chat="talk"))
    assert corpus.completion is not None
    indices = np.random.default_rng(0).permutation(corpus.num_tokens // length)
    batch = packed_batch(corpus, length, indices)
    starts = set(corpus.offsets.tolist())
    for number, index in enumerate(indices.tolist()):
        for place in range(length):
            after = index * length + place + 1
            counted = place + 1 < length and after not in starts and bool(corpus.completion[after])
            assert bool(batch.loss_mask[number, place]) == counted
    assert 0 < batch.loss_mask.sum() < batch.loss_mask.numel()


def test_loss_on_all_keeps_no_mask_and_counts_everything(tmp_path: Path) -> None:
    path = str(chat_file(tmp_path / "a.jsonl"))
    masked = build(tmp_path, Source(path=path, chat="talk"))
    whole = build(tmp_path, Source(path=path, chat="talk", loss="all"))
    np.testing.assert_array_equal(masked.tokens, whole.tokens)
    assert whole.completion is None
    assert masked.fingerprint != whole.fingerprint
    assert packed_batch(whole, 16, np.arange(4)).loss_mask.all()


def test_plain_text_beside_conversations_counts_within_its_documents(tmp_path: Path) -> None:
    path = str(chat_file(tmp_path / "a.jsonl"))
    corpus = build(tmp_path, Source(path=path), Source(path=path, chat="talk"))
    assert corpus.completion is not None
    document = len("plain text") + 1  # BOS in front
    batch = packed_batch(corpus, document, np.arange(2))
    assert batch.loss_mask.tolist() == [[True] * (document - 1) + [False]] * 2


def test_a_cut_and_a_held_out_part_keep_the_mask(tmp_path: Path) -> None:
    from mohawkify.data.corpus import hold_out

    sources = (Source(path=str(chat_file(tmp_path / "a.jsonl")), chat="talk"),)
    whole = build(tmp_path, *sources)
    cut = build_corpus(CorpusRequest(sources, tokenizer_for(LLAMA3), 100, None, 300), tmp_path)
    assert cut.completion is not None
    assert whole.completion is not None
    np.testing.assert_array_equal(cut.completion, whole.completion[:100])
    train, held = hold_out(whole, 60)
    parts = [np.asarray(part.completion) for part in (train, held)]
    np.testing.assert_array_equal(np.concatenate(parts), whole.completion)
