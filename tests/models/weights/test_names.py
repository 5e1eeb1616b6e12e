"""Tables of names, both ways."""

from __future__ import annotations

import pytest
import torch

from polymodal.core.errors import CheckpointError
from polymodal.models.weights import TRANSPOSED, NameTable, Reshape, Rule, Slice

TABLE = NameTable(
    [
        Rule("blocks.{i}.q.{p}", "h.{i}.qkv.{p}", Slice(0, 3, transposed=True)),
        Rule("blocks.{i}.k.{p}", "h.{i}.qkv.{p}", Slice(1, 3, transposed=True)),
        Rule("blocks.{i}.v.{p}", "h.{i}.qkv.{p}", Slice(2, 3, transposed=True)),
        Rule("out.weight", "proj", TRANSPOSED),
        Rule("cls", "cls_token", Reshape((-1,), (1, 1, -1))),
        Rule("rest.{rest}", "other.{rest}"),
    ],
    ignored=("h.{i}.mask",),
    optional=("rest.extra",),
)
OURS = ["blocks.7.q.weight", "blocks.7.k.weight", "blocks.7.v.weight", "out.weight", "cls", "rest.a.b"]


def stored():
    return {
        "h.7.qkv.weight": torch.arange(24.0).view(4, 6),
        "proj": torch.arange(6.0).view(2, 3),
        "cls_token": torch.arange(4.0).view(1, 1, 4),
        "other.a.b": torch.ones(2),
        "h.7.mask": torch.ones(1),
    }


def test_tensors_come_in_as_ours():
    found = TABLE.load(OURS, stored(), "file")
    assert torch.equal(found["blocks.7.k.weight"], stored()["h.7.qkv.weight"][:, 2:4].t())
    assert found["out.weight"].shape == (3, 2)
    assert found["cls"].shape == (4,)


def test_a_loaded_slice_is_a_view_of_the_file():
    file = stored()
    found = TABLE.load(OURS[:1], file, "file")["blocks.7.q.weight"]
    assert found.untyped_storage().data_ptr() == file["h.7.qkv.weight"].untyped_storage().data_ptr()


def test_what_came_in_goes_out_bit_for_bit():
    file = stored()
    again = TABLE.save(TABLE.load(OURS, file, "file"), "export")
    assert set(again) == set(file) - {"h.7.mask"}
    assert all(torch.equal(again[name], file[name]) for name in again)


def test_unknown_tensors_are_listed_and_ignored_ones_are_not():
    assert TABLE.unknown(OURS, [*stored(), "stray"]) == ["stray"]


def test_missing_tensors_are_named_and_optional_ones_may_be_absent():
    file = stored()
    del file["proj"]
    with pytest.raises(CheckpointError, match=r"file: 2 tensor\(s\) missing: proj \(for out.weight\), nowhere"):
        TABLE.load([*OURS, "nowhere"], file, "file")
    assert "rest.extra" not in TABLE.load([*OURS, "rest.extra"], stored(), "file")


def test_an_export_names_what_has_no_place_and_what_is_incomplete():
    with pytest.raises(CheckpointError, match=r"no place for 1 tensor.*: adapter"):
        TABLE.save({"adapter": torch.ones(1)}, "export")
    with pytest.raises(CheckpointError, match=r"h.7.qkv.weight: found 1 of 3 parts"):
        TABLE.save({"blocks.7.q.weight": torch.ones(2, 4)}, "export")


def test_a_slice_that_does_not_divide_is_an_error_that_names_the_tensor():
    file = {"h.7.qkv.weight": torch.ones(4, 5)}
    with pytest.raises(CheckpointError, match=r"h.7.qkv.weight: found shape \(5, 4\), expected axis 0 in 3 equal"):
        TABLE.load(OURS[:1], file, "file")


def test_prefixed_and_below_move_either_side():
    moved = TABLE.prefixed("streams.image.encoder.").below("vision.")
    name = "streams.image.encoder.blocks.2.q.bias"
    assert moved.find(name)[1] == "vision.h.2.qkv.bias"
