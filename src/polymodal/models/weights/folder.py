"""A checkpoint folder as model hubs lay it out: configs as JSON, tensors memory-mapped and read when asked for."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from polymodal.core.errors import CheckpointError
from polymodal.modalities.text.files import json_object
from polymodal.models.weights.released import KEY, PICKLED, named_tensors, read_pickled

CONFIG = "config.json"
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""File names in order of preference; each may be sharded, with an index beside it."""
OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
_OPEN_CLIP_WEIGHTS = (OPEN_CLIP_WEIGHTS, "open_clip_pytorch_model.bin")
"""The same for folders of ``open_clip``, whose repositories may hold both layouts."""


def check_new(folder: Path) -> None:
    """Make sure that nothing is written over.

    Raises:
        CheckpointError: if it is there, unless as an empty folder.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        found = "is not empty" if folder.is_dir() else "is a file"
        raise CheckpointError(f"{folder}: {found}; choose a new folder")


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is laid out as model hubs do."""
    return any((folder / name).is_file() for name in (CONFIG, OPEN_CLIP_CONFIG))


@dataclass(frozen=True, slots=True)
class HubConfigs:
    """The JSON files of a folder; {} for one that is not there.

    Args:
        config: ``config.json``.
        preprocessor: ``preprocessor_config.json`` (or what ``processor_config.json`` holds in its place).
        processor: ``processor_config.json``.
        generation: ``generation_config.json``.
        tokenizer: ``tokenizer_config.json``.
        vocabulary: ``vocab.json``; read for ctc models alone, whose alphabet it is.
        folder: where they lie; None for configs that were never on a disk (published sizes).
    """

    config: Mapping[str, Any]
    preprocessor: Mapping[str, Any] = field(default_factory=dict)
    processor: Mapping[str, Any] = field(default_factory=dict)
    generation: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Mapping[str, Any] = field(default_factory=dict)
    vocabulary: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None

    @property
    def model_type(self) -> str:
        """What ``config.json`` calls the architecture; ``timm/NAME`` for a config of timm's, which has another key."""
        if "model_type" not in self.config and "architecture" in self.config:
            return f"timm/{self.config['architecture']}"
        return str(self.config.get("model_type", ""))

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes of the reference library that wrote it (``architectures``)."""
        return tuple(self.config.get("architectures") or ())

    @property
    def stored(self) -> Collection[str]:
        """Names of the folder's tensors, for what its configs do not say; () where there are none."""
        folder = None if self.folder is None else HubFolder(self.folder)
        return folder.tensors.keys() if folder is not None and folder.has_weights else ()


