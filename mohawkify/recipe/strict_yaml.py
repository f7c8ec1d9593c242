"""A small, safe part of YAML: mappings, lists and plain values, with the line of every key.

No tags, no anchors, no duplicate keys, bounded in size and depth. Values follow YAML 1.2: ``1e-4`` is a number, ``yes``
and ``12:30`` are text.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from mohawkify.errors import RecipeError

MAX_BYTES = 256 * 1024
MAX_DEPTH = 16
MAX_NODES = 5000
MAX_NUMBER_LENGTH = 64  # Python refuses to read integers of thousands of digits.

KeyPath = tuple[str | int, ...]
Lines = dict[KeyPath, int]

_NULL = "tag:yaml.org,2002:null"
_BOOL = "tag:yaml.org,2002:bool"
_INT = "tag:yaml.org,2002:int"
_FLOAT = "tag:yaml.org,2002:float"
_STRING = "tag:yaml.org,2002:str"

# The core schema of YAML 1.2 without its hexadecimal and octal integers, which stay text.
_PLAIN_VALUES = (
    (_NULL, re.compile(r"^(?:~|null|Null|NULL|)$")),
    (_BOOL, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")),
    (_INT, re.compile(r"^[-+]?[0-9]+$")),
    (
        _FLOAT,
        re.compile(
            r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
            r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
        ),
    ),
)


class YamlProblem(Exception):
    """The fault of a YAML text, with its line."""

    def __init__(self, problem: str, line: int) -> None:
        super().__init__(problem)
        self.problem = problem
        self.line = line


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader's reader, scanner and parser with rules of our own for what may stand in a document."""

    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012 - PyYAML reads a class attribute; its own stays untouched

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = 0
        self.num_nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise YamlProblem("found an anchor or alias (& or *), which are refused; quote the value", line)
        if getattr(event, "tag", None) is not None:
            raise YamlProblem("found a tag (!), which is refused; quote the value", line)
        self.num_nodes += 1
        if self.num_nodes > MAX_NODES:
            raise YamlProblem(f"found more than {MAX_NODES} values", line)
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise YamlProblem(f"found values nested more than {MAX_DEPTH} levels deep", line)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _StrictDumper(yaml.SafeDumper):
    """Writes what the loader reads back unchanged: lists of plain values on one line, everything else on its own."""

    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012 - PyYAML reads a class attribute; its own stays untouched

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        # In other styles PyYAML writes line breaks of Unicode such as U+0085 as they are, and reads them as blanks.
        return self.represent_scalar(_STRING, data, style=None if data.isprintable() else '"')

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> yaml.SequenceNode:
        on_one_line = not any(isinstance(item, dict | list | tuple) for item in sequence)
        return super().represent_sequence(tag, sequence, flow_style=on_one_line)


for _tag, _pattern in _PLAIN_VALUES:
    _StrictLoader.add_implicit_resolver(_tag, _pattern, None)
    _StrictDumper.add_implicit_resolver(_tag, _pattern, None)
_StrictDumper.add_representer(str, _StrictDumper.represent_str)


def parse_yaml(text: str) -> tuple[Any, Lines]:
    """Reads one YAML document.

    Returns:
        The document (dict, list, str, int, float, bool or None) and the line, from 1, of every key and list item.

    Raises:
        YamlProblem: the text is not YAML, or uses a part of YAML that is refused.
    """
    if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise YamlProblem(f"found more than {MAX_BYTES // 1024} kB of text", 1)
    try:
        node = _compose(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise YamlProblem(f"not valid YAML: {error.problem or error.context}", mark.line + 1 if mark else 1) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise YamlProblem(
            f"found the character U+{ord(text[error.position]):04X}, expected printable text", line
        ) from error
    except (ValueError, OverflowError) as error:
        # PyYAML's scanner hands an escape such as "\UFFFFFFFF" to chr() unchecked, and a long %YAML version to int().
        raise YamlProblem("not valid YAML: an escape or version number is out of range", 1) from error
    lines: Lines = {(): 1}
    data = None if node is None else _construct(node, (), lines)
    return data, lines


def load_yaml(text: str, source: str) -> tuple[Any, Lines]:
    """Reads one YAML document.

    Args:
        text: the document.
        source: the name of its file, for errors.

    Returns:
        As `parse_yaml`.

    Raises:
        RecipeError: the text is not YAML, or uses a part of YAML that is refused; names file and line.
    """
    try:
        return parse_yaml(text)
    except YamlProblem as error:
        raise RecipeError(f"{source}:{error.line}: {error.problem}") from error


def dump_yaml(data: Any) -> str:
    """Writes plain data as YAML that `load_yaml` reads back equal."""
    return yaml.dump(
        data, Dumper=_StrictDumper, sort_keys=False, default_flow_style=False, allow_unicode=True, width=float("inf")
    )


def read_text(path: Path, source: str) -> str:
    """Reads a YAML file without ever holding more than the size limit.

    Args:
        path: the file.
        source: its name, for errors.

    Raises:
        RecipeError: the file is missing, unreadable, too large or not UTF-8.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise RecipeError(f"{source}: no such file", hint="mohawkify recipes ls lists the bundled recipes") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the path
        raise RecipeError(f"{source}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if len(content) > MAX_BYTES:
        raise RecipeError(f"{source}:1: found more than {MAX_BYTES // 1024} kB of text")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise RecipeError(f"{source}:{line}: found bytes that are not UTF-8 text") from error


def _compose(text: str) -> yaml.Node | None:
    loader = _StrictLoader(text)
    try:
        return loader.get_single_node()
    finally:
        loader.dispose()


def _construct(node: yaml.Node, path: KeyPath, lines: Lines) -> Any:
    if isinstance(node, yaml.MappingNode):
        return _construct_mapping(node, path, lines)
    if isinstance(node, yaml.SequenceNode):
        items = []
        for index, item in enumerate(node.value):
            lines[(*path, index)] = item.start_mark.line + 1
            items.append(_construct(item, (*path, index), lines))
        return items
    return _construct_plain(node)


def _construct_mapping(node: yaml.MappingNode, path: KeyPath, lines: Lines) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise YamlProblem("found a list or mapping as a key, expected a word", line)
        key = _text(key_node)
        if key in mapping:
            raise YamlProblem(f"found the key {key!a} twice, first in line {lines[(*path, key)]}", line)
        lines[(*path, key)] = line
        mapping[key] = _construct(value_node, (*path, key), lines)
    return mapping


def _construct_plain(node: yaml.Node) -> Any:
    if node.tag == _STRING:
        return _text(node)
    if node.tag == _NULL:
        return None
    if node.tag == _BOOL:
        return node.value.lower() == "true"
    if len(node.value) > MAX_NUMBER_LENGTH:
        raise YamlProblem(f"found a number of more than {MAX_NUMBER_LENGTH} digits", node.start_mark.line + 1)
    # YAML writes .inf and .nan, Python inf and nan; whether they are welcome is the schema's business.
    return int(node.value) if node.tag == _INT else float(re.sub(r"\.(?=[a-zA-Z])", "", node.value))


def _text(node: yaml.Node) -> str:
    """Refuses what an escape can bring in and no file name or UTF-8 file can hold."""
    text: str = node.value
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise YamlProblem("found a NUL or half of a surrogate pair in a text", node.start_mark.line + 1)
    return text
