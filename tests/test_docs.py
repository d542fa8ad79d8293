"""The documentation: its commands and code, run or parsed as they stand, and the site that is built from it."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from conftest import tiny_config
from server.processes import launcher

import tfclm
from tfclm.__main__ import COMMANDS
from tfclm.checkpoint.configs import DECODERS, ENCODERS
from tfclm.cli.arguments import parse
from tfclm.launch import split_command

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
REST, GRPC = "localhost:8501", "localhost:8500"  # where the documentation's server listens


class Block(NamedTuple):
    """A fenced block of code."""

    page: Path
    number: int
    code: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}-{self.number}"


def blocks(kind: str, *pages: Path) -> list[Block]:
    """The code blocks of one kind."""
    return [
        Block(page, number, code)
        for page in pages or PAGES
        for number, code in enumerate(
            re.findall(rf"^```{kind}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE), 1
        )
    ]


def settings_of(verb: str) -> type:
    """The settings dataclass of a command."""
    return getattr(importlib.import_module(f"tfclm.{verb}"), f"{verb.capitalize()}Settings")


LINES = list(dict.fromkeys(line for block in blocks("console") for line in block.code.splitlines()))
TFCLM = {line: shlex.split(line)[2:] for line in LINES if " -m tfclm." in line}
JOURNEY = next(block.code.splitlines() for block in blocks("console", README) if "tfclm.query" in block.code)
# They need nothing but the quickstart's model and server; what serves or exports it is the journey's.
RUNNABLE = [
    line
    for line, (module, *_) in TFCLM.items()
    if re.search(r"[ /=]quickstart\b", line)
    and line not in JOURNEY
    and module in ("tfclm.generate", "tfclm.evaluate", "tfclm.query")
    and not re.search("grpcs:|https:", line)  # no server of these tests speaks TLS
] + [line for line in TFCLM if "quickstart --list" in line]
CURL = [block for block in blocks("sh") if "curl " in block.code]
PYTHON = blocks("python")


def test_readme_is_short():
    """A README that has grown until nobody reads it."""
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 180


@pytest.mark.parametrize("page", PAGES[:2], ids=lambda page: page.name)
def test_links_lead_to_files(page: Path):
    """A link to a page that was moved; MkDocs checks those between the pages of the site."""
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []


@pytest.mark.parametrize("line", TFCLM)
def test_commands_are_understood(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A flag in the documentation that does not exist, or a value that it does not take."""
    module, *words = TFCLM[line]
    verb = module.removeprefix("tfclm.")
    assert verb in COMMANDS
    monkeypatch.chdir(tmp_path)
    if "--config" in words:
        config = Path(words[words.index("--config") + 1])
        config.parent.mkdir(parents=True)
        config.write_text("train_file: [text.txt]\n", encoding="utf-8")
    if verb == "launch":
        own, (verb, *words) = split_command(words)
        parse(settings_of("launch"), own, prog="launch", description="")
    settings = parse(settings_of(verb), words, prog=verb, description="")
    if verb == "fit" and "--resume-from" not in words:  # whose settings are on the Hub
        assert settings.resolved().output_dir


