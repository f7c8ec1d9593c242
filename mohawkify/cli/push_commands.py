"""The command push."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import yaml

from mohawkify.cli.options import FOLDER, as_json, print_line, print_result
from mohawkify.cli.quiet import quiet_libraries


@click.command()
@click.argument("export", required=False, type=FOLDER)
@click.option("--repo", required=True, metavar="NAME", help="Where to: owner/name. It is made where it is not there.")
@click.option(
    "--licence", "--license", metavar="ID", help="The Hub's name of the licence, where the teacher's is not known."
)
@click.option("--private", is_flag=True, help="Make a new repository private.")
@click.option("--upload", "--yes", is_flag=True, help="Upload; without it, only show what would be uploaded.")
@as_json
def push(export: Path | None, as_json: bool, **options: Any) -> None:
    """Upload an export to the Hugging Face Hub.

    EXPORT is a folder that `export` wrote, by default the only one of the newest run. Without --upload nothing is
    sent: the files, their sizes and the card's metadata are shown.
    """
    with quiet_libraries():
        from mohawkify import api

        done = api.push(export, api.PushOptions(**options), print_line)
    print_result(done, _text, as_json)


def _text(done: dict[str, Any]) -> str:
    width = max(len(f"{size:,}") for size in done["files"].values())
    files = [f"{size:>{width},}  {name}" for name, size in sorted(done["files"].items())]
    card = yaml.safe_dump(done["card"], sort_keys=False, allow_unicode=True)
    end = done["url"] or f"nothing was uploaded to {done['repo']}: --upload does it ({done['bytes']:,} bytes)"
    return "\n".join([*files, "", card, end])
