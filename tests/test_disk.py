"""Writing files and folders: on mounts without some operations, and next to leftovers of other processes."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tfclm.disk import FolderLock, copy_folder, staging, write

# The mount is the collaborator here: these calls fail as network and FUSE file systems let them fail.
MOUNT = """
import errno, fcntl, os, shutil, stat, sys

def refuse(number):
    def call(*arguments, **options):
        raise OSError(number, os.strerror(number))
    return call

def refuse_folders(handle):
    if stat.S_ISDIR(os.fstat(handle).st_mode):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

os.chmod = os.utime = os.chown = refuse(errno.EPERM)
os.fsync = refuse_folders
"""


def on_a_mount(code: str, *words: object, changed: str = "") -> subprocess.CompletedProcess[str]:
    """Runs code in a process of its own on such a mount."""
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "TF_USE_LEGACY_KERAS": "1"}
    command = [sys.executable, "-c", f"{MOUNT}\n{changed}\n{code}", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


PUBLISH = """
from pathlib import Path
from tfclm.savedmodel.publishing.versions import ServingDirectory
directory = ServingDirectory.open(sys.argv[1])
for _ in range(2):
    with directory.staged() as folder:
        (folder / "variables").mkdir()
        (folder / "variables" / "a.index").write_text("a")
        (folder / "saved_model.pb").write_text("graph")
        directory.publish(folder)
print(directory.versions())
"""


def test_mount_that_refuses_what_is_best_effort(tmp_path: Path):
    """A version that is complete and never published, because a folder cannot be flushed or a mode not be set."""
    done = on_a_mount(PUBLISH, tmp_path)
    assert (done.returncode, done.stdout) == (0, "[1, 2]\n"), done.stderr
    assert (tmp_path / "2" / "variables" / "a.index").read_text() == "a"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["1", "2"]
    # One line per kind, not one per file.
    assert [line.split(": ")[0] for line in done.stderr.splitlines()] == ["tfclm", "tfclm"], done.stderr
    assert "permissions cannot be set" in done.stderr
    assert "cannot flush (Invalid argument)" in done.stderr


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_lost_data_is_an_error(tmp_path: Path, number: int):
    """A disk that fails or is full while a file is flushed, passed over as a mount that cannot flush."""
    done = on_a_mount(PUBLISH, tmp_path, changed=f"os.fsync = refuse({number})")
    assert done.returncode == 1
    assert os.strerror(number) in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_mount_without_locks(tmp_path: Path):
    """An export refused for want of locks; or a half-written version of another one removed, which may be in use."""
    (tmp_path / ".staging-other").mkdir()
    changed = "fcntl.flock = refuse(errno.ENOLCK)"
    done = on_a_mount(PUBLISH, tmp_path, changed=changed)
    assert (done.returncode, done.stdout) == (0, "[1, 2]\n"), done.stderr
    assert (tmp_path / ".staging-other").is_dir()
    assert "no locks here (No locks available)" in done.stderr


def test_versions_on_another_layer_are_removed(tmp_path: Path):
    """A rollback refused in a container whose image holds the versions: a lower layer's folder cannot move."""
    for number in (1, 2, 3):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "saved_model.pb").write_text("graph")
    code = """
from tfclm.savedmodel.publishing.versions import ServingDirectory
directory = ServingDirectory.at(sys.argv[1])
print(directory.rollback(), directory.keep(1))
"""
    done = on_a_mount(code, tmp_path, changed="os.rename = refuse(errno.EXDEV)")
    assert (done.returncode, done.stdout) == (0, "(3, 2) [1]\n"), done.stderr
    assert [entry.name for entry in tmp_path.iterdir()] == ["2"]


SAVE = """
from pathlib import Path
from transformers import GPT2Config
from tfclm import checkpoint
from tfclm.runs.folder import RunFolder
settings = {"model": "m", "output_dir": "o", "push_to_hub": None}
with RunFolder(Path(sys.argv[1]), settings, overwrite=False) as folder:
    folder.begin()
    config = GPT2Config(vocab_size=8, n_positions=4, n_embd=4, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=0)
    names = checkpoint.save(checkpoint.create(config), None, folder.path)
    folder.record({"perplexity": 2.5})
print(names)
"""


