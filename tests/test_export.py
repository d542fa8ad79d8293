"""From a checkpoint to versions: the command `export`, as a user calls it, whatever happens to its process."""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import LONG, tiny_config

from tfclm import export, fit
from tfclm.cli.release import recorded_perplexity
from tfclm.errors import InputError

pytestmark = pytest.mark.slow

KILLS = 50 if LONG else 2
CONTEXT = 16

FILES = {
    "saved_model.pb",
    "fingerprint.pb",
    "variables/variables.index",
    "variables/variables.data-00000-of-00001",
    "assets.extra/tf_serving_warmup_requests",
    "assets.extra/tfclm.json",
}
RECORD = "assets.extra/tfclm.json"
PROTOCOL = {"block_size": 32, "separator": True, "split": "test"}
Answer = tuple[int, str, str]  # the exit code, stdout and stderr

SERVER = multiprocessing.get_context("forkserver")


def _main(arguments: list[str], output: str) -> None:
    os.setsid()
    for descriptor in (1, 2):
        os.dup2(os.open(f"{output}.{descriptor}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), descriptor)
    sys.argv = ["tfclm", *arguments]
    export.main()


class Started:
    """A command in a process of its own, in a group with the processes that it starts."""

    def __init__(self, output: Path, *arguments: object):
        self.output = output
        self.process = SERVER.Process(target=_main, args=([str(each) for each in arguments], str(output)))
        self.process.start()

    def end(self) -> Answer:
        """Waits for it."""
        self.process.join(120)
        assert self.process.exitcode is not None, "the export did not end"
        said = (Path(f"{self.output}.{descriptor}").read_text() for descriptor in (1, 2))
        return (self.process.exitcode, *said)

    def said(self, line: str) -> bool:
        """Whether it has said this by now."""
        output = Path(f"{self.output}.2")
        return output.exists() and line in output.read_text()

    def kill(self, line: str, seconds: float) -> None:
        """As the kernel does when memory is short: so many seconds after it has said this, without a word."""
        while line and self.process.is_alive() and not self.said(line):
            self.process.join(0.01)
        self.process.join(seconds)
        # Once it has ended, its number may be somebody else's.
        if self.process.is_alive():
            with contextlib.suppress(ProcessLookupError):  # it has no group yet
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.kill()
        self.process.join()


class Console:
    """Calls a command with the arguments of a shell, in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
        self.monkeypatch, self.capfd = monkeypatch, capfd

    def __call__(self, module: ModuleType, *arguments: object) -> Answer:
        self.capfd.readouterr()
        self.monkeypatch.setattr(sys, "argv", ["tfclm", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            module.main()
        code = end.value.code
        assert isinstance(code, int)
        return (code, *self.capfd.readouterr())


@pytest.fixture
def console(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Console:
    """To call commands with."""
    return Console(monkeypatch, capfd)


def save_checkpoint(folder: Path, tokenizer: Any) -> Path:
    """A tiny GPT-2, with a context as small as nobody's."""
    import tf_keras

    from tfclm.checkpoint import create, save

    tf_keras.utils.set_random_seed(0)
    save(create(tiny_config("gpt2", context=CONTEXT)), tokenizer, folder)
    write_results(folder)
    return folder


def write_results(checkpoint: Path, perplexity: float | None = 20.0) -> None:
    """What `fit` writes with a checkpoint."""
    results = {"perplexity": perplexity, "tokens": 1000, "protocol": PROTOCOL}
    (checkpoint / "results.json").write_text(json.dumps(results))


def write_record(version: Path, **record: object) -> None:
    """A version of which there is nothing but its record."""
    (version / RECORD).parent.mkdir(parents=True)
    (version / RECORD).write_text(json.dumps(record))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    """A checkpoint whose tokenizer goes into the graph."""
    from transformers import AutoTokenizer

    return save_checkpoint(tmp_path_factory.mktemp("texts") / "model", AutoTokenizer.from_pretrained(tokenizer_dir))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    """A checkpoint whose tokenizer does not: what is exported is smaller, and sooner there."""
    from tokenizers import normalizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    tokenizer.backend_tokenizer.normalizer = normalizers.Prepend("<>")
    return save_checkpoint(tmp_path_factory.mktemp("plain") / "model", tokenizer)


def shell(*arguments: object) -> subprocess.Popen[str]:
    """The command as it is typed."""
    command = [sys.executable, "-m", "tfclm.export", *map(str, arguments)]
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def end(process: subprocess.Popen[str]) -> Answer:
    """Waits for it."""
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


class Disk:
    """A small disk, and an export that does not fit onto it."""

    def __init__(self, folder: Path, checkpoint: Path, size: int):
        self.folder, self.checkpoint = folder, checkpoint
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(folder)]
        self.mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0
        self.process = self.export() if self.mounted else None

    def export(self) -> Started:
        """What it says is kept on another disk."""
        output = self.folder.with_name(f"{self.folder.name}-output")
        return Started(output, "--model", self.checkpoint, "--serving-dir", self.folder / "m")

    def remove(self) -> None:
        """Ends what is left of it."""
        if self.process is not None:
            self.process.kill("", 0)
            subprocess.run(["umount", str(self.folder)], check=True)


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory, plain: Path) -> Iterator[Disk]:
    """Half as large as a version."""
    disk = Disk(tmp_path_factory.mktemp("disk"), plain, 256)
    yield disk
    disk.remove()


