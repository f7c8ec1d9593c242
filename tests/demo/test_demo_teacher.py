"""The embedded teacher: small, loadable, and able to do what the demo shows."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from mohawkify.demo import TEACHER_DIRECTORY, split_stories
from mohawkify.demo.stories import VALIDATION_SEED, recall_questions, stories, tell_stories
from mohawkify.errors import DataError
from tools.demo_teacher.measure import perplexity, recall_accuracy
from tools.demo_teacher.train_teacher import (
    RECALL_WEIGHT,
    SHORT_STORY_CHARACTERS,
    Settings,
    learning_rate,
    lessons,
    read_documents,
)

SIZE_LIMIT_BYTES = 2_000_000
PERPLEXITY_CEILING = 1.8  # 1.70 on 50 held-out stories
RECALL_FLOOR = 0.5  # 0.58 on 50 last questions; the model card says what that is worth


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TEACHER_DIRECTORY)


@pytest.fixture(scope="module")
def teacher():
    return AutoModelForCausalLM.from_pretrained(TEACHER_DIRECTORY, dtype=torch.float32).eval()


def test_the_shelf_is_light_to_import():
    code = "import sys, mohawkify.demo; print([m for m in ('torch', 'transformers', 'tokenizers') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_stories_are_a_function_of_the_seed():
    assert stories(5, 20) == stories(5, 20)
    assert stories(5, 20)[:10] == stories(5, 10)
    assert stories(5, 20) != stories(6, 20)


def test_stories_are_clean_text():
    for story in stories(7, 300):
        assert story.isascii()
        assert not set(story) & set("[]{}\n")
        assert "  " not in story
        assert story.endswith(".")


def test_splits_share_no_story():
    train, validation = split_stories("train"), split_stories("validation")
    assert len(validation) == 400
    assert len(train) > 10_000
    assert not set(train) & set(validation)
    assert train == split_stories("train")


def test_an_unknown_split_is_refused():
    with pytest.raises(DataError, match="'test'"):
        split_stories("test")


def test_recall_questions_continue_their_story_and_were_answered_before():
    for (prompt, answer), story in zip(recall_questions(11, 300), stories(11, 300), strict=True):
        assert story.startswith(prompt + answer)
        assert answer.startswith(" ")
        assert not prompt.endswith(" ")
        for word in answer.split():
            assert word in prompt


def test_recall_reaches_far_back(tokenizer):
    distances = []
    for prompt, answer in recall_questions(VALIDATION_SEED, 200):
        last_word = answer.split()[-1]
        distances.append(len(tokenizer(prompt[prompt.index(last_word) :])["input_ids"]))
    assert sorted(distances)[len(distances) // 2] >= 60


def test_lessons_go_from_short_to_all_and_hold_no_validation_story(tokenizer):
    settings = Settings(seed=0, steps=40, batch_size=8, learning_rate=1e-3)
    batches = list(lessons(tokenizer, settings))
    assert [len(batch) for batch in batches] == [8] * 40
    texts = [[tokenizer.decode(document.tokens, skip_special_tokens=True) for document in batch] for batch in batches]
    assert max(len(text) for batch in texts[:20] for text in batch) <= SHORT_STORY_CHARACTERS
    assert max(len(text) for batch in texts[20:] for text in batch) > 2 * SHORT_STORY_CHARACTERS
    assert not {text for batch in texts for text in batch} & set(split_stories("validation"))


def test_only_remembered_words_count_more(tokenizer):
    story = tell_stories(3, 1)[0]
    document = read_documents([story], tokenizer)[0]
    heavy = [token for token, weight in zip(document.tokens, document.weights, strict=True) if weight == RECALL_WEIGHT]
    assert tokenizer.decode(heavy) == "".join(" " + story.text[start:end] for start, end in story.recalls)
    assert set(document.weights) == {1, RECALL_WEIGHT}


def test_the_learning_rate_rises_stays_and_falls():
    settings = Settings(seed=0, steps=1000, batch_size=8, learning_rate=2e-3)
    assert learning_rate(1, settings) == pytest.approx(4e-5)
    assert learning_rate(50, settings) == learning_rate(600, settings) == 2e-3
    assert learning_rate(801, settings) == pytest.approx(1e-3)
    assert 0 < learning_rate(1000, settings) < 1e-5


def test_the_folder_is_small_and_holds_no_pickle():
    files = [path for path in TEACHER_DIRECTORY.iterdir() if path.is_file()]
    assert {path.name for path in files} == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(path.stat().st_size for path in files) <= SIZE_LIMIT_BYTES


def test_the_weights_fit_the_model_and_are_finite():
    model, report = AutoModelForCausalLM.from_pretrained(TEACHER_DIRECTORY, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.bfloat16
    assert model.config.model_type == "llama"
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert model.config.tie_word_embeddings
    with safe_open(TEACHER_DIRECTORY / "model.safetensors", framework="pt") as weights:
        assert all(torch.isfinite(weights.get_tensor(name)).all() for name in weights.keys())  # noqa: SIM118


@pytest.mark.parametrize("text", [*stories(13, 3), "Grüße an 東京,  two  spaces\n\tand a tab.", " leading", ""])
def test_the_tokenizer_gives_the_text_back(tokenizer, text):
    tokens = tokenizer(text)["input_ids"]
    assert tokens[0] == tokenizer.bos_token_id
    assert tokenizer.decode(tokens, skip_special_tokens=True) == text


def test_the_tokenizer_and_the_model_agree(tokenizer, teacher):
    assert len(tokenizer) == teacher.config.vocab_size
    assert teacher.config.bos_token_id == tokenizer.bos_token_id
    assert teacher.generation_config.eos_token_id == tokenizer.eos_token_id


def test_the_teacher_has_learned_the_stories(teacher, tokenizer):
    assert perplexity(teacher, tokenizer, split_stories("validation")[:50]) < PERPLEXITY_CEILING


def test_the_teacher_answers_last_questions(teacher, tokenizer):
    assert recall_accuracy(teacher, tokenizer, recall_questions(VALIDATION_SEED, 50)) > RECALL_FLOOR


def test_recall_needs_the_context(teacher, tokenizer):
    """The same questions without the first three quarters of their story are answered far worse."""
    questions = recall_questions(VALIDATION_SEED, 50)
    cut = [(prompt[-len(prompt) // 4 :], answer) for prompt, answer in questions]
    assert recall_accuracy(teacher, tokenizer, cut) < 0.5 * recall_accuracy(teacher, tokenizer, questions)


def test_the_teacher_tells_a_story_to_its_end(teacher, tokenizer):
    prompt = tokenizer("One morning Mia and Tom walked to the market.", return_tensors="pt")
    tokens = teacher.generate(**prompt, max_new_tokens=400, do_sample=False)[0]
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    assert tokens[-1] == tokenizer.eos_token_id
    assert text.count("Mia") > 1
    assert text.count("Tom") > 1
    assert text.endswith(".")
