"""Weights in fewer bits: how many bytes they take, and how far the outputs move."""

from __future__ import annotations

import builtins

import pytest
import torch
import toys
from torch import nn

from polymodal.core.errors import ConfigError, MissingExtraError
from polymodal.core.samples import Sample
from polymodal.inference.engine import Engine
from polymodal.inference.quantised import Int4Linear, num_bytes, quantise
from polymodal.inference.sampling import Sampling
from polymodal.models.adapters import ADAPTERS, adapter_parameters, apply_adapter, merge_adapters
from polymodal.models.compose import to_device

WIDE = {"width": 128, "depth": 2, "heads": 4, "norm": "rms", "activation": "silu", "gated": True, "mlp_dim": 256}
NEEDED = {"int8": 0.27, "int4": 0.18, "bf16": 0.51}
"""Bytes of a layer's weight, of what they were in float32, at most."""
ERRORS = {"int8": 0.02, "int4": 0.25, "bf16": 0.03}
"""Root mean square difference of the logits over that of the logits, at most; random weights are the hardest."""


def built(tied: bool = True) -> toys.Toy:
    data = toys.decoder_data(tied=tied)
    data["backbone"]["transformer"] = WIDE
    return toys.build(data)


def logits(toy: toys.Toy) -> torch.Tensor:
    with torch.no_grad():
        return toy.network(toy.batch(toys.mixed(), packed=True)).token_logits.float()


@pytest.mark.parametrize("weights", ["bf16", "int8", "int4"])
def test_memory_and_error(weights):
    if weights != "bf16":
        pytest.importorskip("torchao")
    toy = built()
    exact = logits(toy)
    stack = toy.network.backbone.transformer.blocks
    before = num_bytes(stack)
    result = quantise(toy.network, weights)
    assert result.bytes_after == num_bytes(toy.network) < result.bytes_before
    share = num_bytes(stack) / before
    assert share <= NEEDED[weights], share
    moved = float((logits(toy) - exact).norm() / exact.norm())
    assert 0 < moved <= ERRORS[weights], moved
    if weights == "int4":
        assert result.layers["int4"] >= 14 and result.layers["int8"] > 0, "what does not fit is stored in int8"
    assert type(toy.network.backbone.embed_tokens.weight) is nn.Parameter


@pytest.mark.parametrize("weights", ["bf16", "int8", "int4"])
def test_every_modality_answers_and_embeds(weights):
    if weights != "bf16":
        pytest.importorskip("torchao")
    data = toys.decoder_data()
    data["backbone"]["transformer"] = WIDE
    data["heads"]["space"] = {"use": "projection", "dim": 8}
    toy = toys.build(data)
    plain = Engine(toy.network, toy.processor).embed([view()])
    prompts = [Sample(sample.id, sample.messages[:1]) for sample in toys.mixed()]
    quantise(toy.network, weights)
    engine = Engine(toy.network, toy.processor)
    answers = engine.generate(prompts, Sampling(max_new_tokens=3))
    assert all(answer.ids or answer.finish == "stop" for answer in answers)
    streamed = list(engine.stream(prompts[0], Sampling(max_new_tokens=3)))
    assert streamed == answers[0].ids
    for name, (vectors, _) in engine.embed([view()]).items():
        assert abs(plain[name][0] - vectors).max() < 0.1, name


def view():
    return Sample("v", views={name: toys.medium(name) for name in toys.MEDIA})


def test_an_int4_layer_is_its_dequantised_weight():
    pytest.importorskip("torchao")
    toy = built()
    layer = toy.network.backbone.transformer.blocks[0].attention.q_proj
    weight = layer.weight.detach().clone()
    quantise(toy.network, "int4")
    assert isinstance(layer, Int4Linear)
    x = torch.randn(2, 3, 128)
    found = layer.dequantised()
    torch.testing.assert_close(layer(x), x @ found.T, rtol=1e-4, atol=1e-4)
    # 16 levels over the range of 64 weights: at most half a step off.
    groups = weight.view(128, 2, 64)
    step = (groups.amax(-1) - groups.amin(-1)) / 15
    assert ((found - weight).view(128, 2, 64).abs() <= 0.55 * step[..., None] + 1e-6).all()


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_adapters_stand_on_quantised_layers_and_refuse_to_merge(weights):
    pytest.importorskip("torchao")
    toy = built()
    quantise(toy.network, weights)
    plain = logits(toy)
    names = apply_adapter(toy.network, ADAPTERS.parse({"use": "lora", "rank": 2, "match": ["*.q_proj"]}))
    assert names and torch.equal(logits(toy), plain)
    for name, parameter in adapter_parameters(toy.network).items():
        parameter.data.normal_(std=0.3, generator=torch.Generator().manual_seed(len(name)))
    assert not torch.allclose(logits(toy), plain)
    with pytest.raises(ConfigError, match=r"its weight is stored as .*; merge before quantising"):
        merge_adapters(toy.network)


def test_messages(monkeypatch):
    with pytest.raises(ConfigError, match=r"weights: found 'int3', expected one of bf16, int8, int4"):
        quantise(built().network, "int3")
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("torchao"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=r"int8 or int4 needs the package 'torchao'.*polymodal\[quant\]"):
        quantise(built().network, "int8")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("weights", ["bf16", "int8", "int4"])
def test_on_cuda(weights):
    if weights != "bf16":
        pytest.importorskip("torchao")
    toy = built()
    exact = logits(toy)
    toy.network.cuda()
    assert quantise(toy.network, weights).bytes_after < 4 * 10**6
    prompts = [Sample(sample.id, sample.messages[:1]) for sample in toys.mixed()]
    answers = Engine(toy.network, toy.processor).generate(prompts, Sampling(max_new_tokens=3))
    assert len(answers) == 5
    with torch.no_grad():
        batch = to_device(toy.batch(toys.mixed(), packed=True), "cuda")
        found = toy.network(batch).token_logits.float().cpu()
    assert float((found - exact).norm() / exact.norm()) <= ERRORS[weights] + 0.02
