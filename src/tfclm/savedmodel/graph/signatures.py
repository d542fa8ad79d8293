"""The exported module: the signatures, built from the tokenizer, the decoding loop and the scores."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from tfclm.errors import InputError
from tfclm.savedmodel.checks import require
from tfclm.savedmodel.graph.engine import Engine, EngineLimits
from tfclm.savedmodel.graph.network import Network
from tfclm.savedmodel.graph.passes import CompiledSizes
from tfclm.savedmodel.graph.requests import RequestChecks, first_invalid
from tfclm.savedmodel.graph.sampling import PARAM_TYPES, SamplingParams
from tfclm.savedmodel.graph.scoring import token_logprobs
from tfclm.savedmodel.graph.stopping import StopFinder
from tfclm.savedmodel.settings import INT32, Defaults, ServableSettings, defaults
from tfclm.savedmodel.tokenizer import GraphTokenizer
from tfclm.savedmodel.tokenizer.detokenizer import GraphDetokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TFPreTrainedModel

__all__ = ["GenerationModule"]

Tensor = Any

MAX_REQUEST_TOKENS = 2**20


class GenerationModule(tf.Module):
    """A causal LM and its tokenizer as one graph.

    A tokenizer that cannot be put into the graph exactly leaves the signature `generate_tokens` alone;
    `tokenizer_problem` then says why.

    Args:
        model: a TensorFlow causal LM of transformers.
        tokenizer: its fast tokenizer.
        settings: defaults, limits and compilation.

    Raises:
        InputError: a setting out of its range, or a model that cannot be exported exactly.

    Example:
        >>> module = GenerationModule(model, tokenizer, ServableSettings())
        >>> module.signatures()["serving_default"](prompt=tf.constant(["The"]))["generated_text"].shape
        TensorShape([1])
    """

    def __init__(
        self, model: TFPreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: ServableSettings
    ) -> None:
        super().__init__()
        settings.check()
        self.settings = settings
        self._xla = settings.compile == "xla"
        self.network = Network(model, settings.weights, transposed=self._xla)
        if len(tokenizer) > self.network.vocab_size:
            raise InputError(
                f"the tokenizer has {len(tokenizer)} entries but the model's vocab_size is {self.network.vocab_size}; "
                "use the tokenizer that the model was trained with"
            )
        # Saved as plain variables: a Keras model as an attribute would be saved with its own traced functions.
        self.weights = self.network.variables
        self.limit, self.max_request_tokens = self._limits()
        self._checks = RequestChecks(
            self.limit, settings.max_request_rows, self.max_request_tokens, self.network.vocab_size
        )
        self.defaults: Defaults = defaults(settings, model.generation_config, self.limit)
        self.eos_ids, self._pad_id = _eos_and_pad_ids(model.generation_config)
        self.tokenizer_problem: str | None = None
        self._tokenizer = self._detokenizer = self._finder = None
        try:
            self._tokenizer, self._detokenizer = GraphTokenizer(tokenizer), GraphDetokenizer(tokenizer)
            self._finder = StopFinder(self._detokenizer.pieces(self.network.vocab_size))
        except InputError as error:
            self.tokenizer_problem = str(error)
        self.buckets = self._buckets() if self._xla else []
        self.cached_tokens = self._cached_tokens()
        engine = Engine(
            self.network,
            EngineLimits(settings.max_batch_size, self.limit, self.cached_tokens, settings.prefix_cache),
            eos_ids=self.eos_ids,
            pad_id=self._pad_id,
            finder=self._finder,
            sizes=CompiledSizes(self.batch_sizes(), self.buckets) if self._xla else None,
        )
        # Traced once for all signatures.
        self._complete = tf.function(engine.complete, autograph=False)

    def signatures(self) -> dict[str, Any]:
        """The exported functions, by name."""
        tokens = {"generate_tokens": self._generate_tokens()}
        if self._tokenizer is None:
            return {**tokens, "serving_default": tokens["generate_tokens"]}
        generate = self._generate()
        return {
            "serving_default": self._serving_default(generate),
            "generate": generate,
            **tokens,
            "score": self._score(),
        }

    @property
    def names(self) -> list[str]:
        """The signatures' names."""
        return sorted(["generate_tokens", "serving_default", *(["generate", "score"] if self._tokenizer else [])])

    def batch_sizes(self) -> list[int]:
        """With XLA, the batch sizes that are compiled: powers of two, and the largest batch."""
        sizes = [1]
        while sizes[-1] < self.settings.max_batch_size:
            sizes.append(min(sizes[-1] * 2, self.settings.max_batch_size))
        return sizes

    def _limits(self) -> tuple[int, int]:
        """The largest max_new_tokens and the maximum number of tokens of a request."""
        settings, context = self.settings, self.network.context
        limit = settings.max_new_tokens_limit or min(context - 1, 256 if self._xla else context - 1)
        if limit > context - 1:
            raise InputError(f"`max_new_tokens_limit` {limit}: the model's context leaves {context - 1} at most")
        if settings.max_request_rows < settings.max_batch_size:
            raise InputError(
                f"`max_request_rows` {settings.max_request_rows}: give at least `max_batch_size`, which is "
                f"{settings.max_batch_size}"
            )
        batch_tokens = settings.max_batch_size * context
        max_tokens = settings.max_request_tokens or max(MAX_REQUEST_TOKENS, batch_tokens)
        if max_tokens < batch_tokens:
            raise InputError(
                f"`max_request_tokens` {max_tokens}: give at least {batch_tokens}, which is "
                f"{settings.max_batch_size} rows (`max_batch_size`) of {context} tokens (the model's context)"
            )
        return limit, max_tokens

    def _cached_tokens(self) -> int:
        """The maximum number of tokens whose keys and values are kept."""
        settings, network = self.settings, self.network
        if settings.cache_tokens is not None:
            if settings.cache_tokens < network.context:
                raise InputError(
                    f"`cache_tokens` {settings.cache_tokens}: give at least {network.context}, the model's context"
                )
            return settings.cache_tokens
        # As much memory as the weights take, but for two full contexts at least and for two full batches at most.
        weights = sum(int(np.prod(variable.shape)) * variable.dtype.size for variable in network.variables)
        as_weights: int = weights // network.bytes_per_token
        return min(max(as_weights, 2 * network.context), 2 * settings.max_batch_size * network.context)

    def _buckets(self) -> list[int]:
        """With XLA, the sizes of the key-value cache in tokens, ascending; every row fits into the last one."""
        longest = self.network.context - 1
        buckets = sorted(set(self.settings.buckets)) or [256 * 2**power for power in range(20)]
        return [size for size in buckets if size < longest] + [longest]

    def _generate_rows(
        self, ids: Tensor, lengths: Tensor, name: str, stop: Tensor, params: SamplingParams
    ) -> tuple[Tensor, ...]:
        """Checks and decodes rows `ids` int32 [B, L]; the fields of `Decoded`, and the prompts' lengths.

        Of a prompt longer than L, `ids` has the last tokens. `name` is the request's input, for messages.
        """
        batch = tf.shape(ids)[0]
        params, stop = self._checks.params(params, stop, batch)
        context = self.network.context
        if self.settings.truncate_prompts:
            ids, lengths = _truncate_left(ids, lengths, tf.maximum(1, context - params.max_new_tokens))
        else:
            fits = lengths < context
            problem = tf.strings.join(
                [
                    "has ",
                    first_invalid(lengths, fits),
                    f" tokens, and the context holds {context} including the new tokens",
                ]
            )
            ids = require(fits, ids, name, problem)
        return (*self._complete(ids, lengths, params, stop), lengths)

    # The signatures. The ranks of their inputs are unknown, so that the graph itself checks them.

    def _default_params(self) -> SamplingParams:
        values = {**vars(self.defaults), "seed": -1}
        return SamplingParams(
            **{name: tf.constant([values[name]], kind) for name, kind in PARAM_TYPES._asdict().items()}
        )

    def _serving_default(self, generate: Any) -> Any:
        def serving_default(prompt: Tensor) -> dict[str, Tensor]:
            # Calls the traced function, so that the tokenizer and the loop are in the graph only once for both.
            return {"generated_text": generate(prompt)["generated_text"]}

        return tf.function(serving_default, autograph=False, input_signature=[tf.TensorSpec(None, tf.string, "prompt")])

    def _generate(self) -> Any:
        default = self._default_params()

        def generate(
            prompt: Tensor,
            max_new_tokens: Tensor = default.max_new_tokens,
            temperature: Tensor = default.temperature,
            top_k: Tensor = default.top_k,
            top_p: Tensor = default.top_p,
            repetition_penalty: Tensor = default.repetition_penalty,
            seed: Tensor = default.seed,
            stop: Tensor = tf.constant([""]),
        ) -> dict[str, Tensor]:
            params = SamplingParams(max_new_tokens, temperature, top_k, top_p, repetition_penalty, seed)
            return self._generate_text(prompt, params, stop)

        specs = [tf.TensorSpec(None, tf.string, "prompt"), *_param_specs(), tf.TensorSpec(None, tf.string, "stop")]
        return tf.function(generate, autograph=False, input_signature=specs)

    def _generate_text(self, prompt: Tensor, params: SamplingParams, stop: Tensor) -> dict[str, Tensor]:
        """The outputs of `generate`."""
        assert self._tokenizer is not None
        assert self._detokenizer is not None
        prompt = self._checks.texts(prompt, "prompt")
        prompt = require(tf.strings.length(prompt) > 0, prompt, "prompt", "is empty: give a text")
        ids, lengths = self._tokenizer.encode(
            prompt, last=self.network.context, max_tokens=self.max_request_tokens, name="prompt"
        )
        ids = require(lengths > 0, ids, "prompt", "has no tokens: give a longer text")
        output, count, stopped, size, lengths = self._generate_rows(ids, lengths, "prompt", stop, params)
        raw = self._detokenizer.decode_bytes(output, count)
        raw = tf.where(size >= 0, tf.strings.substr(raw, tf.zeros_like(size), tf.maximum(size, 0)), raw)
        completion = self._detokenizer.decode_continuation(output, count, size)
        return {
            "generated_text": tf.strings.join([self._detokenizer.to_valid_utf8(prompt), completion]),
            "completion": completion,
            "completion_bytes": raw,
            "finish_reason": tf.where(stopped, "stop", "length"),
            "prompt_tokens": lengths,
            "completion_tokens": count,
        }

    def _generate_tokens(self) -> Any:
        default = self._default_params()

        def generate_tokens(
            input_ids: Tensor,
            attention_mask: Tensor,
            max_new_tokens: Tensor = default.max_new_tokens,
            temperature: Tensor = default.temperature,
            top_k: Tensor = default.top_k,
            top_p: Tensor = default.top_p,
            repetition_penalty: Tensor = default.repetition_penalty,
            seed: Tensor = default.seed,
        ) -> dict[str, Tensor]:
            ids, lengths = self._checks.tokens(input_ids, attention_mask)
            params = SamplingParams(max_new_tokens, temperature, top_k, top_p, repetition_penalty, seed)
            output, count, *_ = self._generate_rows(ids, lengths, "input_ids", tf.constant([""]), params)
            return {"output_ids": output[:, : tf.reduce_max(count)], "completion_tokens": count}

        ids = [tf.TensorSpec(None, tf.int32, "input_ids"), tf.TensorSpec(None, tf.int32, "attention_mask")]
        return tf.function(generate_tokens, autograph=False, input_signature=[*ids, *_param_specs()])

    def _score(self) -> Any:
        tokenizer = self._tokenizer
        assert tokenizer is not None
        logprobs_of = tf.function(
            lambda ids, length: token_logprobs(self.network, ids, length, tokenizer.prefix), autograph=False
        ).get_concrete_function(tf.TensorSpec([None], tf.int32), tf.TensorSpec([], tf.int32))

        def score(text: Tensor) -> dict[str, Tensor]:
            text = self._checks.texts(text, "text")
            ids, lengths = tokenizer.encode(text, max_tokens=self.max_request_tokens)
            context = max(1, len(tokenizer.prefix))
            ids = require(
                lengths > context, ids, "text", f"has fewer than {context + 1} tokens: the first one is only context"
            )
            # One after the other, because each may fill a whole context.
            logprobs = tf.map_fn(
                lambda row: logprobs_of(*row),
                (ids, lengths),
                fn_output_signature=tf.TensorSpec([None], tf.float32),
                parallel_iterations=1,
            )
            count = lengths - context
            loss = -tf.reduce_sum(tf.cast(logprobs, tf.float64), 1) / tf.cast(count, tf.float64)
            return {
                "loss": tf.cast(loss, tf.float32),
                "perplexity": tf.cast(tf.exp(loss), tf.float32),
                "token_count": count,
                "token_ids": ids,
                "token_logprobs": logprobs,
            }

        return tf.function(score, autograph=False, input_signature=[tf.TensorSpec(None, tf.string, "text")])


