"""What `query` prints: at a terminal, into pipes that close, about batches and about texts that end at once."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tfclm.client import Client

from .doubles import GENERATED, http_reply, rest_metadata, rest_predictions, rest_server

HOSTILE = "\x1b]0;owned\x07\x1b[2J a\ttab\nline \x9b31m \x7f end\r"
# As it is shown: lines and tabs are a text's own.
SHOWN = r"\u001b]0;owned\u0007\u001b[2J a" + "\ttab\n" + r"line \u009b31m \u007f end\u000d"


@contextmanager
def model(text: str = "The end", completion: str = " end", temperature: float = 0.0) -> Iterator[str]:
    """A server whose model answers every prompt alike, and refuses those that are too long; gives its URL."""
    row = {name: (dtype, values[:1] * 8) for name, (dtype, values) in GENERATED.items()}
    row["generated_text"] = ("DT_STRING", [text.encode()] * 8)
    row["completion"] = ("DT_STRING", [completion.encode()] * 8)

    def answer(path: str, body: bytes) -> bytes:
        if path.endswith("/metadata"):
            return http_reply(rest_metadata(temperature=temperature))
        instances = json.loads(body)["instances"]
        for number, instance in enumerate(instances):
            if "long" in instance["prompt"]:
                said = json.dumps({"error": f"prompt[{number}] has 99 tokens, and the context holds 64 \x1b[31m"})
                return http_reply(said.encode(), "400 Bad Request")
        return http_reply(rest_predictions(row, len(instances)))

    with rest_server(answer) as url:
        yield url


def command(url: str, *flags: str, verb: str = "query") -> list[str]:
    """The command line."""
    return [sys.executable, "-m", f"tfclm.{verb}", "--url", url, *flags]


def run(url: str, *flags: str, stdin: bytes = b"a", **options: Any) -> subprocess.CompletedProcess[bytes]:
    """The command, with pipes."""
    return subprocess.run(command(url, *flags), input=stdin, capture_output=True, timeout=60, **options)


def run_at_terminal(*line: str) -> str:
    """A command whose stdout and stderr are a terminal: what it shows."""
    ours, its = pty.openpty()
    with subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=its, stderr=its) as process:
        os.close(its)
        shown = b""
        try:
            while chunk := os.read(ours, 2**16):
                shown += chunk
        except OSError:  # how a terminal ends on Linux
            pass
        process.wait(60)
    os.close(ours)
    return shown.decode().replace("\r\n", "\n")


def test_a_terminal_is_not_steered():
    """A model's text that clears the screen, sets the title, or worse."""
    with model(HOSTILE) as url:
        assert run_at_terminal(*command(url, "--prompt=a")) == SHOWN + "\n"
        shown = run_at_terminal(*command(url, "--prompt=a", "--json"))
        assert json.loads(shown)["generated_text"] == HOSTILE
        assert all(character.isprintable() or character == "\n" for character in shown)
        assert run(url, "--prompt=a").stdout == HOSTILE.encode() + b"\n"


def test_errors_do_not_steer_a_terminal():
    """A server's message goes to the terminal as it is; so does what a command quotes of its arguments or of a file."""
    with model() as url:
        shown = run_at_terminal(*command(url, "--prompt=long"))
        assert shown.endswith("prompt[0] has 99 tokens, and the context holds 64 \\u001b[31m\n")
        assert "\x1b" not in shown
        assert run(url, "--prompt=long").stderr.endswith(b"holds 64 \x1b[31m\n")
    shown = run_at_terminal(sys.executable, "-m", "tfclm.generate", "--\x1b[31m")
    assert "unrecognized arguments: --\\u001b[31m" in shown


@pytest.mark.parametrize("closed", ["head", "stdout", "stderr", "full"])
def test_outputs_that_are_closed(closed: str):
    """A traceback, or results among what is printed elsewhere."""
    redirect = {
        "head": "| head -c 1 > /dev/null; exit ${PIPESTATUS[0]}",
        "stdout": ">&-",
        "stderr": "2>&-",
        "full": "> /dev/full",
    }
    with model("x" * 10_000) as url:
        flags = ["--batch", "--top-k=3"]  # which says something on stderr
        lines = " ".join(f"'{part}'" for part in command(url, *flags))
        done = subprocess.run(
            ["bash", "-c", f"{lines} {redirect[closed]}"], input=b"a\n" * 200, capture_output=True, timeout=60
        )
    said = done.stderr.decode().replace(IDLE, "")
    expected = {
        "head": (1, ""),
        "stdout": (2, "tfclm.query: standard output is closed\n"),
        "stderr": (0, ""),
        "full": (1, "tfclm.query: No space left on device\n"),
    }
    assert (done.returncode, said) == expected[closed]
    assert done.stdout == (("x" * 10_000 + "\n") * 200).encode() if closed == "stderr" else not done.stdout