class Timed:
    """An export that ended, with what was there before and how long it took."""

    def __init__(self, checkpoint: Path, folder: Path):
        self.checkpoint, self.serving = checkpoint, folder / "m"
        # Nothing of them but their records.
        for number in ("4", "5", "6"):
            write_record(self.serving / number, perplexity=16.0, protocol=PROTOCOL)
        Started(folder / "list", "--serving-dir", self.serving, "--list").end()  # the forks' parent is up now
        flags = ("--version", 3, "--keep-versions", 2, "--max-perplexity", 20)
        self.started = Started(folder / "export", "--model", checkpoint, "--serving-dir", self.serving, *flags)
        self.answer = self.started.end()


@pytest.fixture(scope="module")
def timed(tmp_path_factory: pytest.TempPathFactory, plain: Path, disk: Disk) -> Timed:
    """Version 3 of a servable that has 4, 5 and 6; the disk fills meanwhile, which saves the time."""
    return Timed(plain, tmp_path_factory.mktemp("timed"))


def files(version: Path) -> set[str]:
    """What is in a version's folder."""
    return {path.relative_to(version).as_posix() for path in version.rglob("*") if path.is_file()}


def names(serving: Path) -> set[str]:
    """What is in a serving directory, but for the verdicts."""
    return {entry.name for entry in serving.iterdir()} - {".verdicts"} if serving.exists() else set()


def refuse(answer: Answer, text: str, code: int = 2, command: str = "export") -> None:
    """One line to stderr that holds the text, nothing to stdout."""
    assert answer[:2] == (code, ""), answer[2]
    (*before, last) = answer[2].splitlines()
    assert last.startswith(f"tfclm.{command}: ")
    assert text in last
    assert not any("Traceback" in line for line in before)


# What is written


def test_version_holds_exactly_these_files(timed: Timed):
    """A file too few, one too many (a path or asset of this machine), or one that the server's user cannot read."""
    code, out, err = timed.answer
    assert (code, out) == (0, f"{timed.serving}/3\n"), err
    version = timed.serving / "3"
    assert files(version) == FILES
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in (version, *version.rglob("*")))
    record = json.loads((version / RECORD).read_text())
    assert record["source"]["checkpoint"] == str(timed.checkpoint)
    assert (record["perplexity"], record["protocol"], record["context"]) == (20.0, PROTOCOL, CONTEXT)
    assert record["saved_model_bytes"] == (version / "saved_model.pb").stat().st_size
    assert record["size_bytes"] + (version / RECORD).stat().st_size == sum(
        (version / name).stat().st_size for name in FILES
    )
    # Of the process that exports, and of the one that loads: TensorFlow alone takes more.
    assert min(record["peak_memory_mib"], record["canary"]["peak_memory_mib"]) > 100
    assert (record["float32_perplexity"], record["weights_cost"]) == (20.0, None)
    (verdict,) = (json.loads(path.read_text()) for path in (timed.serving / ".verdicts").iterdir())
    assert (verdict["passed"], verdict["version"], verdict["max_perplexity"]) == (True, 3, 20.0)


