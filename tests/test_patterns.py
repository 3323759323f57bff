"""Patterns as data: what they accept and refuse, JSON both ways, rates against brute force, masks as defined."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
import subprocess
import sys
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from marks import dynamo_reads_patterns_lazily
from torch._dynamo.testing import CompileCounter

from autodropout.patterns import BernoulliPattern
from autodropout.patterns import BlockPattern
from autodropout.patterns import Pattern
from autodropout.patterns import TiledPattern
from autodropout.patterns import TokenPattern

EXAMPLES = [
    TiledPattern(0.25),
    TiledPattern(0.25, stride=0.3, repeat=3, rotate=30, shear_x=0.2, shear_y=-0.1),
    TiledPattern(size=2, stride=4, repeat=0, rotate=-1e6, shear_x=-2, shear_y=2, share_c=True, residual=True),
    BernoulliPattern(0.0),
    BernoulliPattern(0.3, shared="map"),
    BernoulliPattern(1, shared="sample"),
    BlockPattern(0.1, 7),
    BlockPattern(rate=0.95, block_size=1, share_c=True),
]
KINDS = [
    (TiledPattern, {"size": 0.5}),
    (BernoulliPattern, {"rate": 0.5}),
    (BlockPattern, {"rate": 0.5, "block_size": 3}),
]


# ---------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("kind", "name", "low", "high"),
    [
        (TiledPattern, "size", 0, 2),
        (TiledPattern, "stride", 0, 4),
        (TiledPattern, "shear_x", -2, 2),
        (TiledPattern, "shear_y", -2, 2),
        (BernoulliPattern, "rate", 0, 1),
        (BlockPattern, "rate", 0, 0.95),
    ],
)
def test_real_fields_accept_exactly_their_range(kind: type[Pattern], name: str, low: float, high: float) -> None:
    required = dict(KINDS)[kind]
    for value in (low, high, np.float64(high), Fraction(low)):
        stored = getattr(kind(**(required | {name: value})), name)
        assert type(stored) is float
        assert stored == value
    for value in (math.nextafter(low, -9), math.nextafter(high, 9), math.nan, math.inf, -math.inf, 10**400):
        with pytest.raises(ValueError, match=rf"^{name} must be in \[{low}, {high}\], got "):
            kind(**(required | {name: value}))
    for wrong in (True, False, np.True_, "0.5", None, 1j, [0.5], torch.tensor(0.5)):
        with pytest.raises(TypeError, match=rf"^{name} must be in \[{low}, {high}\], got .* of type "):
            kind(**(required | {name: wrong}))


@pytest.mark.parametrize(
    ("kind", "name", "low", "high"), [(TiledPattern, "repeat", 0, 64), (BlockPattern, "block_size", 1, 2**31 - 1)]
)
def test_integer_fields_accept_exactly_their_range(kind: type[Pattern], name: str, low: int, high: int) -> None:
    required = dict(KINDS)[kind] | ({"stride": 0.5} if name == "repeat" else {})
    for value in (low, high, np.int64(high), np.uint8(low)):
        stored = getattr(kind(**(required | {name: value})), name)
        assert type(stored) is int
        assert stored == value
    for value in (low - 1, high + 1, 10**400):
        with pytest.raises(ValueError, match=rf"^{name} must be an integer in \[{low}, {high}\], got "):
            kind(**(required | {name: value}))
    for wrong in (True, 1.0, np.float32(2), math.nan, "1", None):
        with pytest.raises(TypeError, match=rf"^{name} must be an integer in \[{low}, {high}\], got "):
            kind(**(required | {name: wrong}))


@pytest.mark.parametrize(
    ("kind", "name"), [(TiledPattern, "share_c"), (TiledPattern, "residual"), (BlockPattern, "share_c")]
)
def test_flags_accept_bools_only(kind: type[Pattern], name: str) -> None:
    required = dict(KINDS)[kind]
    assert getattr(kind(**(required | {name: np.True_})), name) is True
    for wrong in (0, 1, 1.0, "true", None):
        with pytest.raises(TypeError, match=rf"^{name} must be True or False, got "):
            kind(**(required | {name: wrong}))


def test_rotate_is_any_finite_number() -> None:
    assert TiledPattern(0.5, rotate=1e300).rotate == 1e300
    assert type(TiledPattern(0.5, rotate=45).rotate) is float
    for value in (math.nan, math.inf, 10**400):
        with pytest.raises(ValueError, match=r"^rotate must be a finite number, got "):
            TiledPattern(0.5, rotate=value)


def test_shared_is_one_of_three_or_a_tuple() -> None:
    allowed = r"^shared must be one of 'none', 'map', 'sample', or a tuple of dimensions, got"
    with pytest.raises(ValueError, match=rf"{allowed} 'channel'$"):
        BernoulliPattern(0.5, shared="channel")
    with pytest.raises(TypeError, match=rf"{allowed} None of type NoneType$"):
        BernoulliPattern(0.5, shared=None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=rf"{allowed} 1 of type int$"):
        BernoulliPattern(0.5, shared=1)  # type: ignore[arg-type]


def test_unlimited_tiles_need_a_gap() -> None:
    with pytest.raises(ValueError, match=r"^stride must be above 0 when repeat is 0 "):
        TiledPattern(0.25, repeat=0)
    assert TiledPattern(0.25, repeat=0, stride=1e-9).repeat == 0


def test_patterns_are_values() -> None:
    for i, a in enumerate(EXAMPLES):
        for j, b in enumerate(EXAMPLES):
            assert (a == b) == (i == j)
    assert len(set(EXAMPLES)) == len(EXAMPLES)
    one, same = TiledPattern(0.25, repeat=2), TiledPattern(np.float64(0.25), stride=-0.0, repeat=np.int32(2))
    assert one == same
    assert hash(one) == hash(same)
    assert repr(one) == repr(same)
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.size = 0.5  # type: ignore[misc]


@pytest.mark.parametrize("pattern", EXAMPLES)
def test_copies_equal_the_pattern(pattern: Pattern) -> None:
    for twin in (copy.copy(pattern), copy.deepcopy(pattern), pickle.loads(pickle.dumps(pattern))):
        assert twin == pattern
        assert type(twin) is type(pattern)
        assert torch.equal(twin.fields(), pattern.fields())


# ---------------------------------------------------------------------------------------------------- fields


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (TiledPattern(0.25, 0.5, 3, 30, 0.2, -0.1), [0.25, 0.5, 3, 30, 0.2, -0.1]),
        (BernoulliPattern(0.3, "map"), [0.3]),
        (BlockPattern(0.1, 7, True), [0.1, 7]),
    ],
)
def test_fields_are_the_numbers_in_the_order_of_the_op(pattern: Pattern, expected: list[float]) -> None:
    fields = pattern.fields()
    assert fields.dtype == torch.float64
    assert fields.device.type == "cpu"
    assert fields.tolist() == expected
    fields.zero_()  # fresh: the pattern keeps its own
    assert pattern.fields().tolist() == expected


def test_fields_stay_on_the_cpu_under_another_default_device_and_dtype() -> None:
    with torch.device("meta"):
        pattern = BlockPattern(0.1, 7)
    assert pattern.fields().tolist() == [0.1, 7]


class _UsesFields(torch.nn.Module):
    def __init__(self, pattern: Pattern) -> None:
        super().__init__()
        self.pattern = pattern

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.pattern.fields().sum()


@dynamo_reads_patterns_lazily
@pytest.mark.parametrize(
    "make",
    [
        lambda i: TiledPattern(i / 50, stride=(i + 1) / 50, repeat=i, rotate=i),
        lambda i: BernoulliPattern(i / 50),
        lambda i: BlockPattern(i / 60, i + 1),
    ],
    ids=["tiled", "bernoulli", "block"],
)
def test_other_values_do_not_recompile(make: Any) -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    module = _UsesFields(make(0))
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    for i in range(50):
        module.pattern = make(i)
        x = torch.ones(3, dtype=torch.float64)
        assert torch.equal(compiled(x), x * make(i).fields().sum())
    assert counter.frame_count == 1


@dynamo_reads_patterns_lazily
@pytest.mark.parametrize(("kind", "required"), KINDS)
def test_a_pattern_can_be_made_inside_a_compiled_function(kind: Any, required: dict[str, Any]) -> None:
    def use(x: torch.Tensor) -> torch.Tensor:
        fields: torch.Tensor = kind(**required).scaled(0.5).fields()
        return x * fields.sum()

    x = torch.ones(3, dtype=torch.float64)
    assert torch.equal(torch.compile(use, backend="eager", fullgraph=True)(x), use(x))


# ---------------------------------------------------------------------------------------------------- JSON


@pytest.mark.parametrize("pattern", EXAMPLES)
def test_json_round_trip(pattern: Pattern) -> None:
    data = pattern.to_json()
    assert list(data) == ["op", *(f.name for f in dataclasses.fields(pattern))]
    assert {type(value) for value in data.values()} <= {str, int, float, bool}
    assert Pattern.from_json(data) == pattern


def test_json_of_a_tiled_pattern() -> None:
    assert TiledPattern(size=0.25, repeat=3, rotate=30).to_json() == {
        "op": "tiled",
        "size": 0.25,
        "stride": 0.0,
        "repeat": 3,
        "rotate": 30.0,
        "shear_x": 0.0,
        "shear_y": 0.0,
        "share_c": False,
        "residual": False,
    }


def test_json_fields_with_a_default_may_be_left_out() -> None:
    assert Pattern.from_json({"op": "tiled", "size": 1}) == TiledPattern(1.0)


def test_from_json_leaves_its_argument_alone() -> None:
    data = {"op": "bernoulli", "rate": 0.5}
    Pattern.from_json(data)
    assert data == {"op": "bernoulli", "rate": 0.5}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"op": "tiled", "size": 3.5}, "p.size: must be in [0, 2], got 3.5"),
        ({"op": "tiled", "size": "1"}, "p.size: must be in [0, 2], got '1' of type str"),
        ({"op": "tiled", "size": True}, "p.size: must be in [0, 2], got True of type bool"),
        ({"op": "tiled", "size": None}, "p.size: must be in [0, 2], got None of type NoneType"),
        ({"op": "tiled", "size": math.nan}, "p.size: must be in [0, 2], got nan"),
        ({"op": "tiled", "size": 1, "repeat": 2.0}, "p.repeat: must be an integer in [0, 64], got 2.0 of type float"),
        ({"op": "tiled", "size": 1, "repeat": 0}, "p.stride: must be above 0 when repeat is 0"),
        ({"op": "tiled", "size": 1, "share_c": 1}, "p.share_c: must be True or False, got 1 of type int"),
        ({"op": "tiled", "size": 1, "share_t": True}, "p.share_t: unknown field, known are size, stride, repeat,"),
        ({"op": "tiled"}, "p.size: missing"),
        ({"op": "block", "rate": 0.96, "block_size": 7}, "p.rate: must be in [0, 0.95], got 0.96"),
        ({"op": "block", "rate": 0.5}, "p.block_size: missing"),
        ({"op": "bernoulli", "rate": 0.5, "shared": "all"}, "p.shared: must be one of 'none', 'map', 'sample', or"),
        ({"op": "tile", "size": 1}, "p.op: must be one of "),
        ({"op": ["tiled"], "size": 1}, "p.op: must be one of "),
        ({"size": 1}, "p.op: must be one of "),
        ([], "p: must be an object, got []"),
        ("tiled", "p: must be an object, got 'tiled'"),
    ],
)
def test_json_errors_begin_with_the_path_of_the_field(data: object, message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole message is checked below
        Pattern.from_json(data, "p")
    assert str(caught.value).startswith(message)


# ---------------------------------------------------------------------------------------------------- strength


def test_scaled_multiplies_the_strength_and_stays_in_range() -> None:
    tiled = TiledPattern(0.5, stride=0.5, repeat=2, rotate=10, share_c=True)
    assert tiled.scaled(0.5) == dataclasses.replace(tiled, size=0.25)
    assert tiled.scaled(100).size == 2.0
    assert tiled.scaled(0).size == 0.0
    assert BernoulliPattern(0.25, "map").scaled(2) == BernoulliPattern(0.5, "map")
    assert BernoulliPattern(0.25).scaled(5).rate == 1.0
    assert BlockPattern(0.25, 7, True).scaled(2) == BlockPattern(0.5, 7, True)
    assert BlockPattern(0.25, 7).scaled(5).rate == 0.95
    for pattern in EXAMPLES:
        assert pattern.scaled(1) == pattern
        for factor in (-0.1, math.nan, math.inf):
            with pytest.raises(ValueError, match=r"^factor must be finite and at least 0, got "):
                pattern.scaled(factor)


def _tiled_rate(p: TiledPattern, height: int, width: int) -> Fraction:
    """Dropped share over all placements, cell by cell in Python integers: written from the definition alone."""
    sides = (height, width)
    tile = [math.floor(p.size * side + 0.5) for side in sides]
    gap = [0 if p.stride == 0 else max(1, math.floor(p.stride * side + 0.5)) for side in sides]
    if 0 in tile:
        return Fraction(0)
    period = [t + g for t, g in zip(tile, gap, strict=True)]
    extent = [max(p.repeat, 1) * q - g for q, g in zip(period, gap, strict=True)]
    c, s = math.cos(math.radians(p.rotate)), math.sin(math.radians(p.rotate))
    matrix = [[c - s * p.shear_x, c * p.shear_y - s], [s + c * p.shear_x, s * p.shear_y + c]]
    whole = [[math.floor(m * 2**24 + 0.5) for m in line] for line in matrix]

    def dropped(dy: int, dx: int) -> bool:
        for axis in (0, 1):
            u = (whole[axis][0] * dy + whole[axis][1] * dx + (extent[axis] - 1) * 2**23 + 2**23) >> 24
            if (p.repeat and not 0 <= u < extent[axis]) or u % period[axis] >= tile[axis]:
                return False
        return True

    cells = [(y, x) for y in range(height) for x in range(width)]
    return Fraction(sum(dropped(y - cy, x - cx) for cy, cx in cells for y, x in cells), len(cells) ** 2)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (7, 9), (8, 8), (5, 12)])
@pytest.mark.parametrize(
    "pattern",
    [
        TiledPattern(0.25),
        TiledPattern(0.25, 0.3, 3, 30, 0.2, -0.1),
        TiledPattern(0.2, 0.2, 2, -75, 1.5, 0.25),
        TiledPattern(0.15, 0.25, 0, 20, -0.4, 0.7),
        TiledPattern(2.0),
        TiledPattern(0.01),
    ],
)
def test_expected_rate_of_tiles_is_exact(pattern: TiledPattern, height: int, width: int) -> None:
    assert pattern.expected_rate(height, width) == float(_tiled_rate(pattern, height, width))


def test_expected_rate_of_the_others_is_the_rate() -> None:
    for height, width in ((1, 1), (7, 9), (32, 32)):
        assert BernoulliPattern(0.3, "sample").expected_rate(height, width) == 0.3
        assert BlockPattern(0.3, 9).expected_rate(height, width) == 0.3


@pytest.mark.parametrize("pattern", [TiledPattern(0.5), BlockPattern(0.2, 3), BernoulliPattern(0.2)])
def test_an_empty_map_is_refused(pattern: Pattern) -> None:
    for height, width, name in ((0, 3, "height"), (3, -1, "width")):
        with pytest.raises(ValueError, match=f"^{name} must be an integer in "):
            pattern.expected_rate(height, width)
    for sides, name in ((("a", 3), "height"), ((3, None), "width")):
        with pytest.raises(
            TypeError, match=f"^{name} must be an integer in .*, got {sides[name == 'width']!r} of type"
        ):
            pattern.expected_rate(*sides)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------- masks


def test_mask_of_tiles_is_the_golden_one() -> None:
    mask = TiledPattern(0.25, 0.3, 3, 30, 0.2, -0.1).mask(2, 2, 7, 9, seed=2**40 + 8, rank=3)
    assert mask.shape == (2, 2, 7, 9)
    assert mask.dtype == torch.bool
    for plane, golden in (
        (mask[0, 0], "#....##.. ......... ...#..... ..###.... ...#..... .......#. ##....##."),
        (mask[1, 1], "....###.. .....#... ..#...... ..##....# ..#...... ......#.. #....###."),
    ):
        assert " ".join("".join(".#"[not kept] for kept in row) for row in plane.tolist()) == golden


@pytest.mark.parametrize("pattern", EXAMPLES)
def test_mask_depends_on_seed_and_rank_alone(pattern: Pattern) -> None:
    mask = pattern.mask(3, 4, 6, 5, seed=11)
    assert mask.shape == (3, 4, 6, 5)
    torch.manual_seed(0)
    assert torch.equal(mask, pattern.mask(3, 4, 6, 5, seed=11, rank=0))
    assert torch.equal(mask, pattern.mask(3, 4, 6, 5, seed=torch.tensor(11)))
    if 0 < mask.double().mean() < 1:
        assert not torch.equal(mask, pattern.mask(3, 4, 6, 5, seed=12))
        assert not torch.equal(mask, pattern.mask(3, 4, 6, 5, seed=11, rank=1))


def test_masks_share_what_the_pattern_says() -> None:
    n, c, h, w = 16, 16, 8, 8
    by_map = BernoulliPattern(0.5, "map").mask(n, c, h, w, seed=1).flatten(2)
    assert torch.equal(by_map, by_map[:, :, :1].expand_as(by_map))
    assert 0 < by_map[0, :, 0].sum() < c  # 2^-15 for a right op, and the seed is fixed
    by_sample = BernoulliPattern(0.5, "sample").mask(n, c, h, w, seed=1).flatten(1)
    assert torch.equal(by_sample, by_sample[:, :1].expand_as(by_sample))
    assert 0 < by_sample[:, 0].sum() < n
    for pattern in (TiledPattern(0.5, share_c=True), BlockPattern(0.5, 3, share_c=True)):
        shared = pattern.mask(n, c, h, w, seed=1)
        assert torch.equal(shared, shared[:, :1].expand_as(shared))
        own = dataclasses.replace(pattern, share_c=False).mask(n, c, h, w, seed=1)
        assert not torch.equal(own, own[:, :1].expand_as(own))


@pytest.mark.parametrize(
    "pattern",
    [
        TiledPattern(0.25, 0.3, 3, 30, 0.2, -0.1),
        TiledPattern(0.4, rotate=45, share_c=True),
        BernoulliPattern(0.3),
        BernoulliPattern(0.3, "map"),
        BernoulliPattern(0.3, "sample"),
        BlockPattern(0.3, 3),
        BlockPattern(0.1, 7, share_c=True),
        BlockPattern(0.2, 50),
    ],
)
def test_masks_deliver_the_expected_rate(pattern: Pattern) -> None:
    # Samples are independent and their dropped share lies in [0, 1], so by Hoeffding the mean of n of them is further
    # than sqrt(log(2 / alpha) / (2 n)) from its expectation with probability below alpha = 1e-6.
    n = 4000
    dropped = 1 - pattern.mask(n, 2, 7, 9, seed=5).double().mean().item()
    assert abs(dropped - pattern.expected_rate(7, 9)) < math.sqrt(math.log(2 / 1e-6) / (2 * n))


@pytest.mark.parametrize("pattern", [*EXAMPLES, TokenPattern(2, 1, rate=0.5)])
def test_sizes_of_a_mask_are_whole_numbers(pattern: Pattern) -> None:
    names = "NTC" if isinstance(pattern, TokenPattern) else "NCHW"
    for i, name in enumerate(names):
        sizes: list[Any] = [2] * len(names)
        for size, error in ((2.5, TypeError), (-1, ValueError)):
            sizes[i] = size
            with pytest.raises(error, match=rf"^{name} must be an integer in \[0, \d+\], got {size}"):
                pattern.mask(*sizes, seed=0)


# ---------------------------------------------------------------------------------------------------- imports


def test_submodules_are_attributes_imported_when_first_used() -> None:
    code = (
        "import sys, autodropout; names = set(dir(autodropout)); assert {'nn', 'Policy', '__version__'} <= names; "
        "bad = {'torch', 'autodropout.nn'} & set(sys.modules); assert not bad, bad; "
        "assert autodropout.nn.Dropout(0.1).p == 0.1; assert autodropout.kernels.tiled_dropout; "
        "[getattr(autodropout, name) for name in names]; "
        "bad = {'triton', 'matplotlib', 'datasets'} & set(sys.modules); assert not bad, bad; "
        "assert not hasattr(autodropout, 'nothing')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_patterns_and_policies_load_without_the_ops() -> None:
    code = (
        "import sys, autodropout.policy; autodropout.policy.load_policy('hand-v0'); "
        "bad = {'triton', 'matplotlib', 'autodropout.kernels'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
