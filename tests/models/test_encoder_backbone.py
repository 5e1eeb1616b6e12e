"""The encoder backbone: order, routing, prefixes, cross-attention, absent streams, and the passes that read it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from toys import Toy, build, encoder_data, joint_data, medium

from polymodal.core.errors import ConfigError
from polymodal.core.parts import Part, Text
from polymodal.core.passes import TokenPass
from polymodal.core.samples import Sample
from polymodal.models.backbones.encoder import EncoderBackbone, EncoderBackboneConfig
from polymodal.models.compose import ModelConfig
from polymodal.models.compose.joint import JointRun
from polymodal.models.layers import Layout
from polymodal.models.layers.multiway import Multiway, MultiwayConfig, Routing
from polymodal.models.layers.transformer import TransformerConfig

TEXTS = ("a red cube", "blue", "what is it that falls?", "it spins")
PLAIN = {"width": 16, "depth": 2, "heads": 2}
MULTIWAY = {"experts": {"text": "language", "image": "vision"}, "joint_layers": 1}


def thing(index: int, *names: str, label: str | None = None) -> Sample:
    views: dict[str, Part] = {n: Text(TEXTS[index % 4]) if n == "text" else medium(n, index) for n in names}
    return Sample(f"t{index}", views=views, label=label)


SAMPLES = [thing(0, "image", "text"), thing(1, "text"), thing(2, "image"), thing(3, "image", "text")]


def backbone_of(toy: Toy) -> EncoderBackbone:
    assert isinstance(toy.network.backbone, EncoderBackbone)
    return toy.network.backbone


def tokens(length: int, seed: int, rows: int = 2) -> torch.Tensor:
    return torch.randn(rows, length, 16, generator=torch.Generator().manual_seed(seed))


def run(backbone: EncoderBackbone, lengths: dict[str, int], **kwargs: Any) -> Any:
    given = {name: tokens(length, seed) for seed, (name, length) in enumerate(sorted(lengths.items()))}
    return backbone(given, {name: torch.ones(2, x.shape[1], dtype=torch.bool) for name, x in given.items()}, **kwargs)


def test_tokens_stand_in_the_stated_order() -> None:
    torch.manual_seed(0)
    config = EncoderBackboneConfig.parse(
        {"transformer": PLAIN, "cls": False, "token_types": False, "order": ["b", "a"]}
    )
    backbone = config.build(["a", "b"]).eval()
    states = run(backbone, {"a": 2, "b": 3})
    joined = backbone.transformer(torch.cat([tokens(3, 1), tokens(2, 0)], dim=1), Layout(causal=False))
    torch.testing.assert_close(states.x["b"], joined[:, :3])
    torch.testing.assert_close(states.x["a"], joined[:, 3:])
    torch.testing.assert_close(states.pooled_SW, joined[:, 0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": ["a"]}, r"backbone.order: found \['a'\], expected each stream .* \['a', 'b'\]"),
        ({"multiway": {"experts": {"a": "x", "c": "y"}}}, r"backbone.multiway.experts: found \['a', 'c'\]"),
    ],
)
def test_names_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EncoderBackboneConfig.parse({"transformer": PLAIN, **options}).build(["a", "b"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"transformer": {**PLAIN, "rope_theta": 1e4}}, "tokens bring the positions of their streams"),
        ({"transformer": {**PLAIN, "cross_width": 8}}, "follows from the streams that enter by cross_attention"),
        ({"transformer": {**PLAIN, "pre_norm": False}, "multiway": MULTIWAY}, "plain pre-norm blocks"),
        ({"transformer": PLAIN, "multiway": {"experts": {"text": "x", "image": "x"}}}, "at least two different"),
    ],
)
def test_configs_that_contradict_themselves_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EncoderBackboneConfig.parse(options)


def test_each_token_goes_through_its_own_expert() -> None:
    torch.manual_seed(0)
    layer = Multiway(
        TransformerConfig.parse({**PLAIN, "depth": 1}), MultiwayConfig.parse({"experts": {"a": "x", "b": "y"}})
    )
    layer.eval()
    x_BTD, route_BT = tokens(5, 0), torch.tensor([[0, 1, 0, 1, 1], [1, 1, 0, 0, 0]])
    before = layer(x_BTD, Layout(causal=False), route_BT)
    with torch.no_grad():
        layer.blocks[0].mlp.experts["y"].down_proj.weight.add_(0.1)
    after = layer(x_BTD, Layout(causal=False), route_BT)
    assert torch.equal((after != before).any(-1), route_BT == 1)


def test_routing_puts_results_back() -> None:
    routing = Routing(torch.tensor([[0, 1, 0]]), 2)
    assert routing.order_N.tolist() == [0, 2, 1] and routing.counts == [2, 1]
    assert routing.inverse_N.tolist() == [0, 2, 1]


def test_the_joint_expert_takes_rows_with_both_kinds_and_no_others() -> None:
    toy = build(joint_data(cls=False, multiway=MULTIWAY))
    before = toy.network(toy.batch(SAMPLES), ("merge",)).merged
    with torch.no_grad():
        backbone_of(toy).transformer.blocks[1].mlp.experts["joint"].down_proj.weight.add_(0.1)  # type: ignore[union-attr]
    after = toy.network(toy.batch(SAMPLES), ("merge",)).merged
    assert (after != before).any(1).tolist() == [True, False, False, True]


def test_multiway_attention_with_one_set_of_weights_is_the_common_block() -> None:
    """With equal experts nothing tells the routed block from the stack's own."""
    torch.manual_seed(0)
    config = TransformerConfig.parse(PLAIN)
    plain = EncoderBackboneConfig.parse({"transformer": PLAIN}).build(["a", "b"]).eval().transformer
    routed = Multiway(config, MultiwayConfig.parse({"experts": {"a": "x", "b": "y"}, "routed_attention": True})).eval()
    for block, own in zip(routed.blocks, plain.blocks, strict=True):  # type: ignore[arg-type]
        pairs = {"attention_norm": own.attention_norm, "mlp_norm": own.mlp_norm}
        pairs |= {name: getattr(own.attention, name) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
        for name, module in pairs.items():
            for expert in getattr(block, name).experts.values():
                expert.load_state_dict(module.state_dict())
        for expert in block.mlp.experts.values():
            expert.load_state_dict(own.mlp.state_dict())
    x_BTD, route_BT = tokens(5, 0), torch.tensor([[0, 1, 0, 1, 1], [1, 1, 0, 0, 0]])
    layout = Layout.padded(torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]).bool(), causal=False)
    found, expected = routed(x_BTD, layout, route_BT), plain(x_BTD, layout)
    torch.testing.assert_close(found[layout.is_valid_BT], expected[layout.is_valid_BT], rtol=1e-5, atol=1e-5)


