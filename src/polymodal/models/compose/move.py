"""Batches from numpy to torch, on a device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from polymodal.core.batch import Batch, StreamBatch

_BATCH_ARRAYS = ("ids", "is_supervised", "is_valid", "positions")
_STREAM_ARRAYS = ("values", "lengths", "sample_of_item", "token_index")


def to_device(batch: Batch, device: torch.device | str) -> Batch:
    """The batch with every array as a tensor on ``device`` (no copy on CPU)."""
    moved = {name: _tensor(getattr(batch, name), device) for name in _BATCH_ARRAYS}
    streams = {name: _stream(stream, device) for name, stream in batch.streams.items()}
    return replace(batch, **moved, streams=streams)


def _stream(stream: StreamBatch, device: torch.device | str) -> StreamBatch:
    moved: dict[str, Any] = {name: _tensor(getattr(stream, name), device) for name in _STREAM_ARRAYS}
    if stream.features is not None:
        moved["features"] = tuple(_tensor(array, device) for array in stream.features)
    return replace(stream, **moved)


def _tensor(array: Any, device: torch.device | str) -> Any:
    if array is None:
        return None
    if isinstance(array, np.ndarray):
        array = torch.from_numpy(array)
    return array.to(device, non_blocking=True)
