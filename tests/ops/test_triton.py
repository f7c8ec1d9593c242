"""The Triton kernels: their numbers in Triton's interpreter, their code for GPUs, and their numbers on a GPU.

Each in a process of its own: whether Triton interprets or compiles is decided when it is first imported.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="Triton is for Linux")

from tests.conftest import ROOT

KERNELS = {"_walk", "_outputs", "_gradients", "_normalise", "_side", "_step"}
# Shared memory that a program can have, in bytes: A100, consumer GPUs (as 8.6), H100.
SHARED_BYTES = {"80": 163 * 1024, "89": 99 * 1024, "90": 227 * 1024}
MOST_SPILLED_BYTES = 512
AUTOCAST = [f"{capability}:float32/bfloat16:{width}:{width}" for capability in SHARED_BYTES for width in (64, 128)]
BIASED = "89:float32:128:128:bias"  # fits only if the bias is not read ahead
COMPILED = ["80:bfloat16:64:64", "90:bfloat16:64:64", "90:float32:8:16", "89:float32/bfloat16:64:128", *AUTOCAST]


def run_module(*arguments: str, interpret: bool) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRITON_INTERPRET": "1" if interpret else "0", "TRITON_DEFAULT_FP_FUSION": "1"}
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
        timeout=600,
    )  # fmt: skip


def test_kernels_in_the_interpreter():
    done = run_module("pytest", "-q", "-p", "no:cacheprovider", "tests/ops/triton_cases.py", interpret=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_kernels_on_the_gpu():
    done = run_module("pytest", "-q", "-p", "no:cacheprovider", "tests/ops/triton_cases.py", interpret=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.fixture(scope="module")
def compiled() -> list[dict]:
    done = run_module("tests.ops.triton_compile", *COMPILED, BIASED, interpret=False)
    assert done.returncode == 0, done.stderr[-6000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("case", COMPILED)
def test_every_kernel_compiles_within_the_gpus_means(compiled, case):
    found = [facts for facts in compiled if facts["case"] == case]
    assert {facts["kernel"] for facts in found} == KERNELS
    for facts in found:
        assert facts["shared"] <= SHARED_BYTES[case[:2]], facts
        assert facts["spilled"] <= MOST_SPILLED_BYTES, facts


def test_a_bias_and_a_mask_in_float32_fit_too(compiled):
    found = [facts for facts in compiled if facts["case"] == BIASED]
    assert {facts["kernel"] for facts in found} == KERNELS
    for facts in found:
        assert facts["shared"] <= SHARED_BYTES["89"], facts


def test_products_run_on_tensor_cores(compiled):
    for facts in compiled:
        if facts["kernel"] != "_step":
            wanted = "wgmma" if re.match("90:.*bfloat16", facts["case"]) else "mma.sync"
            assert wanted in facts["tensor_cores"], facts
