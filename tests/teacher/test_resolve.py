"""A teacher is resolved once: its config.json is parsed once and its weights are read once, and so are a student's."""

from __future__ import annotations

from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.modeling_utils

from mohawkify.errors import TeacherError
from mohawkify.exporters.export import export_run
from mohawkify.files import atomic, safetensors_headers
from mohawkify.files.safetensors_headers import read_tensors
from mohawkify.recipe.loading import parse_recipe
from mohawkify.run.folder import RunFolder
from mohawkify.teacher import resolve, validate
from mohawkify.teacher.resolve import resolve_teacher
from mohawkify.train.conversion import ConvertOptions
from mohawkify.train.trainer import convert
from tests.commands import make_teacher
from tests.teacher.damage import EMBEDDING, HEAD, config, weights
from tests.tiny import save_teacher, tiny_teacher
from tests.train.test_convert import RECIPE, teacher_folder

__all__ = ["teacher_folder"]
PARSED, HEADERS, WEIGHTS, HASHED = "config.json parsed", "headers read", "weights read", "bytes hashed"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, str]]:
    """Counts the reads of model files by what is done and the file's folder and name."""
    counts: Counter[tuple[str, str]] = Counter()

    def count(owner: Any, name: str, what: str) -> None:
        original = getattr(owner, name)

        def counted(path: Any, *args: Any, **kwargs: Any) -> Any:
            counts[what, "/".join(Path(path).parts[-2:])] += 1
            return original(path, *args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    count(validate, "read_json", PARSED)
    count(transformers.configuration_utils.PreTrainedConfig, "_dict_from_json_file", PARSED)
    count(safetensors_headers, "read_header", HEADERS)
    count(transformers.modeling_utils, "safe_open", WEIGHTS)
    count(resolve, "file_sha256", HASHED)
    return counts


def test_a_conversion_reads_its_teacher_once_and_an_export_its_student(teacher_folder, tmp_path, reads):
    run: RunFolder = convert(
        str(teacher_folder), parse_recipe(RECIPE, "tiny.yaml"), ConvertOptions(output=tmp_path / "run")
    )
    config, weights = (f"{teacher_folder.name}/{name}" for name in ("config.json", "model.safetensors"))
    assert reads[PARSED, config] == reads[HEADERS, weights] == 1
    assert reads[WEIGHTS, weights] == 2, "names and shapes first, then the values"
    assert reads[HASHED, config] == reads[HASHED, weights] == 1
    for target in ("hf", "mlx") if find_spec("mlx_lm") else ("hf",):
        reads.clear()
        export_run(run.path, target, tmp_path / target, report=lambda line: None)
        config, weights = "final/config.json", "final/model.safetensors"
        assert reads[PARSED, config] == reads[HEADERS, weights] == reads[WEIGHTS, weights] == 1


def test_what_was_resolved_is_handed_on(tmp_path: Path) -> None:
    folder = make_teacher(tmp_path / "teacher")
    teacher = resolve_teacher(str(folder))
    assert teacher.fetch("weights") is teacher
    assert teacher.tensors is teacher.tensors
    assert teacher.file_hashes["config.json"] == atomic.file_sha256(folder / "config.json")
    assert len(teacher.tokenizer) <= teacher.spec.vocab_size


def test_a_configuration_alone_has_no_weights(tmp_path: Path) -> None:
    file = make_teacher(tmp_path / "teacher") / "config.json"
    teacher = resolve_teacher(str(file))
    assert (teacher.folder, teacher.name) == (None, "teacher")
    with pytest.raises(TeacherError, match="is a file, expected a folder with weights"):
        teacher.fetch("weights")
    with pytest.raises(TeacherError, match="expected a folder with weights"):
        _ = teacher.tensors


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_tied_head_is_compared_by_its_numbers(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = make_teacher(tmp_path / "teacher", tie_word_embeddings=True)
    weights(lambda t: t.update({EMBEDDING: (t[EMBEDDING] * 8).round(), HEAD: (t[EMBEDDING] * 8).round().to(dtype)}))(
        folder
    )
    assert resolve_teacher(str(folder)).tensors
    weights(lambda t: t[HEAD].view(-1)[-1:].add_(1))(folder)
    with pytest.raises(TeacherError, match="tie_word_embeddings true"):
        assert resolve_teacher(str(folder)).tensors


def test_a_head_of_another_name_is_found(tmp_path: Path) -> None:
    """GPT-NeoX writes its head as embed_out, which is no name of its modules."""
    folder = save_teacher(tiny_teacher("gpt_neox", tie_word_embeddings=False), tmp_path / "neox")
    assert "embed_out.weight" in read_tensors(folder)
    assert resolve_teacher(str(folder)).tensors
    config(tie_word_embeddings=True)(folder)
    with pytest.raises(TeacherError, match="tie_word_embeddings true"):
        assert resolve_teacher(str(folder)).tensors
