"""The journal: what a writer leaves behind in every kind of accident, and what a reader makes of it."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pytest

from autodropout.search.journal import Journal
from autodropout.search.journal import JournalError
from autodropout.search.journal import read_header
from autodropout.search.journal import read_journal

RECORDS = [
    {"record": "ask", "trial": 0, "choices": [0, 1, 2], "log_prob": -1.1000000000000001, "update": 0},
    {"record": "tell", "trial": 0, "metric": 0.1 + 0.2, "seconds": 1.5, "stopped": None},
    {"record": "fail", "trial": 1, "message": 'a "quoted", "crc": "00000000"}\nline, ä', "final": True},
]


def run(folder: Path, records: list[dict[str, Any]] = RECORDS) -> Path:
    """A journal with a header and these records; returns its path."""
    journal, _ = Journal.create(folder, {"trials": 3})
    with journal:
        for record in records:
            journal.append(record)
    return journal.path


def without_time(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key != "time"} for record in records]


WHOLE = [{"record": "run", "schema": 1, "trials": 3}, *RECORDS]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    run(tmp_path / "new" / "run")
    journal, records = Journal.open(tmp_path / "new" / "run")
    with journal:
        assert without_time(records) == WHOLE
        assert read_journal(tmp_path / "new" / "run") == records  # while it is open
        assert (journal.length, journal.size, journal.notices) == (4, journal.path.stat().st_size, [])
    assert read_header(tmp_path / "new" / "run") == records[0]


def test_create_and_append_return_what_is_read_later(tmp_path: Path) -> None:
    journal, header = Journal.create(tmp_path, {"trials": 3})
    with journal:
        written = [header, journal.append(RECORDS[0]), journal.append(RECORDS[1])]
    assert read_journal(tmp_path) == written
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", header["time"])


def test_lines_are_as_documented(tmp_path: Path) -> None:
    """Read without the journal's code: record first, then the time, the crc of all before it last."""
    for line in run(tmp_path).read_bytes().splitlines():
        fields = json.loads(line)
        names = list(fields)
        assert names[:2] == ["record", "time"]
        assert names[-1] == "crc"
        body = line[: line.rindex(b', "crc": ')]
        assert int(fields["crc"], 16) == zlib.crc32(body)
    assert names != []


def test_pandas_reads_it(tmp_path: Path) -> None:
    frame = pandas.read_json(run(tmp_path), lines=True)
    assert list(frame["record"]) == ["run", "ask", "tell", "fail"]
    assert frame["metric"][2] == 0.1 + 0.2
    assert pandas.to_datetime(frame["time"]).is_monotonic_increasing


def test_an_existing_run_is_not_begun_again(tmp_path: Path) -> None:
    path = run(tmp_path)
    before = path.read_bytes()
    with pytest.raises(JournalError, match="exists: go on with it by resuming, or take another folder"):
        Journal.create(tmp_path, {})
    assert path.read_bytes() == before


def test_what_a_writer_left_before_its_first_record_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "lock").touch()
    (tmp_path / "journal.jsonl.tmp").write_bytes(b'{"record": "ru')
    with pytest.raises(JournalError, match="holds no search"):
        Journal.open(tmp_path)
    run(tmp_path)
    assert len(read_journal(tmp_path)) == 4


