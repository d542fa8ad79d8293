"""A model behind TensorFlow Serving's REST API."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, urlsplit

import requests
from google.protobuf import json_format
from urllib3.util.retry import Retry

from tfclm.client.messages import message
from tfclm.client.transport import Model, ServerError, Signature, not_available, read_signatures, reason
from tfclm.errors import InputError

CONNECT_SECONDS = 5
LONGEST_PAUSE = 10.0  # seconds that a server's Retry-After may make a caller wait


class RestTransport:
    """One model at `address`, such as http://localhost:8501; a path before /v1 is kept, as gateways have one.

    A reply of 503, which says that nothing was run, is asked again up to `retries` times, after a growing pause or what
    the server's Retry-After says, no longer than ten seconds or the timeout. Nothing else is.
    """

    def __init__(self, address: str, model: Model, timeout: float, retries: int) -> None:
        parts = urlsplit(address)
        if not parts.hostname or parts.query or parts.fragment or "/v1/" in f"{parts.path}/":
            raise InputError(f"URL {address}: give the server alone, such as http://localhost:8501")
        self.address = address.rstrip("/")
        self._model = model
        self._timeout = (CONNECT_SECONDS, timeout)
        self._name = f"/v1/models/{quote(model.name, safe='')}"
        self._path = self._name
        if model.version is not None:
            self._path += f"/versions/{model.version}"
        if model.label is not None:
            self._path += f"/labels/{quote(model.label, safe='')}"

        class Bounded(Retry):
            """Waits no longer than a caller does, whatever the server asks for."""

            def parse_retry_after(self, retry_after: str) -> float:
                return min(super().parse_retry_after(retry_after), timeout, LONGEST_PAUSE)

        again = Bounded(
            total=None,
            connect=0,
            read=False,  # raises what it was, where 0 would wrap it
            redirect=0,
            other=0,
            status=retries,
            status_forcelist=[503],
            allowed_methods=None,
            backoff_factor=0.2,
            raise_on_status=False,
        )
        self._session = requests.Session()
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, requests.adapters.HTTPAdapter(max_retries=again))

    def close(self) -> None:
        """Closes the connections."""
        self._session.close()

    def signatures(self) -> dict[str, Signature]:
        """The model's signatures, from its metadata."""
        reply = self._ask("GET", f"{self._path}/metadata")
        try:
            signatures = json_format.ParseDict(
                reply["metadata"]["signature_def"],
                message("tensorflow.serving.SignatureDefMap")(),
                ignore_unknown_fields=True,
            )
        except (KeyError, TypeError, json_format.ParseError) as error:
            raise ServerError(f"{self.address} gave metadata that is not TensorFlow Serving's: {error}") from error
        return read_signatures(signatures)

    def predict(self, signature: str, inputs: Mapping[str, tuple[str, list[Any]]]) -> dict[str, list[Any]]:
        """Runs a signature, by a row request."""
        columns = (values for _, values in inputs.values())
        rows = [dict(zip(inputs, row, strict=True)) for row in zip(*columns, strict=True)]
        reply = self._ask("POST", f"{self._path}:predict", {"signature_name": signature, "instances": rows})
        predictions = reply.get("predictions")
        if not isinstance(predictions, list) or len(predictions) != len(rows):
            raise ServerError(f"{self.address} gave no prediction for each row")
        # A signature's only output comes without its name.
        if not all(isinstance(row, dict) and "b64" not in row for row in predictions):
            return {"": [_bytes(row) for row in predictions]}
        return {name: [_bytes(row[name]) for row in predictions] for name in predictions[0]}

    def _ask(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        url = self.address + path
        try:
            reply = self._session.request(method, url, data=data, headers=headers, timeout=self._timeout)
        except (requests.ConnectTimeout, requests.ConnectionError) as error:
            if isinstance(error, requests.ConnectTimeout) or "Connection aborted" not in str(error):
                raise ServerError(
                    f"no server answers at {self.address}: start one (python -m tfclm.serve) or give its URL"
                ) from error
            raise ServerError(f"{self.address} closed the connection before it answered") from error
        except requests.Timeout as error:
            raise ServerError(f"{self.address} did not answer within {self._timeout[1]:g} s") from error
        except requests.RequestException as error:
            raise ServerError(f"{self.address}: {error}") from error
        try:
            # TensorFlow Serving sends NaN and Infinity as they are, and Python reads them.
            answer = json.loads(reply.content)
        except ValueError:
            answer = None
        if reply.status_code == 200 and isinstance(answer, dict) and "error" not in answer:
            return answer
        said = answer.get("error") if isinstance(answer, dict) else None
        if not isinstance(said, str):
            kind = reply.headers.get("Content-Type", "no type")
            raise ServerError(
                f"{self.address} is not TensorFlow Serving's REST API: it answered HTTP {reply.status_code}, {kind}"
            )
        if reply.status_code == 404:
            raise not_available(self._model, self.address, {} if path == self._name else self._versions())
        if reply.status_code == 400:
            raise InputError(reason(said))
        busy = ", too many requests" if reply.status_code in (429, 503) else ""
        late = ", longer than the server's --rest_api_timeout_in_ms" if reply.status_code == 504 else ""
        raise ServerError(f"{self.address} answered HTTP {reply.status_code}{busy}{late}: {reason(said)}")

    def _versions(self) -> dict[int, int]:
        """Number -> state of every version that the server has of the model."""
        try:
            status = self._ask("GET", self._name)
        except InputError:
            return {}
        response = message("tensorflow.serving.GetModelStatusResponse")()
        json_format.ParseDict(status, response, ignore_unknown_fields=True)
        return {version.version: version.state for version in response.model_version_status}


def _bytes(value: Any) -> Any:
    """A value of a reply: strings as the bytes that they are in the tensor."""
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, dict) and list(value) == ["b64"]:
        return base64.b64decode(value["b64"])
    if isinstance(value, list):
        return [_bytes(item) for item in value]
    return value
