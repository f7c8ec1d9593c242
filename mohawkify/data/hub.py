"""Rows of a dataset on the Hugging Face Hub, streamed; where the line breaks, reading goes on at that row."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from mohawkify.data.readers import Row, table_row
from mohawkify.errors import DataError

if TYPE_CHECKING:
    from mohawkify.recipe.schema import Source

Report = Callable[[str], None]

# Seconds before each new try. Before the Hub was reached at all, a typing error or a missing network is likelier than
# an interruption that will pass. Behind every row that comes, the count begins anew.
_WAITS_AT_FIRST = (1.0, 2.0)
_WAITS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0)
_PASSING_STATUS = {408, 425, 429, 500, 502, 503, 504}
_NETWORK_LIBRARIES = {"aiohttp", "httpcore", "httpcore2", "httpx", "httpx2", "requests", "urllib3"}


class Position(NamedTuple):
    """A position in a source, between two rows.

    Args:
        rows: rows before it.
        stream: what the Hub's stream needs to go on there, as JSON values; None for other sources.
    """

    rows: int
    stream: dict[str, Any] | None = None


BEGINNING = Position(0)
After = Callable[[], Position]


def ignore(line: str) -> None:
    """Ignore a line."""


def hub_rows(source: Source, name: str, start: Position, report: Report) -> Iterator[tuple[Row, After]]:
    """Stream the rows of a dataset from a position on, each once, whatever the network does in between.

    Args:
        source: the dataset, its configuration, split and revision.
        name: the source's name in messages.
        start: where reading begins.
        report: receives a line for every new try.

    Returns:
        Rows, each with a function that tells the position behind it; to be called before the next row.

    Raises:
        DataError: the dataset is not there or not open to this user, or the Hub cannot be reached for too long.
    """
    stream = _Stream(source, start)
    failures = 0
    while True:
        try:
            for columns in stream:
                failures = 0
                yield table_row(f"{name}, row {stream.num_rows}", columns), stream.position
            return
        # Names, network, formats and decoders fail in errors of half a dozen libraries that share no base class.
        except Exception as error:
            waits = _WAITS if stream.num_rows > start.rows or stream.was_reached else _WAITS_AT_FIRST
            if not _will_pass(error) or failures >= len(waits):
                raise DataError(f"cannot read {name}: {_reason(error)}", hint=_hint(error)) from error
            wait = waits[failures]
            failures += 1
            report(
                f"{name}: {_reason(error)}; going on behind row {stream.num_rows:,} in {wait:g} s"
                f" (try {failures} of {len(waits)})"
            )
            stream = _Stream(source, stream.position())
            time.sleep(wait)


class _Stream:
    """The rows behind a position, in one connection.

    Args:
        source: the dataset.
        start: where it begins.
    """

    def __init__(self, source: Source, start: Position) -> None:
        self.source, self.start = source, start
        self.num_rows = start.rows
        self.was_reached = start.stream is not None
        self._dataset: Any = None
        self._revision: str | None = None
        self._is_counting = False

    def position(self) -> Position:
        """The place behind the last row that came."""
        if self._dataset is None:
            return self.start
        import datasets

        state = None if self._is_counting else self._dataset.state_dict()
        return Position(self.num_rows, {"revision": self._revision, "datasets": datasets.__version__, "state": state})

    def __iter__(self) -> Iterator[dict[str, Any]]:
        import datasets
        from huggingface_hub import HfApi

        if _is_offline():
            raise ConnectionError("the Hub is switched off")
        _disable_library_retries()
        source, kept = self.source, self.start.stream
        assert source.hub is not None
        # The first request: it fails at once if a name is wrong or the network is gone, and the commit it names is what
        # is read to the end, whatever is uploaded meanwhile.
        self._revision = kept["revision"] if kept else HfApi().dataset_info(source.hub, revision=source.revision).sha
        self.was_reached = True
        dataset = datasets.load_dataset(
            source.hub, source.name, split=source.split, revision=self._revision, streaming=True
        )
        dataset = _undecoded(dataset)
        if kept and kept["state"] is not None and kept["datasets"] == datasets.__version__:
            dataset.load_state_dict(kept["state"])
        elif self.start.rows:  # another version may store positions in another form: the rows are counted again
            dataset = dataset.skip(self.start.rows)
            self._is_counting = True
        self._dataset = dataset
        for columns in dataset:
            self.num_rows += 1
            yield dict(columns)


def _undecoded(dataset: Any) -> Any:
    """The dataset with images, sounds and the like as they are stored: decoding opens the files that a row names."""
    return dataset if dataset.features is None else dataset.decode(False)


def _disable_library_retries() -> None:
    """The library would wait 20 times 5 seconds at every read, with a line in a hidden log."""
    from datasets import config

    config.STREAMING_READ_MAX_RETRIES = config.STREAMING_OPEN_MAX_RETRIES = 1
    config.STREAMING_READ_RETRY_INTERVAL = config.STREAMING_OPEN_RETRY_INTERVAL = 0
    config.STREAMING_READ_SERVER_UNAVAILABLE_RETRY_INTERVAL = config.STREAMING_READ_RATE_LIMIT_RETRY_INTERVAL = 0


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _status(error: BaseException) -> int | None:
    for link in _chain(error):
        status = getattr(getattr(link, "response", None), "status_code", None) or getattr(link, "status", None)
        if isinstance(status, int):
            return status
    return None


def _will_pass(error: Exception) -> bool:
    """Whether a new try may help: the network, or a server that is busy."""
    if _is_offline():
        return False
    status = _status(error)
    if status is not None:
        return status in _PASSING_STATUS
    return any(
        isinstance(link, ConnectionError | TimeoutError) or type(link).__module__.split(".")[0] in _NETWORK_LIBRARIES
        for link in _chain(error)
    )


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0]


def _is_offline() -> bool:
    import datasets

    return bool(datasets.config.HF_HUB_OFFLINE)


def _hint(error: Exception) -> str:
    if _is_offline():
        return "HF_DATASETS_OFFLINE or HF_HUB_OFFLINE is set: unset it, or use local files"
    if _status(error) in (401, 403):
        return "ask for access on the dataset's page if it is gated, then `hf auth login`; or check its name"
    if _will_pass(error):
        return "check the network and https://status.huggingface.co; the same command goes on where it stopped"
    return "check name, configuration and split on the Hub, the network, and `hf auth login` for gated datasets"
