"""The Bernoulli op: its bits, its values, and its contracts."""

from __future__ import annotations

import json
import math
import pickle
from contextlib import nullcontext
from typing import Any

import mask_contracts as contracts
import numpy as np
import pytest
import torch
from marks import dynamo_traces_gradients_of_ops
from mask_contracts import DTYPES
from mask_contracts import LAYOUTS
from mask_contracts import SEED
from mask_contracts import fresh_dynamo  # noqa: F401
from plain_torch import without_numba
from twins import bernoulli_numpy as twin

from autodropout import BernoulliPattern
from autodropout import Pattern
from autodropout.kernels import bernoulli_dropout

SHARED = ("none", "map", "sample")
# Of a shape with so many dimensions, the sets that have no name; 4 are enough for every way in which they can lie.
UNNAMED = {
    2: [(0,), (1,), (0, 1)],
    3: [(0,), (1,), (2,), (0, 2), (0, 1, 2)],
    4: [(1,), (2,), (3,), (0, 2), (1, 3), (0, 1, 2)],
}
RATE = torch.tensor([0.4], dtype=torch.float64)

# Frozen: shape (2, 6, 3, 3), rate .5, seed 2^40 + 8, rank 3; `#` dropped.
GOLDEN_CELLS = (
    ".#.#.#... ..#...##. ####..##. #.##..#.. ######.#. ##...##..",
    "........# .##.#.### #.###.### ...###### #....##.. .##......",
)
# Frozen: shape (4, 9), same seed and rank; a row per sample.
GOLDEN_CHANNELS = ".#.#.#... ........# ...##..## ###.....#"
# Frozen: shape (24, 1), same seed and rank.
GOLDEN_SAMPLES = "...#.#.#...##.....##...."
# Frozen: shape (2, 4, 9), same seed and rank, by shared dimensions: a row a token of sample 0, then of sample 1.
GOLDEN_SHARED = {
    (2,): "......... ######### ......... ######### ......... ......... ......... .........",
    (1,): ".#.#.#... .#.#.#... .#.#.#... .#.#.#... ........# ........# ........# ........#",
    (0,): ".#.#.#... ..#...##. ####..##. #.##..#.. .#.#.#... ..#...##. ####..##. #.##..#..",
    (0, 2): "......... ######### ......... ######### ......... ######### ......... #########",
}


def drawn(dropped: torch.Tensor) -> str:
    """One row of marks a row of the matrix."""
    return " ".join("".join(".#"[int(cell)] for cell in row) for row in dropped)


def call(shared: Any, normalize: str = "expected") -> Any:
    return lambda x, fields, seed: bernoulli_dropout(x, fields, seed, shared, normalize)


def test_golden_vectors() -> None:
    cells = bernoulli_dropout(torch.ones(2, 6, 3, 3), 0.5, SEED, rank=3) == 0
    assert tuple(drawn(sample.reshape(6, 9)) for sample in cells) == GOLDEN_CELLS
    assert drawn(bernoulli_dropout(torch.ones(4, 9), 0.5, SEED, "map", rank=3) == 0) == GOLDEN_CHANNELS
    assert drawn(bernoulli_dropout(torch.ones(24, 1), 0.5, SEED, "sample", rank=3).T == 0) == GOLDEN_SAMPLES


@pytest.mark.parametrize("shared", GOLDEN_SHARED, ids=repr)
def test_golden_vectors_of_shared_dimensions(shared: tuple[int, ...]) -> None:
    dropped = bernoulli_dropout(torch.ones(2, 4, 9), 0.5, SEED, shared, rank=3) == 0
    assert drawn(dropped.flatten(0, 1)) == GOLDEN_SHARED[shared]


def test_names_are_sets_of_dimensions() -> None:
    for shape in ((5, 7), (5, 3, 7), (3, 4, 3, 2), (2, 3, 2, 3, 2)):
        for shared, dims in (("none", ()), ("map", range(2, len(shape))), ("sample", range(1, len(shape)))):
            x = torch.ones(shape)
            expected = bernoulli_dropout(x, 0.5, SEED, shared, rank=3)
            assert torch.equal(bernoulli_dropout(x, 0.5, SEED, tuple(dims), rank=3), expected)
            assert torch.equal(bernoulli_dropout(x, 0.5, SEED, [*dims][::-1], rank=3), expected)