@pytest.mark.parametrize("weights", [("bfloat16", "--compile", "xla"), ("int8",)])
def test_what_smaller_weights_cost_is_recorded(plain: Path, tmp_path: Path, weights: tuple[str, ...]):
    """A limit for the run's text that decides on another text's perplexity, or a cost that nobody can read later."""
    flags = ("--weights", *weights, "--max-batch-size", 1, "--max-new-tokens-limit", 2)
    limits = ("--max-perplexity", 25)
    code, out, err = Started(
        tmp_path / "export", "--model", plain, "--serving-dir", tmp_path / "m", *flags, *limits
    ).end()
    assert (code, out) == (0, f"{tmp_path / 'm'}/1\n"), err
    record = json.loads((tmp_path / "m/1" / RECORD).read_text())
    cost = record["weights_cost"]
    # A model of random weights on Python's documentation: about as bad as can be, rounded or not.
    assert all(512 / 2 < cost[name] < 512 * 2 for name in ("float32_perplexity", "perplexity"))
    assert cost["protocol"]["source"] == "python-docs"
    assert cost["protocol"]["block_size"] == CONTEXT
    ratio = cost["perplexity"] / cost["float32_perplexity"]
    assert 0 < abs(ratio - 1) < 0.05
    # The gate and the record go by the run's own text.
    assert (record["float32_perplexity"], record["protocol"], record["tokens"]) == (20.0, PROTOCOL, 1000)
    assert record["perplexity"] == pytest.approx(20.0 * ratio)
    assert math.isclose(record["gate"]["perplexity"], record["perplexity"])


def test_tokenizer_that_cannot_be_put_into_the_graph(timed: Timed):
    """Signatures of text that give other ids than the checkpoint's tokenizer, or tokens alone without a word."""
    assert "generate_tokens alone is exported: the tokenizer's normalizer Prepend is unsupported" in timed.answer[2]
    record = json.loads((timed.serving / "3" / RECORD).read_text())
    assert record["signatures"] == ["describe", "generate_tokens", "serving_default"]
    assert record["tokenizer"] is None


def test_versions_kept_and_the_one_just_written(timed: Timed):
    """An export that removes its own version, because its number is not among the newest."""
    assert names(timed.serving) == {"3", "5", "6"}


@pytest.mark.long  # the README's commands do the same
def test_version_of_text(texts: Path, tmp_path: Path):
    """A file that only the tokenizer's tables need, or a warm-up prompt that the context refuses."""
    code, out, err = end(shell("--model", texts, "--serving-dir", tmp_path / "m"))
    assert (code, out) == (0, f"{tmp_path / 'm'}/1\n"), err
    assert files(tmp_path / "m" / "1") == FILES
    record = json.loads((tmp_path / "m" / "1" / RECORD).read_text())
    assert record["tokenizer"] == "GPT2TokenizerFast"
    texts_alone = ["detokenize", "generate", "score", "tokenize"]
    assert record["signatures"] == sorted(["describe", "generate_tokens", "serving_default", *texts_alone])
    assert (record["context"], record["canary"]["records"]) == (CONTEXT, 7)


# What is there


