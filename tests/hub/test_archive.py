"""A servable from the Hub: archives that are damaged, foreign or hostile, and the cache of what was unpacked."""

from __future__ import annotations

import errno
import io
import os
import shutil
import stat
import struct
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hub_server import Hub, asked, environment, filled, held, hub

from tfclm.errors import InputError
from tfclm.hub.archive import newest_version, unpack, zip_servable

GRAPH = {"3/saved_model.pb": b"graph" * 500}


@pytest.fixture(name="hub")
def hub_fixture() -> Iterator[Hub]:
    """A stand-in for the Hub, empty."""
    with hub() as running:
        yield running


def packed(entries: dict[str | zipfile.ZipInfo, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """An archive; entries may be there twice, as keys of their own."""
    made = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(made, "w", compression) as file:
        warnings.simplefilter("ignore")  # of names that are there twice
        for entry, content in entries.items():
            file.writestr(entry, content)
    return made.getvalue()


def entry(name: str, mode: int) -> zipfile.ZipInfo:
    """An entry of a kind."""
    made = zipfile.ZipInfo(name)
    made.create_system, made.external_attr = 3, mode << 16
    return made


def changed(content: bytes, old: bytes, new: bytes) -> bytes:
    """An archive with other bytes in it."""
    assert old in content
    return content.replace(old, new)


def encrypted(content: bytes) -> bytes:
    """An archive whose entries say that they are."""
    for signature, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        place = content.index(signature)
        content = content[: place + at] + struct.pack("<H", 1) + content[place + at + 2 :]
    return content


def cut_deflated() -> bytes:
    """An archive whose compressed data is noise."""
    content = packed({"3/saved_model.pb": bytes(range(256)) * 40}, zipfile.ZIP_DEFLATED)
    start = content.index(b"saved_model.pb") + len("saved_model.pb")
    return content[:start] + b"\xff" * 40 + content[start + 40 :]


def repeated(name: str) -> dict[str | zipfile.ZipInfo, bytes]:
    """A name that occurs twice."""
    return {name: b"1", zipfile.ZipInfo(name): b"2"}


LINK, DEVICE = stat.S_IFLNK | 0o777, stat.S_IFCHR | 0o666
HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "parent": (lambda: packed({**GRAPH, "3/../../evil": b"x"}), "'3/../../evil' that leads out of its directory"),
    "absolute": (lambda: packed({**GRAPH, "/tmp/tfclm-evil": b"x"}), "leads out of its directory"),
    "drive": (lambda: packed({**GRAPH, "C:/evil": b"x"}), "leads out of its directory"),
    "backslash": (lambda: packed({**GRAPH, "3\\..\\evil": b"x"}), "leads out of its directory"),
    "dot": (lambda: packed({**GRAPH, "3/./x": b"x"}), "leads out of its directory"),
    "link": (
        lambda: packed({**GRAPH, entry("3/variables", LINK): b"/etc"}),
        "'3/variables' that is a link or a device",
    ),
    "device": (lambda: packed({**GRAPH, entry("3/null", DEVICE): b""}), "is a link or a device"),
    "twice": (lambda: packed({**GRAPH, **repeated("3/a")}), "'3/a' that occurs twice"),
    "file and folder": (
        lambda: packed({**GRAPH, "3/a": b"x", "3/a/b": b"x"}),
        "'3/a' that is both a file and a directory",
    ),
    "file and empty folder": (lambda: packed({**GRAPH, "3/a": b"x", "3/a/": b""}), "is both a file and a directory"),
    "line end": (lambda: packed({**GRAPH, "3/a\nb": b"x"}), "'3/a\\nb' that has an unusable name"),
    "nul": (lambda: changed(packed({**GRAPH, "3/aXb": b"x"}), b"3/aXb", b"3/a\0b"), "has an unusable name"),
    "long name": (lambda: packed({**GRAPH, f"3/{'x' * 2000}": b"x"}), "has an unusable name"),
    "longer than the file system takes": (lambda: packed({**GRAPH, f"3/{'x' * 300}": b"x"}), "File name too long"),
    "two versions": (lambda: packed({**GRAPH, "4/saved_model.pb": b"x"}), "does not hold one version"),
    "odd digit": (lambda: packed({"²/saved_model.pb": b"x"}), "does not hold one version"),
    "a file at the top": (lambda: packed({**GRAPH, "3": b"x"}), "does not hold one version"),
    "nothing": (lambda: packed({}), "does not hold one version"),
    "no graph": (lambda: packed({"3/readme.txt": b"x"}), "has no saved_model.pb"),
    "encrypted": (lambda: encrypted(packed(dict(GRAPH))), "is encrypted"),
    "unknown compression": (lambda: packed(dict(GRAPH), zipfile.ZIP_LZMA), "is compressed by an unsupported method"),
    "many entries": (lambda: packed({**GRAPH, **{f"3/{n}": b"" for n in range(10_000)}}), "has 10001 entries"),
    "bomb": (lambda: packed({**GRAPH, "3/v": b"\0" * 100_000_000}, zipfile.ZIP_DEFLATED), "would unpack to 100 MB"),
    "wrong checksum": (lambda: changed(packed(dict(GRAPH)), b"graphgraphgraph", b"graphGRAPHgraph"), "is damaged: Bad"),
    "cut": (lambda: packed(dict(GRAPH))[:1200], "is damaged: BadZipFile"),
    "cut inside": (lambda: changed(packed(dict(GRAPH)), b"graph" * 200, b""), "is damaged"),
    "noise": (lambda: cut_deflated(), "is damaged: error: Error -3"),
    "no zip": (lambda: b"<html>", "is damaged: BadZipFile"),
    "empty": (lambda: b"", "is damaged: BadZipFile"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_and_damaged_archives(tmp_path: Path, name: str):
    """A file outside of its folder, a full disk, a traceback of some library, or half a version that is left."""
    make, words = HOSTILE[name]
    archive = tmp_path / "archive.zip"
    archive.write_bytes(make())
    with pytest.raises(InputError) as refused:
        unpack(archive, tmp_path / "out" / "servable", "me/x")
    assert words in str(refused.value)
    assert str(refused.value).startswith("me/x: saved_model.zip ")
    assert len(str(refused.value).splitlines()) == 1
    assert held(tmp_path).keys() == {"archive.zip"}
    assert not (tmp_path / "out" / "servable").exists()
    assert not Path("/tmp/tfclm-evil").exists()


def test_what_others_zip_is_unpacked(tmp_path: Path):
    """An archive of another tool refused, for it is compressed, has entries for folders, or unpacks to much more."""
    files = {"3/saved_model.pb": b"\0" * 40_000_000, "3/variables/a.index": b"a", "3/größe": "ö".encode()}
    folders = {"3/": b"", "3/variables/": b"", "3/assets/": b""}
    modes = {entry("3/plain", stat.S_IFREG | 0o444): b"x"}
    archive = tmp_path / "archive.zip"
    archive.write_bytes(packed({**folders, **files, **modes}, zipfile.ZIP_DEFLATED))
    assert archive.stat().st_size < 100_000
    unpack(archive, tmp_path / "out", "me/x")
    assert held(tmp_path / "out") == {**files, "3/plain": b"x"}


def test_no_room_is_one_line(tmp_path: Path):
    """A traceback, or the half of a model that fills the disk for good."""
    archive = tmp_path / "archive.zip"
    archive.write_bytes(packed({**GRAPH, "3/v": os.urandom(1_000_000)}))
    code = f"""
import signal, resource
from pathlib import Path
from tfclm.hub.archive import unpack
from tfclm.errors import InputError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    unpack(Path({str(archive)!r}), Path({str(tmp_path / "out")!r}), "me/x")
except InputError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == f"me/x: saved_model.zip cannot be unpacked: {os.strerror(errno.EFBIG)}", done.stderr
    assert not (tmp_path / "out").exists()
    size = shutil.disk_usage(tmp_path).free + 10**9
    huge = packed({**GRAPH, "3/v": b"xy"})
    # The size that the archive's list gives, which nothing is written for.
    for signature, at in ((b"PK\x03\x04", 18), (b"PK\x01\x02", 20)):
        place = huge.rindex(signature)
        huge = huge[: place + at] + struct.pack("<II", 2, min(size, 2**32 - 2)) + huge[place + at + 8 :]
    archive.write_bytes(huge)
    with pytest.raises(InputError, match=r"would unpack to 4\.3 GB|would unpack to [\d.]+ GB"):
        unpack(archive, tmp_path / "out", "me/x")


def test_newest_version_is_one_that_servers_read(tmp_path: Path):
    """A traceback for a folder that is named by a digit of another script, or 9 taken for newer than 10."""
    for name in ("9", "10", "²", "notes"):
        filled(tmp_path / name, **{"saved_model.pb": name.encode()})
    assert newest_version(tmp_path) == tmp_path / "10"
    assert newest_version(tmp_path / "9") == tmp_path / "9"
    for other in ("²", "notes", "nowhere"):
        with pytest.raises(InputError, match="is not an exported model"):
            newest_version(tmp_path / other)


def pushed(hub: Hub, folder: Path, number: int, graph: bytes) -> str:
    """A new revision of a repository, with another servable; its commit."""
    version = filled(folder / str(number), **{"saved_model.pb": graph})
    content = zip_servable(version, folder / "saved_model.zip").read_bytes()
    if "models/me/x" not in hub.repositories:
        hub.make("models/me/x", {})
    return hub.model("me/x").add("main", "servable", "", {"saved_model.zip": content}).id


# A file system without links, such as FAT or some network mounts.
WITHOUT_LINKS = """
import errno, os, warnings
warnings.simplefilter("ignore")
def symlink(*arguments, **options):
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))
os.symlink = symlink
"""


@pytest.mark.parametrize("prelude", ["", WITHOUT_LINKS], ids=["links", "no links"])
def test_each_revision_is_what_it_was(hub: Hub, tmp_path: Path, prelude: str):
    """The old model served after a new one was pushed, because both archives have one name in the cache."""
    (tmp_path / "run").mkdir()
    code = f"""{prelude}
from tfclm.hub import fetch_servable
path = fetch_servable("me/x", revision=REVISION)
answer({{each.relative_to(path).as_posix(): each.read_text() for each in path.rglob("saved_model.pb")}})
"""

    def fetched(revision: str | None) -> dict[str, str]:
        got, _ = asked(code.replace("REVISION", repr(revision)), hub.endpoint, tmp_path / "run")
        return got

    first = pushed(hub, tmp_path / "first", 1, b"old")
    assert fetched(None) == {"1/saved_model.pb": "old"}
    second = pushed(hub, tmp_path / "second", 1, b"new")
    assert fetched(None) == {"1/saved_model.pb": "new"}
    assert fetched(first) == {"1/saved_model.pb": "old"}
    assert fetched(second) == {"1/saved_model.pb": "new"}


def test_hostile_archive_leaves_nothing_in_the_cache(hub: Hub, tmp_path: Path):
    """What was unpacked of an archive that is refused, taken for a model the next time; or left by a killed process."""
    (tmp_path / "run").mkdir()
    hub.make("models/me/x", {"saved_model.zip": packed({**GRAPH, "3/../../evil": b"x"})})
    left = tmp_path / "home" / "hf" / "tfclm" / "servables" / "me--x" / ".part-killed"
    left.mkdir(parents=True)
    (left / "big").write_text("x")
    code = """
from tfclm.hub import fetch_servable
said = []
for _ in range(2):
    try:
        fetch_servable("me/x")
    except InputError as error:
        said.append(str(error))
answer(said)
"""
    said, _ = asked(code, hub.endpoint, tmp_path / "run")
    assert len(said) == 2
    assert all("leads out of its directory" in line for line in said)
    assert list((tmp_path / "home" / "hf" / "tfclm").rglob("*")) == [left.parent.parent, left.parent]


def test_serve_takes_a_revision_of_the_hubs(hub: Hub, tmp_path: Path):
    """A server that cannot be pinned to what was tested, or a flag that is passed over."""
    first = pushed(hub, tmp_path / "first", 1, b"old")
    pushed(hub, tmp_path / "second", 1, b"new")
    for words, said in {
        # The model is fetched before the other flags are looked at, and what is fetched could not be loaded.
        ("--hub", "me/x", "--hub_revision", first, "--port=70000"): "--port 70000: give 1 to 65535",
        ("--hub", "me/x", "--hub_revision", "gone"): "me/x has no revision gone on the Hub",
        ("--model_base_path", ".", "--hub_revision", first): "--hub_revision goes with --hub",
    }.items():
        done = subprocess.run(
            [sys.executable, "-m", "tfclm.serve", *words],
            env=environment(hub.endpoint, tmp_path / "home"),
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 2
        assert done.stderr.startswith(f"tfclm.serve: {said}"), done.stderr
        assert len(done.stderr.splitlines()) == 1
    graphs = (tmp_path / "home").rglob("saved_model.pb")
    assert [graph.read_text() for graph in graphs] == ["old"]
