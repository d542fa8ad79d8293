"""The exported module: the signatures, built from the tokenizer, the decoding loop and the scores."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import tensorflow as tf

from tfclm.errors import InputError
from tfclm.savedmodel.checks import require
from tfclm.savedmodel.graph.decoding import Decoded, decode
from tfclm.savedmodel.graph.network import Network
from tfclm.savedmodel.graph.requests import RequestChecks, first_invalid
from tfclm.savedmodel.graph.sampling import SamplingParams, uniform_samples
from tfclm.savedmodel.graph.scoring import token_logprobs
from tfclm.savedmodel.graph.stopping import Stop, StopFinder
from tfclm.savedmodel.settings import INT32, Defaults, ServableSettings, defaults
from tfclm.savedmodel.tokenizer import GraphTokenizer
from tfclm.savedmodel.tokenizer.detokenizer import GraphDetokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TFPreTrainedModel

__all__ = ["GenerationModule"]

Tensor = Any

MAX_ENQUEUED_BATCHES = 1024  # a server answers UNAVAILABLE when more batches are waiting
MAX_REQUEST_TOKENS = 2**20
PARAM_TYPES = SamplingParams(
    max_new_tokens=tf.int32,
    temperature=tf.float32,
    top_k=tf.int32,
    top_p=tf.float32,
    repetition_penalty=tf.float32,
    seed=tf.int64,
)


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
        self._decode = self._batched()

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

    def _buckets(self) -> list[int]:
        """Lengths that prompts are padded to, ascending; every prompt fits into the last one."""
        longest = self.network.context - 1
        buckets = sorted(set(self.settings.buckets)) or [
            32 * 4**power for power in range(10) if 32 * 4**power < longest
        ]
        return [size for size in buckets if size < longest] + [longest]

    # From checked rows to tokens.

    def _decode_batch(self, ids: Tensor, lengths: Tensor, stop: Tensor, *params: Tensor) -> Decoded:
        """Decodes a batch of rows [B, context - 1], as wide as its longest prompt, or with XLA as that one's bucket."""
        width = tf.reduce_max(lengths)
        if self._xla:
            buckets = tf.constant(self.buckets)
            width = tf.reduce_min(tf.boolean_mask(buckets, buckets >= width))
        search = self._finder.begin(stop) if self._finder is not None else None
        given = SamplingParams(*params)
        uniform = uniform_samples(given.seed, self.limit)
        decode_rows: Any = self._decode_rows
        if self._xla:
            # Compiled without the strings and the random ops, which XLA does not support.
            decode_rows = tf.function(decode_rows, autograph=False, jit_compile=True)
        return cast("Decoded", decode_rows(ids[:, :width], lengths, given, uniform, search))

    def _decode_rows(
        self, ids: Tensor, lengths: Tensor, params: SamplingParams, uniform: Tensor, search: Stop | None
    ) -> Decoded:
        return decode(
            self.network,
            ids,
            lengths,
            params,
            uniform,
            eos_ids=self.eos_ids,
            pad_id=self._pad_id,
            limit=self.limit,
            finder=self._finder,
            stop=search,
            xla=self._xla,
        )

    def _batched(self) -> Callable[..., tuple[Tensor, ...]]:
        """`_decode_batch` for rows [B, L], decoded together with those of concurrent requests, of all signatures.

        A call with more rows than a batch holds makes several batches in turn. `enable_large_batch_splitting`, with
        which the op would do that itself, crashes the process if a request is cancelled while its rows are in several
        batches.
        """
        width = self.network.context - 1
        others = [tf.TensorSpec([None], kind) for kind in (tf.int32, tf.string, *PARAM_TYPES)]
        batch = tf.function(self._decode_batch, autograph=False).get_concrete_function(
            tf.TensorSpec([None, width], tf.int32), *others
        )
        # A unique name: ops with the same name in one process share the queue and its function.
        name = f"tfclm-{uuid.uuid4().hex}"
        largest = self.settings.max_batch_size

        def call(ids: Tensor, *arguments: Tensor) -> tuple[Tensor, ...]:
            # Rows that are decoded together must have the same width; no prompt is longer than this one.
            ids = tf.ensure_shape(tf.pad(ids, [[0, 0], [0, width]])[:, :width], [None, width])
            results = tf.raw_ops.BatchFunction(
                in_tensors=[ids, *arguments],
                captured_tensors=batch.captured_inputs,
                f=batch,
                num_batch_threads=1,  # each batch uses all cores
                max_batch_size=largest,
                allowed_batch_sizes=self.batch_sizes() if self._xla else list(range(1, largest + 1)),
                batch_timeout_micros=int(self.settings.batch_timeout * 1000),
                max_enqueued_batches=MAX_ENQUEUED_BATCHES,
                enable_large_batch_splitting=False,
                Tout=[output.dtype for output in batch.outputs],
                shared_name=name,
                batching_queue=name,
            )
            for result, shape in zip(results, ([None, self.limit], [None], [None], [None]), strict=True):
                result.set_shape(shape)
            return tuple(results)

        queued = tf.function(call, autograph=False).get_concrete_function(
            tf.TensorSpec([None, None], tf.int32), *others
        )
        return lambda *arguments: _in_slices(queued, arguments, largest)

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
        return (*self._decode(ids, lengths, stop, *params), lengths)

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
            lambda ids, lengths: (token_logprobs(self.network, ids, lengths, tokenizer.prefix),), autograph=False
        ).get_concrete_function(tf.TensorSpec([None, None], tf.int32), tf.TensorSpec([None], tf.int32))

        def score(text: Tensor) -> dict[str, Tensor]:
            text = self._checks.texts(text, "text")
            ids, lengths = tokenizer.encode(text, max_tokens=self.max_request_tokens)
            context = max(1, len(tokenizer.prefix))
            ids = require(
                lengths > context, ids, "text", f"has fewer than {context + 1} tokens: the first one is only context"
            )
            # As many rows at a time as are decoded together, because each may fill a whole context.
            (logprobs,) = _in_slices(logprobs_of, (ids, lengths), self.settings.max_batch_size)
            logprobs = tf.where(tf.sequence_mask(lengths, tf.shape(ids)[1]), logprobs, 0.0)
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


def _in_slices(function: Any, arguments: Sequence[Tensor], size: int) -> tuple[Tensor, ...]:
    """The results of a traced function that is called with `size` rows at a time; all [B, ...], B 1 or more."""
    slices = (tf.shape(arguments[0])[0] + size - 1) // size
    specs = function.structured_outputs

    def step(number: Tensor, *arrays: tf.TensorArray) -> tuple[Any, ...]:
        results = function(*(argument[number * size : (number + 1) * size] for argument in arguments))
        return number + 1, *(array.write(number, result) for array, result in zip(arrays, results, strict=True))

    arrays = [tf.TensorArray(spec.dtype, slices, element_shape=spec.shape, infer_shape=False) for spec in specs]
    _, *arrays = tf.while_loop(lambda number, *_: number < slices, step, (0, *arrays), parallel_iterations=1)
    return tuple(array.concat() for array in arrays)


def _param_specs() -> list[tf.TensorSpec]:
    return [tf.TensorSpec(None, kind, name) for name, kind in PARAM_TYPES._asdict().items()]
