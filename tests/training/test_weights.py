"""One file of weights: whole or not there, and only for the model that it belongs to."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch
from torch import nn

from polymodal.core.errors import CheckpointError, ConfigError
from polymodal.training import weights as module
from polymodal.training.weights import copy_weights, read_weights, save_weights


def model(width: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(2, width), nn.LayerNorm(width), nn.Linear(width, 2))


def tied() -> nn.Module:
    pair = nn.ModuleDict({"embed": nn.Embedding(4, 3), "head": nn.Linear(3, 4, bias=False)})
    pair["head"].weight = pair["embed"].weight
    return pair


@pytest.mark.parametrize("make", [model, tied])
def test_saved_and_read_again_equal_bit_for_bit(make: type, tmp_path: Path) -> None:
    first, second = make(), make()
    save_weights(first, tmp_path / "deep" / "w.safetensors")
    read_weights(second, tmp_path / "deep" / "w.safetensors")
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["w.safetensors"]


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "w.safetensors"
    save_weights(model(), path)
    old = path.read_bytes()

    def full(target: Path, tensors: object) -> None:
        target.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "write_tensors", full)
    with pytest.raises(
        CheckpointError, match=r"w.safetensors: could not be written.*No space left.*free space, then run"
    ):
        save_weights(model(), path)
    assert path.read_bytes() == old


def test_a_file_of_another_model_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    save_weights(model(4), tmp_path / "w.safetensors")
    other = model(3)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"the weights do not fit the model[\s\S]*0.weight has shape \[4, 2\]"):
        read_weights(other, tmp_path / "w.safetensors")
    assert all(torch.equal(before[name], tensor) for name, tensor in other.state_dict().items())


@pytest.mark.parametrize("content", [None, b"", b"not safetensors at all"])
def test_a_missing_or_damaged_file_is_named(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"w.safetensors: not a readable safetensors file"):
        read_weights(model(), path)


def test_weights_are_copied_where_name_and_shape_agree():
    model = nn.ModuleDict(
        {
            "one": nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4)),
            "two": nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 5)),
            "none": nn.LayerNorm(7),
        }
    )
    assert copy_weights(model, "two", "one") == 2
    assert torch.equal(model["two"][0].weight, model["one"][0].weight)
    assert model["two"][0].weight is not model["one"][0].weight
    with pytest.raises(ConfigError, match="two and none have no weights of the same name and shape"):
        copy_weights(model, "two", "none")
    with pytest.raises(ConfigError, match="unknown part 'tow'"):
        copy_weights(model, "tow", "one")
