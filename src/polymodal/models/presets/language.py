"""What published language models share: a decoder backbone, a next-token head, a tokenizer and a chat template.

A :class:`Language` translates the part that differs. It serves whole checkpoints (:meth:`Language.architecture`) and
language models inside of others (``text_config`` of LLaVA, BLIP-2, Flamingo), whose tensors stand below a prefix.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from polymodal.core.errors import CheckpointError, ConfigError
from polymodal.models.backbones.decoder import DecoderConfig
from polymodal.models.compose.config import ModelConfig
from polymodal.models.presets.architecture import Architecture, Size, Vocabulary
from polymodal.models.weights import HubConfigs, NameTable, Rule


@dataclass(frozen=True, slots=True)
class Language:
    """One family of language models.

    Args:
        name: of the family.
        model_types: values of ``model_type`` that it reads.
        source: paper and section.
        backbone: config -> data of a :class:`DecoderConfig`, without its chat format.
        config: (backbone, rows of the embedding) -> config data, without what all families share.
        names: (backbone, prefix) -> names of the body: ours below ``backbone.``, stored below the prefix.
        body: prefix of the body in a whole checkpoint (``model.``); a checkpoint of the bare body has none.
        kind: class of the reference library that holds body and head.
        tied: whether the head shares the embedding where the config does not say so.
        rows: rows of the embedding where the config does not say so.
        sizes: published checkpoints.
    """

    name: str
    model_types: tuple[str, ...]
    source: str
    backbone: Callable[[Mapping[str, Any]], dict[str, Any]]
    config: Callable[[DecoderConfig, int], dict[str, Any]]
    names: Callable[[DecoderConfig, str], NameTable]
    body: str
    kind: str
    tied: bool
    rows: int
    sizes: Mapping[str, Size] = field(default_factory=dict)

    def is_tied(self, config: Mapping[str, Any]) -> bool:
        """Whether the head of a checkpoint shares its embedding."""
        return bool(config.get("tie_word_embeddings", self.tied))

    def head_names(self, tied: bool, stored: str = "lm_head.weight", ours: str = "heads.text.proj.weight") -> NameTable:
        """Names of the next-token head; a shared matrix may be stored a second time, and is not read."""
        return NameTable([], ignored=(stored,)) if tied else NameTable([Rule(ours, stored)])

    def architecture(self) -> Architecture:
        """Whole checkpoints of the family."""

        def to_model(configs: HubConfigs) -> dict[str, Any]:
            config = configs.config
            rows = int(config.get("vocab_size", self.rows))
            return {
                "streams": {},
                "backbone": {**self.backbone(config), "chat": chat_of(configs), "stop_ids": stop_ids(configs)},
                "heads": {"text": {"use": "next_token", "tied": self.is_tied(config)}},
                "tokenizer": tokenizer_of(configs, rows),
            }

        def names(model: ModelConfig, stored: Collection[str]) -> NameTable:
            is_bare = bool(stored) and not any(name.startswith(self.body) for name in stored)
            body = self.names(model.backbone, "" if is_bare else self.body)
            name, head = next(iter(model.heads.items()))
            return body + self.head_names(head.tied, ours=f"heads.{name}.proj.weight")

        def to_hub(model: ModelConfig, vocabulary: Vocabulary) -> dict[str, dict[str, Any]]:
            backbone = model.backbone
            kinds = [head.use for head in model.heads.values()]
            if model.streams or not isinstance(backbone, DecoderConfig) or kinds != ["next_token"]:
                raise ConfigError(
                    f"{self.name}: found the streams {sorted(model.streams)}, the backbone {backbone.use!r} and the "
                    f"heads {kinds}, expected a decoder with a next_token head alone"
                )
            tied = next(iter(model.heads.values())).tied
            ends = tuple(
                dict.fromkeys((*([] if vocabulary.eos_id is None else [vocabulary.eos_id]), *backbone.stop_ids))
            )
            special = {
                "bos_token_id": vocabulary.bos_id,
                "eos_token_id": ends[0] if len(ends) == 1 else list(ends) or None,
                "pad_token_id": vocabulary.pad_id,
            }
            config = {
                "architectures": [self.kind],
                "model_type": self.model_types[0],
                "tie_word_embeddings": tied,
                "torch_dtype": "float32",
                **special,
                **self.config(backbone, model.tokenizer.rows or vocabulary.size),
            }
            return {"config.json": config, "generation_config.json": special}

        return Architecture(self.name, self.model_types, self.source, to_model, names, to_hub, self.sizes)


def tokenizer_of(configs: HubConfigs, rows: int, media: str | None = None) -> dict[str, Any]:
    """The tokenizer of a checkpoint: its own files; for a published size without a folder, one to be trained.

    Args:
        configs: of the checkpoint.
        rows: rows of its token embedding.
        media: its placeholder of media, if its tokenizer has one.
    """
    if configs.folder is None:
        return {"use": "bpe", "vocab_size": rows, "rows": rows}
    return {"use": "file", "path": str(configs.folder), "rows": rows, "media": media}


def chat_of(configs: HubConfigs) -> str | dict[str, Any]:
    """The checkpoint's own chat template, or ``none`` for one that was not trained to chat."""
    named = {**read_json(configs.folder, "special_tokens_map.json"), **configs.tokenizer}
    tokens = {
        key: name
        for key in ("bos_token", "eos_token", "pad_token", "unk_token")
        if (name := _content(named.get(key))) is not None
    }
    template = configs.tokenizer.get("chat_template") or _template_file(configs.folder)
    if isinstance(template, list):
        template = next((entry["template"] for entry in template if entry.get("name") == "default"), None)
    if not isinstance(template, str) or "eos_token" not in tokens:
        return "none"
    return {"template": template, "end": tokens["eos_token"], "tokens": tokens}


def _content(token: Any) -> str | None:
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) else None


def _template_file(folder: Path | None) -> str | None:
    """The template where it is a file of its own."""
    if folder is None:
        return None
    if (folder / "chat_template.jinja").is_file():
        try:
            return (folder / "chat_template.jinja").read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{folder}/chat_template.jinja: cannot be read: {error}") from None
    return _content(read_json(folder, "chat_template.json").get("chat_template"))


def read_json(folder: Path | None, name: str) -> dict[str, Any]:
    """A JSON file of a checkpoint's folder; {} where there is none.

    Raises:
        CheckpointError: if it is damaged.
    """
    if folder is None or not (folder / name).is_file():
        return {}
    try:
        data = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / name}: is not readable JSON: {error}") from None
    return data if isinstance(data, dict) else {}


def stop_ids(configs: HubConfigs) -> list[int]:
    """Ids that end an answer: of ``generation_config.json``, or else of ``config.json``."""
    ends = configs.generation.get("eos_token_id", configs.config.get("eos_token_id"))
    ends = ends if isinstance(ends, list) else [ends]
    return [int(id) for id in ends if isinstance(id, int) and id >= 0]
