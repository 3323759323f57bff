"""The loss of UDA: Xie, Dai, Hovy, Luong & Le 2020, "Unsupervised Data Augmentation for Consistency Training".

    loss = supervised + lambda * consistency

K is the number of classes, t the share of all steps taken so far, p(. | x) the softmax of the network's scores. No
function here keeps a state; scores are `(N, K)`, the results scalars with a gradient.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

# How fast training-signal annealing lets labelled images in; "none" is without it.
ANNEALING = ("none", "log", "linear", "exp")
# So that log and exp schedules end within exp(-5) of 1, or begin within that of 0.
STEEPNESS = 5.0


def annealing_threshold(schedule: str, progress: float, classes: int) -> float:
    """Above which probability of its own class a labelled image takes no part in the loss, section 2.3 of the paper:

        eta(t) = alpha(t) * (1 - 1/K) + 1/K,    alpha(t) = 1 - exp(-5 t)    log
                                                           t                linear
                                                           exp(5 (t - 1))   exp

    It rises from chance to (nearly) 1, so that few labels are not learnt by heart before the rest has been seen. "none"
    is 1 throughout.

    Args:
        schedule: one of ANNEALING.
        progress: t, in [0, 1].
        classes: K, at least 1.

    Raises:
        ValueError: an argument is none of those.
    """
    if schedule not in ANNEALING:
        raise ValueError(f"schedule must be one of {', '.join(ANNEALING)}, got {schedule!r}")
    if not 0 <= progress <= 1:
        raise ValueError(f"progress must be in [0, 1], got {progress}")
    if classes < 1:
        raise ValueError(f"classes must be at least 1, got {classes}")
    if schedule == "none":
        return 1.0
    alphas = {
        "log": 1 - math.exp(-STEEPNESS * progress),
        "linear": progress,
        "exp": math.exp(STEEPNESS * (progress - 1)),
    }
    return alphas[schedule] * (1 - 1 / classes) + 1 / classes


def supervised_loss(scores: torch.Tensor, labels: torch.Tensor, threshold: float = 1.0) -> torch.Tensor:
    """Cross-entropy of the labelled images that are not yet too sure, equation of section 2.3:

        sum_i m_i * -log p(y_i | x_i) / max(1, sum_i m_i),    m_i = [p(y_i | x_i) <= threshold]

    The masks m have no gradient. With threshold 1 it is the usual mean cross-entropy.

    Args:
        scores: `(N, K)` of the labelled images.
        labels: y, int64 `(N,)`.
        threshold: of `annealing_threshold`.
    """
    losses = F.cross_entropy(scores, labels, reduction="none")
    with torch.no_grad():
        own = scores.softmax(1).gather(1, labels[:, None]).squeeze(1)
        used = (own <= threshold).to(losses.dtype)
    return (used * losses).sum() / used.sum().clamp(min=1.0)


def consistency_loss(
    student: torch.Tensor, teacher: torch.Tensor, temperature: float, confidence: float
) -> torch.Tensor:
    """What the student says of the augmented images against what the teacher says of the plain ones:

        1/N * sum_i c_i * KL(q_i || p(. | augmented x_i)),    q_i = softmax(teacher_i / temperature)
                                                              c_i = [max_k softmax(teacher_i)_k > confidence]

    A temperature below 1 sharpens the teacher; the confidence is judged before that. The teacher has no gradient. The
    mean is over all images, so images that do not count make the term smaller, as in the authors' code.

    Args:
        student, teacher: scores `(N, K)` of the same images in the same order.
        temperature: above 0; 1 leaves the teacher as it is.
        confidence: in [0, 1]; 0 lets all images count.

    Raises:
        ValueError: temperature or confidence out of range, or unequal shapes.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    if not 0 <= confidence <= 1:
        raise ValueError(f"confidence must be in [0, 1], got {confidence}")
    if student.shape != teacher.shape:
        raise ValueError(f"teacher must have the student's shape {tuple(student.shape)}, got {tuple(teacher.shape)}")
    teacher = teacher.detach()
    target = (teacher / temperature).softmax(1)
    sure = teacher.softmax(1).amax(1) > confidence
    divergence = F.kl_div(student.log_softmax(1), target, reduction="none").sum(1)
    return (sure.to(divergence.dtype) * divergence).mean()
