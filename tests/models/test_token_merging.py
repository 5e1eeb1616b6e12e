"""Fewer tokens inside a vision transformer: the numbers are exact, and merging equal tokens changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from polymodal.core.errors import ConfigError
from polymodal.models.encoders.table import ENCODERS
from polymodal.models.layers import Layout, Transformer, TransformerConfig
from polymodal.models.layers.token_merging import REDUCTIONS, bipartite_match, run_reduced

CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}
COUNTS = [{"tokens": count} for count in (2, 3, 7, 8, 15, 16)]
VIT = {"use": "vit", "image_size": 16, "patch_size": 4, "width": 16, "depth": 3, "heads": 2}


def stack(**changes: Any) -> Transformer:
    torch.manual_seed(0)
    config = {"width": 16, "depth": 3, "heads": 2, **changes}
    transformer = Transformer(TransformerConfig.parse(config)).eval()
    for parameter in transformer.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return transformer


def doubled(units: int, pairs: int, first: int, last: int = 0) -> torch.Tensor:
    """``first`` tokens, then pairs of equal neighbours, then ``last`` tokens."""
    torch.manual_seed(1)
    body = torch.randn(units, pairs, 16).repeat_interleave(2, dim=1)
    return torch.cat((torch.randn(units, first, 16), body, torch.randn(units, last, 16)), dim=1)


@torch.no_grad()
@pytest.mark.parametrize(("first", "last"), [(0, 0), (1, 0), (1, 2)])
def test_merging_equal_tokens_changes_nothing(first: int, last: int) -> None:
    transformer, x_UTD = stack(), doubled(2, 5, first, last)
    whole = transformer(x_UTD, Layout(causal=False))
    x_UMD, sizes_UM = run_reduced(transformer, x_UTD, REDUCTIONS.parse({"use": "merge", "tokens": 5}), first, 10)
    places = [*range(first), *range(first, first + 10, 2), *range(first + 10, first + 10 + last)]
    torch.testing.assert_close(x_UMD, whole[:, places], **CLOSE)
    assert sizes_UM[0].tolist() == [1.0] * first + [2.0] * 5 + [1.0] * last


@torch.no_grad()
def test_without_proportions_it_would_change_something() -> None:
    transformer, x_UTD = stack(), doubled(2, 5, 1)
    whole = transformer(x_UTD, Layout(causal=False))
    halved = transformer(x_UTD[:, [0, *range(1, 11, 2)]], Layout(causal=False))
    assert (halved - whole[:, [0, *range(1, 11, 2)]]).abs().max() > 1e-2


def test_the_most_similar_pairs_are_taken() -> None:
    keys = torch.tensor([[[9.0, 9.0], [1, 0], [0, 1], [0.9, 0.1], [-1, 0.2], [0.1, 1], [-1, 0]]])
    # Body: six tokens from 1 on; 1, 3, 5 propose to 2, 4, 6.  1~4? no: 1 -> 2 is 0, 1 -> 4 is -1: best is 2.
    source, target = bipartite_match(keys, 1, 6, 2)
    scores = torch.nn.functional.normalize(keys, dim=-1)[0]
    pairs = {(int(a), int(b)): float(scores[a] @ scores[b]) for a, b in zip(source[0], target[0], strict=True)}
    best = {a: max((float(scores[a] @ scores[b]), b) for b in (2, 4, 6)) for a in (1, 3, 5)}
    assert pairs == pytest.approx({(a, b): v for a, (v, b) in best.items() if a in (source[0].tolist())})
    assert min(pairs.values()) >= sorted(v for v, _ in best.values())[1] - 1e-6


@torch.no_grad()
def test_a_merged_token_is_the_mean_of_what_it_stands_for() -> None:
    transformer = stack(depth=1, final_norm=False)
    block = transformer.blocks[0]
    for layer in (block.attention.out_proj, block.mlp.down_proj):
        layer.weight.zero_()
        layer.bias.zero_()
    x_UTD = torch.randn(1, 8, 16)
    out, sizes = run_reduced(transformer, x_UTD, REDUCTIONS.parse({"use": "merge", "tokens": 5}), 0, 8)
    torch.testing.assert_close((out * sizes[..., None]).sum(1), x_UTD.sum(1), **CLOSE)
    assert sizes.sum() == 8 and out.shape[1] == 5


@pytest.mark.parametrize(
    ("config", "tokens", "depth", "steps"),
    [
        ({"use": "merge", "tokens": 2}, 16, 3, (8, 4, 2)),
        ({"use": "merge", "tokens": 10}, 16, 3, (2, 2, 2)),
        ({"use": "merge", "tokens": 16}, 16, 3, (0, 0, 0)),
        ({"use": "merge", "per_layer": 5}, 16, 4, (5, 5, 3, 1)),
        ({"use": "prune", "tokens": 2}, 16, 4, (0, 8, 4, 2)),
        ({"use": "prune", "tokens": 9, "layers": [2]}, 16, 4, (0, 0, 7, 0)),
    ],
)
def test_how_many_go_in_each_block(config: dict[str, Any], tokens: int, depth: int, steps: tuple[int, ...]) -> None:
    found = REDUCTIONS.parse(config)
    assert found.schedule(tokens, depth) == steps and found.left(tokens, depth) == tokens - sum(steps)


@pytest.mark.parametrize("reduce", [{"use": "merge", **how} for how in ({"per_layer": 3}, *COUNTS)])
@pytest.mark.parametrize("more", [{}, {"pool": "cls"}, {"pool": "cls", "registers": 2, "cls_feature": True}])
def test_the_encoder_gives_as_many_features_as_promised(reduce: dict[str, Any], more: dict[str, Any]) -> None:
    config = ENCODERS.parse({**VIT, **more, "reduce": reduce})
    encoder = config.build().eval()
    with torch.no_grad():
        out = encoder(torch.randn(2, 3, 16, 16), torch.ones(2, dtype=torch.int64))
    assert out.x_UND.shape == (2, config.num_features(1), 16) and out.pooled_UD.shape == (2, 16)
    wanted = reduce.get("tokens")
    assert wanted is None or config.num_features(1) == wanted + config.cls_feature


@torch.no_grad()
def test_pruning_keeps_the_order_and_what_the_class_token_looks_at() -> None:
    config = ENCODERS.parse({**VIT, "pool": "cls", "depth": 4, "reduce": {"use": "prune", "tokens": 6, "layers": [1]}})
    torch.manual_seed(0)
    encoder = config.build().eval()
    images = torch.randn(2, 3, 16, 16)
    trunk = encoder.trunk
    x_UTD = trunk.embed(images)
    block = trunk.transformer.blocks[1]
    step = trunk.transformer.step(x_UTD, Layout(causal=False))
    x_UTD = trunk.transformer.blocks[0](x_UTD, step, 0, None)
    normed = block.attention_norm(x_UTD)
    query = block.attention.q_proj(normed).view(2, 17, 2, 8)[:, 0]
    keys = block.attention.k_proj(normed).view(2, 17, 2, 8)
    seen = (torch.einsum("uhk,uthk->uht", query, keys) / 8**0.5).softmax(-1).mean(1)[:, 1:]
    kept = seen.topk(6).indices.sort(dim=1).values + 1
    x_UTD = x_UTD + block.attention(normed, step, 0)
    x_UTD = torch.stack([row[[0, *places.tolist()]] for row, places in zip(x_UTD, kept, strict=True)])
    x_UTD = x_UTD + block.mlp(block.mlp_norm(x_UTD))
    for later in trunk.transformer.blocks[2:]:
        x_UTD = later(x_UTD, step, 0, None)
    expected = trunk.transformer.final_norm(x_UTD)[:, 1:]
    torch.testing.assert_close(encoder(images, torch.ones(2)).x_UND, expected, **CLOSE)


@pytest.mark.parametrize("reduce", [{"use": "merge", "tokens": 5}, {"use": "prune", "tokens": 5}])
def test_it_trains_alike_with_and_without_checkpointing(reduce: dict[str, Any]) -> None:
    encoder: Any = ENCODERS.parse({**VIT, "pool": "cls", "reduce": reduce}).build()
    images, gradients = torch.randn(2, 3, 16, 16), []
    for is_on in (False, True):
        encoder.trunk.transformer.checkpointing = is_on
        encoder.zero_grad(set_to_none=True)
        out = encoder(images, torch.ones(2))
        (out.x_UND.square().sum() + out.pooled_UD.sum()).backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in encoder.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, **CLOSE)


def test_the_mean_counts_every_patch_once() -> None:
    torch.manual_seed(0)
    plain = ENCODERS.parse(VIT).build().eval()
    merged = ENCODERS.parse({**VIT, "reduce": {"use": "merge", "tokens": 8}}).build().eval()
    merged.load_state_dict(plain.state_dict())
    for encoder in (plain, merged):
        encoder.trunk.learned_positions.weight.data.zero_()
    column = torch.randn(1, 3, 16, 2, 4).repeat_interleave(2, dim=3).flatten(3)
    with torch.no_grad():
        one, other = (encoder(column, torch.ones(1)) for encoder in (plain, merged))
    assert other.x_UND.shape[1] == 8
    torch.testing.assert_close(other.pooled_UD, one.pooled_UD, **CLOSE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reduce": {"use": "merge", "tokens": 1}}, "expected 2 to 16: 3 blocks halve 16 tokens at most"),
        ({"reduce": {"use": "merge"}}, "expected exactly one of 'tokens' and 'per_layer'"),
        ({"reduce": {"use": "prune", "tokens": 4}}, "reduce prune: found pool 'mean', expected 'cls'"),
        ({"reduce": {"use": "merge", "tokens": 4}, "pool": "attention"}, "expected 'cls' or 'mean'"),
        ({"reduce": {"use": "merge", "tokens": 4}, "rope_grid": 4}, "found a rotary code of row and column"),
        (
            {"reduce": {"use": "prune", "tokens": 4, "layers": [3]}, "pool": "cls"},
            r"\[3\], expected some of 0 to 2",
        ),
        ({"reduce": {"use": "prune", "tokens": 17}, "pool": "cls"}, "found tokens: 17, there are only 16"),
    ],
)
def test_what_cannot_be_is_said(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ENCODERS.parse({**VIT, **changes})


@torch.no_grad()
def test_norms_behind_the_sublayers_stay_there() -> None:
    """With nothing to merge, a reduced stack of ``branch_norm`` is the stack."""
    transformer = stack(branch_norm=True)
    x_UTD = torch.randn(2, 8, 16)
    out, _ = run_reduced(transformer, x_UTD, REDUCTIONS.parse({"use": "merge", "tokens": 8}), 0, 8)
    torch.testing.assert_close(out, transformer(x_UTD, Layout(causal=False)), **CLOSE)
