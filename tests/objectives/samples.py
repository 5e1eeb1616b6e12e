"""Batches and outputs that the objective tests share."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from polymodal.core.batch import Batch, Outputs


def batch_of(num_samples: int, labels: list[str | None] | None = None, modalities=None) -> Batch:
    """A batch with nothing but what objectives read."""
    return Batch(
        ids=None,
        is_supervised=None,
        is_valid=None,
        positions=None,
        segment_lengths=None,
        streams={},
        sample_ids=[f"s{i}" for i in range(num_samples)],
        labels=labels or [None] * num_samples,
        modalities=modalities or [()] * num_samples,
    )


def unit_vectors(num: int, width: int = 6, seed: int = 0) -> torch.Tensor:
    """Random unit vectors in double precision."""
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(num, width, generator=generator, dtype=torch.float64), dim=-1)


def embedded(num: int, scale: float = 5.0, bias: float = -2.0) -> Outputs:
    """Image and text embeddings of ``num`` samples."""
    owners = torch.arange(num)
    vectors = {"image": (unit_vectors(num, seed=1), owners), "text": (unit_vectors(num, seed=2), owners)}
    return Outputs(embeddings=vectors, scale=torch.tensor(scale), bias=torch.tensor(bias))
