"""Where texts come from, what is held out, and the messages about input that cannot be used."""

from __future__ import annotations

import csv
import errno
import fcntl
import gc
import gzip
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tfclm.compat import fingerprint
from tfclm.corpus import read, read_split
from tfclm.errors import InputError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


ELI5 = [
    {
        "q_id": f"q{i}",
        "title": f"Why {i}?",
        "selftext": "",
        "document": "",
        "subreddit": "explainlikeimfive",
        "answers": {"a_id": [f"a{i}", f"b{i}"], "text": [f"Because {i}.", f"Also {i}!"], "score": [i, 3]},
        "title_urls": {"url": []},
        "selftext_urls": {"url": []},
        "answers_urls": {"url": []},
    }
    for i in range(20)
]
ANSWERS = [f"Because {i}. Also {i}!" for i in range(20)]


def texts_of(path: Path | str, column: str = "text") -> list[str]:
    """The documents of one file."""
    return list(read_split(files=[str(path)], text_column=column).texts["text"])


def refused(*what: str, **arguments: object) -> str:
    """The message of the error, once it is one line that holds all of `what`."""
    with pytest.raises(InputError) as caught:
        (read_split if arguments.pop("one", False) else read)(**arguments)
    message = str(caught.value)
    assert "\n" not in message
    for part in what:
        assert part in message
    return message


def test_importing_the_corpus_is_cheap_and_without_tensorflow() -> None:
    """Catches an import that makes tokenizing, and each of its worker processes, load TensorFlow."""
    code = (
        "import sys, tfclm.corpus; "
        "print(sorted({'tensorflow', 'transformers', 'datasets', 'pyarrow', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Text files


def test_text_file_survives_whole(tmp_path: Path) -> None:
    """Catches a reader that strips newlines, drops blank lines or loses the end without a newline."""
    content = "\n\nOne.\nStill one.\n\n   \n\tTwo, indented.\n\n\n"
    content += "Three — ünïcode 六\u2028same line\x0c same\nno newline at the end"
    path = tmp_path / "a.txt"
    path.write_text(content, encoding="utf-8")
    found = texts_of(path)
    assert found == [
        "\n\nOne.\nStill one.\n\n   \n",
        "\tTwo, indented.\n\n\n",
        "Three — ünïcode 六\u2028same line\x0c same\nno newline at the end",
    ]
    assert "".join(found) == content


def test_real_prose_survives_whole(tmp_path: Path, documents: list[str]) -> None:
    """Catches text lost or doubled where one read of the file ends and the next begins."""
    content = "\n\n".join(documents)
    path = tmp_path / "a.txt"
    path.write_text(content, encoding="utf-8")
    found = texts_of(path)
    assert "".join(found) == content
    assert len(found) > len(documents)


def test_file_without_blank_lines_is_cut_into_bounded_documents(tmp_path: Path) -> None:
    """Catches a file of lines that becomes one document of its whole size in memory."""
    lines = [f"line {i} of a long log é\n" for i in range(20_000)]
    path = tmp_path / "log.txt"
    path.write_text("".join(lines), encoding="utf-8")
    found = texts_of(path)
    assert "".join(found) == "".join(lines)
    assert max(map(len, found)) <= 65_536
    assert all(text.endswith("\n") for text in found)


def test_one_huge_line_is_cut_without_breaking_a_character(tmp_path: Path) -> None:
    """Catches a cut inside a multi-byte character, or an over-long line read at once."""
    content = "x" + "é六" * 60_000
    path = tmp_path / "line.txt"
    path.write_text(content, encoding="utf-8")
    found = texts_of(path)
    assert "".join(found) == content
    assert max(map(len, found)) <= 65_536


@pytest.mark.parametrize("padding", [0, 65_528, 65_529, 65_530])
def test_windows_text_reads_as_unix_text(tmp_path: Path, padding: int) -> None:
    """Catches \\r tokens and a BOM in the training text, also where \\r and \\n fall into two reads."""
    path = tmp_path / "windows.txt"
    path.write_bytes(b"\xef\xbb\xbf" + b"x" * padding + b"one\r\n\r\ntwo\r\n")
    assert "".join(texts_of(path)) == "x" * padding + "one\n\ntwo\n"


# Other files


def write_rows(path: Path, rows: list[str | None]) -> Path:
    """A file of rows in the kind that its name asks for."""
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    if kind == "parquet":
        pq.write_table(pa.table({"id": range(len(rows)), "text": rows}), path)
        return path
    if kind == "jsonl":
        content = "".join(json.dumps({"id": i, "text": row}) + "\n" for i, row in enumerate(rows))
    elif kind == "json":
        content = json.dumps([{"id": i, "text": row} for i, row in enumerate(rows)], indent=1)
    elif kind == "csv":
        buffer = io.StringIO()
        csv.writer(buffer).writerows([["id", "text"], *([i, row] for i, row in enumerate(rows))])
        content = buffer.getvalue()
    else:
        content = "\n\n".join(row or "" for row in rows)
    data = content.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


KINDS = ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.jsonl.gz", "a.json.gz", "a.csv.gz"]


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    """Catches a reader that changes newlines, quotes, spaces or the order, or keeps null and blank rows."""
    rows = ["one\ntwo", 'a "quoted", part', None, "  spaces  ", "", "\n ", "ünï 六 \U0001f600", "x" * 200_000]
    split = read_split(files=[str(write_rows(tmp_path / name, rows))])
    assert list(split.texts["text"]) == [rows[0], rows[1], rows[3], rows[6], rows[7]]
    assert split.texts.column_names == ["text"]
    assert split.description["dropped_rows"] == 3


def test_gzipped_text(tmp_path: Path) -> None:
    """Catches compressed bytes that are read as text."""
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b"one\n\ntwo\n"))
    assert texts_of(path) == ["one\n\n", "two\n"]


