"""`python -m tfclm.query`: asks a served model, over REST or gRPC, for text or for a text's perplexity."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tfclm.cli.command import command
from tfclm.cli.prompts import read_prompt
from tfclm.client import Client, ServerError, Signature, idle_knobs
from tfclm.errors import InputError
from tfclm.settings import setting
from tfclm.terminal import log, print_result

KNOBS = ("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "seed", "stop")
ROWS = 8  # of a request, as many as a model decodes together unless it was exported otherwise


@dataclass(frozen=True)
class QuerySettings:
    """Settings of `query`; knobs that are None have the defaults that the model was exported with."""

    url: str | None = setting(None, "the server; http://localhost:8501, with --grpc localhost:8500")
    model_name: str = setting("model", "the name under which the server has the model")
    version: int | None = setting(None, "number of the model's version; the one served now if not given")
    version_label: str | None = setting(None, "label of the version, such as stable")
    signature: str = setting("generate", "what to ask for: generate, serving_default, score, generate_tokens")
    prompt: str | None = setting(None, "what to go on from, or to score; standard input if not given", literal=True)
    prompt_file: str | None = setting(None, "a file with the prompt")
    batch: bool = setting(False, "every line is a prompt of its own")
    max_new_tokens: int | None = setting(None, "tokens at most")
    temperature: float | None = setting(None, "flattens (above 1) or sharpens the distribution; 0 is greedy")
    top_k: int | None = setting(None, "draw from this many of the likeliest tokens; 0 is off")
    top_p: float | None = setting(None, "draw from the likeliest tokens that together have this probability; 1 is off")
    repetition_penalty: float | None = setting(None, "above 1, tokens that are there already are less likely; 1 is off")
    seed: int | None = setting(None, "the same seed gives the same text; -1 is fresh")
    stop: str | None = setting(None, "the text ends before this string", literal=True)
    grpc: bool = setting(False, "ask over gRPC")
    json: bool = setting(False, "print a JSON object a prompt, with all that the signature gives")
    timeout: float = setting(120.0, "seconds that a request may take, with all retries")
    max_reply_bytes: int = setting(32 * 2**20, "the largest reply that is read, inflated if it is compressed")
    ca_file: str | None = setting(None, "PEM file of the authorities to trust for https:// and grpcs://")
    cert_file: str | None = setting(None, "PEM file of a client certificate, for a server that wants one")
    key_file: str | None = setting(None, "PEM file of the client certificate's key")


@dataclass(frozen=True)
class Prompt:
    """A prompt, and the line of a batch that it stands on."""

    text: str
    line: int


def run(settings: QuerySettings) -> int:
    """Prints the answers; 1 if the server could not give one."""
    prompts = _prompts(settings)
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
            signatures = client.signatures()
            if settings.signature not in signatures:
                raise InputError(
                    f"--signature {settings.signature}: the served model has {', '.join(sorted(signatures))}"
                )
            _warn_of_greedy(settings, signatures[settings.signature])
            size = 1 if settings.signature == "generate_tokens" else ROWS
            for done in range(0, len(prompts), size):
                rows = prompts[done : done + size]
                try:
                    inputs = _inputs(settings, signatures[settings.signature], [row.text for row in rows])
                    outputs = client.predict(settings.signature, inputs)
                except InputError as error:
                    raise InputError(_in_batch(str(error), rows, settings)) from error
                except ServerError as error:
                    raise ServerError(_in_batch(str(error), rows, settings)) from error
                _show(outputs, rows, settings)
    except InputError as error:
        raise InputError(_as_flags(str(error))) from error
    except ServerError as error:
        log(f"tfclm.query: {_as_flags(str(error))}")
        return 1
    return 0


def _prompts(settings: QuerySettings) -> list[Prompt]:
    """The prompt, or with --batch one a line, without the lines that are blank."""
    given = read_prompt(settings.prompt, sys.stdin, settings.prompt_file)
    if not settings.batch:
        return [Prompt(given, 1)]
    lines = [Prompt(text, number) for number, text in enumerate(re.split(r"\r?\n", given), 1)]
    blank = [str(prompt.line) for prompt in lines if not prompt.text.strip()]
    if len(blank) == len(lines):
        raise InputError("--batch: every line is blank: give a prompt a line")
    if blank:
        which = f"line {blank[0]} is" if len(blank) == 1 else f"lines {', '.join(blank)} are"
        log(f"tfclm.query: {which} blank and skipped")
    return [prompt for prompt in lines if prompt.text.strip()]


def _in_batch(message: str, rows: Sequence[Prompt], settings: QuerySettings) -> str:
    """A message about rows of a request as one about lines of the batch; what was printed before is good."""
    if not settings.batch:
        return message
    row = re.match(r"(\w+)\[(\d+)\] ", message)
    if row and int(row[2]) < len(rows):
        return f"line {rows[int(row[2])].line}: {message.replace(row[0], f'{row[1]} ', 1)}"
    return f"lines {rows[0].line} to {rows[-1].line}: {message}" if len(rows) > 1 else f"line {rows[0].line}: {message}"


def _as_flags(message: str) -> str:
    """A message with the client's arguments as the flags that they are here."""
    return re.sub(
        r"\b(?:ca_file|cert_file|key_file|max_reply_bytes)\b",
        lambda name: f"--{name[0].replace('_', '-')}",
        message,
    )


