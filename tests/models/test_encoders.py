"""What single encoders compute: parity with published ones, and the meaning of their settings."""

from typing import Any

import pytest
import torch
from torch import nn

from polymodal.core.errors import ConfigError
from polymodal.models.encoders import ENCODERS
from polymodal.models.encoders.cnn_temporal import CnnTemporalConfig, TemporalMix, pool_pairs
from polymodal.models.encoders.point_groups import farthest_points, nearest_points
from polymodal.models.encoders.spectrum import SpectrumConfig
from polymodal.models.encoders.vit_trunk import ConvStem
from polymodal.models.layers.convolution import RaggedConv

ONE = torch.ones(1, dtype=torch.int64)


def shake(model: nn.Module) -> None:
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2)


def copy(target: nn.Module, source: nn.Module) -> None:
    target.weight.data.copy_(source.weight)
    if getattr(target, "bias", None) is not None:
        target.bias.data.copy_(source.bias) if source.bias is not None else target.bias.data.zero_()


def copy_layers(blocks: nn.ModuleList, layers: nn.ModuleList, norms: tuple[str, str]) -> None:
    """The layers of CLIP and Whisper, which name their parts alike but for the norms."""
    for block, layer in zip(blocks, layers, strict=False):
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            copy(getattr(block.attention, name), getattr(layer.self_attn, name))
        mlp = getattr(layer, "mlp", layer)
        copy(block.mlp.up_proj, mlp.fc1)
        copy(block.mlp.down_proj, mlp.fc2)
        copy(block.attention_norm, getattr(layer, norms[0]))
        copy(block.mlp_norm, getattr(layer, norms[1]))


@pytest.mark.parametrize("layer", [-1, -2])
def test_vit_equals_clip(layer: int) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    settings = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=16, patch_size=4
    )
    reference = CLIPVisionModel(settings).eval()
    shake(reference)
    inner = getattr(reference, "vision_model", reference)
    config = ENCODERS.parse(
        {
            "use": "vit", "image_size": 16, "patch_size": 4, "width": 32, "depth": 3, "heads": 4, "mlp_dim": 64,
            "pool": "cls", "embed_norm": True, "patch_bias": False, "activation": "quick_gelu", "layer": layer,
        }
    )  # fmt: skip
    trunk = config.build().eval().trunk
    copy(trunk.patch_embed, inner.embeddings.patch_embedding)
    trunk.cls_token.data.copy_(inner.embeddings.class_embedding)
    trunk.learned_positions.weight.data.copy_(inner.embeddings.position_embedding.weight)
    copy(trunk.embed_norm, inner.pre_layrnorm)
    copy_layers(trunk.transformer.blocks, inner.encoder.layers, ("layer_norm1", "layer_norm2"))
    if layer == -1:
        copy(trunk.transformer.final_norm, inner.post_layernorm)
    images = torch.randn(2, 3, 16, 16)
    theirs = reference(images, output_hidden_states=True)
    x_UND, pooled = trunk(images)
    hidden = theirs.hidden_states[layer]
    hidden = inner.post_layernorm(hidden) if layer == -1 else hidden
    torch.testing.assert_close(x_UND, hidden[:, 1:], atol=1e-5, rtol=1e-5)
    if layer == -1:
        torch.testing.assert_close(pooled, theirs.pooler_output, atol=1e-5, rtol=1e-5)
    assert len(trunk.transformer.blocks) == 4 + layer