def test_causal_streams_see_their_prefix_and_are_not_seen_by_it() -> None:
    torch.manual_seed(0)
    backbone = EncoderBackboneConfig.parse({"transformer": PLAIN}).build(["text", "image"]).eval()
    whole = run(backbone, {"image": 3, "text": 4}, causal=("text",))
    given = {"image": tokens(3, 0), "text": tokens(4, 1)}
    given["text"][:, 2:] *= -1
    valid = {name: torch.ones(2, x.shape[1], dtype=torch.bool) for name, x in given.items()}
    changed = backbone(given, valid, causal=("text",))
    torch.testing.assert_close(changed.x["image"], whole.x["image"])
    torch.testing.assert_close(changed.x["text"][:, :2], whole.x["text"][:, :2])
    torch.testing.assert_close(changed.pooled_SW, whole.pooled_SW)
    given["image"][:, 0] *= -1
    assert not torch.allclose(backbone(given, valid, causal=("text",)).x["text"][:, 0], whole.x["text"][:, 0])


def test_the_mask_of_a_prefix_is_the_documented_one() -> None:
    layout = Layout.prefixed(torch.ones(1, 3, dtype=torch.bool), torch.tensor([False, True, True]))
    assert layout.mask is not None
    assert layout.mask[0, 0].int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]


