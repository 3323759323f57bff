"""The journal of a search: everything that happened, one JSON object a line, durable before anyone acts on it.

    {"record": "run", "time": "2026-01-31T12:00:00.000Z", "schema": 1, ..., "crc": "9ae0daaf"}
    {"record": "ask", "time": ..., "trial": 0, "choices": [1, 0, 4], "log_prob": -3.2, "update": 0, "crc": ...}

The file is only ever appended to. `crc` is the CRC-32 of the line before `, "crc"`, so that a flipped byte is found
wherever it is. A line that the death of the writer or a full disk left incomplete can only be the last one: it is cut,
and that is said. Anything else that is wrong with the file is an error, and the file is left as it is. For reading,
`pandas.read_json(path, lines=True)` is enough.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from datetime import datetime
from datetime import timezone
from pathlib import Path
from typing import Any

from filelock import FileLock
from filelock import Timeout

from ..files import sync_folder
from ..files import write_atomically

SCHEMA = 1
FILE = "journal.jsonl"
LOCK = "lock"

Record = dict[str, Any]

_CRC = len(', "crc": "00000000"}')  # bytes of the end of a line


class JournalError(ValueError):
    """The journal is missing, in use, of another version or damaged; the message is one line for the user."""


class Journal:
    """The journal of the run in `folder`, locked for writing until `close`. Made by `create` or `open`.

    Attributes:
        path: the file.
        length: records in it.
        size: their bytes.
        notices: what was repaired when it was opened, one sentence each.
    """

    def __init__(self, folder: Path, lock: FileLock) -> None:
        self.path = folder / FILE
        self.length = 0
        self.size = 0
        self.notices: list[str] = []
        self._lock = lock
        self._digest = hashlib.sha256()
        self._file: int | None = None

    @classmethod
    def create(cls, folder: Path, header: Record) -> tuple[Journal, Record]:
        """A new journal, with its first record: `header` and the schema. The folder is made if needed.

        The file appears with its first record in it, so that there is no journal without one.

        Raises:
            JournalError: there is a journal already, or another process is about to write one.
            OSError: it cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        journal = cls(folder, _locked(folder))
        try:
            if journal.path.exists():
                raise JournalError(f"{journal.path} exists: go on with it by resuming, or take another folder")
            record, line = _stamped({"record": "run", "schema": SCHEMA, **header})
            write_atomically(journal.path, lambda file: file.write(line))
            sync_folder(folder.resolve().parent)
            journal._begin(1, line)
        except BaseException:
            journal.close()
            raise
        return journal, record

    @classmethod
    def open(cls, folder: Path) -> tuple[Journal, list[Record]]:
        """The journal of a run that goes on, and its records. An incomplete last line is cut.

        Raises:
            JournalError: there is none, another process is writing it, or it is of another schema or damaged.
            OSError: it cannot be read or written.
        """
        if not (folder / FILE).is_file():
            raise JournalError(f"{folder} holds no search: there is no {FILE} in it")
        journal = cls(folder, _locked(folder))
        try:
            content = journal.path.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            records = list(_parse(journal.path, whole))
            journal._begin(len(records), whole)
            torn = len(content) - len(whole)
            if torn:
                journal._truncate()
                journal.notices.append(f"cut an incomplete last line of {torn} bytes, {_excerpt(content[-torn:])}")
        except BaseException:
            journal.close()
            raise
        return journal, records

    def append(self, record: Record) -> Record:
        """Writes a record, and returns it with its time when it is on disk.

        Raises:
            OSError: it cannot be written, for example as the disk is full. What was written of it is cut again: the
                journal is as before, but closed.
            ValueError: the journal is closed, or the record holds a number that JSON does not have (NaN, infinity).
        """
        if self._file is None:
            raise ValueError(f"the journal must be open to be written, but {self.path} is closed")
        stamped, line = _stamped(record)
        try:
            rest = memoryview(line)
            while rest:
                rest = rest[os.write(self._file, rest) :]
            os.fsync(self._file)
        except BaseException as error:
            try:
                self._truncate()
            finally:
                self.close()
            if isinstance(error, OSError):
                reason = f"{error.strerror}: the search stops here, and can be resumed when that is remedied"
                raise OSError(error.errno, reason, str(self.path)) from error
            raise
        self.length += 1
        self.size += len(line)
        self._digest.update(line)
        return stamped

    def digest(self, size: int | None = None) -> str:
        """SHA-256 (hex) of the first `size` bytes; None: of all of them."""
        if size is None:
            return self._digest.hexdigest()
        with open(self.path, "rb") as file:
            return hashlib.sha256(file.read(size)).hexdigest()

    def close(self) -> None:
        """Frees file and lock. May be called twice."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
        self._lock.release()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin(self, length: int, content: bytes) -> None:
        self.length, self.size = length, len(content)
        self._digest.update(content)
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | getattr(os, "O_BINARY", 0))

    def _truncate(self) -> None:
        """Cuts what follows the last whole record."""
        assert self._file is not None
        os.ftruncate(self._file, self.size)
        os.fsync(self._file)


def read_journal(folder: Path) -> list[Record]:
    """The records of a run that may be running: takes no lock, changes nothing, leaves an incomplete last line out.

    Raises:
        JournalError: there is none, or it is of another schema or damaged.
        OSError: it cannot be read.
    """
    path = folder / FILE
    if not path.is_file():
        raise JournalError(f"{folder} holds no search: there is no {FILE} in it")
    content = path.read_bytes()
    return list(_parse(path, content[: content.rfind(b"\n") + 1]))


def read_header(folder: Path) -> Record:
    """The first record of a run: its settings.

    Raises:
        JournalError, OSError: as `read_journal`.
    """
    path = folder / FILE
    if not path.is_file():
        raise JournalError(f"{folder} holds no search: there is no {FILE} in it")
    with open(path, "rb") as file:
        return next(_parse(path, file.readline()))


def _locked(folder: Path) -> FileLock:
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise JournalError(f"another process is running this search (it holds {folder / LOCK})") from None
    return lock


def _stamped(record: Record) -> tuple[Record, bytes]:
    """The record with its time, and its line."""
    now = datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    stamped = {"record": record["record"], "time": now, **record}
    body = json.dumps(stamped, allow_nan=False).encode()[:-1]
    return stamped, body + _crc(body) + b"\n"


def _crc(body: bytes) -> bytes:
    """The end of a line that begins with `body`."""
    return b', "crc": "%08x"}' % zlib.crc32(body)


def _parse(path: Path, content: bytes) -> Iterator[Record]:
    """The records of whole lines, without their crc."""
    lines = content.split(b"\n")[:-1]
    _check_schema(path, lines)
    for number, line in enumerate(lines, 1):
        body = line[:-_CRC]
        if line[-_CRC:] != _crc(body):
            raise JournalError(
                f"line {number} of {len(lines)} of {path} is damaged (its crc does not fit): {_excerpt(line)}; nothing "
                f"was changed. Restore the file from a copy; without one, what comes before can be kept by hand "
                f"(head -n {number - 1} {FILE} > kept, then mv kept {FILE}), and what comes after is lost"
            )
        record: Record = json.loads(body + b"}")
        yield record


def _check_schema(path: Path, lines: list[bytes]) -> None:
    """Before any crc: a file of another version may well have other lines. A damaged first line is left to the crc."""
    if not lines:
        raise JournalError(f"{path} holds no whole line: it is no journal")
    line = lines[0]
    if line[-_CRC:].startswith(b', "crc": ') and line[-_CRC:] != _crc(line[:-_CRC]):
        return
    try:
        header = json.loads(line)
        schema = header["schema"] if header["record"] == "run" else None
    except (ValueError, TypeError, KeyError):
        return
    if schema != SCHEMA:
        raise JournalError(f"{path} has schema {schema!r}, and this version of autodropout reads schema {SCHEMA}")


def _excerpt(line: bytes) -> str:
    return repr(line[:60]) + ("..." if len(line) > 60 else "")
