"""A teacher's likeliest next tokens, kept on disk for the sequences of a corpus: written once, read in any order.

A folder holds `about/` - what the logits are of, the vocabulary, which sequences - and numbered shards of records, a
record per sequence. A record is found by its sequence alone, so order, batch size and number of processes are free.
docs/teachers.md has the layout byte by byte.

Shapes: b batch, l length, t tokens, k tokens kept, v vocabulary.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mohawkify.errors import CheckpointError, DataError, StorageError, UsageError
from mohawkify.files import atomic

if TYPE_CHECKING:
    from torch import Tensor

    from mohawkify.ops.losses import TopK

FORMAT = 1
SHARD_BYTES = 1 << 26
LEAST_LOG_PROB = -1e4  # float16 ends at -65504; below -104 a probability is 0 in float32 anyway
ABOUT = "about"  # the folder that makes another one a folder of teacher logits

_SIZES = ("sequence_length", "top_k", "vocab_size", "shard_sequences")
_VOCABULARY_FILE = "vocabulary.json"
_SEQUENCES_FILE = "sequences.bin"  # sorted, little-endian signed 64-bit
_RECORDS_FILE = "records.bin"
_SEQUENCE_DTYPE = np.dtype("<i8")
_LOG_PROB_DTYPE = np.dtype("<f2")
_REST_DTYPE = np.dtype("<f4")


def top_tokens(logits_tv: Tensor, num_tokens: int) -> TopK:
    """The k likeliest tokens with their log-probabilities in float32, and the log of what is left to all others.

    Args:
        logits_tv: a teacher's logits after some tokens.
        num_tokens: k, at most v.
    """
    import torch

    from mohawkify.ops.losses import TopK

    log_probs_tv = torch.log_softmax(logits_tv.float(), dim=-1)
    log_probs_tk, ids_tk = log_probs_tv.topk(num_tokens, dim=-1)
    # Summed up from its own tokens: one minus the others would lose it where it is small.
    return TopK(ids_tk, log_probs_tk, log_probs_tv.scatter_(-1, ids_tk, -torch.inf).logsumexp(-1))


@dataclass(frozen=True)
class Layout:
    """The layout of the files: it determines the position of every byte.

    Args:
        sequence_length: l, tokens per sequence.
        top_k: k, tokens kept per position.
        vocab_size: v; every id is below.
        shard_sequences: sequences of a shard; the last one may have fewer.
    """

    sequence_length: int
    top_k: int
    vocab_size: int
    shard_sequences: int = 1

    @property
    def id_bytes(self) -> int:
        """Bytes of a token's id: as few as the vocabulary needs, two at least."""
        return max(2, -(-(self.vocab_size - 1).bit_length() // 8))

    @property
    def bytes_per_token(self) -> int:
        """Bytes of a position: k ids, k log-probabilities, the rest."""
        return self.top_k * (self.id_bytes + _LOG_PROB_DTYPE.itemsize) + _REST_DTYPE.itemsize

    @property
    def record_bytes(self) -> int:
        """Bytes of a sequence."""
        return self.sequence_length * self.bytes_per_token

    def with_shards(self) -> Layout:
        """The layout with shards of the usual size."""
        return replace(self, shard_sequences=max(1, SHARD_BYTES // self.record_bytes))

    def encode(self, tokens: TopK) -> bytes:
        """The records of some sequences: of each all ids, then all log-probabilities, then all rests."""
        ids = tokens.ids_blk.cpu().numpy().astype("<u4")[..., None].view(np.uint8)[..., : self.id_bytes]
        log_probs = tokens.log_probs_blk.float().clamp_min(LEAST_LOG_PROB).cpu().numpy().astype(_LOG_PROB_DTYPE)
        rest = tokens.log_rest_bl.cpu().numpy().astype(_REST_DTYPE)
        return b"".join(part[sequence].tobytes() for sequence in range(len(ids)) for part in (ids, log_probs, rest))

    def decode(self, record: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of one record: ids (l, k) int64, log-probabilities (l, k) float32, log of the rest (l,) float32."""
        count = self.sequence_length * self.top_k
        ends = np.cumsum([count * self.id_bytes, count * _LOG_PROB_DTYPE.itemsize])
        packed, log_probs, rest = np.split(record, ends)
        wide = np.zeros((count, 4), dtype=np.uint8)
        wide[:, : self.id_bytes] = packed.reshape(count, self.id_bytes)
        shape = (self.sequence_length, self.top_k)
        return (
            wide.view("<u4").astype(np.int64).reshape(shape),
            log_probs.view(_LOG_PROB_DTYPE).astype(np.float32).reshape(shape),
            rest.view(_REST_DTYPE).astype(np.float32),
        )


class TeacherLogits:
    """A folder of teacher logits.

    Args:
        folder: the folder; `create` makes it, and raises where it is of something else.

    Raises:
        DataError: it is not such a folder, or `about/` is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            _require_no_link(folder / ABOUT)
            manifest = atomic.verify_directory(folder / ABOUT)
        except CheckpointError as error:
            raise DataError(
                f"{folder} holds no teacher logits: {error.message}",
                hint="expected a folder written by `mohawkify cache-logits`",
            ) from error
        self.facts = _checked(manifest["facts"], folder)
        self.layout = Layout(**{key: self.facts[key] for key in _SIZES})
        self.sequences = _read_sequences(folder / ABOUT / _SEQUENCES_FILE)
        self._seal = atomic.file_sha256(folder / ABOUT / atomic.MANIFEST_NAME)
        self._verified: set[int] = set()

    @staticmethod
    def create(
        folder: Path, layout: Layout, facts: Mapping[str, Any], vocabulary: Mapping[str, int], sequences: np.ndarray
    ) -> TeacherLogits:
        """Begin a folder of logits, or find one of the same facts and sequences.

        Args:
            folder: where.
            layout: where every byte lies.
            facts: a JSON object: ``teacher``, ``tokenizer``, ``text``, ``temperature``.
            vocabulary: the id of every token.
            sequences: (n,) which sequences of the corpus, sorted.

        Raises:
            UsageError: the folder holds the logits of something else.
        """
        facts = {"teacher_logits_format": FORMAT, **facts, **asdict(layout)}
        order = np.ascontiguousarray(sequences, dtype=_SEQUENCE_DTYPE)
        if not (folder / ABOUT).exists():
            foreign = [entry.name for entry in folder.iterdir() if not entry.name.startswith(".")]
            if set(foreign) - {"corpora"}:
                raise UsageError(f"{folder} is not empty (it holds {foreign[0]})", hint="choose another --output")
            with atomic.atomic_directory(folder / ABOUT, facts=facts) as about:
                # Tokenizers list their tokens in another order every time.
                by_id = sorted(vocabulary.items(), key=lambda item: item[1])
                atomic.write_json(about / _VOCABULARY_FILE, dict(by_id))
                atomic.write_bytes(about / _SEQUENCES_FILE, order.tobytes())
        found = TeacherLogits(folder)
        other = [key for key in facts if found.facts.get(key) != json.loads(json.dumps(facts[key]))]
        if other or not np.array_equal(found.sequences, order):
            raise UsageError(
                f"{folder} holds teacher logits with another {other[0] if other else 'choice of sequences'}",
                hint="choose another --output, or remove that folder",
            )
        return found

    @property
    def num_shards(self) -> int:
        """How many shards there are when all are written."""
        return -(-len(self.sequences) // self.layout.shard_sequences)

    def missing(self) -> list[int]:
        """The shards that are not there yet."""
        return [number for number in range(self.num_shards) if not self._shard(number).is_dir()]

    def shard_sequences(self, number: int) -> np.ndarray:
        """Which sequences of the corpus a shard holds, in order."""
        size = self.layout.shard_sequences
        return self.sequences[number * size : (number + 1) * size]

    def write_shard(self, number: int, parts: Iterable[TopK]) -> None:
        """Write a shard, complete or not at all.

        Args:
            number: which one.
            parts: the tokens of its sequences in order, some sequences at a time.
        """
        facts = {"teacher_logits_format": FORMAT, "shard": number, "about": self._seal}
        with atomic.atomic_directory(self._shard(number), facts=facts) as folder:
            _write_records(folder / _RECORDS_FILE, (self.layout.encode(tokens) for tokens in parts))

    def vocabulary(self) -> dict[str, int]:
        """The id of every token."""
        try:
            vocabulary = atomic.read_json(self.folder / ABOUT / _VOCABULARY_FILE)
        except (CheckpointError, StorageError) as error:
            raise DataError(error.message) from error
        if not isinstance(vocabulary, dict) or not all(type(index) is int for index in vocabulary.values()):
            raise DataError(f"{self.folder / ABOUT / _VOCABULARY_FILE} is no vocabulary")
        return vocabulary

    def require_complete(self) -> None:
        """Refuse a folder that lacks shards, or sequences that are about to be read."""
        missing = self.missing()
        if missing:
            raise DataError(
                f"{self.folder} lacks {len(missing)} of {self.num_shards} shards of teacher logits",
                hint="the same `mohawkify cache-logits` command continues it",
            )

    def require_sequences(self, sequences: np.ndarray) -> None:
        """Refuse sequences whose logits are not stored."""
        lacking = np.setdiff1d(sequences, self.sequences)
        if len(lacking):
            raise DataError(
                f"{self.folder} has no teacher logits for sequence {lacking[0]} and {len(lacking) - 1} more",
                hint="write them with the recipe that reads them: `mohawkify cache-logits TEACHER --recipe ...`",
            )

    def identity(self) -> str:
        """A hash of everything that the folder holds, from the manifests, which hold the hashes of the records."""
        digest = hashlib.sha256(self._seal.encode())
        for number in range(self.num_shards):
            _require_no_link(self._shard(number))
            digest.update(atomic.file_sha256(self._shard(number) / atomic.MANIFEST_NAME).encode())
        return digest.hexdigest()

    def read(self, sequences: np.ndarray) -> TopK:
        """The tokens of some sequences, their probabilities put right to a sum of 1 after rounding.

        Args:
            sequences: (b,) numbers of sequences, in any order.

        Raises:
            DataError: a sequence is not there, or a shard is damaged; a shard is verified when it is first read.
        """
        import torch

        from mohawkify.ops.losses import TopK

        self.require_sequences(np.asarray(sequences))
        decoded = [self._read_one(int(index)) for index in np.searchsorted(self.sequences, sequences)]
        ids, log_probs, log_rest = (torch.from_numpy(np.stack(arrays)) for arrays in zip(*decoded, strict=True))
        total = torch.logaddexp(log_probs.logsumexp(-1), log_rest)
        return TopK(ids, log_probs - total.unsqueeze(-1), log_rest - total)

    def verify_shard(self, number: int) -> None:
        """Refuse a shard that `read` would refuse for any of its sequences.

        Args:
            number: which one.

        Raises:
            DataError: it is missing, damaged, of other logits, or holds what are no probabilities.
        """
        first = number * self.layout.shard_sequences
        for index in range(first, first + len(self.shard_sequences(number))):
            self._read_one(index)

    def _read_one(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        number, row = divmod(index, self.layout.shard_sequences)
        self._verify(number)
        # Mapped for the moment only: thousands of shards would be thousands of open files.
        records = np.memmap(self._shard(number) / _RECORDS_FILE, dtype=np.uint8, mode="r")
        size = self.layout.record_bytes
        ids, log_probs, log_rest = self.layout.decode(np.array(records[row * size : (row + 1) * size]))
        finite = np.isfinite(log_probs).all() and not np.isnan(log_rest).any() and (log_rest <= 1e-3).all()
        if not finite or ids.max() >= self.layout.vocab_size:
            raise DataError(f"{self._shard(number)} holds what are no probabilities of tokens")
        return ids, log_probs, log_rest

    def _verify(self, number: int) -> None:
        if number in self._verified:
            return
        shard = self._shard(number)
        try:
            _require_no_link(shard)
            facts = atomic.verify_directory(shard)["facts"]
        except CheckpointError as error:
            raise DataError(
                f"teacher logits are damaged: {error.message}",
                hint=f"remove {shard}; the same `mohawkify cache-logits` command writes it again",
            ) from error
        records = shard / _RECORDS_FILE
        size = records.stat().st_size if records.is_file() else None
        expected = len(self.shard_sequences(number)) * self.layout.record_bytes
        if facts.get("shard") != number or facts.get("about") != self._seal or size != expected:
            raise DataError(f"{shard} belongs to other teacher logits", hint=f"remove {shard}, then write it again")
        self._verified.add(number)

    def _shard(self, number: int) -> Path:
        return self.folder / f"shard-{number:06d}"


def _write_records(path: Path, records: Iterable[bytes]) -> None:
    with path.open("wb") as file:
        for record in records:
            file.write(record)


def _require_no_link(folder: Path) -> None:
    """Refuse a link in the place of a folder, which could lead anywhere; `verify_directory` checks its content."""
    if folder.is_symlink():
        raise CheckpointError(f"{folder} is a link, expected a folder")


def _read_sequences(path: Path) -> np.ndarray:
    """Which sequences there are, from a file that may come from a stranger."""
    size = path.stat().st_size if path.is_file() else 0
    sequences = np.fromfile(path, dtype=_SEQUENCE_DTYPE) if size else np.empty(0, dtype=_SEQUENCE_DTYPE)
    is_rising = len(sequences) > 0 and sequences[0] >= 0 and bool((sequences[1:] > sequences[:-1]).all())
    if not is_rising or size % _SEQUENCE_DTYPE.itemsize:
        raise DataError(f"{path} does not say which sequences the teacher was asked about, in rising order")
    return sequences


def _checked(facts: Any, folder: Path) -> dict[str, Any]:
    """The facts of `about/`, which may come from a stranger: checked before they are used."""
    if not isinstance(facts, dict):
        raise DataError(f"{folder} does not say what its teacher logits are of")
    if facts.get("teacher_logits_format") != FORMAT:
        raise DataError(
            f"{folder} has teacher logits of format {facts.get('teacher_logits_format')}, expected {FORMAT}",
            hint="use the version of mohawkify that wrote them",
        )
    sizes = [facts.get(key) for key in _SIZES]
    sound = all(type(size) is int and 1 <= size < 1 << 31 for size in sizes)
    sound = sound and facts["top_k"] <= facts["vocab_size"]
    texts = all(isinstance(facts.get(key), str) for key in ("text", "tokenizer"))
    if not sound or not texts or not isinstance(facts.get("teacher"), dict) or facts.get("temperature") != 1.0:
        raise DataError(f"{folder} does not say what its teacher logits are of")
    return facts
