"""A student behind the server of mlx-lm; no code of the export's folder runs, and requests name no other model."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_lm import server
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mohawkify.exporters.mlx import load_mlx
from mohawkify.teacher.tokenizer import load_tokenizer

# The options of `mlx_lm server` at their defaults, but for the origins: pages of the web may not ask a local model.
_OPTIONS: dict[str, Any] = {
    "adapter_path": None, "draft_model": None, "num_draft_tokens": 3, "trust_remote_code": False,
    "chat_template": "", "use_default_chat_template": False, "chat_template_args": {}, "allowed_origins": [],
    "temp": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "max_tokens": 512, "decode_concurrency": 32,
    "prompt_concurrency": 8, "prefill_step_size": 2048, "prompt_cache_size": 10, "prompt_cache_bytes": None,
    "kv_bits": None, "kv_group_size": 64, "quantized_kv_start": 5000, "pipeline": False,
}  # fmt: skip
DEFAULT = "default_model"


class _OneModel(server.ModelProvider):
    """The one model that is served."""

    model: Any
    tokenizer: Any
    model_key: Any

    def __init__(self, name: str, folder: Path, values: Mapping[str, Any]) -> None:
        self.name, self._folder, self._values = name, folder, dict(values)
        super().__init__(Namespace(model=str(folder), **_OPTIONS))

    def load(self, model_path: str, adapter_path: Any = None, draft_model_path: Any = None) -> tuple[Any, Any]:
        """Load it on first use, in the thread that computes; raises ValueError for any other name."""
        if model_path not in (DEFAULT, self.name) or adapter_path or draft_model_path not in (None, DEFAULT):
            raise ValueError(f"found a request for {model_path}, expected {self.name} without adapters and drafts")
        if self.model is None:
            tokenizer = load_tokenizer(self._folder, self._values["vocab_size"], self._values)
            ends = self._values.get("eos_token_id")
            ends = ends if isinstance(ends, list) else [ends]
            self.tokenizer = TokenizerWrapper(
                tokenizer, eos_token_ids=[each for each in (*ends, tokenizer.eos_token_id) if each is not None]
            )
            self.model, self.model_key = load_mlx(self._folder), (DEFAULT, None, None)
            self.is_batchable = all(hasattr(layer, "merge") for layer in server.make_prompt_cache(self.model))
        return self.model, self.tokenizer


class _Handler(server.APIHandler):
    def handle_chat_completions(self) -> Any:
        """As mlx-lm's, but parts of messages other than text are refused: it would fetch images."""
        for message in self.body.get("messages") or []:
            parts = message.get("content") if isinstance(message, dict) else None
            if isinstance(parts, list) and any(not isinstance(p, dict) or p.get("type") != "text" for p in parts):
                raise ValueError("found a part of a message that is no text")
        return super().handle_chat_completions()

    def handle_models_request(self) -> None:
        """List the one model."""
        self._set_completion_headers(200)
        self.end_headers()
        provider: Any = self.response_generator.model_provider
        listed = {"object": "list", "data": [{"id": provider.name, "object": "model", "created": self.created}]}
        self.wfile.write(json.dumps(listed).encode())

    def log_message(self, format: str, *args: Any) -> None:
        """No line for every request."""


def run_mlx_server(name: str, folder: Path, values: Mapping[str, Any], host: str, port: int) -> None:
    """Serve an MLX export until the process is stopped."""
    provider = _OneModel(name, folder, values)
    generator = server.ResponseGenerator(provider, server.LRUPromptCache(_OPTIONS["prompt_cache_size"]))
    server._run_http_server(host, port, generator, handler_class=_Handler)
