"""BEiT-3 (``model_type: beit3``): patches and words in one multiway transformer.

No library publishes configs for it: this is the format that we read and write, with the tensor names of the published
code (``torchscale``). That code routes the attention's projections as well and has no joint experts, against the
paper's figure 2; ``joint_layers`` and ``routed_attention`` give either.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from polymodal.core.errors import ConfigError
from polymodal.models.backbones.encoder import EncoderBackboneConfig
from polymodal.models.compose.config import ModelConfig
from polymodal.models.encoders.embedding import EmbeddingConfig
from polymodal.models.encoders.patches import PatchesConfig
from polymodal.models.heads.table import ProjectionConfig
from polymodal.models.presets.architecture import Architecture, Size, Vocabulary
from polymodal.models.presets.clip import from_log_scale, text_reader
from polymodal.models.presets.rows import After, word_rows
from polymodal.models.weights import HubConfigs, NameTable, Reshape, Rule

_DEFAULTS: dict[str, Any] = {
    "image_size": 224,
    "patch_size": 16,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "mlp_ratio": 4,
    "vocab_size": 64010,
    "max_source_positions": 1024,
    "layer_norm_eps": 1e-5,
    "routed_attention": True,
    "sub_norm": True,
    "joint_layers": 0,
    "task": "encoder",
}
_UNREAD = 2
"""Position rows that the published code never reads."""
_TASK_HEADS = (
    *("{q}_head.weight", "{q}_head.bias", "logit_scale"),
    *("head.{rest}", "fc_norm.{p}", "pooler.{rest}"),
)
"""What fine-tuned files hold beside the encoder; as ``task: encoder`` they are read for that alone."""
_EXPERTS = {"vision": "A", "language": "B"}


def to_model(configs: HubConfigs) -> dict[str, Any]:
    """Image and text stream in a multiway backbone; for retrieval, both in one space, each alone in the backbone."""
    given = {**_DEFAULTS, **configs.config}
    if given["task"] not in ("encoder", "retrieval", "pretraining"):
        raise ConfigError(f"beit3: found task {given['task']!r}, expected encoder, retrieval or pretraining")
    width, patch = given["hidden_size"], given["patch_size"]
    grid = given["image_size"] // patch
    image = {"use": "patches", "width": width, "patch_size": patch, "grid": grid, "cls": True, "mask_token": True}
    text = {
        "use": "embedding",
        "width": width,
        "vocab_size": given["vocab_size"],
        "max_tokens": given["max_source_positions"] - _UNREAD,
    }
    reader = text_reader(configs, 64)
    entry = {"connector": "identity", "enters": "sequence"}
    transformer = {
        "width": width,
        "depth": given["num_hidden_layers"],
        "heads": given["num_attention_heads"],
        "mlp_dim": int(width * given["mlp_ratio"]),
        "norm_eps": given["layer_norm_eps"],
    }
    multiway = {
        "experts": {"image": "vision", "text": "language"},
        "joint_layers": given["joint_layers"],
        "routed_attention": given["routed_attention"],
        "sub_norm": given["sub_norm"],
    }
    model = {
        "streams": {
            "image": {"modality": "image", "encoder": image, **entry},
            "text": {"modality": "text", "encoder": text, "reader": reader, **entry},
        },
        "backbone": {
            "use": "encoder", "cls": False, "token_types": False, "transformer": transformer, "multiway": multiway,
        },
        "heads": _heads(given),
    }  # fmt: skip
    return model if "tokenizer" in reader else {**model, "tokenizer": {"use": "bpe", "rows": given["vocab_size"]}}


def _heads(given: dict[str, Any]) -> dict[str, Any]:
    if given["task"] == "retrieval":
        space = {"use": "projection", "dim": given["hidden_size"], "through": ["image", "text"], "bias": None}
        return {"space": {**space, "streams": ["image", "text"], "temperature": from_log_scale(2.6592)}}
    if given["task"] == "pretraining":
        plain = {"use": "masked_token", "transform": False, "tied": False}
        return {"words": plain, "pixels": {**plain, "stream": "image", "predicts": "pixels"}}
    return {}


def names(model: ModelConfig, stored: Collection[str]) -> NameTable:
    """Names of the published code."""
    image, _ = _parts(model)
    width, patch = image.width, image.patch_size
    pixels, words, stack = "streams.image.encoder.", "streams.text.encoder.", "backbone.transformer."
    hub = "beit3.encoder."
    rules = [
        Rule(
            pixels + "patch_embed.weight",
            "beit3.vision_embed.proj.weight",
            Reshape((width, -1), (width, 3, patch, patch)),
        ),
        Rule(pixels + "patch_embed.bias", "beit3.vision_embed.proj.bias"),
        Rule(pixels + "cls_token", "beit3.vision_embed.cls_token", Reshape((-1,), (1, 1, -1))),
        Rule(pixels + "mask_token", "beit3.vision_embed.mask_token", Reshape((-1,), (1, 1, -1))),
        Rule(pixels + "positions.weight", hub + "embed_positions.A.weight", After(_UNREAD)),
        Rule(words + "positions.weight", hub + "embed_positions.B.weight", After(_UNREAD)),
        Rule(words + "token_embed.{p}", "beit3.text_embed.{p}"),
        Rule("heads.space.projs.image.{p}", "vision_head.{p}"),
        Rule("heads.space.projs.text.{p}", "language_head.{p}"),
        Rule("heads.space.log_scale", "logit_scale"),
        Rule("heads.words.proj.{p}", "mlm_head.{p}"),
        Rule("heads.pixels.proj.{p}", "mim_head.{p}"),
    ]
    for expert, letter in _EXPERTS.items():
        block, layer = stack + "blocks.{i}.", hub + "layers.{i}."
        own = {
            "attention_norm": "self_attn_layer_norm",
            **{f"{part}_proj": f"self_attn.{part}_proj" for part in ("q", "k", "v", "out")},
            "sub_norm": "self_attn.inner_attn_ln",
            "mlp_norm": "final_layer_norm",
        }
        rules += [
            Rule(f"{block}{ours}.experts.{expert}.{{p}}", f"{layer}{theirs}.{letter}.{{p}}")
            for ours, theirs in own.items()
        ]
        mlp = {"up_proj": "fc1", "sub_norm": "ffn_layernorm", "down_proj": "fc2"}
        rules += [
            Rule(f"{block}mlp.experts.{expert}.{ours}.{{p}}", f"{layer}ffn.{letter}.{theirs}.{{p}}")
            for ours, theirs in mlp.items()
        ]
        rules.append(Rule(f"{stack}final_norm.experts.{expert}.{{p}}", f"{hub}layer_norm.{letter}.{{p}}"))
    # What the published code has no name for (shared projections, joint experts) keeps ours.
    rules.append(Rule(stack + "{rest}", "beit3.multiway.{rest}"))
    return NameTable(rules, unused=() if model.heads else _TASK_HEADS)


def to_hub(model: ModelConfig, vocabulary: Vocabulary) -> dict[str, dict[str, Any]]:
    """``config.json``."""
    image, text = _parts(model)
    stack, multiway = model.backbone.transformer, model.backbone.multiway
    task = {(): "encoder", ("space",): "retrieval", ("pixels", "words"): "pretraining"}[tuple(sorted(model.heads))]
    config = {
        "model_type": "beit3",
        "image_size": image.grid * image.patch_size,
        "patch_size": image.patch_size,
        "hidden_size": image.width,
        "num_hidden_layers": stack.depth,
        "num_attention_heads": stack.heads,
        "mlp_ratio": (stack.mlp_dim or 4 * stack.width) / stack.width,
        "vocab_size": word_rows(model, vocabulary),
        "max_source_positions": text.max_tokens + _UNREAD,
        "layer_norm_eps": stack.norm_eps,
        "routed_attention": multiway.routed_attention,
        "sub_norm": multiway.sub_norm,
        "joint_layers": multiway.joint_layers,
        "task": task,
    }
    return {"config.json": config}


def _parts(model: ModelConfig) -> tuple[PatchesConfig, EmbeddingConfig]:
    encoders = {name: stream.encoder for name, stream in model.streams.items()}
    image, text = encoders.get("image"), encoders.get("text")
    backbone = model.backbone
    fits = isinstance(backbone, EncoderBackboneConfig) and backbone.multiway is not None and len(encoders) == 2
    heads = tuple(sorted(model.heads))
    spaces = all(name != "space" or isinstance(head, ProjectionConfig) for name, head in model.heads.items())
    known = heads in ((), ("space",), ("pixels", "words")) and spaces
    if not (fits and known and isinstance(image, PatchesConfig) and isinstance(text, EmbeddingConfig)):
        raise ConfigError(
            "beit3: found a model of other parts, expected an image stream with the encoder 'patches', a text "
            "stream with 'embedding' in a multiway backbone 'encoder', and the heads of one of its tasks"
        )
    return image, text


_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
_PAPER = {"routed_attention": False, "joint_layers": 3, "task": "pretraining"}


def _size(parameters: int, **config: Any) -> Size:
    return Size({"model_type": "beit3", **config}, parameters)


BEIT3 = Architecture(
    "beit3",
    ("beit3",),
    "BEiT-3, arXiv 2208.10442, section 2.1",
    to_model=to_model,
    names=names,
    to_hub=to_hub,
    # The read-me of the published code says 222M (base) and 675M (large): with the two projections of retrieval. Its
    # tables hold four position rows more, which nothing reads.
    sizes={
        "beit3-base-patch16-224": _size(220_984_320),
        "beit3-base-patch16-224-itc": _size(222_163_969, task="retrieval"),
        "beit3-large-patch16-224": _size(672_698_368, **_LARGE),
        "beit3-large-patch16-224-itc": _size(674_795_521, task="retrieval", **_LARGE),
        "beit3-base-as-in-the-paper": _size(256_626_698, **_PAPER),
    },
)
"""See the module."""
