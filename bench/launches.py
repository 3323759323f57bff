"""Which ops the table of machine code has, on which activations: one function an op, a generator of cases.

To add an op, write a function that yields its cases and name it in `OPS`. `run` calls the launchers on tensors without
storage (`meta`), everything that one forward of the op launches; `minimum` is what the op must read and write.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import field
from typing import Any

import torch
from machine.copying import copy
from machine.recording import meta

from autodropout.kernels import batch_norm_triton
from autodropout.kernels import bernoulli_triton
from autodropout.kernels import block_triton
from autodropout.kernels import residual_triton
from autodropout.kernels import softmax_triton
from autodropout.kernels import tiled_triton
from autodropout.kernels import token_triton
from autodropout.kernels.atlas import Atlas
from autodropout.kernels.block import geometry
from autodropout.kernels.token import by_token
from autodropout.kernels.warps import warp_size

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# Outputs of batch normalisation, batch by channels by height by width.
WRN_28_10 = [(128, 160, 32, 32), (128, 320, 16, 16), (128, 640, 8, 8)]
RESNET_50 = [(32, 64, 112, 112), (32, 256, 56, 56), (32, 512, 28, 28), (32, 1024, 14, 14), (32, 2048, 7, 7)]
# Of each network the map that is most unlike the others: large planes, and planes that no power of two divides. For ops
# whose code depends on the map as that of the tiled op does.
SOME_MAPS = [WRN_28_10[0], RESNET_50[-1]]
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


def scalar() -> torch.Tensor:
    """A scale."""
    return torch.empty((), dtype=torch.float64, device="meta")


Map = tuple[int, int, int, int]


def maps(
    shapes: Iterable[Map], layouts: Iterable[str] = ("contiguous", "channels_last")
) -> Iterator[tuple[Map, str, str, torch.Tensor]]:
    """Maps in all layouts and dtypes: shape, layout, dtype, and the activation without storage."""
    for shape in shapes:
        for layout in layouts:
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
    for shape, layout, dtype, x in maps(WRN_28_10 + RESNET_50):
        n, c, height, width = shape
        atlas = Atlas.of(0.25, 0.25, 3, 30.0, 0.1, 0.0, height, width)

        def run(x: torch.Tensor = x, n: int = n, c: int = c, atlas: Atlas = atlas) -> None:
            tiled_triton.apply(x, atlas, *tiled_triton.draw(seed(), n, c, atlas, False, "mask", 0))

        yield Case("tiled", shape, layout, dtype, run, (x.element_size(), x.element_size()))


def block() -> Iterator[Case]:
    """DropBlock with rate 0.1 and block 7, a mask per channel, scale by the expected mask.

    Programs draw the blocks of a warp of planes together, so many times as the fullest needs, and every block in full.
    """
    for shape, layout, dtype, x in maps(SOME_MAPS):
        height, width = shape[2:]
        blocks = geometry(0.1, 7, height, width)
        calls = -(-((len(blocks.thresholds) + 1) // 2) // block_triton.CALLS)
        run = block_triton.run_of(blocks, width, torch.device("meta"))
        words = float(len(run.bytes if layout == "channels_last" else run.words))
        turns = {1: _expected_calls(blocks.thresholds) / max(1, calls), 2: words, 3: words}

        def apply(x: torch.Tensor = x, blocks: Any = blocks) -> None:
            block_triton.apply(x, blocks, seed(), scalar(), False, 0)

        size = x.element_size()
        yield Case("block", shape, layout, dtype, apply, (size, size), {"draw_blocks_kernel": turns})


def _expected_calls(thresholds: torch.Tensor) -> float:
    """Of Philox calls with two blocks each: how many the fullest of the planes of a program needs, in expectation.

    Plane counts are independent, P(count <= k) = thresholds[k] / 2^32; the mean of ceil(most / 2) is the sum of
    P(most > 2j) over j >= 0.
    """
    below = (thresholds.double() / 2**32).pow(warp_size())
    return float((1 - below[::2]).sum())


def bernoulli() -> Iterator[Case]:
    """Dropout, SpatialDropout and DropPath on maps, Dropout on activations and attention weights; rate 0.1."""
    threshold = int(0.1 * 2**32)

    def case(name: str, layout: str, dtype: str, x: torch.Tensor, shared: tuple[int, ...]) -> Case:
        def run() -> None:
            bernoulli_triton.apply(x, shared, threshold, seed(), scalar(), 0)

        size = x.element_size()
        return Case(name, tuple(x.shape), layout, dtype, run, (size, size))

    for _, layout, dtype, x in maps(SOME_MAPS):
        yield case("dropout", layout, dtype, x, ())
        yield case("spatial dropout", layout, dtype, x, (2, 3))
    for _, layout, dtype, x in maps(SOME_MAPS, ["contiguous"]):
        yield case("drop path", layout, dtype, x, (1, 2, 3))
    for shape in (*ACTIVATIONS, *ATTENTION):
        for name, dtype in DTYPES.items():
            yield case("dropout", "contiguous", name, meta(*shape, dtype=dtype), ())


def token() -> Iterator[Case]:
    """Spans of 4 tokens with 4 between them, rate 0.3: a decision an element, a span and channel, or a token."""
    fields = torch.tensor([4.0, 4.0, 0.3], dtype=torch.float64)
    for name, share_t, share_c in (
        ("token", False, False),
        ("token share_t", True, False),
        ("token share_c", False, True),
    ):
        for shape in (*ACTIVATIONS, *ATTENTION):
            layout = "TNC" if shape in ACTIVATIONS else "NHQK"
            for dtype_name, dtype in DTYPES.items():
                x = meta(*shape, dtype=dtype)

                def run(
                    x: torch.Tensor = x, layout: str = layout, share: tuple[bool, bool] = (share_t, share_c)
                ) -> None:
                    views = by_token(x, layout), by_token(torch.empty_like(x), layout)
                    token_triton.apply(*views, fields, seed(), scalar(), *share, 0)

                yield Case(name, shape, layout, dtype_name, run, (dtype.itemsize, dtype.itemsize))


def batch_norm() -> Iterator[Case]:
    """batch_norm, tiled pattern, ReLU. Each direction has to finish its sums before it writes its first element, so
    that x (in backward: and grad) is needed twice."""
    for shape, layout, dtype, x in maps(SOME_MAPS):
        n, c, height, width = shape
        atlas = Atlas.of(0.25, 0.25, 3, 30.0, 0.1, 0.0, height, width)
        of_channels = tuple(meta(c, dtype=torch.float32) for _ in range(4))
        starts = meta(n, c, dtype=torch.int32)

        def forward(x: torch.Tensor = x, atlas: Atlas = atlas, of_channels: Any = of_channels) -> None:
            drawn = tiled_triton.draw(seed(), x.shape[0], x.shape[1], atlas, False, "mask", 0)
            batch_norm_triton.forward(x, *of_channels[:2], atlas, *drawn, 1e-5)

        def backward(x: torch.Tensor = x, atlas: Atlas = atlas, more: Any = (of_channels, starts)) -> None:
            batch_norm_triton.backward(torch.empty_like(x), x, *more[0], atlas, more[1], scalar())

        size = x.element_size()
        yield Case("batch norm + tiled + ReLU", shape, layout, dtype, forward, (2 * size, size))
        yield Case("batch norm + tiled + ReLU, backward", shape, layout, dtype, backward, (4 * size, size))


def residual() -> Iterator[Case]:
    """residual + DropPath(x), and residual + tiled pattern of x."""
    for shape, layout, dtype, x in maps(SOME_MAPS):
        n, c, height, width = shape
        atlas = Atlas.of(0.25, 0.25, 3, 30.0, 0.1, 0.0, height, width)

        def paths(x: torch.Tensor = x) -> None:
            residual_triton.add_scaled_samples(x, torch.empty_like(x), meta(x.shape[0], dtype=torch.float32))

        def tiles(x: torch.Tensor = x, atlas: Atlas = atlas, n: int = n, c: int = c) -> None:
            drawn = tiled_triton.draw(seed(), n, c, atlas, False, "mask", 0)
            residual_triton.add_tiled(x, torch.empty_like(x), atlas, *drawn)

        size = x.element_size()
        yield Case("residual + drop path", shape, layout, dtype, paths, (2 * size, size))
        yield Case("residual + tiled", shape, layout, dtype, tiles, (2 * size, size))


def softmax() -> Iterator[Case]:
    """softmax, then a token pattern with a decision an element, on attention scores."""
    fields = torch.tensor([4.0, 4.0, 0.3], dtype=torch.float64)
    for shape in ATTENTION:
        for name, dtype in DTYPES.items():
            x = meta(*shape, dtype=dtype)

            def forward(x: torch.Tensor = x) -> None:
                softmax_triton.forward(x, fields, seed(), scalar(), False, False, 0)

            def backward(x: torch.Tensor = x) -> None:
                rows = (meta(*x.shape[:3], dtype=torch.float32) for _ in range(2))
                softmax_triton.backward(torch.empty_like(x), x, *rows, fields, seed(), scalar(), False, False, 0)

            size = x.element_size()
            yield Case("softmax + token", shape, "NHQK", name, forward, (size, size))
            yield Case("softmax + token, backward", shape, "NHQK", name, backward, (2 * size, size))


OPS: tuple[Callable[[], Iterator[Case]], ...] = (copies, tiled, block, bernoulli, token, batch_norm, residual, softmax)


def cases() -> list[Case]:
    return [case for op in OPS for case in op()]
