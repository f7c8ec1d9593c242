"""Keep the libraries' chatter out of the way: progress bars of loading, notices for developers, prints."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TextIO

from mohawkify.cli.short_imports import import_models


@contextmanager
def quiet_libraries() -> Iterator[TextIO]:
    """Send whatever libraries print to standard error, and turn off what is of no use to a user.

    Yields:
        The real standard output, for data.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging

    logging.disable_progress_bar()  # one bar per loaded model; it turns off those of downloads too
    if not constants.HF_HUB_DISABLE_PROGRESS_BARS:
        enable_progress_bars()
    output = sys.stdout
    with warnings.catch_warnings(), redirect_stdout(sys.stderr):
        for category in (DeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", category)
        import_models()
        yield output
