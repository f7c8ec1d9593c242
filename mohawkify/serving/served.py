"""What is served, and by which engine: transformers, mlx-lm or vLLM, all of them with their own servers."""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any

from packaging.version import Version

from mohawkify.distributed.device import choose_device
from mohawkify.errors import CheckpointError, MissingExtraError, UsageError
from mohawkify.files.atomic import verify_directory
from mohawkify.files.manifest import MANIFEST_NAME
from mohawkify.run.folder import RunFolder, finished_run
from mohawkify.student.save import TYPE_PREFIX, load_student
from mohawkify.teacher.tokenizer import load_tokenizer
from mohawkify.teacher.validate import require_config

LOOPBACK = ("127.0.0.1", "::1", "localhost")
STOCK = ("granitemoehybrid",)  # types of exports that stock engines have
TRANSFORMERS = Version("5.23")  # whose server is wrapped; that of older ones is laid out in another way
DTYPES = {"bfloat16", "float32"}
Report = Callable[[str], None]


@dataclass(frozen=True)
class Served:
    """A model to serve.

    Args:
        name: that clients call it by.
        folder: its files.
        values: the content of its config.json.
        engine: ``transformers``, ``mlx`` or ``vllm``.
        device: to compute on, as recipes name it; engines other than transformers choose themselves.
    """

    name: str
    folder: Path
    values: Mapping[str, Any]
    engine: str
    device: str = "auto"


def find_served(path: Path | None) -> Served:
    """The model of a run or an export, every byte as it was written.

    Args:
        path: a finished run, an export, or None for the newest run.

    Raises:
        UsageError: it is neither.
        CheckpointError: it is incomplete or damaged.
        MissingExtraError: its engine is not installed.
    """
    if path is None or not (path / "config.json").is_file():
        run = finished_run(path)
        values = require_config(run.checked_final() / "config.json")
        return _installed(
            Served(run.path.resolve().name, run.final, values, "transformers", run.recipe().compute.device)
        )
    if not (path / MANIFEST_NAME).is_file():
        raise UsageError(
            f"{path} holds a model, expected a run or an export of mohawkify", hint="serve it with its own engine"
        )
    verify_directory(path)
    values = require_config(path / "config.json")
    kind = values.get("model_type", "")
    if kind in STOCK:
        engine = "vllm" if shutil.which("vllm") else "transformers"
    elif str(kind).startswith(TYPE_PREFIX):
        engine = "mlx" if "mlx_module" in values else "transformers"
    else:
        raise UsageError(f"{path} holds a model of type {kind}, which none of the engines here serves")
    # exports/hf of a run has a name that says little.
    home = path.resolve()
    run = RunFolder(home.parent.parent)
    name = f"{run.path.name}-{home.name}" if home.parent.name == "exports" and run.is_finished else home.name
    return _installed(Served(name, path, values, engine))


def _installed(served: Served) -> Served:
    """Refuse what lacks its engine."""
    needed = {"transformers": ("fastapi", "uvicorn", "openai"), "mlx": ("mlx_lm",), "vllm": ()}[served.engine]
    for package in needed:
        if util.find_spec(package) is None:
            raise MissingExtraError(package, "serve" if served.engine == "transformers" else "mlx", "serving")
    if served.engine == "transformers" and Version(metadata.version("transformers")) < TRANSFORMERS:
        raise UsageError(
            f"serving needs transformers {TRANSFORMERS}, found {metadata.version('transformers')}",
            hint="pip install --upgrade transformers",
        )
    return served


def serve(served: Served, host: str, port: int, report: Report) -> None:
    """Serve a model until the process is stopped.

    Args:
        host: the address to listen on.
        port: 0 takes any.
        report: receives a line when the server listens.

    Raises:
        UsageError: the address cannot be listened on.
    """
    if host not in LOOPBACK:
        report(f"warning: whoever reaches {host} can use the model: there are no passwords")
    if served.engine == "transformers":
        model, tokenizer = _load(served)
        from mohawkify.serving.openai_server import run_server

        with _listening(host, port) as bound:
            _announce(served, bound, report)
            run_server(served.name, model, tokenizer, bound)
        return
    with _listening(host, port) as bound:  # the engines listen themselves: this finds out whether they can
        port = bound.getsockname()[1]
        _announce(served, bound, report)
    if served.engine == "mlx":
        from mohawkify.serving.mlx_server import run_mlx_server

        run_mlx_server(served.name, served.folder, served.values, host, port)
    else:
        arguments = ("--host", host, "--port", str(port), "--served-model-name", served.name)
        code = subprocess.call(["vllm", "serve", str(served.folder), *arguments])
        if code:
            raise UsageError(f"`vllm serve` ended with exit code {code}", hint="its own lines above say why")


def _load(served: Served) -> tuple[Any, Any]:
    import torch

    dtype = served.values.get("dtype")
    if dtype not in DTYPES:
        raise CheckpointError(f"{served.folder} holds weights of type {dtype}, expected one of {', '.join(DTYPES)}")
    model: Any = load_student(served.folder, getattr(torch, dtype))
    tokenizer = load_tokenizer(served.folder, model.config.vocab_size, model.config.to_dict())
    return model.to(choose_device(served.device)), tokenizer


def _listening(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise UsageError(f"cannot listen on {host}, port {port}: {error}", hint="choose another --port") from error


def _announce(served: Served, bound: socket.socket, report: Report) -> None:
    host, port = bound.getsockname()[:2]
    address = f"[{host}]" if ":" in host else host
    report(f"{served.name} by {served.engine} on http://{address}:{port}/v1; Ctrl-C ends")