def test_an_input_that_is_closed():
    """AttributeError: NoneType has no attribute buffer."""
    line = f"{sys.executable} -m tfclm.query --url=http://127.0.0.1:1 <&-"
    done = subprocess.run(["bash", "-c", line], capture_output=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr == b"tfclm.query: standard input is closed: give --prompt\n"


def test_an_encoding_that_has_no_such_character():
    """UnicodeEncodeError, with its traceback, or a ? for a character."""
    with model("é") as url:
        done = run(url, "--prompt=a", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stdout) == (0, "é\n".encode())


def test_blank_lines_of_a_batch():
    """One blank line refuses the whole batch, and does not say which line it is."""
    with model() as url:
        done = run(url, "--batch", stdin=b"a\n\nb\n  \nc\n")
        assert (done.returncode, done.stdout) == (0, b"The end\n" * 3)
        assert done.stderr == b"tfclm.query: lines 2, 4 are blank and skipped\n"
        done = run(url, "--batch", stdin=b"a\n\n")
        assert (done.stdout, done.stderr) == (b"The end\n", b"tfclm.query: line 2 is blank and skipped\n")
        done = run(url, "--batch", stdin=b"\n\n")
        assert done.returncode == 2
        assert done.stderr == b"tfclm.query: --batch: every line is blank: give one prompt per line\n"


def test_a_refused_line_of_a_batch():
    """The row of a request is named, which is no line of the batch."""
    lines = ["a"] * 9 + ["", "b", "too long"]
    with model() as url:
        done = run(url, "--batch", stdin="\n".join(lines).encode())
    assert done.returncode == 2
    assert done.stdout == b"The end\n" * 8
    _, refusal = done.stderr.decode().splitlines()
    assert refusal.startswith("tfclm.query: line 12: prompt has 99 tokens, and the context holds 64")


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_a_text_that_ends_at_once(flags: list[str]):
    """An answer that is the prompt alone, as if nothing had been asked."""
    with model("a", completion="") as url:
        done = run(url, *flags)
        assert done.stderr == b"tfclm.query: the text ended at once: the end-of-text token came first\n"
        done = run(url, "--batch", "--stop=x", *flags, stdin=b"a\n\nb")
        assert done.stderr.decode().splitlines()[1:] == [
            f"tfclm.query: line {line}: the text ended at once: the end-of-text token or --stop came first"
            for line in (1, 3)
        ]
    with model("a b", completion=" b") as url:
        assert run(url, *flags).stderr == b""


FLOATS = ("temperature", "top-p")
IDLE = "tfclm.query: --top-k has no effect at temperature 0, the model's default: give --temperature, such as 0.8\n"


@pytest.mark.parametrize(
    ("default", "flags", "said"),
    [
        (0.0, ["--top-k=3"], IDLE),
        (0.0, ["--top-k=0", "--top-p=1", "--seed=-1"], ""),
        (0.0, ["--top-p=0.5", "--seed=7", "--temperature=1"], ""),
        (0.7, ["--top-p=0.5", "--seed=7"], ""),
        (
            0.7,
            ["--top-p=0.5", "--seed=7", "--temperature=0"],
            "tfclm.query: --top-p, --seed have no effect at temperature 0: give --temperature, such as 0.8\n",
        ),
    ],
)
def test_parameters_without_effect(default: float, flags: list[str], said: str):
    """A user who sets top-p, gets the same greedy text, and is not told why."""
    with model(temperature=default) as url:
        done = run(url, *flags)
        assert (done.stdout, done.stderr.decode()) == (b"The end\n", said)
        params = [flag[2:].split("=") for flag in flags]
        given = {name.replace("-", "_"): float(value) if name in FLOATS else int(value) for name, value in params}
        with Client(url) as client, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            client.generate("a", **given)
        assert bool(caught) == bool(said)
        assert all(warning.filename == __file__ for warning in caught)


def test_flags_are_handed_on(tmp_path: Path):
    """A setting of the client that the command does not pass on; a message that names the client's argument instead."""
    with model() as url:
        done = run(url, "--max-reply-bytes=100")
        assert done.returncode == 1
        assert done.stderr.decode().endswith("more than 100 bytes: ask for less, or raise --max-reply-bytes\n")
        done = run(url.replace("http", "https"), "--ca-file=/no/such.pem")
        assert (done.returncode, done.stderr) == (
            2,
            b"tfclm.query: --ca-file /no/such.pem: No such file or directory\n",
        )
