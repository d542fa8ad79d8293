"""Publishing versions: complete or not at all, whatever happens to the process."""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import LONG

from tfclm.errors import InputError
from tfclm.savedmodel.publishing.numbering import LARGEST
from tfclm.savedmodel.publishing.versions import ServingDirectory

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


def export(serving_dir: Path | str, count: int = 1) -> list[int]:
    """Publishes `count` versions; their numbers."""
    return [publish(serving_dir) for _ in range(count)]


def publish(serving_dir: Path | str, version: int | None = None) -> int:
    """Publishes a version; its number."""
    directory = ServingDirectory.open(serving_dir, version)
    with directory.staged() as folder:
        fill(folder)
        return directory.publish(folder)


def versions(serving_dir: Path | str) -> list[int]:
    """The numbers of the versions that are there."""
    return ServingDirectory.at(serving_dir).versions()


def keep(serving_dir: Path | str, count: int) -> list[int]:
    """Removes all but the newest versions; the numbers removed."""
    return ServingDirectory.at(serving_dir).keep(count)


def rollback(serving_dir: Path | str) -> tuple[int, int]:
    """Removes the newest version; the numbers removed and served."""
    return ServingDirectory.at(serving_dir).rollback()


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
    assert publish(tmp_path, version=41) == 41
    export(tmp_path)
    assert versions(tmp_path) == [1, 41, 42]
    assert ServingDirectory.at(tmp_path).served() == f"{tmp_path}/42"
    assert ServingDirectory.at(tmp_path / "nowhere").served() is None
    with pytest.raises(InputError, match=r"`version` 41 already exists in"):
        publish(tmp_path, version=41)
    assert_only_complete(tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["007", "1", "41", "42", "notes"]


@pytest.mark.parametrize("other", ["41", "041"])
def test_a_number_that_is_taken_during_the_export(tmp_path: Path, other: str):
    """A version that replaces the one that another export published, or a folder of another name that servers read."""
    directory = ServingDirectory.open(tmp_path, version=41)
    with pytest.raises(InputError, match=r"`version` 41 already exists in"), directory.staged() as folder:
        fill(folder)
        (tmp_path / other).mkdir()
        directory.publish(folder)
    assert [entry.name for entry in tmp_path.iterdir()] == [other]


def test_an_open_directory_is_not_checked_again(tmp_path: Path):
    """An address that is resolved and listed five times for one export; or a number that goes lost on the way."""
    directory = ServingDirectory.open(f"file://{tmp_path}/m/", version=7)
    assert ServingDirectory.open(directory) is directory
    assert ServingDirectory.open(directory, 7) is directory
    assert ServingDirectory.at(directory) is directory
    assert (str(directory), directory.version) == (f"{tmp_path}/m", 7)
    assert ServingDirectory.open(directory, 8) == ServingDirectory(f"{tmp_path}/m", 8)


def test_failed_export_leaves_nothing(tmp_path: Path):
    """A version that failed its checks but is there for a server to load."""
    with pytest.raises(RuntimeError), ServingDirectory.open(tmp_path).staged() as folder:
        fill(folder)
        raise RuntimeError("the canary failed")
    assert list(tmp_path.iterdir()) == []


def test_killed_at_random_moments(tmp_path: Path):
    """A half-written version, or what is left of one that stops the next export."""
    moments = random.Random(3)
    context = multiprocessing.get_context("fork")
    for _ in range(50 if LONG else 15):
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
    """A write that fails in the middle, and an incomplete version that it leaves."""
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
        ServingDirectory.open(tmp_path).staged(),
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
    with pytest.raises(InputError, match="no earlier version to return to"):
        rollback(tmp_path)
    with pytest.raises(InputError, match="`keep_versions` 0"):
        keep(tmp_path, 0)
    assert versions(tmp_path) == [3]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["3"]


def test_unwritable_place_is_named(tmp_path: Path):
    """A traceback for a path that is a file."""
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"`serving_dir` .*/file: .*/file is not a directory"):
        ServingDirectory.open(tmp_path / "file")
    # A file that was created after the check.
    named = pytest.raises(InputError, match=r"`serving_dir` .*/file: File exists")
    with named, ServingDirectory.at(tmp_path / "file").staged():
        pass


