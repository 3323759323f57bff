"""Corpora: vocabulary, unknown words, ends of lines and splits, counted by hand."""

from __future__ import annotations

import gzip
import hashlib
import os
import re
from pathlib import Path

import datasets
import pytest
import torch

from autodropout.reproduce.corpus import open_corpus

DATA = os.environ.get("AUTODROPOUT_DATA")
TEXTS = {"train": "b a b\nb\n", "valid": "a c\n", "test": " b \n\na\n"}


def a_folder(path: Path, packed: bool = False) -> Path:
    for split, text in TEXTS.items():
        if packed:
            (path / f"{split}.txt.gz").write_bytes(gzip.compress(text.encode()))
        else:
            (path / f"{split}.txt").write_text(text)
    return path


@pytest.mark.parametrize("packed", [False, True])
def test_tokens_of_a_folder(tmp_path: Path, packed: bool) -> None:
    corpus = open_corpus(str(a_folder(tmp_path, packed)))
    # b thrice, <eos> twice, a once, <unk> never; equal counts in alphabetical order.
    assert corpus.words == ("b", "<eos>", "a", "<unk>")
    assert corpus.train.tolist() == [0, 2, 0, 1, 0, 1]
    assert corpus.valid.tolist() == [2, 3, 1]
    assert corpus.test.tolist() == [0, 1, 1, 2, 1]  # an empty line is a line
    assert corpus.start == 1
    assert corpus.title == tmp_path.name


def test_the_fingerprint_is_that_of_the_texts(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first = open_corpus(str(a_folder(tmp_path / "a"))).fingerprint
    other = a_folder(tmp_path / "b", packed=True)
    assert open_corpus(str(other)).fingerprint == first
    (other / "test.txt").write_text("a\n")  # which is taken before the gzipped one
    assert open_corpus(str(other)).fingerprint != first


def test_the_language_reference_of_python() -> None:
    corpus = open_corpus("pydoc")
    assert corpus.fingerprint == open_corpus("pydoc").fingerprint
    assert min(len(corpus.train), len(corpus.valid), len(corpus.test)) > 5000
    assert {"the", "python", "<unk>", "<eos>"} <= set(corpus.words)
    counts = corpus.train.bincount(minlength=len(corpus.words)).tolist()
    assert counts == sorted(counts, reverse=True)
    assert min(counts) >= 2
    for part in (corpus.train, corpus.valid, corpus.test):
        assert 0 <= int(part.min()) <= int(part.max()) < len(corpus.words)
        assert int(part[-1]) == corpus.start


def test_what_topics_share_is_measured_on_by_no_later_part(monkeypatch: pytest.MonkeyPatch) -> None:
    import pydoc_data.topics

    # Of ten paragraphs the first two are training text, the ninth is validation, the tenth test.
    first = ["shared one", "shared two", *"cdefgh", "one two", "two one"]
    second = ["one two", "two shared", *"cdefgh", "shared one", "one one"]
    third = ["one one", "two two", *"cdefgh", "two two two", "two two two"]
    topics = {str(i): "\n\n".join(paragraphs) for i, paragraphs in enumerate((first, second, third))}
    monkeypatch.setattr(pydoc_data.topics, "topics", topics)
    corpus = open_corpus("pydoc")

    def text(tokens: torch.Tensor) -> str:
        return " ".join(corpus.words[token] for token in tokens.tolist())

    assert text(corpus.train) == " <eos> ".join([*first[:2], *second[:2], *third[:2], ""]).rstrip()
    assert text(corpus.valid) == "two two two <eos>"
    assert text(corpus.test) == "two one <eos>"


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("train", r"data must have train.txt or train.txt.gz, got the folder"),
        (None, r"data must be 'pydoc', 'hub' or a folder"),
    ],
)
def test_a_folder_without_a_text_is_refused(tmp_path: Path, missing: str | None, message: str) -> None:
    folder = tmp_path / "none" if missing is None else a_folder(tmp_path)
    if missing is not None:
        (folder / f"{missing}.txt").unlink()
    with pytest.raises(ValueError, match=message):
        open_corpus(str(folder))


