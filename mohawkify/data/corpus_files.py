"""The files of a corpus: what they are called, and whether they are as they were written."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from mohawkify.data.tokenize import TOKEN_DTYPE
from mohawkify.errors import CheckpointError, StorageError
from mohawkify.files import atomic

TOKENS_FILE = "tokens.bin"  # little-endian unsigned 32-bit ids, nothing else: it is mapped into memory
OFFSETS_FILE = "offsets.bin"  # little-endian signed 64-bit
COMPLETION_FILE = "completion.bin"  # a byte per token, 0 or 1; only where it makes a difference
OFFSET_DTYPE = np.dtype("<i8")
LARGEST_ID = "largest_id"  # of the facts: found when the files were checked, never believed from the manifest
_TICK_NANOSECONDS = 2_000_000_000  # the coarsest clock by which file systems note a change
_COUNTS = ("tokens", "documents")
_SOURCE_COUNTS = ("rows", "documents", "tokens")
_TOKENS_AT_ONCE = 1 << 24


def shard_name(number: int) -> str:
    """The folder of a shard; only these names are read, whatever a manifest says."""
    return f"shard-{number:05d}"


def checked_facts(folder: Path) -> dict[str, Any]:
    """The facts of a corpus whose every file is as it was written, and the largest of its ids as `LARGEST_ID`.

    Hashing a large corpus takes minutes. So what was hashed is noted beside the folder, with every file's size, times
    of change and place on the disk, and is hashed again only once one of these is another: no program changes a file
    and leaves them all alone. What this cannot see is a disk that returns other bytes than it was given;
    `mohawkify doctor` hashes everything.

    A manifest may come from a stranger: what it says is compared with the files before anything is made from it.

    Raises:
        CheckpointError: a file is missing, extra or changed, or holds what no corpus does.
    """
    note = folder.parent / f".checked-{folder.name}.json"
    now = time.time_ns()
    # Before the folder is searched: a note in a run can lead to a folder of anything.
    facts = _sound_facts(folder)
    stamps = _stamps(folder)
    with suppress(CheckpointError, StorageError):
        noted = atomic.read_json(note) if note.is_file() else None
        if isinstance(noted, dict) and noted.get("files") == stamps and type(noted.get(LARGEST_ID)) is int:
            return {**facts, LARGEST_ID: noted[LARGEST_ID]}
    facts = verified_facts(folder)
    # A change within the same tick of the clock would go unseen: what is so young is hashed again next time.
    if all(now - stamp[2] > _TICK_NANOSECONDS for stamp in stamps.values()):
        with suppress(StorageError):  # text that lies where this user may only read is hashed every time
            atomic.write_json(note, {"files": stamps, LARGEST_ID: facts[LARGEST_ID]})
    return facts


def verified_facts(folder: Path) -> dict[str, Any]:
    """What `checked_facts` returns, whatever was noted before; nothing is written.

    Raises:
        CheckpointError: a file is missing, extra or changed, or holds what no corpus does.
    """
    facts = _sound_facts(folder)
    atomic.verify_directory(folder)
    try:
        return {**facts, LARGEST_ID: _largest_id(folder, facts)}
    except (OSError, ValueError) as error:  # files that the manifest does not list, or that hold nothing
        raise CheckpointError(f"{folder} cannot be read: {error}") from error


def _sound_facts(folder: Path) -> dict[str, Any]:
    try:
        manifest = atomic.read_json(folder / atomic.MANIFEST_NAME)
    except StorageError as error:
        raise CheckpointError(error.message) from error
    facts = manifest.get("facts") if isinstance(manifest, dict) else None
    if not isinstance(facts, dict) or not _are_sound(facts):
        raise CheckpointError(f"{folder / atomic.MANIFEST_NAME} does not say what a corpus holds")
    return facts


def _are_sound(facts: dict[str, Any]) -> bool:
    shards, sources, completions = facts.get("shards"), facts.get("sources"), facts.get("completion_tokens", "none")
    return (
        all(isinstance(facts.get(key), str) for key in ("fingerprint", "tokenizer", "teacher"))
        and all(_is_count(facts.get(key)) for key in _COUNTS)
        and (completions is None or _is_count(completions))
        and isinstance(shards, list)
        and len(shards) > 0
        and shards == [shard_name(number) for number in range(len(shards))]
        and isinstance(sources, list)
        and all(isinstance(source, dict) for source in sources)
        and all(_is_count(source.get(key)) for source in sources for key in _SOURCE_COUNTS)
    )


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _largest_id(folder: Path, facts: dict[str, Any]) -> int:
    """The largest token id of a corpus whose shards fit each other and what the manifest says."""
    documents = tokens = completions = largest = 0
    for name in facts["shards"]:
        shard = folder / name
        offsets = np.fromfile(shard / OFFSETS_FILE, dtype=OFFSET_DTYPE)
        size = (shard / TOKENS_FILE).stat().st_size
        borders_fit = len(offsets) > 1 and offsets[0] == 0 and int(offsets[-1]) * TOKEN_DTYPE.itemsize == size
        if not borders_fit or (np.diff(offsets) < 1).any():
            raise CheckpointError(f"{shard} holds borders of documents that do not fit its tokens")
        ids = np.memmap(shard / TOKENS_FILE, dtype=TOKEN_DTYPE, mode="r")
        largest = max(largest, *(int(part.max()) for part in _parts(ids)))
        if facts["completion_tokens"] is not None:
            flags = np.memmap(shard / COMPLETION_FILE, dtype=np.uint8, mode="r")
            if len(flags) != len(ids) or any(part.max() > 1 for part in _parts(flags)):
                raise CheckpointError(f"{shard / COMPLETION_FILE} does not fit the tokens")
            completions += sum(int(part.sum()) for part in _parts(flags))
        documents, tokens = documents + len(offsets) - 1, tokens + len(ids)
    found = (tokens, documents, completions)
    if found != (facts["tokens"], facts["documents"], facts["completion_tokens"] or 0):
        raise CheckpointError(f"{folder} holds {tokens:,} tokens of {documents:,} documents, its manifest says another")
    return largest


def _parts(values: np.ndarray) -> list[np.ndarray]:
    return [values[first : first + _TOKENS_AT_ONCE] for first in range(0, len(values), _TOKENS_AT_ONCE)]


def _stamps(folder: Path) -> dict[str, list[int]]:
    """Size, time of change of content, of content or name, and inode of every file below a folder."""
    stamps = {}
    for path, _, names in os.walk(folder):
        for name in names:
            file = Path(path) / name
            status = file.lstat()
            stamps[file.relative_to(folder).as_posix()] = [
                status.st_size,
                status.st_mtime_ns,
                status.st_ctime_ns,
                status.st_ino,
            ]
    return dict(sorted(stamps.items()))
