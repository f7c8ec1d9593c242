"""An export to the Hugging Face Hub: shown first, uploaded on request."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from mohawkify.errors import ExportError, StorageError, UsageError
from mohawkify.exporters.card_facts import LICENCE_KEYS, card_metadata
from mohawkify.files.atomic import verify_directory
from mohawkify.files.manifest import MANIFEST_NAME
from mohawkify.run.folder import finished_run
from mohawkify.teacher.locate import HUB_ID

CARD = "README.md"
Report = Callable[[str], None]


@dataclass(frozen=True)
class PushOptions:
    """How an export is uploaded.

    Args:
        repo: its name on the Hub, ``owner/name``.
        licence: an identifier of the Hub's, such as ``apache-2.0``; None carries the teacher's over.
        private: whether a new repository is private.
        upload: False only shows what would be done.
    """

    repo: str
    licence: str | None = None
    private: bool = False
    upload: bool = False


def push_export(folder: Path | None, options: PushOptions, report: Report) -> dict[str, Any]:
    """Upload an export, every byte as it was written, as one commit.

    Args:
        folder: the export; None for the only one of the newest run.
        options: where to, and whether to.
        report: receives a line before the upload.

    Returns:
        ``directory``, ``repo``, ``files`` with the size of each, ``bytes``, ``card`` with the metadata, ``uploaded``,
        and the ``url`` of the commit, or None.

    Raises:
        UsageError: no such export, a name that the Hub does not have, or a licence that is unknown.
        CheckpointError: the export is incomplete or damaged.
        StorageError: the Hub refuses, or is not reached.
    """
    if not HUB_ID.fullmatch(options.repo) or "/" not in options.repo:
        raise UsageError(f"found the repository {options.repo}, expected owner/name")
    folder = _only_export() if folder is None else folder
    if not (folder / MANIFEST_NAME).is_file():
        raise UsageError(f"{folder} is no export of mohawkify", hint="`mohawkify export` writes one")
    files = {name: entry["bytes"] for name, entry in verify_directory(folder)["files"].items()}
    if CARD not in files:
        raise UsageError(
            f"{folder} has no {CARD}, expected an export with its card", hint="`mohawkify export` writes one"
        )
    card = _card(folder, options.licence)
    files[CARD] = len(str(card).encode())
    done: dict[str, Any] = {
        "directory": str(folder),
        "repo": options.repo,
        "files": files,
        "bytes": sum(files.values()),
        "card": card_metadata(str(card)),
        "uploaded": False,
        "url": None,
    }
    if options.upload:
        report(f"uploading {done['bytes']:,} bytes to {options.repo}")
        done |= {"uploaded": True, "url": _upload(folder, str(card), list(files), options)}
    return done


def _card(folder: Path, licence: str | None) -> ModelCard:
    card = ModelCard((folder / CARD).read_text(encoding="utf-8"))
    data: Any = card.data
    if licence is not None:
        for key in LICENCE_KEYS:
            data.pop(key)
        data.license = licence
    if not data.get("license"):
        raise UsageError(
            f"the card of {folder} states no licence: that of the teacher was not found",
            hint="look it up, its terms hold for the student too, and name it: --licence apache-2.0",
        )
    return card


def _only_export() -> Path:
    exports = finished_run(None).path / "exports"
    found = sorted(path for path in exports.iterdir() if path.is_dir()) if exports.is_dir() else []
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise UsageError(f"found {names} in {exports}, expected one export", hint="name the export's folder")
    return found[0]


def _upload(folder: Path, card: str, names: list[str], options: PushOptions) -> str:
    additions = [
        CommitOperationAdd(name, card.encode() if name == CARD else str(folder / name)) for name in sorted(names)
    ]
    api = HfApi()
    try:
        api.create_repo(options.repo, private=options.private, exist_ok=True)
        done = api.create_commit(options.repo, additions, commit_message="Upload a student made by mohawkify")
    except OfflineModeIsEnabled as error:
        raise StorageError("the Hub is switched off here (HF_HUB_OFFLINE)", hint="unset it, and push again") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        hint = "log in with `hf auth login`, with a token that may write" if status in (401, 403) else None
        raise StorageError(f"the Hub refuses {options.repo} ({status}): {str(error)[:200]}", hint=hint) from error
    except (OSError, RuntimeError, ValueError) as error:  # of the connection, and of one file's upload
        raise ExportError(
            f"{options.repo} was not uploaded: {error}", hint="the same command uploads what is missing"
        ) from error
    return str(done.commit_url)
