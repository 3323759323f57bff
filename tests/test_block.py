"""DropBlock: its bits, its calibration, its values, and its contracts."""

from __future__ import annotations

import itertools
import math
from decimal import Decimal
from typing import Any

import mask_contracts as contracts
import pytest
import torch
from marks import dynamo_traces_gradients_of_ops
from mask_contracts import DTYPES
from mask_contracts import LAYOUTS
from mask_contracts import SEED
from mask_contracts import fresh_dynamo  # noqa: F401
from plain_torch import both_ways  # noqa: F401
from plain_torch import without_numba
from twins import block_numpy as twin

from autodropout.kernels import block_dropout
from autodropout.kernels.block import geometry

FIELDS = torch.tensor([0.3, 3], dtype=torch.float64)
DENSE = torch.tensor([0.7, 3], dtype=torch.float64)  # so many blocks that another route is taken

# Frozen: map 7x9, N = C = 2, rate .4, block 3, seed 2^40 + 8, rank 3; `#` dropped, rows separated by blanks.
GOLDEN = {
    (0, 0): "......... ...###... .#####... ######... ####..... ####..... .###.....",
    (0, 1): "......... ....###.. ....###.. ######### ######### ######### ......###",
    (1, 0): "...###... ######... ########. ###.####. ....####. ....###.. .........",
    (1, 1): "..###.... ..######. ..######. ....####. .....###. .....###. .....###.",
}
# Frozen: (H, W, rate, block size): lambda.
MEANS = {
    (7, 7, 0.1, 7): "0.105360515657826307395407",
    (8, 8, 0.1, 5): "0.276147194769269093257979",
    (14, 14, 0.5, 7): "3.46067786731598139153360",
    (28, 28, 0.1, 7): "1.71345396063382006014085",
    (28, 28, 0.5, 3): "62.3972367526527529122989",
    (5, 9, 0.95, 4): "14.6436942488015257954215",
}
THRESHOLDS_14_7 = [
    2781678376,
    3990010152,
    4252453448,
    4290454315,
    4294581109,
    4294939637,
    4294965593,
    4294967204,
    4294967292,
]


def drawn(dropped: torch.Tensor) -> str:
    return " ".join("".join(".#"[int(cell)] for cell in row) for row in dropped)


def call(share_c: bool = False, normalize: str = "expected") -> Any:
    return lambda x, fields, seed: block_dropout(x, fields, seed, share_c, normalize)


@pytest.mark.usefixtures("both_ways")
def test_golden_vectors() -> None:
    dropped = block_dropout(torch.ones(2, 2, 7, 9), (0.4, 3), SEED, rank=3) == 0
    assert {place: drawn(dropped[place]) for place in GOLDEN} == GOLDEN
    shared = block_dropout(torch.ones(2, 2, 7, 9), (0.4, 3), SEED, share_c=True, rank=3) == 0
    for n in (0, 1):
        assert drawn(shared[n, 0]) == drawn(shared[n, 1]) == GOLDEN[n, 0]


def test_golden_calibration() -> None:
    for (height, width, rate, block_size), mean in MEANS.items():
        blocks = geometry(rate, block_size, height, width)
        assert blocks.mean == Decimal(mean)
        assert str(twin.mean_blocks(height, width, rate, block_size)) == mean
    assert geometry(0.1, 7, 14, 14).thresholds.tolist() == THRESHOLDS_14_7


@pytest.mark.parametrize("block_size", [1, 2, 3, 5, 7, 40])
@pytest.mark.parametrize("shape", [(7, 7), (8, 8), (14, 14), (28, 28), (1, 1), (1, 9), (6, 17)])
def test_lambda_and_thresholds_equal_bisection_over_all_cells(shape: tuple[int, int], block_size: int) -> None:
    for rate in (1e-9, 0.1, 0.5, 0.95):
        blocks = geometry(rate, block_size, *shape)
        mean = twin.mean_blocks(*shape, rate, block_size)
        assert blocks.mean == mean
        assert tuple(blocks.thresholds.tolist()) == twin.thresholds(mean)[:-1]


