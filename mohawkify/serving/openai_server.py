"""A student behind the server of `transformers serve`, which by itself loads no model with recurrent layers.

Of that server two endpoints and the list of models are kept; requests are checked, and name no other model, file or
template.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import GenerationState
from uvicorn import Config, Server

from mohawkify.data.chat import render_conversation, require_chat_template
from mohawkify.data.conversation import read_conversation
from mohawkify.data.tokenize import require_rows
from mohawkify.errors import MohawkifyError, UsageError
from mohawkify.families.positions import longest_sequence

PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health")
# Fields of transformers' own with which a request would bring a template or settings that call for code.
REFUSED = ("generation_config", "chat_template_kwargs")
GRACE_SECONDS = 3  # for answers that are being written when the server ends


class _OneModel(ModelManager):
    """The one model that is served, loaded already."""

    def __init__(self, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.force_model, self._pair = name, (model, tokenizer)

    def load_model_and_processor(self, *args: Any, **kwargs: Any) -> Any:
        return self._pair

    def get_gen_models(self, *args: Any) -> list[dict[str, Any]]:
        return [{"id": self.force_model, "object": "model", "created": 0, "owned_by": "mohawkify"}]


class _Checked:
    """What both endpoints do with a request before transformers answers it."""

    def text(self, body: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
        """The text to continue."""
        raise NotImplementedError

    special: bool

    async def handle_request(self: Any, body: dict[str, Any], request_id: str) -> Any:
        """Check a request, make its tokens and settings, and have transformers answer.

        Raises:
            MohawkifyError: the request is not in order.
        """
        for key in REFUSED:
            if key in body:
                raise UsageError(f"the request holds {key}, which is not served here")
        self._validate_request(body)
        model_id, model, tokenizer = self._resolve_model(body)
        tokens = tokenizer(self.text(body, tokenizer), add_special_tokens=self.special, return_tensors="pt")
        length, window = tokens["input_ids"].shape[1], longest_sequence(model)
        if length == 0:
            raise UsageError("the request's text is empty, expected some")
        require_rows(tokens["input_ids"], tokenizer, model.config.vocab_size)
        try:
            settings = self._build_generation_config(body, model.generation_config)
        except (TypeError, ValueError, AttributeError) as error:
            raise UsageError(f"the request holds a setting of a wrong kind: {error}") from error
        if settings.max_new_tokens < 1:
            raise UsageError(f"the request asks for {settings.max_new_tokens} tokens, expected at least 1")
        if window is not None and length >= window:
            raise UsageError(f"the request has {length:,} tokens, expected fewer than the model's {window:,} positions")
        settings.max_new_tokens = min(settings.max_new_tokens, window - length if window else settings.max_new_tokens)
        if body.get("temperature"):  # else the teacher's settings decide whether it counts
            settings.do_sample = True
        answer = self._streaming if body.get("stream") else self._non_streaming
        inputs = tokens.to(model.device)
        done = answer(
            request_id, model, tokenizer, model_id, inputs, settings, self.generation_state.get_manager(model_id)
        )
        return done if body.get("stream") else await done


class _Chat(_Checked, ChatCompletionHandler):
    special = False  # the template writes them

    def text(self, body: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
        require_chat_template(tokenizer)
        conversation = read_conversation(body.get("messages"), {"tools": body.get("tools")}, "the request")
        if not conversation.messages:
            raise UsageError("the request has no messages, expected at least one")
        return render_conversation(conversation, tokenizer, "the request", add_generation_prompt=True)


class _Completion(_Checked, CompletionHandler):
    special = True

    def text(self, body: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
        prompt = body.get("prompt")
        if not isinstance(prompt, str):
            raise UsageError(f"the request's prompt is a {type(prompt).__name__}, expected a text")
        return prompt


def make_app(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> FastAPI:
    """The application around a model."""
    manager, state = _OneModel(name, model, tokenizer), GenerationState()
    absent: Any = None  # the handlers of endpoints that are taken out
    app: FastAPI = build_server(
        manager, _Chat(manager, state), _Completion(manager, state), absent, absent, absent, state
    )
    app.router.routes = [route for route in app.router.routes if getattr(route, "path", None) in PATHS]

    @app.exception_handler(MohawkifyError)
    async def refuse(request: Request, error: MohawkifyError) -> JSONResponse:
        return _refusal(400, error.message)

    @app.exception_handler(HTTPException)  # of transformers, whose form OpenAI's client does not show
    async def reword(request: Request, error: HTTPException) -> JSONResponse:
        return _refusal(error.status_code, str(error.detail))

    return app


def _refusal(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": "invalid_request_error"}}, status_code=status)


def run_server(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, bound: socket.socket) -> None:
    """Serve a model on a socket until the process is stopped."""
    app = make_app(name, model, tokenizer)
    Server(Config(app, log_level="warning", timeout_graceful_shutdown=GRACE_SECONDS)).run(sockets=[bound])
