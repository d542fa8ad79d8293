"""What a client returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["Completion", "Score"]


@dataclass(frozen=True)
class Completion:
    """The generated continuation of one prompt: a row of the signature `generate`.

    Attributes:
        generated_text: prompt and completion.
        completion: the new text alone.
        completion_bytes: its raw bytes, which need not be valid UTF-8.
        finish_reason: "stop" (end-of-text token or stop string) or "length".
        prompt_tokens: number of tokens in the prompt.
        completion_tokens: number of new tokens.
        token_ids: the new tokens; only with a parameter of `generate_tokens`, as the following.
        token_logprobs: log-probability of each new token, before sampling parameters.
        top_logprobs: of each new token's place, `top_logprobs` of the likeliest tokens, likeliest first: id to
            log-probability.
    """

    generated_text: str
    completion: str
    completion_bytes: bytes
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    token_ids: tuple[int, ...] = ()
    token_logprobs: tuple[float, ...] = ()
    top_logprobs: tuple[Mapping[int, float], ...] = ()


@dataclass(frozen=True)
class Score:
    """The score of one text: a row of the signature `score`.

    Attributes:
        loss: mean negative log-likelihood per token (natural log).
        perplexity: exp(loss).
        token_count: number of scored tokens.
        token_ids: `token_count` + 1 token ids; the first is context only.
        token_logprobs: log-probability of each token; 0 for the first.
        greedy_ids: the likeliest token in the place of each; -1 for the first. Empty if an old export has none.
    """

    loss: float
    perplexity: float
    token_count: int
    token_ids: tuple[int, ...]
    token_logprobs: tuple[float, ...]
    greedy_ids: tuple[int, ...] = ()