def test_the_expected_share_is_the_rate() -> None:
    """An identity, in exact arithmetic, over maps, blocks and rates: no sampling."""
    for height, width, block_size, rate in ((7, 7, 7, 0.1), (14, 14, 7, 0.5), (56, 56, 7, 0.9), (9, 5, 4, 0.3)):
        blocks = geometry(rate, block_size, height, width)
        positions = math.prod(blocks.positions)
        counts = twin.cover_counts(height, width, block_size)
        kept = sum(n * math.exp(-float(blocks.mean) * k / positions) for k, n in counts) / (height * width)
        assert 1 - kept == pytest.approx(rate, abs=1e-14)


def test_thousands_of_blocks_do_not_underflow() -> None:
    blocks = geometry(0.95, 1, 40, 50)
    assert float(blocks.mean) == pytest.approx(2000 * math.log(20), rel=1e-15)  # blocks of one cell: M (-ln(1 - rate))
    table = blocks.thresholds
    assert int(table[0]) == 0
    assert bool((table[1:] >= table[:-1]).all())
    median = int(torch.searchsorted(table, 2**31))
    assert abs(median - float(blocks.mean)) < 2  # the median of a Poisson variable
    dropped = block_dropout(torch.ones(4, 8, 40, 50), (0.95, 1), SEED, normalize="none") == 0
    assert dropped.double().mean().item() == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / 64000))


def test_rates_too_small_for_a_word_drop_nothing() -> None:
    for rate in (0.0, 5e-324, 2.0**-81, 2.0**-79, 1e-15):
        assert geometry(rate, 3, 9, 9).thresholds.tolist() == []
    x = torch.randn(2, 3, 9, 9)
    assert torch.equal(block_dropout(x, (0, 3), SEED), x)


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("normalize", ["expected", "mask", "none"])
@pytest.mark.parametrize("share_c", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 7, 9), (3, 2, 8, 8), (1, 4, 1, 6), (2, 2, 5, 1), (3, 1, 1, 1), (1, 5, 13, 4)])
def test_equals_the_naive_twin(shape: tuple[int, int, int, int], share_c: bool, normalize: str) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    for rate, block_size, seed, rank in ((0.2, 3, -5, 0), (0.6, 2, SEED, 2**32 - 1), (0.9, 4, 2**64 - 1, 7)):
        kept = twin.kept(shape, rate, block_size, seed, share_c, rank)
        scale = twin.scale(kept, rate, normalize)
        for dtype in DTYPES:
            y = block_dropout(x.to(dtype), (rate, block_size), seed, share_c, normalize, rank)
            contracts.check_values(x.to(dtype), y, torch.from_numpy(kept), scale)


