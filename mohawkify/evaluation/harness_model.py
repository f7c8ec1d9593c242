"""A model for lm-eval. Imported only where lm-eval is installed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mohawkify.data.tokenize import require_rows
from mohawkify.errors import DataError
from mohawkify.evaluation.response_cache import ResponseCache
from mohawkify.families.positions import longest_sequence


class CheckedLM(HFLM):
    """Refuses requests that exceed the window before the first forward pass, and skips answered ones.

    lm-eval alone stops half-way, wordless.

    Args:
        model: teacher or student.
        tokenizer: of both; copied, because lm-eval gives it a padding token.
        batch_size: questions per forward pass.
        responses: where responses are found and kept; None runs everything.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        responses: ResponseCache | None,
    ) -> None:
        own = copy.deepcopy(tokenizer)
        self._rows = model.config.vocab_size
        if own.pad_token_id is not None and own.pad_token_id >= self._rows:
            own.pad_token = None  # a [PAD] behind the last row; lm-eval chooses another one
        window = longest_sequence(model)  # MPT's key is none of those that lm-eval looks for
        super().__init__(pretrained=model, tokenizer=own, batch_size=batch_size, max_length=window)
        self.truncated_requests = 0
        self._responses = responses
        if responses is not None:
            self.set_cache_hook(responses)

    def tok_encode(self, string: str, *args: Any, **kwargs: Any) -> list[int]:
        """The tokens of a text, which the model must have."""
        ids = super().tok_encode(string, *args, **kwargs)
        require_rows(ids, self.tokenizer, self._rows)
        return ids

    def tok_batch_encode(self, strings: list[str], *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """The tokens of several texts in padded rows, which the model must have."""
        ids, mask = super().tok_batch_encode(strings, *args, **kwargs)
        require_rows(ids, self.tokenizer, self._rows)
        return ids, mask

    def loglikelihood(self, requests: list[Any], *args: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        """Log-likelihoods of continuations, and whether greedy writing would give them."""
        return self._remaining("loglikelihood", requests, lambda rest: super(CheckedLM, self).loglikelihood(rest))

    def loglikelihood_rolling(self, requests: list[Any], *args: Any, **kwargs: Any) -> list[float]:
        """Log-likelihoods of whole texts."""
        return self._remaining(
            "loglikelihood_rolling", requests, lambda rest: super(CheckedLM, self).loglikelihood_rolling(rest)
        )

    def generate_until(self, requests: list[Any], *args: Any, **kwargs: Any) -> list[str]:
        """Texts written to the end; sampled ones depend on all that was drawn before, and are always written anew."""
        if any(request.args[1].get("do_sample") for request in requests):
            return super().generate_until(requests)
        return self._remaining("generate_until", requests, lambda rest: super(CheckedLM, self).generate_until(rest))

    def _remaining(self, kind: str, requests: list[Any], run: Callable[[list[Any]], list[Any]]) -> list[Any]:
        """The responses to all requests, in order; only those without a stored response are run."""
        if self._responses is None:
            return run(requests)
        known = [self._responses.find(kind, request.args) for request in requests]
        self.truncated_requests += sum(
            self._responses.was_cut(kind, request.args)
            for request, answer in zip(requests, known, strict=True)
            if answer is not None
        )
        rest = [request for request, answer in zip(requests, known, strict=True) if answer is None]
        new = iter(run(rest) if rest else [])
        return [next(new) if answer is None else answer for answer in known]

    def _loglikelihood_tokens(self, requests: list[Any], *args: Any, **kwargs: Any) -> Any:
        for request, context_ids, continuation_ids in requests:
            if len(continuation_ids) > self.max_length:
                raise DataError(
                    f"an answer of {len(continuation_ids)} tokens does not fit the models' window of "
                    f"{self.max_length}: {request[1].strip()[:60]!r}...",
                    hint="leave out that task, or set a --limit below that question",
                )
            # The last token is only predicted, so one more than the window fits.
            if len(context_ids) + len(continuation_ids) > self.max_length + 1:
                self.truncated_requests += 1
                if self._responses is not None:
                    self._responses.will_be_cut("loglikelihood", request)
        return super()._loglikelihood_tokens(requests, *args, **kwargs)
