"""What encoders said of media, found again by what they read.

For models whose prompts share no prefix: where the words of a question are read beside the media (InstructBLIP), the
tokens of a picture depend on them, and its features do not.

Shape legend: ``U`` units, ``N`` features of a unit, ``D`` width.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from polymodal.core.batch import StreamBatch
from polymodal.models.encoders.base import Features

Key = tuple[str, bytes]
Row = tuple[Tensor, Tensor]
"""Of one unit: its valid features ``[N, D]`` and its pooled vector ``[D]``."""


def unit_keys(name: str, stream: StreamBatch) -> list[Key]:
    """A key for each unit of a stream, equal exactly where its encoder reads the same numbers.

    Args:
        name: of the stream.
        stream: arrays, before they move to a device.
    """
    keys = []
    for values, length in zip(stream.values, stream.lengths, strict=True):
        digest = hashlib.blake2b(np.ascontiguousarray(values).data, digest_size=16)
        digest.update(f"{values.dtype} {values.shape} {int(length)}".encode())
        keys.append((name, digest.digest()))
    return keys


class FeatureCache:
    """The most recently used features of units, bounded in bytes.

    Args:
        max_bytes: bytes kept in all; 0 keeps none, and units that are equal within a batch are still encoded once.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._rows: OrderedDict[Key, Row] = OrderedDict()

    def __len__(self) -> int:
        return len(self._rows)

    def features(self, encode: Callable[[StreamBatch], Features], stream: StreamBatch, keys: Sequence[Key]) -> Features:
        """The features of all units of a stream; only those that are not known are encoded, each once.

        Args:
            encode: runs the stream's encoder.
            stream: on the model's device.
            keys: of its units.
        """
        known = {key: self._rows[key] for key in keys if key in self._rows}
        fresh = {key: place for place, key in reversed([*enumerate(keys)]) if key not in known}
        if fresh:
            index = torch.tensor(sorted(fresh.values()), device=stream.lengths.device)
            found = encode(replace(stream, values=stream.values[index], lengths=stream.lengths[index]))
            for place, row in zip(index.tolist(), _rows(found), strict=True):
                known[keys[place]] = row
        for key in dict.fromkeys(keys):
            self._keep(key, known[key])
        return _together([known[key] for key in keys])

    def _keep(self, key: Key, row: Row) -> None:
        size = sum(part.numel() * part.element_size() for part in row)
        if size > self.max_bytes:
            return
        if key not in self._rows:
            self._rows[key] = row
            self.num_bytes += size
        self._rows.move_to_end(key)
        while self.num_bytes > self.max_bytes:
            _, gone = self._rows.popitem(last=False)
            self.num_bytes -= sum(part.numel() * part.element_size() for part in gone)


def _rows(features: Features) -> list[Row]:
    """Each unit's own copy, so that none keeps the others' memory."""
    lengths = features.is_valid_UN.sum(dim=1).tolist()
    return [
        (x_ND[:length].clone(), pooled_D.clone())
        for x_ND, pooled_D, length in zip(features.x_UND, features.pooled_UD, lengths, strict=True)
    ]


def _together(rows: Sequence[Row]) -> Features:
    """Units side by side, padded with zeros."""
    x_UND = torch.nn.utils.rnn.pad_sequence([x_ND for x_ND, _ in rows], batch_first=True)
    lengths_U = torch.tensor([len(x_ND) for x_ND, _ in rows], device=x_UND.device)
    is_valid_UN = torch.arange(x_UND.shape[1], device=x_UND.device) < lengths_U[:, None]
    return Features(x_UND, is_valid_UN, torch.stack([pooled_D for _, pooled_D in rows]))