def test_audio_transformer_equals_whisper() -> None:
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    settings = WhisperConfig(
        d_model=32, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=64, num_mel_bins=16,
        max_source_positions=12,
    )  # fmt: skip
    reference = WhisperEncoder(settings).eval()
    positions = reference.embed_positions.weight.clone()
    shake(reference)
    reference.embed_positions.weight.data.copy_(positions)
    config = ENCODERS.parse(
        {"use": "audio_transformer", "num_mels": 16, "strides": [1, 2], "width": 32, "depth": 2, "mlp_dim": 64}
    )
    ours = config.build().eval()
    copy(ours.conv1.conv, reference.conv1)
    copy(ours.conv2.conv, reference.conv2)
    copy_layers(ours.transformer.blocks, reference.layers, ("self_attn_layer_norm", "final_layer_norm"))
    copy(ours.transformer.final_norm, reference.layer_norm)
    mel = torch.randn(2, 24, 16)
    expected = reference(mel.transpose(1, 2)).last_hidden_state
    found = ours(mel, torch.tensor([24, 24])).x_UND
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_text_transformer_equals_clip() -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    settings = CLIPTextConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=10, eos_token_id=49, bos_token_id=48, pad_token_id=0,
    )  # fmt: skip
    reference = CLIPTextModel(settings).eval()
    shake(reference)
    inner = getattr(reference, "text_model", reference)
    config = ENCODERS.parse(
        {
            "use": "text_transformer", "vocab_size": 50, "max_tokens": 10, "width": 32, "depth": 2, "mlp_dim": 64,
            "causal": True, "pool": "last", "activation": "quick_gelu",
        }
    )  # fmt: skip
    ours = config.build().eval()
    ours.token_embed.weight.data.copy_(inner.embeddings.token_embedding.weight)
    ours.positions.weight.data.copy_(inner.embeddings.position_embedding.weight)
    copy_layers(ours.transformer.blocks, inner.encoder.layers, ("layer_norm1", "layer_norm2"))
    copy(ours.transformer.final_norm, inner.final_layer_norm)
    ids = torch.randint(1, 48, (2, 10))
    ids[0, 9], ids[1, 5] = 49, 49
    theirs = reference(ids)
    found = ours(ids, torch.tensor([10, 6]))
    torch.testing.assert_close(found.x_UND[0], theirs.last_hidden_state[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.pooled_UD, theirs.pooler_output, atol=1e-5, rtol=1e-5)


def test_ragged_convolution_worked_example() -> None:
    conv = RaggedConv(1, 1, 3, stride=2)
    conv.conv.weight.data[:] = torch.tensor([1.0, 10.0, 100.0])
    conv.conv.bias.data.zero_()
    x = torch.tensor([[[1.0], [2.0], [3.0], [9.0], [9.0]]])
    out, lengths = conv(x, torch.tensor([3]))
    assert out[0, :2, 0].tolist() == [210.0, 32.0] and lengths.tolist() == [2]


@pytest.mark.parametrize("use", ["tcn", "text_transformer"])
def test_causal_features_do_not_depend_on_what_follows(use: str) -> None:
    torch.manual_seed(0)
    encoder = ENCODERS.parse({"use": use, "causal": True, **({"stride": 2} if use == "tcn" else {})}).build().eval()
    if use == "tcn":
        values, later = torch.randn(1, 20, 6), 10
        changed = values.clone()
        changed[:, later:] += 1.0
        kept = later // 2
    else:
        values, later = torch.randint(1, 512, (1, 20)), 10
        changed = values.clone()
        changed[:, later:] = 0
        kept = later
    lengths = torch.tensor([20])
    one, other = encoder(values, lengths).x_UND, encoder(changed, lengths).x_UND
    torch.testing.assert_close(one[:, :kept], other[:, :kept], atol=1e-6, rtol=1e-6)
    assert not torch.allclose(one[:, kept:], other[:, kept:])


def test_farthest_points_spread_and_ignore_padding_and_order() -> None:
    corners = torch.tensor([[0.0, 0, 0], [1.2, 0, 0], [0, 1.3, 0], [1.1, 1, 0.5]])
    cloud = torch.cat((corners, corners * 0.1 + 0.45, torch.full((3, 3), 50.0)))[None]
    is_valid = torch.arange(11)[None] < 8
    chosen = farthest_points(cloud, is_valid, 4)
    assert set(chosen[0].tolist()) == {0, 1, 2, 3}
    assert len(set(farthest_points(cloud, is_valid, 8)[0].tolist())) == 8
    order = torch.tensor([5, 2, 7, 0, 3, 1, 6, 4, 8, 9, 10])
    again = order[farthest_points(cloud[:, order], is_valid, 4)[0]]
    assert again.tolist() == chosen[0].tolist()


def test_farthest_points_take_each_duplicate_before_repeating() -> None:
    cloud = torch.zeros(1, 5, 3)
    is_valid = torch.tensor([[True, True, True, False, False]])
    assert sorted(farthest_points(cloud, is_valid, 3)[0].tolist()) == [0, 1, 2]


def test_nearest_points_repeat_the_nearest_where_there_are_too_few() -> None:
    line = torch.tensor([[[0.0, 0, 0], [1, 0, 0], [3, 0, 0], [0.1, 0, 0]]])
    found = nearest_points(line, torch.tensor([[True, True, True, False]]), line[:, :1], 4)
    assert found[0, 0].tolist() == [0, 1, 2, 0]


def test_point_order_changes_nothing() -> None:
    torch.manual_seed(0)
    cloud = torch.randn(1, 40, 6)
    order = torch.randperm(40)
    for use in ("point_groups", "pointnet"):
        encoder = ENCODERS.parse(use).build().eval()
        one, other = encoder(cloud, torch.tensor([40])), encoder(cloud[:, order], torch.tensor([40]))
        torch.testing.assert_close(one.x_UND, other.x_UND, atol=1e-5, rtol=1e-5)


def test_spectrum_puts_a_tone_into_its_band() -> None:
    config = SpectrumConfig(num_channels=2, window=32, hop=32, num_bands=17, width=8)
    encoder = config.build()
    time = torch.arange(64) / 32
    values = torch.stack((torch.sin(2 * torch.pi * 5 * time), torch.sin(2 * torch.pi * 12 * time)), dim=-1)[None]
    bands = encoder.bands(values, torch.tensor([64])).view(1, 2, 2, 17)
    assert bands.argmax(dim=-1)[0].tolist() == [[5, 12], [5, 12]]
    assert not encoder.bands(values, torch.tensor([32]))[:, 1].any()


def test_video_features_stand_frame_by_frame() -> None:
    torch.manual_seed(0)
    frames = torch.randn(1, 4, 3, 32, 32)
    lengths = torch.tensor([4])
    base: dict[str, Any] = {"image_size": 32, "patch_size": 16, "width": 32, "depth": 1, "heads": 2}
    divided = ENCODERS.parse({"use": "tubelet", "attention": "divided", **base, "depth": 2})
    # With time attention silenced, a tubelet encoder's features depend on their own step alone.
    encoder = divided.build().eval()
    nn.init.zeros_(encoder.transformer.blocks[0].attention.out_proj.weight)
    changed = frames.clone()
    changed[:, 2:] += 1.0
    one, other = encoder(frames, lengths).x_UND, encoder(changed, lengths).x_UND
    torch.testing.assert_close(one[:, :4], other[:, :4], atol=1e-6, rtol=1e-6)
    assert not torch.allclose(one[:, 4:], other[:, 4:])
    per_patch = ENCODERS.parse({"use": "frame_temporal", "features": "patch", "temporal_depth": 1, **base}).build()
    nn.init.zeros_(per_patch.temporal.blocks[0].attention.out_proj.weight)
    one, other = per_patch(frames, lengths).x_UND, per_patch(changed, lengths).x_UND
    torch.testing.assert_close(one[:, :8], other[:, :8], atol=1e-6, rtol=1e-6)
    assert not torch.allclose(one[:, 8:], other[:, 8:])


def test_every_second_frame_is_kept_by_its_maximum() -> None:
    x_ULCHW = torch.tensor([[1.0, 4.0, 3.0, 9.0, 5.0]]).view(1, 5, 1, 1, 1)
    whole = pool_pairs(x_ULCHW, torch.ones(1, 5, dtype=torch.bool))
    cut = pool_pairs(x_ULCHW, torch.tensor([[True, True, True, False, False]]))
    assert whole.flatten().tolist() == [4.0, 9.0, 5.0]
    assert cut.flatten().tolist()[:2] == [4.0, 3.0]


@pytest.mark.parametrize("length", [1, 3, 4])
def test_padding_frames_change_no_feature_of_a_small_video_network(length: int) -> None:
    torch.manual_seed(0)
    encoder = CnnTemporalConfig(image_size=16, width=16, stages=2).build().eval()
    shake(encoder)
    video = torch.rand(1, length, 3, 16, 16)
    padded = torch.cat((video, torch.full((1, 5 - length, 3, 16, 16), 7.0)), 1)
    alone, inside = (encoder(values, torch.tensor([length])) for values in (video, padded))
    num_features = encoder.config.num_features(length)
    torch.testing.assert_close(inside.x_UND[:, :num_features], alone.x_UND)
    torch.testing.assert_close(inside.pooled_UD, alone.pooled_UD)
    assert inside.is_valid_UN.sum() == num_features == alone.x_UND.shape[1]


@pytest.mark.parametrize("length", [1, 4])
def test_a_frame_is_mixed_with_the_one_before_and_the_one_after(length: int) -> None:
    torch.manual_seed(0)
    mix = TemporalMix(8).double()
    nn.init.normal_(mix.gain_C)
    x_ULCHW = torch.randn(2, length, 8, 3, 3, dtype=torch.float64)
    is_valid_UL = torch.arange(length) < torch.tensor([[length], [max(1, length - 1)]])
    found = mix(x_ULCHW, is_valid_UL)
    x_ULCHW = x_ULCHW * is_valid_UL[:, :, None, None, None]
    blank = torch.zeros_like(x_ULCHW[:, :1])
    before, after = torch.cat((blank, x_ULCHW[:, :-1]), 1), torch.cat((x_ULCHW[:, 1:], blank), 1)
    around = torch.cat((before, x_ULCHW, after), 2).flatten(0, 1)
    branch = mix.norm(nn.functional.conv2d(around, mix.conv.weight)).relu() * mix.gain_C[:, None, None]
    torch.testing.assert_close(found, x_ULCHW + branch.view_as(x_ULCHW), rtol=1e-12, atol=1e-12)


def test_tubelets_hold_the_pixels_of_their_place() -> None:
    config = ENCODERS.parse({"use": "tubelet", "image_size": 4, "patch_size": 2, "width": 8, "heads": 2})
    encoder = config.build()
    frames = torch.arange(2 * 3 * 16.0).view(1, 2, 3, 4, 4)
    cut = encoder.cut(frames, torch.tensor([2]))
    assert torch.equal(cut[0, 0, 1].view(3, 2, 2, 2), frames[0, :, :, :2, 2:].transpose(0, 1))


def test_separate_channels_do_not_mix() -> None:
    torch.manual_seed(0)
    config = ENCODERS.parse({"use": "sensor_patch", "channels": "separate", "num_channels": 3})
    encoder = config.build().eval()
    values = torch.randn(1, 16, 3)
    changed = values.clone()
    changed[..., 1] += 1.0
    one, other = encoder(values, torch.tensor([16])).x_UND, encoder(changed, torch.tensor([16])).x_UND
    same = (one - other).abs().amax(-1)[0] < 1e-6
    assert same.tolist() == [True, False, True] * 2


def test_dropout_acts_only_while_training() -> None:
    torch.manual_seed(0)
    for use in ("vit", "tcn"):
        encoder = ENCODERS.parse({"use": use, "dropout": 0.5}).build()
        values = torch.randn(1, 3, 64, 64) if use == "vit" else torch.randn(1, 9, 6)
        lengths = ONE if use == "vit" else torch.tensor([9])
        assert not torch.equal(encoder(values, lengths).x_UND, encoder(values, lengths).x_UND)
        encoder.eval()
        assert torch.equal(encoder(values, lengths).x_UND, encoder(values, lengths).x_UND)


def test_conv_stem_halves_at_each_step() -> None:
    stem = ConvStem(8, 32)
    strides = [layer.stride[0] for layer in stem.layers if isinstance(layer, nn.Conv2d)]
    widths = [layer.out_channels for layer in stem.layers if isinstance(layer, nn.Conv2d)]
    assert (strides, widths) == ([2, 2, 2, 1], [8, 16, 32, 32])
    assert stem(torch.randn(1, 3, 24, 24)).shape == (1, 32, 3, 3)


def test_registers_are_read_and_dropped() -> None:
    torch.manual_seed(0)
    encoder = ENCODERS.parse({"use": "vit", "registers": 3, "depth": 1}).build().eval()
    images = torch.randn(1, 3, 64, 64)
    before = encoder(images, ONE).x_UND
    assert before.shape == (1, 64, 128)
    encoder.trunk.registers.data += 1.0
    assert not torch.allclose(before, encoder(images, ONE).x_UND)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use": "vit", "image_size": 30}, "image_size 30 is not a multiple of patch_size 8"),
        ({"use": "vit", "width": 30, "heads": 4}, "width 30 is not a multiple of heads 4"),
        ({"use": "vit", "width": 5, "heads": 1}, "found width 5, expected an even number"),
        ({"use": "vit", "stem": "conv", "patch_size": 16, "width": 20}, "found patch_size 16, width 20"),
        (
            {"use": "vit", "stem": "conv", "patch_size": 12, "image_size": 24},
            "a conv stem needs a patch_size of 2, 4, 8",
        ),
        ({"use": "vit", "layer": -5}, "layer -5 leaves no block of depth 4; expected -4 or above"),
        ({"use": "vit", "positions": "sincos", "width": 6, "heads": 1}, "sincos positions need a width"),
        ({"use": "cnn", "width": 126}, "width 126 cannot be halved 2 times"),
        ({"use": "cnn", "blocks": [1, 0]}, "expected at least 1 in each stage"),
        ({"use": "tubelet", "image_size": 40}, "image_size 40 is not a multiple of patch_size 16"),
        ({"use": "tubelet", "attention": "divided", "depth": 1}, "needs a depth of at least 2, found 1"),
        ({"use": "tubelet", "width": 6, "heads": 1}, "found width 6, expected a multiple of 4"),
        ({"use": "tcn", "depth": 20}, "found depth 20, expected at most 16"),
        ({"use": "spectrum", "num_bands": 18}, "a window of 32 has 17 bins, found 18 bands"),
        ({"use": "spectrum", "hop": 33}, "hop 33 is above window 32"),
        ({"use": "text_transformer", "causal": True, "pool": "cls"}, "found pool cls, expected last or mean"),
        ({"use": "resnext"}, "unknown encoder 'resnext'"),
        ({"use": "vit", "drop_rest": True}, "'drop_rest' belongs to stem: patch and an image_size that is no multiple"),
        ({"use": "vit", "positions": "sincos", "position_grid": 4}, "belong to positions: learned"),
        ({"use": "vit", "position_antialias": True}, "'position_antialias' belongs to a 'position_grid'"),
        ({"use": "vit", "width": 24, "heads": 4, "rope_grid": 4}, "multiple of 4, found 6"),
        ({"use": "vit", "rope_grid": 4, "reduce": {"use": "merge", "per_layer": 1}}, "merged patches do not have"),
        ({"use": "text_transformer", "pool": "eos"}, "'eos_id' belongs to pool: eos"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ENCODERS.parse(settings)


def test_a_text_that_is_too_long_is_refused() -> None:
    encoder = ENCODERS.parse({"use": "text_transformer", "max_tokens": 4}).build()
    with pytest.raises(ConfigError, match="found a text of 5 tokens, expected at most 4"):
        encoder(torch.zeros(1, 5, dtype=torch.int64), torch.tensor([5]))


@pytest.mark.parametrize("causal", [True, False])
def test_a_tcn_reads_as_far_as_its_paper_says(causal: bool) -> None:
    torch.manual_seed(0)
    config = ENCODERS.parse({"use": "tcn", "num_channels": 1, "width": 8, "depth": 3, "stride": 2, "causal": causal})
    values = torch.randn(1, 200, 1, requires_grad=True)
    features = config.build().eval()(values, torch.tensor([200])).x_UND
    (gradient,) = torch.autograd.grad(features[0, 50, 0], values)
    places = gradient[0, :, 0].nonzero()[:, 0]
    assert places[-1] - places[0] + 1 == config.reach == 3 + 2 * 2 * 2 * 7
    assert (places[-1] <= 100) == causal