@pytest.mark.parametrize("read", [Journal.open, read_journal, read_header])
def test_folders_without_a_journal_are_refused(tmp_path: Path, read: Callable[[Path], Any]) -> None:
    with pytest.raises(JournalError, match="holds no search: there is no journal.jsonl in it"):
        read(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_every_torn_tail_is_cut_and_said(tmp_path: Path) -> None:
    """Cut anywhere in the last record, its newline included: the records before it remain, and can be added to."""
    path = run(tmp_path)
    content = path.read_bytes()
    start = content[:-1].rindex(b"\n") + 1
    for end in [*range(start, len(content), 10), *range(len(content) - 3, len(content))]:
        path.write_bytes(content[:end])
        assert without_time(read_journal(tmp_path)) == WHOLE[:3]
        assert path.read_bytes() == content[:end]  # reading changes nothing
        journal, records = Journal.open(tmp_path)
        with journal:
            assert without_time(records) == WHOLE[:3]
            assert path.read_bytes() == content[:start]
            assert bool(journal.notices) == (end > start)
            if end > start:
                assert journal.notices[0].startswith(f"cut an incomplete last line of {end - start} bytes")
            journal.append(RECORDS[2])
        assert without_time(read_journal(tmp_path)) == WHOLE


def test_every_flipped_bit_is_found_with_its_line(tmp_path: Path) -> None:
    """One bit of every byte. Only in the last newline it is a torn tail; elsewhere an error that changes nothing."""
    path = run(tmp_path, RECORDS[:2])
    content = path.read_bytes()
    for position in range(len(content) - 1):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        # A flipped newline joins two lines: the first of them is the one reported.
        line = content[:position].count(b"\n") + 1
        with pytest.raises(JournalError, match=f"line {line} of \\d of .* is damaged .* nothing was changed"):
            Journal.open(tmp_path) if position % 20 == 0 else read_journal(tmp_path)
        assert path.read_bytes() == damaged


def test_every_lost_byte_is_found(tmp_path: Path) -> None:
    path = run(tmp_path, RECORDS[:2])
    content = path.read_bytes()
    for position in range(0, len(content) - 1, 5):
        path.write_bytes(content[:position] + content[position + 1 :])
        with pytest.raises(JournalError, match="is damaged"):
            read_journal(tmp_path)


def test_the_way_out_that_the_message_names_works(tmp_path: Path) -> None:
    path = run(tmp_path)
    path.write_bytes(path.read_bytes().replace(b'"metric"', b'"matric"'))
    with pytest.raises(JournalError) as caught:
        Journal.open(tmp_path)
    command = re.search(r"\((head .*?), then (mv .*?)\)", str(caught.value))
    assert command is not None
    assert os.system(f"cd '{tmp_path}' && {command[1]} && {command[2]}") == 0
    assert without_time(read_journal(tmp_path)) == WHOLE[:2]


def test_other_schemas_are_named(tmp_path: Path) -> None:
    """Whatever the checks of its lines are."""
    path = tmp_path / "journal.jsonl"
    path.write_text('{"record": "run", "schema": 2, "check": "?"}\n')
    for read in (Journal.open, read_journal, read_header):
        with pytest.raises(JournalError, match="has schema 2, and this version of autodropout reads schema 1"):
            read(tmp_path)
    body = b'{"record": "run", "schema": 3'
    path.write_bytes(body + b', "crc": "%08x"}\n' % zlib.crc32(body))
    with pytest.raises(JournalError, match="has schema 3"):
        Journal.open(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{}", b"no journal"])
def test_files_without_a_whole_line_are_no_journals(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "journal.jsonl").write_bytes(content)
    with pytest.raises(JournalError, match="holds no whole line"):
        Journal.open(tmp_path)
    assert (tmp_path / "journal.jsonl").read_bytes() == content


@pytest.mark.parametrize("line", [b"\n", b"{}\n", b'[1, "crc"]\n', b"\x00" * 40 + b"\n"])
def test_lines_that_are_no_records_are_damage(tmp_path: Path, line: bytes) -> None:
    path = run(tmp_path)
    path.write_bytes(path.read_bytes() + line)
    with pytest.raises(JournalError, match="line 5 of 5"):
        Journal.open(tmp_path)


def test_a_second_writer_is_refused_in_any_process(tmp_path: Path) -> None:
    journal, _ = Journal.create(tmp_path, {})
    message = "another process is running this search .it holds .*lock"
    with journal:
        with pytest.raises(JournalError, match=message):
            Journal.open(tmp_path)
        with pytest.raises(JournalError, match=message):
            Journal.create(tmp_path, {})
        assert in_child(lambda: _refused(tmp_path)) == 0
    Journal.open(tmp_path)[0].close()


def _refused(folder: Path) -> None:
    with pytest.raises(JournalError, match="another process"):
        Journal.open(folder)


def in_child(work: Callable[[], object]) -> int:
    """Runs it in a fork; returns the wait status."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def test_the_lock_dies_with_its_process(tmp_path: Path) -> None:
    def die() -> None:
        Journal.create(tmp_path, {})
        os._exit(7)

    assert os.waitstatus_to_exitcode(in_child(die)) == 7
    journal, records = Journal.open(tmp_path)
    journal.close()
    assert len(records) == 1


def test_a_disk_that_is_really_full_leaves_a_journal_that_goes_on(tmp_path: Path) -> None:
    """A limit on the file's size lets a write succeed in part and then fail, as a full disk does."""
    path = run(tmp_path)
    size = path.stat().st_size

    def fill() -> None:
        journal, _ = Journal.open(tmp_path)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 30, resource.RLIM_INFINITY))
        with pytest.raises(OSError, match="the search stops here, and can be resumed") as caught:
            journal.append(RECORDS[0])
        assert caught.value.errno == errno.EFBIG
        assert caught.value.filename == str(path)
        assert path.stat().st_size == size
        with pytest.raises(ValueError, match="closed"):
            journal.append(RECORDS[0])

    assert in_child(fill) == 0
    journal, records = Journal.open(tmp_path)
    with journal:
        assert journal.notices == []
        assert without_time(records) == WHOLE
        journal.append(RECORDS[0])
    assert without_time(read_journal(tmp_path)) == [*WHOLE, RECORDS[0]]


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_failing_call_is_raised_with_its_reason_and_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    journal, _ = Journal.create(tmp_path, {"trials": 3})
    genuine, calls = getattr(os, call), []

    def failing(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 1:
            if call == "write":
                genuine(arguments[0], bytes(arguments[1])[:10])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return genuine(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(os, call, failing)
        with pytest.raises(OSError, match="No space left on device: the search stops here") as caught:
            journal.append(RECORDS[0])
    assert caught.value.errno == errno.ENOSPC
    reopened, records = Journal.open(tmp_path)  # the lock is free
    with reopened:
        assert reopened.notices == []
        assert without_time(records) == WHOLE[:1]


def test_numbers_that_json_lacks_are_refused_and_the_journal_goes_on(tmp_path: Path) -> None:
    journal, _ = Journal.create(tmp_path, {"trials": 3})
    with journal:
        with pytest.raises(ValueError, match="not JSON compliant"):
            journal.append({"record": "tell", "metric": float("nan")})
        journal.append(RECORDS[0])
    assert without_time(read_journal(tmp_path)) == WHOLE[:2]


def test_digests_are_of_prefixes_whoever_wrote_them(tmp_path: Path) -> None:
    journal, _ = Journal.create(tmp_path, {"trials": 3})
    with journal:
        first, size = journal.digest(), journal.size
        journal.append(RECORDS[0])
        assert journal.digest() != first
        assert journal.digest(size) == first
        last = journal.digest()
    reopened, _ = Journal.open(tmp_path)
    with reopened:
        assert reopened.digest() == last
        assert reopened.digest(size) == first


def test_a_record_is_on_disk_when_append_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal, _ = Journal.create(tmp_path, {"trials": 3})
    calls: list[tuple[str, int]] = []
    write, fsync = os.write, os.fsync
    monkeypatch.setattr(os, "write", lambda file, data: (calls.append(("write", file)), write(file, data))[1])
    monkeypatch.setattr(os, "fsync", lambda file: (calls.append(("fsync", file)), fsync(file))[1])
    with journal:
        journal.append(RECORDS[0])
        journal.append(RECORDS[1])
    assert [name for name, _ in calls] == ["write", "fsync"] * 2
    assert len({file for _, file in calls}) == 1
