"""The command serve."""

from __future__ import annotations

from pathlib import Path

import click

from mohawkify.cli.options import FOLDER, print_line
from mohawkify.cli.quiet import quiet_libraries


@click.command()
@click.argument("run", required=False, type=FOLDER)
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any that is free.")
def serve(run: Path | None, host: str, port: int) -> None:
    """Serve a student to OpenAI-style clients.

    RUN is a run, or the folder of an export: a run and an `hf` export are served by transformers, `mlx` exports by
    mlx-lm, `mamba2` exports by vLLM where it is installed, else by transformers. Chat and completions, with streaming.
    """
    with quiet_libraries():
        from mohawkify import api

        api.serve(run, host, port, print_line)