def test_a_stream_by_cross_attention_is_looked_at_and_needs_no_place() -> None:
    toy = build(encoder_data(watched=("image",)))
    samples = [thing(0, "image", "text"), thing(1, "text")]
    states = toy.network(toy.batch(samples), ("merge",)).merged
    other = toy.network(
        toy.batch([Sample("x", views={"image": medium("image", 9), "text": Text(TEXTS[0])})]), ("merge",)
    )
    assert not torch.allclose(states[0], other.merged[0])
    blind = toy.network(toy.batch([thing(0, "text")]), ("merge",)).merged
    assert not torch.allclose(states[0], blind[0])


def test_only_what_is_looked_at_still_gives_a_state() -> None:
    toy = build(encoder_data(watched=("image",)))
    assert toy.network(toy.batch([thing(0, "image")]), ("merge",)).merged.isfinite().all()


def test_multiway_blocks_cannot_look_beside_them() -> None:
    data = encoder_data(watched=("audio",), multiway=MULTIWAY)
    with pytest.raises(ConfigError, match="multiway: its blocks cannot look at other streams"):
        build(data)


HEADS = {
    "words": {"use": "masked_token"},
    "pixels": {"use": "masked_token", "stream": "image", "predicts": "pixels"},
    "space": {"use": "projection", "dim": 8, "through": ["text", "image"]},
    "match": {"use": "matching"},
}
WORDS = TokenPass("masked", "words", (("text", 0.3),))
BOTH = (("image", 0.4), ("text", 0.3))


def test_hidden_words_are_predicted_from_what_is_left() -> None:
    toy = build(joint_data(HEADS))
    batch = toy.batch(SAMPLES)
    torch.manual_seed(3)
    found = toy.network(batch, (WORDS,)).tokens[WORDS]
    torch.manual_seed(3)
    again = toy.network(batch, (WORDS,)).tokens[WORDS]
    assert torch.equal(found.predictions, again.predictions)
    assert sorted(set(found.samples.tolist())) == [0, 1, 3], "every text, and no sample without one"
    ids = batch.streams["text"].values
    assert set(found.targets.tolist()) <= set(ids.flatten().tolist())


def test_passes_that_hide_the_same_share_one_run() -> None:
    toy = build(joint_data(HEADS))
    words, pixels = TokenPass("masked", "words", BOTH), TokenPass("masked", "pixels", BOTH)
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    backbone_of(toy).register_forward_hook(count)
    outputs = toy.network(toy.batch(SAMPLES), (words, pixels))
    assert calls == 1 and outputs.tokens[pixels].predictions.shape == outputs.tokens[pixels].targets.shape
    toy.network(toy.batch(SAMPLES), (words, TokenPass("masked", "pixels", (("image", 0.4),))))
    assert calls == 3


def test_pixels_to_predict_are_those_of_the_hidden_patches() -> None:
    toy = build(joint_data(HEADS))
    needed = TokenPass("masked", "pixels", (("image", 0.5),))
    batch = toy.batch([thing(0, "image")])
    found = toy.network(batch, (needed,)).tokens[needed]
    patches = batch.streams["image"].values[0, :, :-2]
    normal = (patches - patches.mean(1, keepdim=True)) / (patches.var(1, keepdim=True) + 1e-6).sqrt()
    assert len(found.targets) == 8
    assert all(any(torch.allclose(target, patch) for patch in normal) for target in found.targets)


def test_codes_to_predict_come_from_the_codec() -> None:
    heads = {"codes": {"use": "masked_token", "stream": "image", "predicts": "codes", "codec": "codec"}}
    data = joint_data(heads)
    codec = {"use": "patches", "patch_size": 4, "grid": 4, "width": 6}
    data["streams"]["codec"] = {"modality": "image", "encoder": codec}
    toy = build(data)
    needed = TokenPass("masked", "", (("image", 0.5),))
    batch = toy.batch([thing(0, "image")])
    found = toy.network(batch, (needed,)).tokens[needed]
    codes = toy.network.encode("codec", batch.streams["codec"]).x_UND.argmax(-1)
    assert found.predictions.shape == (8, 6) and set(found.targets.tolist()) <= set(codes.flatten().tolist())


