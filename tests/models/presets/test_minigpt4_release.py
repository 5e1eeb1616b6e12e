"""MiniGPT-4 as it was released: three pickled files and a folder with Vicuna, by the names of the published code.

Names: ``minigpt4/models/{minigpt4,eva_vit,Qformer}.py`` of Vision-CAIR/MiniGPT-4; the numbers are those of a folder in
the reference library's layout of BLIP-2, which ``test_minigpt4`` holds to that library.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import polymodal as pm
from polymodal.core.errors import CheckpointError
from polymodal.core.samples import conversation
from polymodal.models.compose import to_device

from .languages import byte_tokenizer
from .reference import assert_close, assert_same_weights
from .test_blip2 import PICTURES, QFORMER, QUERIES, VISION, make

transformers = pytest.importorskip("transformers")

WEIGHTS = {
    "visual_encoder.": "eva_vit_g.pth",
    "": ["blip2_pretrained_flant5xxl.pth", "pretrained_minigpt4_7b.pth"],
    "llama_model.": "vicuna",
}
BLOCK = {
    "norm1": "layer_norm1", "norm2": "layer_norm2", "attn.proj": "self_attn.projection", "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}  # fmt: skip


def tower(state: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    """``eva_vit_g.pth``: half precision, one block more than BLIP-2 takes, no norm behind the last."""
    hub = "vision_model."
    found = {
        "cls_token": state[hub + "embeddings.class_embedding"],
        "pos_embed": state[hub + "embeddings.position_embedding"],
    }
    for kind in ("weight", "bias"):
        found[f"patch_embed.proj.{kind}"] = state[f"{hub}embeddings.patch_embedding.{kind}"]
    for place in range(depth + 1):
        block, layer = f"blocks.{place}.", f"{hub}encoder.layers.{min(place, depth - 1)}."
        query, _, value = state[layer + "self_attn.qkv.bias"].chunk(3)
        found |= {block + "attn.q_bias": query, block + "attn.v_bias": value}
        found[block + "attn.qkv.weight"] = state[layer + "self_attn.qkv.weight"]
        for theirs, ours in BLOCK.items():
            for kind in ("weight", "bias"):
                found[f"{block}{theirs}.{kind}"] = state[f"{layer}{ours}.{kind}"]
    more = {"norm.weight": torch.ones(2), "head.weight": torch.ones(3, 2), "mask_token": torch.ones(2)}
    return {name: tensor.clone() for name, tensor in (found | more).items()}


def qformer(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of ``blip2_pretrained_flant5xxl.pth``; with the path of words, as those of the first stage."""
    found = {"query_tokens": state["query_tokens"]}
    for name, tensor in state.items():
        if name.startswith("qformer.encoder."):
            found["Qformer.bert." + name[8:].replace("attention.attention.", "attention.self.")] = tensor
    for kind in ("weight", "bias"):
        found[f"ln_vision.{kind}"] = state[f"vision_model.post_layernorm.{kind}"]
        found[f"Qformer.bert.embeddings.LayerNorm.{kind}"] = state[f"qformer.layernorm.{kind}"]
        found[f"t5_proj.{kind}"] = torch.ones(3)
        found[f"Qformer.bert.encoder.layer.0.intermediate.dense.{kind}"] = torch.ones(3)
        found[f"Qformer.bert.encoder.layer.0.output.LayerNorm.{kind}"] = torch.ones(3)
    found["Qformer.bert.embeddings.word_embeddings.weight"] = torch.ones(4, 3)
    found["Qformer.bert.embeddings.position_ids"] = torch.arange(4)[None]
    found["Qformer.cls.predictions.transform.dense.bias"] = torch.ones(3)
    return {name: tensor.clone() for name, tensor in found.items()}


def release(theirs: Path, folder: Path) -> Any:
    """Write a release of the BLIP-2 in ``theirs``, whose keys get no bias; returns that model."""
    model = transformers.Blip2ForConditionalGeneration.from_pretrained(theirs).eval()
    width = VISION["hidden_size"]
    with torch.no_grad():
        for layer in model.vision_model.encoder.layers:
            layer.self_attn.qkv.bias[width : 2 * width] = 0.0
    model.save_pretrained(theirs)
    state = model.state_dict()
    folder.mkdir()
    torch.save(tower(state, VISION["num_hidden_layers"]), folder / "eva_vit_g.pth")
    torch.save({"model": qformer(state)}, folder / "blip2_pretrained_flant5xxl.pth")
    proj = {f"llama_proj.{kind}": state[f"language_projection.{kind}"].clone() for kind in ("weight", "bias")}
    beside = {"optimizer": {"state": {0: {"step": torch.ones(())}}}, "config": {"run": {"max_epoch": 4}}, "epoch": 3}
    torch.save({"model": proj, **beside, "args": argparse.Namespace(lr=1e-4)}, folder / "pretrained_minigpt4_7b.pth")
    model.language_model.save_pretrained(folder / "vicuna")
    byte_tokenizer("<s>").save_pretrained(folder / "vicuna")
    sizes = {"vision_config": VISION, "qformer_config": QFORMER, "num_query_tokens": QUERIES}
    (folder / "config.json").write_text(json.dumps({"model_type": "minigpt4", "weights": WEIGHTS, **sizes}))
    return model


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Any]:
    """The folder in the library's layout, the release, and the model that both hold."""
    theirs = make(tmp_path_factory.mktemp("minigpt4"), "llama")
    folder = theirs.parent / "release"
    model = release(theirs, folder)
    config = json.loads((theirs / "config.json").read_text())
    (theirs / "config.json").write_text(json.dumps({**config, "model_type": "minigpt4"}))
    return theirs, folder, model


