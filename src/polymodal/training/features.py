"""Frozen encoders run once: their features are kept on disk, found again by content and config.

Shape legend: ``I`` items, ``U`` units, ``N`` features, ``D`` width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from polymodal.core.batch import Batch, ModelInput, StreamBatch
from polymodal.core.errors import DataError
from polymodal.core.samples import Sample
from polymodal.data.feature_arrays import Features as Stored
from polymodal.data.feature_cache import FeatureCache
from polymodal.data.planner import BAD_SAMPLE
from polymodal.data.protocols import Source
from polymodal.modalities.processor import Processor, collate_units, read_item
from polymodal.modalities.reader import Reader
from polymodal.models.compose import MultimodalModel, to_device
from polymodal.training.freezing import fingerprint
from polymodal.training.precision import Compute

ITEMS_PER_GROUP = 64
"""Items that are encoded at once."""


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
        """Encode every media item of ``sources`` that is not stored, or stored damaged; returns how many were encoded.

        Items are encoded in groups that follow from the sources alone, never from what is stored already: after a kill
        a group is encoded again whole, so that the features are the same to the bit.

        Samples that cannot be planned or decoded are passed over here: the loader meets, names and counts them.
        """
        total, done, encoded = sum(len(source) for source in sources), 0, 0
        groups: dict[str, dict[str, Any]] = {name: {} for name in self.tags}
        seen: set[str] = set()
        met: set[Hashable] = set()
        for source in sources:
            for index in range(len(source)):
                for name, key, item in self._items(source, index, met):
                    if key in seen:
                        continue
                    seen.add(key)
                    groups[name][key] = item
                    if len(groups[name]) == ITEMS_PER_GROUP:
                        encoded += self._complete(name, groups[name])
                        groups[name] = {}
                done += 1
                if progress is not None:
                    progress(done, total)
        encoded += sum(self._complete(name, items) for name, items in groups.items() if items)
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

    def __enter__(self) -> FeatureStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _items(self, source: Source, index: int, met: set[Hashable]) -> list[tuple[str, str, Any]]:
        """The media items of a sample as ``(stream, key, (part, lengths))``; none of a sample that cannot be used.

        A sample with the very media of one before, which ``met`` remembers, is not planned: many questions are asked of
        one picture, and a plan costs more than reading the line.
        """
        try:
            sample = source[index]
            media = _files_of(sample)
            if media in met:
                return []
            plan = self.processor.plan(sample)
            items = [
                (name, f"{self.tags[name]}:{item[0].content_key()}", item)
                for name in self.tags
                for item in plan.items.get(name, [])
            ]
        except BAD_SAMPLE:
            return []
        # What a budget of tokens or the question chooses of an item may differ in the next sample.
        if media is not None and not plan.choices:
            met.add(media)
        return items

    def _get(self, key: str) -> Stored | None:
        tag, _, content = key.partition(":")
        return self._caches[tag].get(content)

    def _complete(self, name: str, group: dict[str, Any]) -> int:
        """Store what is missing or damaged of one group; how many items that were."""
        missing = [key for key in group if self._get(key) is None]
        if not missing:
            return 0
        reader = self.processor.streams[name].reader
        with ThreadPoolExecutor(2) as pool:
            read = list(pool.map(lambda item: _read(reader, *item), group.values()))
        kept = [(key, found) for key, found in zip(group, read, strict=True) if found is not None]
        if not kept:
            return 0
        features = self._encode(name, [found for _, found in kept])
        start, stored = 0, 0
        for key, found in kept:
            tag, _, content = key.partition(":")
            rows = slice(start, start + len(found.units))
            if key in missing:
                x_UND, is_valid_UN, pooled_UD = (array[rows] for array in features)
                longest = int(is_valid_UN.sum(1).max())
                self._caches[tag].put(content, x_UND[:, :longest], is_valid_UN[:, :longest], pooled_UD)
                stored += 1
            start = rows.stop
        return stored

    @torch.no_grad()
    def _encode(self, name: str, inputs: Sequence[ModelInput]) -> tuple[Any, Any, Any]:
        """Features ``[U, N, D]``, which are valid ``[U, N]``, and pooled vectors ``[U, D]`` of some items, as numpy."""
        stream = collate_units(inputs, self.processor.streams[name].reader)
        none = np.zeros((0, 0), dtype=np.int64)
        alone = Batch(none, none, none, none, None, {name: stream}, sample_ids=[], labels=[], modalities=[])
        batch = to_device(alone, self._compute.device)
        encoder = self._model.get_submodule(f"streams.{name}.encoder")
        was_training = encoder.training
        encoder.eval()
        with self._compute.autocast():
            features = self._model.encode(name, batch.streams[name])
        encoder.train(was_training)
        found = (features.x_UND.float(), features.is_valid_UN, features.pooled_UD.float())
        return tuple(array.cpu().numpy() for array in found)  # type: ignore[return-value]

    def _gather(self, stream: StreamBatch) -> tuple[Any, Any, Any]:
        found = [self._get(key) for key in stream.keys]
        lost = [key for key, features in zip(stream.keys, found, strict=True) if features is None]
        if lost:
            raise DataError(
                f"the feature cache lacks {len(lost)} of {len(found)} items of a batch, the first is {lost[0]}: they "
                "could not be read when it was filled, and can be now, or their record was damaged since; run the same "
                "command again, which encodes what is missing"
            )
        stored = [features for features in found if features is not None]
        units = sum(len(features.x_UND) for features in stored)
        longest = max(features.x_UND.shape[1] for features in stored)
        x_UND = np.zeros((units, longest, stored[0].x_UND.shape[2]), dtype=np.float32)
        is_valid_UN = np.zeros((units, longest), dtype=np.bool_)
        row = 0
        for x, valid, _ in stored:
            x_UND[row : row + len(x), : x.shape[1]] = x
            is_valid_UN[row : row + len(x), : x.shape[1]] = valid
            row += len(x)
        return x_UND, is_valid_UN, np.concatenate([features.pooled_UP for features in stored])


def frozen_streams(model: MultimodalModel) -> list[str]:
    """Streams whose encoder has no trainable parameter; text is left out, its encoder being cheaper than the disk."""
    return [
        name
        for name in model.streams
        if model.config.streams[name].modality != "text"
        and not any(p.requires_grad for p in model.get_submodule(f"streams.{name}.encoder").parameters())
    ]


def stream_tag(model: MultimodalModel, name: str) -> str:
    """Names everything that decides a stream's features: reader, encoder and its weights (16 hex digits)."""
    config = model.config.streams[name]
    names = [key for key in model.state_dict() if key.startswith(f"streams.{name}.encoder.")]
    assert config.reader is not None
    text = f"{config.reader.to_data()}{config.encoder.to_data()}{fingerprint(model, names)}"
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _tagged(processor: Processor, tags: dict[str, str]) -> Processor:
    return processor.with_streams(
        {name: replace(layout, cache_tag=tags.get(name, "")) for name, layout in processor.streams.items()}
    )


def _files_of(sample: Sample) -> Hashable | None:
    """The media of a sample and their views without reading them; None where one is not a file."""
    views = {id(part): view for view, part in sample.views.items()}
    found: list[Hashable] = []
    for part in sample.media():
        if part.path is None:
            return None
        found.append((views.get(id(part)), part.modality, str(part.path), part.details()))
    return tuple(found)


def _read(reader: Reader, part: Any, lengths: tuple[int, ...]) -> ModelInput | None:
    try:
        return read_item(reader, part, lengths)
    except BAD_SAMPLE:
        return None