def test_states_of_the_stream_itself_can_be_read() -> None:
    data = encoder_data(heads={"mlm": {"use": "masked_token", "at": "encoder", "tied": True}})
    toy = build(data)
    needed = TokenPass("masked", "mlm", (("text", 0.3),))
    found = toy.network(toy.batch(SAMPLES), (needed,)).tokens[needed]
    assert found.predictions.shape == (len(found.targets), toy.tokenizer.size)


def test_captions_do_not_see_what_they_predict() -> None:
    toy = build(joint_data(HEADS))
    needed = TokenPass("caption", "words")
    batch = toy.batch([thing(0, "image", "text")])
    found = toy.network(batch, (needed,)).tokens[needed]
    ids = batch.streams["text"].values[0]
    assert found.targets.tolist() == ids[1:].tolist()
    batch.streams["text"].values = torch.cat([ids[:3], torch.full_like(ids[3:], int(ids[0]))])[None]
    changed = toy.network(batch, (needed,)).tokens[needed]
    torch.testing.assert_close(changed.predictions[:3], found.predictions[:3])
    assert not torch.allclose(changed.predictions[3:], found.predictions[3:])


def test_captions_need_an_encoder_that_does_not_look_ahead() -> None:
    toy = build(encoder_data(heads={"words": {"use": "masked_token"}}))
    with pytest.raises(
        ConfigError, match=r"its encoder sees tokens before they are predicted; expected .* 'embedding'"
    ):
        toy.network(toy.batch(SAMPLES), (TokenPass("caption", "words"),))


@pytest.mark.parametrize(
    ("needed", "message"),
    [
        (TokenPass("masked", "space", (("text", 0.3),)), "found the head 'space', expected a masked_token head"),
        (TokenPass("masked", "", BOTH), "found 2 masked_token heads .* name it in the objective"),
        (TokenPass("masked", "pixels", (("text", 0.3),)), "head of stream 'image': the pass hides"),
    ],
)
def test_passes_that_fit_no_head_are_refused(needed: TokenPass, message: str) -> None:
    toy = build(joint_data(HEADS))
    with pytest.raises(ConfigError, match=message):
        toy.network(toy.batch(SAMPLES), (needed,))


def test_vectors_through_the_backbone_are_of_the_stream_alone() -> None:
    toy = build(joint_data(HEADS))
    vectors, owners = toy.network(toy.batch(SAMPLES), ("embed",)).embeddings["text"]
    assert owners.tolist() == [0, 1, 3]
    alone, _ = toy.network(toy.batch([thing(0, "text")]), ("embed",)).embeddings["text"]
    torch.testing.assert_close(alone[0], vectors[0], rtol=1e-5, atol=1e-5)


def test_hard_negatives_look_alike_and_have_another_label() -> None:
    toy = build(joint_data(HEADS))
    samples = [thing(i, "image", "text", label=label) for i, label in enumerate(["x", "x", "y"])]
    batch = toy.batch(samples)
    run_of = JointRun(toy.network, batch, {n: toy.network.encode(n, s) for n, s in batch.streams.items()})
    outputs = toy.network(batch, ("match_hard",))
    assert outputs.mismatch_samples.tolist() == [0, 1, 2, 0, 1, 2], "each once with another's image, once with its text"
    assert outputs.mismatch_logits.shape == (6,) and outputs.embeddings
    tokens_of, _ = run_of.lay_out(run_of.features)
    assert set(tokens_of) == {"text", "image"}
    alike = [thing(i, "image", "text", label="same") for i in range(3)]
    assert len(toy.network(toy.batch(alike), ("match_hard",)).mismatch_samples) == 0


def test_no_mask_token_is_an_error_that_says_so() -> None:
    toy = build(joint_data(HEADS))
    toy.network.controls = {}
    with pytest.raises(ConfigError, match=r"no token for hidden ones; expected one of <\|mask\|>, \[MASK\]"):
        toy.network(toy.batch(SAMPLES), (WORDS,))


def test_config_goes_out_and_comes_back() -> None:
    config = ModelConfig.parse(joint_data(HEADS, cls=False, multiway=MULTIWAY))
    assert ModelConfig.parse(config.to_data()) == config
