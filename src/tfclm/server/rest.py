"""The REST API: turns method, path and body into status and body. It does not use sockets."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any
from urllib.parse import unquote_to_bytes

from google.protobuf import json_format
from tensorflow_serving.apis import (
    classification_pb2,
    get_model_metadata_pb2,
    input_pb2,
    model_pb2,
    regression_pb2,
)

from tfclm.server.deadline import Deadline, deadline_exceeded
from tfclm.server.playground import Playground
from tfclm.server.service import METADATA_FIELD, Service
from tfclm.server.status import HTTP_STATUS, Code, StatusError, TooLarge, invalid
from tfclm.server.wire import jsonreplies, jsonrequests
from tfclm.server.wire.bodies import Body

_JSON = {"Content-Type": "application/json"}
_CORS = {
    "Access-Control-Allow-Origin": "*",
    "Access-Control-Allow-Methods": "POST, GET",
    "Access-Control-Allow-Headers": "Content-Type",
}
_NAME, _VERSION = r"([^/:]+)", r"(?:/versions/(\d+)|/labels/([^/:]+))?"
_FLAGS = re.IGNORECASE | re.ASCII | re.DOTALL
_METHODS = {"GET", "POST", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH"}
_CHARACTER = r"[A-Za-z0-9\-._~!$&'()*+,;=:@/]|%[0-9A-Fa-f]{2}"
_TARGET = re.compile(
    # Scheme and host, which are ignored, then path, query and fragment.
    r"(?:[A-Za-z][A-Za-z0-9+.\-]*:)?(?://[^/?#]*)?"
    rf"((?:{_CHARACTER})*(?:\?(?:{_CHARACTER}|\?)*)?(?:\#(?:{_CHARACTER}|\?)*)?)"
)
_API = re.compile("/v1/.*", _FLAGS)
_POST_PATH = re.compile(f"/v1/models/{_NAME}{_VERSION}:(classify|regress|predict)", _FLAGS)
_GET_PATH = re.compile(f"/v1/models(?:/{_NAME})?{_VERSION}(?:/(metadata))?", _FLAGS)


@dataclass(frozen=True)
class Reply:
    """The reply to a request; `model` and `code` are for the access log."""

    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    model: str = ""
    code: Code = Code.OK


@dataclass(frozen=True)
class Path:
    """A parsed path of the API; `verb` is the method of a POST, and "metadata" or "" of a GET."""

    spec: model_pb2.ModelSpec
    verb: str


class RestApi:
    """TensorFlow Serving's REST API over a service.

    Args:
        service: runs the requests.
        timeout_ms: time limit of a request, from parsing its body to writing the reply; 0 for no limit.
        cors: whether to send CORS headers.
        metrics_path: the URL path of Prometheus metrics; None for no metrics.
        playground: the page at `/`; None for no page.
        max_values: how many JSON values a request may hold; None for any number.
    """

    def __init__(
        self,
        service: Service,
        *,
        timeout_ms: int,
        cors: bool,
        metrics_path: str | None,
        playground: Playground | None = None,
        max_values: int | None = None,
    ) -> None:
        self._service, self._timeout_ms, self._metrics_path = service, timeout_ms, metrics_path
        self._max_values = max_values
        self._large = threading.Lock()  # large bodies are parsed one at a time
        self._cors = _CORS if cors else {}
        self._playground = playground

    def is_inference(self, method: str, path: str) -> bool:
        """Whether a request may run a model, so that it needs a thread and may have to wait for one."""
        return method == "POST" and _API.fullmatch(path) is not None

    def answer(self, method: str, path: str, body: Body, origin: str = "") -> Reply:
        """Answers a request; `path` comes from `local_path`."""
        if method not in _METHODS:
            return error_page(501)
        if self._metrics_path is not None and path.partition("?")[0] == self._metrics_path:
            return self._metrics(path)
        if self._playground is not None and method == "GET" and path.partition("?")[0] == "/":
            return Reply(200, self._playground.page(), dict(self._playground.headers))
        if not _API.fullmatch(path):
            return error_page(404)
        if method == "OPTIONS":
            code = Code.OK if re.search("https?://", origin) else Code.FAILED_PRECONDITION
            self._service.metrics.request_count.add(model_name="", status=code.name)
            return Reply(HTTP_STATUS[code], b"", dict(self._cors), code=code)
        headers = _JSON | self._cors
        name = ""
        try:
            try:
                parsed = _parse_path(method, path)
            except StatusError as error:
                # TensorFlow Serving sends this reply without a body.
                self._service.metrics.request_count.add(model_name="", status=error.code.name)
                return Reply(HTTP_STATUS[error.code], b"", headers, code=error.code)
            name = parsed.spec.name if parsed else ""
            with self._service.counted(name, parsed.verb if method == "POST" and parsed else "", "REST"):
                reply = self._run(method, path, parsed, body)
            return Reply(200, reply, headers, name)
        except StatusError as error:
            status = 413 if isinstance(error, TooLarge) else HTTP_STATUS.get(error.code, 500)
            return Reply(status, jsonreplies.write_error(error.message), headers, name, error.code)

    def _metrics(self, path: str) -> Reply:
        if path != self._metrics_path:
            page = f"Unexpected path: {path}. Should be {self._metrics_path}"
            return Reply(400, page.encode(), {"Content-Type": "text/plain"}, code=Code.INVALID_ARGUMENT)
        return Reply(200, self._service.metrics.page().encode(), {"Content-Type": "text/plain"})

    def _run(self, method: str, path: str, parsed: Path | None, body: Body) -> bytes:
        if method == "POST" and parsed is not None:
            # The path is case-insensitive, the verb is not: `:PREDICT` matches the pattern, and is refused here.
            run = {"predict": self._predict, "classify": self._classify, "regress": self._regress}.get(parsed.verb)
            if run is not None:
                return run(parsed.spec, body, Deadline(self._timeout_ms))
        if method == "GET" and parsed is not None:
            if not parsed.spec.name:
                raise invalid("Missing model name in request.")
            return self._metadata(parsed.spec) if parsed.verb == "metadata" else self._status(parsed.spec)
        raise invalid(f"Malformed request: {method} {path}")

    @contextmanager
    def _read(self, body: Body, deadline: Deadline) -> Iterator[bytes]:
        """The body's bytes. Large bodies are parsed one at a time, because values take several times the memory."""
        seconds = deadline.seconds()
        if body.large and not self._large.acquire(timeout=-1 if seconds is None else seconds):
            raise deadline_exceeded()
        try:
            yield body.read(deadline)
        finally:
            if body.large:
                self._large.release()

    def _predict(self, spec: model_pb2.ModelSpec, body: Body, deadline: Deadline) -> bytes:
        with ExitStack() as stack:
            servables = []

            def inputs_of(signature_name: str) -> jsonrequests.Inputs:
                servables.append(stack.enter_context(self._service.manager.use(spec)))
                return servables[0].signature_inputs(signature_name)

            with self._read(body, deadline) as text:
                request = jsonrequests.read_predict(text, inputs_of, deadline, self._max_values)
                del text
            timeout_ms = deadline.milliseconds()
            outputs = servables[0].predict(request.signature_name, request.inputs, timeout_ms=timeout_ms)
        return jsonreplies.write_predict(outputs, row=request.row, deadline=deadline)

    def _classify(self, spec: model_pb2.ModelSpec, body: Body, deadline: Deadline) -> bytes:
        examples = self._examples(spec, body, deadline)
        request = classification_pb2.ClassificationRequest(model_spec=spec, input=examples)
        return jsonreplies.write_classifications(self._service.classify(request, deadline.milliseconds()).result)

    def _regress(self, spec: model_pb2.ModelSpec, body: Body, deadline: Deadline) -> bytes:
        examples = self._examples(spec, body, deadline)
        request = regression_pb2.RegressionRequest(model_spec=spec, input=examples)
        return jsonreplies.write_regressions(self._service.regress(request, deadline.milliseconds()).result)

    def _examples(self, spec: model_pb2.ModelSpec, body: Body, deadline: Deadline) -> input_pb2.Input:
        """The examples of a request; sets the signature's name in `spec`."""
        with self._read(body, deadline) as text:
            name, examples = jsonrequests.read_examples(text, deadline, self._max_values)
        try:
            spec.signature_name = name
        except UnicodeEncodeError:
            # A signature's name is always valid UTF-8.
            raise invalid(f"No signature was found with the name: {name}") from None
        return examples

    def _status(self, spec: model_pb2.ModelSpec) -> bytes:
        return _proto_json(self._service.manager.status(spec)).encode()

    def _metadata(self, spec: model_pb2.ModelSpec) -> bytes:
        request = get_model_metadata_pb2.GetModelMetadataRequest(model_spec=spec, metadata_field=[METADATA_FIELD])
        response = self._service.metadata(request)
        signatures = get_model_metadata_pb2.SignatureDefMap()
        response.metadata[METADATA_FIELD].Unpack(signatures)
        text = (
            '{\n"model_spec":'
            + _proto_json(response.model_spec)
            + ',\n"metadata": {"signature_def": '
            + _proto_json(signatures)
            + "}\n}\n"
        )
        return text.encode()


