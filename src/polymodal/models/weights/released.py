"""Weights as research code leaves them: one pickled file, or several files that make a model together.

A folder says which, under the key ``weights`` of its ``config.json``: the name of a file, or prefixes of stored names
with the file or folder that holds what stands below them. Worked example, MiniGPT-4::

    {"model_type": "minigpt4",
     "weights": {"visual_encoder.": "eva_vit_g.pth",
                 "": ["blip2_pretrained_flant5xxl.pth", "pretrained_minigpt4_7b.pth"],
                 "llama_model.": "vicuna"}}
"""

from __future__ import annotations

import argparse
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polymodal.core.errors import CheckpointError

KEY = "weights"
PICKLED = (".bin", ".pth", ".pt")
"""Endings of files that PyTorch wrote."""
_WITHIN = ("model", "state_dict")
"""Where such a file holds the weights, if a training's state stands beside them; in order of preference."""


def read_pickled(path: Path) -> dict[str, Tensor]:
    """The weights of a pickled file by the loader that runs no code, mapped where the file allows it.

    What stands beside them (the optimizer's state, the command line's arguments) is left.

    Raises:
        CheckpointError: if it cannot be read so, or holds no tensors by name.
    """
    try:
        # Arguments of a command line are plain attributes; nothing runs when they are built.
        with torch.serialization.safe_globals([argparse.Namespace]):
            data = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # noqa: BLE001  (the loader raises whatever a damaged or hostile file provokes)
        raise CheckpointError(
            f"{path}: cannot be read without running code from it: {error}; convert it to safetensors"
        ) from None
    inner = next((data[key] for key in _WITHIN if isinstance(data.get(key), Mapping)), data) if _is_dict(data) else data
    if not _is_dict(inner) or not inner or not all(isinstance(value, Tensor) for value in inner.values()):
        found = f"the keys {', '.join(sorted(map(str, data))[:6])}" if _is_dict(data) else type(data).__name__
        raise CheckpointError(
            f"{path}: found {found}, expected tensors by name, alone or under {' or '.join(map(repr, _WITHIN))}"
        )
    return dict(inner)


def _is_dict(data: Any) -> bool:
    return isinstance(data, Mapping)


class JoinedTensors(Mapping[str, Tensor]):
    """Tensors of several mappings under prefixes, looked up when they are asked for; a later one wins.

    Args:
        parts: (prefix, mapping) in order.
    """

    def __init__(self, parts: list[tuple[str, Mapping[str, Tensor]]]) -> None:
        self._places = {prefix + name: (part, name) for prefix, part in parts for name in part}

    def __getitem__(self, name: str) -> Tensor:
        part, inner = self._places[name]
        return part[inner]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def named_tensors(folder: Path, said: Any, read: Callable[[Path], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
    """The tensors that ``weights`` of a config names.

    Args:
        folder: where the files lie.
        said: the value of the key.
        read: opens one of them, a file or a checkpoint folder.

    Raises:
        CheckpointError: if a name leads out of the folder or to nothing.
    """
    whole = said if isinstance(said, Mapping) else {"": said}
    parts = []
    for prefix, names in whole.items():
        for name in names if isinstance(names, list) else [names]:
            parts.append((str(prefix), read(entry(folder, name))))
    return JoinedTensors(parts)


def entry(folder: Path, name: Any) -> Path:
    """A file or folder that a checkpoint's config names: one right in its own folder, where the user put it.

    Raises:
        CheckpointError: if it leads out of the folder, or there is none.
    """
    if not isinstance(name, str) or Path(name).name != name or name in ("", "..", "."):
        raise CheckpointError(f"{folder}: config.json: {KEY} names {name!r}, expected plain names of files or folders")
    if not (folder / name).exists():
        raise CheckpointError(f"{folder}: config.json: {KEY} names {name}, which is missing; put it, or a link, there")
    return folder / name
