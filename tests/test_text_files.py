"""Text files as users have them: gzipped or damaged, with other ends of lines and encodings, oddly named."""

from __future__ import annotations

import gzip
import os
import re
from pathlib import Path

import pytest

from autodropout.reproduce.text_files import lines_of
from autodropout.reproduce.text_files import printable
from autodropout.reproduce.text_files import read_text

PACKED = gzip.compress(b"a sentence\n" * 100)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("data", [b"a b\nc\n", b"a b\r\nc\r\n", b"\xef\xbb\xbfa b\nc\n"])
def test_ends_of_lines_and_byte_order_marks_are_no_text(data: bytes, packed: bool, tmp_path: Path) -> None:
    (tmp_path / ("t.txt.gz" if packed else "t.txt")).write_bytes(gzip.compress(data) if packed else data)
    assert read_text(tmp_path, "t.txt") == "a b\nc\n"


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("", []),
        ("\n", [""]),
        ("a", ["a"]),
        ("a\n\n b\n", ["a", "", " b"]),
        ("a\u2028b\x85c\x0cd\x1ce\n", ["a\u2028b\x85c\x0cd\x1ce"]),
    ],
)
def test_lines(text: str, lines: list[str]) -> None:
    assert lines_of(text) == lines


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (PACKED[:-20], "cannot read {path}: Compressed file ended"),
        (PACKED[:15] + b"XXXXXX" + PACKED[21:], "cannot read {path}: "),
        (b"no gzip", "cannot read {path}: Not a gzipped file"),
        (gzip.compress("é".encode("latin-1")), "cannot read {path}: 'utf-8' codec can't decode byte 0xe9"),
    ],
    ids=["truncated", "changed", "other", "latin-1"],
)
def test_a_damaged_file_is_named(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "t.txt.gz"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=re.escape(message.format(path=path))) as caught:
        read_text(tmp_path, "t.txt")
    assert "\n" not in str(caught.value)


def test_another_encoding_is_named(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes(b"a\nb \xe9\n")
    with pytest.raises(ValueError, match=re.escape(f"cannot read {tmp_path / 't.txt'}: 'utf-8' codec can't decode")):
        read_text(tmp_path, "t.txt")


def test_names_print() -> None:
    assert printable(os.fsdecode(b"n\xff")) == "n\N{REPLACEMENT CHARACTER}"
    assert printable("Büsche $1") == "Büsche $1"
