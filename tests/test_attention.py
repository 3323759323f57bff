"""token_attention: values and gradients against a float64 twin, masks, memory, and the contracts."""

from __future__ import annotations

from typing import Any

import attention_cases as cases
import mask_contracts as contracts
import pytest
import torch
import torch.nn.functional as F
from attention_cases import DTYPES
from attention_cases import FIELDS
from attention_cases import SHARING
from mask_contracts import LAYOUTS
from mask_contracts import SEED
from mask_contracts import fresh_dynamo  # noqa: F401

from autodropout.kernels import attention
from autodropout.kernels import softmax_token_dropout
from autodropout.kernels import token_attention
from autodropout.kernels import token_dropout
from autodropout.reproduce.models.transformer_xl import RelativeAttention
from autodropout.reproduce.models.transformer_xl import Size
from autodropout.reproduce.models.transformer_xl import shifted

OPS = torch.ops.autodropout
NORMALIZE = ("expected", "mask", "none")
# Samples, heads, queries, keys, head size; then whether causal. Head starts are no multiples of 4 channels.
SHAPES = [((2, 3, 5, 7, 4), False), ((1, 2, 7, 12, 6), True), ((3, 1, 8, 8, 3), True), ((1, 1, 1, 1, 1), False)]


def itself(x: torch.Tensor, fields: Any = FIELDS, seed: Any = SEED, **options: Any) -> torch.Tensor:
    """Of one tensor, so that contracts of ops on an activation can be asked for."""
    return token_attention(x, x * 0.5, x + 1, fields, seed, **options)


