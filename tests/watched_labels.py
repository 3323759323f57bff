"""Shows which labels a training reads."""

from __future__ import annotations

import torch


class Watched:
    """Labels that can only be looked up row by row, and that note which rows were; any other use is an error."""

    def __init__(self, labels: torch.Tensor) -> None:
        self.labels, self.read = labels, set[int]()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: torch.Tensor) -> torch.Tensor:
        self.read |= set(rows.tolist())
        return self.labels[rows]
