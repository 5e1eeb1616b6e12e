"""What every encoder promises, over every entry of the table: a new encoder is tested by existing.

Entries are built from their defaults, which are small; ``VARIANTS`` adds the settings that change a tensor's way.
"""

from typing import Any

import pytest
import torch
from gradients import assert_reach_all_but_frozen
from torch import Tensor

from polymodal.core.errors import ConfigError
from polymodal.core.limits import Limits
from polymodal.modalities.table import build_reader
from polymodal.models.encoders import ENCODERS, Encoder, EncoderConfig

_LAYERS = {"encoder_layers": 1, "encoder_ffn_dim": 24, "encoder_attention_heads": 2, "d_model": 16, "dropout": 0.0}
_IDS = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"), 0)
MAPS = {"model_type": "convnext", "hidden_sizes": [8, 12], "depths": [1, 1], "num_stages": 2, "patch_size": 4}
SPECTRA = {
    "model_type": "speech_to_text",
    **_LAYERS,
    **_IDS,
    "decoder_layers": 1,
    "decoder_ffn_dim": 8,
    "decoder_attention_heads": 2,
    "vocab_size": 8,
    "input_feat_per_channel": 8,
    "conv_channels": 16,
}
VARIANTS: list[dict[str, Any]] = [
    {"use": "vit", "stem": "conv", "registers": 2, "pool": "cls", "layer": -2},
    {"use": "vit", "positions": "sincos", "pool": "cls", "embed_norm": True, "patch_bias": False},
    {"use": "cnn", "image_size": 30, "blocks": [2, 1]},
    {"use": "audio_transformer", "strides": [1, 2]},
    {"use": "audio_conv1d", "strides": [4, 1], "kernel": 4},
    {"use": "wav2vec2", "conv_dims": [8, 8], "conv_kernels": [3, 2], "conv_strides": [2, 1], "position_kernel": 3},
    {
        "use": "wav2vec2",
        "conv_dims": [8],
        "conv_kernels": [2],
        "conv_strides": [1],
        "conv_norm": "layer",
        "pre_norm": True,
    },
    {"use": "htsat", "fused": True, "depths": [1, 2]},
    {"use": "bind_image", "channels": 1, "frames": 2, "stem_norm": True, "extra_key": True, "depth": 1},
    {"use": "bind_video", "image_size": 32, "embed_norm": True, "depth": 1},
    {"use": "bind_audio", "extra_key": True, "stem_norm": True, "depth": 1},
    {"use": "bind_sensor", "extra_key": True, "stem_norm": True, "depth": 1},
    {"use": "frame_temporal", "features": "patch", "image_size": 32, "pool": "cls"},
    {"use": "tubelet", "attention": "divided", "image_size": 32, "tubelet_size": 3},
    {"use": "tubelet", "positions": "sequence", "key_bias": False, "norm": "pooled", "pool": "first"},
    {"use": "space_time", "attention": "joint", "image_size": 32, "embed_norm": True, "patch_bias": False},
    {"use": "space_time", "attention": "messages", "image_size": 32, "features": "frames", "final_norm": False},
    {"use": "point_groups", "colour": False, "num_groups": 4, "group_size": 3},
    {"use": "point_groups", "embedding": "published", "centres": "every_block", "pool": "cls_max", "qkv_bias": False},
    {"use": "pointnet_aligned", "align": False, "colour": True, "whole": []},
    {"use": "patchtst", "num_channels": 2, "norm": "layer", "positions": "learned", "pool": "channels"},
    {"use": "i3d", "kernels": "2d", "time_padding": "edge", "norm_gain": True, "image_size": 40},
    {"use": "pointnet", "colour": False, "hidden": []},
    {"use": "sensor_patch", "channels": "separate", "num_channels": 3},
    {"use": "tcn", "causal": True, "stride": 1, "kernel": 2},
    {"use": "spectrum", "window": 9, "hop": 9, "num_bands": 5},
    {"use": "text_transformer", "causal": True, "pool": "last"},
    {"use": "text_transformer", "pool": "cls"},
    {"use": "patches", "patch_size": 2, "grid": 3, "cls": True},
    {"use": "embedding", "positions": False, "segments": 2, "norm": True},
    {"use": "transformers", "modality": "image", "config": MAPS, "size_px": 16},
    {"use": "transformers", "modality": "audio", "config": SPECTRA},
]
CASES = [{"use": name} for name in ENCODERS if name != "transformers"] + VARIANTS  # the adapter has no default tower
LENGTHS = (7, 1, 12, 2, 5)

cases = pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(value) for value in case.values()))


def make(case: dict[str, Any]) -> tuple[EncoderConfig, Encoder]:
    torch.manual_seed(0)
    config = ENCODERS.parse(case)
    return config, config.build().eval()


def fixed(config: EncoderConfig) -> bool:
    """Whether all units are of one size: whole pictures, not their patches."""
    return config.modality == "image" and len(config.unit_shape) == 3


