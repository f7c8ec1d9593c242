"""DeepSpeed's settings: what the tool writes, and what it makes of a user's own file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mohawkify.errors import RecipeError
from mohawkify.recipe.schema import OptimizerRecipe
from mohawkify.train.engines.deepspeed_config import EngineFacts, engine_config, read_settings

FACTS = EngineFacts(OptimizerRecipe(), 1e-4, "bf16", batch_sequences=64, micro_batch_sequences=2, num_processes=8)
# As such files are written for Hugging Face's trainer.
USUAL: dict[str, Any] = {
    "fp16": {"enabled": "auto"},
    "bf16": {"enabled": False},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}},
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "overlap_comm": True,
        "reduce_bucket_size": "auto",
        "sub_group_size": 1e9,
    },
    "gradient_accumulation_steps": 4,
    "gradient_clipping": "auto",
    "train_batch_size": 64,
    "train_micro_batch_size_per_gpu": 2,
    "wall_clock_breakdown": False,
}


def test_what_the_tool_writes_leaves_nothing_to_defaults_that_change_results():
    config = engine_config(replace(FACTS, zero=2))
    assert config["gradient_clipping"] == 1.0
    assert engine_config(replace(FACTS, optimizer=OptimizerRecipe(gradient_clip=None)))["gradient_clipping"] == 0.0
    assert config["zero_optimization"] == {"stage": 2}
    assert config["gradient_accumulation_steps"] == 1
    assert config["torch_autocast"] == {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    assert engine_config(replace(FACTS, precision="fp32"))["torch_autocast"] == {"enabled": False}
    assert engine_config(FACTS)["zero_optimization"]["stage"] == 3


def test_a_usual_file_fits_and_its_own_keys_are_passed_on():
    config = engine_config(FACTS, USUAL, "ds.json")
    assert config["zero_optimization"] == {
        "stage": 3,
        "overlap_comm": True,
        "sub_group_size": 1e9,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
    }
    assert config["wall_clock_breakdown"] is False
    assert config["gradient_accumulation_steps"] == 1
    assert "optimizer" not in config
    assert "bf16" not in config


@pytest.mark.parametrize(("user", "message"), [
    ({"train_batch_size": 32}, "train_batch_size: found 32, expected 64"),
    ({"train_micro_batch_size_per_gpu": 4}, "train_micro_batch_size_per_gpu: found 4, expected 2"),
    ({"gradient_accumulation_steps": 1}, "gradient_accumulation_steps: found 1, expected 4"),
    ({"gradient_clipping": 0.5}, "gradient_clipping: found 0.5, expected 1.0"),
    ({"optimizer": {"type": "Lion"}}, "optimizer.type: found 'Lion', expected 'AdamW'"),
    ({"optimizer": {"type": "AdamW", "params": {"lr": 3e-4}}}, "optimizer.params.lr: found 0.0003, expected 0.0001"),
    ({"optimizer": {"params": {"betas": [0.9, 0.999]}}},
     r"optimizer.params.betas: found \[0.9, 0.999\], expected \[0.9, 0.95\]"),
    ({"optimizer": {"params": {"weight_decay": 0}}}, "optimizer.params.weight_decay: found 0, expected 0.1"),
    ({"optimizer": {"params": {"amsgrad": True}}}, "optimizer.params.amsgrad: found True, expected 'none'"),
    ({"scheduler": {"type": "WarmupLR", "params": {}}}, "scheduler: found .* expected none"),
    ({"fp16": {"enabled": True}}, "fp16: found .* expected none"),
    ({"bf16": {"enabled": True}}, "bf16: found .* expected none .*torch_autocast"),
    ({"torch_autocast": {"enabled": False}}, "torch_autocast.enabled: found False, expected True"),
    ({"torch_autocast": {"enabled": True, "dtype": "float16"}}, "torch_autocast.dtype: found 'float16'"),
    ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage: found 2, expected 3"),
    ({"zero_optimization": {"stage": "three"}}, "zero_optimization.stage: found 'three', expected 0, 1, 2 or 3"),
    ({"zero_optimization": 3}, "zero_optimization: found 3, expected settings"),
    ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, "offload_param.device: found 'nvme'"),
    ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
     "offload_optimizer.device: found 'cpu', expected 'none'"),
    ({"zero_optimization": {"zero_quantized_weights": True}}, "zero_quantized_weights: found True, expected none"),
    ({"data_types": {"grad_accum_dtype": "bf16"}}, "data_types: found .* expected none"),
])  # fmt: skip
def test_contradictions_are_named(user, message):
    with pytest.raises(RecipeError, match=f"^ds.json contradicts the recipe: .*{message}"):
        engine_config(replace(FACTS, zero=3, offload="none"), user, "ds.json")


def test_all_contradictions_are_named_at_once():
    with pytest.raises(RecipeError) as found:
        engine_config(FACTS, {"gradient_clipping": 0.1, "train_batch_size": 1, "amp": {"enabled": True}}, "ds.json")
    assert all(key in found.value.message for key in ("gradient_clipping", "train_batch_size", "amp"))


@pytest.mark.parametrize(
    ("user", "key"),
    [
        (
            {"torch_autocast": {"lower_precision_safe_modules": ["this.d"]}},
            "torch_autocast.lower_precision_safe_modules",
        ),
        ({"torch_autocast": {"lower_precision_safe_modules": "torch.nn.Linear"}}, "lower_precision_safe_modules"),
        ({"torch_autocast": {"lower_precision_safe_modules": [["torch.nn.Linear"]]}}, "lower_precision_safe_modules"),
        ({"torch_autocast": {"module": "this"}}, "torch_autocast.module"),
        ({"nebula": {"enabled": False}}, "nebula"),
        ({"zero_optimization": {"leaf_module": {"classes": ["this.d"]}}}, "zero_optimization.leaf_module"),
        ({"zero_optimization": {"sub_group_size": "x"}}, "zero_optimization.sub_group_size: found 'x'"),
        (
            {"zero_optimization": {"reduce_bucket_size": 0}},
            "reduce_bucket_size: found 0, expected a whole number from 1",
        ),
        ({"zero_optimization": {"sub_group_size": 0.5}}, "zero_optimization.sub_group_size: found 0.5"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu", "nvme_path": "/tmp"}}}, "optimizer.nvme_path"),
        ({"wall_clock_breakdown": 1}, "wall_clock_breakdown: found 1, expected true or false"),
    ],
)
def test_what_no_file_may_say_is_refused_by_its_key(tmp_path: Path, user, key):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(user))
    with pytest.raises(RecipeError, match=r"ds\.json has settings that are not passed on to DeepSpeed") as caught:
        read_settings(str(file))
    assert key in caught.value.message


@pytest.mark.parametrize(
    "key",
    ["csv_monitor", "tensorboard", "wandb", "comet", "flops_profiler", "comms_logger", "compile", "checkpoint", "aio"],
)
def test_what_writes_or_imports_may_stand_there_switched_off_and_does_not_reach_deepspeed(tmp_path: Path, key):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({key: {"enabled": False, "output_path": "/tmp"}}))
    assert key not in engine_config(FACTS, read_settings(str(file)), "ds.json")
    with pytest.raises(RecipeError, match=f"{key}: found .* expected none"):
        engine_config(FACTS, {key: {"enabled": True, "output_path": "/tmp"}}, "ds.json")


def test_only_listed_keys_reach_deepspeed(tmp_path: Path):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(USUAL | {"torch_autocast": {"lower_precision_safe_modules": ["torch.nn.Linear"]}}))
    user = read_settings(str(file))
    user["torch_autocast"]["enabled"] = True
    config = engine_config(FACTS, {**user, "nebula": {}}, "ds.json")
    assert config["torch_autocast"]["lower_precision_safe_modules"] == ["torch.nn.Linear"]
    assert "nebula" not in config


def test_the_page_lists_the_keys_that_are_passed_on():
    from mohawkify.train.engines.deepspeed_config import PASSED_ON, PASSED_ON_OFFLOAD, PASSED_ON_ZERO, SAFE_MODULES
    from tests.conftest import ROOT

    page = (ROOT / "docs" / "engine.md").read_text(encoding="utf-8")
    table = page.partition("**A file of DeepSpeed's settings**")[2].partition("\n\n**")[0]
    assert [
        key for key in (*PASSED_ON, *PASSED_ON_ZERO, *PASSED_ON_OFFLOAD, *SAFE_MODULES) if f"`{key}`" not in table
    ] == []
