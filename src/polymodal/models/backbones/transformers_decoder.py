"""Any causal language model of the ``transformers`` library as a backbone, whole: its body and its own head.

Shape legend: ``B`` rows, ``T`` tokens, ``D`` width of the embeddings, ``S`` width of the states, ``V`` vocabulary,
``L`` length of the longest row.
"""

from __future__ import annotations

import copy
import inspect
import os
from typing import Any, Literal

import torch
from pydantic import PositiveInt, model_validator
from torch import Tensor, nn

from polymodal.core.errors import CheckpointError, ConfigError
from polymodal.models.backbones.decoder import CausalBackbone, CausalConfig
from polymodal.models.backbones.transformers_cache import Cache, LibraryCache, ReplayCache
from polymodal.models.layers.cache import KVCache
from polymodal.models.layers.layout import Layout
from polymodal.models.layers.memory import Memory
from polymodal.models.transformers_library import (
    from_config,
    library,
    library_config,
    linear_for_conv1d,
    loaded_part,
    set_checkpointing,
)

_LONGEST = 4096
"""``max_tokens`` of an architecture whose config names no longest sequence."""
_PROOF_TOLERANCE = 1e-4
"""Largest difference, relative to the largest logit, between the split and the whole model."""


class TransformersDecoderConfig(CausalConfig):
    """A causal language model of the library, computed by the library.

    In a recipe, ``from: FOLDER`` fills in ``config`` and takes the weights from there. Embeddings of media tokens go
    the way that the model's own embeddings go (Granite multiplies both). The model's head is kept whole, with the
    logit scaling of Cohere and Granite, the soft-capping of Gemma 2, and the ties of GPT-2 and OPT.
    """

    use: Literal["transformers"] = "transformers"
    config: dict[str, Any]
    """What ``config.json`` holds."""
    embedding_width: PositiveInt
    """Width of the token embeddings; read off the model where it is not given."""
    rows: PositiveInt
    """Token embeddings that the checkpoint has; read off the model where it is not given."""
    replays: bool
    """Whether earlier tokens are computed anew for each new one, because the architecture keeps no keys and values
    that could be cut (recurrent ones); read off the model where it is not given."""

    @model_validator(mode="before")
    @classmethod
    def _probe(cls, data: Any) -> Any:
        """Fill in what the model itself says, from a build without memory."""
        facts = ("embedding_width", "rows", "replays")
        if not isinstance(data, dict) or not isinstance(data.get("config"), dict) or all(f in data for f in facts):
            return data
        config = library_config(data["config"])
        with torch.device("meta"):
            model: Any = from_config(library().AutoModelForCausalLM, config)
        embedding = model.get_input_embeddings()
        longest = getattr(config.get_text_config(), "max_position_embeddings", None) or _LONGEST
        found = {
            "embedding_width": embedding.embedding_dim,
            "rows": embedding.num_embeddings,
            "replays": _replays(model),
            "max_tokens": longest,
        }
        return {**found, **data}

    @property
    def width(self) -> int:
        """See :attr:`CausalConfig.width`."""
        return self.embedding_width

    def build(self, vocab_size: int) -> TransformersDecoder:
        """The module; a tokenizer with more ids than the checkpoint gets new embedding rows, their mean at first."""
        return TransformersDecoder(self, vocab_size)


