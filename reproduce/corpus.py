"""Word-level corpora for language models: Penn Treebank and WikiText-2 from a folder, and one that every CPython has.

Nothing is downloaded unless asked for.

The words of the training text are the vocabulary, by falling frequency; a word that only occurs elsewhere is `<unk>`.
Each line ends with `<eos>`, as in the published counts of tokens.
"""

from __future__ import annotations

import hashlib
import importlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .text_files import lines_of
from .text_files import printable
from .text_files import read_text

PYDOC = "pydoc"
HUB = "hub"
HUB_NAME = ("Salesforce/wikitext", "wikitext-2-v1")
SPLITS = ("train", "valid", "test")
UNKNOWN, END = "<unk>", "<eos>"
# Of the words of `pydoc`, those that occur less often in the training text are unknown.
PYDOC_COUNT = 2


@dataclass(frozen=True)
class Corpus:
    """A text in three parts.

    Args:
        title: what it is.
        words: the vocabulary, the most frequent word first; a token is an index into it.
        train, valid, test: (tokens,) int64.
        fingerprint: SHA-256 (hex) of the three texts.
    """

    title: str
    words: tuple[str, ...]
    train: torch.Tensor
    valid: torch.Tensor
    test: torch.Tensor
    fingerprint: str

    @property
    def start(self) -> int:
        """The token that stands before the first one of a text: `<eos>`."""
        return self.words.index(END)


def open_corpus(source: str) -> Corpus:
    """The corpus `"pydoc"`, `"hub"`, or that of a folder with `train.txt`, `valid.txt` and `test.txt`, gzipped or not.

    Raises:
        ValueError: none of them, a file is missing or damaged, a download fails, or a text has no words.
        OSError: a file cannot be read.
    """
    if source == HUB:
        return hub_corpus()
    return pydoc_corpus() if source == PYDOC else folder_corpus(Path(source))


def folder_corpus(folder: Path) -> Corpus:
    """A sentence, or a paragraph, a line; words are separated by blanks."""
    if not folder.is_dir():
        raise ValueError(
            f"data must be {PYDOC!r}, {HUB!r} or a folder with train.txt, valid.txt and test.txt, got {folder}"
        )
    texts = [read_text(folder, f"{split}.txt") for split in SPLITS]
    lines = [[line.split() for line in lines_of(text)] for text in texts]
    return _corpus(printable(folder.resolve().name), lines, texts, least=1)


def hub_corpus() -> Corpus:
    """WikiText-2 by word, downloaded through `datasets` (or from its cache); its rows are lines."""
    import datasets

    datasets.disable_progress_bars()
    try:
        loaded = datasets.load_dataset(*HUB_NAME)
        rows = [list(loaded[split]["text"]) for split in ("train", "validation", "test")]
    except Exception as error:  # datasets, pyarrow, fsspec and the hub's client raise types without a common base
        cause = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"cannot read WikiText-2 from {HUB_NAME[0]}: {cause[:300]}") from error
    lines = [[row.split() for row in part] for part in rows]
    texts = ["\n".join(" ".join(words) for words in part) for part in lines]
    return _corpus("WikiText-2", lines, texts, least=1)


def pydoc_corpus() -> Corpus:
    """The Python language reference of the running Python, as `pydoc_data.topics` has it, a paragraph a line.

    Of each topic, in alphabetical order, the first 15% of the paragraphs are for training, so little that there is
    something to regularise, and the last tenths are validation and test, without paragraphs that an earlier part has,
    as topics share some. The text differs between versions of Python,
    and so does the fingerprint.
    """
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    parts: list[list[list[str]]] = [[], [], []]
    for name in sorted(topics):
        paragraphs = [re.findall(r"\w+|[^\w\s]", paragraph.lower()) for paragraph in topics[name].split("\n\n")]
        paragraphs = [words for words in paragraphs if words]
        count = len(paragraphs)
        train, valid, test = -(-count * 15 // 100), count * 8 // 10, count * 9 // 10
        for part, chosen in zip(parts, (slice(train), slice(valid, test), slice(test, None)), strict=True):
            part += paragraphs[chosen]
    known: set[tuple[str, ...]] = set()
    for number, part in enumerate(parts):
        if number > 0:
            parts[number] = [words for words in part if tuple(words) not in known]
        known |= set(map(tuple, part))
    texts = ["\n".join(" ".join(words) for words in part) for part in parts]
    return _corpus("Python language reference", parts, texts, PYDOC_COUNT)


def _corpus(title: str, parts: Sequence[list[list[str]]], texts: Sequence[str], least: int) -> Corpus:
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    counts = Counter(word for line in parts[0] for word in (*line, END))
    frequent = {word: count for word, count in counts.items() if count >= least or word in (UNKNOWN, END)}
    frequent[UNKNOWN] = frequent.get(UNKNOWN, 0) + sum(counts.values()) - sum(frequent.values())
    words = tuple(sorted(frequent, key=lambda word: (-frequent[word], word)))
    index = {word: number for number, word in enumerate(words)}
    tokens = [[index.get(word, index[UNKNOWN]) for line in part for word in (*line, END)] for part in parts]
    for split, part in zip(SPLITS, tokens, strict=True):
        if len(part) < 2:
            raise ValueError(f"{split} must have at least 2 tokens, got {len(part)} in {title}")
    train, valid, test = (torch.tensor(part) for part in tokens)
    return Corpus(title, words, train, valid, test, digest)
