"""The lists in docs/families.md, written from the files in `adapters/` and from the families that are refused."""

from __future__ import annotations

from mohawkify.families.adapter import Adapter
from mohawkify.families.registry import adapter_names, load_adapter
from mohawkify.families.unsupported import UNSUPPORTED
from tools.recipe_docs import replace_between

BEGIN = "<!-- From here to the end mark the page is written from adapters/; `tools.family_docs` renews it. -->"
END = "<!-- End of what is written from adapters/. -->"


def family_reference() -> str:
    """Writes Markdown with a row for every family that can be converted, and a row for every one that cannot."""
    families = [load_adapter(name) for name in adapter_names()]
    return "\n".join(
        [
            f"## The {len(families)} families with a file",
            "",
            "| type | family | for example | what is odd about it | hybrids | MLX | Mamba-2 |",
            "|---|---|---|---|---|---|---|",
            *(_family_row(family) for family in families),
            "",
            "## What cannot be converted",
            "",
            "| type | why |",
            "|---|---|",
            *(_row(f"`{name}`", UNSUPPORTED[name]) for name in sorted(UNSUPPORTED)),
            "",
        ]
    )


def with_reference(page: str) -> str:
    """Returns a Markdown page with the part between its two marks written anew.

    Raises:
        ValueError: the page lacks a mark.
    """
    return replace_between(page, BEGIN, END, family_reference())


def _family_row(family: Adapter) -> str:
    examples = ", ".join(f"`{name}`" for name in family.examples)
    # A layer that keeps its attention is the teacher's own, whatever the family.
    mlx = "yes" if family.mlx_module else "no"
    mamba2 = {"hybrids": "yes", "layers": "no hybrids", None: "no"}[family.mamba2]
    return _row(f"`{family.model_type}`", family.title, examples, " ".join(family.notes), "yes", mlx, mamba2)


def _row(*cells: str) -> str:
    escaped = [cell.replace("|", "\\|") for cell in cells]
    return f"| {' | '.join(escaped)} |"
