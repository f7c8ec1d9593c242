"""Any config.json: the facts of a teacher, or one line that says what is wrong; never weights, time or memory."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import pytest
import transformers

from mohawkify.errors import CheckpointError, TeacherError
from mohawkify.families.registry import adapter_names, load_adapter
from mohawkify.teacher.resolve import read_config, resolve_teacher
from tests.fuzz.campaign import require_message, run_campaign
from tests.fuzz.mutate import PATHS, mutate_bytes, mutate_json, render, render_twice
from tests.tiny import FAMILIES, tiny_config

# A size that is set alone to a boundary shows more than a change of everything.
SIZES = (
    *(
        "num_hidden_layers",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    ),
    *("vocab_size", "max_position_embeddings", "n_layer", "n_head", "n_embd", "num_experts", "num_local_experts"),
    *("layer_types", "sliding_window", "rope_scaling", "rope_parameters", "rope_theta", "hidden_act", "dtype"),
)
SPECIAL = (
    0,
    -1,
    1,
    2,
    3,
    7,
    10**5,
    10**6,
    2**31,
    2**63,
    10**9,
    10**30,
    "16",
    True,
    None,
    1.5,
    [],
    {},
    "@@NaN@@",
    "@@1e999@@",
)


@cache
def config_of(family: str) -> dict[str, Any]:
    """A small configuration of a family as its config.json would hold it."""
    try:
        config = tiny_config(family)
    except Exception:  # the sample of some families says the kind of each of two layers
        config = tiny_config(family, num_hidden_layers=2)
    return json.loads(config.to_json_string(use_diff=False))


def draw_values(rng: Random) -> bytes:
    """A configuration of any family with values at boundaries."""
    family = rng.choice(FAMILIES) if rng.random() < 0.5 else rng.choice(adapter_names())
    config = dict(config_of(family))
    for _ in range(rng.choice((0, 1, 1, 2))):
        present = [key for key in SIZES if key in config] or list(SIZES)
        config[rng.choice(present)] = rng.choice(SPECIAL)
    if rng.random() < 0.5:
        config = mutate_json(rng, config)
    if rng.random() < 0.05 and isinstance(config, dict):
        config["model_type"] = rng.choice((*PATHS, *adapter_names(), "LLAMA", "llama2", "bert", "mohawk_llama", 3))
    return (render_twice(rng, config) if rng.random() < 0.05 else render(config)).encode("utf-8", "surrogatepass")


def draw_bytes(rng: Random) -> bytes:
    """A configuration changed blindly, or no configuration at all."""
    text = (
        render(config_of(rng.choice(FAMILIES))) if rng.random() < 0.8 else render(mutate_json(rng, {"model_type": 1}))
    )
    return mutate_bytes(rng, text.encode("utf-8", "surrogatepass"))


@pytest.mark.parametrize(("name", "number", "draw"), [("values", 150, draw_values), ("bytes", 300, draw_bytes)])
def test_any_configuration(folder: Path, name: str, number: int, draw: Any) -> None:
    file = folder / "config.json"
    file.write_text(render(config_of("llama")))
    resolve_teacher(str(file))  # what is imported once does not count

    def check(case: bytes) -> None:
        file.write_bytes(case)
        try:
            found = resolve_teacher(str(file))
        except (TeacherError, CheckpointError) as error:  # the second for what is not strict JSON
            require_message(error)
            return
        assert all(parameter.is_meta for parameter in found.modules.parameters())
        assert all(buffer.is_meta for buffer in found.modules.buffers())
        json.dumps(found.spec.to_json(), allow_nan=False)

    for family in adapter_names():  # a first import of a family's code is not the time an input takes
        getattr(transformers, load_adapter(family).model_class)
    run_campaign(f"config-{name}", number, draw, check)


@pytest.mark.parametrize("layers", [10**4, 10**6, 10**9, 2**63, 10**40])
def test_a_gigantic_number_of_layers_is_refused_at_once(tmp_path: Path, layers: int) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**config_of("llama"), "num_hidden_layers": layers}))
    with pytest.raises(TeacherError, match="num_hidden_layers"):
        read_config(file)
