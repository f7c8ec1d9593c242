"""A disk that loses power: what was done is recorded, and every state it may be found in afterwards is laid out.

Nothing is certain but what was flushed. The content of a file that was not is old, empty, zero, torn or new, of a file
that has only grown what was added to it; of the names of a folder that was not, each change is there or not, whatever
came before or after it.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.files import faults

Operation = tuple[str, Path, Any]
Tree = dict[str, bytes | None]  # relative names; None for a folder


@dataclass(eq=False)
class File:
    """A file's content as programs see it, and as the disk has it for sure."""

    now: bytes = b""
    sure: bytes = b""

    def crashed(self, mode: str) -> bytes:
        """What a power cut may leave."""
        if self.now == self.sure:
            return self.sure
        kept = self.sure if self.now.startswith(self.sure) else b""
        added = self.now[len(kept) :]
        found = {"empty": b"", "zero": bytes(len(added)), "torn": added[: len(added) // 2], "new": added}
        return self.sure if mode == "old" else kept + found[mode]


@dataclass(eq=False)
class Folder:
    """A folder's names as programs see them, as the disk has them for sure, and the changes between."""

    now: dict[str, File | Folder] = field(default_factory=dict)
    sure: dict[str, File | Folder] = field(default_factory=dict)
    pending: list[tuple[str, str, Any]] = field(default_factory=list)


MODES = ("old", "empty", "zero", "torn", "new")


@contextmanager
def recorded(top: Path) -> Iterator[list[Operation]]:
    """Record what changes the disk below a folder, in order."""
    operations: list[Operation] = []
    watched = tuple(name for name in faults.OPERATIONS if name not in ("open", "fchmod", "pwrite", "ftruncate"))

    def recording(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*args: Any, **kwargs: Any) -> Any:
            kind, further = name, None
            path = _path_of(name, original, args, kwargs)
            result = original(*args, **kwargs)
            if top in (path, *path.parents):
                if name in ("rename", "replace"):
                    further = Path(args[1])
                elif name == "create" and "a" in kwargs.get("mode", args[1]):
                    kind = "append"
                elif name == "truncate":
                    further = args[0]
                elif name == "write":
                    further = args[0].encode() if isinstance(args[0], str) else bytes(args[0])
                elif name == "save_file":
                    operations.append(("create", path, None))
                    kind, further = "write", path.read_bytes()
                operations.append((kind, path, further))
            return result

        return operation

    with faults.replaced(recording, watched):
        yield operations


def _path_of(name: str, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Path:
    """The absolute path that an operation is about."""
    if name in ("write", "truncate"):
        return Path(original.__self__.name)
    first = args[1] if name == "save_file" else args[0]
    if isinstance(first, int):
        return Path(os.readlink(f"/proc/self/fd/{first}"))
    folder = kwargs.get("dir_fd")
    return Path(os.readlink(f"/proc/self/fd/{folder}")) / first if folder is not None else Path(os.path.abspath(first))


class Disk:
    """A model of a folder and what of it is certain.

    Args:
        top: the folder, as it is; all of it is certain.
    """

    def __init__(self, top: Path) -> None:
        self.top, self.root = top, _folder_of(top)

    def do(self, operation: Operation) -> None:
        """Do an operation that was recorded."""
        name, path, further = operation
        if path == self.top:
            assert name == "fsync", f"found {name} of the folder itself"
            _flush(self.root)
            return
        parent, last = self._find(path.parent), path.name
        assert isinstance(parent, Folder)
        node = parent.now.get(last)
        if name in ("create", "append"):
            if node is None:
                self._change(parent, ("link", last, File()))
            elif name == "create":
                assert isinstance(node, File)
                node.now = b""
        elif name == "truncate":
            assert isinstance(node, File)
            node.now = node.now[:further]
        elif name == "write":
            assert isinstance(node, File)
            node.now += further
        elif name == "mkdir":
            self._change(parent, ("link", last, Folder()))
        elif name in ("rename", "replace"):
            assert further.parent == path.parent, "a rename from folder to folder is not modelled"
            self._change(parent, ("rename", last, further.name))
        elif name in ("unlink", "rmdir"):
            self._change(parent, ("unlink", last, None))
        elif name == "fsync":
            if isinstance(node, File):
                node.sure = node.now
            else:
                assert isinstance(node, Folder)
                _flush(node)
        else:
            raise AssertionError(f"{name} is not modelled")

    def states(self, draw: random.Random, more: int = 4) -> Iterator[Tree]:
        """The states a power cut may leave now: all changes of names, none, all but one, all up to one, and some drawn
        at random, each with every mode of content, and some with a mode drawn for each file."""
        changes = [(id(folder), number) for folder in _folders(self.root) for number in range(len(folder.pending))]
        subsets = [set(changes), set()]
        subsets += [set(changes) - {change} for change in changes]
        subsets += [set(changes[:number]) for number in range(1, len(changes))]
        subsets += [{change for change in changes if draw.random() < 0.5} for _ in range(more)]
        for subset in subsets:
            for mode in MODES:
                yield _laid_out(self.root, subset, lambda mode=mode: mode)  # type: ignore[misc]
            yield _laid_out(self.root, subset, lambda: draw.choice(MODES))

    def _find(self, path: Path) -> File | Folder:
        node: File | Folder = self.root
        for name in path.relative_to(self.top).parts:
            assert isinstance(node, Folder)
            node = node.now[name]
        return node

    def _change(self, folder: Folder, change: tuple[str, str, Any]) -> None:
        _apply(folder.now, change)
        folder.pending.append(change)


def write_out(tree: Tree, top: Path) -> None:
    """Make a state's files and folders in an empty folder."""
    for name, content in sorted(tree.items()):
        if content is None:
            (top / name).mkdir()
        else:
            (top / name).write_bytes(content)


def hash_of(tree: Tree) -> str:
    """Tells states apart."""
    digest = hashlib.sha256()
    for name, content in sorted(tree.items()):
        digest.update(f"{name}\0{'folder' if content is None else len(content)}\0".encode() + (content or b""))
    return digest.hexdigest()


def _folder_of(path: Path) -> Folder:
    folder = Folder()
    for entry in path.iterdir():
        folder.now[entry.name] = _folder_of(entry) if entry.is_dir() else File(*[entry.read_bytes()] * 2)
    folder.sure = dict(folder.now)
    return folder


def _folders(folder: Folder) -> Iterator[Folder]:
    """A folder and all that may be below it after a power cut."""
    yield folder
    for node in {id(node): node for node in (*folder.sure.values(), *folder.now.values())}.values():
        if isinstance(node, Folder):
            yield from _folders(node)


def _flush(folder: Folder) -> None:
    folder.sure = dict(folder.now)
    folder.pending.clear()


def _apply(names: dict[str, Any], change: tuple[str, str, Any]) -> None:
    kind, name, further = change
    if kind == "link":
        names[name] = further
    elif kind == "unlink":
        names.pop(name, None)
    elif name in names:
        names[further] = names.pop(name)


def _laid_out(folder: Folder, subset: set[tuple[int, int]], mode: Callable[[], str], prefix: str = "") -> Tree:
    names = dict(folder.sure)
    for number, change in enumerate(folder.pending):
        if (id(folder), number) in subset:
            _apply(names, change)
    tree: Tree = {}
    for name, node in names.items():
        if isinstance(node, File):
            tree[prefix + name] = node.crashed(mode())
        else:
            tree[prefix + name] = None
            tree |= _laid_out(node, subset, mode, f"{prefix}{name}/")
    return tree
