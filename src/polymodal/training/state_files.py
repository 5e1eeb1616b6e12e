"""Nested state as files without pickle: tensors in safetensors, everything else in JSON."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from polymodal.core.errors import CheckpointError
from polymodal.models.weights.folder import unreadable

_LOG = logging.getLogger(__name__)
_TAGS = ("$tensor", "$array", "$tuple", "$items", "$float")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write named tensors; one that stands under several names is stored once, its other names in the header.

    Views that share memory without being the same tensor are stored apart. Equal tensors give equal files.

    Raises:
        OSError: if the file cannot be written.
    """
    stored: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[Any, str] = {}
    memory: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        start = tensor.untyped_storage().data_ptr()
        key = (start, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.numel() and key in first:
            aliases[name] = first[key]
            continue
        first[key] = name
        stored[name] = (
            tensor.contiguous() if start not in memory else tensor.clone(memory_format=torch.contiguous_format)
        )
        memory.add(start)
    try:
        # One entry: safetensors writes several in an order that changes from call to call.
        save_file(stored, path, metadata={"aliases": json.dumps(aliases)})
    except SafetensorError as error:
        raise OSError(str(error)) from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors that :func:`write_tensors` wrote, on the CPU; names of one tensor share their memory again.

    Raises:
        CheckpointError: if the file is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise unreadable(path, error) from None
    tensors.update({alias: tensors[name] for alias, name in json.loads(metadata.get("aliases", "{}")).items()})
    return tensors


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 in hex over names, types, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        content: Any = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest.update(content)
    return digest.hexdigest()


def split_state(state: Any) -> tuple[Any, dict[str, Tensor]]:
    """Part nested state into JSON data and named tensors; :func:`join_state` is the inverse.

    Holds None, bool, int, float, str, list, tuple, dict with any of these as keys, numpy arrays and torch tensors.
    Worked example: ``{"lr": 0.1, "m": tensor}`` becomes ``{"lr": 0.1, "m": {"$tensor": "m"}}`` and ``{"m": tensor}``.

    Raises:
        CheckpointError: if there is anything else; names its place.
    """
    tensors: dict[str, Tensor] = {}
    return _split(state, "state", tensors), tensors


def _split(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"$float": str(value)}
    if isinstance(value, Tensor | np.ndarray):
        return _split_array(value, path, tensors)
    if isinstance(value, list):
        return [_split(item, f"{path}.{index}", tensors) for index, item in enumerate(value)]
    if isinstance(value, tuple):
        return {"$tuple": [_split(item, f"{path}.{index}", tensors) for index, item in enumerate(value)]}
    if isinstance(value, Mapping):
        items = [(key, _split(item, f"{path}.{key}", tensors)) for key, item in value.items()]
        if all(isinstance(key, str) and key not in _TAGS for key, _ in items):
            return dict(items)
        return {"$items": [[_split(key, f"{path} key {key!r}", tensors), item] for key, item in items]}
    raise CheckpointError(
        f"{path}: found {type(value).__name__}, which a checkpoint cannot hold; expected numbers, text, lists, "
        "dicts, arrays or tensors"
    )


def _split_array(value: Tensor | np.ndarray[Any, Any], path: str, tensors: dict[str, Tensor]) -> Any:
    name = path
    while name in tensors:
        name += "'"
    is_tensor = isinstance(value, Tensor)
    tensors[name] = value if isinstance(value, Tensor) else torch.from_numpy(np.ascontiguousarray(value))
    return {"$tensor" if is_tensor else "$array": name}


def join_state(data: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of :func:`split_state`."""
    if isinstance(data, list):
        return [join_state(item, tensors) for item in data]
    if not isinstance(data, dict):
        return data
    tag = next(iter(data)) if len(data) == 1 else None
    if tag == "$tensor":
        return tensors[data[tag]]
    if tag == "$array":
        return tensors[data[tag]].numpy()
    if tag == "$tuple":
        return tuple(join_state(item, tensors) for item in data[tag])
    if tag == "$items":
        return {join_state(key, tensors): join_state(item, tensors) for key, item in data[tag]}
    if tag == "$float":
        return float(data[tag])
    return {key: join_state(item, tensors) for key, item in data.items()}


def random_state() -> dict[str, Any]:
    """The state of every random generator a run draws from: Python's, numpy's, torch's on the CPU and on each GPU."""
    version, internal, gauss = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=False)
    return {
        "python": {"version": version, "internal": torch.tensor(internal, dtype=torch.int64), "gauss": gauss},
        "numpy": {
            "bit_generator": numpy_state["bit_generator"],
            "key": numpy_state["state"]["key"].astype(np.int64),
            "pos": int(numpy_state["state"]["pos"]),
            "has_gauss": int(numpy_state["has_gauss"]),
            "gauss": float(numpy_state["gauss"]),
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put back what :func:`random_state` gave; GPU states are put back where as many GPUs are there, else warned of."""
    python, numbers = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["internal"].tolist()), python["gauss"]))
    np.random.set_state(
        (
            numbers["bit_generator"],
            numbers["key"].astype(np.uint32),
            *(numbers[k] for k in ("pos", "has_gauss", "gauss")),
        )
    )
    torch.set_rng_state(state["torch"])
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if len(state["cuda"]) == num_gpus:
        torch.cuda.set_rng_state_all(state["cuda"])
    else:
        _LOG.warning(
            "the checkpoint holds random states of %d GPUs, %d are here; GPU draws will differ from an unbroken run",
            len(state["cuda"]),
            num_gpus,
        )
