"""ALBEF and BEiT-3 from pickled files with exactly the names, and the extras, that the published code gives them.

No library on the registry has these models, and their files are not here: the names are written from the modules of the
published code, which each function names.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import polymodal as pm
from polymodal.core.errors import CheckpointError, ConfigError
from polymodal.models.compose import ModelConfig, MultimodalModel
from polymodal.models.presets import find_size
from polymodal.models.presets.albef import ALBEF
from polymodal.models.presets.beit3 import BEIT3
from polymodal.models.weights import HubConfigs
from polymodal.models.weights.assign import no_weights, wanted_names

from .bert_tokenizer import bert_tokenizer
from .test_albef import PICTURES, SAMPLES, TEXTS, Published, made  # noqa: F401  (a fixture)
from .test_beit3 import SMALL

KINDS = ("weight", "bias")


def both(*paths: str) -> set[str]:
    return {f"{path}.{kind}" for path in paths for kind in KINDS}


def vision(prefix: str, depth: int) -> set[str]:
    """``models/vit.py`` of salesforce/ALBEF."""
    found = {prefix + "cls_token", prefix + "pos_embed"} | both(prefix + "patch_embed.proj", prefix + "norm")
    for block in range(depth):
        own = f"{prefix}blocks.{block}."
        found |= both(*(own + part for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")))
    return found


def bert(prefix: str, depth: int, fusion_layer: int) -> set[str]:
    """``BertModel`` of ``models/xbert.py``, whose layers from ``fusion_layer`` on look at the picture."""
    found = {f"{prefix}embeddings.{part}_embeddings.weight" for part in ("word", "position", "token_type")}
    found |= {prefix + "embeddings.position_ids"} | both(prefix + "embeddings.LayerNorm")
    for layer in range(depth):
        own = f"{prefix}encoder.layer.{layer}."
        kinds = ("attention", "crossattention") if layer >= fusion_layer else ("attention",)
        for kind in kinds:
            found |= both(*(f"{own}{kind}.self.{part}" for part in ("query", "key", "value")))
            found |= both(f"{own}{kind}.output.dense", f"{own}{kind}.output.LayerNorm")
        found |= both(own + "intermediate.dense", own + "output.dense", own + "output.LayerNorm")
    return found


def words(prefix: str) -> set[str]:
    """``BertOnlyMLMHead`` of ``models/xbert.py``, whose bias has two names."""
    own = prefix + "cls.predictions."
    return both(own + "transform.dense", own + "transform.LayerNorm", own + "decoder") | {own + "bias"}


def albef(task: str, vision_layers: int, text_layers: int, joint_layers: int) -> set[str]:
    """``ALBEF`` of ``models/model_pretrain.py`` and of ``models/model_retrieval.py``: each part, and its twin."""
    found = {"temp", "image_queue", "text_queue", "queue_ptr"} | both("itm_head")
    found |= {"idx_queue"} if task == "retrieval" else set()
    for twin in ("", "_m"):
        text = f"text_encoder{twin}."
        found |= vision(f"visual_encoder{twin}.", vision_layers) | both(f"vision_proj{twin}", f"text_proj{twin}")
        found |= bert(text if task == "retrieval" else text + "bert.", text_layers + joint_layers, text_layers)
        found |= words(text) if task == "pretraining" else set()
    return found


def beit3(depth: int) -> set[str]:
    """``torchscale/model/BEiT3.py`` with ``architecture/encoder.py``, both experts of everything that is routed."""
    found = {"text_embed.weight", "vision_embed.cls_token", "vision_embed.mask_token"} | both("vision_embed.proj")
    for expert in "AB":
        found |= {f"encoder.embed_positions.{expert}.weight"} | both(f"encoder.layer_norm.{expert}")
        for layer in range(depth):
            own = f"encoder.layers.{layer}."
            attention = ("k_proj", "v_proj", "q_proj", "out_proj", "inner_attn_ln")
            found |= both(*(f"{own}self_attn.{part}.{expert}" for part in attention))
            found |= both(*(f"{own}{norm}.{expert}" for norm in ("self_attn_layer_norm", "final_layer_norm")))
            found |= both(*(f"{own}ffn.{expert}.{part}" for part in ("fc1", "fc2", "ffn_layernorm")))
    return {"beit3." + name for name in found}


def taken(preset: Any, config: dict[str, Any], rows: int, stored: set[str]) -> set[str]:
    """Stored names that a model of a config takes; none of the others is unknown to it."""
    with no_weights():
        network = MultimodalModel(ModelConfig.parse(preset.to_model(HubConfigs(config))), rows)
    table = preset.names(network.config, stored)
    assert table.unknown(network.state_dict(), stored) == []
    return {place[1] for name in wanted_names(network) if (place := table.find(name)) is not None}


def extras(names: set[str]) -> set[str]:
    """What a training of ALBEF leaves in a file beside the model; the decoder's matrix is the embedding's."""
    state = {"image_queue", "text_queue", "idx_queue", "queue_ptr", "text_encoder.cls.predictions.decoder.weight"}
    state |= {"text_encoder.cls.predictions.bias"}
    return {name for name in names if name in state or "_m." in name or name.endswith("position_ids")}


@pytest.mark.parametrize("task", ["pretraining", "retrieval"])
def test_albef_takes_every_published_name(task: str) -> None:
    _, size = find_size("albef-base")
    names = albef(task, 12, 6, 6)
    assert taken(ALBEF, {**size.config, "task": task}, 30522, names) == names - extras(names)


@pytest.mark.parametrize(
    ("task", "more"),
    [
        ("encoder", set()),
        ("retrieval", {"vision_head.weight", "language_head.weight", "logit_scale"}),
    ],
)
def test_beit3_takes_every_published_name(task: str, more: set[str]) -> None:
    _, size = find_size("beit3-base-patch16-224")
    names = beit3(12) | more
    assert taken(BEIT3, {**size.config, "task": task}, 64010, names) == names


def write(folder: Path, tensors: dict[str, Tensor], said: dict[str, Any], **beside: Any) -> Path:
    folder.mkdir()
    torch.save({"model": tensors, **beside}, folder / "checkpoint.pth")
    (folder / "config.json").write_text(json.dumps(said))
    return folder


def pickled_albef(source: Path, folder: Path, task: str) -> Path:
    """A file as ``Pretrain.py`` or ``Retrieval.py`` saves it, of the tensors in a folder that we read already."""
    stored = load_file(source / "model.safetensors")
    stored["text_encoder.cls.predictions.bias"] = stored["text_encoder.cls.predictions.decoder.bias"]
    if task == "retrieval":
        stored = {name.replace("bert.", ""): tensor for name, tensor in stored.items() if ".cls." not in name}
    tensors = {}
    for name in albef(task, 2, 2, 2):
        plain = name.replace("_m.", ".")
        if plain in stored:
            tensors[name] = stored[plain].clone() + (1.0 if "_m." in name else 0.0)
        else:
            assert plain in extras({plain}), plain
            tensors[name] = torch.arange(16)[None] if plain.endswith("position_ids") else torch.zeros(20, 8)
    beside = {"optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}, "epoch": 29, "config": {"image_res": 24}}
    config = json.loads((source / "config.json").read_text())
    write(folder, tensors, {**config, "task": task}, **beside, lr_scheduler={"t_initial": 30, "base_values": [1e-4]})
    rows = bert_tokenizer(16).get_vocab()
    (folder / "vocab.txt").write_text("\n".join(sorted(rows, key=rows.__getitem__)) + "\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize("task", ["pretraining", "retrieval"])
def test_a_pickled_albef_is_the_model(made: tuple[Path, Published], tmp_path: Path, task: str) -> None:  # noqa: F811
    source, _ = made
    expected, found = pm.load(source), pm.load(pickled_albef(source, tmp_path / "pickled", task))
    assert set(found.recipe.model.heads) == {"space", "match"} | ({"words"} if task == "pretraining" else set())
    pictures = [pm.Image(picture) for picture in PICTURES]
    assert (found.embed(pictures) == expected.embed(pictures)).all()
    assert (found.embed(TEXTS) == expected.embed(TEXTS)).all()
    assert (found.match(SAMPLES) == expected.match(SAMPLES)).all()
    assert found.export(tmp_path / "ours") == "albef"
    assert (pm.load(tmp_path / "ours").match(SAMPLES) == found.match(SAMPLES)).all()


def test_another_task_of_albef_is_refused() -> None:
    with pytest.raises(ConfigError, match="found task: 'vqa', expected 'pretraining' or 'retrieval'"):
        ALBEF.model(HubConfigs({"model_type": "albef", "task": "vqa"}))


TASK_HEADS = {
    "encoder": set(),
    "retrieval": {"vision_head.weight", "language_head.weight", "logit_scale"},
    # modeling_finetune.py of microsoft/unilm, beit3: captioning, reasoning, classification, questions.
    "captioning": both("mlm_head"),
    "nlvr2": both("head.norm1", "head.dense1", "head.norm2", "head.dense2"),
    "imagenet": both("fc_norm", "head"),
    "vqa": both("pooler.norm", "pooler.dense", "head.0", "head.1", "head.3"),
}


@pytest.mark.parametrize("kind", list(TASK_HEADS))
def test_a_pickled_beit3_is_the_model(tmp_path: Path, kind: str) -> None:
    """As ``utils.save_model`` leaves it; of a file that was fine-tuned for another task the encoder is read."""
    task = kind if kind == "retrieval" else "encoder"
    config = {**SMALL, "vocab_size": 300, "task": task}
    torch.manual_seed(0)
    network = MultimodalModel(ModelConfig.parse(BEIT3.to_model(HubConfigs(config))), 300)
    state = {name: network.state_dict()[name] for name in wanted_names(network)}
    tensors = BEIT3.names(network.config, ()).save(state, "beit3")
    heads = {name: torch.randn(3) for name in TASK_HEADS[kind] - set(tensors)}
    assert set(tensors) | set(heads) == beit3(3) | TASK_HEADS[kind]
    beside = {"optimizer": {"state": {}}, "epoch": 4, "scaler": {"scale": 1.0}, "args": argparse.Namespace(lr=1e-4)}
    folder = write(tmp_path / "theirs", {**tensors, **heads}, config, **beside)
    bert_tokenizer(16).save_pretrained(folder)
    found = pm.load(folder)
    assert all(torch.equal(found.network.state_dict()[name], tensor) for name, tensor in state.items())
    assert found.export(tmp_path / "ours") == "beit3"
    assert set(load_file(tmp_path / "ours" / "model.safetensors")) == set(tensors) | set(heads)
    torch.save({"model": {**tensors, "beit3.encoder.more": torch.ones(1)}}, folder / "checkpoint.pth")
    with pytest.raises(CheckpointError, match=r"1 tensor\(s\) unknown to beit3: beit3\.encoder\.more"):
        pm.load(folder)
