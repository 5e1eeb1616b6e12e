"""VideoBERT (``model_type: videobert``): words and visual words in one BERT.

Its weights were never published: this is the paper's architecture in a format of our own, with our own tensor names.
Against the paper, words and visual words are predicted by one softmax each instead of one over both, each stream counts
its own positions, and no token stands between the two.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from polymodal.core.errors import ConfigError
from polymodal.models.backbones.encoder import EncoderBackboneConfig
from polymodal.models.compose.config import ModelConfig
from polymodal.models.encoders.embedding import EmbeddingConfig
from polymodal.models.encoders.quantised import QuantisedConfig
from polymodal.models.presets.architecture import Architecture, Size, Vocabulary
from polymodal.models.presets.clip import text_reader
from polymodal.models.presets.rows import word_rows
from polymodal.models.weights import HubConfigs, NameTable, Rule

_DEFAULTS: dict[str, Any] = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "vocab_size": 30522,
    "max_position_embeddings": 512,
    "max_clips": 512,
    "branches": 12,
    "levels": 4,
    "clip_encoder": {"use": "i3d", "width": 1024},
}
_EPS = 1e-12
_HEADS = {"words", "clips", "match"}


def to_model(configs: HubConfigs) -> dict[str, Any]:
    """Text and video in an encoder backbone; masked words, masked visual words, and whether they belong together."""
    given = {**_DEFAULTS, **configs.config}
    width = given["hidden_size"]
    text = {
        "use": "embedding",
        "width": width,
        "vocab_size": given["vocab_size"],
        "max_tokens": given["max_position_embeddings"],
    }
    video = {
        "use": "quantised",
        "width": width,
        "base": given["clip_encoder"],
        "branches": given["branches"],
        "levels": given["levels"],
        "max_features": given["max_clips"],
        "mask_token": True,
    }
    stack = {
        "width": width,
        "depth": given["num_hidden_layers"],
        "heads": given["num_attention_heads"],
        "mlp_dim": given["intermediate_size"],
        "norm_eps": _EPS,
        "pre_norm": False,
        "final_norm": False,
    }
    reader = text_reader(configs, given["max_position_embeddings"])
    entry = {"connector": "identity", "enters": "sequence"}
    model = {
        "streams": {
            "text": {"modality": "text", "encoder": text, "reader": reader, **entry},
            "video": {"modality": "video", "encoder": video, **entry},
        },
        "backbone": {"use": "encoder", "input_norm": True, "transformer": stack},
        "heads": {
            "words": {"use": "masked_token"},
            "clips": {"use": "masked_token", "stream": "video", "predicts": "codes", "codec": "video"},
            "match": {"use": "matching", "outputs": 2},
        },
    }
    return model if "tokenizer" in reader else {**model, "tokenizer": {"use": "bpe", "rows": given["vocab_size"]}}


def names(model: ModelConfig, stored: Collection[str]) -> NameTable:
    """Our own names."""
    _parts(model)
    return NameTable([Rule("{rest}", "{rest}")])


def to_hub(model: ModelConfig, vocabulary: Vocabulary) -> dict[str, dict[str, Any]]:
    """``config.json``."""
    text, video = _parts(model)
    stack = model.backbone.transformer
    config = {
        "model_type": "videobert",
        "hidden_size": stack.width,
        "num_hidden_layers": stack.depth,
        "num_attention_heads": stack.heads,
        "intermediate_size": stack.mlp_dim or 4 * stack.width,
        "vocab_size": word_rows(model, vocabulary),
        "max_position_embeddings": text.max_tokens,
        "max_clips": video.max_features,
        "branches": video.branches,
        "levels": video.levels,
        "clip_encoder": video.base,
    }
    return {"config.json": config}


def _parts(model: ModelConfig) -> tuple[EmbeddingConfig, QuantisedConfig]:
    encoders = {name: stream.encoder for name, stream in model.streams.items()}
    text, video = encoders.get("text"), encoders.get("video")
    fits = isinstance(model.backbone, EncoderBackboneConfig) and len(encoders) == 2 and set(model.heads) == _HEADS
    if not (fits and isinstance(text, EmbeddingConfig) and isinstance(video, QuantisedConfig)):
        raise ConfigError(
            "videobert: found a model of other parts, expected a text stream with the encoder 'embedding' and a video "
            f"stream with 'quantised' in the backbone 'encoder', and the heads {sorted(_HEADS)}"
        )
    return text, video


VIDEOBERT = Architecture(
    "videobert",
    ("videobert",),
    "VideoBERT, arXiv 1904.01766, section 3",
    to_model=to_model,
    names=names,
    to_hub=to_hub,
    # The paper counts none; it starts from BERT-large (340M) and adds 20,736 visual words.
    sizes={"videobert-large": Size({"model_type": "videobert"}, 379_242_556)},
)
"""See the module."""