def test_large_json_array_is_read_in_pieces(tmp_path: Path) -> None:
    """Catches an object lost or cut where one read of a .json file ends."""
    rows = [f"row {i} " + "é" * (i % 977) for i in range(6000)]
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": row} for row in rows], ensure_ascii=False), encoding="utf-8")
    assert path.stat().st_size > 2 << 20
    assert texts_of(path) == rows


def test_files_keep_their_order_across_kinds_and_globs(tmp_path: Path) -> None:
    """Catches files grouped by kind or in the order of the file system."""
    write_rows(tmp_path / "z.jsonl", ["first", "second"])
    write_rows(tmp_path / "b2.txt", ["fourth"])
    write_rows(tmp_path / "b1.txt", ["third"])
    write_rows(tmp_path / "a.parquet", ["fifth"])
    files = [str(tmp_path / name) for name in ("z.jsonl", "b*.txt", "a.parquet")]
    assert list(read_split(files=files).texts["text"]) == ["first", "second", "third", "fourth", "fifth"]


def test_second_run_reads_the_cache_and_a_changed_file_does_not(tmp_path: Path) -> None:
    """Catches a cache that is never hit, or that hands out the text of an older file."""
    path = write_rows(tmp_path / "a.jsonl", ["one", "two"])
    first = read_split(files=[str(path)]).texts
    again = read_split(files=[str(path)]).texts
    assert first.cache_files == again.cache_files
    assert fingerprint(first) == fingerprint(again)
    write_rows(path, ["one", "two", "three"])
    assert len(read_split(files=[str(path)]).texts) == 3


@pytest.mark.parametrize("kind", ["a.jsonl", "a.txt.gz", "a.parquet", "folder", "saved"])
def test_another_text_of_the_same_size_and_time_is_read(tmp_path: Path, kind: str) -> None:
    """Catches a cache that tells texts by size and time of change, which tar, rsync -t and fixed dates keep alike."""
    found = []
    for text in ("one", "two"):
        if kind == "saved":
            shutil.rmtree(tmp_path / kind, ignore_errors=True)
            with pa.ipc.new_stream(str(tmp_path / "saved.arrow"), pa.schema({"text": pa.string()})) as writer:
                writer.write_batch(pa.record_batch({"text": [text]}))
            os.utime(tmp_path / "saved.arrow", (1e9, 1e9))
            datasets.Dataset.from_file(str(tmp_path / "saved.arrow")).save_to_disk(tmp_path / kind)
            (path,) = (tmp_path / kind).glob("*.arrow")
        elif kind == "folder":
            (tmp_path / kind).mkdir(exist_ok=True)
            path = write_rows(tmp_path / kind / "train.jsonl", [text])
        else:
            path = write_rows(tmp_path / kind, [text])
        os.utime(path, (1e9, 1e9))
        where = {"dataset": str(tmp_path / kind), "split": "train"} if kind in ("folder", "saved") else {}
        texts = read_split(**where or {"files": [str(path)]}).texts
        found.append((path.stat().st_size, path.stat().st_mtime, fingerprint(texts), "".join(texts["text"])))
    (size, time, key, first), (same_size, same_time, other_key, second) = found
    assert (size, time, first, second) == (same_size, same_time, "one", "two")
    # What is cached of the texts, such as their tokens, is found by it.
    assert key != other_key


def test_a_text_is_known_by_its_content(tmp_path: Path) -> None:
    """Catches a cache that is of no use once the text has been moved or copied; or one that ignores the column."""
    first = write_rows(tmp_path / "a.jsonl", ["one"])
    (tmp_path / "b.jsonl").write_bytes(first.read_bytes())
    os.utime(tmp_path / "b.jsonl", (1e9, 1e9))
    cached = [read_split(files=[str(tmp_path / name)]).texts.cache_files for name in ("a.jsonl", "b.jsonl")]
    assert cached[0] == cached[1]
    (tmp_path / "c.txt").write_bytes(first.read_bytes())
    assert texts_of(tmp_path / "c.txt") == [first.read_text()]


