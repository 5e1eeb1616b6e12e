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
from polymodal.models.backbones.decoder import CausalConfig
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


def encoder_data(
    *, watched: tuple[str, ...] = (), heads: dict[str, Any] | None = None, **backbone: Any
) -> dict[str, Any]:
    """Text, image and audio in one bidirectional transformer, or some of them beside it."""
    transformer = {"width": 16, "depth": 2, "heads": 2}
    return {
        "streams": {
            name: stream(name, enters="cross_attention" if name in watched else "sequence")
            for name in ("text", "image", "audio")
        },
        "backbone": {"use": "encoder", "transformer": transformer, **backbone},
        "heads": heads or {"class": {"use": "class", "classes": ["a", "b", "c"]}},
    }


def joint_data(heads: dict[str, Any] | None = None, **backbone: Any) -> dict[str, Any]:
    """Embedded words and patches, nothing more, in one bidirectional transformer."""
    patches = {"use": "patches", "patch_size": 4, "grid": 4, "width": 16, "cls": True, "mask_token": True}
    streams = {"text": {"use": "embedding", "width": 16}, "image": patches}
    return {
        "streams": {
            name: {"modality": name, "encoder": encoder, "connector": "identity", "enters": "sequence"}
            for name, encoder in streams.items()
        },
        "backbone": {"use": "encoder", "transformer": {"width": 16, "depth": 2, "heads": 2}, **backbone},
        "heads": heads or {"words": {"use": "masked_token"}},
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

    def learn(self, samples: list[Sample], steps: int, rate: float) -> None:
        """Train on the next tokens of one packed batch."""
        batch = self.batch(samples, packed=True)
        self.network.train()
        optimizer = torch.optim.AdamW(self.network.parameters(), lr=rate)
        for _ in range(steps):
            outputs = self.network(batch)
            loss = torch.nn.functional.cross_entropy(outputs.token_logits, outputs.token_targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def tokenizer(chat: str = "turns", vocab_size: int = 300) -> Tokenizer:
    """A byte-level tokenizer with the controls of a chat format."""
    return train_bpe(TEXTS, vocab_size, chat_format(chat).controls)


def build(data: dict[str, Any], *, seed: int = 0, **processor: Any) -> Toy:
    """The model of plain config data, in evaluation mode, with random weights."""
    config = ModelConfig.parse(data)
    backbone = config.backbone
    chat = chat_format(backbone.chat) if isinstance(backbone, CausalConfig) else None
    words = tokenizer(chat.name if chat else "turns")
    if any(head.use == "masked_token" for head in config.heads.values()):
        is_framed = any(getattr(entry.reader, "add_special", False) for entry in config.streams.values())
        words = train_bpe(TEXTS, 300, (*(chat.controls if chat else ()), "<|mask|>"), framed=is_framed)
    layouts = {
        name: StreamLayout(
            reader=build_reader(entry.reader, Limits(), words),
            enters_sequence=config.has_placeholders(name),
            count_tokens=partial(config.count_placeholders, name),
            around=getattr(entry.enters, "around", None),
            view=entry.view,
        )
        for name, entry in config.streams.items()
    }
    processor.setdefault("has_source", isinstance(backbone, CausalConfig) and backbone.has_source)
    max_tokens = processor.pop("max_tokens", backbone.max_tokens if isinstance(backbone, CausalConfig) else 1)
    torch.manual_seed(seed)
    network = MultimodalModel(
        config, words.size, {name: words.controls for name, entry in config.streams.items() if entry.modality == "text"}
    ).eval()
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


def question(index: int, *modalities: str, text: str = "What is it?") -> Sample:
    """The same, still to be answered."""
    answered = asked(index, *modalities, question=text)
    return Sample(answered.id, answered.messages[:1])


def mixed() -> list[Sample]:
    """Conversations over every modality, of different lengths, one of them text alone."""
    return [
        asked(0, "image", "audio", "video", "points", "sensor"),
        asked(1, "audio", question="Which sound?", answer="beep"),
        asked(2, question="Is it red?", answer="It is red, and it spins and falls."),
        asked(3, "image", "image", "sensor", question="Which one?", answer="the first"),
        asked(4, "points", "video", question="?", answer="two"),
    ]
