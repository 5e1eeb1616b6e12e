"""Every published architecture that is read natively."""

from __future__ import annotations

from polymodal.core.config import unknown
from polymodal.core.errors import ConfigError
from polymodal.models.presets.albef import ALBEF
from polymodal.models.presets.architecture import Architecture, Size
from polymodal.models.presets.beit3 import BEIT3
from polymodal.models.presets.bert import BERT
from polymodal.models.presets.blip import BLIP
from polymodal.models.presets.blip2 import BLIP2
from polymodal.models.presets.blip2_retrieval import BLIP2_RETRIEVAL
from polymodal.models.presets.blip_retrieval import BLIP_RETRIEVAL
from polymodal.models.presets.clap import CLAP
from polymodal.models.presets.clip import CLIP
from polymodal.models.presets.dinov2 import DINOV2
from polymodal.models.presets.eva import EVA
from polymodal.models.presets.flava import FLAVA
from polymodal.models.presets.gpt2 import GPT2
from polymodal.models.presets.hubert import HUBERT
from polymodal.models.presets.i3d import I3D
from polymodal.models.presets.idefics import IDEFICS
from polymodal.models.presets.imagebind import IMAGEBIND
from polymodal.models.presets.instructblip import INSTRUCTBLIP
from polymodal.models.presets.llama import LLAMA, MISTRAL
from polymodal.models.presets.llava import LLAVA
from polymodal.models.presets.llava_next import LLAVA_NEXT
from polymodal.models.presets.llava_onevision import LLAVA_ONEVISION
from polymodal.models.presets.minigpt4 import MINIGPT4
from polymodal.models.presets.open_clip import OPEN_CLIP
from polymodal.models.presets.opt import OPT
from polymodal.models.presets.patchtst import PATCHTST
from polymodal.models.presets.perceiver import PERCEIVER
from polymodal.models.presets.point_bert import POINT_BERT
from polymodal.models.presets.pointnet import POINTNET
from polymodal.models.presets.qwen import QWEN2, QWEN3
from polymodal.models.presets.qwen2_audio import QWEN2_AUDIO
from polymodal.models.presets.qwen2_audio_tower import QWEN2_AUDIO_TOWER
from polymodal.models.presets.resnet import RESNET
from polymodal.models.presets.siglip import SIGLIP
from polymodal.models.presets.t5 import T5
from polymodal.models.presets.timesformer import TIMESFORMER
from polymodal.models.presets.videobert import VIDEOBERT
from polymodal.models.presets.videomae import VIDEOMAE
from polymodal.models.presets.vilt import VILT
from polymodal.models.presets.vit import VIT
from polymodal.models.presets.wav2vec2 import WAV2VEC2
from polymodal.models.presets.whisper import WHISPER
from polymodal.models.presets.word_vectors import WORD_VECTORS
from polymodal.models.presets.xclip import XCLIP
from polymodal.models.weights import HubConfigs

_ALL: tuple[Architecture, ...] = (
    VIT,
    CLIP,
    SIGLIP,
    OPEN_CLIP,
    DINOV2,
    EVA,
    RESNET,
    VIDEOMAE,
    WAV2VEC2,
    HUBERT,
    QWEN2_AUDIO_TOWER,
    QWEN2_AUDIO,
    CLAP,
    IMAGEBIND,
    TIMESFORMER,
    PATCHTST,
    WHISPER,
    T5,
    LLAVA,
    LLAVA_NEXT,
    LLAVA_ONEVISION,
    I3D,
    VILT,
    ALBEF,
    BEIT3,
    VIDEOBERT,
    FLAVA,
    BLIP,
    BLIP2,
    BLIP2_RETRIEVAL,
    MINIGPT4,
    INSTRUCTBLIP,
    IDEFICS,
    BLIP_RETRIEVAL,
    BERT,
    WORD_VECTORS,
    *(language.architecture() for language in (LLAMA, MISTRAL, QWEN2, QWEN3, GPT2, OPT)),
    POINTNET,
    POINT_BERT,
    PERCEIVER,
    XCLIP,
)
ARCHITECTURES: dict[str, Architecture] = {architecture.name: architecture for architecture in _ALL}
"""Architectures by name."""


def find_architecture(configs: HubConfigs) -> Architecture:
    """The architecture that reads a checkpoint's configs.

    Raises:
        ConfigError: if there is none, naming the ``model_type`` and what can be done.
    """
    for architecture in ARCHITECTURES.values():
        if architecture.reads(configs):
            return architecture
    mine = [name for name, each in ARCHITECTURES.items() if configs.model_type in each.model_types]
    if mine:
        known_classes = [kind for name in mine for kind in ARCHITECTURES[name].classes]
        raise ConfigError(
            f"{configs.folder}: found the class {', '.join(configs.classes) or 'unnamed'} of {configs.model_type}, "
            f"expected one of {', '.join(known_classes)}"
        )
    known = sorted({kind for architecture in ARCHITECTURES.values() for kind in architecture.model_types})
    raise ConfigError(
        f"{configs.folder}: {unknown('model_type', configs.model_type, known)}. "
        "Use it as a part instead: {use: transformers, from: FOLDER} as an encoder or a backbone"
    )


def find_size(name: str) -> tuple[Architecture, Size]:
    """The architecture and the published size called ``name``.

    Raises:
        ConfigError: if there is none.
    """
    for architecture in ARCHITECTURES.values():
        if name in architecture.sizes:
            return architecture, architecture.sizes[name]
    raise ConfigError(unknown("published model", name, published_names()))


def published_names() -> list[str]:
    """Names of all published sizes."""
    return [name for architecture in ARCHITECTURES.values() for name in architecture.sizes]
