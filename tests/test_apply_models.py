"""Policies on real models: what is dropped, what is left alone, and that it can all be taken off again."""

from __future__ import annotations

import copy

import pytest
import torch
from applied import IMAGES
from applied import MIXED
from applied import MODELS
from applied import SIGMAS
from applied import assert_same_attributes
from applied import original
from applied import record
from applied import run
from applied import site_dropouts
from applied import snapshot
from applied import standard_error
from applied import train_copy

from autodropout import apply_policy
from autodropout import remove_policy
from autodropout.sites import find_sites


@pytest.mark.parametrize("name", MODELS)
def test_real_models_drop_what_was_asked_for(name: str) -> None:
    """5 standard errors: two-sided alpha = 5.8e-7 a site by the normal approximation, 1.4e-4 for all 240 sites."""
    model = copy.deepcopy(original(name))
    keys = list(model.state_dict())
    applied = apply_policy(model, MODELS[name][1], example=IMAGES)
    assert list(model.state_dict()) == keys

    targets = {site.name: site for site in find_sites(original(name), IMAGES)}
    expected_off = [site for site in targets.values() if MIXED.pattern_at(site.depth) is None]
    assert len(applied) == len(targets) - len(expected_off) > len(targets) / 2
    paths = {site.name: f"{targets[site.name].target}.pattern_dropout".lstrip(".") for site in applied}
    seen = record(model, list(paths.values()))
    for site in applied:
        target = targets[site.name]
        assert (site.depth, site.map) == (target.depth, target.map)
        assert site.map is not None
        assert site.rate == site.pattern.expected_rate(*site.map[1:])
        ((before, after),) = seen[paths[site.name]]
        assert before.shape == (len(IMAGES), *site.map)
        assert before.all(), site.name  # so whatever is 0 was dropped
        dropped = after == 0
        error = abs(dropped.double().mean().item() - site.rate)
        assert error <= SIGMAS * standard_error(site.pattern, dropped) + 1e-12, site
        assert dropped.any() or site.rate == 0, site


@pytest.mark.parametrize("name", MODELS)
def test_real_models_repeat_and_evaluate_as_before(name: str) -> None:
    model = copy.deepcopy(original(name))
    with torch.no_grad():
        before = run(copy.deepcopy(model).eval())
        apply_policy(model, MODELS[name][1], example=IMAGES)
        first = train_copy(model)
        assert torch.equal(train_copy(model), first)
        assert not torch.equal(train_copy(model, seed=8), first)
        assert not torch.equal(train_copy(original(name)), first)
        assert torch.equal(run(model.eval()), before)


@pytest.mark.parametrize("name", MODELS)
def test_real_models_are_restored(name: str) -> None:
    model = copy.deepcopy(original(name))
    attributes = snapshot(model)
    apply_policy(model, MODELS[name][1], example=IMAGES)
    assert site_dropouts(model)
    remove_policy(model)
    assert_same_attributes(model, attributes)
    with torch.no_grad():
        assert torch.equal(train_copy(model), train_copy(original(name)))
    remove_policy(model)  # nothing there: nothing happens
    apply_policy(model, MODELS[name][1], example=IMAGES)


@pytest.mark.parametrize("name", MODELS)
def test_real_models_train(name: str) -> None:
    """Activations overwrite their input in place: the gradients must not need what was overwritten."""
    model = copy.deepcopy(original(name))
    apply_policy(model, MODELS[name][1], example=IMAGES)
    run(model.train()).square().mean().backward()
    for path, parameter in model.named_parameters():
        assert parameter.grad is not None, path
        assert parameter.grad.isfinite().all(), path
