"""CUDA graphs: every replay draws masks of its own, and they are those of eager steps.

Written from PyTorch's documentation of graph-safe generators; no GPU has run it yet.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from trained import CASES
from trained import Case
from trained import activation
from trained import every_op

from autodropout import pattern_dropout
from autodropout.nn import PatternDropout
from autodropout.schedule import LinearSchedule

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SEED = 2**40 + 8
Step = Callable[[], list[torch.Tensor]]


def captured(step: Step) -> tuple[torch.cuda.CUDAGraph, list[torch.Tensor]]:
    """A graph of one step, after three outside it that compile kernels and copy tables to the device."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results


def replays(graph: torch.cuda.CUDAGraph, results: list[torch.Tensor], count: int) -> list[list[torch.Tensor]]:
    seen = []
    for _ in range(count):
        graph.replay()
        torch.cuda.synchronize()
        seen.append([result.clone() for result in results])
    return seen


def step_of(case: Case, memory_format: torch.memory_format, seed: torch.Tensor | None = None) -> Step:
    """Forward and backward of an activation; the mask of the backward pass is that of the forward pass."""
    x = activation(case.shape).cuda()
    if x.dim() == 4:
        x = x.to(memory_format=memory_format)
    x.requires_grad_()

    def step() -> list[torch.Tensor]:
        y = pattern_dropout(x, case.pattern, seed=seed)
        (gradient,) = torch.autograd.grad(y, x, x.detach())
        return [y.detach(), gradient]

    return step


formats = pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])


@every_op
@formats
def test_replay_k_is_eager_step_k(case: Case, memory_format: torch.memory_format) -> None:
    """Seeds are drawn in the graph from the default generator, whose offset each replay moves on."""
    step = step_of(case, memory_format)
    graph, results = captured(step)
    torch.cuda.manual_seed(7)
    replayed = replays(graph, results, 3)
    torch.cuda.manual_seed(7)
    for k in range(3):
        expected = step()
        for got, want in zip(replayed[k], expected, strict=True):
            assert torch.equal(got, want), k
        assert torch.equal(*replayed[k])
    for k in range(2):
        assert not torch.equal(replayed[k][0], replayed[k + 1][0])


@every_op
@formats
def test_a_seed_tensor_can_be_changed_between_replays(case: Case, memory_format: torch.memory_format) -> None:
    seed = torch.tensor(SEED, device="cuda")
    step = step_of(case, memory_format, seed)
    graph, results = captured(step)
    for value in (1, 2, 1):
        seed.fill_(value)
        (replayed,) = replays(graph, results, 1)
        assert all(torch.equal(*pair) for pair in zip(replayed, step(), strict=True))


def test_a_graph_keeps_the_pattern_of_its_capture() -> None:
    """The numbers of a pattern are read on the host: a schedule reaches a graph only when it is captured again."""
    case = CASES["block"]
    layer = PatternDropout(case.pattern)
    schedule = LinearSchedule(layer, 0.0, 0.9, 1)
    x = activation(case.shape).cuda()
    graph, results = captured(lambda: [layer(x)])
    schedule.step()
    (before,) = replays(graph, results, 1)
    assert not bool((before[0] == 0).any())
    graph, results = captured(lambda: [layer(x)])
    (after,) = replays(graph, results, 1)
    assert bool((after[0] == 0).any())


@every_op
def test_make_graphed_callables(case: Case) -> None:
    """PyTorch's own wrapper, which captures forward and backward apart."""
    width = case.shape[-1]
    model = nn.Sequential(nn.Linear(width, width), PatternDropout(case.pattern)).cuda()
    x = activation(case.shape).cuda().requires_grad_()
    graphed = torch.cuda.make_graphed_callables(model, (x,))
    masks = []
    for _ in range(2):
        y = graphed(x)
        y.sum().backward()
        masks.append((y == 0).clone())
    assert not torch.equal(*masks)
