"""The model card of an export: what it is, how good it is, how to run it, what it cannot do."""

from __future__ import annotations

import os
from typing import Any

from huggingface_hub import ModelCardData

from mohawkify.exporters.card_facts import card_facts
from mohawkify.exporters.mlx import FINER_BITS
from mohawkify.mixers.kinds import mixer_class, mixer_kinds
from mohawkify.run.folder import RunFolder
from mohawkify.student.student_spec import memory_text
from mohawkify.teacher.locate import HUB_ID, teacher_name

_RUN_TRANSFORMERS = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(DIR, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)
```

The Python files beside the weights are the model's code: read them before you trust them. With mohawkify installed they
are not needed; `import mohawkify.auto` makes both calls work without `trust_remote_code`.
"""
_RUN_STOCK = """\
The model has the layers of GraniteMoeHybrid, which transformers, vLLM and mlx-lm have: no code travels with it.

```
vllm serve DIR
python -m mlx_lm generate --model DIR --prompt "Once upon a time"
```

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(DIR)
model = AutoModelForCausalLM.from_pretrained(DIR)
```

It needs float32 or bfloat16: float16 does not reach down to its numbers.
"""
_RUN_STOCK_MLX = """\
```
python -m mlx_lm generate --model DIR --prompt "Once upon a time"
```

mlx-lm 0.32 or newer, which has the model, GraniteMoeHybrid: no code travels with it.
"""
_RUN_MLX = """\
```
python -m mlx_lm generate --model DIR --trust-remote-code --prompt "Once upon a time"
```

mlx-lm 0.32 or newer. `mlx_model.py` beside the weights is the model's code: read it before you trust it.
"""
_RUN_LLAMBA = """\
The folder has the names and sizes of the released Llamba checkpoints: it is laid out for `LlambaLMHeadModel` of
`cartesia_pytorch`, which was not tried, and `mohawkify import DIR` makes a run of it.
"""
_RUNS = {
    ("transformers", False): _RUN_TRANSFORMERS,
    ("transformers", True): _RUN_STOCK,
    ("mlx", False): _RUN_MLX,
    ("mlx", True): _RUN_STOCK_MLX,
    ("llamba", False): _RUN_LLAMBA,
}
_LIMITS = """\
- The mixers' memory has a fixed size: recalling a detail word for word from far back is where such models are weakest.
- A state cannot be rolled back: no speculative decoding with this model as the draft or the target.
- What the teacher got wrong, the student gets wrong too. The teacher's licence and terms apply.
"""


def model_card(run: RunFolder, library: str, bits: int | None, result: dict[str, Any], is_stock: bool = False) -> str:
    """Write the card.

    Args:
        run: the finished run.
        library: ``transformers``, ``mlx`` or ``llamba``.
        bits: of the quantised weights, None where there are none.
        result: precision and agreement with the run, as `export_run` returns them.
        is_stock: whether the library has the model, so that no code travels.

    Returns:
        Markdown with a YAML header. It names no path of the machine it was made on.

    Raises:
        CheckpointError: the run's facts or results are damaged.
    """
    student, source = run.student(), run.teacher()["source"]
    name = run.results().get("name") or student.get("name") or "A Mohawk student"
    base = source if HUB_ID.fullmatch(source) and not os.path.exists(source) else None
    data = ModelCardData(
        base_model=base,
        base_model_relation=None if base is None else "finetune" if bits is None else "quantized",
        library_name=None if library == "llamba" else library,
        pipeline_tag="text-generation",
        tags=["mohawk", "mamba2", "recurrent", "distillation"] + (["mlx"] if library == "mlx" else []),
        **card_facts(run),
    )
    parts = [
        f"---\n{data.to_yaml()}\n---\n\n# {name}\n",
        _description(base or (teacher_name(source) if source else "its teacher"), student),
        "## Quality\n\n" + _quality(run.results()),
        "## How to run it\n\n" + _RUNS[library, is_stock],
        "## Precision\n\n" + _precision(bits, result),
        "## Limits\n\n" + _LIMITS,
    ]
    return "\n".join(parts)


def _description(teacher: str, student: dict[str, Any]) -> str:
    specs = student.get("layer_specs", ())
    kinds = [layer["kind"] for layer in specs if layer["mixer_heads"]]
    grafted, mixers = len(kinds), mixer_class(kinds[0]).title if kinds and kinds[0] in mixer_kinds() else "recurrent"
    where = f"in {grafted} layers " if grafted else ""
    size = f" It has {student['num_parameters']:,} parameters." if "num_parameters" in student else ""
    kept = sum(layer["attention_heads"] for layer in specs)
    if kept:
        total = kept + sum(layer["mixer_heads"] for layer in specs)
        size += f"\nOf the teacher's {total:,} heads of attention it keeps {kept:,}."
    if "state_elements" in student:
        size += f" Its memory is {memory_text(student)}."
    return (
        f"A recurrent language model made from {teacher} with mohawkify: attention {where}was replaced by {mixers}\n"
        "mixers (see Llamba, arXiv 2502.14458), and the model distilled in the three stages of MOHAWK\n"
        f"(arXiv 2408.10189).{size}\n"
    )


def _quality(results: dict[str, Any]) -> str:
    lines = ["| | training tokens | perplexity | KL (nats/token) | top-1 agreement |", "|---|---:|---:|---:|---:|"]
    if "perplexity" in results.get("teacher", {}):
        lines.append(f"| teacher | | {results['teacher']['perplexity']:.3f} | 0 | 1 |")
    for stage, metrics in results.get("stages", {}).items():
        row = f"{metrics['perplexity']:.3f} | {metrics['kl']:.4f} | {metrics['top1']:.4f}"
        lines.append(f"| after {stage} | {metrics['tokens']:,} | {row} |")
    return (
        "\n".join(lines)
        + "\n\nMeasured on held-out text before this export; KL and agreement are against the teacher.\n"
    )


def _precision(bits: int | None, result: dict[str, Any]) -> str:
    weights = f"The weights are {result['dtype']}"
    if bits is not None:
        weights = (
            f"Projections, MLPs or experts, embedding and head have {bits} bits (at least {FINER_BITS} where errors"
            " cost most: embedding, head, values and the last projection of MLPs; 8 where mlx-lm asks for them), the"
            f" rest is {result['dtype']}"
        )
    dtypes = result["dtypes"].items()
    text = (
        f"{weights}; the mixers' parameters that need it are float32.\n\n"
        f"Against the run in float32, on {result['tokens']:,} tokens of {result['text']}:\n"
        f"KL {result['kl']:.2g} nats per token, top-1 agreement {result['top1']:.4f}, largest difference of a logit\n"
        f"{result['max_logit_difference']:.2g}, perplexity {result['run_perplexity']:.4g} of the run, "
        f"{result['perplexity']:.4g} of this export.\n\n"
        + "".join(f"- {row['tensors']:,} tensors of {dtype}: {row['elements']:,} values\n" for dtype, row in dtypes)
    )
    if result["plain"]:
        text += f"\nNot quantised, because neither 64 nor 32 divides their width: {', '.join(result['plain'])}.\n"
    return text
