"""Every family of language models, for checkpoints that hold one inside (``text_config``)."""

from __future__ import annotations

from polymodal.core.config import unknown
from polymodal.core.errors import ConfigError
from polymodal.models.presets.gpt2 import GPT2
from polymodal.models.presets.language import Language
from polymodal.models.presets.llama import LLAMA, MISTRAL
from polymodal.models.presets.opt import OPT
from polymodal.models.presets.qwen import QWEN2, QWEN3

LANGUAGES: dict[str, Language] = {
    kind: language for language in (LLAMA, MISTRAL, QWEN2, QWEN3, GPT2, OPT) for kind in language.model_types
}
"""Families by ``model_type``."""


def find_language(model_type: str, where: str) -> Language:
    """The family of a ``model_type``.

    Raises:
        ConfigError: if there is none.
    """
    if model_type not in LANGUAGES:
        raise ConfigError(f"{where}: {unknown('model_type of a language model', model_type, LANGUAGES)}")
    return LANGUAGES[model_type]
