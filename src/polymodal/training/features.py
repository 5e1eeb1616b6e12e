"""Frozen encoders run once: their features are kept on disk, found again by content and config.

Shape legend: ``I`` items, ``U`` units, ``N`` features, ``D`` width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from polymodal.core.batch import Batch, ModelInput, StreamBatch
from polymodal.core.errors import PolymodalError
from polymodal.data.feature_cache import FeatureCache
from polymodal.data.protocols import Source
from polymodal.modalities.processor import Processor, collate_units
from polymodal.modalities.reader import Reader, checked_read
from polymodal.models.compose import MultimodalModel, to_device
from polymodal.training.freezing import fingerprint
from polymodal.training.precision import Compute

_ITEMS_PER_BATCH = 64


class FeatureStore:
    """One on-disk cache per frozen stream.

    Args:
        folder: where the caches live; shared by runs whose encoders are equal.
        model: the model; streams whose encoder has no trainable parameter are cached.
        processor: its processor.
        compute: device and dtype of the encoders.
    """

    def __init__(self, folder: Path, model: MultimodalModel, processor: Processor, compute: Compute) -> None:
        self._model, self._compute = model, compute
        self._caches: dict[str, FeatureCache] = {}
        self.tags: dict[str, str] = {}
        for name in frozen_streams(model):
            tag = stream_tag(model, name)
            self.tags[name] = tag
            if tag not in self._caches:
                self._caches[tag] = FeatureCache(folder, tag, storage="float32")
        self.processor = _tagged(processor, self.tags)

    def __contains__(self, key: str) -> bool:
        tag, _, content = key.partition(":")
        return content in self._caches[tag]

    def fill(self, sources: Sequence[Source], progress: Callable[[int, int], None] | None = None) -> int:
        """Encode every media item of ``sources`` that is not stored yet; returns how many were encoded.

        Samples that cannot be planned or decoded are passed over here: the loader meets, names and counts them.
        """
        total, done, encoded = sum(len(source) for source in sources), 0, 0
        pending: dict[str, dict[str, Any]] = {name: {} for name in self.tags}
        for source in sources:
            for index in range(len(source)):
                for name, part in self._items(source, index):
                    key = f"{self.tags[name]}:{part.content_key()}"
                    if key not in self:
                        pending[name][key] = part
                        if len(pending[name]) >= _ITEMS_PER_BATCH:
                            encoded += self._encode(name, pending[name])
                            pending[name] = {}
                done += 1
                if progress is not None:
                    progress(done, total)
        encoded += sum(self._encode(name, items) for name, items in pending.items() if items)
        for cache in self._caches.values():
            cache.flush()
        return encoded

    def attach(self, batch: Batch) -> None:
        """Put stored features in place of the inputs of every stream whose items are all stored."""
        for stream in batch.streams.values():
            if stream.values is None:
                stream.features = self._gather(stream)

    def close(self) -> None:
        """Release the files."""
        for cache in self._caches.values():
            cache.close()

    def _items(self, source: Source, index: int) -> Iterator[tuple[str, Any]]:
        try:
            plan = self.processor.plan(source[index])
        except PolymodalError:
            return
        for name in self.tags:
            for part, _ in plan.items.get(name, []):
                yield name, part

    @torch.no_grad()
    def _encode(self, name: str, items: dict[str, Any]) -> int:
        reader = self.processor.streams[name].reader
        with ThreadPoolExecutor(2) as pool:
            read = list(pool.map(lambda part: _read(reader, part), items.values()))
        kept = [(key, found) for key, found in zip(items, read, strict=True) if found is not None]
        if not kept:
            return 0
        stream = collate_units([found for _, found in kept], reader)
        batch = to_device(Batch(*([np.zeros(0)] * 4), None, {name: stream}, [], [], []), self._compute.device)
        encoder = self._model.streams[name].encoder
        was_training = encoder.training
        encoder.eval()
        with self._compute.autocast():
            features = self._model.encode(name, batch.streams[name])
        encoder.train(was_training)
        start = 0
        for (key, _), count in zip(kept, stream.unit_counts, strict=True):
            tag, _, content = key.partition(":")
            rows = slice(start, start + count)
            x, valid, pooled = (
                array[rows].cpu().numpy()
                for array in (features.x_UND.float(), features.is_valid_UN, features.pooled_UD.float())
            )
            longest = int(valid.sum(1).max())
            self._caches[tag].put(content, x[:, :longest], valid[:, :longest], pooled)
            start += count
        return len(kept)

    def _gather(self, stream: StreamBatch) -> tuple[Any, Any, Any]:
        found = []
        for key in stream.keys:
            tag, _, content = key.partition(":")
            features = self._caches[tag].get(content)
            assert features is not None, f"the cache lost {key}"
            found.append(features)
        units = sum(len(item[0]) for item in found)
        longest = max(item[0].shape[1] for item in found)
        x_UND = np.zeros((units, longest, found[0][0].shape[2]), dtype=np.float32)
        is_valid_UN = np.zeros((units, longest), dtype=np.bool_)
        row = 0
        for x, valid, _ in found:
            x_UND[row : row + len(x), : x.shape[1]] = x
            is_valid_UN[row : row + len(x), : x.shape[1]] = valid
            row += len(x)
        return x_UND, is_valid_UN, np.concatenate([item[2] for item in found])


def frozen_streams(model: MultimodalModel) -> list[str]:
    """Streams whose encoder has no trainable parameter; text is left out, its encoder being cheaper than the disk."""
    return [
        name
        for name, stream in model.streams.items()
        if model.config.streams[name].modality != "text"
        and not any(parameter.requires_grad for parameter in stream.encoder.parameters())  # type: ignore[union-attr]
    ]


def stream_tag(model: MultimodalModel, name: str) -> str:
    """Names everything that decides a stream's features: reader, encoder and its weights (16 hex digits)."""
    config = model.config.streams[name]
    names = [key for key in model.state_dict() if key.startswith(f"streams.{name}.encoder.")]
    text = f"{config.reader.to_data()}{config.encoder.to_data()}{fingerprint(model, names)}"
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _tagged(processor: Processor, tags: dict[str, str]) -> Processor:
    streams = {name: replace(layout, cache_tag=tags.get(name, "")) for name, layout in processor.streams.items()}
    return Processor(
        processor.tokenizer, processor.chat, streams, max_tokens=processor.max_tokens, overflow=processor.overflow
    )


def _read(reader: Reader, part: Any) -> ModelInput | None:
    try:
        return checked_read(reader, part, reader.measure(part))
    except PolymodalError:
        return None
