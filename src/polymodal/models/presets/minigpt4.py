"""MiniGPT-4 (``model_type: minigpt4``): BLIP-2's image tower and Q-Former, one linear map, and Vicuna.

The layout is BLIP-2's with a Llama inside; what differs is how a conversation is written. An export as ``blip-2`` can
be read by the reference library, one as ``minigpt4`` remembers the chat format.

The release itself is a file with the linear map alone, beside those of BLIP-2's image tower and of its Q-Former and a
folder with Vicuna. A folder that holds all four, and whose ``config.json`` names them under ``weights`` (see
:mod:`polymodal.models.weights.released`), is read by the names of the published code. Deviation: there, as in BLIP-2's
own code, the norm behind the image tower has an epsilon of 1e-5; here it has that of the tower's other norms, 1e-6, as
in the reference library's BLIP-2.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from polymodal.modalities.text.files import read_backend
from polymodal.models.compose.config import ModelConfig
from polymodal.models.presets import blip2, eva
from polymodal.models.presets.architecture import Architecture, Size, Vocabulary, require
from polymodal.models.presets.blocks import block_rules
from polymodal.models.presets.llama import LLAMA
from polymodal.models.presets.llava import language_of
from polymodal.models.weights import HubConfigs, HubFolder, NameTable, Rule
from polymodal.models.weights.released import KEY, entry

CHAT = "minigpt-4"
_TOWER, _MAP, _LANGUAGE = "visual_encoder.", "llama_proj.", "llama_model."
"""Where the release's code keeps the image tower, the linear map and the language model."""
_MARKS = ("\u2581###", "##")
"""First pieces of the mark between turns, in Llama's vocabulary: an answer ends where one is written."""


def to_model(configs: HubConfigs) -> dict[str, Any]:
    """BLIP-2 with a Llama, and the turns of MiniGPT-4."""
    configs = _with_language(configs)
    text = configs.config.get("text_config") or {}
    require(text, "minigpt4: text_config", model_type="llama")
    model = blip2.to_model(configs)
    backbone = model["backbone"]
    ends = [*backbone["stop_ids"], *_marks(configs)]
    return {**model, "backbone": {**backbone, "chat": CHAT, "stop_ids": list(dict.fromkeys(ends))}}


def _with_language(configs: HubConfigs) -> HubConfigs:
    """The configs of a release, filled in with those of the language model's folder, whose tokenizer is the model's."""
    said = configs.config.get(KEY)
    if configs.folder is None or not isinstance(said, Mapping) or _LANGUAGE not in said:
        return configs
    language = HubFolder(entry(configs.folder, said[_LANGUAGE])).configs
    config = {**configs.config, "text_config": dict(language.config)}
    return replace(language, config=config, preprocessor=configs.preprocessor, processor=configs.processor)


def names(model: ModelConfig, stored: Collection[str]) -> NameTable:
    """BLIP-2's names, or those of the release."""
    if _MAP + "weight" not in stored:
        return blip2.names(model, stored)
    image, connector = blip2.image_parts(model, "minigpt4")
    ours, encoder, qformer = "streams.image.connector.", "streams.image.encoder.", "Qformer.bert."
    layers = qformer + "encoder.layer"
    parts = {
        mine: name.replace("attention.attention.", "attention.self.") for mine, name in blip2.QFORMER_PARTS.items()
    }
    language, head = language_of(model.backbone), next(iter(model.heads.values()))
    beyond = (name for name in stored if name.startswith(_TOWER + "blocks."))
    return (
        NameTable(
            [
                Rule(encoder + "trunk.transformer.final_norm.{p}", "ln_vision.{p}"),
                Rule(ours + "query_norm.{p}", qformer + "embeddings.LayerNorm.{p}"),
                Rule(ours + "out.layers.0.{p}", _MAP + "{p}"),
                *block_rules(ours + "transformer.blocks", layers, parts),
            ],
            # BLIP-2's file: the Q-Former's path of words, the heads of its first stage, the map to its language model.
            ignored=(
                *(f"{layers}.{{i}}.{part}.{{rest}}" for part in ("intermediate", "output")),
                *(f"{qformer}embeddings.{part}_embeddings.weight" for part in ("word", "position")),
                *(qformer + "embeddings.position_ids", "Qformer.cls.{rest}", "temp"),
                *(f"{part}.{{p}}" for part in ("vision_proj", "text_proj", "itm_head", "t5_proj", "opt_proj")),
                # EVA's file: the block that BLIP-2 leaves out, and what follows it.
                *(name for name in beyond if int(name.split(".")[2]) >= image.depth),
                *(f"{_TOWER}{part}.{{p}}" for part in ("norm", "fc_norm", "head")),
                _TOWER + "mask_token",
            ),
            # EVA's keys have no bias, those of the reference library's BLIP-2 one of zeros.
            optional=(encoder + "trunk.transformer.blocks.{i}.attention.k_proj.bias",),
        )
        + eva.tower_names(encoder, _TOWER, image, is_fused=True)
        + blip2.qformer_names(ours, connector)
        + language.names(model.backbone, _LANGUAGE + language.body)
        + language.head_names(head.tied, _LANGUAGE + "lm_head.weight")
    )


def _marks(configs: HubConfigs) -> list[int]:
    if configs.folder is None:
        return []
    backend = read_backend(configs.folder)
    return [id for mark in _MARKS if (id := backend.token_to_id(mark)) is not None]


def to_hub(model: ModelConfig, vocabulary: Vocabulary) -> dict[str, dict[str, Any]]:
    """BLIP-2's files under another ``model_type``."""
    files = blip2.to_hub(model, vocabulary)
    require(files["config.json"]["text_config"], "minigpt4: text_config", model_type="llama")
    return {**files, "config.json": {**files["config.json"], "model_type": "minigpt4"}}


def _size(name: str, parameters: int) -> Size:
    size = blip2.size({**LLAMA.sizes[name].config, "model_type": "llama"}, parameters)
    return Size({**size.config, "model_type": "minigpt4"}, parameters)


MINIGPT4 = Architecture(
    "minigpt4",
    ("minigpt4",),
    "MiniGPT-4, arXiv 2304.10592, section 3",
    to_model=to_model,
    names=names,
    to_hub=to_hub,
    sizes={
        "minigpt-4-vicuna-7b": _size("vicuna-7b-v1.5", 7_832_679_936),
        "minigpt-4-vicuna-13b": _size("vicuna-13b-v1.5", 14_110_916_096),
    },
    float32=("query_tokens", "qformer"),
)
"""See the module."""