@pytest.mark.slow
def test_run_ends_well_on_such_a_mount(tmp_path: Path):
    """A training of hours that fails when it saves its model, and fails again each time it is resumed."""
    done = on_a_mount(SAVE, tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['config.json', 'generation_config.json', 'model.safetensors']"
    assert (tmp_path / "run" / "results.json").read_text() == '{\n  "perplexity": 2.5\n}\n'
    assert "Traceback" not in done.stderr


def test_copies_without_modes_and_times(tmp_path: Path):
    """A version from elsewhere whose copy fails at its last step, because `shutil.copytree` sets modes."""
    (tmp_path / "from" / "a" / "empty").mkdir(parents=True)
    (tmp_path / "blob").write_text("content")
    (tmp_path / "from" / "a" / "link").symlink_to(tmp_path / "blob")
    code = """
from pathlib import Path
from tfclm.disk import copy_folder
copy_folder(Path(sys.argv[1]), Path(sys.argv[2]))
"""
    done = on_a_mount(code, tmp_path / "from", tmp_path / "to")
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "to" / "a" / "link").read_text() == "content"
    assert not (tmp_path / "to" / "a" / "link").is_symlink()
    assert (tmp_path / "to" / "a" / "empty").is_dir()
    copy_folder(tmp_path / "from", tmp_path / "to")


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path):
    """The old file lost, or half of the new one left next to it, because the disk was full."""
    write(tmp_path / "a.txt", "old")
    done = on_a_mount(
        "from pathlib import Path\nfrom tfclm.disk import write\nwrite(Path(sys.argv[1]), 'new')",
        tmp_path / "a.txt",
        changed="os.fsync = refuse(errno.ENOSPC)",
    )
    assert "No space left on device" in done.stderr
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.txt": "old"}


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that every user can get to; pytest's own are for their user alone."""
    with tempfile.TemporaryDirectory(prefix="tfclm-tests-") as folder:
        os.chmod(folder, 0o777)
        yield Path(folder)


def test_what_another_user_has_left_stops_nothing(public: Path):
    """Every export refused for good, because one that was killed ran as somebody else."""
    left = public / ".staging-left"
    left.mkdir()
    (left / "saved_model.pb").write_text("half")
    left.chmod(0)
    # Root may remove everything: then the export is somebody else's, once its modules are imported.
    code = PUBLISH.replace("directory = ", "if os.getuid() == 0: os.setuid(65534)\ndirectory = ")
    script = f"import os, sys\n{code.replace('staged()', 'staged(print)')}"
    try:
        command = [sys.executable, "-c", script, str(public)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    finally:
        left.chmod(0o755)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[1, 2]"
    assert f"{left} is a leftover that was not removed (Permission denied): remove it yourself" in done.stdout
    assert sorted(entry.name for entry in public.iterdir()) == [".staging-left", "1", "2"]


def test_a_lock_is_waited_for_only_so_long(tmp_path: Path):
    """A command that waits forever, without a message, for a process that is stopped."""
    began = time.monotonic()
    with FolderLock(tmp_path) as first:
        assert first.exclusive
        with pytest.raises(BlockingIOError):
            FolderLock(tmp_path, timeout=0.2)
        assert 0.2 <= time.monotonic() - began < 10
    with FolderLock(tmp_path) as again:
        assert again.exclusive


def test_staged_folders_of_killed_processes_are_removed(tmp_path: Path):
    """A copy of the model that every killed process leaves; or the folder of one that still writes removed."""
    (tmp_path / ".part-left").mkdir()
    (tmp_path / ".part-left" / "big").write_text("x")
    with staging(tmp_path, ".part-") as first:
        assert {entry.name for entry in tmp_path.iterdir()} == {first.name}
        with staging(tmp_path, ".part-") as second:
            assert {entry.name for entry in tmp_path.iterdir()} == {first.name, second.name}
    assert list(tmp_path.iterdir()) == []
