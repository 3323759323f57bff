"""The terms of UDA's loss against cases worked out by hand: probabilities are given, scores are their logarithms."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from autodropout.reproduce.uda import annealing_threshold
from autodropout.reproduce.uda import consistency_loss
from autodropout.reproduce.uda import supervised_loss


def scores(*rows: list[float]) -> torch.Tensor:
    """Whose softmax are these rows."""
    return torch.tensor(rows, dtype=torch.float64).log().requires_grad_()


@pytest.mark.parametrize(
    ("schedule", "progress", "threshold"),
    [
        # 5 classes: from 0.2 up by 0.8 alpha. exp(-2.5) = 0.0820850, exp(-5) = 0.0067379.
        ("linear", 0.0, 0.2),
        ("linear", 0.25, 0.4),
        ("linear", 1.0, 1.0),
        ("log", 0.0, 0.2),
        ("log", 0.5, 0.2 + 0.8 * (1 - 0.0820850)),
        ("log", 1.0, 0.2 + 0.8 * (1 - 0.0067379)),
        ("exp", 0.0, 0.2 + 0.8 * 0.0067379),
        ("exp", 0.5, 0.2 + 0.8 * 0.0820850),
        ("exp", 1.0, 1.0),
        ("none", 0.0, 1.0),
        ("none", 0.5, 1.0),
    ],
)
def test_thresholds(schedule: str, progress: float, threshold: float) -> None:
    assert annealing_threshold(schedule, progress, 5) == pytest.approx(threshold, abs=1e-7)


def test_sure_images_leave_the_supervised_loss() -> None:
    given = scores([0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.25, 0.25, 0.5])
    labels = torch.tensor([0, 1, 0])
    # Own classes: 0.5, 0.8, 0.25. At 0.6 the second is left out: (log 2 + log 4) / 2 = 1.5 log 2.
    loss = supervised_loss(given, labels, 0.6)
    assert loss.item() == pytest.approx(1.5 * math.log(2), rel=1e-12)
    loss.backward()
    # Of cross-entropy: (p - onehot), halved by the mean over the two that count.
    expected = [[-0.25, 0.125, 0.125], [0, 0, 0], [-0.375, 0.125, 0.25]]
    torch.testing.assert_close(given.grad, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-15)
    # At 0.3 the third alone counts; below all of them the loss is 0 and not 0/0.
    assert supervised_loss(given, labels, 0.3).item() == pytest.approx(2 * math.log(2), rel=1e-12)
    assert supervised_loss(given, labels, 0.2).item() == 0.0


def test_threshold_1_is_mean_cross_entropy_also_of_images_that_are_certain() -> None:
    torch.manual_seed(0)
    given = torch.cat((torch.randn(6, 4), torch.tensor([[200.0, 0, 0, 0]])))
    labels = torch.tensor([0, 1, 2, 3, 0, 1, 0])
    torch.testing.assert_close(supervised_loss(given, labels), F.cross_entropy(given, labels))


def test_consistency_by_hand() -> None:
    teacher = scores([0.8, 0.2], [0.6, 0.4])
    student = scores([0.5, 0.5], [0.1, 0.9])
    # Temperature 1/2 squares the probabilities: 0.64 : 0.04 = 16 : 1. Only the first teacher is surer than 0.7.
    first = 16 / 17 * math.log(16 / 17 / 0.5) + 1 / 17 * math.log(1 / 17 / 0.5)
    loss = consistency_loss(student, teacher, temperature=0.5, confidence=0.7)
    assert loss.item() == pytest.approx(first / 2, rel=1e-12)
    loss.backward()
    assert teacher.grad is None, "the teacher is a target"
    # Of KL in the student's scores: p - q, halved by the mean over both images.
    expected = [[(0.5 - 16 / 17) / 2, (0.5 - 1 / 17) / 2], [0, 0]]
    torch.testing.assert_close(student.grad, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-15)
    # All count at confidence 0; temperature 1 takes the teacher as it is.
    both = 0.8 * math.log(0.8 / 0.5) + 0.2 * math.log(0.2 / 0.5) + 0.6 * math.log(6) + 0.4 * math.log(4 / 9)
    assert consistency_loss(student, teacher, 1.0, 0.0).item() == pytest.approx(both / 2, rel=1e-12)


def test_confidence_is_that_before_sharpening() -> None:
    teacher, student = scores([0.6, 0.4]), scores([0.5, 0.5])
    # Sharpened it would be 36 : 16, 0.69.
    assert consistency_loss(student, teacher, 0.5, 0.65).item() == 0.0
    assert consistency_loss(student, teacher, 0.5, 0.59).item() > 0.0


def test_a_student_that_agrees_loses_nothing_and_certainty_is_finite() -> None:
    same = scores([0.7, 0.2, 0.1])
    assert consistency_loss(same, same, 1.0, 0.0).item() == pytest.approx(0.0, abs=1e-15)
    certain = torch.tensor([[1000.0, 0.0, 0.0]])
    # The teacher's other classes have probability exactly 0: 0 log 0 is 0. The student is uniform.
    assert consistency_loss(torch.zeros(1, 3), certain, 0.4, 0.8).item() == pytest.approx(math.log(3), rel=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: annealing_threshold("cosine", 0.5, 3), "schedule must be one of none, log, linear, exp, got 'cosine'"),
        (lambda: annealing_threshold("log", 1.5, 3), "progress must be in .*, got 1.5"),
        (lambda: annealing_threshold("log", 0.5, 0), "classes must be at least 1, got 0"),
        (lambda: consistency_loss(torch.zeros(2, 3), torch.zeros(2, 3), 0.0, 0.8), "temperature must be above 0"),
        (lambda: consistency_loss(torch.zeros(2, 3), torch.zeros(2, 3), 1.0, 1.2), "confidence must be in"),
        (lambda: consistency_loss(torch.zeros(2, 3), torch.zeros(1, 3), 1.0, 0.8), "teacher must have the student's"),
    ],
)
def test_wrong_arguments(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]