@pytest.mark.parametrize("share_c", [False, True])
def test_slices_and_routes_do_not_show(share_c: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The work is cut at other places, and the route for few blocks gives what the one for many gives."""
    from autodropout.kernels import block

    x = contracts.activation("channels_last", (3, 5, 12, 11))
    for normalize, fields in itertools.product(("expected", "mask"), ((0.1, 3), (0.3, 4), (0.7, 3))):
        whole = block_dropout(x, fields, SEED, share_c, normalize)
        with without_numba():
            for limit in (1, 100, 132, 300, 2000):
                for name in ("SLICE_CELLS", "DILATED_CELLS", "PLANES_AT_ONCE", "BLOCKS_AT_ONCE"):
                    monkeypatch.setattr(block, name, limit)
                assert torch.equal(block_dropout(x, fields, SEED, share_c, normalize), whole)
                monkeypatch.undo()
            with monkeypatch.context() as patch:
                patch.setattr(block, "_apply_sparse", None)  # would raise
                patch.setattr(block, "SPARSE", 0.0)
                assert torch.equal(block_dropout(x, fields, SEED, share_c, normalize), whole)


def test_padded_lists_of_blocks_draw_the_same() -> None:
    """Where the host must not wait for the device, every plane gets as many calls as the most blocks could need."""
    from autodropout.kernels import block

    seed = torch.tensor(SEED)
    for fields in ((0.1, 3), (0.6, 4), (0.95, 1)):
        blocks = geometry(*fields, 9, 12)
        listed = block._draw(blocks, slice(2, 5), slice(1, 4), seed, 3)
        padded = block._draw(blocks, slice(2, 5), slice(1, 4), seed, 3, listed=False)
        assert bool(listed.there.all())
        assert len(padded.there) == 9 * 2 * ((len(blocks.thresholds) + 1) // 2)
        for a, b in zip(listed, padded, strict=True):
            assert sorted(a.tolist()) == sorted(b[padded.there].tolist())
        rows = [set(zip(*(v[p.there].tolist() for v in p[1:]), strict=True)) for p in (listed, padded)]
        assert rows[0] == rows[1]


@pytest.mark.parametrize("block_size", [9, 10, 1000, 2**31 - 1])
def test_a_block_as_large_as_the_map_drops_whole_planes(block_size: int) -> None:
    x = torch.ones(64, 32, 7, 9)
    dropped = block_dropout(x, (0.25, block_size), SEED, normalize="none") == 0
    per_plane = dropped.double().mean(dim=(2, 3))
    assert set(per_plane.unique().tolist()) == {0.0, 1.0}
    assert abs(per_plane.mean().item() - 0.25) <= 4 * math.sqrt(0.25 * 0.75 / 2048)  # two-sided alpha 6.3e-5


@pytest.mark.usefixtures("both_ways")
def test_all_dropped_gives_zeros_not_nan() -> None:
    """A seed that drops all of a small tensor, of the first 100; NaN in x does not come through either."""
    x = torch.full((1, 2, 3, 3), float("nan"))
    seed = next(s for s in range(100) if not twin.kept((1, 2, 3, 3), 0.9, 3, s, False, 0).any())
    assert torch.equal(block_dropout(x, (0.9, 3), seed, normalize="mask"), torch.zeros_like(x))


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4), (2, 3, 4, 0)])
@pytest.mark.parametrize("share_c", [False, True])
@pytest.mark.parametrize("normalize", ["expected", "mask"])
def test_empty_tensors(shape: tuple[int, ...], share_c: bool, normalize: str) -> None:
    x = torch.empty(shape, requires_grad=True)
    y = block_dropout(x, (0.5, 3), SEED, share_c, normalize)
    y.sum().backward()
    assert y.shape == shape
    assert x.grad is not None


@pytest.mark.parametrize("share_c", [False, True])
class TestContracts:
    @pytest.mark.usefixtures("both_ways")
    @pytest.mark.parametrize("fields", [FIELDS, DENSE])
    def test_memory_format(self, share_c: bool, fields: torch.Tensor) -> None:
        contracts.check_memory_format(call(share_c), fields)

    @pytest.mark.usefixtures("both_ways")
    @pytest.mark.parametrize("fields", [FIELDS, DENSE])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_non_finite(self, share_c: bool, fields: torch.Tensor, dtype: torch.dtype) -> None:
        contracts.check_non_finite(call(share_c), fields, dtype)

    def test_gradients(self, share_c: bool) -> None:
        contracts.check_gradients(call(share_c, "mask"), FIELDS)
        contracts.check_backward_is_the_op(call(share_c), FIELDS)

    def test_forward_mode(self, share_c: bool) -> None:
        contracts.check_forward_mode(call(share_c, "mask"), FIELDS)

    def test_all_modes_of_differentiation_agree(self, share_c: bool) -> None:
        contracts.check_modes_of_differentiation_agree(call(share_c, "mask"), FIELDS)

    def test_functional_and_per_sample_gradients(self, share_c: bool) -> None:
        contracts.check_functional_gradients(call(share_c), FIELDS)

    @dynamo_traces_gradients_of_ops
    @pytest.mark.usefixtures("fresh_dynamo")
    def test_compiled_transformations(self, share_c: bool) -> None:
        contracts.check_compiled_transformations(call(share_c), FIELDS)

    def test_saves_no_mask(self, share_c: bool) -> None:
        assert contracts.saved_bytes(call(share_c, "mask"), FIELDS) == 4 * 8

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_opcheck(self, share_c: bool, layout: str) -> None:
        """Every memory format in every dtype, each pair with one of the two, which opcheck does not look at."""
        for i, dtype in enumerate(DTYPES):
            if dtype == torch.float32 or (LAYOUTS.index(layout) + i) % 2 == share_c:
                contracts.check_opcheck(call(share_c, "mask"), FIELDS, layout, dtype)

    @pytest.mark.usefixtures("fresh_dynamo")
    def test_no_recompilation(self, share_c: bool) -> None:
        values = [torch.tensor([0.95 * i / 50, 1 + i % 5], dtype=torch.float64) for i in range(51)]
        contracts.check_no_recompilation(call(share_c, "mask"), values)

    @pytest.mark.usefixtures("both_ways")
    def test_memory(self, share_c: bool) -> None:
        """Beyond the output: a bounded amount, however large x is, even if it is a single sample."""
        for shape in ((64, 16, 56, 56), (1, 50, 256, 256)):
            for fields, dtype in (((0.1, 7), torch.float32), ((0.6, 7), torch.float32), ((0.1, 7), torch.bfloat16)):
                x = torch.ones(shape, dtype=dtype)
                peak = contracts.peak_bytes(lambda x=x, fields=fields: block_dropout(x, fields, SEED, share_c))
                assert peak - x.nbytes <= 16 * 2**20


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_equals_eager(layout: str) -> None:
    contracts.check_compiled_equals_eager(call(normalize="mask"), FIELDS, layout)


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_equals_eager_when_shared() -> None:
    contracts.check_compiled_equals_eager(call(share_c=True), DENSE, "channels_last")


def test_vmap_gives_every_element_the_mask_of_its_own_call() -> None:
    x = torch.randn(3, 2, 4, 5, 6)
    seed = torch.tensor(SEED)
    y = torch.func.vmap(lambda x: block_dropout(x, FIELDS, seed), in_dims=1, out_dims=1)(x)
    for i in range(2):
        assert torch.equal(y[:, i], block_dropout(x[:, i], FIELDS, seed))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": None}, TypeError, "x must be a tensor, got NoneType"),
        ({"x": torch.ones(2, 3, 4, 4, dtype=torch.int32)}, TypeError, "x must be float64, .* got torch.int32"),
        ({"x": torch.ones(2, 3, 4)}, ValueError, r"x must have 4 dimensions \(N, C, H, W\), got shape \(2, 3, 4\)"),
        ({"fields": (0.96, 3)}, ValueError, r"rate must be in \[0, 0.95\], got 0.96"),
        ({"fields": (0.1, 0)}, ValueError, r"block_size must be in \[1, .*\], got 0"),
        ({"fields": (0.1, 2.5)}, ValueError, "block_size must be a whole number, got 2.5"),
        ({"fields": (0.1, "3")}, TypeError, "block_size must be a number in .* got '3' of type str"),
        ({"fields": 0.1}, TypeError, r"fields must be \(rate, block_size\) or .* got 0.1"),
        ({"fields": torch.tensor([0.1, 2.5], dtype=torch.float64)}, ValueError, "block_size must be a whole number"),
        ({"fields": torch.tensor([0.1, 3])}, ValueError, r"fields must be a float64 CPU tensor \(rate, block_size\)"),
        ({"share_c": 1}, TypeError, "share_c must be a bool, got 1 of type int"),
        ({"normalize": "sum"}, ValueError, "normalize must be 'expected' or 'mask' or 'none', got 'sum'"),
        ({"seed": 0.5}, TypeError, "seed must be None, an int or a 0-d int64 tensor, got float"),
        ({"rank": 2**32}, ValueError, r"rank must be in \[0, 2\^32\), got 4294967296"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        block_dropout(**({"x": torch.ones(2, 3, 4, 4), "fields": (0.1, 3)} | arguments))
