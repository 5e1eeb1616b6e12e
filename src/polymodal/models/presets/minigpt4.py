"""MiniGPT-4 (``model_type: minigpt4``): BLIP-2's image tower and Q-Former, one linear map, and Vicuna.

The layout is BLIP-2's with a Llama inside; what differs is how a conversation is written. An export as ``blip-2`` can
be read by the reference library, one as ``minigpt4`` remembers the chat format.
"""

from __future__ import annotations

from typing import Any

from polymodal.modalities.text.files import read_backend
from polymodal.models.compose.config import ModelConfig
from polymodal.models.presets import blip2
from polymodal.models.presets.architecture import Architecture, Size, Vocabulary, require
from polymodal.models.presets.llama import LLAMA
from polymodal.models.weights import HubConfigs

CHAT = "minigpt-4"
_MARKS = ("\u2581###", "##")
"""First pieces of the mark between turns, in Llama's vocabulary: an answer ends where one is written."""


def to_model(configs: HubConfigs) -> dict[str, Any]:
    """BLIP-2 with a Llama, and the turns of MiniGPT-4."""
    text = configs.config.get("text_config") or {}
    require(text, "minigpt4: text_config", model_type="llama")
    model = blip2.to_model(configs)
    backbone = model["backbone"]
    ends = [*backbone["stop_ids"], *_marks(configs)]
    return {**model, "backbone": {**backbone, "chat": CHAT, "stop_ids": list(dict.fromkeys(ends))}}


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
    names=blip2.names,
    to_hub=to_hub,
    sizes={
        "minigpt-4-vicuna-7b": _size("vicuna-7b-v1.5", 7_832_679_936),
        "minigpt-4-vicuna-13b": _size("vicuna-13b-v1.5", 14_110_916_096),
    },
    float32=("query_tokens", "qformer"),
)
"""See the module."""