@pytest.mark.parametrize("shape", [(9, 4), (3, 5, 7), (3, 2, 4, 3)], ids=repr)
def test_shared_dimensions_equal_the_naive_twin(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    for i, shared in enumerate(UNNAMED[len(shape)]):
        rate, rank = 0.3 + i / 10, i
        kept = twin.kept(shape, rate, SEED + i, shared, rank)
        for normalize in ("expected", "mask", "none"):
            scale = twin.scale(kept, rate, normalize)
            for dtype in DTYPES:
                y = bernoulli_dropout(x.to(dtype), rate, SEED + i, shared, normalize, rank)
                contracts.check_values(x.to(dtype), y, torch.from_numpy(kept), scale)


@pytest.mark.parametrize("normalize", ["expected", "mask", "none"])
@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("shape", [(3, 5, 3, 7), (7, 4), (2, 3, 5), (2, 1, 1, 1), (1, 2, 2, 3, 5), (1, 3, 1, 9)])
def test_equals_the_naive_twin(shape: tuple[int, ...], shared: str, normalize: str) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    for rate, seed, rank in ((0.3, -5, 0), (0.75, SEED, 2**32 - 1), (1 / 3, 2**64 - 1, 7)):
        kept = twin.kept(shape, rate, seed, shared, rank)
        scale = twin.scale(kept, rate, normalize)
        for dtype in DTYPES:
            y = bernoulli_dropout(x.to(dtype), rate, seed, shared, normalize, rank)
            contracts.check_values(x.to(dtype), y, torch.from_numpy(kept), scale)


def test_one_dimension_is_a_batch_of_single_cells() -> None:
    kept = torch.from_numpy(twin.kept((9,), 0.5, SEED, "sample", 0))
    assert torch.equal(bernoulli_dropout(torch.ones(9), 0.5, SEED, normalize="none") != 0, kept)
    assert torch.equal(bernoulli_dropout(torch.ones(9), 0.5, SEED, "sample", "none") != 0, kept)


@pytest.mark.parametrize("shared", [*SHARED, (1,), (0,), (1, 3)])
@pytest.mark.parametrize("layout", ["channels_last", "sliced"])
def test_slices_do_not_show(layout: str, shared: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The work is cut at other places: between samples, channels, rows, and at indices that are no multiples of 4."""
    from autodropout.kernels import bernoulli

    x = contracts.activation(layout)
    for normalize in ("expected", "mask"):
        whole = bernoulli_dropout(x, 0.4, SEED, shared, normalize)
        for cells in (1, 5, 7, 13, 42, 50, 210, 420):
            monkeypatch.setattr(bernoulli, "SLICE_CELLS", cells)
            for way in (nullcontext(), without_numba()):
                with way:
                    assert torch.equal(bernoulli_dropout(x, 0.4, SEED, shared, normalize), whole)
        monkeypatch.undo()


def test_a_sample_larger_than_a_slice() -> None:
    """Index 2^20 of a sample is decided by the word that the definition names."""
    from autodropout.kernels import philox

    y = bernoulli_dropout(torch.ones(1, 2**20 + 8), 0.5, SEED, normalize="none")
    call = torch.arange(2**18 - 1, 2**18 + 2)
    words = torch.stack(philox.philox(call, 0, torch.zeros_like(call), 0, torch.tensor(SEED)), -1).reshape(-1)
    assert torch.equal(y[0, 2**20 - 4 :] != 0, words >= 2**31)


def test_indices_beyond_32_bits_of_calls() -> None:
    """Decisions 2^34 + 1 and 2^34 - 1 of a sample: the second counter word carries."""
    from twins.philox_numpy import key_of
    from twins.philox_numpy import philox

    from autodropout.kernels.bernoulli import _dropped_run

    words = [philox(c, 1, 0, 3, key_of(SEED)) for c in (0, 1)]
    before = philox(2**32 - 1, 0, 0, 3, key_of(SEED))
    expected = [int(before[3]), *(int(w) for w in words[0]), int(words[1][0])]
    for way in (nullcontext(), without_numba()):
        with way:
            dropped = _dropped_run(slice(0, 1), 2**34 - 1, 6, 2**31, torch.tensor(SEED), 3)
        assert dropped[0].tolist() == [word < 2**31 for word in expected]


@pytest.mark.parametrize("shared", SHARED)
def test_rate_0_keeps_and_rate_1_drops_everything(shared: str) -> None:
    x = contracts.activation("contiguous")
    for normalize in ("expected", "mask", "none"):
        assert torch.equal(bernoulli_dropout(x, 0, SEED, shared, normalize), x)
        assert torch.equal(bernoulli_dropout(x, 1.0, SEED, shared, normalize), torch.zeros_like(x))


def test_shared_masks_are_constant_where_they_should_be() -> None:
    x = torch.ones(16, 8, 5, 5)
    kept = bernoulli_dropout(x, 0.5, SEED, "map") != 0
    assert torch.equal(kept, kept[:, :, :1, :1].expand_as(kept))
    assert len({tuple(row.tolist()) for row in kept[:, :, 0, 0]}) > 8
    kept = bernoulli_dropout(x, 0.5, SEED, "sample") != 0
    assert torch.equal(kept, kept[:, :1, :1, :1].expand_as(kept))
    assert 0 < int(kept[:, 0, 0, 0].sum()) < 16


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_delivers_the_rate_without_correlation(rate: float) -> None:
    """Shares and neighbour products against their binomial standard errors; 4 of them, two-sided alpha 6.3e-5 each."""
    dropped = (bernoulli_dropout(torch.ones(64, 4096), rate, 99, normalize="none") == 0).double().numpy()
    error = 4 * math.sqrt(rate * (1 - rate) / dropped.size)
    assert abs(dropped.mean() - rate) <= error
    for a, b in ((dropped[:, 1:], dropped[:, :-1]), (dropped[1:], dropped[:-1]), (dropped[:, 4:], dropped[:, :-4])):
        covariance = ((a - rate) * (b - rate)).mean()
        assert abs(covariance) <= 4 * rate * (1 - rate) / math.sqrt(a.size)


def test_the_scale_of_the_mask_is_one_rounded_quotient() -> None:
    from torch import ops

    for rate in np.linspace(0.05, 0.95, 19):
        fields = torch.tensor([rate], dtype=torch.float64)
        for shape in ((3, 7, 5, 5), (49, 3)):
            kept = twin.kept(shape, float(rate), SEED, "none", 0)
            scale = ops.autodropout.bernoulli_scale(fields, torch.tensor(SEED), shape, 0, "mask", 0)
            assert scale.dtype == torch.float64
            assert scale.item() == kept.size / int(kept.sum())


@pytest.mark.parametrize("shape", [(0,), (0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4), (2, 3, 4, 0)])
@pytest.mark.parametrize("normalize", ["expected", "mask"])
def test_empty_tensors(shape: tuple[int, ...], normalize: str) -> None:
    for shared in SHARED if len(shape) > 1 else ("none", "sample"):
        x = torch.empty(shape, requires_grad=True)
        y = bernoulli_dropout(x, 0.5, SEED, shared, normalize)
        y.sum().backward()
        assert y.shape == shape
        assert x.grad is not None


@pytest.mark.parametrize("shared", SHARED)
class TestContracts:
    def test_memory_format(self, shared: str) -> None:
        contracts.check_memory_format(call(shared), RATE)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_non_finite(self, shared: str, dtype: torch.dtype) -> None:
        contracts.check_non_finite(call(shared), torch.tensor([0.7], dtype=torch.float64), dtype)

    def test_gradients(self, shared: str) -> None:
        contracts.check_gradients(call(shared, "mask"), RATE)
        contracts.check_backward_is_the_op(call(shared), RATE)

    def test_forward_mode(self, shared: str) -> None:
        contracts.check_forward_mode(call(shared, "mask"), RATE)

    def test_all_modes_of_differentiation_agree(self, shared: str) -> None:
        contracts.check_modes_of_differentiation_agree(call(shared, "mask"), RATE)

    def test_functional_and_per_sample_gradients(self, shared: str) -> None:
        contracts.check_functional_gradients(call(shared), RATE)

    @dynamo_traces_gradients_of_ops
    @pytest.mark.usefixtures("fresh_dynamo")
    def test_compiled_transformations(self, shared: str) -> None:
        contracts.check_compiled_transformations(call(shared), RATE)

    def test_saves_no_mask(self, shared: str) -> None:
        assert contracts.saved_bytes(call(shared, "mask"), RATE) == 3 * 8

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_opcheck(self, shared: str, layout: str) -> None:
        """Every memory format in every dtype, each pair with one of the names, which opcheck does not look at."""
        for i, dtype in enumerate(DTYPES):
            if dtype == torch.float32 or (LAYOUTS.index(layout) + i) % 3 == SHARED.index(shared):
                contracts.check_opcheck(call(shared, "mask"), RATE, layout, dtype)

    @pytest.mark.usefixtures("fresh_dynamo")
    def test_no_recompilation(self, shared: str) -> None:
        rates = [torch.tensor([i / 50], dtype=torch.float64) for i in range(51)]
        contracts.check_no_recompilation(call(shared, "mask"), rates)

    def test_memory(self, shared: str) -> None:
        """Beyond the output: a bounded amount, although samples are large; unsliced, Philox alone would take 24 MB."""
        for dtype in (torch.float32, torch.bfloat16) if shared == "map" else (torch.float32,):
            x = torch.ones((2, 32, 256, 128), dtype=dtype)
            for way in (nullcontext(), without_numba()):
                with way:
                    peak = contracts.peak_bytes(lambda x=x: bernoulli_dropout(x, RATE, SEED, shared))
                assert peak - x.nbytes <= 12 * 2**20


def test_contracts_of_shared_dimensions() -> None:
    """Those that touch how dimensions reach the op; the names go through all of them above."""
    shared: Any = (0, 2)
    contracts.check_memory_format(call(shared), RATE)
    contracts.check_non_finite(call(shared), torch.tensor([0.7], dtype=torch.float64), torch.float32)
    contracts.check_gradients(call(shared, "mask"), RATE)
    contracts.check_forward_mode(call(shared, "mask"), RATE)
    contracts.check_functional_gradients(call((1,)), RATE)
    assert contracts.saved_bytes(call(shared, "mask"), RATE) == 3 * 8
    for dtype in DTYPES:
        contracts.check_opcheck(call(shared, "mask"), RATE, "sliced", dtype)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_equals_eager(layout: str) -> None:
    contracts.check_compiled_equals_eager(call("none", "mask"), RATE, layout)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("shared", ["map", "sample", (1,)])
def test_compiled_equals_eager_when_shared(shared: Any) -> None:
    contracts.check_compiled_equals_eager(call(shared), RATE, "channels_last")


def test_a_seed_of_none_follows_manual_seed() -> None:
    x = torch.ones(64, 64)
    torch.manual_seed(3)
    first, second = bernoulli_dropout(x, 0.5), bernoulli_dropout(x, 0.5)
    torch.manual_seed(3)
    assert torch.equal(bernoulli_dropout(x, 0.5), first)
    assert not torch.equal(first, second)


def test_vmap_gives_every_element_the_mask_of_its_own_call() -> None:
    x = torch.randn(3, 2, 4, 5)
    seed = torch.tensor(SEED)
    y = torch.func.vmap(lambda x: bernoulli_dropout(x, RATE, seed), in_dims=1, out_dims=1)(x)
    for i in range(2):
        assert torch.equal(y[:, i], bernoulli_dropout(x[:, i], RATE, seed))
    with pytest.raises(ValueError, match="seed and fields must not be batched by vmap"):
        torch.func.vmap(lambda seed: bernoulli_dropout(x, RATE, seed, normalize="none"))(torch.arange(3))


def test_patterns_take_dimensions() -> None:
    """In any order, from JSON as a list, through pickles and copies; none at all is "none"."""
    pattern = BernoulliPattern(0.4, shared=(3, 1))
    assert pattern.shared == (1, 3)
    assert pattern == BernoulliPattern(0.4, shared=[1, 3])  # type: ignore[arg-type]
    assert len({pattern, BernoulliPattern(0.4, shared=(1, 3))}) == 1
    assert BernoulliPattern(0.4, shared=()) == BernoulliPattern(0.4)
    assert Pattern.from_json(json.loads(json.dumps(pattern.to_json()))) == pattern
    assert pickle.loads(pickle.dumps(pattern)) == pattern
    assert pattern.scaled(0.5) == BernoulliPattern(0.2, shared=(1, 3))
    kept = twin.kept((2, 3, 4, 5), 0.4, SEED, (1, 3), 7)
    assert torch.equal(pattern.mask(2, 3, 4, 5, SEED, rank=7), torch.from_numpy(kept))
    for shared, message in (
        ([1, 1], r"^p.shared: must hold different dimensions, got \[1, 1\]$"),
        ([-1], r"^p.shared: must be an integer in \[0, 62\], got -1$"),
        (["map"], r"^p.shared: must be an integer in \[0, 62\], got 'map' of type str$"),
    ):
        with pytest.raises(ValueError, match=message):
            Pattern.from_json({"op": "bernoulli", "rate": 0.5, "shared": shared}, "p")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
        ({"x": torch.ones(3, dtype=torch.int64)}, TypeError, "x must be float64, .* got torch.int64"),
        ({"x": torch.ones(())}, ValueError, r"x must have at least 1 dimensions .* got shape \(\)"),
        ({"x": torch.ones(3), "shared": "map"}, ValueError, r"x must have at least 2 .* got shape \(3,\)"),
        ({"fields": 1.5}, ValueError, r"rate must be in \[0, 1\], got 1.5"),
        ({"fields": float("nan")}, ValueError, r"rate must be in \[0, 1\], got nan"),
        ({"fields": "half"}, TypeError, r"rate must be a number in \[0, 1\], got 'half' of type str"),
        ({"fields": True}, TypeError, r"rate must be a number in \[0, 1\], got True of type bool"),
        ({"fields": torch.tensor([-0.1], dtype=torch.float64)}, ValueError, r"rate must be in \[0, 1\], got -0.1"),
        (
            {"fields": torch.tensor([0.5])},
            ValueError,
            r"fields must be a float64 CPU tensor \(rate\), got torch.float32",
        ),
        ({"fields": torch.ones(2, dtype=torch.float64)}, ValueError, r"fields must be .* shape \(2,\)"),
        ({"shared": "channel"}, ValueError, "shared must be 'none' or 'map' or 'sample', got 'channel'"),
        ({"shared": None}, TypeError, "shared must be .* got None of type NoneType"),
        ({"shared": (2,)}, ValueError, r"shared must hold different dimensions in \[0, 2\), got \(2,\)"),
        ({"shared": [1, 1]}, ValueError, r"shared must hold different dimensions in \[0, 2\), got \[1, 1\]"),
        ({"shared": (-1,)}, ValueError, r"shared must hold different dimensions in \[0, 2\), got \(-1,\)"),
        ({"shared": (True,)}, TypeError, "shared must hold integers, got True of type bool"),
        ({"shared": ("map",)}, TypeError, "shared must hold integers, got 'map' of type str"),
        ({"shared": (), "x": torch.ones(())}, ValueError, r"x must have at least 1 dimensions, got shape \(\)"),
        ({"normalize": "sum"}, ValueError, "normalize must be 'expected' or 'mask' or 'none', got 'sum'"),
        ({"seed": 2**64}, ValueError, r"seed must be in \[-2\^63, 2\^64\), got"),
        ({"rank": -1}, ValueError, r"rank must be in \[0, 2\^32\), got -1"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        bernoulli_dropout(**({"x": torch.ones(2, 3), "fields": 0.5} | arguments))
