"""Streams that the decoder looks at: their tokens, laid out as one memory row per sample.

Shape legend: ``S`` samples, ``U`` units, ``M`` tokens of a unit, ``N`` valid tokens of all units, ``K`` places of a
memory row, ``D`` width, ``I`` items, ``R`` rows, ``T`` tokens of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from polymodal.core.batch import Batch, StreamBatch
from polymodal.models.layers.memory import Memory, empty_memory


@dataclass(frozen=True, slots=True)
class Watched:
    """What one stream contributes.

    Args:
        tokens_UMD: its tokens, or its encoder's features.
        is_valid_UM: which of them are there.
        stream: its items.
        only_latest: whether a token sees only the latest item at or before its place.
    """

    tokens_UMD: Tensor
    is_valid_UM: Tensor
    stream: StreamBatch
    only_latest: bool


def lay_out(watched: Sequence[Watched], batch: Batch, width: int, like: Tensor) -> Memory:
    """The memory of a batch: per sample, the tokens of all its items, stream by stream.

    Worked example: samples 0, 1 and 2, of which 0 has two images and 2 one, of two tokens each: rows ``a a b b``,
    ``. . . .`` and ``c c . .``.

    Args:
        watched: the streams that have items in the batch.
        batch: the batch.
        width: of the tokens, for a batch without any.
        like: a tensor of the device and dtype of such an empty memory.
    """
    if not watched:
        return empty_memory(batch.num_samples, width, like)
    if len(watched) == 1 and (whole := _as_they_are(watched[0], batch)) is not None:
        return whole
    tokens_ND = torch.cat([each.tokens_UMD[each.is_valid_UM] for each in watched])
    items = [_item_of_unit(each.stream, each.tokens_UMD.device) for each in watched]
    first_item = torch.tensor([0, *(len(each.stream.unit_counts) for each in watched)]).cumsum(0)
    item_N = torch.cat(
        [
            (item_U + int(first))[:, None].expand(each.is_valid_UM.shape)[each.is_valid_UM]
            for each, item_U, first in zip(watched, items, first_item[:-1], strict=True)
        ]
    )
    sample_of_item = torch.cat([each.stream.sample_of_item for each in watched])
    sample_N = sample_of_item[item_N]
    order_N = torch.argsort(sample_N, stable=True)
    counts_S = torch.bincount(sample_N, minlength=batch.num_samples)
    first_S = counts_S.cumsum(0) - counts_S
    slot_N = torch.arange(len(order_N), device=order_N.device) - first_S[sample_N[order_N]]
    places = int(counts_S.max())
    index_N = sample_N[order_N] * places + slot_N
    x_KD = tokens_ND.new_zeros(batch.num_samples * places, tokens_ND.shape[1])
    x_KD = x_KD.index_copy(0, index_N, tokens_ND[order_N])
    is_valid_SK = torch.arange(places, device=index_N.device) < counts_S[:, None]
    item_SK = item_N.new_full((batch.num_samples * places,), -1).index_copy(0, index_N, item_N[order_N])
    x_SKD, item_SK = x_KD.view(batch.num_samples, places, -1), item_SK.view(batch.num_samples, places)
    if not any(each.only_latest for each in watched):
        return Memory(x_SKD, is_valid_SK)
    return _by_place(watched, batch, Memory(x_SKD, is_valid_SK), item_SK, first_item.tolist())


def _as_they_are(watched: Watched, batch: Batch) -> Memory | None:
    """The tokens themselves as memory, where every sample has one item of one unit; nothing is copied then."""
    stream = watched.stream
    one_each = len(stream.unit_counts) == batch.num_samples and all(count == 1 for count in stream.unit_counts)
    if not one_each or watched.only_latest:
        return None
    in_order = torch.arange(batch.num_samples, device=stream.sample_of_item.device)
    if not bool((stream.sample_of_item == in_order).all()):
        return None
    is_valid = None if bool(watched.is_valid_UM.all()) else watched.is_valid_UM
    return Memory(watched.tokens_UMD, is_valid)


def _item_of_unit(stream: StreamBatch, device: torch.device) -> Tensor:
    counts = torch.tensor(stream.unit_counts, device=device)
    return torch.repeat_interleave(torch.arange(len(counts), device=device), counts)


def _by_place(
    watched: Sequence[Watched], batch: Batch, memory: Memory, item_SK: Tensor, first_item: Sequence[int]
) -> Memory:
    """The same memory, each token seeing the latest items at or before its place.

    Worked example, one sample ``"x", image a, "y", image b`` with one token each: the masks of its four tokens are
    ``[0 0]``, ``[1 0]``, ``[1 0]`` and ``[0 1]``.
    """
    samples_RT = sample_of_token(batch)
    may_attend = torch.zeros(*samples_RT.shape, item_SK.shape[1], dtype=torch.bool, device=item_SK.device)
    next_SK = torch.zeros_like(item_SK, dtype=torch.bool)
    item_RTK = item_SK[samples_RT]
    for each, first in zip(watched, first_item, strict=False):
        stream, items = each.stream, torch.arange(len(each.stream.unit_counts), device=item_SK.device)
        if not each.only_latest:
            is_own = (item_SK >= first) & (item_SK < first + len(items))
            may_attend |= is_own[samples_RT]
            next_SK |= is_own
            continue
        latest = items.new_full((samples_RT.numel(),), -1).index_copy(0, stream.token_index, items)
        latest_RT = latest.cummax(0).values.view(samples_RT.shape)
        is_own_RT = (latest_RT >= 0) & (stream.sample_of_item[latest_RT.clamp(min=0)] == samples_RT)
        may_attend |= (item_RTK == (latest_RT + first)[..., None]) & is_own_RT[..., None]
        last_S = items.new_full((batch.num_samples,), -1).scatter_reduce(0, stream.sample_of_item, items, "amax")
        next_SK |= (item_SK == (last_S + first)[:, None]) & (last_S >= 0)[:, None]
    return Memory(memory.x_BMC, memory.is_valid_BM, may_attend, next_SK)


def sample_of_token(batch: Batch) -> Tensor:
    """Which sample each token belongs to, int64 ``[R, T]``."""
    device = batch.ids.device
    if batch.segment_lengths is None:
        return torch.arange(batch.ids.shape[0], device=device)[:, None].expand(batch.ids.shape)
    lengths = torch.tensor(batch.segment_lengths, device=device)
    return torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths)[None]
