"""Recipes with parts of the reference library: from a folder, trained, saved, and read again without that folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from adapter_references import TOWERS, language_model, noisy, save, tower
from small_recipes import stage, write_data
from toys import TEXTS, stream

import polymodal as pm
from polymodal.core.errors import ConfigError
from polymodal.core.parts import Image, Video
from polymodal.core.samples import conversation
from polymodal.modalities.text import train_bpe
from polymodal.models.backbones.transformers_decoder import TransformersDecoder
from polymodal.recipes.assemble import assemble
from polymodal.recipes.loading import dump_recipe, load_recipe
from polymodal.recipes.run import train

_PREPROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": 16, "width": 16},
    "resample": 2,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.4, 0.5, 0.6],
    "image_std": [0.2, 0.25, 0.3],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), 6)


def tower_folder(kind: str, folder: Path, preprocessor: dict[str, Any] | None) -> Path:
    save(tower(kind), folder)
    if preprocessor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder


def recipe_of(root: Path, image: dict[str, Any], backbone: dict[str, Any], *stages: dict[str, Any]) -> dict[str, Any]:
    model = {
        "streams": {"image": image},
        "backbone": backbone,
        "heads": {"answer": {"use": "next_token"}},
        "tokenizer": {"use": "bpe", "vocab_size": 280},
    }
    return {"name": "adapted", "data_root": str(root), "model": model, "stages": list(stages)}


PAIRS = [
    ("ours", "cohere"),
    ("ours", "granite"),
    ("ours", "gemma2"),
    ("ours", "gpt2"),
    ("ours", "opt"),
    ("ours", "mamba"),
    ("resnet", "ours"),
    ("convnext", "ours"),
    ("swin", "gpt_neox"),
    ("siglip2_vision_model", "olmo2"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("eyes", "mind"), PAIRS)
def test_a_model_that_sees_trains_and_answers_the_same_after_reload(
    eyes: str, mind: str, data: Path, tmp_path: Path
) -> None:
    image = stream("image")
    if eyes != "ours":
        size = {"size": {"height": 16, "width": 16}}
        folder = tower_folder(eyes, tmp_path / "eyes", {**_PREPROCESSOR, **size})
        image = {
            "modality": "image",
            "encoder": {"use": "transformers", "from": str(folder)},
            "enters": "sequence",
            "connector": {"use": "mlp"},
        }
    backbone: dict[str, Any] = {
        "use": "decoder",
        "max_tokens": 160,
        "transformer": {"width": 16, "depth": 1, "heads": 2},
    }
    if mind != "ours":
        save(language_model(mind, vocab_size=280), tmp_path / "mind")
        backbone = {"use": "transformers", "from": str(tmp_path / "mind"), "max_tokens": 160}
    tune = stage(data=["captions.jsonl"], batch={"tokens": 320, "buffer": 4}, steps=2, save_every=2)
    recipe = load_recipe(recipe_of(data, image, backbone, tune))
    start = {name: value.clone() for name, value in assemble(recipe).network.state_dict().items()}

    train(recipe, tmp_path / "run", quiet=True)
    for name in ("eyes", "mind"):
        shutil.rmtree(tmp_path / name, ignore_errors=True)
    one, other = pm.load(tmp_path / "run"), pm.load(tmp_path / "run")
    moved = [name for name, value in one.network.state_dict().items() if not torch.equal(value, start[name])]
    assert any(name.startswith("backbone.") for name in moved)
    assert any(".connector." in name for name in moved) and not any(".encoder." in name for name in moved)
    parts = [Image(data / "0.png"), "What is it?", Image(data / "1.png")]
    assert np.array_equal(one.logits(parts), other.logits(parts))
    answer = one.chat(*parts, max_new_tokens=6)
    assert answer.tokens == other.chat(*parts, max_new_tokens=6).tokens
    again = one.chat(*parts, max_new_tokens=6)
    assert again.tokens == answer.tokens and again.reused_tokens > 0

    engine = one.engine
    texts = [conversation("What?"), conversation(Image(data / "0.png"), "What is it?")]
    batched = engine.generate(texts, pm.Sampling(max_new_tokens=5))
    alone = [engine.generate([text], pm.Sampling(max_new_tokens=5))[0] for text in texts]
    assert [generation.ids for generation in batched] == [generation.ids for generation in alone]


def test_a_recipe_fills_in_what_the_folder_says(tmp_path: Path) -> None:
    folder = tower_folder("beit", tmp_path / "beit", _PREPROCESSOR)
    save(language_model("olmo2"), tmp_path / "olmo")
    image = {
        "encoder": {"use": "transformers", "modality": "image", "from": str(folder), "skip": 1},
        "enters": "sequence",
    }
    backbone = {"use": "transformers", "from": str(tmp_path / "olmo"), "chat": "chatml"}
    recipe = load_recipe(recipe_of(tmp_path, image, backbone))
    found = recipe.model.streams["image"]
    assert (found.modality, found.encoder.width, found.encoder.num_features(1)) == ("image", 16, 4)
    assert found.reader.to_data() == {
        **found.reader.to_data(),
        "size_px": 16, "resize": "stretch", "resample": "bilinear", "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3],
    }  # fmt: skip
    assert (recipe.model.backbone.max_tokens, recipe.model.backbone.width, recipe.model.backbone.chat) == (
        256,
        16,
        "chatml",
    )
    assert set(recipe.sources) == {"streams.image.encoder", "backbone"}
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "recipe.yaml") == recipe


def test_pixels_are_prepared_as_the_checkpoint_says(tmp_path: Path) -> None:
    processor = transformers.ViTImageProcessor(
        size={"height": 16, "width": 16}, image_mean=[0.4] * 3, image_std=[0.2] * 3
    )
    folder = save(processor, save(tower("beit"), tmp_path / "beit"))
    recipe = load_recipe(
        {
            "name": "eyes",
            "model": {
                "streams": {"image": {"modality": "image", "encoder": {"use": "transformers", "from": str(folder)}}},
                "backbone": "none",
                "heads": {},
            },
        }
    )
    parts = assemble(recipe)
    pixels = np.random.default_rng(0).integers(0, 256, (23, 31, 3), dtype=np.uint8)
    ours = parts.processor.streams["image"].reader.read(Image(pixels)).units[0]
    theirs = np.asarray(processor(pixels, return_tensors="np")["pixel_values"][0])
    assert np.abs(ours - theirs).max() < 1e-3


def test_vivit_frames_are_moved_down_by_one(tmp_path: Path) -> None:
    steps = {**_PREPROCESSOR, "image_processor_type": "VivitImageProcessor", "do_center_crop": False, "offset": True}
    steps |= {"rescale_factor": 1 / 127.5, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    folder = tower_folder("vivit", tmp_path / "vivit", steps)
    encoder = {"use": "transformers", "from": str(folder)}
    model = {"streams": {"clip": {"modality": "video", "encoder": encoder}}, "backbone": "none", "heads": {}}
    parts = assemble(load_recipe({"name": "clip", "model": model}))
    grey = Video(np.full((4, 16, 16, 3), 51, np.uint8), fps=2.0)
    unit = parts.processor.streams["clip"].reader.read(grey).units[0]
    assert unit.shape == (4, 3, 16, 16) and np.allclose(unit, ((51 / 127.5 - 1) - 0.5) / 0.5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "preprocessor", "message"),
    [
        ("beit", None, "holds no preprocessor_config.json, so that nothing says how image is prepared; write"),
        (
            "beit",
            {**_PREPROCESSOR, "image_processor_type": "OddProcessor", "do_spin": 3},
            "OddProcessor asks for do_spin: 3",
        ),
        (
            "audio-spectrogram-transformer",
            {"feature_extractor_type": "ASTFeatureExtractor"},
            "found 'ASTFeatureExtractor'",
        ),
    ],
)
def test_preprocessing_without_a_reader_is_refused(
    kind: str, preprocessor: dict[str, Any] | None, message: str, tmp_path: Path
) -> None:
    folder = tower_folder(kind, tmp_path / "tower", preprocessor)
    modality, _, _ = TOWERS[kind]
    entry = {"modality": modality, "encoder": {"use": "transformers", "from": str(folder)}}
    model = {"streams": {"it": entry}, "backbone": "none", "heads": {}}
    with pytest.raises(ConfigError, match=message):
        load_recipe({"name": "odd", "model": model})
    reader = {"image": {"use": "image", "size_px": 16}, "audio": {"use": "audio", "num_mels": 16}}[modality]
    written = {"streams": {"it": {**entry, "reader": reader}}, "backbone": "none", "heads": {}}
    assert load_recipe({"name": "even", "model": written}).model.streams["it"].reader.to_data() | reader == (
        load_recipe({"name": "even", "model": written}).model.streams["it"].reader.to_data()
    )


def test_sound_towers_take_the_checkpoints_own_samples(tmp_path: Path) -> None:
    extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=True)
    folder = save(extractor, save(noisy(tower("wavlm")), tmp_path / "wavlm"))
    entry = {"modality": "audio", "encoder": {"use": "transformers", "from": str(folder)}}
    recipe = load_recipe({"name": "ears", "model": {"streams": {"it": entry}, "backbone": "none", "heads": {}}})
    reader: Any = recipe.model.streams["it"].reader
    assert (reader.representation, reader.rate_hz, reader.standardise) == ("wave", 16_000, True)


def test_a_checkpoints_tokenizer_and_chat_template_come_with_its_language_model(tmp_path: Path) -> None:
    train_bpe(TEXTS, 300).save(tmp_path / "words.json")
    ends = dict.fromkeys(("eos_token", "pad_token"), "<|pad|>")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "words.json"), **ends)
    fast.chat_template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    folder = save(fast, save(language_model("olmo2", vocab_size=320), tmp_path / "olmo"))
    image = stream("image", connector="linear")
    data = recipe_of(tmp_path, image, {"use": "transformers", "from": str(folder), "max_tokens": 64})
    del data["model"]["tokenizer"]
    parts = assemble(load_recipe(data))
    assert parts.tokenizer.size == fast.vocab_size and parts.recipe.model.tokenizer.rows == 320
    plan = parts.processor.plan(conversation("What is it?"), prompt=True)
    assert plan.ids == [*fast.encode("What is it?"), fast.eos_token_id]
    reference = language_model("olmo2", vocab_size=320)
    with torch.no_grad():
        theirs = reference(input_ids=torch.tensor([plan.ids]), use_cache=False).logits[0]
    ours = pm.Model(parts).logits(["What is it?"])
    assert np.abs(ours - theirs.numpy()).max() < 1e-5
    greedy = reference.generate(torch.tensor([plan.ids]), max_new_tokens=32, min_new_tokens=32, do_sample=False)
    mine = pm.Model(parts).chat("What is it?", max_new_tokens=32)
    count = len(mine.tokens)
    assert list(mine.tokens) == greedy[0, len(plan.ids) :].tolist()[:count] and count > 4


def test_what_a_folder_replaces_is_built_without_memory(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(language_model("gpt2", vocab_size=280), tmp_path / "mind")
    backbone = {"use": "transformers", "from": str(tmp_path / "mind"), "max_tokens": 160}
    recipe = load_recipe(recipe_of(data, stream("image"), backbone, stage(data=["captions.jsonl"])))
    taken: list[str] = []
    take = TransformersDecoder._take

    def spied(self: TransformersDecoder, model: Any) -> None:
        taken.append(next(model.parameters()).device.type)
        take(self, model)

    monkeypatch.setattr(TransformersDecoder, "_take", spied)
    network = assemble(recipe).network
    assert taken == ["meta", "cpu"], "the folder's model takes the place of one that has no weights"
    assert {tensor.device.type for tensor in network.state_dict().values()} == {"cpu"}