class HubFolder:
    """A local checkpoint folder.

    Args:
        path: the folder.

    Raises:
        CheckpointError: if it holds no readable ``config.json``.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not is_checkpoint(self.path):
            raise CheckpointError(
                f"{self.path}: holds no {CONFIG}; expected a checkpoint folder as model hubs lay it out, "
                "or a run folder"
            )
        processor = self._json("processor_config.json")
        preprocessor = self._json("preprocessor_config.json")
        if not preprocessor:
            nested = [processor.get(key) for key in ("image_processor", "feature_extractor")]
            preprocessor = next((part for part in nested if isinstance(part, dict)), {})
        config = self._json(CONFIG)
        self._weights, self._said = _WEIGHTS, config.get(KEY)
        if (self.path / OPEN_CLIP_CONFIG).is_file() and not ("model_type" in config and self._has_named):
            config = {"model_type": "open_clip", **self._json(OPEN_CLIP_CONFIG)}
            self._weights = _OPEN_CLIP_WEIGHTS
        is_ctc = any(str(name).endswith("ForCTC") for name in config.get("architectures") or ())
        self.configs = HubConfigs(
            config,
            preprocessor,
            processor,
            self._json("generation_config.json"),
            self._json("tokenizer_config.json"),
            self._json("vocab.json") if is_ctc else {},
            self.path,
        )

    def _json(self, name: str) -> dict[str, Any]:
        return json_object(self.path / name)

    @property
    def has_weights(self) -> bool:
        """Whether there is a file of weights."""
        return self._said is not None or self._has_named or self._only_file is not None

    @property
    def _has_named(self) -> bool:
        return any(path for name in self._weights for path in self.path.glob(f"{name}*"))

    @property
    def _only_file(self) -> Path | None:
        """The file of weights that a folder without those of a hub holds, if there is just one."""
        found = [path for path in self.path.iterdir() if path.suffix in (".pth", ".pt")]
        return found[0] if len(found) == 1 else None

    @cached_property
    def tensors(self) -> Mapping[str, Tensor]:
        """The weights by stored name, each read from the mapped file when it is looked up.

        Raises:
            CheckpointError: if there are none, or a file is damaged.
        """
        if self._said is not None:
            return named_tensors(
                self.path, self._said, lambda at: HubFolder(at).tensors if at.is_dir() else _open([at])
            )
        for name in self._weights:
            index = self.path / f"{name}.index.json"
            if (self.path / name).is_file():
                return _open([self.path / name])
            if index.is_file():
                return self._sharded(index)
        if self._only_file is not None:
            return _open([self._only_file])
        raise CheckpointError(
            f"{self.path}: holds no weights; expected {' or '.join(self._weights)}, shards with an .index.json, "
            f"one file .pth, or the key {KEY!r} in {CONFIG}"
        )

    def _sharded(self, index: Path) -> Mapping[str, Tensor]:
        files = self._json(index.name).get("weight_map")
        if not isinstance(files, dict) or not files:
            raise CheckpointError(f"{index}: has no 'weight_map' from tensor to file")
        shards = sorted(set(files.values()))
        # A shard's name comes from the checkpoint: it may not lead out of the folder.
        bad = [name for name in shards if Path(name).name != name]
        absent = [name for name in shards if not bad and not (self.path / name).is_file()]
        if bad or absent:
            what = f"names {bad[0]!r}, expected a plain file name" if bad else f"names {absent[0]}, which is missing"
            raise CheckpointError(f"{index}: {what}")
        tensors = _open([self.path / name for name in shards])
        missing = sorted(set(files) - set(tensors))
        if missing:
            raise CheckpointError(f"{index}: names {missing[0]}, which is in none of its {len(shards)} files")
        return tensors


def _open(paths: list[Path]) -> Mapping[str, Tensor]:
    if paths[0].suffix in PICKLED:
        merged: dict[str, Tensor] = {}
        for path in paths:
            merged.update(read_pickled(path))
        return merged
    return MappedTensors(paths)


def unreadable(path: Path, error: Exception) -> CheckpointError:
    """What is wrong with a safetensors file, as far as its size and its first bytes tell."""
    hint = ""
    if path.is_file():
        with path.open("rb") as file:
            start = file.read(64)
        hint = f"; it has {path.stat().st_size:,} bytes: fetch it again if the download or the copy was cut off"
        if start.startswith(b"version https://git-lfs"):
            hint = "; it is a pointer of Git LFS and not the file itself: fetch that, for example with git lfs pull"
        elif start.lstrip().startswith(b"<"):
            hint = "; it is a web page: fetch the file again"
    return CheckpointError(f"{path}: not a readable safetensors file: {error}{hint}")


class MappedTensors(Mapping[str, Tensor]):
    """The tensors of safetensors files; a lookup maps one, and its pages are read when it is used.

    Args:
        paths: the files.

    Raises:
        CheckpointError: if one is damaged, or two hold the same name.
    """

    def __init__(self, paths: list[Path]) -> None:
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}
        for path in paths:
            try:
                file = self._stack.enter_context(safe_open(path, framework="pt"))
                names = list(file.keys())
            except (SafetensorError, OSError) as error:
                raise unreadable(path, error) from None
            twice = [name for name in names if name in self._files]
            if twice:
                raise CheckpointError(f"{path}: holds {twice[0]}, which another file of the checkpoint holds too")
            self._files.update(dict.fromkeys(names, file))

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)