def gradients(out: torch.Tensor, leaves: tuple[torch.Tensor, ...], upstream: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"out": out, **dict(zip(("dq", "dk", "dv"), torch.autograd.grad(out, leaves, upstream), strict=True))}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("index", range(len(SHAPES)))
def test_equals_the_twin(
    index: int, sharing: tuple[bool, bool], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape, causal = SHAPES[index]
    normalize, rank, seed = NORMALIZE[index % 3], index % 2 * 3, 2**40 + index
    case = cases.case(shape, dtype, seed, sharing, normalize, rank, causal)
    options = {"share_t": sharing[0], "share_c": sharing[1], "normalize": normalize, "rank": rank}
    # All at once, some rows of a head, some heads.
    for cells in (attention.SLICE_CELLS, 3 * shape[3], 2 * shape[2] * shape[3]):
        monkeypatch.setattr(attention, "SLICE_CELLS", cells)
        for transposed in (False, True):  # as projections give them: (N, T, H, D)
            leaves = tuple(
                (x.transpose(1, 2).contiguous().transpose(1, 2) if transposed else x.clone()).requires_grad_()
                for x in (case.q, case.k, case.v)
            )
            out = token_attention(*leaves, FIELDS, seed, causal=causal, scale=case.factor, **options)
            got = gradients(out, leaves, case.upstream)
            assert [x.stride() for x in got.values()] == [x.stride() for x in (leaves[0], *leaves)]
            cases.check(got, case, rounded=False)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("normalize", NORMALIZE)
def test_masks_and_scale_are_those_of_token_dropout(normalize: str, sharing: tuple[bool, bool], causal: bool) -> None:
    """Values that are unit vectors show the weights. Scores of 0 make them 1 / keys seen, exactly rounded."""
    options = {"share_t": sharing[0], "share_c": sharing[1], "normalize": normalize, "rank": 3}
    zeros = torch.zeros(2, 3, 9, 13)
    keys, values = torch.zeros(2, 3, 13, 13), torch.eye(13).expand(2, 3, 13, 13)
    shown = token_attention(zeros, keys, values, FIELDS, SEED, causal=causal, **options)
    scores = zeros.masked_fill(torch.ones(9, 13).triu(5).bool(), -torch.inf) if causal else zeros
    assert torch.equal(shown, token_dropout(scores.softmax(-1), FIELDS, SEED, layout="NHQK", **options))
    assert 0 < int((shown == 0).sum()) < shown.numel()


@pytest.mark.parametrize("share_t", [False, True])
@pytest.mark.parametrize(("channels", "seen"), [(slice(0, 15), 13), (slice(5, 10), 13), (slice(6, 7), 4)])
def test_decisions_of_some_channels(channels: slice, seen: int, share_t: bool) -> None:
    """Also by the route of other devices, where what is covered is not listed."""
    expected = cases.token_twin.dropped(2, 13, 15, *cases.PATTERN, SEED, share_t, False, 3)[1, :seen, channels].T
    seed = torch.tensor(SEED)
    for listed in (True, False):
        got = attention._dropped(1, channels, seen, 13, FIELDS, seed, share_t, False, 3, listed)
        assert torch.equal(got, torch.from_numpy(expected))


def test_memory_is_a_quarter_of_the_separate_operations() -> None:
    """Forward and backward at 4,096 queries and keys.

    A run has E = 2^18 weights. With its scores (4 E bytes) live either the words of its mask, six buffers of int64 with
    a number for 4 weights (12 E) and three bool (3 E), or two more float tensors. Beyond runs there are out, what it is
    the gradient of, three gradients, and sums for the keys and their values.
    """
    length, head = 4096, 64
    leaves = [torch.randn(1, 1, length, head, requires_grad=True) for _ in range(3)]

    def fused() -> None:
        token_attention(*leaves, FIELDS, SEED, causal=True).sum().backward()

    def separate() -> None:
        q, k, v = leaves
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        weights = torch.softmax((q @ k.mT * head**-0.5).masked_fill(later, -torch.inf), -1)
        (token_dropout(weights, FIELDS, SEED, layout="NHQK") @ v).sum().backward()

    peak = contracts.peak_bytes(fused)
    assert peak <= 20 * 2**18 + 8 * 4 * length * head
    assert peak <= 4 * length**2 / 4  # a quarter of the weights alone
    assert 4 * peak <= contracts.peak_bytes(separate)


def test_saved_for_backward() -> None:
    """q, k, v, out, 4 bytes a row, seed, scale and three fields: nothing of queries times keys."""
    leaves = [torch.randn(2, 4, 64, 8, requires_grad=True) for _ in range(3)]
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.untyped_storage().nbytes()) or t, lambda t: t
    ):
        out = token_attention(*leaves, FIELDS, SEED)
    assert sum(saved) == 4 * out.nbytes + 4 * 2 * 4 * 64 + 8 + 8 + 24


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", range(3))
def test_not_a_number_spoils_the_rows_that_see_it(place: int, dtype: torch.dtype) -> None:
    """Of its sample and head, dropped or not; the others do not notice."""
    generator = torch.Generator().manual_seed(2)
    case = [torch.randn(2, 2, 6, 4, generator=generator).to(dtype) for _ in range(3)]
    clean = token_attention(*case, FIELDS, SEED, causal=True)
    case[place][1, 1, 3, 2] = float("nan")
    spoiled = token_attention(*case, FIELDS, SEED, causal=True)
    other = torch.ones_like(clean, dtype=torch.bool)
    other[1, 1] = False
    assert torch.equal(spoiled[other], clean[other])
    seeing = spoiled[1, 1, 3:, 2] if place == 2 else spoiled[1, 1, 3 : 4 if place == 0 else None]
    assert bool(seeing.isnan().all())


@pytest.mark.parametrize("queries_and_keys", [(0, 4), (3, 0), (0, 0)])
@pytest.mark.parametrize("head", [0, 5])
def test_empty_tensors(queries_and_keys: tuple[int, int], head: int) -> None:
    queries, keys = queries_and_keys
    leaves = [torch.randn(2, 3, length, head, requires_grad=True) for length in (queries, keys, keys)]
    out = token_attention(*leaves, FIELDS, SEED)
    out.sum().backward()
    assert out.shape == leaves[0].shape
    assert not bool(out.any())
    assert all(x.grad is not None and not bool(x.grad.any()) for x in leaves)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sharing", SHARING)
def test_gradients_and_their_gradients(sharing: tuple[bool, bool], causal: bool) -> None:
    leaves = [torch.randn(2, 2, length, 3, dtype=torch.float64, requires_grad=True) for length in (3, 5, 5)]

    def function(*leaves: torch.Tensor) -> torch.Tensor:
        options = {"share_t": sharing[0], "share_c": sharing[1], "normalize": "mask"}
        return token_attention(*leaves, (2, 1, 0.4), SEED, causal=causal, **options)

    assert torch.autograd.gradcheck(function, leaves)
    # Of one sample: the time grows with the square of the elements.
    assert torch.autograd.gradgradcheck(function, [x[:1].detach().requires_grad_() for x in leaves])


