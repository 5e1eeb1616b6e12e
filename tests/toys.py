"""A tiny model of every modality, its processor, and in-memory media, for tests of several packages."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from polymodal.core.batch import Batch
from polymodal.core.limits import Limits
from polymodal.core.parts import Audio, Image, Media, Points, Sensor, Video
from polymodal.core.samples import Sample, conversation
from polymodal.modalities.processor import Processor, StreamLayout
from polymodal.modalities.table import build_reader
from polymodal.modalities.text import Tokenizer, chat_format, train_bpe
from polymodal.models.backbones.decoder import DecoderConfig
from polymodal.models.compose import ModelConfig, MultimodalModel, to_device

TEXTS = [
    "What is on the left? A red cube.",
    "Which sound is this? A beep, then two chirps.",
    "How did it move? It spins and falls.",
    "Describe the shape. A large blue star is above a small green ring.",
]
SMALL: dict[str, Any] = {"width": 16, "depth": 1, "heads": 2}
ENCODERS: dict[str, dict[str, Any]] = {
    "text": {"use": "text_transformer", **SMALL},
    "image": {"use": "vit", "image_size": 16, "patch_size": 8, **SMALL},
    "audio": {"use": "audio_transformer", "num_mels": 8, **SMALL},
    "video": {
        "use": "frame_temporal",
        "image_size": 16,
        "patch_size": 8,
        "temporal_depth": 1,
        "num_frames": 3,
        **SMALL,
    },
    "points": {"use": "point_groups", "num_points": 32, "num_groups": 4, "group_size": 4, **SMALL},
    "sensor": {"use": "sensor_patch", "num_channels": 2, "patch_size": 4, **SMALL},
}
READERS: dict[str, dict[str, Any]] = {"audio": {"use": "audio", "rate_hz": 4000, "num_mels": 8}}
MEDIA = ("image", "audio", "video", "points", "sensor")


def stream(modality: str, **changes: Any) -> dict[str, Any]:
    """The config of one stream, entering the sequence unless ``changes`` say otherwise."""
    data: dict[str, Any] = {"modality": modality, "encoder": ENCODERS[modality], "enters": "sequence"}
    if modality in READERS:
        data["reader"] = READERS[modality]
    return {**data, **changes}


def decoder_data(*, tied: bool = True, **backbone: Any) -> dict[str, Any]:
    """All five media in a decoder."""
    transformer = {"width": 24, "depth": 2, "heads": 4, "norm": "rms", "kv_heads": 2}
    return {
        "streams": {name: stream(name) for name in MEDIA},
        "backbone": {"use": "decoder", "max_tokens": 256, "transformer": transformer, **backbone},
        "heads": {"answer": {"use": "next_token", "tied": tied}},
    }


def merge_data(fusion: Any = "gated", heads: dict[str, Any] | None = None, **enters: Any) -> dict[str, Any]:
    """Text, image and audio merged."""
    entry = {"use": "merge", **enters}
    return {
        "streams": {name: stream(name, enters=entry) for name in ("text", "image", "audio")},
        "backbone": {"use": "merge", "width": 16, "fusion": fusion},
        "heads": heads or {"class": {"use": "class", "classes": ["a", "b", "c"]}},
    }


@dataclass
class Toy:
    """A model with its processor."""

    config: ModelConfig
    tokenizer: Tokenizer
    processor: Processor
    network: MultimodalModel

    def batch(self, samples: list[Sample], *, packed: bool = False) -> Batch:
        """Samples planned, loaded and collated, as tensors."""
        examples = [self.processor.load(self.processor.plan(sample)) for sample in samples]
        return to_device(self.processor.collate(examples, packed), "cpu")


def tokenizer(chat: str = "turns", vocab_size: int = 300) -> Tokenizer:
    """A byte-level tokenizer with the controls of a chat format."""
    return train_bpe(TEXTS, vocab_size, chat_format(chat).controls)


def build(data: dict[str, Any], *, seed: int = 0, **processor: Any) -> Toy:
    """The model of plain config data, in evaluation mode, with random weights."""
    config = ModelConfig.parse(data)
    backbone = config.backbone
    chat = chat_format(backbone.chat) if isinstance(backbone, DecoderConfig) else None
    words = tokenizer(chat.name if chat else "turns")
    layouts = {
        name: StreamLayout(
            reader=build_reader(entry.reader, Limits(), words),
            enters_sequence=entry.enters.use == "sequence",
            count_tokens=partial(config.count_tokens, name),
        )
        for name, entry in config.streams.items()
    }
    max_tokens = processor.pop("max_tokens", backbone.max_tokens if isinstance(backbone, DecoderConfig) else 1)
    torch.manual_seed(seed)
    network = MultimodalModel(config, words.size).eval()
    return Toy(config, words, Processor(words, chat, layouts, max_tokens=max_tokens, **processor), network)


def medium(modality: str, seed: int = 0, length: int = 1) -> Media:
    """A random in-memory part; ``length`` scales what may differ in length."""
    rng = np.random.default_rng(seed)
    if modality == "image":
        return Image(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
    if modality == "audio":
        return Audio(rng.uniform(-0.5, 0.5, 400 * length).astype(np.float32), rate_hz=4000)
    if modality == "video":
        return Video(rng.integers(0, 256, (3, 16, 16, 3), dtype=np.uint8), fps=2.0)
    if modality == "points":
        return Points(rng.normal(size=(40, 6)).clip(0, 1).astype(np.float32))
    return Sensor(rng.normal(size=(9 * length, 2)).astype(np.float32), rate_hz=10.0)


def asked(index: int, *modalities: str, question: str = "What is it?", answer: str = "A red cube.") -> Sample:
    """One question about media, with its answer."""
    parts = [medium(name, seed=10 * index + place, length=1 + index % 3) for place, name in enumerate(modalities)]
    return conversation(*parts, question, answer=answer, id=f"s{index}")


def mixed() -> list[Sample]:
    """Conversations over every modality, of different lengths, one of them text alone."""
    return [
        asked(0, "image", "audio", "video", "points", "sensor"),
        asked(1, "audio", question="Which sound?", answer="beep"),
        asked(2, question="Is it red?", answer="It is red, and it spins and falls."),
        asked(3, "image", "image", "sensor", question="Which one?", answer="the first"),
        asked(4, "points", "video", question="?", answer="two"),
    ]
