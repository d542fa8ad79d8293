"""Settings: one dataclass is the command line, the file and the record."""

from __future__ import annotations

import dataclasses
import importlib
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

import tfclm
from tfclm.cli.arguments import flags, parse
from tfclm.errors import InputError
from tfclm.settings import record, setting, to_yaml

COMMANDS = ["evaluate", "export", "fit", "generate", "push", "query"]


@dataclass(frozen=True)
class Example:
    rate: float = setting(0.1, "a number, in %")
    block_size: int | None = setting(None, "a whole number")
    kind: Literal["eos", "none"] = setting("eos", "one of two")
    train_file: tuple[str, ...] = setting((), "files")
    jit_compile: bool = setting(True, "a switch")
    again: bool = setting(False, "not recorded", recorded=False)
    prompt: str | None = setting(None, "any text", literal=True)
    precision: Literal["no", "on", "16"] = setting("on", "words that YAML reads as something else")


def read(*arguments: str) -> Example:
    """The settings of an example command line."""
    return parse(Example, arguments, prog="example", description="")


def test_dashes_and_underscores_are_alike():
    """A flag spelled as the field is, or as flags are, must not be two settings."""
    assert read("--block-size", "7") == read("--block_size=7") == Example(block_size=7)
    assert read("--no-jit-compile") == read("--no_jit_compile") == Example(jit_compile=False)
    assert read("--train-file", "a", "b").train_file == ("a", "b")


def test_file_is_overridden_by_flags(tmp_path: Path):
    """A file's value must win over a default, and lose to a flag even where the flag gives the default."""
    file = tmp_path / "run.yaml"
    file.write_text("rate: 0.5\nkind: none\nblock-size: 9\ntrain_file: [x, y]\njit_compile: false\n")
    settings = read("--config", str(file), "--rate", "0.1")
    assert settings == Example(0.1, 9, "none", ("x", "y"), False)


def test_flag_given_again_adds_to_its_values(tmp_path: Path):
    """Training on the last of several files alone; or, with a file of settings, on its files as well."""
    both = read("--train-file", "a", "b", "--train-file", "c")
    assert both.train_file == ("a", "b", "c")
    file = tmp_path / "run.yaml"
    file.write_text("train_file: [x, -y]\n")
    assert read("--config", str(file)).train_file == ("x", "-y")
    assert read("--config", str(file), "--train-file", "a", "--train-file=b").train_file == ("a", "b")


def test_values_of_a_file_are_read_as_they_are_written(tmp_path: Path):
    """YAML's no, 16 and 010 are False, an int and eight: neither the choice `no` nor the text that was written."""
    file = tmp_path / "run.yaml"
    for line, settings in {
        "precision: no": Example(precision="no"),
        "precision: on": Example(precision="on"),
        "precision: 16": Example(precision="16"),
        "prompt: 010": Example(prompt="010"),
        "prompt: no": Example(prompt="no"),
        "prompt: none": Example(prompt="none"),
        "prompt: null": Example(),
        "block_size: null": Example(),
        "block_size: none": Example(),
        "train_file: [no, 1]": Example(train_file=("no", "1")),
        "train_file: []": Example(),
        "again: yes": Example(again=True),
        "jit_compile: False": Example(jit_compile=False),
    }.items():
        file.write_text(line)
        assert read("--config", str(file)) == settings, line


def test_literal_flag_takes_none_as_text():
    """A prompt of "none" that is taken for no prompt, so that the command waits for standard input."""
    assert read("--prompt", "none", "--block-size", "none") == Example(prompt="none", block_size=None)


def test_record_gives_the_settings_back(tmp_path: Path):
    """`fit.yaml` repeats a run: every value survives the way through the file, None, tuples and 2e-05 too."""
    settings = Example(rate=2e-5, train_file=("a b", "c"), jit_compile=False, again=True)
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(record(settings)))
    assert read("--config", str(file)) == dataclasses.replace(settings, again=False)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("rates: 1\n", ["rates", "is not a setting", "train_file"]),
        ("rate: fast\n", ["--rate", "fast"]),
        ("jit_compile: 3\n", ["jit_compile", "true or false"]),
        ("kind: both\n", ["--kind", "both"]),
        ("kind: [eos]\n", ["kind must be one value"]),
        ("- a\n", ["setting: value"]),
        ("a: [\n", ["not valid YAML"]),
        (None, ["No such file"]),
    ],
)
def test_bad_file_is_named(tmp_path: Path, content: str | None, words: list[str]):
    """A typing error in a settings file must not be a traceback, nor be passed over."""
    file = tmp_path / "run.yaml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(InputError) as error:
        read("--config", str(file))
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("arguments", [["--rate", "fast"], ["--nope"], ["--kind", "x"], ["stray"], ["--rat", "1"]])
def test_bad_flag_is_refused(arguments: list[str]):
    """An unknown or shortened flag must not be guessed at."""
    with pytest.raises(InputError, match="--help"):
        read(*arguments)