def test_a_damaged_cache_is_written_again(tmp_path: Path) -> None:
    """Catches files without content, as a crash of the machine leaves them, that stop every later run."""
    path = write_rows(tmp_path / "a.jsonl", ["one", "two"])
    assert texts_of(path) == ["one", "two"]
    for suffix in (".arrow", ".json"):
        for file in (tmp_path / "cache" / "tfclm").glob(f"*{suffix}"):
            file.unlink()  # the mapping of the first reading stays as it is
            file.write_bytes(b"")
        assert texts_of(path) == ["one", "two"]


# Names of files


def test_the_given_name_says_how_a_link_is_read(tmp_path: Path) -> None:
    """Catches the name of a link's target in its place: the Hub's cache links to blobs without an extension."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    blob = tmp_path / "blobs" / "0a1b2c"
    for name, content in {
        "train.jsonl": b'{"text": "row"}\n',
        "zipped.JSONL.GZ": gzip.compress(b'{"text": "row"}\n'),
        "rows.csv": b"text\nrow\n",
    }.items():
        blob.write_bytes(content)
        link = tmp_path / "snapshot" / name
        link.symlink_to("../blobs/0a1b2c")
        split = read_split(files=[str(link)])
        assert list(split.texts["text"]) == ["row"]
        assert split.description["source"] == [str(link.parent.resolve() / name)]
        link.unlink()
    (tmp_path / "real.txt").write_text('{"text": "row"}\n')
    (tmp_path / "alias.jsonl").symlink_to("real.txt")
    assert texts_of(tmp_path / "alias.jsonl") == ["row"]
    assert texts_of(tmp_path / "real.txt") == ['{"text": "row"}\n']
    both = [str(tmp_path / "alias.jsonl"), str(tmp_path / "real.txt")]
    refused("twice", files=both)
    refused("is both", files=both[:1], validation_files=both[1:])


def test_what_is_no_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a pipe that is waited for, and a folder or dead link that a glob leaves out without a word."""
    write_rows(tmp_path / "good.jsonl", ["one"])
    everything = str(tmp_path / "*.jsonl")

    def both(name: str, *what: str) -> None:
        refused(*what, files=[str(tmp_path / name)])
        refused(*what, files=[everything])
        os.rename(tmp_path / name, tmp_path / f"{name}.done")

    (tmp_path / "part.jsonl").mkdir()
    both("part.jsonl", "part.jsonl is a directory", "part.jsonl/*.txt")
    os.mkfifo(tmp_path / "pipe.jsonl")
    both("pipe.jsonl", "pipe.jsonl is a pipe", "save its content to a file")
    with socket.socket(socket.AF_UNIX) as listening:
        monkeypatch.chdir(tmp_path)
        listening.bind("socket.jsonl")  # its name may not be long
        both("socket.jsonl", "socket.jsonl is a pipe, socket or device")
    (tmp_path / "dead.jsonl").symlink_to("gone.jsonl")
    both("dead.jsonl", "dead.jsonl links to gone.jsonl, which does not exist")
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    both("loop.jsonl", "loop.jsonl")
    (tmp_path / "folder").mkdir()
    assert texts_of(everything) == ["one"]
    refused("~no_such_user_/a.txt", files=["~no_such_user_/a.txt"])
    refused("File name too long", files=[f"{'x' * 300}.txt"])


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="the file that fails to be read is Linux'")
@pytest.mark.parametrize("name", ["train.txt", "train.jsonl", "train.csv.gz", "train.parquet", "folder"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    """Catches a traceback where reading fails: no permission, a network or a disk that is not available."""
    (tmp_path / "folder").mkdir()
    link = tmp_path / (f"{name}/train.jsonl" if name == "folder" else name)
    link.symlink_to("/proc/self/mem")
    where = {"dataset": str(tmp_path / name)} if name == "folder" else {"files": [str(link)]}
    refused(f"{link} cannot be read: Input/output error", **where)


EMPTY = {
    "nothing.txt": b"",
    "mark.txt": b"\xef\xbb\xbf",
    "blank.txt": b" \n\n\t\n",
    "nothing.jsonl": b"",
    "blank.jsonl": b"\n\n",
    "objects.jsonl": b"{}\n{}\n",
    "nulls.jsonl": b'{"text": null}\n{"text": []}\n',
    "nothing.json": b"",
    "array.json": b"[]",
    "objects.json": b"[{}]",
    "nothing.csv": b"",
    "header.csv": b"text\n",
    "lines.csv": b"\n\n",
    "rows.csv": b'text\n""\n',
    "nothing.txt.gz": b"",
    "zipped.jsonl.gz": gzip.compress(b""),
}


@pytest.mark.parametrize("one", [True, False], ids=["evaluate", "fit"])
@pytest.mark.parametrize("name", [*EMPTY, "nothing.parquet", "rows.parquet", "nulls.parquet"])
def test_a_file_that_holds_no_text_is_named(tmp_path: Path, name: str, one: bool) -> None:
    """Catches a file without text that is passed over, or that fails far from where it was read."""
    if name in EMPTY:
        (tmp_path / name).write_bytes(EMPTY[name])
    else:
        rows = {"nothing": None, "rows": [], "nulls": [None, None]}[name.removesuffix(".parquet")]
        table = pa.table({"text": pa.array(rows or [], pa.string() if not rows else pa.null())})
        pq.write_table(table, tmp_path / name)
        if rows is None:
            (tmp_path / name).write_bytes(b"")
    good = write_rows(tmp_path / "good.jsonl", ["one", "two"])
    said = "0 bytes" if name == "nothing.parquet" else "has no text"
    refused(str(tmp_path / name), said, one=one, files=[str(good), str(tmp_path / name)])
    if not one:
        refused(str(tmp_path / name), said, files=[str(good)], validation_files=[str(tmp_path / name)])


@pytest.mark.parametrize(
    "name", ["nothing.txt", "nothing.jsonl", "nothing.csv", "header.csv", "array.json", "none", "saved", "nulls.jsonl"]
)
def test_a_dataset_that_holds_no_text_is_named(tmp_path: Path, name: str) -> None:
    """Catches what the library says of rows that are not there: IndexError, StopIteration, talk of features."""
    folder = tmp_path / "folder"
    if name == "saved":
        datasets.Dataset.from_dict({"text": []}).save_to_disk(folder)
    else:
        folder.mkdir()
        if name != "none":
            (folder / f"train.{name.rpartition('.')[2]}").write_bytes(EMPTY[name])
    said = {"none": "any data files", "nulls.jsonl": "every row of column text"}.get(name, "has no text")
    refused(str(folder), said, dataset=str(folder))
    refused(str(folder), said, one=True, dataset=str(folder), split="train")


def test_compressed_text_under_another_name(tmp_path: Path) -> None:
    """Catches advice to convert the encoding of a file that is compressed."""
    (tmp_path / "a.jsonl").write_bytes(gzip.compress(b'{"text": "one"}'))
    refused("a.jsonl is compressed with gzip", "ends in .gz", files=[str(tmp_path / "a.jsonl")])


# For ENOSYS, some versions of filelock have locks of another kind to fall back on.
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_cache_without_file_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Catches advice about the data where the place of the cache is to blame. Local files need no lock."""

    def flock(handle: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    (tmp_path / "folder").mkdir()
    path = write_rows(tmp_path / "folder" / "train.jsonl", ["one"])
    assert texts_of(path) == ["one"]
    what = ("has no file locks", "set HF_DATASETS_CACHE to a directory on a local disk")
    refused(*what, one=True, dataset=str(path.parent), split="train")


def test_no_room_for_the_cache(tmp_path: Path) -> None:
    """Catches a traceback where the disk that holds the cache is full."""
    path = write_rows(tmp_path / "a.txt", ["x" * 1000] * 5000)
    code = (
        "import resource, signal, sys, datasets, tfclm.corpus, tfclm.errors; "
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        "try: tfclm.corpus.read_split(files=sys.argv[1:])\n"
        "except tfclm.errors.InputError as error: print(error)"
    )
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, env=environment)
    assert "the cache " in done.stdout, done.stderr
    assert "HF_DATASETS_CACHE to a writable directory" in done.stdout
    assert [file.name for file in (tmp_path / "cache" / "tfclm").iterdir()] == []


def test_failed_read_leaves_no_half_written_cache(tmp_path: Path) -> None:
    """Catches a broken file whose first rows are taken for all of it on the second try."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": oops}\n', encoding="utf-8")
    for _ in range(2):
        refused("line 2", files=[str(path)])
    assert [file.name for file in (tmp_path / "cache" / "tfclm").iterdir()] == []


def test_caching_can_be_turned_off(tmp_path: Path) -> None:
    """Catches text that stays on disk although datasets' caching is disabled."""
    path = write_rows(tmp_path / "a.jsonl", ["one", "two"])
    datasets.disable_caching()
    try:
        assert list(read_split(files=[str(path)]).texts["text"]) == ["one", "two"]
    finally:
        datasets.enable_caching()
    assert not (tmp_path / "cache" / "tfclm").exists()


# Columns


def save_eli5(folder: Path, layout: str) -> dict[str, object]:
    """The arguments that read ELI5, kept in one of the layouts that occur."""
    if layout == "jsonl":
        path = folder / "eli5.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in ELI5), encoding="utf-8")
        return {"files": [str(path)]}
    rows = ELI5
    if layout == "list of structs":
        rows = []
        for row in ELI5:
            answers = row["answers"]
            columns = zip(answers["a_id"], answers["text"], answers["score"], strict=True)
            rows.append(
                row | {"answers": [dict(zip(("a_id", "text", "score"), each, strict=True)) for each in columns]}
            )
    dataset = datasets.Dataset.from_list(rows)
    if layout == "parquet":
        dataset.to_parquet(folder / "eli5.parquet")
        return {"files": [str(folder / "eli5.parquet")]}
    if layout == "flattened":
        dataset = dataset.flatten()
    dataset.save_to_disk(folder / "eli5")
    return {"dataset": str(folder / "eli5"), "split": "train"}


@pytest.mark.parametrize("layout", ["struct of lists", "list of structs", "flattened", "jsonl", "parquet"])
def test_nested_answers_of_eli5(tmp_path: Path, layout: str) -> None:
    """Catches a nested column that is not found, or answers in separate rows instead of joined."""
    split = read_split(**save_eli5(tmp_path, layout), text_column="answers.text")
    assert list(split.texts["text"]) == ANSWERS
    assert split.texts.column_names == ["text"]


@pytest.mark.parametrize("layout", ["struct of lists", "list of structs", "jsonl", "parquet"])
def test_missing_column_lists_those_there_are(tmp_path: Path, layout: str) -> None:
    """Catches a KeyError, or a list of columns that leaves out the nested ones."""
    where = save_eli5(tmp_path, layout)
    refused("no column answer.text", "title", "answers.text", "answers.a_id", **where, text_column="answer.text")
    refused("no column answers.texts", "answers.text", **where, text_column="answers.texts")


@pytest.mark.parametrize("layout", ["struct of lists", "list of structs", "jsonl", "parquet"])
def test_column_that_is_not_text(tmp_path: Path, layout: str) -> None:
    """Catches numbers that are trained on as text."""
    where = save_eli5(tmp_path, layout)
    refused("answers.score", "not text", **where, text_column="answers.score")
    refused("answers", "not text", **where, text_column="answers")


TEXT_TYPES = [
    pa.large_string(),
    pa.string_view(),
    pa.dictionary(pa.int8(), pa.string()),
    pa.list_(pa.dictionary(pa.int8(), pa.large_string())),
]


@pytest.mark.parametrize("kind", TEXT_TYPES, ids=str)
def test_text_of_every_arrow_type(tmp_path: Path, kind: pa.DataType) -> None:
    """Catches text refused as no text because another program wrote it, such as pandas with its categories."""
    texts = ["one", None, "two", "one"]
    nested = pa.types.is_list(kind)
    column = pa.array([[text] for text in texts] if nested else texts, kind)
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    assert texts_of(tmp_path / "a.parquet") == ["one", "two", "one"]
    if not nested:
        datasets.Dataset(pa.table({"text": column})).save_to_disk(tmp_path / "saved")
        split = read_split(dataset=str(tmp_path / "saved"), split="train")
        assert list(split.texts["text"]) == ["one", "two", "one"]


def test_column_that_is_there_twice(tmp_path: Path) -> None:
    """Catches the first of two columns of one name taken for the text."""
    (tmp_path / "a.csv").write_text("text,id,text\none,1,two\n")
    pq.write_table(pa.table([["one"], ["two"]], names=["text", "text"]), tmp_path / "a.parquet")
    for name in ("a.csv", "a.parquet"):
        refused(f"{name} has column text twice", files=[str(tmp_path / name)], one=True)


def test_missing_column_of_csv(tmp_path: Path) -> None:
    """Catches the first column taken for the one asked for."""
    path = write_rows(tmp_path / "a.csv", ["one", "two"])
    refused("a.csv has no column body", "id, text", files=[str(path)], text_column="body")


def test_json_rows_without_the_column_count_as_null(tmp_path: Path) -> None:
    """Catches one row without the key that ends a long run."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"other": 1}\n\n{"text": "two"}\n', encoding="utf-8")
    split = read_split(files=[str(path)])
    assert list(split.texts["text"]) == ["one", "two"]
    assert split.description["dropped_rows"] == 1


# Datasets and their splits


@pytest.fixture
def saved(tmp_path: Path) -> str:
    """A saved dataset with the split names of ELI5."""

    def part(name: str, rows: int) -> datasets.Dataset:
        return datasets.Dataset.from_dict({"text": [f"{name} {i}" for i in range(rows)], "n": list(range(rows))})

    datasets.DatasetDict(
        train_asks=part("train", 20),
        validation_asks=part("validation", 5),
        test_asks=part("test", 4),
        extra=part("extra", 3),
    ).save_to_disk(tmp_path / "saved")
    return str(tmp_path / "saved")


def test_own_validation_split_goes_with_the_train_split(saved: str) -> None:
    """Catches validation on training rows when the dataset has a validation split."""
    texts = read(dataset=saved, split="train_asks[:5]")
    assert list(texts.train["text"]) == [f"train {i}" for i in range(5)]
    assert list(texts.validation["text"]) == [f"validation {i}" for i in range(5)]
    assert texts.description["validation"] == "split validation_asks (the dataset's own)"
    assert (texts.description["train_rows"], texts.description["validation_rows"]) == (5, 5)
    assert texts.description["split"] == "train_asks[:5]"
    json.dumps(texts.description)


def test_test_split_is_validation_when_there_is_no_other(tmp_path: Path) -> None:
    """Catches a dataset of train and test that loses a tenth of its training rows."""
    part = datasets.Dataset.from_dict({"text": ["a", "b", "c"]})
    datasets.DatasetDict(train=part, test=part).save_to_disk(tmp_path / "saved")
    texts = read(dataset=str(tmp_path / "saved"))
    assert (len(texts.train), len(texts.validation)) == (3, 3)


def test_explicit_validation_beats_the_own_split(saved: str, tmp_path: Path) -> None:
    """Catches a flag that is silently ignored."""
    texts = read(dataset=saved, split="train_asks", validation_split="test_asks[:2]+extra[:1]")
    assert list(texts.validation["text"]) == ["test 0", "test 1", "extra 0"]
    path = write_rows(tmp_path / "v.jsonl", ["mine"])
    texts = read(dataset=saved, split="train_asks", validation_files=[str(path)])
    assert list(texts.validation["text"]) == ["mine"]


def test_splits_that_overlap_are_refused(saved: str) -> None:
    """Catches a perplexity on rows that were trained on."""
    refused("shares 5 rows", dataset=saved, split="train_asks[:10]", validation_split="train_asks[5:15]")
    refused("shares 20 rows", dataset=saved, split="train_asks+extra", validation_split="train_asks")
    texts = read(dataset=saved, split="train_asks[:75%]", validation_split="train_asks[75%:]")
    assert list(texts.train["text"]) + list(texts.validation["text"]) == [f"train {i}" for i in range(20)]


def test_unknown_split_lists_those_there_are(saved: str) -> None:
    """Catches a KeyError where the name of the split is all that is missing."""
    refused("`train_split` train ", "train_asks, validation_asks, test_asks, extra", dataset=saved, split="train")
    refused("`validation_split` dev ", "validation_asks", dataset=saved, split="train_asks", validation_split="dev")
    refused("`split` dev ", "validation_asks", dataset=saved, split="dev", one=True)
    refused("`train_split` train_asks[: ", dataset=saved, split="train_asks[:")


@pytest.mark.parametrize("rows", ["[:0]", "[4:4]", "[4:3]", "[20:]", "[30:40]", "[50%:50%]"])
def test_split_without_rows(saved: str, rows: str) -> None:
    """Catches an IndexError for rows beyond the last, and part of an expression that adds nothing."""
    refused(f"`train_split` train_asks{rows} selects none of the 20 rows", dataset=saved, split=f"train_asks{rows}")
    refused("selects none of the 20", dataset=saved, split=f"extra+train_asks{rows}")
    refused(f"`split` train_asks{rows} selects none", dataset=saved, split=f"train_asks{rows}", one=True)
    refused(
        f"`validation_split` train_asks{rows} selects none",
        dataset=saved,
        split="extra",
        validation_split=f"train_asks{rows}",
    )


def test_saved_dataset_without_splits(tmp_path: Path) -> None:
    """Catches a folder of save_to_disk that only opens when it holds a DatasetDict."""
    datasets.Dataset.from_dict({"text": ["a", None, " ", "b"]}).save_to_disk(tmp_path / "saved")
    split = read_split(dataset=str(tmp_path / "saved"), split="train")
    assert list(split.texts["text"]) == ["a", "b"]
    assert split.description["dropped_rows"] == 2


@pytest.mark.parametrize("flag", ["dataset_config", "revision"])
def test_what_only_a_hub_dataset_has_is_refused_elsewhere(saved: str, tmp_path: Path, flag: str) -> None:
    """Catches a configuration or a revision that is silently ignored: the text would be another than was asked for."""
    option = {"dataset_config": "`dataset_config`", "revision": "`dataset_revision`"}[flag]
    for one in (True, False):
        refused(f"{option} x is for datasets of the Hub", saved, dataset=saved, **{flag: "x"}, one=one)
        refused(option, "python-docs", dataset="python-docs", **{flag: "x"}, one=one)
        refused(option, files=[str(write_rows(tmp_path / "a.jsonl", ["a", "b"]))], **{flag: "x"}, one=one)


def test_folder_of_data_files_opens_as_a_hub_dataset_does(tmp_path: Path) -> None:
    """Catches a load_dataset call whose splits or columns are not those of the repository."""
    folder = tmp_path / "repo"
    folder.mkdir()
    write_rows(folder / "train.jsonl", ["a", "b", "c"])
    write_rows(folder / "test.jsonl", ["d"])
    texts = read(dataset=str(folder))
    assert list(texts.train["text"]) == ["a", "b", "c"]
    assert list(texts.validation["text"]) == ["d"]
    refused("`dataset_revision` main", dataset=str(folder), revision="main")


def test_script_dataset_names_the_way_out(tmp_path: Path) -> None:
    """Catches datasets' RuntimeError passed on without saying what to do instead."""
    folder = tmp_path / "eli5_category"
    folder.mkdir()
    (folder / "eli5_category.py").write_text("raise SystemExit\n", encoding="utf-8")
    refused("refs/convert/parquet", "dany0407/eli5_category", dataset=str(folder))


def test_dataset_that_cannot_be_reached(tmp_path: Path) -> None:
    """Catches a traceback of twenty lines for a name that is mistyped, or a machine that is offline."""
    refused("nobody/no-such-dataset", dataset="nobody/no-such-dataset")
    refused("no-such-dataset-either", dataset="no-such-dataset-either")


def test_dataset_of_empty_rows(tmp_path: Path) -> None:
    """Catches a run that starts on no text at all."""
    datasets.Dataset.from_dict({"text": ["", None, " "]}).save_to_disk(tmp_path / "saved")
    refused("every row of column text in `train_split` train", dataset=str(tmp_path / "saved"))


# What is held out


def test_hold_out_is_a_seeded_partition_in_order(tmp_path: Path) -> None:
    """Catches a document in both parts, in neither, or another draw on the second run."""
    rows = [f"row {i}" for i in range(100)]
    path = str(write_rows(tmp_path / "a.jsonl", rows))
    one, two, other = (read(files=[path], validation_fraction=0.13, seed=seed) for seed in (1, 1, 2))
    train, validation = list(one.train["text"]), list(one.validation["text"])
    assert len(validation) == 13
    assert sorted(train + validation) == sorted(rows)
    assert [train, validation] == [[row for row in rows if row in part] for part in (train, validation)]
    assert list(two.validation["text"]) == validation
    assert list(other.validation["text"]) != validation
    assert one.description["validation"] == "0.13 of the documents, drawn with seed 1"


def test_hold_out_keeps_one_document_on_each_side(tmp_path: Path) -> None:
    """Catches an empty part when a fraction of few documents rounds to none or to all."""
    path = str(write_rows(tmp_path / "a.jsonl", ["a", "b"]))
    for fraction in (0.01, 0.99):
        texts = read(files=[path], validation_fraction=fraction)
        assert (len(texts.train), len(texts.validation)) == (1, 1)


def test_too_little_to_hold_out(tmp_path: Path) -> None:
    """Catches a validation set that is empty, or the training text itself."""
    path = str(write_rows(tmp_path / "a.jsonl", ["only"]))
    refused("1 document", "`validation_file`", files=[path])
    for fraction in (0.0, 1.0, -0.5):
        refused("`validation_fraction`", files=[path], validation_fraction=fraction)


def test_validation_files(tmp_path: Path) -> None:
    """Catches validation files that are ignored, or that are the training files."""
    one, two = (str(write_rows(tmp_path / name, [name])) for name in ("a.jsonl", "b.jsonl"))
    texts = read(files=[one], validation_files=[two])
    assert (list(texts.train["text"]), list(texts.validation["text"])) == (["a.jsonl"], ["b.jsonl"])
    assert "b.jsonl" in texts.description["validation"]
    refused("a.jsonl", "both", files=[one], validation_files=[str(tmp_path / "*.jsonl")])
    refused("b.jsonl twice", files=[two, str(tmp_path / "b*")])


# Input that cannot be used


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"fine\nfine\nbad \xff byte\n", "a.txt, line 3 is not UTF-8"),
        ("a.txt", b"cut character \xc3", "a.txt, line 1 is not UTF-8"),
        ("a.csv", b'id,text\n1,one\n2,"t\nw\xe9o"\n', "a.csv, line 4 is not UTF-8"),
        ("a.jsonl", b'{"text": "one"}\n{"text": "\xff"}\n', "a.jsonl, line 2 is not UTF-8"),
        ("a.jsonl", b'{"text": "one"}\n\n{"text": "two"\n', "a.jsonl, line 3 is not JSON"),
        ("a.jsonl", b'{"text": "one"}\n["two"]\n', "a.jsonl, line 2 is not an object"),
        ("a.jsonl", b'{"text": "one"}\n{"text": 2}\n', "a.jsonl, line 2: column text is int, not text"),
        ("a.json", b'[\n{"text": "one"},\n{"text": oops}\n]', "a.json, line 3 is not JSON"),
        ("a.json", b'[\n{"text": "one"},\n{"text": "two"}\n', "a.json ends inside its array"),
        ("a.json", b'[\n{"text": "one"},\n\n 7]', "a.json, line 4 is not an object"),
        ("a.json", b'[{"text": "one"}]\n[{"text": "two"}]', "a.json, line 2 has content after the end of the array"),
        ("a.json", b'[\n{"text": "one"}\n]\n\n,', "a.json, line 5 has content after the end of the array"),
        ("a.json", b'[{"text": "one"}]' + b" " * (3 << 20) + b"\nx", "a.json, line 2 has content after the end"),
        ("a.jsonl", b'{"text": "one"}\n{"text": "\\ud83d"}\n', "a.jsonl, line 2: column text has half of a surrogate"),
        ("a.json", b'[{"text": "one"},\n{"text": "\\ude00."}]', "a.json, line 2: column text has half of a surrogate"),
        ("a.jsonl", b'{"text": "one"}\n{"text": ' + b"[" * 100_000, "a.jsonl, line 2 is nested too deeply"),
        ("a.json", b'[{"text": "one"},\n' + b"[" * 100_000, "a.json, line 2 is nested too deeply"),
        ("a.jsonl", b'{"text": ' + b"[" * 3_000 + b"]" * 3_000 + b"}", "a.jsonl, line 1 is nested too deeply"),
        ("a.jsonl", b'{"a":' * 900 + b"1" + b"}" * 900, "a.jsonl has no column text: it has a.a"),
        ("a.csv", b"id,text\n1,one\n2,two,three\n", "a.csv, line 3 has 3 fields where the header has 2"),
        ("a.csv", b'id,text\n1,"never closed\n\n', "a.csv, line 3 is not CSV"),
        ("a.parquet", b"PAR1 no", "a.parquet is not a readable parquet file"),
        ("a.txt.gz", b"plain", "a.txt.gz is not a complete gzip file"),
        ("a.txt.gz", gzip.compress(b"cut off" * 99, mtime=0)[:-9], "a.txt.gz is not a complete gzip file"),
        ("a.docx", b"x", "a.docx has an unknown file type: give .txt, .jsonl"),
        ("a", b"x", "a has an unknown file type"),
        ("a.gz", b"x", "a.gz has an unknown file type"),
        ("a.parquet.gz", b"x", "a.parquet.gz has an unknown file type"),
        ("a.txt", b"", "a.txt has no text"),
        ("a.txt", b"\n \n", "a.txt has no text"),
        ("a.jsonl", b"", "a.jsonl has no text"),
        ("a.json", b"[]", "a.json has no text"),
        ("a.csv", b"", "a.csv has no text"),
        ("a.csv", b"text\n", "a.csv has no text"),
        ("a.jsonl", b'{"text": null}\n{"text": " "}\n', "a.jsonl has no text: its 2 rows are empty"),
    ],
)
def test_bad_file_is_named_with_its_line(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    """Catches errors of the parsers that do not say which file and which line."""
    (tmp_path / name).write_bytes(content)
    # As deep as a parser goes, finalizers of what other tests have left would fail too.
    gc.disable()
    try:
        refused(says, files=[str(tmp_path / name)], one=True)
    finally:
        gc.enable()


def test_file_that_does_not_exist(tmp_path: Path) -> None:
    """Catches a glob that matches nothing and a mistyped path taken for an empty corpus."""
    refused("no such file", "gone.txt", files=[str(tmp_path / "gone.txt")])
    refused("no file matches", "*.txt", files=[str(tmp_path / "*.txt")])
    refused("is a directory", "*.txt", files=[str(tmp_path)])


@pytest.mark.parametrize("home", ["file/cache", "/proc/nowhere/cache"])
def test_cache_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: str) -> None:
    """Catches a traceback where HF_HOME lies below a file, or in a place that nothing can be written to."""
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / home)
    refused("cache", home, "HF_HOME", files=[str(write_rows(tmp_path / "a.jsonl", ["a", "b"]))])


