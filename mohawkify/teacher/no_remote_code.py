"""transformers asks on the terminal whether it may run a stranger's code, even where a caller refused. Never here."""

from __future__ import annotations

from transformers import dynamic_module_utils


def never_ask() -> None:
    """Turn transformers' question into a refusal, for the whole process; call it before anything is loaded.

    ``trust_remote_code=False`` alone does not: some loaders forget it on the way to others that they call.
    """
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0  # seconds to wait for an answer; with none it does not ask