def units(config: EncoderConfig, lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    if fixed(config):
        return [torch.randn(config.unit_shape, generator=generator) for _ in lengths]
    if config.modality == "text":
        return [torch.randint(config.vocab_size, (length,), generator=generator) for length in lengths]
    return [torch.randn(length, *config.unit_shape, generator=generator) for length in lengths]


def collate(config: EncoderConfig, inputs: list[Tensor], extra: int = 0) -> tuple[Tensor, Tensor]:
    """Units with zero padding, as the processor makes them."""
    if fixed(config):
        return torch.stack(inputs), torch.ones(len(inputs), dtype=torch.int64)
    lengths = [len(unit) for unit in inputs]
    values = torch.zeros(len(inputs), max(lengths) + extra, *inputs[0].shape[1:], dtype=inputs[0].dtype)
    for row, unit in enumerate(inputs):
        values[row, : len(unit)] = unit
    return values, torch.tensor(lengths)


def lengths_of(config: EncoderConfig) -> tuple[int, ...]:
    return (1,) * len(LENGTHS) if fixed(config) else LENGTHS


@cases
def test_counts_shapes_and_masks_are_exact(case: dict[str, Any]) -> None:
    config, encoder = make(case)
    with torch.no_grad():
        out = encoder(*collate(config, units(config)))
    counts = [config.num_features(length) for length in lengths_of(config)]
    assert out.is_valid_UN.dtype == torch.bool
    assert out.is_valid_UN.sum(1).tolist() == counts
    assert out.x_UND.shape == (len(LENGTHS), max(counts), config.width)
    assert out.pooled_UD.shape == (len(LENGTHS), config.pooled_width)
    for row, count in enumerate(counts):
        assert out.is_valid_UN[row, :count].all()  # valid ones come first
        assert not out.x_UND[row, count:].any()
    assert out.x_UND.isfinite().all() and out.pooled_UD.isfinite().all()


@cases
def test_weights_in_bfloat16_compute_the_same_within_rounding(case: dict[str, Any]) -> None:
    config, encoder = make(case)
    values, lengths = collate(config, units(config))
    if values.is_floating_point():
        values = values.bfloat16().float()
    with torch.no_grad():
        exact = encoder(values, lengths)
        encoder.to(torch.bfloat16)
        out = encoder(values.to(encoder.dtype) if values.is_floating_point() else values, lengths)
    assert torch.equal(out.is_valid_UN, exact.is_valid_UN)
    moved = (out.x_UND.float() - exact.x_UND).norm() / exact.x_UND.norm()
    assert moved < 0.1, moved


@cases
def test_num_features_is_exact_for_every_length(case: dict[str, Any]) -> None:
    config, encoder = make(case)
    for length in range(1, 3 if fixed(config) else 26):
        with torch.no_grad():
            out = encoder(*collate(config, units(config, (length,))))
        assert out.x_UND.shape[1] == config.num_features(1 if fixed(config) else length), length


@cases
def test_padding_order_and_neighbours_do_not_matter(case: dict[str, Any]) -> None:
    config, encoder = make(case)
    inputs = units(config)
    with torch.no_grad():
        together = encoder(*collate(config, inputs))
        reverse = encoder(*collate(config, inputs[::-1], extra=5))
        for row, unit in enumerate(inputs):
            alone = encoder(*collate(config, [unit]))
            count = alone.x_UND.shape[1]
            for out, place in ((together, row), (reverse, len(inputs) - 1 - row)):
                torch.testing.assert_close(out.x_UND[place, :count], alone.x_UND[0], atol=1e-5, rtol=1e-5)
                torch.testing.assert_close(out.pooled_UD[place], alone.pooled_UD[0], atol=1e-5, rtol=1e-5)


@cases
def test_what_stands_in_the_padding_is_never_read(case: dict[str, Any]) -> None:
    config, encoder = make(case)
    if fixed(config):
        pytest.skip("images have no padding")
    values, lengths = collate(config, units(config))
    dirty = values.clone()
    for row, length in enumerate(lengths.tolist()):
        dirty[row, length:] = 1 if config.modality == "text" else 1e3
    with torch.no_grad():
        clean_out, dirty_out = encoder(values, lengths), encoder(dirty, lengths)
    torch.testing.assert_close(dirty_out.x_UND, clean_out.x_UND, atol=1e-5, rtol=1e-5)


@cases
def test_every_trainable_parameter_learns_and_no_frozen_one(case: dict[str, Any]) -> None:
    config, encoder = make(case)
    encoder.train()
    values, lengths = collate(config, units(config))
    weights = torch.Generator().manual_seed(1)

    def backward() -> None:
        out = encoder(values, lengths)
        loss = (out.x_UND * torch.randn(out.x_UND.shape, generator=weights)).sum()
        (loss + (out.pooled_UD * torch.randn(out.pooled_UD.shape, generator=weights)).sum()).backward()

    assert_reach_all_but_frozen(encoder, backward)


@cases
def test_the_same_seed_gives_the_same_module_and_the_same_result(case: dict[str, Any]) -> None:
    (config, one), (_, other) = make(case), make(case)
    batch = collate(config, units(config))
    with torch.no_grad():
        first, again, twin = one(*batch), one(*batch), other(*batch)
    assert torch.equal(first.x_UND, again.x_UND) and torch.equal(first.x_UND, twin.x_UND)
    assert torch.equal(first.pooled_UD, twin.pooled_UD)


@cases
def test_weights_and_config_go_out_and_come_back(case: dict[str, Any]) -> None:
    config, encoder = make(case)
    torch.manual_seed(1)
    again = ENCODERS.parse(config.to_data())
    assert again == config
    copy = again.build().eval()
    copy.load_state_dict(encoder.state_dict())
    batch = collate(config, units(config))
    with torch.no_grad():
        assert torch.equal(copy(*batch).x_UND, encoder(*batch).x_UND)


@cases
def test_the_default_reader_makes_the_units_that_the_encoder_takes(case: dict[str, Any]) -> None:
    config = ENCODERS.parse(case)
    reader = config.default_reader()
    assert reader.modality == config.modality
    assert build_reader(reader, Limits(), tokenizer=None).unit_shape == config.unit_shape


@cases
def test_units_of_another_shape_are_refused(case: dict[str, Any]) -> None:
    config, encoder = make(case)
    values, lengths = collate(config, units(config))
    wrong = torch.cat((values, values), dim=-1) if values.dim() > 2 else values[..., None]
    with pytest.raises(ConfigError, match=r"found units of shape .* make the encoder's config and its reader's agree"):
        encoder(wrong, lengths)