def test_list_and_rollback(console: Console, tmp_path: Path):
    """The oldest removed instead of the newest, the last one removed, or a list that says nothing of quality."""
    (tmp_path / "m" / "1").mkdir(parents=True)
    told = {"time": "2026-03-04T05:06:07Z", "perplexity": 20, "tokens": 1000, "source": {"checkpoint": "runs/eli5"}}
    write_record(tmp_path / "m" / "2", **told)
    at = ("--serving-dir", tmp_path / "m")
    code, out, _ = console(export, *at, "--list")
    assert code == 0
    assert [line.split() for line in out.splitlines()] == [
        ["version", "exported", "perplexity", "tokens", "source"],
        ["1", "-", "-", "-", "unknown"],
        ["2", "2026-03-04", "05:06", "20.0000", "1000", "runs/eli5"],
    ]
    assert console(export, *at, "--rollback")[:2] == (0, "version 2 removed, 1 is the newest\n")
    refuse(console(export, *at, "--rollback"), "has one version, and no earlier version to return to")
    assert names(tmp_path / "m") == {"1"}
    for flag, text in (("--list", "there is no such directory"), ("--rollback", "no earlier version to return to")):
        refuse(console(export, "--serving-dir", tmp_path / "nowhere", flag), text)


def test_list_of_a_remote_folder(console: Console, tmp_path: Path):
    """An upload that was killed listed as a version, or a traceback where TensorFlow knows no such filesystem."""
    import tensorflow as tf

    at = f"ram://{tmp_path.name}/m"
    for name in ("1/saved_model.pb", "2/variables/variables.index"):
        tf.io.gfile.makedirs(f"{at}/{name}".rpartition("/")[0])
        with tf.io.gfile.GFile(f"{at}/{name}", "w") as file:
            file.write("x")
    code, out, err = console(export, "--serving-dir", at, "--list")
    assert code == 0, err
    (version, *when, perplexity, tokens, source) = out.splitlines()[1].split()
    assert (version, perplexity, tokens, source) == ("1", "-", "-", "unknown")
    written = tf.io.gfile.stat(f"{at}/1/saved_model.pb").mtime_nsec / 1e9
    assert " ".join(when) == time.strftime("%Y-%m-%d %H:%M", time.gmtime(written))
    assert len(out.splitlines()) == 2
    assert f"{at}/2 has no saved_model.pb and does not count as a version" in err
    refuse(console(export, "--serving-dir", at, "--rollback"), "has one version, and no earlier version to return to")
    refuse(console(export, "--serving-dir", "nowhere://x", "--list"), "'nowhere' not implemented")


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[1]", b'{"perplexity": "low"}', b'{"source": 1}'])
def test_list_with_a_damaged_record(console: Console, tmp_path: Path, content: bytes):
    """A traceback, or versions that are not listed because of another one."""
    for number in range(1, 4):
        write_record(tmp_path / str(number), perplexity=number)
    (tmp_path / "2" / RECORD).write_bytes(content)
    code, out, err = console(export, "--serving-dir", tmp_path, "--list")
    assert code == 2
    shown = [line.split()[::2][:2] for line in out.splitlines()[1:]]
    assert shown == [["1", "1.0000"], ["2", "damaged"], ["3", "3.0000"]]
    assert f"tfclm.export: {tmp_path}/2/{RECORD} is damaged: " in err
    assert "Traceback" not in err


def test_list_tells_what_was_not_published(console: Console, tmp_path: Path):
    """A model that was turned away at night, and nobody who looks at the list sees that there was one, or why."""
    write_record(tmp_path / "1", perplexity=16.0)
    (tmp_path / ".verdicts").mkdir()
    source = {"checkpoint": "runs/second"}
    verdicts = [
        {"time": "2026-03-04T05:06:07Z", "passed": True, "version": 1, "source": source},
        {"time": "2026-03-05T05:06:07Z", "passed": False, "perplexity": 20.0, "reason": "too high", "source": source},
        {"passed": False, "perplexity": 9.0, "compared": {"perplexity": 21.5}, "reason": "worse", "source": source},
    ]
    for number, verdict in enumerate(verdicts):
        (tmp_path / ".verdicts" / f"{number}.json").write_text(json.dumps(verdict))
    for number, damaged in enumerate(("{", "[]", "")):
        (tmp_path / ".verdicts" / f"9{number}.json").write_text(damaged)
    code, out, _ = console(export, "--serving-dir", tmp_path, "--list")
    assert code == 0
    assert out.splitlines()[2:] == [
        "",
        "not published:",
        "checked           perplexity  source       reason",
        "2026-03-05 05:06  20.0000     runs/second  too high",
        "-                 21.5000     runs/second  worse",
    ]


