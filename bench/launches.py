"""Which ops the table of machine code has, on which activations: one function an op, a generator of cases.

To add an op, write a function that yields its cases and name it in `OPS`. `run` calls the launchers on tensors without
storage (`meta`), everything that one forward of the op launches; `minimum` is what the op must read and write.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import field

import torch
from machine.copying import copy
from machine.recording import meta

from autodropout.kernels import tiled_triton
from autodropout.kernels.atlas import Atlas

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# Outputs of batch normalisation, batch by channels by height by width.
MAPS = {
    "WRN-28-10, CIFAR": [(128, 160, 32, 32), (128, 320, 16, 16), (128, 640, 8, 8)],
    "ResNet-50, ImageNet": [
        (32, 64, 112, 112),
        (32, 256, 56, 56),
        (32, 512, 28, 28),
        (32, 1024, 14, 14),
        (32, 2048, 7, 7),
    ],
}
# Transformer-XL on WikiText-103, base and large: tokens by batch by width; batch by heads by queries by keys.
ACTIVATIONS = [(150, 60, 410), (384, 16, 1024)]
ATTENTION = [(60, 10, 150, 300), (16, 16, 384, 768)]


@dataclass(frozen=True)
class Case:
    """One op on one activation.

    Attributes:
        op: its name in the table.
        shape: of the activation; its elements are what everything is counted per.
        layout: "contiguous", "channels_last", or what the op calls it.
        dtype: a name of `DTYPES`.
        run: launches all kernels of one forward.
        minimum: bytes per element that must be read and written.
        turns: of kernels with loops whose turns the arguments do not tell, the turns by place in the program.
    """

    op: str
    shape: tuple[int, ...]
    layout: str
    dtype: str
    run: Callable[[], object]
    minimum: tuple[float, float]
    turns: dict[str, dict[int, float]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.op} {'x'.join(map(str, self.shape))} {self.layout} {self.dtype}"

    @property
    def elements(self) -> int:
        count = 1
        for side in self.shape:
            count *= side
        return count


def seed() -> torch.Tensor:
    return torch.empty((), dtype=torch.int64, device="meta")


def maps() -> Iterator[tuple[tuple[int, int, int, int], str, str, torch.Tensor]]:
    """All maps in both layouts and dtypes: shape, layout, dtype, and the activation without storage."""
    for shapes in MAPS.values():
        for shape in shapes:
            for layout in ("contiguous", "channels_last"):
                for name, dtype in DTYPES.items():
                    yield shape, layout, name, meta(*shape, dtype=dtype, channels_last=layout == "channels_last")


def copies() -> Iterator[Case]:
    """Not an op: the yardstick."""
    for name, dtype in DTYPES.items():
        shape = (128, 160, 32, 32)
        x = meta(*shape, dtype=dtype)
        yield Case("copy", shape, "contiguous", name, lambda x=x: copy(x), (dtype.itemsize, dtype.itemsize))


def tiled() -> Iterator[Case]:
    """One placement per sample and channel, scale by the realised mask."""
    for shape, layout, dtype, x in maps():
        n, c, height, width = shape
        atlas = Atlas.of(0.25, 0.25, 3, 30.0, 0.1, 0.0, height, width)

        def run(x: torch.Tensor = x, n: int = n, c: int = c, atlas: Atlas = atlas) -> None:
            tiled_triton.apply(x, atlas, *tiled_triton.draw(seed(), n, c, atlas, False, "mask", 0))

        yield Case("tiled", shape, layout, dtype, run, (x.element_size(), x.element_size()))


OPS: tuple[Callable[[], Iterator[Case]], ...] = (copies, tiled)


def cases() -> list[Case]:
    return [case for op in OPS for case in op()]
