"""A client for a model served by TensorFlow Serving, over REST or gRPC. It does not need TensorFlow."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, TypeVar, overload

from tfclm.client.inputs import broadcast, check_value, is_list, rows_of_lists
from tfclm.client.replies import as_rows, reading
from tfclm.client.rest import RestTransport
from tfclm.client.results import Completion, Score
from tfclm.client.rpc import RpcTransport
from tfclm.client.tls import Tls
from tfclm.client.transport import Call, Limits, Model, ServerError, Signature, Transport
from tfclm.errors import InputError

__all__ = ["Client", "Completion", "Score", "ServerError", "Signature", "unused_parameters"]

T = TypeVar("T")

# Those of the signature `generate`.
_PARAMETERS = {"max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "seed", "stop"}
# Those that `generate_tokens` alone has.
_TOKEN_PARAMETERS = {
    "frequency_penalty",
    "logit_bias",
    "min_new_tokens",
    "min_p",
    "presence_penalty",
    "top_logprobs",
}


class Client:
    """A client for one model of a server.

    A client can be shared by threads. Use it as a context manager, or call `close`, to close its connections.

    Example:
        >>> with tfclm.Client("http://localhost:8501", "quickstart") as client:
        ...     result = client.generate("The import statement", max_new_tokens=20, temperature=0.8, seed=7)
        ...     print(result.generated_text, result.finish_reason)
        ...     first, second = client.score(["Paris is in France.", "Paris is in Rome."])
        ...     print(first.perplexity < second.perplexity)

    Args:
        url: http:// or https:// for REST; grpc://HOST:PORT, grpcs://HOST:PORT (TLS) or unix:PATH for gRPC.
        model_name: the name under which the server serves the model.
        version: the number of a version; the version that is served by default if not given.
        version_label: the label of a version, such as "stable", instead of its number.
        timeout: seconds that a method call may take in total, including all of its requests and retries.
        retries: how many times to resend a request that the server was too busy to run (503, UNAVAILABLE).
        max_reply_bytes: size limit of a reply in bytes, after decompression.
        ca_file: PEM file with the certificate authorities to trust, for https:// and grpcs://; the public ones if not
            given.
        cert_file: PEM file with the client's own certificate, for servers that require one.
        key_file: PEM file with the key of that certificate, without a passphrase.

    Raises:
        InputError: an argument is not valid, or (from methods) the server refuses the request or has no such model or
            signature. The message is one line that names the input.
        ServerError: from methods, if the server is not there, not trusted, still loading the model, overloaded, too
            slow or failing, or if its reply is too large or invalid. The message is one line.
    """

    def __init__(
        self,
        url: str = "http://localhost:8501",
        model_name: str = "model",
        *,
        version: int | None = None,
        version_label: str | None = None,
        timeout: float = 120.0,
        retries: int = 4,
        max_reply_bytes: int = 32 * 2**20,
        ca_file: str | None = None,
        cert_file: str | None = None,
        key_file: str | None = None,
    ) -> None:
        model = Model(model_name, version, version_label)
        if not 0 < timeout < math.inf:
            raise InputError(f"`timeout` {timeout}: give seconds, more than 0")
        if retries < 0:
            raise InputError(f"`retries` {retries}: give 0 or more")
        if max_reply_bytes < 1:
            raise InputError(f"`max_reply_bytes` {max_reply_bytes}: give 1 or more")
        limits = Limits(timeout, retries, max_reply_bytes)
        tls = Tls(ca_file, cert_file, key_file)
        if tls and not url.startswith(("https://", "grpcs://")):
            raise InputError(f"`url` {url}: `ca_file`, `cert_file` and `key_file` go with https:// or grpcs://")
        self._timeout = timeout
        self._transport: Transport
        if url.startswith(("http://", "https://")):
            self._transport = RestTransport(url, model, limits, tls)
        elif url.startswith(("grpc://", "grpcs://", "unix:")):
            self._transport = RpcTransport(url, model, limits, tls)
        else:
            raise InputError(f"`url` {url}: give http://HOST:PORT for REST, or grpc://HOST:PORT")

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections."""
        self._transport.close()

    @overload
    def generate(
        self,
        prompt: str,
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        min_p: float | None = None,
        presence_penalty: float | None = None,
        frequency_penalty: float | None = None,
        min_new_tokens: int | None = None,
        logit_bias: Mapping[int, float] | None = None,
        top_logprobs: int | None = None,
    ) -> Completion: ...

    @overload
    def generate(
        self,
        prompt: list[str] | tuple[str, ...],
        *,
        max_new_tokens: int | Sequence[int] | None = None,
        temperature: float | Sequence[float] | None = None,
        top_k: int | Sequence[int] | None = None,
        top_p: float | Sequence[float] | None = None,
        repetition_penalty: float | Sequence[float] | None = None,
        seed: int | Sequence[int] | None = None,
        stop: str | Sequence[str] | Sequence[Sequence[str]] | None = None,
        min_p: float | Sequence[float] | None = None,
        presence_penalty: float | Sequence[float] | None = None,
        frequency_penalty: float | Sequence[float] | None = None,
        min_new_tokens: int | Sequence[int] | None = None,
        logit_bias: Mapping[int, float] | Sequence[Mapping[int, float]] | None = None,
        top_logprobs: int | Sequence[int] | None = None,
    ) -> list[Completion]: ...

    def generate(self, prompt: str | list[str] | tuple[str, ...], **params: Any) -> Completion | list[Completion]:
        """Generates the continuation of a prompt, or of a list of prompts in one request.

        A parameter that is not given has the default that the model was exported with. With several prompts, a
        parameter may be a sequence with one value per prompt. Sampling parameters without effect, because the
        temperature is 0, cause a warning.

        Args:
            prompt: the text to continue, or a list of texts.

        Keyword Args:
            max_new_tokens (int): the maximum number of new tokens.
            temperature (float): divides the logits before sampling; 0 = greedy.
            top_k (int): sample from this many of the most likely tokens; 0 = off.
            top_p (float): sample from the most likely tokens with this total probability; 1 = off.
            repetition_penalty (float): above 1, makes tokens that are in the text already less likely; 1 = off.
            seed (int): makes sampling reproducible; -1 = random.
            stop (str): generation ends before this string; "" = none. Several strings: a list for one prompt, or one
                list per prompt.
            min_p (float): leave out tokens less likely than this fraction of the likeliest one; 0 = off.
            presence_penalty (float): subtracted from the logit of each token that was generated already; 0 = off.
            frequency_penalty (float): the same for each time that it was generated; 0 = off.
            min_new_tokens (int): the text does not end before this many new tokens; 0 = off.
            logit_bias (Mapping[int, float]): token id -> number that is added to its logit.
            top_logprobs (int): report the log-probabilities of the new tokens, and of this many of the likeliest.

        From several stop strings on, these parameters are those of the signature `generate_tokens`: the prompts are
        tokenized by another request, and the completion is the text of its bytes. An old export lacks them.

        Example:
            >>> client.generate("The import statement", max_new_tokens=5, temperature=0.0).completion
            >>> client.generate(["One", "Two"], temperature=[0.0, 0.8], seed=7)
            >>> client.generate("One", stop=["Two", "."], top_logprobs=3).token_logprobs
        """
        given = {name: value for name, value in params.items() if value is not None}
        prompts = _as_list(prompt)
        if isinstance(prompt, str) and is_list(given.get("stop")):
            given["stop"] = [given["stop"]]
        several = is_list(given.get("stop")) and any(map(is_list, given["stop"]))
        if several or not given.keys() <= _PARAMETERS:
            known, completions = self._generate_tokens(prompts, given)
        else:
            known, completions = self._generate(prompts, given)
        if unused := unused_parameters(params, known):
            warnings.warn(f"the temperature is 0, so {', '.join(unused)} has no effect", stacklevel=2)
        return completions[0] if isinstance(prompt, str) else completions

    def _generate(self, prompts: Sequence[str], given: Mapping[str, Any]) -> tuple[Signature, list[Completion]]:
        known, outputs = self._predict("generate", {"prompt": prompts, **given})
        with reading(self._transport.address, "a completion"):
            return known, [
                Completion(
                    generated_text=row.text("generated_text"),
                    completion=row.text("completion"),
                    completion_bytes=row.raw("completion_bytes"),
                    finish_reason=row.text("finish_reason"),
                    prompt_tokens=row.count("prompt_tokens"),
                    completion_tokens=row.count("completion_tokens"),
                )
                for row in as_rows(outputs)
            ]

    def _generate_tokens(self, prompts: Sequence[str], params: Mapping[str, Any]) -> tuple[Signature, list[Completion]]:
        """Completions by `generate_tokens`, of prompts that `tokenize` tokenizes."""
        for name in params:
            if name not in _PARAMETERS | _TOKEN_PARAMETERS:
                names = ", ".join(sorted(_PARAMETERS | _TOKEN_PARAMETERS))
                raise InputError(f"there is no parameter {name}; there are {names}")
        given = {**params, **rows_of_lists(params, len(prompts))}
        known = self.signatures().get("generate_tokens")
        missing = sorted(name for name in given if known is None or name not in known.inputs)
        if missing or known is None:
            names = ", ".join(f"`{name}`" for name in missing)
            raise InputError(f"the served model does not offer {names}: export it again, with this version of tfclm")
        ids = self._tokenize(prompts)
        width = max(map(len, ids))
        rows = {
            "input_ids": [[*row, *[0] * (width - len(row))] for row in ids],
            "attention_mask": [[1] * len(row) + [0] * (width - len(row)) for row in ids],
        }
        _, outputs = self._predict("generate_tokens", {**rows, **given})
        completions = []
        with reading(self._transport.address, "a completion"):
            for prompt, prompt_ids, row in zip(prompts, ids, as_rows(outputs), strict=True):
                data, count = row.raw("completion_bytes"), row.count("completion_tokens")
                tops = zip(row.list_of("top_ids", list, count), row.list_of("top_logprobs", list, count), strict=True)
                completions.append(
                    Completion(
                        generated_text=prompt + data.decode(errors="replace"),
                        completion=data.decode(errors="replace"),
                        completion_bytes=data,
                        finish_reason=row.text("finish_reason"),
                        prompt_tokens=len(prompt_ids),
                        completion_tokens=count,
                        token_ids=row.list_of("output_ids", int, count),
                        token_logprobs=row.list_of("token_logprobs", float, count),
                        top_logprobs=tuple({i: value for i, value in zip(*top, strict=True) if i >= 0} for top in tops),
                    )
                )
        return known, completions

    @overload
    def tokenize(self, text: str) -> tuple[int, ...]: ...

    @overload
    def tokenize(self, text: list[str] | tuple[str, ...]) -> list[tuple[int, ...]]: ...

    def tokenize(self, text: str | list[str] | tuple[str, ...]) -> tuple[int, ...] | list[tuple[int, ...]]:
        """The token ids of a text, or of a list of texts in one request, with those that the tokenizer adds.

        Example:
            >>> client.tokenize("The import statement")
        """
        rows = self._tokenize(_as_list(text))
        return rows[0] if isinstance(text, str) else rows

    def _tokenize(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        outputs = self.predict("tokenize", {"text": texts})
        with reading(self._transport.address, "tokens"):
            return [row.list_of("token_ids", int, row.count("token_count")) for row in as_rows(outputs)]

    def detokenize(self, token_ids: Sequence[int] | Sequence[Sequence[int]]) -> str | list[str]:
        """The text of token ids, or of a list of rows of ids in one request, without special tokens.

        Example:
            >>> client.detokenize(client.tokenize("The import statement"))
        """
        one = not any(map(is_list, token_ids))
        rows: Any = [token_ids] if one else token_ids
        width = max(map(len, rows), default=0)
        outputs = self.predict("detokenize", {"token_ids": [[*row, *[-1] * (width - len(row))] for row in rows]})
        with reading(self._transport.address, "texts"):
            texts = [row.text("text") for row in as_rows(outputs)]
        return texts[0] if one else texts

    def describe(self) -> dict[str, Any]:
        """What the exported model tells about itself: type, context, limits, defaults, special tokens, perplexity.

        Example:
            >>> client.describe()["context"]
        """
        outputs = self.predict("describe", {"query": [""]})
        with reading(self._transport.address, "a description"):
            (row,) = as_rows(outputs)
            description: dict[str, Any] = json.loads(row.text("description"))
            return description

    @overload
    def score(self, text: str) -> Score: ...

    @overload
    def score(self, text: list[str] | tuple[str, ...]) -> list[Score]: ...

    def score(self, text: str | list[str] | tuple[str, ...]) -> Score | list[Score]:
        """Computes loss, perplexity and token log-probabilities of a text, or of a list of texts in one request.

        Example:
            >>> client.score("The import statement").perplexity
        """
        outputs = self.predict("score", {"text": _as_list(text)})
        with reading(self._transport.address, "a score"):
            scores = [
                Score(
                    loss=row.number("loss"),
                    perplexity=row.number("perplexity"),
                    token_count=row.count("token_count"),
                    # Rows of a request are padded to the longest.
                    token_ids=row.list_of("token_ids", int, row.count("token_count") + 1),
                    token_logprobs=row.list_of("token_logprobs", float, row.count("token_count") + 1),
                    greedy_ids=row.list_of("greedy_ids", int, row.count("token_count") + 1)
                    if "greedy_ids" in row
                    else (),
                )
                for row in as_rows(outputs)
            ]
        return scores[0] if isinstance(text, str) else scores

    def signatures(self) -> dict[str, Signature]:
        """The model's signatures by name, with the types and defaults of their inputs."""
        return self._transport.signatures(self._call())

    def predict(self, signature: str, inputs: Mapping[str, Any]) -> dict[str, list[Any]]:
        """Runs any signature.

        Args:
            signature: its name.
            inputs: name -> a list of B values, or one value for all rows. Inputs that are omitted have their default.

        Returns:
            Outputs name -> list of B values: numbers, bytes for strings, and lists of them for rank 2 and higher.

        Example:
            >>> client.predict("tokenize", {"text": ["The import statement"]})["token_count"]
        """
        return self._predict(signature, inputs)[1]

    def _predict(self, signature: str, inputs: Mapping[str, Any]) -> tuple[Signature, dict[str, list[Any]]]:
        call = self._call()
        signatures = self._transport.signatures(call)
        if signature not in signatures:
            raise InputError(f"the served model has no signature {signature}; it has {', '.join(sorted(signatures))}")
        known = signatures[signature]
        for name in inputs:
            if name not in known.inputs:
                raise InputError(f"signature {signature} has no input {name}; it has {', '.join(sorted(known.inputs))}")
        for name in known.required:
            if name not in inputs:
                raise InputError(f"signature {signature} needs the input {name}")
        sizes = {name: len(value) for name, value in inputs.items() if is_list(value)}
        size = max(sizes.values(), default=1)
        for name, given in sizes.items():
            if given != size:
                raise InputError(f"`{name}` has {given} values for {size} rows: give one value, or one per row")
        if not size:
            raise InputError(f"`{next(iter(sizes))}` is empty: give at least one row")
        # TensorFlow Serving does not use defaults in REST requests, so every input is sent.
        complete = {**known.defaults, **inputs}
        rows = {
            name: (dtype, [check_value(value, dtype, name) for value in broadcast(complete[name], size)])
            for name, dtype in known.inputs.items()
        }
        return known, self._transport.predict(signature, known, rows, call)

    def _call(self) -> Call:
        return Call(self._transport.address, self._timeout)


def unused_parameters(given: Mapping[str, Any], signature: Signature) -> list[str]:
    """The sampling parameters in `given` that have no effect, because the temperature is 0, given or by default."""
    temperature = given.get("temperature")
    if temperature is None:
        temperature = signature.defaults.get("temperature")
    if not isinstance(temperature, int | float) or temperature != 0:
        return []
    # The values that turn each of them off.
    off = {"top_k": 0, "top_p": 1, "min_p": 0, "seed": -1}
    return [name for name, value in off.items() if given.get(name) not in (None, value)]


def _as_list(text: str | list[str] | tuple[str, ...]) -> Sequence[str]:
    return text if isinstance(text, list | tuple) else [text]
