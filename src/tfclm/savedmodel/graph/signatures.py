"""The module that is exported: four signatures around the tokenizer, the decoding loop and the scores."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from tfclm.errors import InputError
from tfclm.savedmodel.checks import broadcast, ranked, require, require_at_most
from tfclm.savedmodel.graph.decoding import decode
from tfclm.savedmodel.graph.network import Network
from tfclm.savedmodel.graph.sampling import SamplingParams, uniform_samples
from tfclm.savedmodel.graph.scoring import token_logprobs
from tfclm.savedmodel.graph.stopping import LONGEST, StopFinder
from tfclm.savedmodel.settings import INT32, Defaults, ServableSettings, defaults
from tfclm.savedmodel.tokenizer import GraphTokenizer
from tfclm.savedmodel.tokenizer.detokenizer import GraphDetokenizer

__all__ = ["GenerationModule"]

Tensor = Any

QUEUE = 1024  # batches that wait; one more is refused with UNAVAILABLE, instead of growing without bound
MAX_REQUEST_TOKENS = 2**20
# A request's text may have this many bytes for each token that it may have. It is checked before the text is
# tokenized, which takes far more memory than the text itself.
BYTES_PER_TOKEN = 4


class GenerationModule(tf.Module):
    """A causal LM and its tokenizer as one graph.

    Raises `InputError` for what cannot be exported exactly. A tokenizer that cannot be put into the graph leaves
    `generate_tokens` alone; `tokenizer_problem` then says why.
    """

    def __init__(self, model: Any, tokenizer: Any, settings: ServableSettings) -> None:
        super().__init__()
        settings.check()
        self.settings = settings
        self.network = Network(model, settings.weights, turned=settings.compile == "xla")
        if len(tokenizer) > self.network.vocab_size:
            raise InputError(
                f"the tokenizer has {len(tokenizer)} entries but the model's vocab_size is {self.network.vocab_size}; "
                "use the tokenizer that the model was trained with"
            )
        # What is saved: the variables alone. Of a Keras model, its own traces would go with them.
        self.weights = self.network.variables
        context = self.network.context
        xla = settings.compile == "xla"
        self.limit = settings.max_new_tokens_limit or min(context - 1, 256 if xla else context - 1)
        if self.limit > context - 1:
            raise InputError(f"--max-new-tokens-limit {self.limit}: the model's context leaves {context - 1} at most")
        batch_tokens = settings.max_batch_size * context
        self.max_request_tokens = settings.max_request_tokens or max(MAX_REQUEST_TOKENS, batch_tokens)
        if settings.max_request_rows < settings.max_batch_size:
            raise InputError(
                f"--max-request-rows {settings.max_request_rows}: give at least --max-batch-size, which is "
                f"{settings.max_batch_size}"
            )
        if self.max_request_tokens < batch_tokens:
            raise InputError(
                f"--max-request-tokens {self.max_request_tokens}: give at least {batch_tokens}, which is "
                f"{settings.max_batch_size} rows (--max-batch-size) of {context} tokens (the model's context)"
            )
        self.defaults: Defaults = defaults(settings, model.generation_config, self.limit)
        eos = model.generation_config.eos_token_id
        self.eos_ids = [] if eos is None else list(eos) if isinstance(eos, list | tuple) else [eos]
        pad = model.generation_config.pad_token_id
        self._pad_id = pad if pad is not None else (self.eos_ids or [0])[0]
        for number in [*self.eos_ids, self._pad_id]:
            if not isinstance(number, int) or abs(number) > INT32:
                raise InputError(f"generation_config.json has the token id {number!r}: give one of the vocabulary")
        self.tokenizer_problem: str | None = None
        self._tokenizer = self._detokenizer = self._finder = None
        try:
            self._tokenizer, self._detokenizer = GraphTokenizer(tokenizer), GraphDetokenizer(tokenizer)
            self._finder = StopFinder(self._detokenizer.pieces(self.network.vocab_size))
        except InputError as error:
            self.tokenizer_problem = str(error)
        self.buckets = self._buckets() if xla else []
        self._decode = self._batched(
            tf.function(self._rows, autograph=self.network.autograph, jit_compile=True) if xla else self._rows
        )

    def signatures(self) -> dict[str, Any]:
        """The functions that are exported, by name."""
        tokens = {"generate_tokens": self._generate_tokens()}
        if self._tokenizer is None:
            return {**tokens, "serving_default": tokens["generate_tokens"]}
        return {
            "serving_default": self._serving_default(),
            "generate": self._generate(),
            **tokens,
            "score": self._score(),
        }

    @property
    def names(self) -> list[str]:
        """The signatures' names."""
        return sorted(["generate_tokens", "serving_default", *(["generate", "score"] if self._tokenizer else [])])

    def batch_sizes(self) -> list[int]:
        """With XLA, the numbers of rows that are compiled for: powers of two, up to the largest batch."""
        sizes = [1]
        while sizes[-1] < self.settings.max_batch_size:
            sizes.append(min(sizes[-1] * 2, self.settings.max_batch_size))
        return sizes

    # The way of a request

    def _buckets(self) -> list[int]:
        """Lengths that prompts are padded to, ascending; the last one holds every prompt."""
        longest = self.network.context - 1
        buckets = sorted(set(self.settings.buckets)) or [
            32 * 4**power for power in range(10) if 32 * 4**power < longest
        ]
        return [size for size in buckets if size < longest] + [longest]

    def _batched(self, rows: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
        """Coalesces the calls of concurrent requests, of all signatures.

        A call of more rows than a batch holds makes one batch after the other. `enable_large_batch_splitting`, by which
        the op would do that itself, ends the process when a request is cancelled while its rows are in several batches.
        """
        xla = self.settings.compile == "xla"

        def batch(ids: Tensor, lengths: Tensor, stop: Tensor, seed: Tensor, *params: Tensor) -> tuple[Tensor, ...]:
            most = tf.reduce_max(lengths)
            if xla:
                sizes = tf.constant(self.buckets)
                most = tf.reduce_min(tf.boolean_mask(sizes, sizes >= most))
            began = self._finder.begin(stop) if self._finder is not None else ()
            return rows(ids[:, :most], lengths, uniform_samples(seed, self.limit), seed, *params, *began)

        types = (tf.string, tf.int64, *(spec.dtype for spec in _knob_specs()[:5]))
        width = self.network.context - 1
        others = [tf.TensorSpec([None], kind) for kind in (tf.int32, *types)]
        specs = [tf.TensorSpec([None, width], tf.int32), *others]
        traced = tf.function(batch, autograph=self.network.autograph).get_concrete_function(*specs)
        # A name of its own: within one process, those that share it share the queue and its function.
        name = f"tfclm-{uuid.uuid4().hex}"
        largest = self.settings.max_batch_size

        def call(ids: Tensor, *arguments: Tensor) -> tuple[Tensor, ...]:
            # Rows that are decoded together must agree in width.
            ids = tf.ensure_shape(tf.pad(ids, [[0, 0], [0, width - tf.shape(ids)[1]]]), [None, width])
            results = tf.raw_ops.BatchFunction(
                in_tensors=[ids, *arguments],
                captured_tensors=traced.captured_inputs,
                f=traced,
                num_batch_threads=1,  # one batch at a time has all cores
                max_batch_size=largest,
                allowed_batch_sizes=self.batch_sizes() if xla else list(range(1, largest + 1)),
                batch_timeout_micros=int(self.settings.batch_timeout * 1000),
                max_enqueued_batches=QUEUE,
                enable_large_batch_splitting=False,
                Tout=[output.dtype for output in traced.outputs],
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

    def _rows(self, ids: Tensor, lengths: Tensor, uniform: Tensor, seed: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        new, heat, k, p, penalty, *stop = rest
        params = SamplingParams(new, heat, k, p, penalty, seed)
        return tuple(
            decode(
                self.network,
                ids,
                lengths,
                params,
                uniform,
                eos_ids=self.eos_ids,
                pad_id=self._pad_id,
                limit=self.limit,
                finder=self._finder,
                stop=self._finder.state(tuple(stop)) if self._finder is not None else None,
                xla=self.settings.compile == "xla",
            )
        )

    def _continue(
        self, ids: Tensor, lengths: Tensor, name: str, stop: Tensor, params: SamplingParams
    ) -> tuple[Tensor, ...]:
        """Checks rows of ids int32 [B, L] and decodes them; what `Decoded` has, and the prompts' lengths.

        Of a prompt of more than L tokens, the last ones are given.
        """
        batch = tf.shape(ids)[0]
        context = self.network.context
        params = SamplingParams(
            *(broadcast(value, knob, batch) for value, knob in zip(params, SamplingParams._fields, strict=True))
        )
        stop = broadcast(stop, "stop", batch)
        wanted = {
            "max_new_tokens": (params.max_new_tokens >= 1) & (params.max_new_tokens <= self.limit),
            "temperature": (params.temperature >= 0) & tf.math.is_finite(params.temperature),
            "top_k": params.top_k >= 0,
            "top_p": (params.top_p > 0) & (params.top_p <= 1),
            "repetition_penalty": (params.repetition_penalty > 0) & tf.math.is_finite(params.repetition_penalty),
            "seed": params.seed >= -1,
        }
        ranges = {
            "max_new_tokens": f"give 1 to {self.limit}",
            "temperature": "give 0, which is greedy, or more",
            "top_k": "give 0, which is off, or more",
            "top_p": "give a number above 0, and 1 at most, which is off",
            "repetition_penalty": "give a number above 0; 1 is off",
            "seed": "give 0 or more, or -1 for a fresh one",
        }
        params = SamplingParams(
            *(
                require(wanted[knob], value, knob, _say("is ", _first(value, wanted[knob]), ": " + ranges[knob]))
                for knob, value in zip(SamplingParams._fields, params, strict=True)
            )
        )
        stop = require(tf.strings.length(stop) <= LONGEST, stop, "stop", f"is too long: give {LONGEST} bytes at most")
        if self.settings.truncate_prompts:
            # The left side goes, as much of it as the row's new tokens need.
            lengths = tf.minimum(lengths, tf.shape(ids)[1])
            most = tf.maximum(1, context - params.max_new_tokens)
            cut = tf.maximum(0, lengths - most)
            lengths -= cut
            ids = tf.pad(ids, [[0, 0], [0, 1]])
            places = tf.minimum(cut[:, None] + tf.range(tf.reduce_max(lengths)), tf.shape(ids)[1] - 1)
            ids = tf.gather(ids, places, batch_dims=1)
        else:
            fits = lengths < context
            problem = _say(
                "has ", _first(lengths, fits), f" tokens, and the context holds {context}, the answer included"
            )
            ids = require(fits, ids, name, problem)
        results = self._decode(ids[:, : context - 1], lengths, stop, params.seed, *params[:5])
        return (*results, lengths)

    def _texts(self, texts: Tensor, name: str) -> Tensor:
        """Texts [B] of a request that is not larger than one may be."""
        texts = ranked(texts, name, 1, self.settings.max_request_rows)
        size = tf.reduce_sum(tf.cast(tf.strings.length(texts), tf.int64))
        limit = BYTES_PER_TOKEN * self.max_request_tokens
        return require_at_most(size, limit, texts, name, "bytes in all rows together")

    def _ids(self, ids: Tensor, name: str) -> Tensor:
        """Ids, or a mask of them, [B, L] of a request that is not larger than one may be."""
        ids = ranked(ids, name, 2, self.settings.max_request_rows)
        limit = self.max_request_tokens
        return require_at_most(tf.size(ids, tf.int64), limit, ids, name, "tokens with padding")

    def _answer(self, prompt: Tensor, params: SamplingParams, stop: Tensor) -> dict[str, Tensor]:
        assert self._tokenizer is not None
        assert self._detokenizer is not None
        prompt = self._texts(prompt, "prompt")
        prompt = require(tf.strings.length(prompt) > 0, prompt, "prompt", "is empty: give a text")
        most = self.max_request_tokens
        ids, lengths = self._tokenizer.encode(prompt, last=self.network.context, max_tokens=most, name="prompt")
        ids = require(lengths > 0, ids, "prompt", "has no tokens: give a longer text")
        output, count, stopped, size, lengths = self._continue(ids, lengths, "prompt", stop, params)
        raw = self._detokenizer.decode_bytes(output, count)
        raw = tf.where(size >= 0, tf.strings.substr(raw, tf.zeros_like(size), tf.maximum(size, 0)), raw)
        completion = self._detokenizer.clean_up(self._detokenizer.to_valid_utf8(raw))
        return {
            "generated_text": tf.strings.join([self._detokenizer.to_valid_utf8(prompt), completion]),
            "completion": completion,
            "completion_bytes": raw,
            "finish_reason": tf.where(stopped, "stop", "length"),
            "prompt_tokens": lengths,
            "completion_tokens": count,
        }

    # The signatures. Ranks are left open, so that the graph itself can refuse another one.

    def _default_knobs(self) -> list[Tensor]:
        values = self.defaults
        return [
            tf.constant([values.max_new_tokens], tf.int32),
            tf.constant([values.temperature], tf.float32),
            tf.constant([values.top_k], tf.int32),
            tf.constant([values.top_p], tf.float32),
            tf.constant([values.repetition_penalty], tf.float32),
            tf.constant([-1], tf.int64),
        ]

    def _serving_default(self) -> Any:
        def serving_default(prompt: Tensor) -> dict[str, Tensor]:
            answer = self._answer(prompt, SamplingParams(*self._default_knobs()), tf.constant([""]))
            return {"generated_text": answer["generated_text"]}

        return tf.function(serving_default, autograph=False, input_signature=[tf.TensorSpec(None, tf.string, "prompt")])

    def _generate(self) -> Any:
        new, heat, k, p, penalty, fresh = self._default_knobs()

        def generate(
            prompt: Tensor,
            max_new_tokens: Tensor = new,
            temperature: Tensor = heat,
            top_k: Tensor = k,
            top_p: Tensor = p,
            repetition_penalty: Tensor = penalty,
            seed: Tensor = fresh,
            stop: Tensor = tf.constant([""]),
        ) -> dict[str, Tensor]:
            params = SamplingParams(max_new_tokens, temperature, top_k, top_p, repetition_penalty, seed)
            return self._answer(prompt, params, stop)

        specs = [tf.TensorSpec(None, tf.string, "prompt"), *_knob_specs(), tf.TensorSpec(None, tf.string, "stop")]
        return tf.function(generate, autograph=False, input_signature=specs)

    def _generate_tokens(self) -> Any:
        new, heat, k, p, penalty, fresh = self._default_knobs()

        def generate_tokens(
            input_ids: Tensor,
            attention_mask: Tensor,
            max_new_tokens: Tensor = new,
            temperature: Tensor = heat,
            top_k: Tensor = k,
            top_p: Tensor = p,
            repetition_penalty: Tensor = penalty,
            seed: Tensor = fresh,
        ) -> dict[str, Tensor]:
            ids, mask = self._ids(input_ids, "input_ids"), self._ids(attention_mask, "attention_mask")
            same = tf.reduce_all(tf.shape(ids) == tf.shape(mask))
            with tf.control_dependencies(
                [tf.debugging.Assert(same, ["attention_mask has another shape than input_ids: give 1 or 0 for each"])]
            ):
                there = tf.identity(mask) == 1
            mask = require(
                tf.reduce_all((mask == 0) | there, 1), mask, "attention_mask", "has other values than 0 and 1"
            )
            known = ~there | ((ids >= 0) & (ids < self.network.vocab_size))
            problem = f"has an id that is no token: give 0 to {self.network.vocab_size - 1}"
            ids = require(tf.reduce_all(known, 1), ids, "input_ids", problem)
            lengths = tf.reduce_sum(mask, 1)
            ids = require(lengths > 0, ids, "input_ids", "has no token: give one at least")
            # What counts goes to the left, in its order, wherever the padding was.
            ids = tf.gather(ids, tf.argsort(1 - mask, 1, stable=True), batch_dims=1)
            ids = tf.where(tf.sequence_mask(lengths, tf.shape(ids)[1]), ids, 0)
            params = SamplingParams(max_new_tokens, temperature, top_k, top_p, repetition_penalty, seed)
            output, count, *_ = self._continue(ids, lengths, "input_ids", tf.constant([""]), params)
            return {"output_ids": output[:, : tf.reduce_max(count)], "completion_tokens": count}

        ids = [tf.TensorSpec(None, tf.int32, "input_ids"), tf.TensorSpec(None, tf.int32, "attention_mask")]
        return tf.function(generate_tokens, autograph=False, input_signature=[*ids, *_knob_specs()])

    def _score(self) -> Any:
        tokenizer = self._tokenizer
        assert tokenizer is not None
        scored = tf.function(
            lambda ids: (token_logprobs(self.network, ids),), autograph=self.network.autograph
        ).get_concrete_function(tf.TensorSpec([None, None], tf.int32))

        def score(text: Tensor) -> dict[str, Tensor]:
            text = self._texts(text, "text")
            ids, lengths = tokenizer.encode(text, max_tokens=self.max_request_tokens)
            ids = require(lengths > 1, ids, "text", "has less than 2 tokens: the first one is only context")
            # As few rows at once as are decoded together, since each may take a whole context.
            (logprobs,) = _in_slices(scored, (ids,), self.settings.max_batch_size)
            logprobs = tf.where(tf.sequence_mask(lengths, tf.shape(ids)[1]), logprobs, 0.0)
            count = lengths - 1
            loss = -tf.reduce_sum(tf.cast(logprobs, tf.float64), 1) / tf.cast(count, tf.float64)
            return {
                "loss": tf.cast(loss, tf.float32),
                "perplexity": tf.cast(tf.exp(loss), tf.float32),
                "token_count": count,
                "token_ids": ids,
                "token_logprobs": logprobs,
            }

        return tf.function(score, autograph=False, input_signature=[tf.TensorSpec(None, tf.string, "text")])


def _in_slices(function: Any, arguments: Sequence[Tensor], most: int) -> tuple[Tensor, ...]:
    """What a traced function of rows gives, called with `most` of them at a time; all [B, ...], B 1 or more."""
    slices = (tf.shape(arguments[0])[0] + most - 1) // most
    specs = function.structured_outputs

    def step(number: Tensor, *done: tf.TensorArray) -> tuple[Any, ...]:
        some = function(*(argument[number * most : (number + 1) * most] for argument in arguments))
        return number + 1, *(array.write(number, result) for array, result in zip(done, some, strict=True))

    arrays = [tf.TensorArray(spec.dtype, slices, element_shape=spec.shape, infer_shape=False) for spec in specs]
    _, *done = tf.while_loop(lambda number, *_: number < slices, step, (0, *arrays), parallel_iterations=1)
    return tuple(array.concat() for array in done)


def _knob_specs() -> list[Any]:
    types = (tf.int32, tf.float32, tf.int32, tf.float32, tf.float32, tf.int64)
    return [tf.TensorSpec(None, kind, name) for name, kind in zip(SamplingParams._fields, types, strict=True)]


def _first(values: Tensor, condition: Tensor) -> Tensor:
    """The first value that does not meet the condition, as text."""
    return tf.strings.reduce_join(tf.strings.as_string(tf.boolean_mask(values, ~condition)[:1]))


def _say(before: str, value: Tensor, after: str) -> Tensor:
    return tf.strings.join([before, value, after])