def test_directories_with_other_names(tmp_path: Path):
    """A rollback that says 7 is removed and leaves 007, which servers read as 7; or a name that none of them reads."""
    for name in ("5", "007", str(LARGEST + 1), "7" * 200):
        (tmp_path / name).mkdir()
    assert ServingDirectory.at(tmp_path).folders() == {5: ["5"], 7: ["007"]}
    export(tmp_path)
    assert keep(tmp_path, 1) == [5, 7]
    (tmp_path / "08").mkdir()
    (tmp_path / "9").mkdir()
    (tmp_path / "09").mkdir()
    assert rollback(tmp_path) == (9, 8)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["08", "7" * 200, "8", str(LARGEST + 1)]


def test_no_number_beyond_the_largest(tmp_path: Path):
    """A version that no server reads, because its number does not fit into 64 bits."""
    (tmp_path / str(LARGEST)).mkdir()
    with pytest.raises(InputError, match=f"version {LARGEST} exists, and servers take no higher number"):
        ServingDirectory.open(tmp_path)
    with pytest.raises(InputError, match="give a free `version`"), ServingDirectory.at(tmp_path).staged() as folder:
        ServingDirectory.at(tmp_path).publish(folder)
    ServingDirectory.open(tmp_path, version=5)


def test_file_addresses_are_folders(tmp_path: Path):
    """A version that is uploaded file by file into a folder, where it could be renamed."""
    directory = ServingDirectory.open(f"file://{tmp_path}/m/")
    with directory.staged() as folder:
        assert folder.parent == tmp_path / "m"
        fill(folder)
        assert directory.publish(folder) == 1
    assert rollback_refused(f"file://localhost{tmp_path}/m")
    assert_only_complete(tmp_path / "m")


def rollback_refused(where: str) -> bool:
    """Whether there is one version alone."""
    with pytest.raises(InputError, match="has one version"):
        rollback(where)
    return True


# On a filesystem without rename: ram:// is TensorFlow's own.


@pytest.fixture
def where(tmp_path: Path) -> str:
    """An address of nothing yet."""
    return f"ram://{tmp_path.name}/model"


def put(address: str, text: str = "") -> None:
    """Writes a file, and the folders above it."""
    import tensorflow as tf

    tf.io.gfile.makedirs(address.rpartition("/")[0])
    with tf.io.gfile.GFile(address, "w") as file:
        file.write(text)


def held(address: str) -> set[str]:
    """What there is below an address, but for folders."""
    import tensorflow as tf

    found = set()
    for folder, _, names in tf.io.gfile.walk(address):
        found |= {f"{folder}/{name}".removeprefix(f"{address}/").replace("//", "/") for name in names}
    return found


def test_remote_filesystem_gets_the_graph_last(where: str):
    """A server that loads saved_model.pb before its variables are there."""
    import tensorflow as tf

    assert export(where, 2) == [1, 2]
    assert versions(where) == [1, 2]
    stats = {name: tf.io.gfile.stat(f"{where}/2/{name}") for name in FILES}
    assert {name: stat.length for name, stat in stats.items()} == FILES
    assert max(FILES, key=lambda name: stats[name].mtime_nsec) == "saved_model.pb"
    assert rollback(where) == (2, 1)
    assert held(where) == {f"1/{name}" for name in FILES}


def test_remote_exports_at_once_get_a_version_each(where: str):
    """Two that take one number: one of them dies of it, or the files of two models are mixed."""
    start = threading.Barrier(4, timeout=30)

    def run(name: int) -> list[int]:
        numbers = []
        for _ in range(5):
            directory = ServingDirectory.open(where)
            with directory.staged() as folder:
                for file in FILES:
                    (folder / file).parent.mkdir(exist_ok=True)
                    (folder / file).write_text(f"exporter {name}")
                start.wait()
                numbers.append(directory.publish(folder))
        return numbers

    with ThreadPoolExecutor(4) as pool:
        numbers = list(pool.map(run, range(4)))
    got = sorted(number for those in numbers for number in those)
    # Not always 1 to 20: who sees a claim that is withdrawn just then takes the next number.
    assert got == versions(where)
    assert len(set(got)) == 20
    import tensorflow as tf

    for name, those in enumerate(numbers):
        for number in those:
            texts = {tf.io.gfile.GFile(f"{where}/{number}/{file}").read() for file in FILES}
            assert texts == {f"exporter {name}"}, number


