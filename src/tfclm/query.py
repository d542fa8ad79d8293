"""`python -m tfclm.query`: asks a served model, over REST or gRPC, for text or for a text's perplexity."""

from __future__ import annotations

import base64
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tfclm.client import Client, ServerError, Signature
from tfclm.errors import InputError
from tfclm.prompts import read_prompt
from tfclm.settings import command, setting

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
    timeout: float = setting(120.0, "seconds that an answer may take")


def run(settings: QuerySettings) -> int:
    """Prints the answers; 1 if the server could not give one."""
    prompt = read_prompt(settings.prompt, sys.stdin, settings.prompt_file)
    prompts = re.split(r"\r?\n", prompt) if settings.batch else [prompt]
    with Client(
        _url(settings),
        settings.model_name,
        version=settings.version,
        version_label=settings.version_label,
        timeout=settings.timeout,
    ) as client:
        done = 0
        try:
            signatures = client.signatures()
            if settings.signature not in signatures:
                raise InputError(
                    f"--signature {settings.signature}: the served model has {', '.join(sorted(signatures))}"
                )
            size = 1 if settings.signature == "generate_tokens" else ROWS
            for done in range(0, len(prompts), size):
                rows = prompts[done : done + size]
                inputs = _inputs(settings, signatures[settings.signature], rows)
                _show(client.predict(settings.signature, inputs), len(rows), settings)
        except InputError as error:
            raise InputError(f"{_lines(settings, done, prompts)}{error}") from error
        except ServerError as error:
            print(f"tfclm.query: {_lines(settings, done, prompts)}{error}", file=sys.stderr)
            return 1
    return 0


def _lines(settings: QuerySettings, done: int, prompts: Sequence[str]) -> str:
    """Where in a batch something failed: what was printed before is good."""
    last = min(done + ROWS, len(prompts))
    return f"lines {done + 1} to {last}: " if settings.batch and len(prompts) > 1 else ""


def _url(settings: QuerySettings) -> str:
    if not settings.grpc:
        return settings.url or "http://localhost:8501"
    url = settings.url or "localhost:8500"
    if url.startswith(("http://", "https://")):
        raise InputError(f"--url {url} is REST's: give gRPC's host and port, such as localhost:8500")
    return url if url.startswith(("grpc://", "grpcs://", "unix:")) else f"grpc://{url}"


def _inputs(settings: QuerySettings, signature: Signature, prompts: list[str]) -> dict[str, Any]:
    """The prompts under the name of the signature's text, and the knobs that are given."""
    knobs = {name: value for name in KNOBS if (value := getattr(settings, name)) is not None}
    for name in knobs:
        if name not in signature.inputs:
            flag = f"--{name.replace('_', '-')}"
            raise InputError(f"{flag}: signature {settings.signature} of the served model has no such knob")
    if set(signature.required) == {"input_ids", "attention_mask"}:
        try:
            ids = [int(token) for token in prompts[0].split()]
        except ValueError as error:
            raise InputError("the prompt of generate_tokens is token ids, with blanks between them") from error
        return {"input_ids": [ids], "attention_mask": [[1] * len(ids)], **knobs}
    texts = [name for name in signature.required if signature.inputs[name] == "DT_STRING"]
    if len(texts) != 1 or len(signature.required) > 1:
        needed = ", ".join(signature.required)
        raise InputError(f"--signature {settings.signature} takes {needed}, not one text: use tfclm.Client.predict")
    return {texts[0]: prompts, **knobs}


def _show(outputs: dict[str, list[Any]], size: int, settings: QuerySettings) -> None:
    """Prints the text of each row, its perplexity or its tokens; with --json, or where there is none of these, all."""
    for number in range(size):
        row = {name: values[number] for name, values in outputs.items()}
        if "token_count" in row:
            for name in ("token_ids", "token_logprobs"):
                row[name] = row[name][: row["token_count"] + 1]
        if "output_ids" in row:
            row["output_ids"] = row["output_ids"][: row["completion_tokens"]]
        results = [name for name in ("generated_text", "perplexity", "output_ids") if name in row]
        main = results[0] if results else next(iter(row)) if len(row) == 1 else None
        if settings.json or main is None:
            plain = {name: _plain(name, value) for name, value in row.items()}
            print(json.dumps(plain, ensure_ascii=False), flush=True)
        elif isinstance(row[main], list):
            print(*row[main], flush=True)
        else:
            print(_plain(main, row[main]), flush=True)


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