def local_path(target: str) -> str | None:
    """The path, query and fragment of a request target, which may also have a scheme and host.

    None if it is not a URI, such as one with a percent sign that is not followed by two hexadecimal digits.
    """
    match = _TARGET.fullmatch(target)
    return match and match[1]


def error_page(status: int) -> Reply:
    """The reply to a request outside of the API, which TensorFlow Serving sends as HTML."""
    reason = HTTPStatus(status).phrase
    page = f"<!DOCTYPE html><title>{status} {reason}</title><h1>{reason}</h1>\n".encode()
    codes = {404: Code.NOT_FOUND, 501: Code.UNIMPLEMENTED}
    return Reply(status, page, {"Content-Type": "text/html"}, code=codes.get(status, Code.INVALID_ARGUMENT))


def _parse_path(method: str, path: str) -> Path | None:
    """Parses a path; None if it is not a path of the API.

    Raises:
        StatusError: INVALID_ARGUMENT, for a version that is not an int64.
    """
    match = {"POST": _POST_PATH, "GET": _GET_PATH}[method].fullmatch(path) if method in ("POST", "GET") else None
    if match is None:
        return None
    name, version, label, verb = match.groups()
    spec = model_pb2.ModelSpec(name=_unquote(name or ""))
    if version:
        digits = version.lstrip("0") or "0"
        if len(digits) > 19 or int(digits) >= 2**63:
            raise invalid(f"Failed to convert version: {version} to numeric.")
        spec.version.value = int(digits)
    elif label:
        spec.version_label = _unquote(label)
    return Path(spec, verb or "")


def _unquote(text: str) -> str:
    return unquote_to_bytes(text.encode("utf-8", "surrogateescape")).decode("utf-8", "replace")


def _proto_json(message: Any) -> str:
    values = json_format.MessageToDict(
        message, always_print_fields_with_no_presence=True, preserving_proto_field_name=True
    )
    return json.dumps(values, indent=1, ensure_ascii=False) + "\n"
