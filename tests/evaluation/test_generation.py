"""Writing text: what temperature 0 means, whatever a teacher's generation settings say."""

from __future__ import annotations

import pytest
import torch

from mohawkify.errors import UsageError
from mohawkify.evaluation.generation import GenerateOptions, generate_text
from tests.bytes_tokenizer import bytes_tokenizer
from tests.finished import tiny_student

SETTINGS = {
    "repetition_penalty": 5.0,
    "no_repeat_ngram_size": 1,
    "min_length": 40,
    "min_new_tokens": 30,
    "begin_suppress_tokens": list(range(100)),
    "forced_eos_token_id": 257,
    "num_beams": 3,
    "do_sample": True,
    "temperature": 3.0,
    "top_k": 7,
}


@torch.no_grad()
def test_temperature_0_takes_the_likeliest_token_whatever_the_teachers_settings_say(tmp_path):
    student, _ = tiny_student("llama", tmp_path)
    tokenizer = bytes_tokenizer()
    ids = tokenizer("Once", return_tensors="pt").input_ids
    begin = ids.shape[1]
    for _ in range(12):
        ids = torch.cat([ids, student(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    likeliest = ids[0, begin:].tolist()
    if 257 in likeliest:
        likeliest = likeliest[: likeliest.index(257)]
    student.generation_config.update(**SETTINGS, suppress_tokens=likeliest[1:2])
    text = generate_text(student, tokenizer, "Once", GenerateOptions(max_tokens=12))
    assert text == tokenizer.decode(likeliest, skip_special_tokens=True) != ""


def test_a_prompt_that_is_no_text_is_refused(tmp_path):
    with pytest.raises(UsageError, match="half of a surrogate pair at position 1, expected text"):
        generate_text(tiny_student("llama", tmp_path)[0], bytes_tokenizer(), "h\udce9llo")
