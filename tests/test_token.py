"""The token op: its bits, its values, and its contracts."""

from __future__ import annotations

from typing import Any

import mask_contracts as contracts
import pytest
import torch
from marks import dynamo_traces_gradients_of_ops
from mask_contracts import DTYPES
from mask_contracts import LAYOUTS as MEMORY
from mask_contracts import SEED
from mask_contracts import fresh_dynamo  # noqa: F401
from plain_torch import both_ways  # noqa: F401
from plain_torch import without_numba
from torch.utils.checkpoint import checkpoint
from twins import token as twin

from autodropout.kernels import token_dropout
from autodropout.kernels.token import LAYOUTS
from autodropout.kernels.token import sides_of

FIELDS = torch.tensor([2, 1, 0.4], dtype=torch.float64)
SHARING = [(False, False), (True, False), (False, True), (True, True)]
# By layout, the same N = 3, T = 11, C = 10 (heads of 5 channels, or of 5 queries), and odd ones.
SHAPES = {
    "NTC": [(3, 11, 10), (1, 1, 1), (2, 5, 3)],
    "TNC": [(11, 3, 10), (5, 2, 3)],
    "NHTD": [(3, 2, 11, 5), (2, 3, 5, 4)],
    "NHQK": [(3, 2, 5, 11), (2, 3, 1, 7)],
}
CASES = [(layout, shape) for layout, shapes in SHAPES.items() for shape in shapes]


def call(layout: str, sharing: tuple[bool, bool], normalize: str = "expected") -> Any:
    return lambda x, fields, seed: token_dropout(x, fields, seed, layout, *sharing, normalize)


def expected_kept(
    shape: tuple[int, ...],
    layout: str,
    fields: tuple[int, int, float],
    seed: int,
    sharing: tuple[bool, bool],
    rank: int = 0,
) -> torch.Tensor:
    heads = shape[1] if len(shape) == 4 else 1
    mask = twin.dropped(*sides_of(shape, layout), *fields, seed, *sharing, rank)
    return ~torch.from_numpy(twin.in_layout(mask, layout, heads).copy())


def ones(shape: tuple[int, ...], fields: tuple[int, int, float], **arguments: Any) -> torch.Tensor:
    """What a call drops, True = dropped."""
    return token_dropout(torch.ones(shape), fields, SEED, normalize="none", **arguments) == 0