def test_a_number_claimed_by_another_upload_is_taken(where: str):
    """A claim that is not looked at, because the folder is not there yet."""
    put(f"{where}/.claims/1.{int(time.time())}.another")
    with pytest.raises(InputError, match="`version` 1 already exists in ram://"):
        publish(where, version=1)
    assert export(where) == [2]
    assert versions(where) == [2]


def test_killed_uploads_are_no_versions(where: str):
    """A folder without saved_model.pb that is listed, compared with, rolled back to, or kept instead of whole ones."""
    export(where, 2)
    put(f"{where}/3/variables/variables.index")
    put(f"{where}/.claims/3.{int(time.time()) - 3600}.killed")
    lines: list[str] = []
    directory = ServingDirectory.open(where)
    with directory.staged(lines.append) as folder:
        fill(folder)
        assert directory.publish(folder) == 4
    assert len(lines) == 1
    assert f"{where}/3 has no saved_model.pb and does not count as a version" in lines[0]
    assert (directory.versions(), directory.incomplete()) == ([1, 2, 4], [3])
    with pytest.raises(InputError, match="`version` 3 already exists in ram://"):
        ServingDirectory.open(where, version=3)
    assert keep(where, 1) == [1, 2]
    assert rollback_refused(where)
    assert held(where) == {
        *(f"4/{name}" for name in FILES),
        "3/variables/variables.index",
        next(name for name in held(where) if name.startswith(".claims/3.")),
    }


def test_a_day_later_killed_uploads_are_removed(where: str):
    """Files that are paid for for ever; or somebody else's upload that is removed because nothing says whose it is."""
    export(where)
    yesterday = int(time.time()) - 25 * 3600
    for number in (2, 3):
        put(f"{where}/{number}/variables/variables.index")
    put(f"{where}/.claims/2.{yesterday}.killed")
    put(f"{where}/.claims/1.{yesterday}.killed-when-all-was-there")
    lines: list[str] = []
    directory = ServingDirectory.open(where)
    with directory.staged(lines.append) as folder:
        assert held(where) == {
            *(f"1/{name}" for name in FILES),
            "3/variables/variables.index",
            # So that its number is not used again by one export while another one still removes it.
            f".claims/2.{yesterday}.killed",
        }
        assert [line.split()[0] for line in lines] == [f"{where}/3"]
        fill(folder)
        assert directory.publish(folder) == 4
    export(where)
    assert held(where) == {*(f"{n}/{name}" for n in (1, 4, 5) for name in FILES), "3/variables/variables.index"}


def test_an_upload_that_fails_is_one_line_and_leaves_nothing(where: str):
    """A traceback of TensorFlow's, or half a version that is called incomplete from then on."""
    export(where)
    directory = ServingDirectory.open(where)
    failed = pytest.raises(InputError, match=r"`serving_dir` ram://\S+: \w+Error: .*; give an")
    with failed, directory.staged() as folder:
        fill(folder)
        (folder / "saved_model.pb").unlink()
        (folder / "saved_model.pb").symlink_to("/proc/self/mem")  # a file whose first byte cannot be read
        directory.publish(folder)
    assert held(where) == {f"1/{name}" for name in FILES}
    assert directory.incomplete() == []
    assert export(where) == [2]
    with pytest.raises(InputError, match=r"`serving_dir` nowhere://x: .*'nowhere' not implemented"):
        ServingDirectory.open("nowhere://x")


def test_temporary_folder_without_room_is_named(where: str):
    """A traceback, or the blame on the place that the version is uploaded to."""
    with (
        pytest.raises(InputError, match=r"the temporary directory .* disk is full, nothing was published; .* TMPDIR"),
        ServingDirectory.open(where).staged(),
        open("/dev/full", "wb", buffering=0) as full,
    ):
        full.write(b"x")


def _stage_for_ever(where: str, connection) -> None:
    with ServingDirectory.open(where).staged() as folder:
        fill(folder)
        connection.send(folder)
        time.sleep(60)


def test_temporary_files_of_a_killed_export_are_removed(where: str):
    """A copy of the model that every killed export leaves, or one that another export is still uploading removed."""
    context = multiprocessing.get_context("fork")
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = context.Process(target=_stage_for_ever, args=(where, sender))
    process.start()
    left = receiver.recv()
    with ServingDirectory.open(where).staged() as folder:
        assert folder.parent == left.parent
        assert (left / "saved_model.pb").exists()
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        with ServingDirectory.open(where).staged():
            assert not left.exists()
            assert folder.exists()
    assert not folder.exists()
