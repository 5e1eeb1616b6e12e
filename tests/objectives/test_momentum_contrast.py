"""Contrast with a momentum twin against the equations of ALBEF, written out."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from polymodal.core.batch import Batch, Outputs, Teacher
from polymodal.objectives.infonce import InfoNCE
from polymodal.objectives.momentum_contrast import MomentumContrast, sample_groups


def unit(rows: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed)), dim=1)


def batch_of(labels: list[str | None]) -> Batch:
    ids = [f"s{i}" for i in range(len(labels))]
    empty = torch.zeros(0)
    return Batch(empty, empty, empty, empty, None, {}, ids, labels, [()] * len(labels))


def outputs_of(rows: int, queue: int, labels: Batch | None = None) -> Outputs:
    owners = torch.arange(rows)
    outputs = Outputs(
        embeddings={"image": (unit(rows, 0), owners), "text": (unit(rows, 1), owners)}, scale=torch.tensor(10.0)
    )
    said = {"image": (unit(rows, 2), owners), "text": (unit(rows, 3), owners)}
    queues = {"image": unit(queue, 4), "text": unit(queue, 5)}
    groups = {name: torch.arange(queue) for name in queues}
    if labels is not None:
        groups = {name: sample_groups(labels, list(range(queue))) for name in queues}
    outputs.teacher = Teacher(said, queues, groups)
    return outputs


def by_hand(outputs: Outputs, alpha: float) -> torch.Tensor:
    """Equations 1 and 5 of ALBEF, one pair of loops short of prose."""
    assert outputs.teacher is not None
    x, y = outputs.embeddings["image"][0], outputs.embeddings["text"][0]
    x_m, y_m = outputs.teacher.embeddings["image"][0], outputs.teacher.embeddings["text"][0]
    losses = []
    for own, own_m, other_m, queue in ((x, x_m, y_m, "text"), (y, y_m, x_m, "image")):
        candidates = torch.cat([other_m, outputs.teacher.queues[queue]])
        for row in range(len(own)):
            chances = (10.0 * candidates @ own[row]).softmax(0)
            doubts = (10.0 * candidates @ own_m[row]).softmax(0)
            hard = F.one_hot(torch.tensor(row), len(candidates))
            target = alpha * doubts + (1 - alpha) * hard
            losses.append(-(target * chances.log()).sum())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("queue", [0, 7])
def test_the_loss_is_that_of_the_paper(alpha: float, queue: int) -> None:
    outputs = outputs_of(4, queue)
    report = MomentumContrast(alpha=alpha)(outputs, batch_of([None] * 4))
    torch.testing.assert_close(report.total, by_hand(outputs, alpha))
    assert report.count == 4 and set(report.parts) == {"image-text"}


def test_without_a_twin_it_is_contrast_over_the_batch() -> None:
    outputs, batch = outputs_of(4, 7), batch_of([None] * 4)
    outputs.teacher = None
    torch.testing.assert_close(MomentumContrast()(outputs, batch).total, InfoNCE()(outputs, batch).total)


def test_candidates_of_the_same_label_are_left_out_or_count_as_partners() -> None:
    labels = batch_of(["a", "b"])
    outputs = outputs_of(2, 2, labels)
    assert outputs.teacher is not None
    skip = MomentumContrast(alpha=0.0, same_label="skip")(outputs, labels).total
    x, y = (outputs.embeddings[name][0] for name in ("image", "text"))
    x_m, y_m = (outputs.teacher.embeddings[name][0] for name in ("image", "text"))
    expected = []
    for own, other_m, queue in ((x, y_m, outputs.teacher.queues["text"]), (y, x_m, outputs.teacher.queues["image"])):
        for row in range(2):
            left = torch.stack([other_m[row], other_m[1 - row], queue[1 - row]])
            expected.append(-(10.0 * left @ own[row]).log_softmax(0)[0])
    torch.testing.assert_close(skip, torch.stack(expected).mean())
    positive = MomentumContrast(alpha=0.0, same_label="positive")(outputs, labels).total
    assert math.isfinite(float(positive)) and not torch.isclose(positive, skip)


def test_groups_are_equal_exactly_for_equal_labels_in_any_batch() -> None:
    one, other = sample_groups(batch_of(["a", "b", None, None]), [0, 1, 2, 3]), sample_groups(batch_of(["b"]), [0])
    assert one[1] == other[0] and len(set(one.tolist())) == 4


def test_gradients_reach_the_model_and_not_the_twin() -> None:
    outputs = outputs_of(3, 4)
    x = unit(3, 0).requires_grad_()
    outputs.embeddings["image"] = (x, torch.arange(3))
    outputs.scale = torch.tensor(10.0, requires_grad=True)
    MomentumContrast()(outputs, batch_of([None] * 3)).total.backward()
    assert x.grad is not None and x.grad.any() and outputs.scale.grad is not None
