"""Checkpoint folders: whole, sharded, pickled, damaged and hostile."""

from __future__ import annotations

import argparse
import json
import os

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from polymodal.core.errors import CheckpointError
from polymodal.models.weights import HubFolder
from polymodal.models.weights.assign import assign, no_weights, num_parameters, wanted_names, without_memory
from polymodal.models.weights.folder import check_new


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "toy"}')
    return tmp_path


def test_one_file_and_shards_read_alike(folder):
    save_file({"a": torch.ones(2), "b": torch.zeros(3)}, folder / "model.safetensors")
    whole = HubFolder(folder).tensors
    assert sorted(whole) == ["a", "b"] and len(whole) == 2
    (folder / "model.safetensors").unlink()
    save_file({"a": torch.ones(2)}, folder / "one.safetensors")
    save_file({"b": torch.zeros(3)}, folder / "two.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    sharded = HubFolder(folder).tensors
    assert all(torch.equal(sharded[name], whole[name]) for name in "ab")


def test_a_pickle_is_read_by_the_loader_that_runs_no_code(folder):
    torch.save({"a": torch.ones(2)}, folder / "pytorch_model.bin")
    assert torch.equal(HubFolder(folder).tensors["a"], torch.ones(2))

    class Hostile:
        def __reduce__(self):
            return os.system, (f"touch {folder / 'owned'}",)

    torch.save({"a": Hostile()}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="cannot be read without running code"):
        HubFolder(folder).tensors  # noqa: B018
    assert not (folder / "owned").exists()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no weights"),
        ({"model.safetensors": b"no"}, "not a readable safetensors file"),
        ({"model.safetensors.index.json": b"{}"}, "has no 'weight_map'"),
        ({"model.safetensors.index.json": b'{"weight_map": {"a": "../x"}}'}, "expected a plain file name"),
        ({"model.safetensors.index.json": b'{"weight_map": {"a": "x"}}'}, "names x, which is missing"),
        ({"model.safetensors.index.json": b"["}, "is not readable JSON"),
    ],
)
def test_damaged_folders_are_named(folder, files, message):
    for name, content in files.items():
        (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        HubFolder(folder).tensors  # noqa: B018


def test_a_folder_without_config_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no config.json; expected a checkpoint folder"):
        HubFolder(tmp_path)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("kept", torch.arange(3), persistent=False)


def test_weights_are_put_in_without_a_copy_and_ties_hold():
    with no_weights():
        network = Tied()
    assert without_memory(network) == ["embed.weight", "head.weight"]
    assert network.kept.tolist() == [0, 1, 2]
    assert wanted_names(network) == ["embed.weight"]
    assert num_parameters(network) == 15
    weights = torch.randn(5, 3)
    assign(network, {"embed.weight": weights}, "file")
    assert network.head.weight is network.embed.weight
    assert network.embed.weight.data_ptr() == weights.data_ptr()
    assert without_memory(network) == []


def test_a_wrong_shape_changes_nothing():
    network = Tied()
    before = network.embed.weight
    with pytest.raises(CheckpointError, match=r"file: embed.weight: found shape \(2, 2\), expected \(5, 3\)"):
        assign(network, {"embed.weight": torch.ones(2, 2)}, "file")
    with pytest.raises(CheckpointError, match="file: the network has no stray"):
        assign(network, {"stray": torch.ones(2)}, "file")
    assert network.embed.weight is before


def test_nothing_is_written_over(tmp_path):
    check_new(tmp_path / "new")
    check_new(tmp_path)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="is not empty; choose a new folder"):
        check_new(tmp_path)
    with pytest.raises(CheckpointError, match="file: is a file; choose a new folder"):
        check_new(tmp_path / "file")


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\n", "it is a pointer of Git LFS .* git lfs pull"),
        (b"<!doctype html><html>404</html>" * 9, "it is a web page"),
        (b"", "it has 0 bytes: fetch it again if the download"),
    ],
    ids=["pointer", "page", "empty"],
)
def test_a_file_that_is_no_weights_says_what_it_is(folder, content, hint):
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=f"not a readable safetensors file: .*{hint}"):
        HubFolder(folder).tensors  # noqa: B018


def test_weights_that_are_whole_numbers_are_refused():
    network = nn.Linear(2, 3)
    with pytest.raises(CheckpointError, match=r"box: weight: found torch.int8, expected a floating-point format"):
        assign(network, {"weight": torch.zeros(3, 2, dtype=torch.int8)}, "box")


def test_a_file_of_research_code_is_read_by_the_loader_that_runs_no_code(folder):
    beside = {"optimizer": {"state": {}}, "epoch": 3, "args": argparse.Namespace(lr=1e-4)}
    torch.save({"model": {"a": torch.ones(2)}, **beside}, folder / "best.pth")
    found = HubFolder(folder)
    assert found.has_weights and torch.equal(found.tensors["a"], torch.ones(2))
    torch.save({"a": torch.zeros(2)}, folder / "best.pth", _use_new_zipfile_serialization=False)
    assert torch.equal(HubFolder(folder).tensors["a"], torch.zeros(2)), "files of PyTorch before 1.6"
    torch.save({"a": torch.zeros(2)}, folder / "other.pth")
    assert not HubFolder(folder).has_weights, "which of two is meant must be said"
    (folder / "config.json").write_text('{"model_type": "toy", "weights": "other.pth"}')
    assert list(HubFolder(folder).tensors) == ["a"]


def test_files_and_folders_make_a_model_together(folder):
    torch.save({"model": {"a": torch.ones(2), "b": torch.ones(2)}}, folder / "one.pth")
    torch.save({"b": torch.zeros(2)}, folder / "two.pth")
    inner = folder / "language"
    inner.mkdir()
    (inner / "config.json").write_text('{"model_type": "toy"}')
    save_file({"a": torch.full((2,), 3.0)}, inner / "model.safetensors")
    weights = {"": ["one.pth", "two.pth"], "language.": "language"}
    (folder / "config.json").write_text(json.dumps({"model_type": "toy", "weights": weights}))
    tensors = HubFolder(folder).tensors
    assert {name: tensor[0].item() for name, tensor in tensors.items()} == {"a": 1.0, "b": 0.0, "language.a": 3.0}
    assert len(tensors) == 3


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("../other.pth", r"weights names '\.\./other\.pth', expected plain names"),
        ("/etc/passwd", "expected plain names of files or folders"),
        ("..", "expected plain names of files or folders"),
        ({"a.": [3]}, "weights names 3, expected plain names"),
        ("gone.pth", r"weights names gone\.pth, which is missing"),
    ],
)
def test_weights_stay_in_their_folder(folder, weights, message):
    (folder / "config.json").write_text(json.dumps({"model_type": "toy", "weights": weights}))
    with pytest.raises(CheckpointError, match=message):
        HubFolder(folder).tensors  # noqa: B018
