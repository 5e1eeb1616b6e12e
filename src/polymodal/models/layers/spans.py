"""Random spans along an axis, masked while training. Legend: ``U`` units, ``L`` places."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def draw_spans(lengths: Sequence[int], size: int, share: float, span: int) -> Tensor:
    """Which places of each unit are masked, drawn with torch's generator.

    A unit of ``n`` places gets ``share * n / span`` spans (rounded at random, so that the mean is exact) with distinct
    starts; spans may overlap, so ``share`` is what is masked at most.

    Worked example: ``draw_spans([8], 10, 0.5, 2)`` masks two spans of two places among the first eight of ten.

    Args:
        lengths: valid places of each unit; nothing beyond them is masked.
        size: places in all, at least the largest length.
        share: of the places of a unit, from 0 to 1.
        span: places of one span.

    Returns:
        bool ``[U, size]``.

    Source: SpecAugment, arXiv 1904.08779, section 2; spans over learned features: wav2vec 2.0, arXiv 2006.11477,
    section 3.1, where ``share`` is stated as the chance of a start, ``share / span``.
    """
    is_masked_UL = torch.zeros(len(lengths), size, dtype=torch.bool)
    for row, length in enumerate(lengths):
        places = max(0, length - span + 1)
        count = min(places, int(share * length / span + float(torch.rand(()))))
        starts = torch.randperm(places)[:count]
        is_masked_UL[row, (starts[:, None] + torch.arange(span)).flatten()] = True
    return is_masked_UL
