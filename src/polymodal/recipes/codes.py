"""Codes of a ``quantised`` encoder, fitted to a stage's data before the stage.

Legend: ``N`` features of all items, ``C`` their width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from polymodal.core.batch import ModelInput
from polymodal.core.errors import DataError
from polymodal.data.planner import BAD_SAMPLE
from polymodal.data.protocols import Source
from polymodal.modalities.processor import collate_units
from polymodal.models.encoders.quantised import Quantised
from polymodal.recipes.assemble import Assembly
from polymodal.training.stage import StageConfig

_TOGETHER = 16
"""Items that are encoded at once."""


@torch.no_grad()
def fit_codes(
    parts: Assembly, stage: StageConfig, sources: Sequence[Source], folder: Path, note: Callable[[str], None]
) -> None:
    """Set the centres of the stage's ``fit_codes`` streams; read where an interrupted run left them.

    Which items are read, and where k-means starts, follows from the recipe's seed.

    Args:
        parts: the model, on its device.
        stage: the stage.
        sources: of its mix.
        folder: of the stage.
        note: told what was done.

    Raises:
        DataError: if no item of a stream can be read.
        ConfigError: if there are fewer features than centres.
    """
    for stream, count in stage.fit_codes.items():
        encoder, path = parts.network.modules_of(stream).encoder, _path(folder, stream)
        assert isinstance(encoder, Quantised)
        if path.is_file():
            encoder.centres_KC.copy_(load_file(path)["centres"])
            continue
        items = list(_items(parts, stream, sources, count))
        if not items:
            raise DataError(
                f"stages.{stage.name}.fit_codes: found no item of the stream {stream!r} in the stage's data"
            )
        encoder.base.eval()
        x_NC = torch.cat(list(_features(parts, stream, encoder, items)))
        encoder.fit(x_NC, seed=parts.recipe.seed)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"centres": encoder.centres_KC.cpu().contiguous()}, path)
        note(f"{stage.name}: {encoder.config.num_codes} codes of {stream} fitted to {len(x_NC):,} features")


def remove_codes(folder: Path) -> None:
    """The centres of a complete stage are among its weights."""
    for path in folder.glob("codes-*.safetensors"):
        path.unlink()


def _path(folder: Path, stream: str) -> Path:
    return folder / f"codes-{stream}.safetensors"


def _items(parts: Assembly, stream: str, sources: Sequence[Source], count: int) -> Iterator[ModelInput]:
    """At most ``count`` items of a stream, drawn from all samples of all sources; the unreadable are passed over."""
    places = [(source, index) for source in sources for index in range(len(source))]
    found = 0
    for place in np.random.default_rng(parts.recipe.seed).permutation(len(places)).tolist():
        source, index = places[place]
        try:
            read = parts.processor.load(parts.processor.plan(source[index])).inputs.get(stream, [])
        except BAD_SAMPLE:
            continue
        for item in read:
            if item is None or found == count:
                continue
            found += 1
            yield item
        if found == count:
            return


def _features(parts: Assembly, stream: str, encoder: Quantised, items: Sequence[ModelInput]) -> Iterator[Tensor]:
    """The frozen encoder's valid features ``[N, C]`` of items, some at a time."""
    reader, device = parts.processor.streams[stream].reader, encoder.centres_KC.device
    for start in range(0, len(items), _TOGETHER):
        batch = collate_units(items[start : start + _TOGETHER], reader)
        values, lengths_U = (torch.from_numpy(array).to(device) for array in (batch.values, batch.lengths))
        found = encoder.base(values, lengths_U)
        yield found.x_UND[found.is_valid_UN]