def test_source_must_be_given_once(tmp_path: Path) -> None:
    """Catches one of two sources that is silently ignored."""
    path = str(write_rows(tmp_path / "a.jsonl", ["a", "b"]))
    refused("give `dataset` or `train_file`")
    refused("give `dataset` or `file`", one=True)
    refused("are mutually exclusive", dataset="x", files=[path])
    refused("are mutually exclusive", dataset="x", validation_split="test", validation_files=[path])
    refused("needs `dataset`", files=[path], validation_split="test")
    assert re.search(r"is a file: give it as `train_file` .*a\.jsonl", refused(dataset=path))


def test_a_text_that_occurs_twice_is_on_one_side(tmp_path: Path) -> None:
    """Catches validation on a text that was trained on, because a crawl holds it twice, differently spaced."""
    path = tmp_path / "twice.jsonl"
    path.write_text(
        "".join(json.dumps({"text": f"{' ' * (i // 80)}text {i % 40}{chr(10) * (i // 40)}"}) + "\n" for i in range(200))
    )
    for seed in range(5):
        texts = read(files=[str(path)], seed=seed)
        train, validation = ({text.strip() for text in part["text"]} for part in (texts.train, texts.validation))
        assert len(validation) == 4
        assert not train & validation
        assert len(texts.train) + len(texts.validation) == 200
