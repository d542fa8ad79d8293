"""A client of an exported model behind TensorFlow Serving, over REST or gRPC. It needs no TensorFlow."""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar, overload

from tfclm.client.replies import as_rows, understood
from tfclm.client.rest import RestTransport
from tfclm.client.rpc import RpcTransport
from tfclm.client.tls import Tls
from tfclm.client.transport import Call, Limits, Model, ServerError, Signature, Transport
from tfclm.errors import InputError

__all__ = ["Client", "Completion", "Score", "ServerError", "Signature", "idle_knobs"]

T = TypeVar("T")

_INTEGERS = {"DT_INT32": 31, "DT_INT64": 63}


@dataclass(frozen=True)
class Completion:
    """A row of the signature `generate`; `finish_reason` is "stop" (EOS or stop string) or "length"."""

    generated_text: str
    completion: str
    completion_bytes: bytes
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Score:
    """A row of the signature `score`.

    `loss` is the mean negative log-likelihood a token (natural log) of `token_count` tokens. `token_ids` has one more:
    the first token is only context, and its entry in `token_logprobs` is 0.
    """

    loss: float
    perplexity: float
    token_count: int
    token_ids: tuple[int, ...]
    token_logprobs: tuple[float, ...]


class Client:
    """Asks one model of a server.

        client = tfclm.Client("http://localhost:8501", "quickstart")
        print(client.generate("The import statement", temperature=0.8, seed=7).generated_text)

    It may be shared by threads, and closes its connections as a context manager or by `close`.

    Args:
        url: http:// or https:// for REST; grpc://HOST:PORT, grpcs://HOST:PORT (TLS) or unix:PATH for gRPC.
        model_name: the name that the server serves the model under.
        version: its number; the one served now if not given.
        version_label: its label, such as "stable", instead of the number.
        timeout: seconds that a call of a method may take, with all of its requests and retries.
        retries: how often a request is sent again that the server was too busy to run (503, UNAVAILABLE).
        max_reply_bytes: the size of the largest reply that is read, inflated if it is compressed.
        ca_file: PEM file of the authorities to trust for https:// and grpcs://, instead of the public ones.
        cert_file: PEM file of the client's own certificate, for a server that wants one.
        key_file: PEM file of that certificate's key, without a passphrase.

    Raises:
        InputError: from every method, if the server refuses the request or has no such model or signature; the message
            is one line that names the input.
        ServerError: from every method, if the server is absent, not trusted, still loading the model, overloaded, late
            or failed, or if its reply is too large or cannot be read; the message is one line.
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
            raise InputError(f"timeout {timeout}: give seconds, more than 0")
        if retries < 0:
            raise InputError(f"retries {retries}: give 0 or more")
        if max_reply_bytes < 1:
            raise InputError(f"max_reply_bytes {max_reply_bytes}: give 1 or more")
        limits = Limits(timeout, retries, max_reply_bytes)
        trust = Tls(ca_file, cert_file, key_file)
        if trust and not url.startswith(("https://", "grpcs://")):
            raise InputError(f"URL {url}: ca_file, cert_file and key_file go with https:// or grpcs://")
        self._timeout = timeout
        self._transport: Transport
        if url.startswith(("http://", "https://")):
            self._transport = RestTransport(url, model, limits, trust)
        elif url.startswith(("grpc://", "grpcs://", "unix:")):
            self._transport = RpcTransport(url, model, limits, trust)
        else:
            raise InputError(f"URL {url}: give http://HOST:PORT for REST, or grpc://HOST:PORT")

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
        stop: str | None = None,
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
        stop: str | Sequence[str] | None = None,
    ) -> list[Completion]: ...

    def generate(self, prompt: str | list[str] | tuple[str, ...], **params: Any) -> Completion | list[Completion]:
        """The continuation of a prompt, or of several in one request.

        Knobs that are not given have the defaults that the model was exported with. With several prompts, a knob may be
        a sequence with a value for each. Warns of knobs that do nothing because the temperature is 0.
        """
        given = {name: value for name, value in params.items() if value is not None}
        known, outputs = self._predict("generate", {"prompt": _rows(prompt), **given})
        if idle := idle_knobs(params, known):
            warnings.warn(f"at temperature 0 nothing is drawn: {', '.join(idle)} without effect", stacklevel=2)
        with understood(self._transport.address, "a completion"):
            completions = [
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
        return completions[0] if isinstance(prompt, str) else completions

    @overload
    def score(self, text: str) -> Score: ...

    @overload
    def score(self, text: list[str] | tuple[str, ...]) -> list[Score]: ...

    def score(self, text: str | list[str] | tuple[str, ...]) -> Score | list[Score]:
        """Loss, perplexity and the log-probabilities of the tokens of a text, or of several in one request."""
        outputs = self.predict("score", {"text": _rows(text)})
        with understood(self._transport.address, "a score"):
            scores = [
                Score(
                    loss=row.number("loss"),
                    perplexity=row.number("perplexity"),
                    token_count=row.count("token_count"),
                    # Rows of a request are padded to the longest.
                    token_ids=row.several("token_ids", int, row.count("token_count") + 1),
                    token_logprobs=row.several("token_logprobs", float, row.count("token_count") + 1),
                )
                for row in as_rows(outputs)
            ]
        return scores[0] if isinstance(text, str) else scores

    def signatures(self) -> dict[str, Signature]:
        """The model's signatures by name: the inputs' types, and their defaults."""
        return self._transport.signatures(self._call())

    def predict(self, signature: str, inputs: Mapping[str, Any]) -> dict[str, list[Any]]:
        """Runs any signature.

        Args:
            signature: its name.
            inputs: name -> a list of B values, or one value for every row. What is left out has its default.

        Returns:
            Outputs name -> B values: numbers, bytes for strings, and lists of them for outputs of a higher rank.
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
                raise InputError(f"signature {signature} needs {name}")
        sizes = {name: len(value) for name, value in inputs.items() if _several(value)}
        size = max(sizes.values(), default=1)
        for name, given in sizes.items():
            if given != size:
                raise InputError(f"{name} has {given} values for {size} rows: give one, or one a row")
        if not size:
            raise InputError(f"{next(iter(sizes))} is empty: give a row at least")
        # REST fills in no defaults, so that every input is sent.
        complete = {**known.defaults, **inputs}
        rows = {
            name: (dtype, [_checked(value, dtype, name) for value in _repeated(complete[name], size)])
            for name, dtype in known.inputs.items()
        }
        return known, self._transport.predict(signature, known, rows, call)

    def _call(self) -> Call:
        return Call(self._transport.address, self._timeout)