# What is refused

# A checkpoint that is not there stands where a refusal must come before the loading.
REFUSED = [
    ("--model CHECKPOINT", "--serving-dir is missing"),
    ("--list", "--serving-dir is missing"),
    ("--serving-dir NEW", "--model is missing"),
    ("--serving-dir NEW --model NEW", "NEW"),
    ("--serving-dir NEW --model EMPTY", "EMPTY is an empty directory: give a checkpoint directory"),
    ("--serving-dir NEW --model BARE", "BARE: no tokenizer can be read from its files"),
    ("--serving-dir FILE --model NEW", "--serving-dir FILE: FILE is not a directory; give a directory"),
    ("--serving-dir FILE/x --model NEW", "--serving-dir FILE/x: FILE is not a directory; give a directory"),
    ("--serving-dir TAKEN --model NEW --version 1", "--version 1 already exists in TAKEN: give another"),
    ("--serving-dir TAKEN --model NEW --version 7", "--version 7 already exists in TAKEN: give another"),
    ("--serving-dir TAKEN --model NEW --version 8", "--version 8 already exists in TAKEN: give another"),
    ("--serving-dir NEW --model NEW --version 0", "--version 0: give 1 or more"),
    ("--serving-dir NEW --model NEW --version -1", "--version -1: give 1 or more"),
    ("--serving-dir NEW --model NEW --version 9223372036854775808", "give at most 9223372036854775807"),
    ("--serving-dir NEW --model NEW --version two", "--version: invalid int value: 'two'"),
    ("--serving-dir NEW --model NEW --keep-versions 0", "--keep-versions 0: give 1 or more"),
    ("--serving-dir NEW --model NEW --keep 2", "unrecognized arguments: --keep 2"),
    ("--serving-dir NEW --model NEW --temperature -1", "--temperature -1.0: give 0"),
    ("--serving-dir NEW --model NEW --top-p 0", "--top-p 0.0: give"),
    ("--serving-dir NEW --model NEW --top-p 1e-50", "--top-p 1e-50: give"),
    ("--serving-dir NEW --model NEW --top-k 3000000000", "--top-k 3000000000: give at most 2147483647"),
    ("--serving-dir NEW --model NEW --temperature 1e39", "--temperature 1e+39: give 0"),
    ("--serving-dir= --model NEW", "--serving-dir is missing"),
    ("--serving-dir NEW --from-hub me/x --model NEW", "leave out --model"),
    ("--serving-dir NEW --from-hub me/x --file NEW --max-perplexity 30", "leave out --file"),
    ("--serving-dir NEW --from-hub me/x --compile xla", "leave out --compile"),
    ("--serving-dir NEW --exported NEW --model NEW", "already exported: leave out --model"),
    ("--serving-dir NEW --exported NEW --revision main", "leave out --revision"),
    ("--serving-dir NEW --exported NEW", "holds no saved_model.pb: give a version"),
    ("--serving-dir NEW --model NEW --max-new-tokens 0", "--max-new-tokens 0: give 1 or more"),
    ("--serving-dir NEW --model NEW --max-batch-size 5000", "--max-batch-size 5000: give at most 4096"),
    (
        "--serving-dir NEW --model NEW --split dev --max-perplexity 9",
        "--split applies to the text of --dataset or --file",
    ),
    ("--serving-dir NEW --model NEW --text-column body", "--text-column applies to the text of --dataset or --file"),
    ("--serving-dir NEW --model NEW --buckets 16", "--buckets requires --compile xla"),
    ("--serving-dir NEW --model NEW --weights bfloat16", "--weights bfloat16 requires --compile xla"),
    ("--serving-dir NEW --model NEW --weights int8 --compile xla", "--weights int8 cannot be compiled"),
    ("--serving-dir NEW --model NEW --max-perplexity 0", "--max-perplexity 0.0: give 1 or more"),
    ("--serving-dir NEW --model UNKNOWN --max-perplexity 9", "the checkpoint has no results.json"),
    ("--serving-dir NEW --model CHECKPOINT --max-new-tokens-limit 16", "--max-new-tokens-limit 16"),
    ("--serving-dir NEW --model UNKNOWN --max-perplexity 9 --compile xla --weights bfloat16", "has no results.json"),
    ("--serving-dir LAST --model NEW", "version 9223372036854775807 exists, and servers take no higher number"),
    ("--serving-dir nowhere://x --model NEW", "File system scheme 'nowhere' not implemented"),
    ("--serving-dir TAKEN --model NEW --max-regression 0", "served now has no perplexity in its record"),
    ("--serving-dir DAMAGED --model NEW --max-regression 0", f"DAMAGED/2/{RECORD} is damaged"),
]


