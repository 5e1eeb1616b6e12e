"""Towers of the reference library as encoders: uniform features, equal to what the tower itself gives."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from adapter_references import TOWERS, language_model, noisy, save, tower

from polymodal.core.errors import CheckpointError, ConfigError
from polymodal.core.limits import Limits
from polymodal.modalities.table import build_reader
from polymodal.models.encoders.table import ENCODERS
from polymodal.models.transformers_library import read_config

CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module", params=TOWERS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A reference tower, and the encoder that its folder became."""
    kind, (modality, _, options) = request.param, TOWERS[request.param]
    reference: Any = tower(kind)
    folder = save(reference, tmp_path_factory.mktemp("tower"))
    data = {"use": "transformers", "modality": modality, "config": read_config(folder), **options}
    config = ENCODERS.parse(data)
    encoder = config.build().eval()
    encoder.load_folder(folder)
    return SimpleNamespace(kind=kind, reference=reference, config=config, ours=encoder)


def units(pair: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Three units, ragged where the tower takes any length; noise stands in the padding."""
    config, generator = pair.config, torch.Generator().manual_seed(0)
    shape = config.unit_shape
    if config.modality == "image":
        return torch.randn(3, *shape, generator=generator), torch.ones(3, dtype=torch.int64)
    lengths = torch.tensor([61, 24, 61]) if config.facts.length is None else torch.full((3,), config.facts.length)
    if config.modality == "text":
        return torch.randint(3, 64, (3, 61), generator=generator), lengths
    return torch.randn(3, int(lengths.max()), *shape, generator=generator), lengths


def squares(image: torch.Tensor, side: int) -> torch.Tensor:
    """NaFlex patches, one by one: row by row, and within one row, column, channel."""
    count = image.shape[1] // side
    cut = [image[:, r * side : (r + 1) * side, c * side : (c + 1) * side] for r in range(count) for c in range(count)]
    return torch.stack([patch.permute(1, 2, 0).flatten() for patch in cut])


def reference_features(pair: Any, unit: torch.Tensor) -> torch.Tensor:
    """What the tower gives for one unit alone, as ``[N, D]``, by rules written out for each architecture."""
    kind, model = pair.kind, pair.reference
    if kind == "siglip2_vision_model":
        grid = math.isqrt(model.config.num_patches)
        inputs = {
            "pixel_values": squares(unit, 4)[None],
            "pixel_attention_mask": torch.ones(1, grid * grid, dtype=torch.int64),
            "spatial_shapes": torch.tensor([[grid, grid]]),
        }
    elif kind in ("data2vec-audio", "wavlm"):
        inputs = {"input_values": unit[None, :, 0]}
    else:
        inputs = {model.main_input_name: unit[None]}
    with torch.no_grad():
        output = model(**inputs, output_hidden_states=kind == "roberta")
    x = output.hidden_states[-2][0] if kind == "roberta" else output.last_hidden_state[0]
    if kind in ("convnext", "resnet", "pvt_v2"):
        return x.flatten(1).t()
    if kind == "patchtst":
        return x.flatten(0, 1)
    return x[{"beit": 1, "vivit": 1, "audio-spectrogram-transformer": 2}.get(kind, 0) :]


def test_features_are_the_towers_own_and_as_many_as_promised(pair: Any) -> None:
    values, lengths = units(pair)
    with torch.no_grad():
        out = pair.ours(values, lengths)
    counts = [pair.config.num_features(length) for length in lengths.tolist()]
    assert out.is_valid_UN.sum(1).tolist() == counts
    assert out.x_UND.shape == (3, max(counts), pair.config.width)
    assert out.pooled_UD.shape == (3, pair.config.pooled_width)
    for row, length in enumerate(lengths.tolist()):
        unit = values[row] if pair.config.modality == "image" else values[row, :length]
        torch.testing.assert_close(out.x_UND[row, : counts[row]], reference_features(pair, unit), **CLOSE)
        assert not out.x_UND[row, counts[row] :].any()


def test_number_of_features_is_exact_for_every_length(pair: Any) -> None:
    if pair.config.facts.length is not None or pair.config.modality == "image":
        pytest.skip("units of one size")
    values, _ = units(pair)
    for length in (*range(1, 48, 3), 60, 61):
        with torch.no_grad():
            out = pair.ours(values[:1, :length], torch.tensor([length]))
        assert out.x_UND.shape[1] == pair.config.num_features(length), length


def test_the_default_reader_makes_its_units_and_the_config_goes_out_and_comes_back(pair: Any) -> None:
    reader: Any = build_reader(pair.config.default_reader(), Limits(), tokenizer=SimpleNamespace())  # type: ignore[arg-type]
    assert reader.modality == pair.config.modality and reader.unit_shape == pair.config.unit_shape
    again: Any = ENCODERS.parse(pair.config.to_data())
    assert again == pair.config
    copy = again.build().eval()
    copy.load_state_dict(pair.ours.state_dict())
    values, lengths = units(pair)
    with torch.no_grad():
        assert torch.equal(copy(values, lengths).x_UND, pair.ours(values, lengths).x_UND)


def test_it_trains_alike_with_and_without_checkpointing(pair: Any) -> None:
    values, lengths = units(pair)
    gradients = []
    for is_on in (False, True):
        pair.ours.checkpointing = is_on
        pair.ours.train().zero_grad(set_to_none=True)
        torch.manual_seed(0)
        if pair.config.modality == "audio":
            pair.ours.model.config.apply_spec_augment = False  # draws its masks from numpy
        pair.ours(values, lengths).x_UND.square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in pair.ours.named_parameters() if p.grad is not None})
    pair.ours.checkpointing = False
    pair.ours.eval()
    plain, recomputed = gradients
    assert len(plain) > 4 and plain.keys() == recomputed.keys()
    if pair.kind != "resnet":  # running statistics move with every pass
        for name, gradient in plain.items():
            torch.testing.assert_close(recomputed[name], gradient, rtol=1e-3, atol=1e-3)


def encoder_of(kind: str, **options: Any) -> Any:
    modality, config, own = TOWERS[kind]
    data = {"use": "transformers", "modality": modality, "config": {"model_type": kind, **config}}
    return ENCODERS.parse({**data, **own, **options})


def test_pooled_vectors_are_what_was_asked_for() -> None:
    own, mean, first = (encoder_of("beit", pool=pool) for pool in (None, "mean", "first"))
    assert [config.facts.pool for config in (own, mean, first)] == ["own", "mean", "first"]
    images, ones = torch.randn(2, 3, 16, 16), torch.ones(2, dtype=torch.int64)
    for config in (own, mean, first):
        torch.manual_seed(0)
        encoder = config.build().eval()
        with torch.no_grad():
            out, whole = encoder(images, ones), encoder.model(pixel_values=images)
        wanted = {"own": whole.pooler_output, "mean": out.x_UND.mean(1), "first": whole.last_hidden_state[:, 0]}
        torch.testing.assert_close(out.pooled_UD, wanted[config.facts.pool], **CLOSE)


def test_short_videos_end_with_their_last_frame_and_longer_units_are_refused() -> None:
    encoder = encoder_of("vivit").build().eval()
    video = torch.randn(1, 4, 3, 16, 16)
    with torch.no_grad():
        short = encoder(video[:, :2], torch.tensor([2])).x_UND
        filled = encoder(video[:, [0, 1, 1, 1]], torch.tensor([4])).x_UND
        padded = encoder(video, torch.tensor([2])).x_UND
    assert torch.equal(short, filled) and torch.equal(padded, filled)
    with pytest.raises(ConfigError, match="found a unit of length 8, this tower takes 4; set the reader's num_frames"):
        encoder(video.repeat(1, 2, 1, 1, 1), torch.tensor([8]))


@pytest.mark.parametrize(
    ("kind", "modality", "part"), [("siglip2", "image", "vision_model"), ("whisper", "audio", "encoder")]
)
def test_one_tower_of_several_is_taken(kind: str, modality: str, part: str, tmp_path: Path) -> None:
    if kind == "siglip2":
        text = {**dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0), "vocab_size": 64}
        sizes: dict[str, Any] = TOWERS["siglip2_vision_model"][1]
        wide = {key: value for key, value in sizes.items() if key not in ("patch_size", "num_patches")}
        settings = transformers.Siglip2Config(vision_config=sizes, text_config={**wide, **text})
    else:
        layers = {"encoder_layers": 2, "decoder_layers": 1, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
        heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 64, "d_model": 16}
        ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"), 0)
        settings = transformers.WhisperConfig(**layers, **heads, **ids, max_source_positions=12, num_mel_bins=8)
    reference = noisy(transformers.AutoModel.from_config(settings))
    folder = save(reference, tmp_path)
    config = ENCODERS.parse({"use": "transformers", "modality": modality, "config": part_config(folder, modality)})
    encoder = config.build().eval()
    encoder.load_folder(folder)
    theirs = reference.get_submodule(part).state_dict()
    ours = {name.removeprefix("vision_model."): value for name, value in encoder.model.state_dict().items()}
    theirs = {name.removeprefix("vision_model."): value for name, value in theirs.items()}
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def part_config(folder: Path, modality: str) -> dict[str, Any]:
    from polymodal.models.encoders.transformers_tower import part_config

    return part_config(read_config(folder), modality)


def test_what_it_cannot_do_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown output of the tower 'last_state'; did you mean 'last_hidden_state'"):
        encoder_of("beit", output="last_state")
    with pytest.raises(ConfigError, match="layer -9: the tower gives 3 hidden states"):
        encoder_of("beit", layer=-9)
    with pytest.raises(ConfigError, match="skip: found 9, the tower gives 5 tokens"):
        encoder_of("beit", skip=9)
    with pytest.raises(ConfigError, match="pool: own: the tower gives no pooled vector of width 16"):
        encoder_of("wavlm", pool="own")
    with pytest.raises(ConfigError, match=r"vivit does not take video units of length 4 and shape .* say size_px or"):
        encoder_of("vivit", size_px=12)
    folder = save(language_model("phi3"), tmp_path)
    with pytest.raises(CheckpointError, match=r"tensor\(s\) missing"):
        encoder_of("beit").build().load_folder(folder)
