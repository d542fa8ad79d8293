"""`prepare` with Apache Beam, which `make lowest` has in its environment: its runners, and what it refuses."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import tiny_config

from tfclm import prepare
from tfclm.checkpoint import create, save
from tfclm.corpus import open_prepared

BEAM = importlib.util.find_spec("apache_beam") is not None
needs_beam = pytest.mark.skipif(not BEAM, reason="Apache Beam is not installed: make lowest runs this")
Console = Callable[..., tuple[int, str, str]]


@pytest.fixture
def console(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Console:
    """Calls `prepare` with the arguments of a shell; gives its exit code, stdout and stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["tfclm", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            prepare.main()
        return (end.value.code, *capfd.readouterr())

    return call


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    """A tiny model with its tokenizer."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("checkpoint")
    save(create(tiny_config("gpt2")), AutoTokenizer.from_pretrained(tokenizer_dir), folder)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory, documents: list[str]) -> Path:
    """A directory with files of two kinds."""
    folder = tmp_path_factory.mktemp("texts")
    rows = [json.dumps({"text": document[:600]}) for document in documents[:40]]
    (folder / "a.jsonl").write_text("\n".join(rows) + "\n")
    (folder / "b.txt").write_text("\n\n".join(document[:600] for document in documents[40:50]))
    return folder


def command(checkpoint: Path, texts: Path, output: Path, *options: object) -> list[object]:
    """The arguments: about ten parts."""
    shape = ["--block-size", 32, "--part-size", 0.003, "--validation-fraction", 0.2]
    return ["--file", f"{texts}/*.jsonl", f"{texts}/*.txt", "--model", checkpoint, "--output", output, *shape, *options]


def content(folder: Path) -> dict[str, bytes]:
    """All files in a directory."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, texts: Path) -> Path:
    """What one worker writes, in a process of its own."""
    folder = tmp_path_factory.mktemp("prepared") / "blocks"
    arguments = map(str, command(checkpoint, texts, folder))
    done = subprocess.run([sys.executable, "-m", "tfclm.prepare", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{folder}\n"
    assert len(done.stderr.splitlines()) == 3, done.stderr
    return folder


@pytest.mark.skipif(BEAM, reason="Apache Beam is installed")
def test_without_beam_one_line_says_what_to_install(console: Console, tmp_path: Path, checkpoint: Path, texts: Path):
    """A traceback of an import, or files that are written before anything can be prepared."""
    code, out, err = console(*command(checkpoint, texts, tmp_path / "out"))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "pip install 'tfclm[beam]'" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "none"], "--model is missing"),
        (["--output", "none"], "--output is missing"),
        (["--validation-fraction", 1], "--validation-fraction 1.0: give a number from 0 to below 1"),
        (["--part-size", 0], "--part-size 0.0: give a number above 0"),
        (["--seed", -1], "--seed -1: give a number from 0"),
        (["--workers", 0], "--workers 0: give 1 or more"),
        (["--workers", 2, "--runner", "FlinkRunner"], "--workers is for DirectRunner"),
        (["--beam-options", "region"], "--beam-options region: give name=value"),
    ],
)
def test_bad_settings_are_one_line(console: Console, tmp_path: Path, texts: Path, options: list, message: str):
    """A setting that fails in a worker, hours later, or that Beam ignores."""
    code, out, err = console(*command(tmp_path / "model", texts, tmp_path / "out", *options))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


@needs_beam
def test_workers_write_the_same_bytes(console: Console, tmp_path: Path, checkpoint: Path, texts: Path, prepared: Path):
    """Shards that depend on the number of processes, on what was killed, or on a repetition."""
    manifest = json.loads((prepared / "manifest.json").read_text())
    assert len(list((prepared / "parts").iterdir())) > 6
    assert manifest["splits"]["train"]["documents"] + manifest["splits"]["validation"]["documents"] == manifest["rows"]
    train, validation = (open_prepared(str(prepared)).split(name) for name in ("train", "validation"))
    assert train is not None
    assert validation is not None
    assert len(train.blocks) > 4 * len(validation.blocks) // 2

    two = tmp_path / "two"
    code, _, err = console(*command(checkpoint, texts, two, "--workers", 2))
    assert code == 0, err
    assert len(err.splitlines()) == 3, err  # none of Beam's
    assert content(two) == content(prepared)
    # Killed while it wrote: shards without records, no manifest.
    for name in ("manifest.json", "parts/00002.json", "train-00002.arrow", "train-rest.arrow"):
        (two / name).unlink()
    code, _, err = console(*command(checkpoint, texts, two))
    assert code == 0, err
    assert content(two) == content(prepared)


@needs_beam
def test_a_portable_runner_writes_the_same_bytes(
    console: Console, tmp_path: Path, checkpoint: Path, texts: Path, prepared: Path
):
    """A pipeline that only Beam's local runner can run: Flink and Spark get it through a job server, as here."""
    log = tmp_path / "log"
    server = [sys.executable, "-m", "apache_beam.runners.portability.local_job_service_main", "-p", "0"]
    with log.open("w") as file, subprocess.Popen(server, stdout=file, stderr=file) as process:
        try:
            deadline = time.monotonic() + 300
            while not (port := re.search(r"Listening for beam jobs on port (\d+)", log.read_text())):
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
            options = [f"job_endpoint=localhost:{port[1]}", "environment_type=LOOPBACK"]
            runner = ["--runner", "PortableRunner", "--beam-options", *options]
            code, _, err = console(*command(checkpoint, texts, tmp_path / "out", *runner))
        finally:
            process.terminate()
    assert code == 0, err
    assert content(tmp_path / "out") == content(prepared)


@needs_beam
def test_bad_text_is_one_line(console: Console, tmp_path: Path, checkpoint: Path, texts: Path, prepared: Path):
    """An error in a worker, which Beam shows in hundreds of lines, and shards of two settings in one directory."""
    bad = tmp_path / "texts"
    bad.mkdir()
    lines = (texts / "a.jsonl").read_text().splitlines()
    lines[30] = "{"
    (bad / "a.jsonl").write_text("\n".join(lines) + "\n")
    (bad / "b.txt").write_text("text")
    for arguments, message in [
        (command(checkpoint, bad, tmp_path / "out"), "a.jsonl, line 31 is not JSON"),
        (command(checkpoint, texts, prepared, "--block-size", 16), "begun with --block-size 32, not 16"),
        (command(checkpoint, bad, prepared), "other input files"),
        (command(checkpoint, texts, tmp_path / "new", "--text-column", "body"), "has no column body: it has text"),
    ]:
        code, out, err = console(*arguments)
        assert (code, out) == (2, ""), err
        assert message in err.splitlines()[-1]