def _warn_of_greedy(settings: QuerySettings, signature: Signature) -> None:
    """Says of the knobs for drawing tokens that they do nothing where none is drawn."""
    names = idle_knobs(dataclasses.asdict(settings), signature)
    if names:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in names)
        default = ", the model's default" if settings.temperature is None else ""
        verb = "does" if len(names) == 1 else "do"
        log(f"tfclm.query: {flags} {verb} nothing at temperature 0{default}: give --temperature, such as 0.8")


def _url(settings: QuerySettings) -> str:
    if not settings.grpc:
        return settings.url or "http://localhost:8501"
    url = settings.url or "localhost:8500"
    if url.startswith(("http://", "https://")):
        raise InputError(f"--url {url} is REST's: give gRPC's host and port, such as localhost:8500")
    return url if url.startswith(("grpc://", "grpcs://", "unix:")) else f"grpc://{url}"


def _inputs(settings: QuerySettings, signature: Signature, prompts: list[str]) -> dict[str, Any]:
    """The prompts under the name of the signature's text, and the knobs that are given."""
    params = {name: value for name in KNOBS if (value := getattr(settings, name)) is not None}
    for name in params:
        if name not in signature.inputs:
            flag = f"--{name.replace('_', '-')}"
            raise InputError(f"{flag}: signature {settings.signature} of the served model has no such knob")
    if set(signature.required) == {"input_ids", "attention_mask"}:
        try:
            ids = [int(token) for token in prompts[0].split()]
        except ValueError as error:
            raise InputError("the prompt of generate_tokens is token ids, with blanks between them") from error
        return {"input_ids": [ids], "attention_mask": [[1] * len(ids)], **params}
    texts = [name for name in signature.required if signature.inputs[name] == "DT_STRING"]
    if len(texts) != 1 or len(signature.required) > 1:
        needed = ", ".join(signature.required)
        raise InputError(f"--signature {settings.signature} takes {needed}, not one text: use tfclm.Client.predict")
    return {texts[0]: prompts, **params}


def _show(outputs: dict[str, list[Any]], rows: Sequence[Prompt], settings: QuerySettings) -> None:
    """Prints the text of each row, its perplexity or its tokens; with --json, or where there is none of these, all."""
    for number, prompt in enumerate(rows):
        row = {name: values[number] for name, values in outputs.items()}
        # Rows of a request are padded to the longest.
        for count, more, names in (
            ("token_count", 1, ("token_ids", "token_logprobs")),
            ("completion_tokens", 0, ("output_ids",)),
        ):
            for name in names:
                if isinstance(row.get(count), int) and isinstance(row.get(name), list):
                    row[name] = row[name][: row[count] + more]
        results = [name for name in ("generated_text", "perplexity", "output_ids") if name in row]
        main = results[0] if results else next(iter(row)) if len(row) == 1 else None
        if settings.json or main is None:
            plain = {name: _plain(name, value) for name, value in row.items()}
            print_result(json.dumps(plain, ensure_ascii=False))
        elif isinstance(row[main], list):
            print_result(" ".join(map(str, row[main])))
        else:
            print_result(str(_plain(main, row[main])))
        if row.get("completion") == b"" and row.get("finish_reason") == b"stop":
            where = f"line {prompt.line}: " if settings.batch else ""
            stop = " or --stop" if settings.stop else ""
            log(f"tfclm.query: {where}the text ended at once: the end of text{stop} came first")


def _plain(name: str, value: Any) -> Any:
    """An output as JSON has it, bytes as TensorFlow Serving writes them."""
    if isinstance(value, list):
        return [_plain(name, item) for item in value]
    if not isinstance(value, bytes):
        return value
    return {"b64": base64.b64encode(value).decode()} if name.endswith("_bytes") else value.decode(errors="replace")


def main() -> None:
    """The command."""
    command(QuerySettings, run, verb="query", description=__doc__ or "", tensorflow=False)


if __name__ == "__main__":
    main()
