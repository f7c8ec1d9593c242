"""The imports of commands, without work that none of them needs."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def paused_collector() -> Iterator[None]:
    """Pause Python's collector of reference cycles, for imports and short commands.

    It takes a sixth of the time in which torch and transformers are imported, and finds nothing there.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def import_models() -> None:
    """Import what all models of transformers share.

    scipy would be imported for the losses of object detection, which no language model has. The files of all models
    would be searched for names twice, by the package and by `transformers.models`, under two names of one folder.
    """
    from unittest.mock import patch

    from transformers import utils
    from transformers.utils import import_utils

    search = import_utils.create_import_structure_from_path

    def search_once(path: str | Path) -> object:
        return search(Path(path).parent if Path(path).name == "__init__.py" else path)

    with (
        paused_collector(),
        patch.object(import_utils, "create_import_structure_from_path", search_once),
        patch.object(utils, "is_scipy_available", lambda: False),
    ):
        import transformers.modeling_utils  # noqa: F401
