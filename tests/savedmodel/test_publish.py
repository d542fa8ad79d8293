"""Publishing versions: complete or not at all, whatever happens to the process."""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import signal
import time
from pathlib import Path

import pytest

from tfclm.errors import InputError
from tfclm.savedmodel.publish import keep, publish, rollback, staged, versions

FILES = {
    "saved_model.pb": 40_000,
    "variables/variables.index": 1_000,
    "variables/variables.data-00000-of-00001": 400_000,
}


def fill(folder: Path) -> None:
    """Writes what a small version consists of."""
    for name, size in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x" * size)


def export(serving_dir: Path, count: int = 1) -> None:
    """Publishes `count` versions."""
    for _ in range(count):
        with staged(serving_dir) as folder:
            fill(folder)
            publish(folder, serving_dir)


def assert_only_complete(serving_dir: Path) -> None:
    """Every version holds every file whole."""
    for number in versions(serving_dir):
        for name, size in FILES.items():
            assert (serving_dir / str(number) / name).stat().st_size == size, (number, name)


def test_next_version_and_a_given_one(tmp_path: Path):
    """A number that is used twice, or folders that are no version counted as one."""
    (tmp_path / "notes").mkdir()
    (tmp_path / "007").write_text("a file")
    assert versions(tmp_path / "nowhere") == []
    export(tmp_path)
    with staged(tmp_path) as folder:
        fill(folder)
        assert publish(folder, tmp_path, version=41) == 41
    export(tmp_path)
    assert versions(tmp_path) == [1, 41, 42]
    with pytest.raises(InputError, match="--version 41"), staged(tmp_path) as folder:
        fill(folder)
        publish(folder, tmp_path, version=41)
    assert_only_complete(tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["007", "1", "41", "42", "notes"]


def test_failed_export_leaves_nothing(tmp_path: Path):
    """A version that failed its checks but is there for a server to load."""
    with pytest.raises(RuntimeError), staged(tmp_path) as folder:
        fill(folder)
        raise RuntimeError("the canary failed")
    assert list(tmp_path.iterdir()) == []


def test_killed_at_random_moments(tmp_path: Path):
    """A half-written version, or what is left of one that stops the next export."""
    moments = random.Random(3)
    context = multiprocessing.get_context("fork")
    for _ in range(50):
        process = context.Process(target=export, args=(tmp_path, 1000))
        process.start()
        time.sleep(moments.uniform(0.0, 0.06))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert_only_complete(tmp_path)
        keep(tmp_path, 2) if len(versions(tmp_path)) > 2 else None
    export(tmp_path)
    assert_only_complete(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir() if not entry.name.isdigit()] == []


def test_exports_at_once_get_a_version_each(tmp_path: Path):
    """Two that take the same number, one of them lost; or one that removes what the other is writing."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=export, args=(tmp_path, 10)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert versions(tmp_path) == list(range(1, 41))
    assert_only_complete(tmp_path)


def _export_without_room(serving_dir: Path, connection) -> None:
    # A file may not grow beyond this: the same error path as a full disk, in this process alone.
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        export(serving_dir)
    except OSError as error:
        connection.send(type(error).__name__)


def test_no_room_leaves_nothing(tmp_path: Path):
    """A write that fails in the middle, and a version that stays behind half full."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_export_without_room, args=(tmp_path, sender))
    process.start()
    process.join()
    assert receiver.recv() == "OSError"
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_named(tmp_path: Path):
    """A traceback instead of one line."""
    with (
        pytest.raises(InputError, match="disk is full"),
        staged(tmp_path),
        open("/dev/full", "wb", buffering=0) as full,
    ):
        full.write(b"x")
    assert list(tmp_path.iterdir()) == []


def test_keep_and_rollback(tmp_path: Path):
    """The newest removed instead of the oldest, or the last one of all."""
    export(tmp_path, 5)
    assert keep(tmp_path, 3) == [1, 2]
    assert rollback(tmp_path) == (5, 4)
    assert rollback(tmp_path) == (4, 3)
    with pytest.raises(InputError, match="nothing to go back to"):
        rollback(tmp_path)
    with pytest.raises(InputError, match="--keep-versions 0"):
        keep(tmp_path, 0)
    assert versions(tmp_path) == [3]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["3"]


def test_unwritable_place_is_named(tmp_path: Path):
    """A traceback for a path that is a file."""
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--serving-dir"), staged(tmp_path / "file"):
        pass


def test_remote_filesystem_gets_the_graph_last(tmp_path: Path):
    """A server that loads saved_model.pb before its variables are there. ram:// is TensorFlow's own, without rename."""
    import tensorflow as tf

    where = "ram://serving/model"
    for expected in (1, 2):
        with staged(where) as folder:
            fill(folder)
            assert publish(folder, where) == expected
    assert versions(where) == [1, 2]
    stats = {name: tf.io.gfile.stat(f"{where}/2/{name}") for name in FILES}
    assert {name: stat.length for name, stat in stats.items()} == FILES
    assert max(FILES, key=lambda name: stats[name].mtime_nsec) == "saved_model.pb"
    assert rollback(where) == (2, 1)
    assert versions(where) == [1]
