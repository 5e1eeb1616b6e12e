"""Language models of the reference library as backbones: the library's own whole model is the reference."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from adapter_references import LANGUAGE, language_model, save
from safetensors.torch import load_file, save_file

from polymodal.core.errors import CheckpointError, ConfigError
from polymodal.models.adapters.apply import apply_adapter
from polymodal.models.adapters.table import ADAPTERS
from polymodal.models.backbones.table import BACKBONES
from polymodal.models.layers.layout import Layout
from polymodal.models.transformers_library import library, read_config

CAUSAL = Layout(causal=True)
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module", params=LANGUAGE)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A reference model, and the backbone that its folder became."""
    reference: Any = language_model(request.param)
    folder = save(reference, tmp_path_factory.mktemp(request.param))
    config = BACKBONES.parse({"use": "transformers", "config": read_config(folder)})
    backbone = config.build(64).eval()
    backbone.load_folder(folder)
    return SimpleNamespace(kind=request.param, reference=reference, config=config, ours=backbone, folder=folder)


def loaded(kind: str, folder: Path, vocab_size: int = 64) -> Any:
    """The backbone that a new reference model's folder becomes."""
    if not (folder / "config.json").is_file():
        save(language_model(kind), folder)
    backbone = BACKBONES.parse({"use": "transformers", "config": read_config(folder)}).build(vocab_size).eval()
    backbone.load_folder(folder)
    return backbone


def expected(pair: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return pair.reference(input_ids=ids[None], use_cache=False).logits[0]


def ids_of(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(64, (length,), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_logits_are_those_of_the_whole_model(pair: Any) -> None:
    rows = [ids_of(11), ids_of(4, seed=1), ids_of(7, seed=2)]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    valid = torch.arange(11)[None] < torch.tensor([len(row) for row in rows])[:, None]
    ours = pair.ours.own_head(pair.ours(pair.ours.embed(padded), Layout.padded(valid, causal=True)))
    for found, row in zip(ours, rows, strict=True):
        torch.testing.assert_close(found[: len(row)], expected(pair, row), **CLOSE)
    assert pair.config.width == pair.ours.embed(padded).shape[-1]


@torch.no_grad()
def test_packed_samples_do_not_see_each_other(pair: Any) -> None:
    rows = [ids_of(5), ids_of(1, seed=1), ids_of(9, seed=2), ids_of(8, seed=3)]
    layout = Layout.packed([len(row) for row in rows], causal=True)
    states = pair.ours(pair.ours.embed(torch.cat(rows)[None]), layout)
    ours = pair.ours.own_head(states)[0]
    torch.testing.assert_close(ours, torch.cat([expected(pair, row) for row in rows]), **CLOSE)


@torch.no_grad()
def test_cached_is_uncached_through_ragged_rows_selection_copies_and_cuts(pair: Any) -> None:
    rows = [ids_of(6), ids_of(3, seed=1), ids_of(6, seed=2)]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    valid = torch.arange(6)[None] < torch.tensor([len(row) for row in rows])[:, None]
    cache = pair.ours.new_cache(3, 24)

    def read(ids: torch.Tensor, layout: Layout) -> None:
        logits = pair.ours.own_head(pair.ours(pair.ours.embed(ids), layout, cache))
        for row, found in zip(rows, logits, strict=True):
            own = found[: len(row)] if layout.is_valid_BT is not None else found
            torch.testing.assert_close(own, expected(pair, row)[-len(own) :], **CLOSE)

    def step(seed: int, tokens: int = 1) -> None:
        new = torch.stack([ids_of(tokens, seed=seed + row) for row in range(len(rows))])
        rows[:] = [torch.cat((row, more)) for row, more in zip(rows, new, strict=True)]
        read(new, CAUSAL)

    read(padded, Layout.padded(valid, causal=True))
    assert cache.lengths_B.tolist() == [6, 3, 6] and cache.num_bytes > 0
    for seed in range(10, 40, 10):
        step(seed)
    old, cache = cache, cache.clone()
    cache.select(torch.tensor([2, 1]))
    rows[:] = [rows[2], rows[1]]
    step(40)
    cache.select(torch.tensor([1]))
    del rows[0]
    step(50)
    cache.crop(4)
    rows[:] = [rows[0][:4]]
    step(60, tokens=3)
    assert cache.length == 7 and old.length == 9
    twice = cache.clone(rows=2)
    assert twice.lengths_B.tolist() == [7, 7]


def test_every_parameter_trains_alike_with_and_without_checkpointing(pair: Any) -> None:
    ids, weight = torch.stack([ids_of(6), ids_of(6, seed=1)]), torch.randn(12, 64)
    gradients = []
    for is_on in (False, True):
        pair.ours.checkpointing = is_on
        pair.ours.train().zero_grad(set_to_none=True)
        torch.manual_seed(0)  # the same dropout
        logits = pair.ours.own_head(pair.ours(pair.ours.embed(ids), CAUSAL))
        (logits.flatten(0, 1) * weight).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in pair.ours.named_parameters() if p.grad is not None})
    pair.ours.checkpointing = False
    pair.ours.eval().zero_grad(set_to_none=True)
    plain, recomputed = gradients
    assert plain.keys() == recomputed.keys() == dict(pair.ours.named_parameters()).keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["gpt2", "opt", "cohere"])
