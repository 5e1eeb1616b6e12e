"""Selection by path, tied parameters, adapters, modes, and the hash that proves what stayed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from polymodal.core.errors import ConfigError
from polymodal.training.freezing import (
    TrainRow,
    apply_train,
    fingerprint,
    frozen_names,
    parse_train,
    select,
    set_modes,
    set_trained,
    train_report,
)


class Stream(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.connector = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5))
        self.pool = nn.Identity()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.streams = nn.ModuleDict({"image": Stream(), "image_detail": Stream()})
        self.backbone = nn.Sequential(nn.Embedding(8, 6), nn.Linear(6, 6), nn.Dropout(0.5))
        self.heads = nn.ModuleDict({"text": nn.Linear(6, 8, bias=False)})
        self.heads["text"].weight = self.backbone[0].weight


def test_a_path_is_a_whole_prefix():
    model = Model()
    chosen = select(model, ["streams.image.connector"])
    assert chosen == {"streams.image.connector.0.weight", "streams.image.connector.0.bias"}
    assert all(name.startswith("streams.image.") for name in select(model, ["streams.image"]))
    assert len(select(model, ["streams.*.connector"])) == 4
    assert select(model, ["backbone.1.bias"]) == {"backbone.1.bias"}


def test_a_tied_parameter_is_selected_under_all_its_names():
    model = Model()
    assert select(model, ["heads.text"]) == {"heads.text.weight", "backbone.0.weight"}
    set_trained(model, {"heads.text.weight"})
    assert model.backbone[0].weight.requires_grad


def test_set_trained_freezes_the_rest():
    model = Model()
    names = select(model, ["streams.image"])
    set_trained(model, names)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == names


def test_apply_train_with_an_adapter():
    model = Model()
    entries = parse_train(
        ["streams.image.connector", {"part": "backbone", "adapter": {"use": "lora", "rank": 2, "match": ["1"]}}]
    )
    names = apply_train(model, entries)
    assert names == {
        "streams.image.connector.0.weight",
        "streams.image.connector.0.bias",
        "backbone.1.adapters.default.lora_a",
        "backbone.1.adapters.default.lora_b",
    }
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == names
    assert apply_train(model, entries) == names, "a later stage goes on with the adapter"
    later = apply_train(model, parse_train(["backbone"]))
    assert {
        "backbone.0.weight",
        "backbone.1.weight",
        "backbone.1.adapters.default.lora_a",
        "heads.text.weight",
    } <= later


def test_one_adapter_entry_may_name_several_parts():
    entries = parse_train([{"part": "streams.*.encoder", "adapter": "lora"}])
    names = apply_train(Model(), entries)
    assert names == {
        f"streams.{s}.encoder.0.adapters.default.lora_{leaf}" for s in ("image", "image_detail") for leaf in "ab"
    }


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (["streams.imge"], r"train\[0\]: no parameter or module matches 'streams.imge'; nearest: streams.image"),
        (["connector"], r"matches 'connector'; nearest: .*streams.image.connector.* Expected a whole dotted path"),
        (["backbone", "stream.*"], r"train\[1\]: no parameter or module matches 'stream.\*'"),
        (["streams.image.pool"], r"train\[0\]: 'streams.image.pool' has no parameters to train; remove it"),
        ([{"part": "bakbone", "adapter": "lora"}], r"train\[0\]: no module matches 'bakbone'; nearest: backbone"),
        (
            [{"part": "backbone", "adapter": {"use": "lora", "match": ["9"]}}],
            r"train\[0\].adapter.match: no linear layer matches '9'; nearest: 1",
        ),
        ([{"part": "backbone", "adapter": {"use": "lorra"}}], "unknown adapter 'lorra'; did you mean 'lora'"),
        ([{"prt": "backbone"}], r"train\[0\].prt: unknown key 'prt'; did you mean 'part'"),
        ([], r"train: found \[\], expected a list of at least one module path"),
        ("backbone", "train: found 'backbone', expected a list"),
    ],
)
def test_messages(entries, message):
    with pytest.raises(ConfigError, match=message):
        apply_train(Model(), parse_train(entries))


def test_frozen_modules_are_in_evaluation_mode():
    model = Model()
    apply_train(model, parse_train(["streams.image.connector", {"part": "backbone", "adapter": "lora"}]))
    model.eval()
    set_modes(model)
    stream = model.streams["image"]
    assert stream.connector.training and stream.connector[1].training
    assert model.backbone.training and model.backbone[2].training, "a part with an adapter trains, dropout included"
    assert not any(module.training for module in stream.encoder.modules())
    assert not any(module.training for module in model.streams["image_detail"].encoder.modules())
    before = stream.encoder[1].running_mean.clone()
    stream.encoder(torch.randn(3, 4))
    assert torch.equal(stream.encoder[1].running_mean, before)
    apply_train(model, parse_train(["streams.image"]))
    set_modes(model)
    assert stream.encoder[2].training and not model.backbone.training


def test_the_fingerprint_tells_any_change_of_what_is_frozen():
    model = Model()
    apply_train(model, parse_train(["streams.image.connector"]))
    names = frozen_names(model)
    assert "streams.image.encoder.1.running_mean" in names and "heads.text.weight" in names
    assert "streams.image.connector.0.weight" not in names
    before = fingerprint(model, names)
    assert len(before) == 64 and before == fingerprint(Model(), names)
    model.streams["image"].connector[0].weight.data.add_(1)
    assert fingerprint(model, names) == before
    model.streams["image"].encoder[1].running_mean[0] += 1e-6
    assert fingerprint(model, names) != before
    with pytest.raises(KeyError):
        fingerprint(model, {"nothing"})


def test_the_fingerprint_reads_every_type():
    model = Model().bfloat16()
    model.register_buffer("steps", torch.tensor(3))
    model.register_buffer("view", torch.arange(6.0).view(2, 3).T)
    before = fingerprint(model, model.state_dict())
    model.steps += 1
    assert fingerprint(model, model.state_dict()) != before


def test_the_report_counts_every_tensor_once():
    model = Model()
    adapter = {"part": "backbone", "adapter": {"use": "lora", "rank": 2}}
    apply_train(model, parse_train(["streams.image.connector", adapter]))
    rows = train_report(model)
    assert rows == [
        TrainRow("streams.image.encoder", 0, 4 * 4 + 4 + 8, 0),
        TrainRow("streams.image.connector", 4 * 6 + 6, 0, 0),
        TrainRow("streams.image_detail.encoder", 0, 28, 0),
        TrainRow("streams.image_detail.connector", 0, 30, 0),
        TrainRow("backbone", 2 * 6 * 2, 8 * 6 + 6 * 6 + 6, 24),
    ]
    assert sum(row.trained + row.frozen for row in rows) == sum(p.numel() for p in model.parameters())
