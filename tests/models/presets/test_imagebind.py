"""ImageBind: the published shapes, names that go out and come back, and a small model that learns to bind.

No reference library has it, so its blocks are compared with PyTorch's own attention and its sizes with the published
checkpoint's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from toys import build

import polymodal as pm
from polymodal.core.errors import ConfigError
from polymodal.core.parts import Audio, Image, Sensor, Video
from polymodal.models.compose import ModelConfig, MultimodalModel
from polymodal.models.presets import find_size
from polymodal.models.presets.architecture import Vocabulary
from polymodal.models.presets.imagebind import IMAGEBIND
from polymodal.models.weights import HubConfigs
from polymodal.models.weights.assign import no_weights, num_parameters, wanted_names
from polymodal.objectives.infonce import InfoNCE

from .clip_tokenizer import clip_tokenizer

TINY: dict[str, Any] = {
    "model_type": "imagebind",
    "out_embed_dim": 16,
    "image_size": 16,
    "vision": {"width": 16, "depth": 1, "heads": 2, "patch_size": 8},
    "text": {"width": 16, "depth": 1, "heads": 2, "vocab_size": 300, "context_length": 12},
    "audio": {"width": 16, "depth": 1, "heads": 2, "patch_size": 8, "stride": 5, "num_mels": 16, "frames": 24},
    "depth": {"width": 16, "depth": 1, "heads": 2, "patch_size": 8},
    "thermal": {"width": 16, "depth": 1, "heads": 2, "patch_size": 8},
    "imu": {"width": 16, "depth": 1, "heads": 2, "patch_size": 8, "num_channels": 2, "num_samples": 64},
}
PUBLISHED_SHAPES = {
    "modality_preprocessors.vision.rgbt_stem.proj.1.weight": (1280, 3, 2, 14, 14),
    "modality_preprocessors.vision.pos_embedding_helper.pos_embed": (1, 257, 1280),
    "modality_preprocessors.text.pos_embed": (1, 77, 1024),
    "modality_preprocessors.text.token_embedding.weight": (49408, 1024),
    "modality_preprocessors.audio.rgbt_stem.proj.weight": (768, 1, 16, 16),
    "modality_preprocessors.audio.pos_embedding_helper.pos_embed": (1, 229, 768),
    "modality_preprocessors.depth.depth_stem.proj.weight": (384, 1, 16, 16),
    "modality_preprocessors.depth.depth_stem.norm_layer.weight": (384,),
    "modality_preprocessors.thermal.pos_embedding_helper.pos_embed": (1, 197, 768),
    "modality_preprocessors.imu.imu_stem.proj.weight": (512, 48),
    "modality_preprocessors.imu.pos_embed": (1, 251, 512),
    "modality_trunks.vision.pre_transformer_layer.0.weight": (1280,),
    "modality_trunks.vision.blocks.31.attn.in_proj_weight": (3840, 1280),
    "modality_trunks.text.blocks.23.mlp.fc1.weight": (4096, 1024),
    "modality_trunks.audio.blocks.11.attn.bias_k": (1, 1, 768),
    "modality_trunks.imu.blocks.5.mlp.fc2.weight": (512, 2048),
    "modality_heads.vision.2.weight": (1024, 1280),
    "modality_heads.text.proj.1.weight": (1024, 1024),
    "modality_heads.imu.3.weight": (1024, 512),
    "modality_postprocessors.text.1.log_logit_scale": (),
}


def test_the_published_model_has_its_shapes_and_its_number_of_parameters() -> None:
    architecture, size = find_size("imagebind-huge")
    model = architecture.model(HubConfigs(size.config))
    with no_weights():
        network = MultimodalModel(model, 49_408)
    assert num_parameters(network) == size.parameters == 1_200_781_057
    state, table = network.state_dict(), architecture.names(model, ())
    stored = table.save({name: state[name] for name in wanted_names(network)}, "imagebind")
    found = {name: tuple(stored[name].shape) for name in PUBLISHED_SHAPES}
    assert found == PUBLISHED_SHAPES
    head = network.heads["projection"]
    scales = {name: head.config.output_scales.get(name) for name in ("image", "audio", "depth", "thermal", "imu")}
    assert scales == {"image": None, "audio": 20.0, "depth": 5.0, "thermal": 10.0, "imu": 5.0}
    assert model.streams["audio"].encoder.num_features(204) == 228
    assert model.streams["audio"].reader.clip == 32_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint under the published names."""
    path = tmp_path_factory.mktemp("imagebind")
    words = clip_tokenizer(12)
    words.save_pretrained(path)
    config = {**TINY, "text": {**TINY["text"], "vocab_size": len(words)}}
    model = IMAGEBIND.model(HubConfigs(config))
    torch.manual_seed(0)
    network = MultimodalModel(model, len(words))
    state = network.state_dict()
    stored = IMAGEBIND.names(model, ()).save({name: state[name] for name in wanted_names(network)}, "imagebind")
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    return path


def things(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "image": Image(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)),
        "audio": Audio(rng.uniform(-0.5, 0.5, 3_000).astype(np.float32), rate_hz=16_000),
        "imu": Sensor(rng.normal(size=(40, 2)).astype(np.float32), rate_hz=10.0),
    }


