"""The conversations of a batch that holds view sets as well: only they stand in a sequence.

Shape legend: ``U`` units, ``N`` features, ``I`` items, ``S`` samples, ``R`` rows, ``T`` tokens of a row, ``D`` width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from polymodal.core.batch import Batch, StreamBatch
from polymodal.models.encoders.base import Features

_PER_TOKEN = ("ids", "is_supervised", "is_valid", "positions")


def conversations(
    batch: Batch, features: Mapping[str, Features]
) -> tuple[Batch, Mapping[str, Features], Tensor | None]:
    """The samples that have tokens, with their items and what their encoders gave.

    Worked example, packed samples of 3, 0 and 2 tokens: segments ``(3, 2)``, samples ``[0 2]``, the same row of tokens.

    Args:
        batch: on the model's device.
        features: of its streams.

    Returns:
        The batch and the features of these samples alone, and their numbers in ``batch``, int64; None where every
        sample is a conversation, and both are as they were.
    """
    if batch.segment_lengths is not None:
        has_tokens_S = torch.tensor([length > 0 for length in batch.segment_lengths], device=batch.ids.device)
    else:
        has_tokens_S = batch.is_valid.any(dim=1)
    if bool(has_tokens_S.all()):
        return batch, features, None
    samples_S = has_tokens_S.nonzero().squeeze(1)
    rows = samples_S.tolist()
    streams, kept = {}, {}
    for name, stream in batch.streams.items():
        is_told_I = has_tokens_S[stream.sample_of_item]
        if not bool(is_told_I.any()):
            continue
        is_told_U = torch.repeat_interleave(is_told_I, torch.tensor(stream.unit_counts, device=is_told_I.device))
        streams[name] = _only(stream, is_told_I, is_told_U, has_tokens_S, batch)
        if name in features:
            found = features[name]
            kept[name] = Features(found.x_UND[is_told_U], found.is_valid_UN[is_told_U], found.pooled_UD[is_told_U])
    lengths, sources = batch.segment_lengths, batch.source_lengths
    per_token = {name: getattr(batch, name) for name in _PER_TOKEN}
    if lengths is None:
        per_token = {name: values[samples_S] for name, values in per_token.items()}
    told = replace(
        batch,
        **per_token,
        segment_lengths=None if lengths is None else tuple(lengths[row] for row in rows),
        streams=streams,
        sample_ids=[batch.sample_ids[row] for row in rows],
        labels=[batch.labels[row] for row in rows],
        modalities=[batch.modalities[row] for row in rows],
        source_lengths=None if sources is None else tuple(sources[row] for row in rows),
    )
    return told, kept, samples_S


def _only(stream: StreamBatch, is_told_I: Tensor, is_told_U: Tensor, has_tokens_S: Tensor, batch: Batch) -> StreamBatch:
    """A stream's items in conversations; its spans are theirs already."""
    told = is_told_I.nonzero().squeeze(1).tolist()
    new_S = has_tokens_S.long().cumsum(0) - 1
    index = stream.token_index
    if batch.segment_lengths is None:
        width = batch.ids.shape[1]
        index = new_S[index // width] * width + index % width
    return replace(
        stream,
        values=None if stream.values is None else stream.values[is_told_U],
        lengths=stream.lengths[is_told_U],
        unit_counts=[stream.unit_counts[item] for item in told],
        sample_of_item=new_S[stream.sample_of_item[is_told_I]],
        token_index=index,
        keys=[stream.keys[item] for item in told] if stream.keys else [],
        grids=[stream.grids[item] for item in told] if stream.grids else [],
        items=[stream.items[item] for item in told],
        features=None if stream.features is None else tuple(array[is_told_U] for array in stream.features),
    )
