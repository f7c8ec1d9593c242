"""mohawkify turns a pretrained Transformer into a recurrent model by MOHAWK distillation.

The functions of `mohawkify.api` are attributes of this package, such as `mohawkify.convert`. They are imported on first
use, so that `import mohawkify` stays light.
"""

from typing import Any

__version__ = "0.1.0"
_FUNCTIONS = (
    "inspect",
    "plan",
    "write_recipe",
    "convert",
    "tune",
    "evaluate",
    "export",
    "generate",
    "chat",
    "serve",
    "push",
    "import_checkpoint",
)
_OPTIONS = (
    "Budget",
    "PlanOptions",
    "ConvertOptions",
    "EvaluateOptions",
    "GenerateOptions",
    "PushOptions",
    "ImportOptions",
)


def __getattr__(name: str) -> Any:
    if name in _FUNCTIONS or name in _OPTIONS:
        from mohawkify import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
