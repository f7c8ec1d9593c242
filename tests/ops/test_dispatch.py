"""Which implementation of an operator is chosen, and what is said about the others."""

from __future__ import annotations

import json
import sys
import warnings
from types import ModuleType

import pytest
import torch

from mohawkify.errors import MissingExtraError, UsageError
from mohawkify.mixers.kinds import use_kernels
from mohawkify.mixers.mamba2 import DiscreteMamba2
from mohawkify.ops import dispatch, libraries, scan
from mohawkify.recipe.loading import apply_overrides, load_recipe
from tests.commands import run, run_well
from tests.tiny import tiny_pair

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def machine(monkeypatch):
    """Pretend what is installed and what the GPU can do; these are facts of the machine, not what is judged here."""

    def pretend(*installed: str, capability: tuple[int, int] = (9, 0)) -> None:
        monkeypatch.setattr(dispatch, "find_spec", lambda name: object() if name in installed else None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    dispatch._cuda_backend.cache_clear()
    dispatch._say_once.cache_clear()
    yield pretend
    dispatch._cuda_backend.cache_clear()
    dispatch._say_once.cache_clear()


def test_plain_torch_away_from_gpus_whatever_is_asked_for():
    for kernels in ("auto", "torch", "triton", "fla", "mamba-ssm"):
        found = dispatch.backend("scan", CPU, torch.float32, kernels)
        assert found.name == "torch"
        assert found.reason == "asked for" if kernels == "torch" else "cpu" in found.reason


@pytest.mark.parametrize(
    ("operator", "kernels", "installed", "expected"),
    [
        ("scan", "auto", ("triton", "fla", "mamba_ssm"), "triton"),
        ("scan", "fla", ("triton", "fla"), "fla"),
        ("scan", "mamba-ssm", ("triton", "mamba_ssm"), "mamba-ssm"),
        ("scan", "mamba-ssm", ("triton",), "triton"),
        ("scan", "auto", (), "torch"),
        ("scan", "torch", ("triton",), "torch"),
        ("orient_loss", "fla", ("triton", "fla"), "triton"),
        ("orient_loss", "triton", ("triton",), "triton"),
    ],
)
def test_the_choice_on_a_gpu(machine, operator, kernels, installed, expected):
    machine(*installed)
    assert dispatch.backend(operator, CUDA, torch.bfloat16, kernels).name == expected


def test_the_reason_says_what_is_missing(machine):
    machine()
    assert 'pip install "mohawkify[cuda]"' in dispatch.backend("scan", CUDA, torch.bfloat16).reason
    machine("triton", capability=(7, 5))
    assert "7.5" in dispatch.backend("scan", CUDA, torch.bfloat16).reason
    machine("triton")
    assert "float64" in dispatch.backend("scan", CUDA, torch.float64).reason
    assert "512" in dispatch.backend("scan", CUDA, torch.float32, width=512).reason


def test_a_slower_replacement_is_announced_once(machine):
    machine()
    with pytest.warns(RuntimeWarning, match="scan: torch instead of auto on cuda:0: triton is not installed"):
        assert dispatch._chosen("scan", CUDA, torch.float32, "auto", 64) == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch._chosen("scan", CUDA, torch.float32, "auto", 64) == "torch"


def test_a_choice_that_cannot_be_met_is_refused(machine):
    dispatch.require("auto", CPU)
    dispatch.require("torch", CPU)
    with pytest.raises(UsageError, match="found triton on the device cpu"):
        dispatch.require("triton", CPU)
    machine("triton")
    dispatch.require("triton", CUDA)
    with pytest.raises(MissingExtraError, match="fla"):
        dispatch.require("fla", CUDA)
    machine("triton", capability=(7, 5))
    with pytest.raises(UsageError, match=r"7\.5"):
        dispatch.require("triton", CUDA)


def test_a_conversion_refuses_kernels_it_cannot_use(tmp_path):
    settings = ("--set", "compute.kernels=triton", "--set", "compute.device=cpu")
    refused = run("convert", "demo", "--recipe", "demo", *settings, "--output", tmp_path / "run")
    assert refused.exit_code == UsageError.exit_code
    assert "compute.kernels: found triton on the device cpu, expected a CUDA device" in refused.stderr
    assert apply_overrides(load_recipe("demo"), ["compute.kernels=torch"]).compute.kernels == "torch"


def test_mixers_scan_through_the_choice(tmp_path):
    assert DiscreteMamba2.scan is dispatch.scan
    pair = tiny_pair("llama", tmp_path)
    tokens = torch.arange(40).view(2, 20) % 97
    with torch.no_grad():
        before = pair.student(tokens).logits
        use_kernels(pair.student, "torch")
        assert torch.equal(pair.student(tokens).logits, before)


def test_the_plain_scan_is_what_runs_on_a_cpu():
    x, b, c = (torch.randn(1, 9, 2, 4) for _ in range(3))
    log_decay = -torch.rand(1, 9, 2)
    for one, other in zip(dispatch.scan(x, b, c, log_decay), scan.scan_chunked(x, b, c, log_decay), strict=True):
        assert torch.equal(one, other)


def test_the_state_of_flash_linear_attention_is_one_that_decoding_can_update(monkeypatch):
    """The Triton step refuses a state that is not contiguous; the library's is (n, p), ours its transpose."""

    def chunk_simple_gla(q, k, v, g, scale, initial_state, output_final_state):
        y, last = scan.scan_chunked(v, k, q, g, initial_state.transpose(-1, -2))
        return scale * y, last.transpose(-1, -2).contiguous()

    for name in ("fla", "fla.ops", "fla.ops.simple_gla"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(sys.modules["fla.ops.simple_gla"], "chunk_simple_gla", chunk_simple_gla, raising=False)
    x, b, c = (torch.randn(2, 9, 3, width) for width in (4, 5, 5))
    log_decay, state = -torch.rand(2, 9, 3), torch.randn(2, 3, 4, 5)
    y, last = libraries.scan_fla(x, b, c, log_decay, state)
    expected_y, expected_last = scan.scan_chunked(x, b, c, log_decay, state)
    assert torch.equal(y, expected_y)
    assert torch.equal(last, expected_last)
    assert last.is_contiguous()


def test_doctor_lists_the_kernels():
    found = json.loads(run_well("doctor", "--json").stdout)["kernels"]
    assert [each["name"] for each in found] == ["torch", "triton", "fla", "mamba-ssm"]
    assert found[0]["problem"] is None
    assert all(each["problem"] or torch.cuda.is_available() for each in found[1:])
    assert "kernels" in run_well("doctor").stdout