def _eos_and_pad_ids(generation_config: Any) -> tuple[list[int], int]:
    """The EOS ids and the padding id of a generation_config; without a padding id, the first EOS or 0."""
    eos = generation_config.eos_token_id
    eos_ids = [] if eos is None else list(eos) if isinstance(eos, list | tuple) else [eos]
    pad = generation_config.pad_token_id
    pad_id = pad if pad is not None else (eos_ids or [0])[0]
    for number in [*eos_ids, pad_id]:
        if not isinstance(number, int) or abs(number) > INT32:
            raise InputError(f"generation_config.json has the token id {number!r}: give one of the vocabulary")
    return eos_ids, pad_id


def _truncate_left(ids: Tensor, lengths: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
    """The last `limits` [B] tokens of rows [B, L], and their lengths.

    A length above L counts as L.
    """
    lengths = tf.minimum(lengths, tf.shape(ids)[1])
    removed = tf.maximum(0, lengths - limits)
    lengths -= removed
    ids = tf.pad(ids, [[0, 0], [0, 1]])
    indices = tf.minimum(removed[:, None] + tf.range(tf.reduce_max(lengths)), tf.shape(ids)[1] - 1)
    return tf.gather(ids, indices, batch_dims=1), lengths


def _param_specs() -> list[tf.TensorSpec]:
    return [tf.TensorSpec(None, kind, name) for name, kind in PARAM_TYPES._asdict().items()]
