"""Turns off transformers' question on the terminal whether to run remote code, which some loaders ask anyway."""

from __future__ import annotations

from transformers import dynamic_module_utils


def never_ask() -> None:
    """Turn transformers' question into a refusal, for the whole process; call it before anything is loaded.

    ``trust_remote_code=False`` alone does not: some loaders do not pass it on to others that they call.
    """
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0  # seconds to wait for an answer; with none it does not ask
