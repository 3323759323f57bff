"""`apply_policy` at the places of a Transformer's layer: the contracts of the ConvNet case, and the masks."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn

from autodropout import BernoulliPattern
from autodropout import BlockPattern
from autodropout import Pattern
from autodropout import Policy
from autodropout import TiledPattern
from autodropout import TokenPattern
from autodropout import apply_policy
from autodropout import pattern_dropout
from autodropout import remove_policy
from autodropout.nn import PatternSite
from autodropout.nn import SoftmaxSite
from autodropout.policy import LAYER_PLACES
from autodropout.policy import TOKEN_PLACES
from autodropout.policy import Site
from autodropout.reproduce.models.transformer_xl import Size
from autodropout.reproduce.models.transformer_xl import TransformerXL
from autodropout.sites import find_sites

WORDS = torch.arange(14).view(2, 7)
PATTERN = TokenPattern(2, 1, rate=0.5, share_t=True)
LAYOUTS = {"query": "NHTD", "key": "NHTD", "value": "NHTD", "softmax": "NHQK"}


def a_model(layers: int = 2) -> TransformerXL:
    torch.manual_seed(0)
    return TransformerXL(20, Size(layers, width=12, heads=3, inner=8))


def policy_of(pattern: Pattern | None, places: tuple[str, ...] = TOKEN_PLACES, layers: int = 2) -> Policy:
    sites = [
        Site(
            f"layers.{layer}.{'' if place == 'residual' else 'attention.'}{place}", layer / (layers - 1), place, pattern
        )
        for layer in range(layers)
        for place in places
    ]
    return Policy(tuple(sites))


@pytest.mark.parametrize("place", LAYER_PLACES)
def test_sites_are_found_with_their_lengths(place: str) -> None:
    model, memories = a_model(3), torch.zeros(3, 2, 4, 12)
    sites = find_sites(model, (WORDS, WORDS, memories), place)
    assert [site.depth for site in sites] == [0.0, 0.5, 1.0]
    assert [site.name.split(".")[-1] for site in sites] == [place] * 3
    assert {site.lengths for site in sites} == {(11 if place in ("key", "value", "softmax") else 7,)}
    assert [site.name for site in find_sites(model, place=place)] == [site.name for site in sites]


def test_applied_sites_have_exact_rates_and_are_taken_off_again() -> None:
    model = a_model()
    keys, classes = list(model.state_dict()), [type(module) for module in model.modules()]
    model.eval()
    before = model(WORDS, WORDS)[0]
    model.train()
    applied = apply_policy(model, policy_of(PATTERN), (WORDS, WORDS))
    assert len(applied) == 12
    assert {(site.rate, site.length, site.map) for site in applied} == {(0.5 * 2 / 3, 7, None)}
    assert list(model.state_dict()) == keys
    assert not torch.equal(model(WORDS, WORDS)[0], model(WORDS, WORDS)[0])
    model.eval()
    assert torch.equal(model(WORDS, WORDS)[0], before)
    model.train()
    remove_policy(model)
    assert [type(module) for module in model.modules()] == classes
    assert torch.equal(model(WORDS, WORDS)[0], before)


@pytest.mark.parametrize("place", LAYER_PLACES)
@pytest.mark.parametrize("share_c", [False, True])
def test_masks_are_those_of_the_pattern_in_the_layout_of_the_place(place: str, share_c: bool) -> None:
    model, pattern = a_model(), replace(PATTERN, share_c=share_c)
    apply_policy(model, Policy((Site("any", 0.0, place, pattern),)))
    (module,) = [m for n, m in model.named_modules() if n.endswith(f"0.{place}") or n.endswith(f"0.attention.{place}")]
    layout = LAYOUTS.get(place, "NTC")
    x = torch.randn(2, 3, 5, 6) if layout != "NTC" else torch.randn(2, 5, 6)
    torch.manual_seed(9)
    y = module(x)
    torch.manual_seed(9)
    expected = pattern_dropout(x.softmax(-1) if place == "softmax" else x, pattern, layout=layout)
    assert torch.equal(y, expected)
    assert (y == 0).any()


def test_a_step_of_training_drops_the_masks_of_the_patterns() -> None:
    """At all places of all layers at once, with a memory. The embedded words draw a seed first, then every site one."""
    model, memories = a_model(), torch.randn(2, 2, 4, 12)
    patterns = [TokenPattern(1 + i % 3, i % 2, rate=0.5, share_t=i % 4 < 2, share_c=i % 5 == 4) for i in range(14)]
    places = [(layer, place) for layer in range(2) for place in LAYER_PLACES]
    sites = [
        Site(f"{layer}.{place}", float(layer), place, p) for (layer, place), p in zip(places, patterns, strict=True)
    ]
    applied = {site.name: site.pattern for site in apply_policy(model, Policy(tuple(sites)))}
    seen: list[tuple[Pattern | None, str, torch.Tensor, torch.Tensor]] = []
    for name, module in model.named_modules():
        if isinstance(module, PatternSite):

            def keep(module: nn.Module, x: tuple[torch.Tensor], y: torch.Tensor, name: str = name) -> None:
                assert isinstance(module, PatternSite)
                before = x[0].softmax(-1) if module.place == "softmax" else x[0]
                seen.append((applied[name], module.layout, before.detach(), y.detach()))

            module.register_forward_hook(keep)
    torch.manual_seed(11)
    _, *seeds = [torch.ops.autodropout.draw_seed(device=torch.device("cpu")) for _ in (None, *places)]
    torch.manual_seed(11)
    model(WORDS, WORDS, memories)
    assert len(seen) == len(seeds)
    for (pattern, layout, before, after), seed in zip(seen, seeds, strict=True):
        assert isinstance(pattern, TokenPattern)
        kept = mask_in(layout, pattern, before.shape, seed)
        dropped = (after == 0) & (before != 0)  # a hidden value may be 0 itself, and a later key's weight is
        assert torch.equal(dropped, ~kept & (before != 0))
        assert dropped.any()


def mask_in(layout: str, pattern: TokenPattern, shape: torch.Size, seed: torch.Tensor) -> torch.Tensor:
    """`pattern.mask`, from (N, T, C) to the layout, by its definition."""
    if layout == "NTC":
        return pattern.mask(*shape, seed=seed)
    n, heads, third, fourth = shape
    if layout == "NHTD":
        return pattern.mask(n, third, heads * fourth, seed).view(n, third, heads, fourth).permute(0, 2, 1, 3)
    assert layout == "NHQK"
    return pattern.mask(n, fourth, heads * third, seed).view(n, fourth, heads, third).permute(0, 2, 3, 1)


def test_copies_and_pickles_keep_their_patterns() -> None:
    model = a_model()
    apply_policy(model, policy_of(PATTERN))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.manual_seed(3)
        expected = model(WORDS, WORDS)[0]
        torch.manual_seed(3)
        assert torch.equal(other(WORDS, WORDS)[0], expected)
        remove_policy(other)
        assert list(other.state_dict()) == list(model.state_dict())


def test_a_policy_moves_by_relative_depth_within_each_place() -> None:
    patterns = [TokenPattern(size, rate=0.1) for size in (1, 2, 3)]
    sites = [Site(f"{place}.{i}", i / 2, place, p) for place in ("key", "output") for i, p in enumerate(patterns)]
    applied = apply_policy(a_model(5), Policy(tuple(sites)))
    # Depths 0, 1/4, 1/2, 3/4, 1; ties go to the earlier.
    assert [site.pattern for site in applied] == [patterns[i] for i in (0, 0, 1, 1, 2)] * 2
    assert [site.name.split(".")[-1] for site in applied] == ["key"] * 5 + ["output"] * 5


def test_classical_dropout_is_a_policy_too() -> None:
    model = a_model()
    for shared in ("none", "sample"):
        applied = apply_policy(model, policy_of(BernoulliPattern(0.25, shared)), (WORDS, WORDS))
        assert {site.rate for site in applied} == {0.25}
        assert model(WORDS, WORDS)[0].isfinite().all()
        remove_policy(model)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (policy_of(TiledPattern(0.25)), "a TokenPattern, or a BernoulliPattern of cells or samples, at place 'query'"),
        (
            policy_of(BlockPattern(0.1, 3)),
            "a TokenPattern, or a BernoulliPattern of cells or samples, at place 'query'",
        ),
        (policy_of(BernoulliPattern(0.1, "map")), "a TokenPattern, or a BernoulliPattern of cells"),
        (Policy((Site("a", 0.0, "batch_norm", PATTERN),)), "a pattern of maps at place 'batch_norm'"),
        (
            policy_of(TokenPattern(7, rate=0.96)),
            r"site 'layers.0.attention.query' \(7 tokens\) .* at most 0.95, got 0.96",
        ),
        (Policy((Site("a", 0.0, "branch", None),)), "no sites of place 'branch'"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_changes(policy: Policy, message: str) -> None:
    model = a_model()
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        apply_policy(model, policy, (WORDS, WORDS))
    assert [type(module) for module in model.modules()] == classes


def test_samples_are_not_told_from_tokens_where_time_comes_first() -> None:
    model = nn.Sequential(PatternSite("output", "TNC"))
    with pytest.raises(ValueError, match=r"^shared must be 'none' where the layout is 'TNC', got 'sample' at '0'$"):
        apply_policy(model, Policy((Site("a", 0.0, "output", BernoulliPattern(0.5, "sample")),)))
    assert type(model[0]) is PatternSite
    apply_policy(model, Policy((Site("a", 0.0, "output", BernoulliPattern(0.5, "none")),)))


def test_the_example_runs_once_for_all_places() -> None:
    model, runs = a_model(), []
    model.register_forward_hook(lambda *_: runs.append(None))
    apply_policy(model, policy_of(PATTERN), (WORDS, WORDS))
    assert len(runs) == 1


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_compiled_training_is_eager_training() -> None:
    model = nn.Sequential(PatternSite("output", "NTC"), nn.Linear(6, 6))
    apply_policy(model, Policy((Site("a", 0.0, "output", PATTERN),)))
    x = torch.randn(2, 5, 6)
    torch.manual_seed(5)
    expected = model(x)
    torch.manual_seed(5)
    assert torch.equal(torch.compile(model, fullgraph=True)(x), expected)


def test_nothing_is_left_in_an_exported_graph() -> None:
    model = nn.Sequential(PatternSite("query", "NHTD"), SoftmaxSite())
    apply_policy(model, Policy((Site("a", 0.0, "query", PATTERN), Site("b", 0.0, "softmax", PATTERN))))
    graph = torch.export.export(model.eval(), (torch.randn(2, 3, 4, 5),)).graph
    assert [node.name for node in graph.nodes if node.op == "call_function"] == ["softmax"]


def test_a_place_or_layout_that_is_not_known_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^place must be one of 'query', .*'feed_forward', got 'attention'$"):
        PatternSite("attention")
    with pytest.raises(ValueError, match=r"^layout must be one of 'NTC', 'TNC', 'NHTD', 'NHQK', got 'NCT'$"):
        PatternSite("query", "NCT")
