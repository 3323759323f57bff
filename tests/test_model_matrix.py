"""`apply_policy` on many models of three libraries: see model_matrix.py, and docs/models.md, which is made from it."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from applied import SIGMAS
from applied import standard_error
from applied import with_random_norms
from model_matrix import MODELS
from model_matrix import REFUSED
from model_matrix import made
from model_matrix import output
from model_matrix import page
from torch import nn

from autodropout import Policy
from autodropout import Site
from autodropout import TiledPattern
from autodropout import TokenPattern
from autodropout import apply_policy
from autodropout import remove_policy
from autodropout.masked import SiteDropout
from autodropout.policy import TOKEN_PLACES

CELLS = TokenPattern(1, rate=0.25)
TILES = TiledPattern(0.25, stride=0.25, repeat=2, rotate=30)
EVERYWHERE = Policy((Site("*", 0.0, pattern=TILES), *(Site(place, 0.0, place, CELLS) for place in TOKEN_PLACES)))


def dropped_shares(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> dict[SiteDropout, list[tuple[Any, Any]]]:
    """What each site's dropout gets and gives, while the model runs; of attention, weights written out."""
    seen: dict[SiteDropout, list[tuple[Any, Any]]] = {}
    after_softmax = SiteDropout.after_softmax

    def record(dropout: SiteDropout, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        seen.setdefault(dropout, []).append((x.detach().clone(), y.detach().clone()))
        return y

    def weights(self: SiteDropout, scores: torch.Tensor) -> torch.Tensor:
        return record(self, scores.softmax(-1), after_softmax(self, scores))

    def attention(
        self: SiteDropout, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float | None
    ) -> torch.Tensor:
        scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
        if causal:
            scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
        return self.after_softmax(scores) @ v

    monkeypatch.setattr(SiteDropout, "after_softmax", weights)
    monkeypatch.setattr(SiteDropout, "fused", attention)
    for module in model.modules():
        if isinstance(module, SiteDropout):

            def hook(dropout: nn.Module, x: tuple[torch.Tensor], y: torch.Tensor) -> None:
                assert isinstance(dropout, SiteDropout)
                record(dropout, x[0], y)

            # In front of everything else, as the next module may work in place.
            module.register_forward_hook(hook, prepend=True)
    return seen


@pytest.mark.parametrize(("library", "name"), [(library, name) for library, names in MODELS.items() for name in names])
def test_models_take_what_they_have_places_for(library: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """5 standard errors: two-sided alpha = 5.8e-7 a site by the normal approximation, 2e-3 for all of about 3,000."""
    warnings.simplefilter("ignore")
    model, inputs = made(library, name)
    with_random_norms(model)
    keys, classes = list(model.state_dict()), [type(module) for module in model.modules()]
    with torch.no_grad():
        before = output(model.eval(), inputs)
        fitted = EVERYWHERE.fit(model, inputs, verbose=False)
        assert tuple(dict.fromkeys(site.place for site in fitted.sites)) == MODELS[library][name][0]
        applied = apply_policy(model, fitted, inputs)
        assert len(applied) == len(fitted.sites)
        assert list(model.state_dict()) == keys
        assert torch.equal(output(model, inputs), before)

    seen = dropped_shares(model, monkeypatch)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    loss = output(model.train(), inputs).float().square().mean()
    loss.backward()
    optimizer.step()
    assert loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert len(seen) == len(applied)
    for dropout, runs in seen.items():
        for x, y in runs:
            there = x != 0
            share = ((y == 0) & there).sum().item() / int(there.sum())
            if isinstance(dropout.pattern, TiledPattern):
                rate, error = TILES.expected_rate(*x.shape[2:]), standard_error(TILES, y == 0)
            else:
                rate, error = CELLS.rate, math.sqrt(CELLS.rate * (1 - CELLS.rate) / int(there.sum()))
            assert abs(share - rate) <= SIGMAS * error + 1e-12

    remove_policy(model)
    assert [type(module) for module in model.modules()] == classes


@pytest.mark.parametrize(("library", "name"), [(library, name) for library, names in REFUSED.items() for name in names])
def test_no_model_silently_receives_nothing(library: str, name: str) -> None:
    model, inputs = made(library, name)
    with pytest.raises(ValueError, match="model has no sites of the places batch_norm, query"):
        EVERYWHERE.fit(model, inputs)
    with pytest.raises(ValueError, match="model has no sites of place 'batch_norm'"):
        apply_policy(model, EVERYWHERE, inputs)


def test_the_page_of_models_is_this_list() -> None:
    assert sum(map(len, MODELS.values())) >= 60
    assert Path(__file__).parent.parent.joinpath("docs/models.md").read_text(encoding="utf-8") == page()