def test_forward_mode_and_vmap_are_refused() -> None:
    x = torch.randn(2, 2, 3, 3)
    with pytest.raises((RuntimeError, NotImplementedError), match="jvp|forward mode"):
        torch.func.jvp(itself, (x,), (x,))
    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.vmap(lambda x: itself(x, seed=torch.tensor(3)))(x[None])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype, layout: str) -> None:
    x = contracts.activation(layout, dtype=dtype)
    of_mask = torch.tensor(1.5, dtype=torch.float64)
    others = (FIELDS, torch.tensor(SEED), of_mask, 0.3, True, False, False, 3, False)
    leaves = tuple(x.clone(memory_format=torch.preserve_format).requires_grad_() for _ in range(3))
    torch.library.opcheck(OPS.token_attention.default, (*leaves, *others))
    with torch.no_grad():
        out, lse = OPS.token_attention(x, x, x, *others)
    arguments = (contracts.activation("channels_last").to(dtype), x, x, x, out, lse, *others)
    torch.library.opcheck(OPS.token_attention_backward.default, arguments)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_equals_eager(layout: str) -> None:
    contracts.check_compiled_equals_eager(lambda x, fields, seed: itself(x, fields, seed, causal=True), FIELDS, layout)


@pytest.mark.usefixtures("fresh_dynamo")
def test_no_recompilation() -> None:
    values = [torch.tensor([1 + i % 7, i % 5, i / 50], dtype=torch.float64) for i in range(51)]
    contracts.check_no_recompilation(lambda x, fields, seed: itself(x, fields, seed), values)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"q": [1.0]}, TypeError, "q must be a tensor, got list"),
        ({"k": torch.ones(2, 3, 4)}, ValueError, r"k must have 4 dimensions \(N, H, T, D\), got shape \(2, 3, 4\)"),
        ({"q": torch.ones(2, 3, 4, 5, dtype=torch.int64)}, TypeError, "q must be float64, .* got torch.int64"),
        ({"v": torch.ones(2, 3, 6, 5).half()}, TypeError, "v must have the dtype of q, torch.float32, got .*float16"),
        ({"v": torch.ones(2, 3, 6, 5, device="meta")}, ValueError, "v must be on the device of q, cpu, got meta"),
        ({"k": torch.ones(2, 1, 6, 5)}, ValueError, "k must have samples, heads and head size of q, .*, got .2, 1, 6"),
        ({"v": torch.ones(2, 3, 7, 5)}, ValueError, r"v must have the shape of k, \(2, 3, 6, 5\), got \(2, 3, 7, 5\)"),
        ({"causal": 1}, TypeError, "causal must be a bool, got 1 of type int"),
        ({"q": torch.ones(2, 3, 7, 5), "causal": True}, ValueError, "k must have at least as many keys .* 6 and 7"),
        ({"scale": "a"}, TypeError, "scale must be None or a finite number, got 'a' of type str"),
        ({"scale": float("nan")}, ValueError, "scale must be None or a finite number, got nan"),
        ({"implementation": "flash"}, ValueError, "implementation must be .* got 'flash'"),
        ({"fields": 0.3}, TypeError, r"fields must be \(size, stride, rate\) or .* got 0.3"),
        ({"fields": (0, 1, 0.5)}, ValueError, r"size must be in \[1, "),
        ({"fields": FIELDS.float()}, ValueError, "fields must be a float64 CPU tensor"),
        ({"share_t": 1}, TypeError, "share_t must be a bool, got 1 of type int"),
        ({"share_c": None}, TypeError, "share_c must be a bool, got None"),
        ({"normalize": "sum"}, ValueError, "normalize must be .* got 'sum'"),
        ({"seed": 2**64}, ValueError, r"seed must be in \[-2\^63, 2\^64\)"),
        ({"rank": -1}, ValueError, r"rank must be in \[0, 2\^32\), got -1"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    accepted = {"q": torch.randn(2, 3, 4, 5), "k": torch.randn(2, 3, 6, 5), "v": torch.randn(2, 3, 6, 5)}
    accepted |= {"fields": FIELDS, "seed": 3}
    token_attention(**accepted)
    with pytest.raises(error, match=message):
        token_attention(**(accepted | arguments))


def test_what_the_kernels_cannot_do_is_refused() -> None:
    wide, double = torch.ones(1, 1, 2, 129), torch.ones(1, 1, 2, 4, dtype=torch.float64)
    for x, message in ((wide, "torch.float32 and heads of 129"), (double, "torch.float64 and heads of 4")):
        with pytest.raises(ValueError, match=f"implementation must be .* got 'triton' for {message}"):
            token_attention(x, x, x, FIELDS, 3, implementation="triton")
        assert token_attention(x, x, x, FIELDS, 3).shape == x.shape


@torch.no_grad()
def test_relative_positions_are_a_longer_head() -> None:
    """Transformer-XL's scores by docs/attention.md, against its own formula with shifted scores, in float64.

    A score has D + C terms, each with a rotation of 4 roundings or with an angle of up to K that is rounded once; the
    softmax makes twice its error relative, sums over K keys and D in out add their lengths.
    """
    heads, head, queries, keys = 2, 6, 5, 9
    layer = RelativeAttention(Size(layers=1, width=heads * head, heads=heads, inner=4)).double()
    torch.nn.init.normal_(layer.u)
    torch.nn.init.normal_(layer.v)
    q, k, v = (torch.randn(2, heads, length, head, dtype=torch.float64) for length in (queries, keys, keys))
    width = heads * head
    frequencies = 10_000.0 ** -(torch.arange(0, width, 2.0, dtype=torch.float64) / width)
    angles = torch.arange(keys)[:, None] * frequencies
    place = torch.cat((angles.sin(), angles.cos()), -1)  # of position 0, 1, ...; of distances the other way round

    r = layer._heads(layer.to_position(place.flip(0))[None])
    terms = (q + layer.u) @ k.mT + shifted((q + layer.v) @ r.mT)
    later = torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries + 1)
    weights = softmax_token_dropout((terms * head**-0.5).masked_fill(later, -torch.inf), FIELDS, SEED)

    sin, cos = place[keys - queries :].chunk(2, -1)
    rows = layer.to_position.weight.unflatten(0, (heads, head))
    of_sin, of_cos = ((q + layer.v) @ rows).chunk(2, -1)
    rotated = torch.cat((of_cos * sin - of_sin * cos, of_sin * sin + of_cos * cos), -1)
    longer = (
        torch.cat((q + layer.u, rotated), -1),
        torch.cat((k, place.expand(2, heads, -1, -1)), -1),
        F.pad(v, (0, width)),
    )
    out = token_attention(*longer, FIELDS, SEED, causal=True, scale=head**-0.5)[..., :head]
    absolute = (q + layer.u).abs() @ k.mT.abs() + 2 * ((q + layer.v).abs() @ rows.abs()).sum(-1, keepdim=True)
    relative = 2 * (head + width + 4 + keys) * float(absolute.max()) * head**-0.5 + 4 * keys + 2 * head
    bound = 2 * relative * torch.finfo(torch.float64).eps * (weights @ v.abs())
    assert bool(((out - weights @ v).abs() <= bound).all())
    assert float((weights @ v).abs().max()) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_changes_nothing(dtype: torch.dtype) -> None:
    """It stays on inside an op, whose products it would form in 16 bits; compiled ones it does not reach."""
    generator = torch.Generator().manual_seed(0)
    leaves = tuple(
        (size * torch.randn((1, 2, 32, 16), generator=generator)).to(dtype).requires_grad_() for size in (3, 3, 1)
    )
    upstream = torch.randn((1, 2, 32, 16), generator=generator).to(dtype)

    def op(*leaves: torch.Tensor) -> torch.Tensor:
        return token_attention(*leaves, (2, 2, 0.3), SEED)

    expected = gradients(op(*leaves), leaves, upstream)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(op(*leaves), leaves, upstream)
        compiled = torch.compile(op, backend="aot_eager")(*leaves)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert torch.equal(compiled, expected["out"])


def test_large_scores_under_autocast_to_float16() -> None:
    x = 60 * torch.randn((1, 1, 8, 64), generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.float16):
        assert itself(x).isfinite().all()


def test_a_scale_that_differs_between_compiled_calls() -> None:
    q = torch.randn((1, 2, 8, 4), generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(lambda x, scale: itself(x, scale=scale), backend="aot_eager", fullgraph=True)
    for scale in (0.1, 0.2, 0.3):
        assert torch.equal(compiled(q, scale), itself(q, scale=scale))


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_other_layouts_are_refused_by_name(name: str) -> None:
    given = {one: torch.ones(1, 1, 2, 2) for one in "qkv"}
    given[name] = given[name].to_sparse()
    with pytest.raises(TypeError, match=f"^{name} must be a strided tensor, got torch.sparse_coo$"):
        token_attention(**given, fields=FIELDS, seed=SEED)