def test_what_is_refused(console: Console, plain: Path, tmp_path: Path):
    """A traceback, a wait for what was wrong from the start, or a folder left behind by a command that did nothing."""
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "FILE").write_text("")
    ignored = shutil.ignore_patterns("*token*", "merges.txt", "vocab.json")
    shutil.copytree(plain, tmp_path / "BARE", ignore=ignored)
    # A version without a record, one with another form of name, and a file where a version would be.
    (tmp_path / "TAKEN/1").mkdir(parents=True)
    (tmp_path / "TAKEN/007").mkdir()
    (tmp_path / "TAKEN/8").write_text("")
    (tmp_path / "LAST/9223372036854775807").mkdir(parents=True)
    write_record(tmp_path / "DAMAGED/2")
    (tmp_path / "DAMAGED/2" / RECORD).write_text("{")
    shutil.copytree(plain, tmp_path / "UNKNOWN", ignore=shutil.ignore_patterns("results.json"))
    before = sorted(tmp_path.rglob("*"))

    def fill(line: str) -> str:
        for name in ("EMPTY", "UNKNOWN", "FILE", "NEW", "BARE", "TAKEN", "LAST", "DAMAGED"):
            line = line.replace(name, str(tmp_path / name))
        return line.replace("CHECKPOINT", str(plain))

    for arguments, text in REFUSED:
        refuse(console(export, *fill(arguments).split()), fill(text))
        assert sorted(tmp_path.rglob("*")) == before, arguments


