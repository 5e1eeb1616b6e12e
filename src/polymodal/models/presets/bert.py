"""BERT checkpoints (``model_type: bert``) as a text stream, with the masked-language head where there is one."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from polymodal.core.errors import ConfigError
from polymodal.models.compose.config import ModelConfig
from polymodal.models.encoders.text_transformer import TextTransformerConfig
from polymodal.models.heads.masked_token import MaskedTokenConfig
from polymodal.models.presets.architecture import Architecture, Size, Vocabulary, require
from polymodal.models.presets.blocks import block_rules
from polymodal.models.presets.stacks import stack_config, stack_fields
from polymodal.models.weights import HubConfigs, NameTable, Rule

_MASKED, _PRETRAINING = "BertForMaskedLM", "BertForPreTraining"
_DEFAULTS = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
}
_PARTS = {
    "attention.q_proj": "attention.self.query",
    "attention.k_proj": "attention.self.key",
    "attention.v_proj": "attention.self.value",
    "attention.out_proj": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "mlp.up_proj": "intermediate.dense",
    "mlp.down_proj": "output.dense",
    "mlp_norm": "output.LayerNorm",
}


def bert_encoder(config: Mapping[str, Any], *, pooler: bool) -> dict[str, Any]:
    """Data of a ``text_transformer`` that is this BERT.

    Args:
        config: ``config.json`` or ``text_config``.
        pooler: whether the state of [CLS] goes through the pooler.
    """
    require(config, "bert", position_embedding_type="absolute", is_decoder=False, add_cross_attention=False)
    value = {**_DEFAULTS, **config}
    return {
        "use": "text_transformer",
        "vocab_size": value["vocab_size"],
        "max_tokens": value["max_position_embeddings"],
        **stack_fields(value, "bert"),
        "pre_norm": False,
        "embed_norm": True,
        "segments": value["type_vocab_size"],
        "pool": "first",
        "pooled_proj": value["hidden_size"] if pooler else None,
        "pooled_tanh": pooler,
    }


def bert_names(ours: str, stored: str) -> NameTable:
    """Names of the encoder.

    Args:
        ours: path of our text encoder with a dot at its end.
        stored: prefix of the stored names.
    """
    return NameTable(
        [
            Rule(ours + "token_embed.weight", stored + "embeddings.word_embeddings.weight"),
            Rule(ours + "positions.weight", stored + "embeddings.position_embeddings.weight"),
            Rule(ours + "segments.weight", stored + "embeddings.token_type_embeddings.weight"),
            Rule(ours + "embed_norm.{p}", stored + "embeddings.LayerNorm.{p}"),
            Rule(ours + "pooled_proj.{p}", stored + "pooler.dense.{p}"),
            *block_rules(ours + "transformer.blocks", stored + "encoder.layer", _PARTS),
        ],
        ignored=(stored + "embeddings.position_ids",),
    )


def _head_names(ours: str) -> NameTable:
    return NameTable(
        [
            Rule(ours + "dense.{p}", "cls.predictions.transform.dense.{p}"),
            Rule(ours + "norm.{p}", "cls.predictions.transform.LayerNorm.{p}"),
            Rule(ours + "proj.bias", "cls.predictions.bias"),
        ],
        # The matrix is the embedding, the bias the one above; both may be stored again.
        ignored=("cls.predictions.decoder.{p}", "cls.seq_relationship.{p}"),
    )


def to_model(configs: HubConfigs) -> dict[str, Any]:
    """A text stream without a backbone: features, and the pooled vector of [CLS]."""
    config = configs.config
    known = ("BertModel", _MASKED, _PRETRAINING)
    kind = configs.classes[0] if configs.classes else "BertModel"
    if kind not in known:
        raise ConfigError(f"bert: found the class {kind}, expected one of {', '.join(known)}")
    encoder = bert_encoder(config, pooler=kind != _MASKED)
    reader: dict[str, Any] = {"use": "text", "max_tokens": encoder["max_tokens"], "add_special": True}
    tokenizer: dict[str, Any] = {}
    if configs.folder is None:
        tokenizer = {"vocab_size": encoder["vocab_size"], "rows": encoder["vocab_size"]}
    else:
        reader["tokenizer"] = str(configs.folder)
    head = {
        "use": "masked_token",
        "stream": "text",
        "at": "encoder",
        "activation": encoder["activation"],
        "norm_eps": encoder["norm_eps"],
        "tied": bool(config.get("tie_word_embeddings", True)),
    }
    return {
        "streams": {"text": {"modality": "text", "encoder": encoder, "reader": reader}},
        "backbone": "none",
        "heads": {} if kind == "BertModel" else {"masked": head},
        "tokenizer": tokenizer,
    }


def names(model: ModelConfig, stored: Collection[str]) -> NameTable:
    """Names of ``BertModel``; of classes with a head where there is one, or where stored names say so."""
    wraps = any(name.startswith("bert.") for name in stored) if stored else bool(model.heads)
    prefix = "bert." if wraps else ""
    table = bert_names("streams.text.encoder.", prefix)
    for name, head in model.heads.items():
        table = table + _head_names(f"heads.{name}.")
        if not getattr(head, "tied", True):
            table = NameTable([Rule(f"heads.{name}.proj.weight", "cls.predictions.decoder.weight")]) + table
    encoder = model.streams["text"].encoder
    if getattr(encoder, "pooled_proj", None) is None:
        table = table + NameTable([], ignored=(prefix + "pooler.dense.{p}",))
    if not model.heads:
        table = table + NameTable([], ignored=("cls.{rest}",))
    if any(name.endswith("LayerNorm.gamma") for name in stored):
        return _old_norms(table)
    return table


def _old_norms(table: NameTable) -> NameTable:
    """The names of the first checkpoints, whose norms hold ``gamma`` and ``beta``."""
    rules = []
    for rule in table.rules:
        if rule.hub.endswith("LayerNorm.{p}"):
            for ours, theirs in (("weight", "gamma"), ("bias", "beta")):
                rules.append(Rule(rule.ours.replace("{p}", ours), rule.hub.replace("{p}", theirs), rule.change))
        else:
            rules.append(rule)
    return NameTable(rules, table.ignored, table.optional)


def to_hub(model: ModelConfig, vocabulary: Vocabulary) -> dict[str, dict[str, Any]]:
    """``config.json`` of the class that holds this encoder and head."""
    encoder = model.streams["text"].encoder if set(model.streams) == {"text"} else None
    heads = list(model.heads.values())
    if not isinstance(encoder, TextTransformerConfig) or encoder.pre_norm or len(heads) > 1:
        raise ConfigError(
            f"bert: found the streams {sorted(model.streams)} and the heads {sorted(model.heads)}, expected one text "
            "stream with the encoder 'text_transformer', norms last, and at most a masked_token head"
        )
    if heads and not isinstance(heads[0], MaskedTokenConfig):
        raise ConfigError(f"bert: found a head {heads[0].use!r}, expected masked_token or none")
    kind = "BertModel"
    if heads:
        kind = _MASKED if encoder.pooled_proj is None else _PRETRAINING
    config = {
        "model_type": "bert",
        "architectures": [kind],
        "vocab_size": encoder.vocab_size,
        **stack_config(encoder),
        "max_position_embeddings": encoder.max_tokens,
        "type_vocab_size": encoder.segments,
        "tie_word_embeddings": heads[0].tied if heads else True,
        "pad_token_id": vocabulary.pad_id or 0,
    }
    return {"config.json": config}


def _size(width: int, depth: int, heads: int, parameters: int) -> Size:
    own = {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
    }
    return Size({"model_type": "bert", **_DEFAULTS, **own}, parameters)


BERT = Architecture(
    "bert",
    ("bert",),
    "BERT, arXiv 1810.04805, section 3",
    to_model=to_model,
    names=names,
    to_hub=to_hub,
    sizes={"bert-base": _size(768, 12, 12, 109_482_240), "bert-large": _size(1024, 24, 16, 335_141_888)},
)
"""See the module."""