def idle_knobs(given: Mapping[str, Any], signature: Signature) -> list[str]:
    """The knobs that are given to draw tokens, where none is drawn: the temperature is 0, given or by default."""
    temperature = given.get("temperature")
    if temperature is None:
        temperature = signature.defaults.get("temperature")
    if not isinstance(temperature, int | float) or temperature != 0:
        return []
    # With these values they are off.
    off = {"top_k": 0, "top_p": 1, "seed": -1}
    return [name for name, value in off.items() if given.get(name) not in (None, value)]


def _several(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _repeated(value: Any, size: int) -> Sequence[Any]:
    return value if _several(value) else [value] * size


def _rows(text: str | list[str] | tuple[str, ...]) -> Sequence[str]:
    return text if isinstance(text, list | tuple) else [text]


def _checked(value: Any, dtype: str, name: str) -> Any:
    """A value of a row as its type is sent: rank and range are the model's to check."""
    if _several(value):
        return [_checked(item, dtype, name) for item in value]
    if dtype == "DT_STRING":
        if isinstance(value, bytes):
            value = value.decode("utf-8", "surrogateescape")
        if not isinstance(value, str):
            raise InputError(f"{name} is {value!r}: give a text")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{name} is not UTF-8: give the text as UTF-8") from error
        return value
    if dtype in _INTEGERS:
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise InputError(f"{name} is {value!r}: give a whole number")
        most = 2 ** _INTEGERS[dtype]
        if not -most <= value < most:
            raise InputError(f"{name} is {value}: give a number that fits {_INTEGERS[dtype] + 1} bits")
        return int(value)
    if dtype in ("DT_FLOAT", "DT_DOUBLE"):
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise InputError(f"{name} is {value!r}: give a number")
        return float(value)
    if dtype == "DT_BOOL" and isinstance(value, bool):
        return value
    raise InputError(f"{name} is {value!r}: the signature takes {dtype} there")
