"""Resolve a teacher once: find it, validate its configuration, lay out its modules. No weights are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedTokenizerBase

from mohawkify.errors import TeacherError
from mohawkify.families.adapter import Adapter
from mohawkify.families.autodetect import find_adapter
from mohawkify.files.atomic import file_sha256
from mohawkify.files.safetensors_headers import TensorHeader, read_tensors
from mohawkify.teacher.gguf import gguf_facts, read_once, require_unchanged
from mohawkify.teacher.locate import Need, gguf_file, locate, teacher_name
from mohawkify.teacher.meta_model import lay_out
from mohawkify.teacher.teacher_spec import TeacherSpec
from mohawkify.teacher.tokenizer import load_tokenizer
from mohawkify.teacher.tokenizer_files import OF_THE_TEACHER, text_hashes
from mohawkify.teacher.validate import (
    require_config,
    require_plain_weights,
    require_settings,
    require_token_ids,
    require_weights,
    without_code,
)

# Not architecture: these keys make transformers return more than the results.
UNUSED_KEYS = ("output_attentions", "output_hidden_states")


@dataclass(frozen=True, eq=False)
class ResolvedTeacher:
    """A teacher whose configuration is validated and whose weights are not in memory; made by `resolve_teacher`.

    Its weights and tokenizer are validated when they are first used, and once.

    Args:
        source: the folder, file or Hub id as the user gave it.
        config_file: its config.json.
        folder: the folder with weights and tokenizer; None where only a config.json was given or fetched.
        values: the content of config.json.
        config: its configuration, without keys that would run code.
        adapter: its family.
        spec: its facts.
        modules: its modules on the meta device.
        gguf: of a GGUF file its name, its hash and its tensors' types; None of other teachers.
    """

    source: str
    config_file: Path
    folder: Path | None
    values: Mapping[str, Any]
    config: transformers.PretrainedConfig
    adapter: Adapter
    spec: TeacherSpec
    modules: nn.Module
    gguf: Mapping[str, Any] | None = None

    @property
    def name(self) -> str:
        """The last part of its path or Hub id."""
        return teacher_name(self.source)

    def fetch(self, need: Need) -> ResolvedTeacher:
        """Fetch more of a teacher of the Hub: see `resolve_teacher`; one in a local folder is returned as it is.

        Raises:
            TeacherError: only a config.json was given, or the Hub cannot be reached.
        """
        if self.folder is not None:
            return self
        config_file, folder = locate(self.source, need)
        if config_file != self.config_file:  # the Hub has a newer revision by now
            return resolve_teacher(self.source, need)
        return replace(self, folder=folder)

    def require_folder(self) -> Path:
        """The folder with its weights and tokenizer; raises TeacherError where they were not fetched."""
        if self.folder is None:
            raise TeacherError(f"of {self.source} there is only {self.config_file}, expected a folder with weights")
        return self.folder

    @cached_property
    def tensors(self) -> dict[str, TensorHeader]:
        """The headers of its weights by name, compared with the files, the index and the configuration.

        Raises:
            TeacherError: no safetensors; names or links that leave the folder; damaged files; an index that disagrees
                with them; quantised weights; weights that are not those of the model in config.json.
        """
        tensors = read_tensors(self.require_folder())
        require_plain_weights(self.config_file, self.values)
        require_weights(self.config_file, self.modules, tensors)
        return tensors

    @cached_property
    def file_hashes(self) -> dict[str, str]:
        """The sha256 of every file that decides what the teacher computes, by name; reads them all once."""
        weights = sorted({tensor.file for tensor in self.tensors.values()})
        files = [*weights, self.config_file, *(self.require_folder() / name for name in OF_THE_TEACHER)]
        hashes = {file.name: file_sha256(file) for file in files if file.is_file()}
        if self.gguf is not None:
            require_unchanged(self.require_folder(), hashes)
        return hashes

    @cached_property
    def text_hashes(self) -> dict[str, str]:
        """The sha256 of the other files that decide how text becomes tokens and how a student generates, by name."""
        return text_hashes(self.require_folder())

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer; see `load_tokenizer`."""
        return load_tokenizer(self.require_folder(), self.spec.vocab_size, self.values)

    @cached_property
    def tokens(self) -> dict[str, int]:
        """The id of every token that has a row in its embedding."""
        return {token: number for token, number in self.tokenizer.get_vocab().items() if number < self.spec.vocab_size}


def resolve_teacher(source: str, need: Need = "config") -> ResolvedTeacher:
    """Resolve a teacher.

    Args:
        source: a Hub id, a folder, a GGUF file or a config.json. A GGUF file is read once, into a folder.
        need: ``config``, ``tokenizer`` or ``weights``: the files that are fetched from the Hub, each kind with those
            before it. A local folder has all of them.

    Raises:
        TeacherError: no such teacher, a broken configuration, sizes that no model has, or only a config.json where more
            is needed.
        UnknownFamilyError: the family cannot be converted.
        CheckpointError: config.json is not strict JSON.
    """
    file = gguf_file(source)
    folder = None if file is None else read_once(file, resolve_teacher)
    gguf = None if folder is None else gguf_facts(folder)
    config_file, folder = locate(source if folder is None else str(folder), need)
    values, config, adapter = read_config(config_file)
    modules, spec = lay_out(source, config_file, config, adapter)
    return ResolvedTeacher(source, config_file, folder, values, config, adapter, spec, modules, gguf)


def read_config(path: Path) -> tuple[dict[str, Any], transformers.PretrainedConfig, Adapter]:
    """Read a config.json with its family's own configuration class; keys that would run code are dropped.

    Returns:
        Its content, the configuration and the family.

    Raises:
        TeacherError: a broken configuration, sizes that no model has, keys that are no settings, tokens that the
            vocabulary does not have, or an unknown family.
        CheckpointError: not strict JSON.
    """
    raw = require_config(path)
    if not isinstance(raw.get("model_type"), str):
        raise TeacherError(f"{path} has no model_type", hint="expected the config.json of a transformers model")
    if raw["model_type"].startswith("mohawk_"):
        raise TeacherError(f"{path} is already a student of mohawkify (model_type {raw['model_type'][:100]})")
    values = {key: value for key, value in without_code(raw).items() if key not in UNUSED_KEYS}
    if _has_no_row(values.get("pad_token_id"), values.get("vocab_size")):
        values["pad_token_id"] = None  # a [PAD] behind the last row: nothing is padded with it
    adapter = find_adapter(raw["model_type"], values)
    require_settings(path, values, getattr(transformers, adapter.config_class))
    try:
        config = getattr(transformers, adapter.config_class)(**values)
        reason = adapter.refuse(config) if adapter.refuse else None
    except Exception as error:
        raise TeacherError(
            f"{path} is not a valid {adapter.model_type} configuration: {' '.join(str(error).split())[:300]}"
        ) from error
    if getattr(config, "is_causal", True) is False or getattr(config, "use_bidirectional_attention", None) in (
        True,
        "all",
    ):
        reason = "its attention sees the future"
    require_token_ids(path, config)
    if reason:
        raise TeacherError(f"the {adapter.title} model of {path} cannot be converted: {reason}")
    return raw, config, adapter


def _has_no_row(token: Any, rows: Any) -> bool:
    return type(token) is int and type(rows) is int and token >= rows
