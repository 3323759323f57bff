"""Text files of a corpus, gzipped or not, as users have them."""

from __future__ import annotations

import gzip
import os
import zlib
from pathlib import Path


def read_text(folder: Path, name: str) -> str:
    """The text of the file `name` in a folder, or of `name`.gz, which must be UTF-8. Lines end with "\\n".

    Raises:
        ValueError: neither is there, or it cannot be read; one line that names it.
        OSError: the system does not let it be read.
    """
    plain, packed = folder / name, folder / f"{name}.gz"
    path = plain if plain.exists() else packed
    if not path.exists():
        raise ValueError(f"data must have {name} or {name}.gz, got the folder {folder} without either")
    data = path.read_bytes()
    try:
        if path == packed:
            data = gzip.decompress(data)
        # Some editors begin a file with a byte order mark, which would be a part of the first word.
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except (EOFError, zlib.error, gzip.BadGzipFile, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error


def lines_of(text: str) -> list[str]:
    """Not `splitlines`, which also ends lines at characters that sentences have in them, such as U+2028."""
    *lines, last = text.split("\n")
    return [*lines, last] if last else lines


def printable(name: str) -> str:
    """The name of a file without bytes that are no UTF-8, which neither a terminal nor a plot takes."""
    return os.fsencode(name).decode("utf-8", "replace")