def test_make_has_what_the_documentation_names():
    """A target of make that was renamed."""
    named = {
        target
        for page in PAGES
        for target in re.findall(
            r"^make ([a-z0-9]+)|`make ([a-z0-9]+)`", page.read_text(encoding="utf-8"), re.MULTILINE
        )
    }
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in {"".join(each) for each in named}:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_every_block_is_of_a_known_kind():
    """A block that no test looks at, because its kind is misspelled or missing."""
    for page in PAGES:
        fences = re.findall(r"^ *```(.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert set(fences[::2]) <= {"console", "python", "sh", "text"}, page
        assert set(fences[1::2]) <= {""}, page


def test_console_blocks_hold_known_commands():
    """A command in the documentation that is neither parsed nor run."""
    for line in LINES:
        assert re.match(r"make |\S*python -m (tfclm\.|pip |venv )|source ", line), line


@pytest.mark.parametrize("block", [block for block in blocks("sh") if block not in CURL], ids=str)
def test_shell_code_is_valid(block: Block):
    """An open quote; these commands need a container or a cluster, so they are only parsed."""
    done = subprocess.run(["sh", "-n", "-c", block.code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_hooks_are_what_make_check_runs():
    """A commit that passes the hooks and then fails `make check`, or the other way round."""
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    recipe = (ROOT / "Makefile").read_text(encoding="utf-8").partition("\ncheck:")[2].partition("\n\n")[0]
    commands = re.findall(r"^\t\$\(BIN\)/(.*)$", recipe, re.MULTILINE)
    assert [hook["entry"] for hook in hooks] == [f".venv/bin/{each}" for each in commands if "PYTEST" not in each]


def test_architecture_names_every_folder():
    """A folder that was added or moved, and that the map does not know."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    source = ROOT / "src" / "tfclm"
    folders = [source, *(source / "savedmodel", source / "server")]
    for folder in (path for parent in folders for path in parent.iterdir() if (path / "__init__.py").exists()):
        assert f"`{folder.relative_to(source)}/`" in page, folder


def test_model_types_are_documented():
    """A type of model that loads, and that the reference does not name."""
    page = (ROOT / "docs" / "reference" / "compatibility.md").read_text(encoding="utf-8")
    assert [name for name in DECODERS + ENCODERS if f"`{name}`" not in page] == []


# With the quickstart's folder, and a server


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    """A folder with some text and, in `runs/quickstart`, a tiny model where `make fit` leaves a small one."""
    from transformers import AutoTokenizer

    from tfclm.checkpoint import create, save

    folder = tmp_path_factory.mktemp("workplace")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    save(create(tiny_config("gpt2", context=128)), tokenizer, folder / "runs" / "quickstart")
    shutil.copy(README, folder / "notes.txt")
    (folder / "prompts.txt").write_text("The import statement\n\nThe class\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def exported(workplace: Path) -> Path:
    """The version that the journey's export has made. `make fit`, before it, is what CI runs first."""
    fit, export, _, _ = JOURNEY
    assert fit == "make fit"
    module, *words = TFCLM[export]
    # In this process, where TensorFlow is imported already.
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.chdir(workplace)
        patch.setattr(sys, "argv", [module, *words])
        with pytest.raises(SystemExit) as end:
            importlib.import_module(module).main()
    assert (end.value.code, printed.getvalue()) == (0, "serving_models/quickstart/1\n")
    return workplace / "serving_models" / "quickstart" / "1"


@pytest.fixture(scope="module")
def ports(workplace: Path, exported: Path) -> Iterator[tuple[str, str]]:
    """Where the journey's server listens, for REST and gRPC: on free ports, as the documentation's may be taken."""
    metrics = f"--monitoring_config_file={ROOT / 'serving' / 'monitoring.config'}"
    module, *flags = TFCLM[JOURNEY[2]]
    assert module == "tfclm.serve"
    with launcher() as launch:
        server = launch(*flags, metrics, first=partial(os.chdir, workplace)).listens()
        yield f"127.0.0.1:{server.rest_port}", f"127.0.0.1:{server.grpc_port}"
        server.terminate()
        assert server.ends(60) == 0


@pytest.mark.slow
def test_from_text_to_an_answer(workplace: Path, exported: Path, ports: tuple[str, str]):
    """Four commands that do not fit together; or another answer than the model's own, in this process."""
    import tensorflow as tf
    from tensorflow.core.protobuf import saved_model_pb2

    words = [sys.executable, *shlex.split(JOURNEY[3])[1:], "--url", f"http://{ports[0]}"]
    done = subprocess.run(words, cwd=workplace, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    graph = saved_model_pb2.SavedModel.FromString((exported / "saved_model.pb").read_bytes()).meta_graphs[0]
    inputs = {name: tf.make_ndarray(value) for name, value in graph.signature_def["generate"].defaults.items()}
    inputs |= {"prompt": ["The import statement"], "temperature": [0.7]}
    inputs = {name: tf.reshape(tf.constant(value), [1]) for name, value in inputs.items()}
    inputs["seed"] = tf.constant([7], tf.int64)
    expected = tf.saved_model.load(str(exported)).signatures["generate"](**inputs)["generated_text"]
    assert done.stdout == f"{expected.numpy()[0].decode()}\n"


@pytest.mark.slow
@pytest.mark.parametrize("line", RUNNABLE)
def test_commands_on_the_quickstart_run(
    workplace: Path,
    exported: Path,
    ports: tuple[str, str],
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """A command that fails for whoever types it next; run in this process, where TensorFlow is imported already."""
    module, *words = TFCLM[line]
    if module == "tfclm.query":
        words += ["--url", ports[1] if "--grpc" in words else f"http://{ports[0]}"]
    monkeypatch.chdir(workplace)
    monkeypatch.setattr(sys, "argv", [module, *words])
    with pytest.raises(SystemExit) as end:
        importlib.import_module(module).main()
    printed, said = capsys.readouterr()
    assert end.value.code == 0, said
    assert printed.strip()


@pytest.mark.slow
@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_runs(
    workplace: Path,
    exported: Path,
    ports: tuple[str, str],
    block: Block,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """A name that was changed, or code that needs what stands in another block."""
    monkeypatch.chdir(workplace)
    code = block.code.replace(REST, ports[0]).replace(GRPC, ports[1])
    exec(compile(code, str(block), "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.strip()


@pytest.mark.slow
@pytest.mark.parametrize("block", CURL, ids=str)
def test_curl_runs(ports: tuple[str, str], block: Block):
    """A body that the server refuses, or a path that it does not have."""
    code = block.code.replace("curl ", "curl --fail --silent --show-error ").replace(REST, ports[0])
    done = subprocess.run(["sh", "-euc", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.slow
def test_signatures_are_documented(exported: Path):
    """An input or output that was added, renamed or given another type, and that the reference does not know."""
    from tensorflow.core.framework import types_pb2
    from tensorflow.core.protobuf import saved_model_pb2

    graph = saved_model_pb2.SavedModel.FromString((exported / "saved_model.pb").read_bytes()).meta_graphs[0]
    actual = {
        (name, where, field, types_pb2.DataType.Name(info.dtype).removeprefix("DT_").lower())
        for name, signature in graph.signature_def.items()
        if not name.startswith("__")
        for where, fields in (("input", signature.inputs), ("output", signature.outputs))
        for field, info in fields.items()
    }
    documented, name, where = set(), "", ""
    types: dict[str, str] = {}
    for line in (ROOT / "docs" / "reference" / "signatures.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if len(cells) != 4 or set(cells[0]) == {"-"}:
            continue
        if cells[0] == "signature":
            where = cells[1]
            continue
        name = cells[0].strip("`") or name
        for field in re.findall(r"`(\w+)`", cells[1]):
            # Where the type is left out, it is that of the same field above.
            types[field] = kind = cells[2].split(" ")[0].replace("float32", "float") or types[field]
            documented.add((name, where, field, kind))
    assert documented == actual


# The site


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` does."""
    folder = tmp_path_factory.mktemp("site")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


class _Loaded(HTMLParser):
    """What a browser fetches for a page by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.urls: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "link" and given.get("rel") not in ("canonical", "next", "prev"):
            self.urls.append(given.get("href") or "")
        self.urls.append(given.get("src") or "")


@pytest.mark.slow
def test_site_loads_nothing_from_elsewhere(site: Path):
    """A font, script or icon from the network: pages that look broken offline, and tell others who reads them."""
    for page in site.rglob("*.html"):
        loaded = _Loaded()
        loaded.feed(page.read_text(encoding="utf-8"))
        assert [url for url in loaded.urls if re.match(r"(\w+:)?//", url)] == [], page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", sheet.read_text(encoding="utf-8")), sheet


@pytest.mark.slow
def test_reference_is_complete(site: Path):
    """A flag or a public name that the generated reference leaves out."""
    commands = (site / "reference" / "commands.html").read_text(encoding="utf-8")
    for verb in COMMANDS:
        section = commands.partition(f'<h2 id="{verb}">')[2].partition("<h2")[0]
        flags = [name.replace("_", "-") for name in settings_of(verb).__dataclass_fields__]
        assert [flag for flag in flags if f"<code>--{flag}</code>" not in section] == [], verb
    api = (site / "reference" / "api.html").read_text(encoding="utf-8")
    assert [name for name in tfclm.__all__ if f'id="tfclm.{name}"' not in api] == []