@pytest.mark.parametrize(
    ("verb", "argument", "meant"),
    [
        ("fit", "--lr", "--learning-rate"),
        ("fit", "-lr", "--learning-rate"),
        ("fit", "--LR=1e-3", "--learning-rate"),
        ("fit", "--epoch", "--epochs"),
        ("fit", "--num_train_epochs", "--epochs"),
        ("fit", "--batch", "--batch-size"),
        ("fit", "--per_device_train_batch_size", "--batch-size"),
        ("fit", "--bs", "--block-size or --batch-size"),
        ("fit", "--model_name_or_path", "--model"),
        ("fit", "--file", "--train-file or --validation-file"),
        ("fit", "--learning-rte", "--learning-rate"),
        ("generate", "--temp", "--temperature"),
        ("generate", "--max_tokens", "--max-new-tokens"),
        ("evaluate", "--train-file", "--file"),
        ("serve", "--rest-port", "--port or --rest-api-port"),
    ],
)
def test_the_flag_that_is_meant_is_named(verb: str, argument: str, meant: str):
    """A list of sixty flags to look through for the one whose name was not quite right."""
    settings = getattr(importlib.import_module(f"tfclm.{verb}"), f"{verb.capitalize()}Settings")
    with pytest.raises(InputError) as error:
        parse(settings, [argument, "3"], prog=verb, description="")
    assert str(error.value) == f"unrecognized arguments: {argument} 3 (did you mean {meant}?); see {verb} --help"


def test_a_setting_that_is_like_none_is_not_guessed_at(tmp_path: Path):
    """A suggestion that has nothing to do with what was written; or none for a line of a file."""
    for stray in ("--xyzzy", "stray", "-"):
        with pytest.raises(InputError) as error:
            read(stray)
        assert str(error.value) == f"unrecognized arguments: {stray}; see example --help"
    (tmp_path / "run.yaml").write_text("block: 3\n")
    with pytest.raises(
        InputError, match=r"block is not a setting \(did you mean block_size\?\); the settings are rate"
    ):
        read("--config", str(tmp_path / "run.yaml"))


def test_flags_give_the_settings_again():
    """A suggested next command that omits or misspells settings of the run."""
    for settings in (
        Example(),
        Example(rate=2e-5, block_size=7, kind="none", train_file=("a b", "c"), jit_compile=False, again=True),
        Example(prompt="two words", precision="16"),
    ):
        names = [field.name for field in dataclasses.fields(Example)]
        assert read(*flags(settings, names)) == settings
    assert flags(Example(rate=2.0, block_size=7), ["block_size", "kind"]) == ["--block-size", "7"]