class TransformersDecoder(CausalBackbone):
    """See :class:`TransformersDecoderConfig`."""

    def __init__(self, config: TransformersDecoderConfig, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = max(vocab_size, config.rows)
        self._take(from_config(library().AutoModelForCausalLM, library_config(config.config)))

    def _take(self, model: Any) -> None:
        if model.get_input_embeddings().num_embeddings < self.vocab_size:
            model.resize_token_embeddings(self.vocab_size, mean_resizing=False)
        self.model: Any = linear_for_conv1d(model)
        self.body = [_body(self.model)]
        self._view = [_head_view(self.model, self.body[0])]
        self._knows_positions = "position_ids" in inspect.signature(self.body[0].forward).parameters

    @property
    def own_head(self) -> nn.Module:
        """The model's own head."""
        return OwnHead(self)

    @property
    def embed_tokens(self) -> nn.Module:
        """The token embedding."""
        embedding: nn.Module = self.model.get_input_embeddings()
        return embedding

    @property
    def checkpointing(self) -> bool:
        """Whether blocks are computed anew in the backward pass."""
        return bool(self.model.is_activation_checkpointing)

    @checkpointing.setter
    def checkpointing(self, is_on: bool) -> None:
        set_checkpointing(self.model, is_on)

    def load_folder(self, folder: str | os.PathLike[str]) -> None:
        """Take the weights of a checkpoint folder, and prove that body and head together are the whole model.

        Raises:
            CheckpointError: if the folder does not hold them, or the proof fails.
        """
        config = library_config(self.config.config)

        def loader() -> Any:
            auto = library().AutoModelForCausalLM
            model, info = auto.from_pretrained(
                folder, config=config, dtype=torch.float32, output_loading_info=True, local_files_only=True
            )
            return model, info["missing_keys"]

        device = next(self.parameters()).device
        model = loaded_part(loader, str(folder))
        self._take(model.to(device) if device.type != "meta" else model)
        self._prove(str(folder))

    @torch.no_grad()
    def _prove(self, where: str) -> None:
        ids_BT = torch.arange(3, device=next(self.parameters()).device)[None] % self.config.rows
        was_training = self.training
        self.eval()
        whole = self.model(input_ids=ids_BT, use_cache=False).logits
        ours = self.logits(self(self.embed(ids_BT), Layout(causal=True)))
        self.train(was_training)
        difference = float((whole - ours).abs().max() / whole.abs().max().clamp(min=1e-12))
        if not difference <= _PROOF_TOLERANCE:
            raise CheckpointError(
                f"{where}: body and head of this {self.config.config.get('model_type')} do not give the logits of the "
                f"whole model (relative difference {difference:.2g}, expected at most {_PROOF_TOLERANCE:g}); the "
                "adapter does not know how this architecture is put together"
            )

    def embed(self, ids_BT: Tensor) -> Tensor:
        """See :meth:`CausalBackbone.embed`."""
        x_BTD: Tensor = self.embed_tokens(ids_BT)
        return x_BTD

    def logits(self, states: Tensor) -> Tensor:
        """Vocabulary logits ``[..., V]`` of states ``[..., S]``, computed by the library's own head."""
        flat = states.reshape(1, -1, states.shape[-1])
        out: Tensor = self._view[0](inputs_embeds=flat, use_cache=False, return_dict=True).logits
        return out.reshape(*states.shape[:-1], -1)

    def forward(
        self, x_BTD: Tensor, layout: Layout, cache: KVCache | None = None, memory: Memory | None = None
    ) -> Tensor:
        """See :meth:`CausalBackbone.forward`; padding must stand at the ends of rows, where no token looks."""
        layout.check(*x_BTD.shape[:2])
        if memory is not None:
            raise ConfigError("found a memory, expected none: this backbone has no cross-attention")
        if not layout.causal:
            raise ConfigError("found a bidirectional layout, expected a causal one: this backbone reads left to right")
        valid = layout.is_valid_BT
        if valid is not None and not bool((valid[:, 1:] <= valid[:, :-1]).all()):
            raise ConfigError("found padding before or between tokens, expected it at the end of rows only")
        if cache is not None:
            assert isinstance(cache, Cache)
            return cache.read(self.run, x_BTD, valid)
        if layout.segment_lengths is not None:
            return self._packed(x_BTD, layout)
        return self.run(x_BTD)

    def _packed(self, x_BTD: Tensor, layout: Layout) -> Tensor:
        """Segments as rows of their own, neighbours of similar length in one call: nothing can leak."""
        shapes, index, inverse = layout.buckets
        row = x_BTD[0] if index is None else x_BTD[0].index_select(0, index.to(x_BTD.device))
        parts = torch.split(row, [count * length for count, length in shapes])
        states = [self.run(part.view(*shape, -1)).flatten(0, 1) for part, shape in zip(parts, shapes, strict=True)]
        joined = torch.cat(states)
        if inverse is not None:
            joined = joined.index_select(0, inverse.to(joined.device))
        return joined[None]

    def run(self, x_BTD: Tensor, **options: Any) -> Tensor:
        """The library's body over embedded rows; without a mask, as no token looks to the right."""
        if not self._knows_positions:
            options.pop("position_ids", None)
        options.setdefault("use_cache", False)
        states: Tensor = self.body[0](inputs_embeds=x_BTD, return_dict=True, **options).last_hidden_state
        return states

    def new_cache(self, rows: int, max_tokens: int) -> KVCache:
        """See :meth:`CausalBackbone.new_cache`; around the library's own, or one that reads everything again."""
        kind = ReplayCache if self.config.replays else LibraryCache
        return kind(rows, max_tokens, next(self.parameters()).device)


class OwnHead(nn.Module):
    """States -> logits by the head of a library model; its parameters stay the backbone's."""

    def __init__(self, backbone: TransformersDecoder) -> None:
        super().__init__()
        # In a list, so that the backbone does not become a part of the head as well.
        self._backbone = [backbone]

    def forward(self, states: Tensor) -> Tensor:
        """Logits ``[..., V]``."""
        return self._backbone[0].logits(states)


class _Given(nn.Module):
    """Stands in for a body: gives back what it is given."""

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> _Passed:
        return _Passed(inputs_embeds)


class _Passed:
    """A body's output that has states and nothing else, whatever a head asks it for."""

    def __init__(self, states: Tensor) -> None:
        self.last_hidden_state = states

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state,)[index]


def _body(model: Any) -> Any:
    """The part between embedding and head."""
    body = model.get_decoder()
    if body is model:
        body = model.base_model
    if body is model:
        raise ConfigError(
            f"config: {model.config.model_type} has no body apart from its head, expected a causal language model"
        )
    return body


def _head_view(model: Any, body: nn.Module) -> Any:
    """The same model, sharing every tensor, with the body replaced by what it gave: the head's own code runs on it."""
    path = next(name for name, module in model.named_modules() if module is body)
    view = twin = copy.copy(model)
    *parents, last = path.split(".")
    for name in parents:
        twin._modules = {**twin._modules, name: copy.copy(twin._modules[name])}
        twin = twin._modules[name]
    twin._modules = {**twin._modules, last: _Given()}
    return view


def _replays(model: Any) -> bool:
    """Whether the architecture lacks a cache that consists of keys and values alone."""
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    is_attention = all(kind.endswith("attention") and "linear" not in kind for kind in kinds)
    takes_cache = "past_key_values" in inspect.signature(_body(model).forward).parameters
    return bool(getattr(model, "_is_stateful", False)) or not is_attention or not takes_cache