def test_what_is_tied_stays_tied(kind: str, tmp_path: Path) -> None:
    backbone = loaded(kind, tmp_path)
    assert backbone.model.get_output_embeddings().weight is backbone.embed_tokens.weight
    grown = loaded(kind, tmp_path, vocab_size=70)
    assert grown.model.get_output_embeddings().weight is grown.embed_tokens.weight
    assert grown.embed_tokens.weight.shape[0] == 70
    with torch.no_grad():
        few, many = (model.own_head(model(model.embed(ids_of(5)[None]), CAUSAL)) for model in (backbone, grown))
    torch.testing.assert_close(many[..., :64], few, **CLOSE)


@pytest.mark.parametrize("kind", ["gpt2", "phi3"])
def test_adapters_fit_its_linear_layers_by_pattern(kind: str, tmp_path: Path) -> None:
    backbone = loaded(kind, tmp_path)
    pattern = {"gpt2": "*.c_attn", "phi3": "*.qkv_proj"}[kind]
    x_BTD = backbone.embed(ids_of(6)[None]).detach()
    before = backbone(x_BTD, CAUSAL).detach()
    chosen = apply_adapter(backbone, ADAPTERS.parse({"use": "lora", "rank": 2, "match": [pattern]}))
    assert len(chosen) == 2
    torch.testing.assert_close(backbone(x_BTD, CAUSAL), before, **CLOSE)
    backbone.own_head(backbone(x_BTD, CAUSAL)).sum().backward()
    trained = {name for name, parameter in backbone.named_parameters() if parameter.grad is not None}
    assert trained and all("lora" in name for name in trained)


def test_what_it_cannot_do_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown architecture 'lama'; did you mean 'llama'"):
        BACKBONES.parse({"use": "transformers", "config": {"model_type": "lama"}})
    with pytest.raises(ConfigError, match="cannot be built by AutoModelForCausalLM"):
        BACKBONES.parse({"use": "transformers", "config": {"model_type": "swin"}})
    backbone = loaded("phi3", tmp_path)
    x_BTD = torch.zeros(1, 3, backbone.config.width)
    with pytest.raises(ConfigError, match="bidirectional layout, expected a causal one"):
        backbone(x_BTD, Layout(causal=False))
    with pytest.raises(ConfigError, match="expected it at the end of rows only"):
        backbone(x_BTD, Layout.padded(torch.tensor([[False, True, True]]), causal=True))
    with pytest.raises(ConfigError, match="found 0 \\+ 3 tokens, expected at most 2"):
        backbone(x_BTD, CAUSAL, backbone.new_cache(1, 2))


def test_a_checkpoint_that_lacks_a_tensor_is_refused_by_its_name(tmp_path: Path) -> None:
    folder = save(language_model("phi3"), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = BACKBONES.parse({"use": "transformers", "config": read_config(folder)})
    with pytest.raises(CheckpointError, match=r"1 tensor\(s\) missing: model.layers.1.mlp.down_proj.weight"):
        config.build(64).load_folder(folder)
    (folder / "model.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="the library cannot load it"):
        config.build(64).load_folder(folder)


def test_another_version_of_the_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.__version__", "6.0.1")
    with pytest.raises(ConfigError, match=r"found version 6.0.1 of the library, expected 5.23.x"):
        library()
