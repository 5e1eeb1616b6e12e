"""What spaces of many towers need: named views, shared trunks, scales per stream, an extra key, windows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from toys import SMALL, build, medium

from polymodal.core.errors import ConfigError, SampleError
from polymodal.core.parts import Image
from polymodal.core.samples import Sample, conversation, sample_from_json, sample_to_json
from polymodal.models.heads.base import HeadInputs
from polymodal.models.heads.projection import ProjectionConfig
from polymodal.models.layers import Layout, Transformer, TransformerConfig
from polymodal.models.layers.spans import draw_spans
from polymodal.models.layers.windows import from_windows, relative_places, same_region, to_windows

VIT: dict[str, Any] = {"use": "vit", "image_size": 16, "patch_size": 8, **SMALL}


def two_pictures(**depth: Any) -> dict[str, Any]:
    streams = {
        "image": {"modality": "image", "encoder": VIT},
        "depth": {"modality": "image", "encoder": VIT, "view": "depth", **depth},
    }
    return {"streams": streams, "backbone": "none", "heads": {"space": {"use": "projection", "dim": 8}}}


def test_a_named_view_goes_to_its_stream_alone() -> None:
    toy = build(two_pictures())
    both = Sample("s0", views={"image": medium("image", 1), "depth": medium("image", 2)})
    single = Sample("s1", views={"depth": medium("image", 2)})
    batch = toy.batch([both, single])
    assert batch.streams["image"].sample_of_item.tolist() == [0]
    assert batch.streams["depth"].sample_of_item.tolist() == [0, 1]
    values = batch.streams["depth"].values
    assert torch.equal(values[0], values[1]) and not torch.equal(values[0], batch.streams["image"].values[0])
    with pytest.raises(SampleError, match="view 'depth' is audio, the stream 'depth' reads image"):
        toy.processor.plan(Sample("s2", views={"depth": medium("audio")}))
    with pytest.raises(SampleError, match=r"has views \['audio'\], this model takes \['depth', 'image'\]"):
        toy.processor.plan(Sample("s3", views={"audio": medium("audio")}))


def test_a_stream_with_a_named_view_reads_no_media_of_conversations() -> None:
    data = two_pictures(enters="sequence")
    data["streams"]["image"]["enters"] = "sequence"
    data["backbone"] = {"use": "decoder", "max_tokens": 64, "transformer": {"width": 24, "depth": 1, "heads": 2}}
    data["heads"] = {"text": {"use": "next_token"}}
    plan = build(data).processor.plan(conversation(medium("image"), "What?", answer="x"))
    assert [span.stream for span in plan.spans] == ["image"]


def test_named_views_are_written_and_read(tmp_path: Path) -> None:
    data = {"id": "9", "views": {"image": "a.png", "depth": {"modality": "image", "path": "d.png"}}}
    sample = sample_from_json(data, tmp_path, "9")
    assert isinstance(sample.views["depth"], Image)
    again = sample_to_json(sample, tmp_path)
    assert json.loads(json.dumps(again))["views"] == {"image": {"path": "a.png"}, "depth": data["views"]["depth"]}
    for wrong, message in (
        ({"depth": "d.png"}, "a view of another name says its modality"),
        ({"depth": {"modality": "smell", "path": "x"}}, "unknown modality 'smell'"),
        ({"depth": {"modality": "image"}}, "expected exactly one of path, data, url"),
    ):
        with pytest.raises(SampleError, match=message):
            sample_from_json({"id": "9", "views": wrong}, tmp_path, "9")


def test_a_shared_trunk_is_one_module_with_one_gradient() -> None:
    toy = build(two_pictures(shares="image"))
    streams = toy.network.streams
    assert streams["depth"].encoder.trunk is streams["image"].encoder.trunk
    alone = sum(parameter.numel() for parameter in build(two_pictures()).network.parameters())
    assert sum(parameter.numel() for parameter in toy.network.parameters()) < alone
    picture = medium("image", 1)
    found = toy.network(toy.batch([Sample("s", views={"image": picture, "depth": picture})]), passes=("embed",))
    assert not torch.equal(found.embeddings["image"][0], found.embeddings["depth"][0])


def test_trunks_that_cannot_be_shared_are_named() -> None:
    with pytest.raises(ConfigError, match=r"streams.depth.shares: unknown stream 'imag'"):
        build(two_pictures(shares="imag"))
    wider = {**VIT, "mlp_dim": 48}
    with pytest.raises(ConfigError, match=r"the trunks of 'depth' and 'image' differ in transformer.blocks"):
        build(two_pictures(shares="image", encoder=wider))
    small = {"use": "cnn", "image_size": 16, "width": 16}
    with pytest.raises(ConfigError, match="the encoder of the stream 'depth' has no trunk to share"):
        build(two_pictures(shares="image", encoder=small))
    with pytest.raises(ConfigError, match=r"streams.depth.view: found 'audio', expected a name that is no modality"):
        build(two_pictures(view="audio"))


def head(**options: Any) -> Any:
    torch.manual_seed(0)
    widths = {"image": 6, "text": 6, "audio": 6}
    config = ProjectionConfig.parse({"use": "projection", "dim": 4, **options})
    return config.build(HeadInputs(None, 9, widths, None))


def test_output_scales_multiply_and_query_scales_are_averaged() -> None:
    fixed = head(output_scales={"audio": 20.0, "text": None}, temperature=0.1)
    assert [name for name, _ in fixed.named_parameters() if "scale" in name] == ["log_scales.text"]
    assert float(fixed.pair_scale("image", "audio")) == 20.0
    assert float(fixed.pair_scale("text", "audio").detach()) == pytest.approx(200.0)
    assert float(fixed.output_scale("image")) == 1.0
    queries = head(query_scales=True, temperature=0.1)
    with torch.no_grad():
        queries.log_scales["image"].fill_(0.0)
    assert float(queries.pair_scale("image", "text").detach()) == pytest.approx(10**0.5)
    assert not head().has_own_scales


def test_a_projection_of_two_maps_and_a_shared_one() -> None:
    deep = head(hidden="relu", shared={"audio": "image"})
    x = torch.randn(3, 6)
    first, second = deep.projs["text"].first, deep.projs["text"].second
    expected = nn.functional.normalize(second(first(x).relu()), dim=-1)
    torch.testing.assert_close(deep(x, "text"), expected)
    torch.testing.assert_close(deep(x, "audio"), deep(x, "image"))
    assert deep.projs["audio"] is deep.projs["image"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"query_scales": True, "output_scales": {"audio": 2.0}}, "found both query_scales and output_scales"),
        ({"query_scales": True, "temperature": None}, "learned scales need a temperature"),
        ({"hidden": "relu", "proj_bias": True}, "proj_bias is for projections of one linear map"),
        ({"output_scales": {"smell": 2.0}}, r"streams \['smell'\] are not in the model"),
        ({"shared": {"audio": "image", "image": "text"}}, "expected a stream with its own"),
    ],
)
def test_options_of_the_projection_that_contradict_each_other(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        head(**options)


@pytest.mark.parametrize("is_padded", [False, True])
def test_an_extra_key_is_that_of_the_library_attention(is_padded: bool) -> None:
    torch.manual_seed(0)
    config = TransformerConfig(width=12, depth=1, heads=3, extra_key=True, final_norm=False)
    ours = Transformer(config).blocks[0].attention
    theirs = nn.MultiheadAttention(12, 3, add_bias_kv=True, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.q_proj.weight, ours.k_proj.weight, ours.v_proj.weight]))
        theirs.in_proj_bias.copy_(torch.cat([ours.q_proj.bias, ours.k_proj.bias, ours.v_proj.bias]))
        theirs.bias_k.copy_(ours.extra_k.reshape(1, 1, -1))
        theirs.bias_v.copy_(ours.extra_v.reshape(1, 1, -1))
        theirs.out_proj.load_state_dict(ours.out_proj.state_dict())
        x = torch.randn(2, 5, 12)
        is_valid = torch.tensor([[True] * 5, [True] * 3 + [False] * 2]) if is_padded else torch.ones(2, 5).bool()
        stack = Transformer(config)
        found = ours(x, stack.step(x, Layout.padded(is_valid, causal=False)), 0)
        expected = theirs(x, x, x, key_padding_mask=~is_valid, need_weights=False)[0]
    torch.testing.assert_close(found[is_valid], expected[is_valid], atol=1e-5, rtol=1e-5)


def test_an_extra_key_is_for_bidirectional_rows() -> None:
    stack = Transformer(TransformerConfig(width=12, depth=1, heads=3, extra_key=True))
    with pytest.raises(ConfigError, match="extra_key: found a causal layout or a cache, expected bidirectional rows"):
        stack(torch.randn(1, 4, 12), Layout(causal=True))
    with pytest.raises(ConfigError, match="extra_key: found a packed layout, expected bidirectional rows"):
        stack(torch.randn(1, 4, 12), Layout.packed((2, 2), causal=False))


def test_windows_cut_a_grid_and_put_it_together_again() -> None:
    x = torch.arange(2 * 4 * 6 * 3.0).view(2, 4, 6, 3)
    windows = to_windows(x, 2)
    assert windows.shape == (12, 4, 3)
    torch.testing.assert_close(windows[1], x[0, :2, 2:4].reshape(4, 3))
    assert torch.equal(from_windows(windows, 4, 6), x)
    assert relative_places(2)[0].tolist() == [4, 3, 1, 0]


def test_after_a_shift_only_neighbours_attend_to_each_other() -> None:
    may_attend = same_region(4, 4, 2, 1)
    assert may_attend.shape == (4, 4, 4) and may_attend[0].all()
    # The last window holds a corner of each side of the grid: nobody there was anybody's neighbour.
    assert torch.equal(may_attend[3], torch.eye(4, dtype=torch.bool))


def test_spans_cover_their_share_within_the_valid_places() -> None:
    torch.manual_seed(0)
    is_masked = draw_spans([40, 3, 0], 50, 0.25, 5)
    assert is_masked.shape == (3, 50) and not is_masked[0, 40:].any() and not is_masked[1:].any()
    means = [draw_spans([200], 200, 0.3, 10).float().mean() for _ in range(50)]
    assert 0.2 < float(np.mean(means)) < 0.3