def test_a_text_without_words_is_refused(tmp_path: Path) -> None:
    (a_folder(tmp_path) / "valid.txt").write_text("")
    with pytest.raises(ValueError, match="valid must have at least 2 tokens, got 0"):
        open_corpus(str(tmp_path))


def test_rows_of_a_download_are_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the hub has them: a row ends with a newline, an empty one does not."""
    rows = {"train": [" b a b \n", "", " b \n"], "validation": [" a c \n"], "test": ["", " b \n"]}
    asked: list[tuple[str, ...]] = []

    def load_dataset(*name: str) -> dict[str, dict[str, list[str]]]:
        asked.append(name)
        return {split: {"text": lines} for split, lines in rows.items()}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    corpus = open_corpus("hub")
    assert asked == [("Salesforce/wikitext", "wikitext-2-v1")]
    assert corpus.words == ("<eos>", "b", "a", "<unk>")
    assert [part.tolist() for part in (corpus.train, corpus.valid, corpus.test)] == [
        [1, 2, 1, 0, 0, 1, 0],
        [2, 3, 0],
        [0, 1, 0],
    ]
    assert corpus.title == "WikiText-2"


def test_a_download_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*name: str) -> None:
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match="^cannot read WikiText-2 from Salesforce/wikitext: no network$"):
        open_corpus("hub")


@pytest.mark.skipif(
    not os.environ.get("AUTODROPOUT_HUB"), reason="downloads WikiText-2: set AUTODROPOUT_HUB=1 to allow it"
)
def test_hub() -> None:
    corpus = open_corpus("hub")
    assert (len(corpus.train), len(corpus.valid), len(corpus.test)) == (2_088_628, 217_646, 245_569)


@pytest.mark.skipif(not DATA, reason="needs real data: set AUTODROPOUT_DATA to the folder that holds the data sets")
@pytest.mark.parametrize(
    ("name", "tokens", "words"),
    [("ptb", (929_589, 73_760, 82_430), 10_000), ("wikitext2", (2_088_628, 217_646, 245_569), 33_278)],
)
def test_published_counts(name: str, tokens: tuple[int, ...], words: int) -> None:
    corpus = open_corpus(os.path.join(str(DATA), name))
    assert (len(corpus.train), len(corpus.valid), len(corpus.test)) == tokens
    assert len(corpus.words) == words


def test_only_ends_of_lines_end_sentences(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    plain, other = open_corpus(str(a_folder(tmp_path))), a_folder(tmp_path / "other")
    # By hand, so that no fingerprint of a published run changes.
    assert plain.fingerprint == hashlib.sha256("\0".join(TEXTS.values()).encode()).hexdigest()
    for split, text in TEXTS.items():
        (other / f"{split}.txt").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert open_corpus(str(other)).fingerprint == plain.fingerprint
    assert open_corpus(str(other)).words == plain.words
    (other / "train.txt").write_text("b\u2028a\x85b\nb\x0c\n", encoding="utf-8")
    assert open_corpus(str(other)).train.tolist() == plain.train.tolist()


def test_a_damaged_text_is_named(tmp_path: Path) -> None:
    packed = a_folder(tmp_path, packed=True) / "valid.txt.gz"
    packed.write_bytes(packed.read_bytes()[:-9])
    with pytest.raises(ValueError, match=f"^cannot read {re.escape(str(packed))}: Compressed file ended"):
        open_corpus(str(tmp_path))


def test_a_folder_whose_name_is_no_text_has_a_title_that_prints(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), b"n\xff")))
    folder.mkdir()
    assert open_corpus(str(a_folder(folder))).title == "n\N{REPLACEMENT CHARACTER}"