def test_a_folder_of_published_names_loads_and_goes_back_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    model = pm.load(folder)
    picture = things()["image"]
    as_seen, as_depth = model.embed([picture], stream="image"), model.embed([picture], stream="depth")
    assert as_seen.shape == (1, 16) and np.abs(as_seen - as_depth).max() > 0.05
    np.testing.assert_array_equal(model.embed([picture]), as_seen)
    assert model.export(tmp_path / "out") == "imagebind"
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_still_picture_is_a_clip_that_does_not_move(folder: Path) -> None:
    model = pm.load(folder)
    pixels = np.asarray(things()["image"].source)
    still = model.embed([Image(pixels)])
    clip = model.embed([Video(np.stack([pixels] * 2), fps=2.0)])
    moving = model.embed([Video(np.stack([pixels, pixels[::-1]]), fps=2.0)])
    np.testing.assert_allclose(clip, still, atol=1e-5)
    assert np.abs(moving - still).max() > 1e-3
    streams = model.network.streams
    assert streams["video"].encoder.trunk is streams["image"].encoder.trunk


def test_a_pair_is_scaled_by_both_of_its_modalities(folder: Path) -> None:
    head = pm.load(folder).network.heads["projection"]
    assert float(head.pair_scale("image", "audio")) == 20.0
    assert float(head.pair_scale("depth", "thermal")) == 50.0
    assert float(head.pair_scale("image", "video")) == 1.0
    torch.testing.assert_close(head.pair_scale("text", "imu"), 5 * head.log_scales["text"].exp())


def bound_samples(count: int, seed: int) -> list[pm.Sample]:
    """Things of four kinds, told by each modality on its own; a view is an image and one other modality."""
    rng = np.random.default_rng(seed)
    samples = []
    for index in range(count):
        kind = index % 4
        pixels = rng.integers(0, 60, (16, 16, 3), dtype=np.uint8)
        pixels[..., kind % 3] += np.uint8(180 if kind < 3 else 0)
        depth = rng.integers(0, 60, (16, 16), dtype=np.uint8)
        row, column = np.indices((16, 16))
        depth += np.uint8(180) * (row % 2, column % 2, (row + column) % 2, row // 4 % 2)[kind].astype(np.uint8)
        place = np.arange(3_000)
        wave = 0.4 * np.sin(place * (0.1 + 0.3 * kind)) + rng.normal(0, 0.02, 3_000)
        motion = np.zeros((40, 2)) + rng.normal(0, 0.1, (40, 2))
        motion[:, kind % 2] += 1.0 if kind < 2 else -1.0
        views = {
            "image": Image(pixels),
            "audio": Audio(wave.astype(np.float32), rate_hz=16_000),
            "depth": Image(np.stack([depth] * 3, axis=-1)),
            "sensor": Sensor(motion.astype(np.float32), rate_hz=10.0),
        }
        samples.append(pm.Sample(f"s{index}", views=views, label=str(kind)))
    return samples


def test_modalities_that_were_never_paired_bind_through_images() -> None:
    """Trained on image-X pairs alone, sounds find the depth pictures and the motions of their kind."""
    data = IMAGEBIND.model(HubConfigs(TINY)).to_data()
    kept = ("image", "audio", "depth", "imu")
    head = data["heads"]["projection"]
    head |= {"streams": kept, "shared": {}, "output_scales": {name: 10.0 for name in kept[1:]}}
    data["streams"] = {name: data["streams"][name] for name in kept}
    toy = build(ModelConfig.parse(data).to_data())
    train, test = bound_samples(64, 1), bound_samples(32, 2)
    batches = [toy.batch(train[start : start + 16]) for start in range(0, 64, 16)]
    objective = InfoNCE(pairs=(("image", "audio"), ("image", "depth"), ("image", "imu")), same_label="positive")
    optimizer = torch.optim.AdamW(toy.network.parameters(), lr=2e-3)
    toy.network.train()
    for step in range(32):
        loss = objective(toy.network(batches[step % 4], passes=("embed",)), batches[step % 4]).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    toy.network.eval()
    with torch.no_grad():
        found = toy.network(toy.batch(test), passes=("embed",)).embeddings
    kinds = torch.tensor([int(sample.label or 0) for sample in test])
    for first, second in (("audio", "depth"), ("imu", "audio"), ("depth", "imu")):
        nearest = (found[first][0] @ found[second][0].T).argmax(dim=1)
        hits = (kinds[nearest] == kinds).float().mean()
        assert hits > 0.9, f"{first} finds {second} in {hits:.2f} of cases; chance is 0.25"


def test_texts_are_read_up_to_their_end_token(folder: Path) -> None:
    model = pm.load(folder)
    vectors = model.embed(["a red dog", "a cat", "a red dog on the grass and more words that are cut"])
    assert vectors.shape == (3, 16)
    np.testing.assert_allclose(model.embed(["a cat"])[0], vectors[1], atol=1e-6)
    encoder, end = model.network.streams["text"].encoder, clip_tokenizer(12).eos_token_id
    ids = torch.tensor([[5, 9, end, 7], [5, 9, end, 8]])
    with torch.no_grad():
        out = encoder(ids, torch.tensor([4, 4]))
    torch.testing.assert_close(out.pooled_UD[0], out.pooled_UD[1])


def test_other_models_are_not_exported_as_imagebind(folder: Path, tmp_path: Path) -> None:
    model = IMAGEBIND.model(HubConfigs(TINY))
    data = model.to_data()
    del data["streams"]["video"], data["heads"]["projection"]["shared"]["video"]
    data["heads"]["projection"]["streams"] = [name for name in data["streams"]]
    with pytest.raises(ConfigError, match="imagebind: found the streams"):
        IMAGEBIND.to_hub(ModelConfig.parse(data), Vocabulary(300))