@pytest.mark.parametrize("verb", [*COMMANDS, "serve"])
def test_help_imports_nothing_slow(verb: str):
    """`--help` that imports TensorFlow, transformers or datasets, and so takes many seconds to answer."""
    words = [sys.executable, "-X", "importtime", "-m", f"tfclm.{verb}", "--help"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert "--model" in done.stdout
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "argparse" in imported
    assert not imported & {"tensorflow", "tf_keras", "transformers", "datasets", "numpy", "pyarrow"}
    assert not imported & {"grpc", "aiohttp", "requests"}


def shell(command: str, **environment: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a line of the shell, in which PYTHON is this one."""
    env = {**os.environ, "PYTHON": sys.executable, "PYTHONUNBUFFERED": "", **environment}
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=env, timeout=120)
    return done.returncode, done.stdout, done.stderr


# A command of its own, as cheap as can be; all commands go the same way.
PRINTING = (
    "from dataclasses import dataclass\n"
    "from tfclm.cli.command import command; from tfclm.settings import setting; from tfclm.terminal import log\n"
    "@dataclass(frozen=True)\n"
    "class Settings:\n"
    "    times: int = setting(1, 'times 六')\n"
    "def run(settings):\n"
    "    log('progress')\n"
    "    [print('é 六 \\U0001f600') for _ in range(settings.times)]\n"
    "command(Settings, run, verb='print', description='', tensorflow=False)"
)


@pytest.mark.parametrize("verb", [*COMMANDS, "serve"])
def test_a_closed_stderr_is_no_error(verb: str):
    """An error that is printed among the results, because print takes a stream that is None for stdout."""
    assert shell(f'"$PYTHON" -m tfclm.{verb} --nope 2>&-') == (2, "", "")


@pytest.mark.slow
def test_commands_with_closed_streams():
    """An AttributeError for a stream that is None, or TensorFlow's messages in a file that has got its number."""
    assert shell('"$PYTHON" -m tfclm.generate --model nowhere/at-all --prompt x >&- 2>&-') == (2, "", "")


@pytest.mark.slow
def test_closed_stdin_of_a_command_with_tensorflow(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """An AttributeError, because Python's standard input is None where the shell has closed it."""
    monkeypatch.setattr(sys, "stdin", None)
    monkeypatch.setattr(sys, "argv", ["tfclm.generate", "--model", "nowhere/at-all"])
    with pytest.raises(SystemExit) as end:
        importlib.import_module("tfclm.generate").main()
    assert (end.value.code, capsys.readouterr().err) == (2, "tfclm.generate: standard input is closed: give --prompt\n")


def test_closed_streams_of_a_command(tmp_path: Path):
    """A prompt that is None, results that go where they should not, or a file that is taken for a closed stream."""
    code, out, err = shell('"$PYTHON" -m tfclm.query <&-')
    assert (code, out, err) == (2, "", "tfclm.query: standard input is closed: give --prompt\n")
    printing = {"PRINTING": PRINTING}
    assert shell('"$PYTHON" -c "$PRINTING" >&-', **printing) == (0, "", "progress\n")
    assert shell('"$PYTHON" -c "$PRINTING" 2>&-', **printing) == (0, "é 六 \U0001f600\n", "")
    assert shell('"$PYTHON" -c "$PRINTING" <&- >&- 2>&-', **printing) == (0, "", "")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_text_is_printed_as_utf8(encoding: str):
    """A UnicodeEncodeError, or a ? for a character, where the locale's encoding is a small one."""
    found = shell('"$PYTHON" -c "$PRINTING"', PRINTING=PRINTING, PYTHONIOENCODING=encoding)
    assert found == (0, "é 六 \U0001f600\n", "progress\n")
    code, out, err = shell('"$PYTHON" -c "$PRINTING" --help', PRINTING=PRINTING, PYTHONIOENCODING=encoding)
    assert (code, "times 六" in out, err) == (0, True, "")


@pytest.mark.parametrize("arguments", ["", "--times 100000", "--help"])
def test_a_reader_that_has_gone(arguments: str):
    """A traceback, or Python's "Exception ignored … BrokenPipeError", with `| head`."""
    line = f'{{ sleep 0.2; exec "$PYTHON" -c "$PRINTING" {arguments}; }} | true; exit ${{PIPESTATUS[0]}}'
    code, out, err = shell(line, PRINTING=PRINTING)
    assert (code, out, err.replace("progress\n", "")) == (1, "", "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the disk that is always full is Linux'")
@pytest.mark.parametrize("arguments", ["", "--times 100000"])
def test_a_full_disk_is_one_line(arguments: str):
    """A result that is not written, with exit code 0 or 120, or a traceback."""
    code, _, err = shell(f'"$PYTHON" -c "$PRINTING" {arguments} >/dev/full', PRINTING=PRINTING)
    assert (code, err) == (1, "progress\ntfclm.print: No space left on device\n")


def test_import_does_not_import_tensorflow():
    """Whoever imports tfclm for its client or its settings must not wait for TensorFlow."""
    code = "import sys, tfclm, tfclm.fit, tfclm.corpus, tfclm.checkpoint; print('tensorflow' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.slow
def test_commands_do_not_import_pytorch(tmp_path: Path):
    """A version of it that ends the process when it is imported after TensorFlow, as transformers does by itself."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text("import os\nos._exit(9)\n")
    (tmp_path / "torch-2.9.0.dist-info").mkdir()
    (tmp_path / "torch-2.9.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.9.0\n")
    code = (
        "from tfclm.compat import import_tensorflow; import_tensorflow(); "
        "from transformers import TFAutoModelForCausalLM; print('done', flush=True); import torch"
    )
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    # Had transformers imported it, the process would have ended before it was done.
    assert (done.returncode, done.stdout) == (9, "done\n"), done.stderr


def test_abort_while_tensorflow_is_imported_is_explained(tmp_path: Path):
    """A native failure of the import that leaves "Aborted" alone, because what was said before is lost."""
    package = tmp_path / "tensorflow"
    package.mkdir()
    said = b"I0000 00:00:1 port.cc:1] hello\\nF0000 this build needs a CPU with AVX2\\nunfinished"
    (package / "__init__.py").write_text(f"import os\nos.write(2, b'{said.decode()}')\nos.abort()\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from tfclm.compat import import_tensorflow as i; i()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == -signal.SIGABRT
    assert done.stderr == "F0000 this build needs a CPU with AVX2\nunfinished"
    # An import that only fails is told after what was said.
    (package / "__init__.py").write_text("import os\nos.write(2, b'no libcudart\\n')\nraise ImportError('no such')\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr.startswith("no libcudart\nTraceback")
    assert done.stderr.endswith("ImportError: no such\n")


def test_public_names():
    """A public name that is listed but cannot be imported, or one that is not listed."""
    assert tfclm.__all__ == sorted(tfclm.__all__)
    for name in tfclm.__all__:
        assert callable(getattr(tfclm, name)), name
    with pytest.raises(AttributeError):
        _ = tfclm.nothing


def test_the_commands_are_listed():
    """`python -m tfclm` that says there is no __main__, or a command that is missing from what it lists."""
    program = f'"{Path(sys.executable).parent / "tfclm"}"'
    for given in ("", " --help"):
        code, out, err = shell(f'"$PYTHON" -m tfclm{given}')
        assert (code, err) == (0, "")
        listed = [line.split()[0] for line in out.splitlines() if line.startswith("  ")]
        assert listed == ["prepare", "fit", "launch", "evaluate", "generate", "export", "serve", "query", "push"]
    assert shell(f"{program} --version") == (0, f"tfclm {tfclm.__version__}\n", "")
    code, out, err = shell(f"{program} serv")
    assert (code, out) == (2, "")
    assert err.startswith("tfclm: there is no command serv (did you mean serve?): give prepare, fit, ")
    assert "--no-deterministic" in shell('"$PYTHON" -m tfclm.fit --help')[1]
    assert shell(f"{program} query --nope")[2] == shell('"$PYTHON" -m tfclm.query --nope')[2]


def test_help_shows_the_public_names():
    """Imports among the names, a help of one function, a thousand lines of Keras, or a default that is an address."""
    code = (
        "import pydoc, tfclm, tfclm.metrics; print([name for name in dir(tfclm) if not name.startswith('_')]); "
        "print(pydoc.render_doc(tfclm, renderer=pydoc.plaintext)); "
        "print('=' * 9, pydoc.render_doc(tfclm.perplexity, renderer=pydoc.plaintext)); "
        "print('=' * 9, pydoc.render_doc(tfclm.TrainingSettings, renderer=pydoc.plaintext))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names, _, text = done.stdout.partition("\n")
    assert names == str(tfclm.__all__)
    package, function, settings = text.split("=" * 9)
    for name in tfclm.__all__:
        assert f"{name}(" in package, name
    assert "<function" not in package
    assert len(function.splitlines()) < 60
    assert "learning_rate: peak learning rate (default: 2e-05)" in settings


def test_progress_names_flags():
    """A line of the library that tells a user of the command line about `batch_size`, which is --batch-size there."""
    code = (
        "from dataclasses import dataclass\n"
        "from tfclm.cli.command import command; from tfclm.settings import setting; from tfclm.terminal import log\n"
        "@dataclass(frozen=True)\nclass Settings:\n    batch_size: int = setting(1, 'rows')\n"
        "try:\n"
        "    run = lambda settings: log('`batch_size` 1 and `other`')\n"
        "    command(Settings, run, verb='x', description='', tensorflow=False)\n"
        "except SystemExit:\n    log('`batch_size`')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr == "--batch-size 1 and `other`\n`batch_size`\n"
