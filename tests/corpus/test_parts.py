"""Parts of files: each document once, whatever the size of the parts."""

from __future__ import annotations

import json
import random
from pathlib import Path

import datasets
import pytest

from tfclm.corpus.formats import read_documents
from tfclm.corpus.parts import split_file
from tfclm.errors import InputError

PARAGRAPHS = ["One line.", "Two\nlines.", "  Indented.", "Ünïcödé, 日本語.", "x" * 300, "A\r\nB", "\ttab"]


def read_parts(path: Path, part_bytes: int) -> list[str | None]:
    """The documents of all parts of a file."""
    parts = list(split_file(str(path), path.stat().st_size, part_bytes))
    return [text for part in parts for text in read_documents(part, "text")]


@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".csv", ".jsonl.gz"])
@pytest.mark.parametrize("seed", range(5))
def test_parts_hold_each_document_once(tmp_path: Path, kind: str, seed: int) -> None:
    """A document that is lost, doubled or cut where one part ends and the next begins, or a byte order mark amid."""
    draw = random.Random(seed)
    texts = [draw.choice(PARAGRAPHS) for _ in range(40)]
    path = tmp_path / f"a{kind}"
    if kind == ".txt":
        gaps = ["\n\n", "\n\n\n", "\n \t\n", "\r\n\r\n"]
        path.write_bytes(("﻿" + "".join(text + draw.choice(gaps) for text in texts)).encode())
    else:
        import gzip

        rows = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
        if kind == ".csv":
            rows = "text\n" + "".join(json.dumps(text.replace("\n", " "), ensure_ascii=False) + "\n" for text in texts)
        content = ("﻿" + rows).encode()
        path.write_bytes(gzip.compress(content) if kind.endswith(".gz") else content)
    whole = list(read_documents(path, "text"))
    assert len(whole) == 40
    for part_bytes in (1, 7, 64, 500, 10**6):
        assert read_parts(path, part_bytes) == whole, part_bytes


@pytest.mark.parametrize("gap", ["\n", ""])
def test_text_without_paragraphs_is_cut_at_lines_or_characters(tmp_path: Path, gap: str) -> None:
    """A file without blank lines that the first part reads to its end, or whose characters are cut in two."""
    path = tmp_path / "a.txt"
    text = "".join(f"Zeile {i} – äöü{gap}" for i in range(120_000))
    path.write_text(text, encoding="utf-8")
    parts = list(split_file(str(path), path.stat().st_size, 500_001))
    found = ["".join(read_documents(part, "text")) for part in parts]
    assert "".join(found) == text
    assert len(parts) == 6
    assert all(found[:3])
    assert all(each.endswith(gap) for each in found if each)


def test_row_groups_are_parts(tmp_path: Path) -> None:
    """Rows of a .parquet file that two parts read, or none."""
    path = tmp_path / "a.parquet"
    texts = [f"text {i}" for i in range(100)]
    datasets.Dataset.from_dict({"text": texts}).to_parquet(str(path), batch_size=10)
    parts = list(split_file(str(path), path.stat().st_size, 300))
    assert len(parts) > 2
    assert [text for part in parts for text in read_documents(part, "text")] == texts


def test_errors_name_the_line_of_the_file(tmp_path: Path) -> None:
    """A line number that counts from the beginning of the part, where nobody finds anything wrong."""
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": "word " * 20})] * 50
    lines[36] = "{"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(InputError, match="line 37 is not JSON"):
        read_parts(path, 500)


def test_part_without_the_column_is_no_error(tmp_path: Path) -> None:
    """A file that is refused because no row of one of its parts has the column, which rows of other parts have."""
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [{"text": "a"}] * 5 + [{"title": "b"}] * 5))
    assert read_parts(path, 20) == ["a"] * 5 + [None] * 5
