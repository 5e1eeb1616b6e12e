"""Gradient caching: a contrastive loss over a batch far larger than one forward pass can hold.

Shape legend: ``I`` items of a stream, ``D`` width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from polymodal.core.batch import Batch, Outputs
from polymodal.objectives.table import Losses, WeightedObjective, weighted_losses

M = TypeVar("M")
Vectors = Mapping[str, Tensor]


def cached_contrastive_step(
    micro_batches: Sequence[M],
    embed: Callable[[M], Vectors],
    loss: Callable[[list[dict[str, Tensor]]], Tensor],
) -> Tensor:
    """Add to ``.grad`` what one backward pass over all micro-batches together would add.

    First every micro-batch is embedded without a graph, then the loss and its gradient with respect to the
    embeddings are computed over all of them, then every micro-batch is embedded again with a graph and given its
    share of that gradient. Random numbers (dropout) are drawn the same in both passes. Module state that a forward
    pass changes, such as batch norm's running statistics, is changed twice.

    Args:
        micro_batches: what ``embed`` takes.
        embed: vectors ``[I, D]`` per stream; called twice per micro-batch, must depend on nothing that changes between.
        loss: scalar of the vectors of all micro-batches, in order. Parameters that it uses itself (the temperature)
            get their gradient too, so it must read them fresh rather than take them from ``embed``.

    Returns:
        The loss, detached.

    Source: GradCache, arXiv 2101.06983, section 3.
    """
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    states: list[tuple[Tensor, list[Tensor]]] = []
    cached: list[dict[str, Tensor]] = []
    for micro_batch in micro_batches:
        states.append((torch.get_rng_state(), [torch.cuda.get_rng_state(device) for device in devices]))
        with torch.no_grad():
            vectors = embed(micro_batch)
        cached.append({name: x_ID.detach().requires_grad_() for name, x_ID in vectors.items()})
    value = loss(cached)
    if value.requires_grad:
        value.backward()  # type: ignore[no-untyped-call]
    for micro_batch, state, leaves in zip(micro_batches, states, cached, strict=True):
        gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
        if not gradients:
            continue
        with _replayed(state):
            vectors = embed(micro_batch)
        used = [name for name in gradients if vectors[name].requires_grad]
        torch.autograd.backward([vectors[name] for name in used], [gradients[name] for name in used])
    return value.detach()


@contextmanager
def _replayed(state: tuple[Tensor, list[Tensor]]) -> Iterator[None]:
    """Draw from the random state of then; leave the one of now untouched."""
    with torch.random.fork_rng(devices=range(len(state[1]))):
        torch.set_rng_state(state[0])
        for device, cuda_state in enumerate(state[1]):
            torch.cuda.set_rng_state(cuda_state, device)
        yield


def cached_objectives_step(
    batches: Sequence[Batch],
    forward: Callable[[Batch], Outputs],
    objectives: Sequence[WeightedObjective],
    head: Callable[[], tuple[Tensor | None, Tensor | None]],
) -> Losses:
    """:func:`cached_contrastive_step` for objectives of the ``embed`` pass over several batches as if they were one.

    Args:
        batches: the micro-batches.
        forward: the model's ``embed`` pass.
        objectives: contrastive objectives.
        head: ``(scale, bias)`` of the projection head, with their graph.

    Returns:
        The losses over all samples; their gradients are already in ``.grad``.
    """
    counts = [batch.num_samples for batch in batches]
    samples: dict[int, dict[str, Tensor]] = {}

    def embed(indexed: tuple[int, Batch]) -> Vectors:
        index, batch = indexed
        outputs = forward(batch)
        samples[index] = {name: owners + sum(counts[:index]) for name, (_, owners) in outputs.embeddings.items()}
        return {name: x_ID for name, (x_ID, _) in outputs.embeddings.items()}

    found: list[Losses] = []

    def loss(vectors: list[dict[str, Tensor]]) -> Tensor:
        scale, bias = head()
        merged = Outputs(scale=scale, bias=bias)
        for name in sorted({name for part in vectors for name in part}):
            having = [index for index, part in enumerate(vectors) if name in part]
            x_ID = torch.cat([vectors[index][name] for index in having])
            merged.embeddings[name] = (x_ID, torch.cat([samples[index][name] for index in having]))
        found.append(weighted_losses(objectives, merged, _labels_only(batches)))
        return found[0].total

    cached_contrastive_step(list(enumerate(batches)), embed, loss)
    return found[0]


def _labels_only(batches: Sequence[Batch]) -> Batch:
    """What the objectives read of a batch, for all batches in a row."""
    return Batch(
        ids=None,
        is_supervised=None,
        is_valid=None,
        positions=None,
        segment_lengths=None,
        streams={},
        sample_ids=[name for batch in batches for name in batch.sample_ids],
        labels=[label for batch in batches for label in batch.labels],
        modalities=[own for batch in batches for own in batch.modalities],
    )
