"""Features of media are found again by what their encoder reads, and bounded in bytes."""

from __future__ import annotations

import numpy as np
import torch

from polymodal.core.batch import StreamBatch
from polymodal.inference.encoded import FeatureCache, unit_keys
from polymodal.models.encoders.base import Features


def stream(*lengths: int) -> StreamBatch:
    """Ragged units whose values are their lengths."""
    values = np.zeros((len(lengths), max(lengths), 2), np.float32)
    for row, length in zip(values, lengths, strict=True):
        row[:length] = length
    return StreamBatch(values, np.asarray(lengths), [1] * len(lengths), None, None, [])


def on_device(batch: StreamBatch) -> StreamBatch:
    counts = list(batch.unit_counts)
    return StreamBatch(torch.from_numpy(batch.values), torch.from_numpy(batch.lengths), counts, None, None, [])


class Encoder:
    """Features are the values; remembers how many units it has read."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def __call__(self, batch: StreamBatch) -> Features:
        self.seen.append(len(batch.values))
        is_valid = torch.arange(batch.values.shape[1]) < batch.lengths[:, None]
        return Features(batch.values, is_valid, batch.values[:, 0])


def run(cache: FeatureCache, encoder: Encoder, batch: StreamBatch) -> Features:
    return cache.features(encoder, on_device(batch), unit_keys("x", batch))


def test_equal_units_are_encoded_once_and_come_back_in_their_order() -> None:
    encoder, cache = Encoder(), FeatureCache(10_000)
    found = run(cache, encoder, stream(3, 1, 3))
    assert encoder.seen == [2]
    assert found.x_UND[:, :, 0].tolist() == [[3, 3, 3], [1, 0, 0], [3, 3, 3]]
    assert found.is_valid_UN.sum(1).tolist() == [3, 1, 3] and found.pooled_UD[:, 0].tolist() == [3, 1, 3]
    again = run(cache, encoder, stream(2, 3))
    assert again.x_UND[:, :, 0].tolist() == [[2, 2, 0], [3, 3, 3]] and encoder.seen == [2, 1]
    assert again.is_valid_UN.sum(1).tolist() == [2, 3]


def test_streams_dtypes_and_lengths_are_told_apart() -> None:
    batch = stream(2, 2)
    batch.lengths = np.asarray([2, 1])
    assert len({*unit_keys("x", batch), *unit_keys("y", batch)}) == 4


def test_the_oldest_goes_first_and_nothing_is_kept_without_room() -> None:
    # A unit of length 3 takes (3 + 1) * 2 * 4 = 32 bytes.
    encoder, cache = Encoder(), FeatureCache(64)
    batches = [stream(3) for _ in range(3)]
    for place, batch in enumerate(batches):
        batch.values += place
        run(cache, encoder, batch)
    assert len(cache) == 2 and cache.num_bytes == 64
    run(cache, encoder, batches[1])
    assert encoder.seen == [1, 1, 1]
    run(cache, encoder, batches[0])
    assert encoder.seen == [1, 1, 1, 1]
    none = FeatureCache(0)
    run(none, encoder, batches[0])
    assert len(none) == none.num_bytes == 0
