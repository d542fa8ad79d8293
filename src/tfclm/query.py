"""`python -m tfclm.query`: asks a served model, over REST or gRPC, to generate text or to score it."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tfclm.cli.command import command
from tfclm.cli.prompts import read_prompt
from tfclm.errors import InputError
from tfclm.settings import setting
from tfclm.terminal import log, print_result

if TYPE_CHECKING:
    from tfclm.client import Client, Signature

PARAMETERS = ("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "seed", "stop")
ROWS_PER_REQUEST = 8  # as many as a model decodes together by default


@dataclass(frozen=True)
class QuerySettings:
    """Settings of `query`; parameters that are None have the defaults that the model was exported with."""

    url: str | None = setting(None, "the server; default http://localhost:8501, with `grpc` localhost:8500")
    model_name: str = setting("model", "name under which the server serves the model")
    version: int | None = setting(None, "number of the model's version; the server's default version if not given")
    version_label: str | None = setting(None, "label of the version, such as stable")
    signature: str = setting("generate", "signature to call, such as generate, score, tokenize or describe")
    prompt: str | None = setting(None, "text to continue or to score; standard input if not given", literal=True)
    prompt_file: str | None = setting(None, "file with the prompt")
    batch: bool = setting(False, "treat every line as a separate prompt")
    max_new_tokens: int | None = setting(None, "maximum number of new tokens")
    temperature: float | None = setting(None, "above 1 flattens the distribution, below 1 sharpens it; 0 = greedy")
    top_k: int | None = setting(None, "sample from this many of the most likely tokens; 0 = off")
    top_p: float | None = setting(None, "sample from the most likely tokens with this total probability; 1 = off")
    repetition_penalty: float | None = setting(
        None, "above 1, makes tokens that are in the text already less likely; 1 = off"
    )
    seed: int | None = setting(None, "makes sampling reproducible; -1 = random")
    stop: str | None = setting(None, "generation ends before this string", literal=True)
    grpc: bool = setting(False, "use gRPC")
    json: bool = setting(False, "print one JSON object per prompt with all outputs of the signature")
    timeout: float = setting(120.0, "seconds that a request may take, including retries")
    max_reply_bytes: int = setting(32 * 2**20, "size limit of a reply in bytes, after decompression")
    ca_file: str | None = setting(None, "PEM file with the certificate authorities to trust for https:// and grpcs://")
    cert_file: str | None = setting(None, "PEM file with a client certificate, for servers that require one")
    key_file: str | None = setting(None, "PEM file with the key of the client certificate")


@dataclass(frozen=True)
class Prompt:
    """A prompt and the number of its line in a batch."""

    text: str
    line: int


def run(settings: QuerySettings) -> int:
    """Prints the model's answers; returns 1 if the server could not answer."""
    # Here, so that `--help` and wrong flags do not wait for the imports of requests and gRPC.
    from tfclm.client import Client, ServerError

    prompts = _read_prompts(settings)
    try:
        with Client(
            _url(settings),
            settings.model_name,
            version=settings.version,
            version_label=settings.version_label,
            timeout=settings.timeout,
            max_reply_bytes=settings.max_reply_bytes,
            ca_file=settings.ca_file,
            cert_file=settings.cert_file,
            key_file=settings.key_file,
        ) as client:
            _ask(client, prompts, settings)
    except ServerError as error:
        log(f"tfclm.query: {error}")
        return 1
    return 0


def _ask(client: Client, prompts: Sequence[Prompt], settings: QuerySettings) -> None:
    """Sends the prompts, several per request, and prints the answers to each request."""
    from tfclm.client import ServerError

    signatures = client.signatures()
    if settings.signature not in signatures:
        raise InputError(f"`signature` {settings.signature}: the served model has {', '.join(sorted(signatures))}")
    signature = signatures[settings.signature]
    _warn_about_unused(settings, signature)
    size = 1 if settings.signature in ("generate_tokens", "detokenize") else ROWS_PER_REQUEST
    for start in range(0, len(prompts), size):
        rows = prompts[start : start + size]
        try:
            outputs = client.predict(settings.signature, _inputs(settings, signature, [row.text for row in rows]))
        except (InputError, ServerError) as error:
            raise type(error)(_with_lines(str(error), rows, settings)) from error
        _print_rows(outputs, rows, settings)


def _read_prompts(settings: QuerySettings) -> list[Prompt]:
    """The prompt, or in a batch one prompt per line that is not blank."""
    text = read_prompt(settings.prompt, sys.stdin, settings.prompt_file)
    if not settings.batch:
        return [Prompt(text, 1)]
    lines = [Prompt(line, number) for number, line in enumerate(re.split(r"\r?\n", text), 1)]
    blank = [str(prompt.line) for prompt in lines if not prompt.text.strip()]
    if len(blank) == len(lines):
        raise InputError("`batch`: every line is blank: give one prompt per line")
    if blank:
        which = f"line {blank[0]} is" if len(blank) == 1 else f"lines {', '.join(blank)} are"
        log(f"tfclm.query: {which} blank and skipped")
    return [prompt for prompt in lines if prompt.text.strip()]


