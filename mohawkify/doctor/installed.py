"""The installed packages, the machine's devices, and the use of each missing extra."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

from packaging.requirements import Requirement

NAME = "mohawkify"
# What an extra is for, and the command where the plain one would not do; the packages come from the metadata.
BRINGS = {
    "eval": "benchmarks by lm-eval: `mohawkify eval --tasks`",
    "mlx": "exports for mlx-lm: `mohawkify export --target mlx-q4`",
    "cuda": "kernels for NVIDIA GPUs",
    "gguf": "teachers in GGUF files: `mohawkify inspect FILE.gguf`",
    "serve": "a server for OpenAI-style clients: `mohawkify serve`",
    "quant": "teachers in 8 or 4 bits: `mohawkify cache-logits --bits 4`",
    "tensorboard": "metrics for TensorBoard: `mohawkify convert --track tensorboard`",
    "trackio": "metrics for Trackio: `mohawkify convert --track trackio`",
    "wandb": "metrics for Weights & Biases: `mohawkify convert --track wandb`",
    "mamba": "the authors' mamba-ssm kernels, to compare with; needs a CUDA build of torch first",
    "dev": "tests, linting and type checks",
}
INSTALL = {"mamba": f'pip install --no-build-isolation "{NAME}[mamba]"'}


def check_installation() -> dict[str, Any]:
    """Describe this installation.

    Returns:
        A JSON object: versions, ``devices`` in words, ``base`` with every required package, ``extras`` by name with
        their packages, what they bring, whether they are complete and the command that installs them, ``kernels`` with
        the implementations of the operators and why they cannot be used here, and ``healthy``: whether the base is
        complete.
    """
    requirements = [Requirement(text) for text in metadata.requires(NAME) or []]
    base = [_package(each) for each in requirements if _applies(each, "")]
    names = metadata.metadata(NAME).get_all("Provides-Extra") or []
    return {
        "mohawkify": metadata.version(NAME),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "devices": _devices(),
        "base": base,
        "extras": {name: _extra(name, requirements) for name in names},
        "kernels": _kernels(),
        "healthy": all(package["fits"] for package in base),
    }


def _extra(name: str, requirements: list[Requirement]) -> dict[str, Any]:
    own = [each for each in requirements if _applies(each, name) and not _applies(each, "")]
    packages = [_package(each) for each in own]
    return {
        "brings": BRINGS.get(name, ""),
        "packages": packages,
        "complete": bool(packages) and all(package["fits"] for package in packages),
        "install": INSTALL.get(name, f'pip install "{NAME}[{name}]"'),
    }


def _applies(requirement: Requirement, extra: str) -> bool:
    """Whether a requirement holds on this system with one extra chosen; an empty name stands for none."""
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _package(requirement: Requirement) -> dict[str, Any]:
    try:
        installed = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        installed = None
    fits = installed is not None and requirement.specifier.contains(installed, prereleases=True)
    return {"name": requirement.name, "installed": installed, "required": str(requirement.specifier), "fits": fits}


def _kernels() -> list[dict[str, Any]]:
    try:
        import torch

        from mohawkify.ops.dispatch import implementations
    except (ImportError, OSError):  # `_devices` says so
        return []
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return [
        {"name": name, "operators": list(operators), "problem": problem}
        for name, operators, problem in implementations(device)
    ]


def _devices() -> list[str]:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a library that torch was built against is not there
        return [f"none: torch cannot be imported ({error})"]
    devices = [f"cpu, {os.cpu_count()} cores, {torch.get_num_threads()} threads"]
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        devices.append(f"cuda:{index}, {facts.name}, {facts.total_memory / 1e9:.0f} GB")
    if torch.backends.mps.is_available():
        devices.append("mps, the GPU of this Mac")
    return devices
