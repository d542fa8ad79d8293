"""The exported module: the signatures, built from the tokenizer, the decoding loop and the scores."""

from __future__ import annotations

import inspect
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from tfclm.errors import InputError
from tfclm.savedmodel.checks import require
from tfclm.savedmodel.graph.engine import Completions, Engine, EngineLimits
from tfclm.savedmodel.graph.key_value_cache import CompiledSizes
from tfclm.savedmodel.graph.network import Network
from tfclm.savedmodel.graph.requests import RequestChecks, first_invalid
from tfclm.savedmodel.graph.sampling import EXTRA_TYPES, MAX_BIASES, PARAM_TYPES, ExtraParams, SamplingParams, no_extras
from tfclm.savedmodel.graph.scoring import TokenScores, score_tokens
from tfclm.savedmodel.graph.stopping import MAX_STOP_BYTES, MAX_STOPS, StopFinder
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

    A tokenizer that cannot be put into the graph exactly leaves the signatures `generate_tokens` and `describe` alone;
    `tokenizer_problem` then says why.

    Args:
        model: a TensorFlow causal LM of transformers.
        tokenizer: its fast tokenizer.
        settings: defaults, limits and compilation.

    Attributes:
        about: what else `describe` tells; set before `signatures` is called.

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
        self.max_top_logprobs = min(settings.max_top_logprobs, self.network.vocab_size)
        self._checks = RequestChecks(
            self.limit,
            settings.max_request_rows,
            self.max_request_tokens,
            self.network.vocab_size,
            self.max_top_logprobs,
        )
        self.defaults: Defaults = defaults(settings, model.generation_config, self.limit)
        self.eos_ids, self._pad_id = _eos_and_pad_ids(model.generation_config)
        self.about: dict[str, Any] = {}
        self._special_tokens, self._chat_template = _special_tokens(tokenizer), tokenizer.chat_template
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
            EngineLimits(
                settings.max_batch_size,
                self.limit,
                self.cached_tokens,
                settings.prefix_cache,
                top_logprobs=self.max_top_logprobs,
            ),
            eos_ids=self.eos_ids,
            pad_id=self._pad_id,
            finder=self._finder,
            sizes=CompiledSizes(self.batch_sizes(), self.buckets) if self._xla else None,
        )
        # Traced once for all signatures.
        self._complete = tf.function(engine.complete, autograph=False)

    def signatures(self) -> dict[str, Any]:
        """The exported functions, by name."""
        tokens = {"generate_tokens": self._generate_tokens(), "describe": self._describe()}
        if self._tokenizer is None:
            return {**tokens, "serving_default": tokens["generate_tokens"]}
        generate = self._generate()
        return {
            "serving_default": self._serving_default(generate),
            "generate": generate,
            **tokens,
            "score": self._score(),
            "tokenize": self._tokenize(),
            "detokenize": self._detokenize(),
        }

    @property
    def names(self) -> list[str]:
        """The signatures' names."""
        texts = ["detokenize", "generate", "score", "tokenize"] if self._tokenizer else []
        return sorted(["describe", "generate_tokens", "serving_default", *texts])

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
        # As much memory as the weights take in float32, but for two full contexts at least and for two full batches at
        # most. Smaller weights do not make keys and values smaller, and fewer rows could be decoded together.
        weights = 4 * sum(int(np.prod(variable.shape)) for variable in network.variables)
        as_weights: int = weights // network.bytes_per_token
        return min(max(as_weights, 2 * network.context), 2 * settings.max_batch_size * network.context)

    def _buckets(self) -> list[int]:
        """With XLA, the sizes of the key-value cache in tokens, ascending; every row fits into the last one."""
        longest = self.network.context - 1
        buckets = sorted(set(self.settings.buckets)) or [256 * 2**power for power in range(20)]
        return [size for size in buckets if size < longest] + [longest]

    def _generate_rows(
        self,
        ids: Tensor,
        lengths: Tensor,
        name: str,
        stop: Tensor,
        params: SamplingParams,
        extra: ExtraParams | None = None,
    ) -> tuple[Completions, Tensor]:
        """Checks and decodes rows `ids` int32 [B, L]; the completions, and the prompts' lengths.

        Of a prompt longer than L, `ids` has the last tokens. `name` is the request's input, for messages.
        """
        batch = tf.shape(ids)[0]
        params, stop = self._checks.params(params, stop, batch)
        extra = no_extras(batch) if extra is None else self._checks.extra(extra, params.max_new_tokens, batch)
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
        return self._complete(ids, lengths, params, stop, extra), lengths

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
        out, lengths = self._generate_rows(ids, lengths, "prompt", stop, params)
        completion = self._detokenizer.decode_continuation(out.output_ids, out.count, out.length_in_bytes)
        return {
            "generated_text": tf.strings.join([self._detokenizer.to_valid_utf8(prompt), completion]),
            "completion": completion,
            "completion_bytes": self._completion_bytes(out),
            "finish_reason": tf.where(out.stopped, "stop", "length"),
            "prompt_tokens": lengths,
            "completion_tokens": out.count,
        }

    def _completion_bytes(self, out: Completions) -> Tensor:
        """The bytes of each completion, string [B], before the stop string if one was found."""
        assert self._detokenizer is not None
        raw, size = self._detokenizer.decode_bytes(out.output_ids, out.count), out.length_in_bytes
        return tf.where(size >= 0, tf.strings.substr(raw, tf.zeros_like(size), tf.maximum(size, 0)), raw)

    def _generate_tokens(self) -> Any:
        types = {"input_ids": tf.int32, "attention_mask": tf.int32, **PARAM_TYPES._asdict(), **EXTRA_TYPES._asdict()}
        # Stop strings are found in the bytes of tokens, which are unknown without a tokenizer.
        types |= {"stop": tf.string} if self._finder else {}
        off = {name: tf.constant([0], kind) for name, kind in EXTRA_TYPES._asdict().items()}
        none = {"logit_bias_ids": tf.constant([[-1]]), "logit_bias": tf.constant([[0.0]]), "stop": tf.constant([[""]])}
        defaults = {**self._default_params()._asdict(), **off, **none}

        def generate_tokens(*values: Tensor) -> dict[str, Tensor]:
            inputs = none | dict(zip(types, values, strict=True))
            ids, lengths = self._checks.tokens(inputs["input_ids"], inputs["attention_mask"])
            params = SamplingParams(*(inputs[name] for name in SamplingParams._fields))
            extra = ExtraParams(*(inputs[name] for name in ExtraParams._fields))
            out, _ = self._generate_rows(ids, lengths, "input_ids", inputs["stop"], params, extra)
            return {
                "output_ids": out.output_ids[:, : tf.reduce_max(out.count)],
                "completion_tokens": out.count,
                "finish_reason": tf.where(out.stopped, "stop", "length"),
                **({"completion_bytes": self._completion_bytes(out)} if self._detokenizer else {}),
                "token_logprobs": out.logprobs[:, :, 0],
                "top_ids": out.logprob_ids[:, :, 1:],
                "top_logprobs": out.logprobs[:, :, 1:],
            }

        # TensorFlow takes the names and defaults of inputs from here.
        kind, empty = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.empty
        parameters = [inspect.Parameter(name, kind, default=defaults.get(name, empty)) for name in types]
        generate_tokens.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        specs = [tf.TensorSpec(None, kind, name) for name, kind in types.items()]
        return tf.function(generate_tokens, autograph=False, input_signature=specs)

    def _score(self) -> Any:
        tokenizer = self._tokenizer
        assert tokenizer is not None
        scores_of = tf.function(
            lambda ids, length: score_tokens(self.network, ids, length, tokenizer.prefix), autograph=False
        ).get_concrete_function(tf.TensorSpec([None], tf.int32), tf.TensorSpec([], tf.int32))

        def score(text: Tensor) -> dict[str, Tensor]:
            text = self._checks.texts(text, "text")
            ids, lengths = tokenizer.encode(text, max_tokens=self.max_request_tokens)
            context = max(1, len(tokenizer.prefix))
            ids = require(
                lengths > context, ids, "text", f"has fewer than {context + 1} tokens: the first one is only context"
            )
            # One after the other, because each may fill a whole context.
            logprobs, greedy = tf.map_fn(
                lambda row: scores_of(*row),
                (ids, lengths),
                fn_output_signature=TokenScores(tf.TensorSpec([None], tf.float32), tf.TensorSpec([None], tf.int32)),
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
                "greedy_ids": greedy,
            }

        return tf.function(score, autograph=False, input_signature=[tf.TensorSpec(None, tf.string, "text")])

    def _tokenize(self) -> Any:
        def tokenize(text: Tensor) -> dict[str, Tensor]:
            assert self._tokenizer is not None
            ids, lengths = self._tokenizer.encode(self._checks.texts(text, "text"), max_tokens=self.max_request_tokens)
            return {
                "token_ids": tf.where(tf.sequence_mask(lengths, tf.shape(ids)[1]), ids, -1),
                "token_count": lengths,
            }

        return tf.function(tokenize, autograph=False, input_signature=[tf.TensorSpec(None, tf.string, "text")])

    def _detokenize(self) -> Any:
        def detokenize(token_ids: Tensor) -> dict[str, Tensor]:
            assert self._detokenizer is not None
            ids = self._checks.ids(token_ids, "token_ids")
            # Ids of -1 add nothing to the text.
            every = tf.fill([tf.shape(ids)[0]], tf.shape(ids)[1])
            return {
                "text": self._detokenizer.decode(ids, every),
                "text_bytes": self._detokenizer.decode_bytes(ids, every),
            }

        return tf.function(detokenize, autograph=False, input_signature=[tf.TensorSpec(None, tf.int32, "token_ids")])

    def _describe(self) -> Any:
        # A tf.Module wraps the dictionaries that are its attributes.
        text = json.dumps(self.description(), ensure_ascii=False, default=dict)

        def describe(query: Tensor) -> dict[str, Tensor]:
            return {"description": tf.fill([tf.size(self._checks.texts(query, "query"))], text)}

        return tf.function(describe, autograph=False, input_signature=[tf.TensorSpec(None, tf.string, "query")])

    def description(self) -> dict[str, Any]:
        """What the signature `describe` tells: what a client needs to know of the model, as JSON."""
        settings = self.settings
        return {
            "model_type": self.network.model.config.model_type,
            "context": self.network.context,
            "vocab_size": self.network.vocab_size,
            "limits": {
                "max_new_tokens": self.limit,
                "top_logprobs": self.max_top_logprobs,
                "stop": MAX_STOPS,
                "stop_bytes": MAX_STOP_BYTES,
                "logit_bias": MAX_BIASES,
                "request_rows": settings.max_request_rows,
                "request_tokens": self.max_request_tokens,
                "batch_size": settings.max_batch_size,
            },
            "truncate_prompts": settings.truncate_prompts,
            "defaults": vars(self.defaults),
            "eos_ids": self.eos_ids,
            "special_tokens": self._special_tokens,
            "chat_template": self._chat_template,
            "tokenizer_problem": self.tokenizer_problem,
            "weights": settings.weights,
            "compile": settings.compile,
            "signatures": self.names,
            **self.about,
        }


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


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The special tokens by their names in transformers, each with text and id."""

    def described(token: Any) -> Any:
        if isinstance(token, list | tuple):
            return [described(each) for each in token]
        return {"text": str(token), "id": tokenizer.convert_tokens_to_ids(str(token))}

    return {name: described(token) for name, token in tokenizer.special_tokens_map.items()}


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