def test_record_of_a_run_is_found_and_read(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A gate that says there is none, because the folder was given as a shell leaves it behind an equals sign."""
    checkpoint = shutil.copytree(plain, tmp_path / "model")
    monkeypatch.setenv("HOME", str(tmp_path))
    record = recorded_perplexity("~/model", None)
    assert record is not None
    assert (record.perplexity, record.tokens) == (20.0, 1000)
    for damaged in ('{"perplexity": 1e999, "tokens": 1e999, "protocol": {}}', '{"perplexity": "low"}', "{", "[]"):
        (checkpoint / "results.json").write_text(damaged)
        with pytest.raises(InputError, match=r"model/results\.json is not a record of tfclm\.fit"):
            recorded_perplexity("~/model", None)


def test_beams_are_refused(console: Console, plain: Path, tmp_path: Path):
    """A checkpoint that decodes with beams, served greedily without a word."""
    checkpoint = shutil.copytree(plain, tmp_path / "model")
    (checkpoint / "generation_config.json").write_text(json.dumps({"num_beams": 4, "eos_token_id": 0}))
    answer = console(export, "--model", checkpoint, "--serving-dir", tmp_path / "m")
    refuse(answer, "generation_config.json has num_beams 4")


@pytest.mark.parametrize(
    ("flags", "code", "text"),
    [
        (("--max-perplexity", 19.9), 1, "not published: perplexity 20.0000 is above 19.9"),
        (("--max-regression", 0.02), 1, "not published: perplexity 20.0000 is above 16.3200"),
        (("--max-regression", 0.02), 2, "measured differently (block_size differ)"),
    ],
)
def test_gate_refuses_a_model(
    console: Console, plain: Path, tmp_path: Path, flags: tuple[object, ...], code: int, text: str
):
    """A worse model served, a verdict that nobody can read later, or one on perplexities that say different things."""
    write_record(tmp_path / "m/4", perplexity=16.0, protocol=PROTOCOL | {"block_size": 32 * code})
    refuse(console(export, "--model", plain, "--serving-dir", tmp_path / "m", *flags), text, code)
    assert names(tmp_path / "m") == {"4"}
    verdicts = [json.loads(path.read_text()) for path in (tmp_path / "m").glob(".verdicts/*")]
    assert [(each["passed"], each["perplexity"]) for each in verdicts] == ([(False, 20.0)] if code == 1 else [])
    assert all(text in f"not published: {each['reason']}" for each in verdicts)
    assert all(each["source"]["checkpoint"] == str(plain) for each in verdicts)


@pytest.fixture
def diverged(plain: Path, tmp_path: Path) -> Path:
    """A checkpoint as `fit` leaves it when the loss is no longer finite."""
    checkpoint = shutil.copytree(plain, tmp_path / "model")
    write_results(checkpoint, None)
    return checkpoint


def test_run_that_diverged(console: Console, diverged: Path, tmp_path: Path):
    """A gate that lets a model pass without a perplexity."""
    answer = console(export, "--model", diverged, "--serving-dir", tmp_path / "m", "--max-perplexity", 1000)
    refuse(answer, "not published: the model has diverged and has no perplexity: train it again", code=1)


@pytest.mark.long
def test_run_that_diverged_is_exported_where_nothing_is_asked(diverged: Path, tmp_path: Path):
    """A folder that fit has left called no record of fit, or a NaN in a file that is to be JSON."""
    checkpoint = diverged
    code, _, err = Started(tmp_path / "export", "--model", checkpoint, "--serving-dir", tmp_path / "m").end()
    assert code == 0, err
    assert f"{checkpoint}/results.json: the run diverged, so that there is no perplexity to record" in err
    record = json.loads((tmp_path / "m/1" / RECORD).read_text(), parse_constant=lambda name: pytest.fail(name))
    assert (record["perplexity"], record["float32_perplexity"], record["protocol"]) == (None, None, PROTOCOL)


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ("--export-to FILE/x", "--export-to FILE/x: FILE is not a directory"),
        ("--export-to m --max-perplexity 0.5", "--max-perplexity 0.5: give 1 or more"),
        ("--export-to m --max-regression -2", "--max-regression -2.0: give a fraction"),
        ("--export-to bare --max-regression 0.1", "served now has no perplexity in its record"),
        ("--export-to m --max-regression 0.1", "measured differently (block_size, "),
    ],
)
def test_fit_refuses_before_it_trains(
    console: Console, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, text: str
):
    """Hours of training before the line that says the model cannot be published there."""
    monkeypatch.chdir(tmp_path)
    Path("FILE").write_text("")
    Path("train.txt").write_text("\n\n".join(f"It is text {number}, and not a short one." for number in range(40)))
    Path("bare/1").mkdir(parents=True)
    write_record(Path("m/4"), perplexity=16.0, protocol=PROTOCOL)
    before = sorted(Path().rglob("*"))
    place = tmp_path / "FILE"
    run = ("--train-file", "train.txt", "--output-dir", "run", "--block-size", 16, "--num-proc", 1)
    answer = console(fit, "--model", plain, *run, *flags.split())
    refuse(answer, text.replace(": FILE is", f": {place} is"), command="fit")
    assert sorted(Path().rglob("*")) == before


# Whatever happens to it


# What an export says before it is killed, and the seconds until then at most. The other process begins with an import
# of TensorFlow, which takes longer than the last.
MOMENTS = [
    ("writing the SavedModel", 0.2),
    ("verifying it", 0.5),
    ("", 8.0),
    ("writing the SavedModel", 2.0),
    ("verifying it", 8.0),
]


def test_killed_at_random_moments(timed: Timed, plain: Path, tmp_path: Path):
    """A half-written version, leftovers that stop the next export, or two exports at once that take one number."""
    moments = random.Random(5)
    serving = tmp_path / "m"
    # Where a verdict cannot be kept.
    serving.mkdir()
    (serving / ".verdicts").write_text("")
    arguments = ("--model", plain, "--serving-dir", serving)
    whole = {path: (timed.serving / "3" / path).stat().st_size for path in FILES if "variables" in path}

    def kill(number: int) -> tuple[bool, bool]:
        line, most = MOMENTS[number % len(MOMENTS)]
        moment = (line, moments.uniform(0, most))
        started = Started(tmp_path / f"killed-{number}", *arguments)
        started.kill(*moment)
        for name in names(serving):
            assert name.startswith(".staging-") or files(serving / name) == FILES, moment
            for path, size in whole.items() if name.isdigit() else ():
                assert (serving / name / path).stat().st_size == size, moment

        asked = started.said("verifying it")
        ended = started.process.exitcode == 0
        return started.said("writing the SavedModel") and not asked, asked and not ended

    with ThreadPoolExecutor(2) as pool:
        writing, asking = zip(*pool.map(kill, range(KILLS)), strict=True)
    # The moments that matter were among them: while files were being written, and while the canary ran.
    assert any(writing)
    assert any(asking)
    before = {int(name) for name in names(serving) if name.isdigit()}
    answers = [each.end() for each in [Started(tmp_path / f"output-{number}", *arguments) for number in range(2)]]
    # That a verdict cannot be written is no error: its version is served by now.
    assert [answer[0] for answer in answers] == [0, 0], answers
    first = max(before, default=0) + 1
    assert {answer[1] for answer in answers} == {f"{serving}/{number}\n" for number in (first, first + 1)}
    assert all("is published, but --serving-dir" in answer[2] for answer in answers)
    # Nothing of what was killed is left.
    assert names(serving) == {str(number) for number in (*before, first, first + 1)}
    assert all(files(serving / name) == FILES for name in names(serving))


def check_full(disk: Disk) -> None:
    """What is said of it, what is left on it, and that it is of use again."""
    if disk.process is None:
        pytest.skip("a small disk cannot be mounted here, it takes root")
    refuse(disk.process.end(), "the disk is full, nothing was published; free some space")
    assert names(disk.folder / "m") == set()
    used = shutil.disk_usage(disk.folder).used
    assert used <= 16 * 1024, used


def test_full_disk(disk: Disk):
    """A traceback of TensorFlow's, or half a version that fills the disk for good."""
    check_full(disk)


def test_read_only_disk(console: Console, disk: Disk, plain: Path):
    """A wait for the whole build before a place that cannot be written is named."""
    if disk.process is None:
        pytest.skip("a small disk cannot be mounted here, it takes root")
    disk.process.end()
    subprocess.run(["mount", "-o", "remount,ro", disk.folder], check=True)
    answer = console(export, "--model", "nowhere", "--serving-dir", disk.folder / "m")
    refuse(answer, f"{disk.folder}/m cannot be written; give a directory that can")


@pytest.mark.long
@pytest.mark.parametrize("size", [4, 64, 128, 448, 512, 576])
def test_full_disk_of_any_size(tmp_path: Path, plain: Path, size: int):
    """KiB of it. A file whose last bytes do not fit taken for whole: its writer says so only when it is closed."""
    disk = Disk(tmp_path, plain, size)
    try:
        check_full(disk)
    finally:
        disk.remove()
