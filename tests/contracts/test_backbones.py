"""What every backbone promises, over every entry of the table, inside a composed model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from toys import Toy, asked, build, decoder_data, encoder_data, medium, merge_data, stream

from polymodal.core.parts import Text
from polymodal.core.samples import Sample
from polymodal.models.backbones.table import BACKBONES
from polymodal.models.compose import ModelConfig

CASES: list[tuple[str, dict[str, Any]]] = [
    ("decoder", {}),
    ("decoder", {"positions": "learned"}),
    ("decoder", {"transformer": {"width": 16, "depth": 1, "heads": 2, "pre_norm": False, "qk_norm": True}}),
    ("decoder", {"enters": {"use": "cross_attention"}}),
    ("encoder_decoder", {}),
    ("encoder_decoder", {"positions": "learned", "embed_norm_eps": 1e-5, "shared": False}),
    ("encoder_decoder", {"enters": {"use": "cross_attention"}}),
    ("transformers", {}),
    ("merge", {}),
    ("merge", {"take": "tokens", "missing": "learned"}),
    ("latent", {}),
    ("latent", {"repeats": 2, "cross_residual": False, "cross_width": "latents"}),
    ("none", {}),
    ("encoder", {}),
    (
        "encoder",
        {"cls": False, "token_types": False, "multiway": {"experts": {"text": "l", "image": "v", "audio": "v"}}},
    ),
    ("encoder", {"order": ["audio", "image", "text"], "input_norm": True, "pooler": True}),
    ("encoder", {"watched": ["image"], "transformer": {"width": 16, "depth": 2, "heads": 2, "pre_norm": False}}),
]
cases = pytest.mark.parametrize("case", CASES, ids=str)


CAUSAL = ("decoder", "transformers", "encoder_decoder")


def causal_data(use: str, enters: Any = "sequence", **backbone: Any) -> dict[str, Any]:
    """All five media in a decoder or an encoder-decoder, however they enter."""
    data = decoder_data(**backbone)
    for entry in data["streams"].values():
        entry["enters"] = enters
    if enters != "sequence":
        for entry in data["streams"].values():
            entry["connector"] = "linear"
    if use == "transformers":
        sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
        ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
        config = {"model_type": "olmo2", **sizes, **ids, "vocab_size": 300, "tie_word_embeddings": True}
        data["backbone"] = {"use": use, "config": config, "max_tokens": 256}
    if use == "encoder_decoder":
        stack = {"width": 24, "depth": 2, "heads": 4, "norm": "rms", "bias": False}
        if backbone.get("positions") != "learned":
            stack |= {"relative_buckets": 8, "relative_distance": 16, "attention_scale": 1.0}
        sizes = {"use": use, "max_tokens": 256, "encoder": stack, "decoder": stack}
        data["backbone"] = {**sizes, **backbone}
    return data


def toy_of(case: tuple[str, dict[str, Any]], seed: int = 0) -> tuple[Toy, list[Sample]]:
    use, changes = case
    if use in CAUSAL:
        samples = [asked(0, "image", "audio", "video", "points", "sensor"), asked(1), asked(2, "image")]
        return build(causal_data(use, **changes), seed=seed), samples
    views = [
        Sample("a", views={"image": medium("image", 0), "text": Text("a red cube"), "audio": medium("audio", 0)}),
        Sample("b", views={"audio": medium("audio", 1)}),
        Sample("c", views={"text": Text("blue"), "image": medium("image", 2)}),
    ]
    if use == "encoder":
        return build(encoder_data(**changes), seed=seed), views
    if use == "latent":
        names = ("text", "image", "audio")
        data = {
            "streams": {name: stream(name, enters="latent", connector="linear") for name in names},
            "backbone": {"use": "latent", "latents": 4, "width": 16, "input_width": 12, "depth": 1, **changes},
            "heads": {"class": {"use": "class", "classes": ["a", "b"], "query_heads": 2}},
        }
        return build(data, seed=seed), views
    if use == "merge":
        return build(merge_data(**changes), seed=seed), views
    data = {
        "streams": {name: stream(name, enters="none") for name in ("text", "image", "audio")},
        "backbone": "none",
        "heads": {"space": {"use": "projection", "dim": 8}},
    }
    return build(data, seed=seed), views


def result(toy: Toy, samples: list[Sample]) -> list[torch.Tensor]:
    """Per sample, everything that the model says of it, in one vector."""
    use = toy.config.backbone.use
    outputs = toy.network(
        toy.batch(samples), ({**dict.fromkeys(CAUSAL, "sequence"), "none": "embed"}.get(use, "merge"),)
    )
    if use in ("merge", "encoder", "latent"):
        return list(outputs.merged)
    if use in CAUSAL:
        return [outputs.token_logits[outputs.token_samples == row].flatten() for row in range(len(samples))]
    return [
        torch.cat([vectors[owners == row].flatten() for _, (vectors, owners) in sorted(outputs.embeddings.items())])
        for row in range(len(samples))
    ]


def test_every_backbone_of_the_table_is_here() -> None:
    assert {use for use, _ in CASES} == set(BACKBONES)


@cases
def test_neighbours_and_order_do_not_matter(case: tuple[str, dict[str, Any]]) -> None:
    toy, samples = toy_of(case)
    with torch.no_grad():
        together = result(toy, samples)
        backwards = result(toy, samples[::-1])[::-1]
        for row, sample in enumerate(samples):
            torch.testing.assert_close(result(toy, [sample])[0], together[row], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(backwards[row], together[row], rtol=1e-5, atol=1e-5)


@cases
def test_every_trainable_parameter_learns_and_no_frozen_one(case: tuple[str, dict[str, Any]]) -> None:
    toy, samples = toy_of(case)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(value.shape, generator=generator) for value in result(toy, samples)]

    def backward() -> None:
        sum((value * w).sum() for value, w in zip(result(toy, samples), weights, strict=True)).backward()

    backward()
    # Class head and temperature are read by other passes; a key's bias has a true gradient of zero.
    unread = ("heads.class", "heads.space.log_scale", "heads.space.bias")
    for name, parameter in toy.network.named_parameters():
        if name.startswith(unread):
            continue
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0 or ("k_proj" in name and name.endswith("bias")), name
    toy.network.zero_grad(set_to_none=True)
    frozen = [p for name, p in toy.network.named_parameters() if name.startswith("streams")]
    for parameter in frozen:
        parameter.requires_grad_(False)
    backward()
    assert all(parameter.grad is None for parameter in frozen)


@cases
def test_config_and_weights_go_out_and_come_back(case: tuple[str, dict[str, Any]]) -> None:
    (toy, samples), (other, _) = toy_of(case), toy_of(case, seed=9)
    assert ModelConfig.parse(toy.config.to_data()) == toy.config
    other.network.load_state_dict(toy.network.state_dict())
    for found, expected in zip(result(other, samples), result(toy, samples), strict=True):
        assert torch.equal(found, expected)