# ---- bits ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize(("share_t", "sample"), twin.GOLDEN)
def test_golden_masks(share_t: bool, sample: int) -> None:
    golden = twin.GOLDEN[share_t, sample]
    for dropped in (
        torch.from_numpy(twin.dropped(2, 12, 6, 3, 2, 0.5, 2**40 + 8, share_t, rank=3)),
        ones((2, 12, 6), (3, 2, 0.5), share_t=share_t, rank=3),
        ones((12, 2, 6), (3, 2, 0.5), layout="TNC", share_t=share_t, rank=3).transpose(0, 1),
        ones((2, 2, 12, 3), (3, 2, 0.5), layout="NHTD", share_t=share_t, rank=3).transpose(1, 2).flatten(2),
        ones((2, 3, 2, 12), (3, 2, 0.5), layout="NHQK", share_t=share_t, rank=3).flatten(1, 2).transpose(1, 2),
    ):
        assert " ".join("".join(".#"[int(cell)] for cell in token) for token in dropped[sample]) == golden


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize(("layout", "shape"), CASES)
def test_equals_the_naive_twin(layout: str, shape: tuple[int, ...], sharing: tuple[bool, bool]) -> None:
    """Spans shorter and longer than the sequence, seeds and ranks at their ends, all dtypes and scales, bit for bit."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    for i, (fields, seed, rank) in enumerate(
        [
            ((3, 2, 0.3), -5, 0),
            ((1, 0, 0.75), SEED, 2**32 - 1),
            ((4, 0, 1 / 3), 2**64 - 1, 7),
            ((100, 1, 0.6), 1, 2**31),
            ((1, 2**30 - 1, 0.9), 2**63, 1),
        ]
    ):
        kept = expected_kept(shape, layout, fields, seed, sharing, rank)
        for dtype, normalize in zip(DTYPES, ("expected", "mask", "none", "expected"), strict=True):
            dtype = DTYPES[(DTYPES.index(dtype) + i) % 4]
            scale = twin.scale(~kept.numpy(), sides_of(shape, layout)[1], *fields, normalize)
            y = token_dropout(x.to(dtype), fields, seed, layout, *sharing, normalize, rank)
            contracts.check_values(x.to(dtype), y, kept, scale)


@pytest.mark.usefixtures("both_ways")
def test_channels_beyond_a_call_and_a_slice() -> None:
    """Channel 2^20 of a token, more than a slice has cells, is decided by the word that the definition names."""
    from autodropout.kernels.philox import philox

    dropped = ones((1, 2, 2**20 + 8), (1, 0, 0.5))
    calls = torch.arange(2**18 - 1, 2**18 + 2)
    for token in (0, 1):
        words = torch.stack(philox(calls, 1 + token, torch.zeros_like(calls), 0, torch.tensor(SEED)), -1).reshape(-1)
        assert torch.equal(dropped[0, token, 2**20 - 4 :], words < 2**31)


@pytest.mark.parametrize("sharing", SHARING)
def test_slices_do_not_show(sharing: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """The work is cut at other places: between samples, and inside of spans."""
    from autodropout.kernels import token

    x = torch.randn(4, 13, 6, generator=torch.Generator().manual_seed(3))
    for normalize in ("expected", "mask"):
        whole = token_dropout(x, (5, 2, 0.4), SEED, "NTC", *sharing, normalize)
        for cells in (1, 6, 13, 20, 78, 100):
            monkeypatch.setattr(token, "SLICE_CELLS", cells)
            with without_numba():
                assert torch.equal(token_dropout(x, (5, 2, 0.4), SEED, "NTC", *sharing, normalize), whole)
        monkeypatch.undo()


@pytest.mark.parametrize("share_t", [False, True])
def test_devices_that_list_no_tokens_draw_the_same(share_t: bool) -> None:
    from autodropout.kernels.token import _dropped

    for values in ([3, 2, 0.5], [1, 0, 0.3], [50, 0, 0.7], [2, 9, 0.0]):
        fields = torch.tensor(values, dtype=torch.float64)
        listed, plain = (
            torch.cat([part for *_, part in _dropped(3, 13, 7, fields, torch.tensor(SEED), share_t, 1, listed=way)])
            for way in (True, False)
        )
        assert torch.equal(listed, plain)
        assert torch.equal(listed, torch.from_numpy(twin.dropped(3, 13, 7, *values, SEED, share_t, rank=1)))


# ---- special cases -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("sides", [(4, 9, 10), (2, 16, 1), (1, 1, 7)])
class TestSpecialCases:
    def test_size_1_without_stride_is_dropout(self, sides: tuple[int, int, int], rate: float) -> None:
        expected = torch.from_numpy(twin.dropout(*sides, rate, SEED, 5).copy())
        assert torch.equal(ones(sides, (1, 0, rate), rank=5), expected)
        # Spans without gaps cover everything: without share_t their length decides nothing.
        assert torch.equal(ones(sides, (3, 0, rate), rank=5), expected)

    def test_share_c_is_word_dropout(self, sides: tuple[int, int, int], rate: float) -> None:
        expected = torch.from_numpy(twin.word_dropout(*sides, rate, SEED, 5).copy())
        assert torch.equal(ones(sides, (1, 0, rate), share_c=True, rank=5), expected)

    def test_a_span_of_the_whole_sequence_is_variational_dropout(
        self, sides: tuple[int, int, int], rate: float
    ) -> None:
        expected = torch.from_numpy(twin.variational_dropout(*sides, rate, SEED, 5).copy())
        for size, stride in ((sides[1], 0), (sides[1] + 3, 2), (2**30 - 1, 2**30 - 1)):
            assert torch.equal(ones(sides, (size, stride, rate), share_t=True, rank=5), expected)


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize(("layout", "shape"), CASES[::2])
def test_rate_0_keeps_and_rate_1_drops_what_is_covered(
    layout: str, shape: tuple[int, ...], sharing: tuple[bool, bool]
) -> None:
    x = torch.randn(shape)
    for normalize in ("expected", "mask", "none"):
        assert torch.equal(token_dropout(x, (2, 1, 0), SEED, layout, *sharing, normalize), x)
        everything = token_dropout(torch.full_like(x, float("nan")), (1, 0, 1.0), SEED, layout, *sharing, normalize)
        assert torch.equal(everything, torch.zeros_like(x))
    covered = token_dropout(torch.ones(shape), (2, 1, 1), SEED, layout, *sharing, "none") == 0
    n, t, _ = sides_of(shape, layout)
    by_token = covered.movedim(LAYOUTS[layout][:2], (0, 1)).reshape(n, t, -1)
    assert torch.equal(by_token, by_token[:, :, :1].expand_as(by_token))


@pytest.mark.parametrize("shape", [(0, 4, 4), (3, 0, 4), (2, 3, 0)])
@pytest.mark.parametrize("normalize", ["expected", "mask"])
@pytest.mark.parametrize("sharing", SHARING)
def test_empty_tensors(shape: tuple[int, ...], normalize: str, sharing: tuple[bool, bool]) -> None:
    x = torch.empty(shape, requires_grad=True)
    y = token_dropout(x, (2, 1, 0.5), SEED, "NTC", *sharing, normalize)
    y.sum().backward()
    assert y.shape == shape
    assert x.grad is not None


# ---- contracts, on both layouts of four dimensions -------------------------------------------------------------------


@pytest.mark.parametrize("sharing", SHARING, ids=str)
@pytest.mark.parametrize("layout", ["NHTD", "NHQK"])
class TestContracts:
    @pytest.mark.usefixtures("both_ways")
    def test_memory_format(self, layout: str, sharing: tuple[bool, bool]) -> None:
        contracts.check_memory_format(call(layout, sharing), FIELDS)

    @pytest.mark.usefixtures("both_ways")
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_non_finite(self, layout: str, sharing: tuple[bool, bool], dtype: torch.dtype) -> None:
        contracts.check_non_finite(call(layout, sharing), torch.tensor([2, 1, 0.7], dtype=torch.float64), dtype)

    def test_backward_is_the_op(self, layout: str, sharing: tuple[bool, bool]) -> None:
        contracts.check_backward_is_the_op(call(layout, sharing), FIELDS)

    def test_forward_mode(self, layout: str, sharing: tuple[bool, bool]) -> None:
        contracts.check_forward_mode(call(layout, sharing, "mask"), FIELDS)

    def test_functional_and_per_sample_gradients(self, layout: str, sharing: tuple[bool, bool]) -> None:
        contracts.check_functional_gradients(call(layout, sharing), FIELDS)

    def test_saves_no_mask(self, layout: str, sharing: tuple[bool, bool]) -> None:
        assert contracts.saved_bytes(call(layout, sharing, "mask"), FIELDS) == 5 * 8

    @pytest.mark.parametrize("memory", MEMORY)
    def test_opcheck(self, layout: str, sharing: tuple[bool, bool], memory: str) -> None:
        """Every memory format in every dtype, each pair with one of the sharings, which opcheck does not look at."""
        for i, dtype in enumerate(DTYPES):
            if (MEMORY.index(memory) + i) % 4 == SHARING.index(sharing) or sharing == (False, False):
                contracts.check_opcheck(call(layout, sharing, "mask"), FIELDS, memory, dtype)


def test_gradients() -> None:
    contracts.check_gradients(call("NHQK", (False, False), "mask"), FIELDS)


def test_all_modes_of_differentiation_agree() -> None:
    contracts.check_modes_of_differentiation_agree(call("NHTD", (True, False), "mask"), FIELDS)


@dynamo_traces_gradients_of_ops
@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_transformations() -> None:
    contracts.check_compiled_transformations(call("NHQK", (False, False)), FIELDS)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(
    ("layout", "memory"),
    [("NHQK", "contiguous"), ("NHTD", "channels_last"), ("NHQK", "sliced"), ("NHTD", "expanded")],
)
def test_compiled_equals_eager(layout: str, memory: str) -> None:
    """Each memory format with another sharing."""
    sharing = SHARING[MEMORY.index(memory)]
    contracts.check_compiled_equals_eager(call(layout, sharing, "mask"), FIELDS, memory)


@pytest.mark.usefixtures("fresh_dynamo")
def test_no_recompilation() -> None:
    values = [torch.tensor([1 + i % 9, i % 4, i / 50], dtype=torch.float64) for i in range(51)]
    contracts.check_no_recompilation(call("NHTD", (True, False), "mask"), values)


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("sharing", SHARING, ids=str)
def test_memory(sharing: tuple[bool, bool]) -> None:
    """Beyond the output: a bounded amount, however large the activation."""
    for shape, layout in (((4, 512, 1024), "NTC"), ((2, 4, 512, 512), "NHQK")):
        x = torch.ones(shape)
        peak = contracts.peak_bytes(lambda x=x, layout=layout: token_dropout(x, (4, 4, 0.5), SEED, layout, *sharing))
        # Share_c keeps a decision and a factor for each token, and draws as many words as a slice has cells.
        assert peak - x.nbytes <= 12 * 2**20


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("seed", [SEED, None])
def test_checkpointing(seed: int | None, reentrant: bool) -> None:
    """The second forward draws the mask of the first: from the seed, or from the random state that is preserved."""
    x = torch.randn(3, 8, 6, requires_grad=True)

    def block(x: torch.Tensor) -> torch.Tensor:
        return token_dropout(torch.sin(x), FIELDS, seed) ** 2

    gradients = []
    for function in (block, lambda x: checkpoint(block, x, use_reentrant=reentrant, preserve_rng_state=True)):
        torch.manual_seed(5)
        y = function(x)
        torch.rand(3)  # the state has moved on before backward
        x.grad = None
        y.sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


def test_a_seed_of_none_follows_manual_seed() -> None:
    x = torch.ones(8, 16, 16)
    torch.manual_seed(3)
    first, second = token_dropout(x, FIELDS), token_dropout(x, FIELDS)
    torch.manual_seed(3)
    assert torch.equal(token_dropout(x, FIELDS), first)
    assert not torch.equal(first, second)


def test_vmap_gives_every_element_the_mask_of_its_own_call() -> None:
    x = torch.randn(3, 2, 8, 5)
    seed = torch.tensor(SEED)
    y = torch.func.vmap(lambda x: token_dropout(x, FIELDS, seed), in_dims=1, out_dims=1)(x)
    for i in range(2):
        assert torch.equal(y[:, i], token_dropout(x[:, i], FIELDS, seed))
    with pytest.raises(ValueError, match="seed and fields must not be batched by vmap"):
        torch.func.vmap(lambda seed: token_dropout(x[0], FIELDS, seed))(torch.arange(3))


# ---- arguments -----------------------------------------------------------------------------------------------------


def fields(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
        ({"x": torch.ones(2, 3, 4, dtype=torch.int64)}, TypeError, "x must be float64, .* got torch.int64"),
        ({"x": torch.ones(2, 3)}, ValueError, r"x must have 3 dimensions for layout 'NTC', got shape \(2, 3\)"),
        ({"layout": "NHTD"}, ValueError, r"x must have 4 dimensions for layout 'NHTD', got shape \(2, 3, 4\)"),
        ({"layout": "NCT"}, ValueError, "layout must be 'NTC' or 'TNC' or 'NHTD' or 'NHQK', got 'NCT'"),
        ({"layout": None}, TypeError, "layout must be .* got None of type NoneType"),
        ({"fields": 0.5}, TypeError, r"fields must be \(size, stride, rate\) or a float64 CPU tensor .* got 0.5"),
        ({"fields": (1, 2)}, TypeError, r"fields must be \(size, stride, rate\)"),
        ({"fields": (0, 2, 0.5)}, ValueError, r"size must be in \[1, .*\], got 0"),
        ({"fields": (2**30, 2, 0.5)}, ValueError, r"size must be in \[1, .*\], got 1073741824"),
        ({"fields": (1.5, 2, 0.5)}, ValueError, "size must be a whole number, got 1.5"),
        ({"fields": (1, -1, 0.5)}, ValueError, r"stride must be in \[0, .*\], got -1"),
        ({"fields": (1, 0.5, 0.5)}, ValueError, "stride must be a whole number, got 0.5"),
        ({"fields": (1, 2, 1.5)}, ValueError, r"rate must be in \[0, 1\], got 1.5"),
        ({"fields": ("1", 2, 0.5)}, TypeError, "size must be a number .* got '1' of type str"),
        ({"fields": (1, True, 0.5)}, TypeError, "stride must be a number .* got True of type bool"),
        ({"fields": fields(1, 2, float("nan"))}, ValueError, r"rate must be in \[0, 1\], got nan"),
        ({"fields": fields(2.5, 2, 0.5)}, ValueError, "size must be a whole number, got 2.5"),
        ({"fields": fields(1, 2)}, ValueError, r"fields must be a float64 CPU tensor \(size, stride, rate\)"),
        ({"fields": fields(1, 2, 0.5).float()}, ValueError, "fields must be .* got torch.float32"),
        ({"share_t": 1}, TypeError, "share_t must be a bool, got 1 of type int"),
        ({"share_c": None}, TypeError, "share_c must be a bool, got None of type NoneType"),
        ({"normalize": "sum"}, ValueError, "normalize must be 'expected' or 'mask' or 'none', got 'sum'"),
        ({"seed": 2**64}, ValueError, r"seed must be in \[-2\^63, 2\^64\), got"),
        ({"rank": -1}, ValueError, r"rank must be in \[0, 2\^32\), got -1"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    accepted = {"x": torch.ones(2, 3, 4), "fields": (1, 2, 0.5)}
    token_dropout(**accepted)
    with pytest.raises(error, match=message):
        token_dropout(**(accepted | arguments))