def _with_lines(message: str, rows: Sequence[Prompt], settings: QuerySettings) -> str:
    """A message about rows of a request, with the line numbers of a batch; answers printed before it are valid."""
    if not settings.batch:
        return message
    row = re.match(r"(\w+)\[(\d+)\] ", message)
    if row and int(row[2]) < len(rows):
        return f"line {rows[int(row[2])].line}: {message.replace(row[0], f'{row[1]} ', 1)}"
    return f"lines {rows[0].line} to {rows[-1].line}: {message}" if len(rows) > 1 else f"line {rows[0].line}: {message}"


def _warn_about_unused(settings: QuerySettings, signature: Signature) -> None:
    """Warns about sampling parameters that have no effect because decoding is greedy."""
    from tfclm.client import unused_parameters

    names = unused_parameters(dataclasses.asdict(settings), signature)
    if names:
        given = ", ".join(f"`{name}`" for name in names)
        default = ", the model's default" if settings.temperature is None else ""
        verb = "has" if len(names) == 1 else "have"
        warning = f"{given} {verb} no effect at temperature 0{default}: give `temperature`, such as 0.8"
        log(f"tfclm.query: {warning}")


def _url(settings: QuerySettings) -> str:
    if not settings.grpc:
        return settings.url or "http://localhost:8501"
    url = settings.url or "localhost:8500"
    if url.startswith(("http://", "https://")):
        raise InputError(f"`url` {url} is for REST: give host and port of gRPC, such as localhost:8500")
    return url if url.startswith(("grpc://", "grpcs://", "unix:")) else f"grpc://{url}"


def _inputs(settings: QuerySettings, signature: Signature, prompts: list[str]) -> dict[str, Any]:
    """The inputs of a request: the prompts, as the signature's text input, and the parameters that are given."""
    params = {name: value for name in PARAMETERS if (value := getattr(settings, name)) is not None}
    for name in params:
        if name not in signature.inputs:
            raise InputError(f"`{name}`: signature {settings.signature} of the served model has no such parameter")
    if set(signature.required) in ({"input_ids", "attention_mask"}, {"token_ids"}):
        try:
            ids = [int(token) for token in prompts[0].split()]
        except ValueError as error:
            raise InputError(
                f"the prompt of {settings.signature} is not token ids: give numbers with spaces between"
            ) from error
        if "token_ids" in signature.required:
            return {"token_ids": [ids], **params}
        return {"input_ids": [ids], "attention_mask": [[1] * len(ids)], **params}
    texts = [name for name in signature.required if signature.inputs[name] == "DT_STRING"]
    if len(texts) != 1 or len(signature.required) > 1:
        needed = ", ".join(signature.required)
        raise InputError(f"`signature` {settings.signature} takes {needed}, not one text: use tfclm.Client.predict")
    return {texts[0]: prompts, **params}


def _print_rows(outputs: dict[str, list[Any]], rows: Sequence[Prompt], settings: QuerySettings) -> None:
    """Prints the text of each row, its perplexity or its tokens; all outputs with `json` or if it has none of these."""
    for number, prompt in enumerate(rows):
        row = _unpad({name: values[number] for name, values in outputs.items()})
        names = ("generated_text", "perplexity", "output_ids", "text", "token_ids")
        results = [name for name in names if name in row]
        main = results[0] if results else next(iter(row)) if len(row) == 1 else None
        if settings.json or main is None:
            values = {name: _json_value(name, value) for name, value in row.items()}
            print_result(json.dumps(values, ensure_ascii=False))
        elif isinstance(row[main], list):
            print_result(" ".join(map(str, row[main])))
        else:
            print_result(str(_json_value(main, row[main])))
        if row.get("completion") == b"" and row.get("finish_reason") == b"stop":
            where = f"line {prompt.line}: " if settings.batch else ""
            stop = " or `stop`" if settings.stop else ""
            warning = f"{where}the text ended at once: the end-of-text token{stop} came first"
            log(f"tfclm.query: {warning}")


def _unpad(row: dict[str, Any]) -> dict[str, Any]:
    """A row without the padding of its lists to the longest row of the request."""
    for count, extra, names in (
        # `score` does not count the first token.
        ("token_count", int("loss" in row), ("token_ids", "token_logprobs", "greedy_ids")),
        ("completion_tokens", 0, ("output_ids", "token_logprobs", "top_ids", "top_logprobs")),
    ):
        for name in names:
            if isinstance(row.get(count), int) and isinstance(row.get(name), list):
                row[name] = row[name][: row[count] + extra]
    return row


def _json_value(name: str, value: Any) -> Any:
    """An output as a JSON value, with bytes as TensorFlow Serving writes them."""
    if isinstance(value, list):
        return [_json_value(name, item) for item in value]
    if not isinstance(value, bytes):
        return value
    return {"b64": base64.b64encode(value).decode()} if name.endswith("_bytes") else value.decode(errors="replace")


def main() -> None:
    """The command."""
    command(QuerySettings, run, verb="query", description=__doc__ or "", tensorflow=False)


if __name__ == "__main__":
    main()