def logits(model: Any) -> Tensor:
    processor = model.engine.processor
    plan = processor.plan(conversation(pm.Image(PICTURES[0]), "What is it?"), prompt=True)
    batch = to_device(processor.collate([processor.load(plan)], packed=False), "cpu")
    with torch.inference_mode():
        found: Tensor = model.network.token_logits(model.network.states(batch))
    return found


def test_the_release_computes_what_the_library_s_layout_does(made: tuple[Path, Path, Any]) -> None:
    theirs, folder, _ = made
    ours, expected = pm.load(folder), pm.load(theirs)
    assert ours.recipe.model.backbone.chat == expected.recipe.model.backbone.chat == "minigpt-4"
    assert_close(logits(ours), logits(expected))
    answer = ours.chat("What is it?", pm.Image(PICTURES[1]), max_new_tokens=8)
    assert answer.tokens == expected.chat("What is it?", pm.Image(PICTURES[1]), max_new_tokens=8).tokens


def test_its_export_is_read_by_the_reference_library(made: tuple[Path, Path, Any], tmp_path: Path) -> None:
    _, folder, model = made
    assert pm.load(folder).export(tmp_path / "own") == "minigpt4"
    assert pm.load(folder).export(tmp_path / "blip2", "blip-2") == "blip-2"
    again = transformers.Blip2ForConditionalGeneration.from_pretrained(tmp_path / "blip2")
    assert_same_weights(again, model)
    assert_same_weights(pm.load(tmp_path / "own").network, pm.load(folder).network)


def test_parts_of_it_go_into_recipes(made: tuple[Path, Path, Any]) -> None:
    import yaml

    _, folder, model = made
    recipe = yaml.safe_load(
        f"""
        name: mixed
        model:
          streams:
            image:
              encoder: {{from: {folder}}}
              connector: {{from: {folder}}}
              enters: sequence
          backbone: {{from: {folder / "vicuna"}}}
        """
    )
    network = pm.build(recipe)
    stored = network.streams["image"].connector.out.layers[0].weight
    assert torch.equal(stored, model.language_projection.weight)
    bias = network.streams["image"].encoder.trunk.transformer.blocks[0].attention.k_proj.bias
    assert torch.equal(bias, torch.zeros_like(bias))


def test_half_precision_stays_where_it_is_safe(made: tuple[Path, Path, Any], tmp_path: Path) -> None:
    """As released: tower, map and Vicuna in float16; the Q-Former computes in float32, as the library's BLIP-2 does."""
    _, folder, _ = made
    copy = shutil.copytree(folder, tmp_path / "half")
    torch.save({k: v.half() for k, v in torch.load(copy / "eva_vit_g.pth").items()}, copy / "eva_vit_g.pth")
    language = transformers.LlamaForCausalLM.from_pretrained(copy / "vicuna", dtype=torch.float16)
    language.save_pretrained(copy / "vicuna")
    network = pm.load(copy).network
    image = network.streams["image"]
    assert image.encoder.trunk.cls_token.dtype == image.connector.out.layers[0].weight.dtype == torch.float16
    assert image.connector.queries.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda f: (f / "eva_vit_g.pth").unlink(),
            r"weights names eva_vit_g\.pth, which is missing; put it, or a link",
        ),
        (
            lambda f: torch.save({"epoch": 3}, f / "pretrained_minigpt4_7b.pth"),
            "found the keys epoch, expected tensors by name, alone or under 'model' or 'state_dict'",
        ),
        (
            lambda f: torch.save(
                {"model": {"llama_proj.weight": torch.ones(40, 32)}}, f / "pretrained_minigpt4_7b.pth"
            ),
            r"1 tensor\(s\) missing: llama_proj\.bias",
        ),
        (
            lambda f: torch.save(
                {**torch.load(f / "eva_vit_g.pth"), "blocks.0.gamma_1": torch.ones(24)}, f / "eva_vit_g.pth"
            ),
            r"1 tensor\(s\) unknown to minigpt4: visual_encoder\.blocks\.0\.gamma_1",
        ),
    ],
)
def test_what_is_wrong_is_named(made: tuple[Path, Path, Any], tmp_path: Path, change: Any, message: str) -> None:
    folder = shutil.copytree(made[1], tmp_path / "broken")
    change(folder)
    with pytest.raises(CheckpointError, match=message):
        pm.load(folder)
