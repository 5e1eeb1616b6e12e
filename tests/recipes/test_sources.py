"""``from`` and ``extend`` in recipes: what they fill in, what they keep, and what they say when it cannot be."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import published_parts
import pytest
import torch
import transformers
from models.presets.reference import assert_close

import polymodal as pm
from polymodal.core.errors import CheckpointError, ConfigError, MissingExtraError
from polymodal.core.samples import Sample, conversation
from polymodal.models.weights.assign import without_memory
from polymodal.recipes.assemble import assemble
from polymodal.recipes.loading import dump_recipe, load_recipe


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("published")
    return {name: published_parts.write(name, root / name) for name in ("clip", "llava", "whisper", "vit", "llama")}


def recipe_of(model: dict[str, Any], **more: Any) -> pm.Recipe:
    return load_recipe({"name": "mix", "model": model, **more})


def towers(**streams: Any) -> dict[str, Any]:
    return {"streams": streams, "backbone": "none", "heads": {}}


def seeing(encoder: Any, connector: Any = "linear", width: int = 32) -> dict[str, Any]:
    image = {"modality": "image", "encoder": encoder, "connector": connector, "enters": "merge"}
    head = {"use": "class", "classes": ["red", "green"]}
    return {"streams": {"image": image}, "backbone": {"use": "merge", "width": width}, "heads": {"class": head}}


def test_the_modality_of_a_stream_chooses_among_the_towers_of_a_checkpoint(folders: dict[str, Path]) -> None:
    both = recipe_of(
        towers(
            eyes={"modality": "image", "encoder": {"from": str(folders["clip"])}},
            words={"modality": "text", "encoder": {"from": str(folders["clip"])}},
        )
    )
    found = {path: source.part for path, source in both.sources.items()}
    assert found == {"streams.eyes.encoder": "streams.image.encoder", "streams.words.encoder": "streams.text.encoder"}
    pixels = np.random.default_rng(0).integers(0, 256, (32, 40, 3), dtype=np.uint8)
    model, whole = pm.Model(assemble(both)), pm.load(folders["clip"])
    for part in (pm.Image(pixels), "a red dog"):
        assert np.array_equal(model.features([part])[0].pooled, whole.features([part])[0].pooled)


def test_keys_beside_from_override_single_values(folders: dict[str, Path], tmp_path: Path) -> None:
    backbone = {"from": str(folders["llama"]), "max_tokens": 99, "transformer": {"dropout": 0.25}}
    recipe = recipe_of({"streams": {}, "backbone": backbone})
    theirs = pm.load(folders["llama"]).recipe.model.backbone
    assert recipe.model.backbone.max_tokens == 99
    assert recipe.model.backbone.transformer == theirs.transformer.model_copy(update={"dropout": 0.25})
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "recipe.yaml") == recipe


def test_a_language_model_brings_its_own_head_and_tokenizer(folders: dict[str, Path]) -> None:
    model = pm.Model(assemble(recipe_of({"streams": {}, "backbone": {"from": str(folders["llama"])}})))
    assert set(model.recipe.sources) == {"backbone", "heads.text"} and not model.recipe.model.heads["text"].tied
    assert np.array_equal(model.logits(["What?"]), pm.load(folders["llama"]).logits(["What?"]))


def test_weights_stored_in_half_precision_train_in_single(folders: dict[str, Path], tmp_path: Path) -> None:
    transformers.ViTModel.from_pretrained(folders["vit"]).to(torch.bfloat16).save_pretrained(tmp_path / "half")
    network = assemble(recipe_of(seeing({"from": str(tmp_path / "half")}))).network
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}


@pytest.mark.parametrize("gate", ["tanh", "none"])
def test_a_language_model_learns_to_look_at_pictures(gate: str, folders: dict[str, Path]) -> None:
    image = {"modality": "image", "encoder": {"from": str(folders["clip"])}, "connector": {"use": "perceiver"}}
    enters = {"use": "cross_attention", "gate": gate}
    backbone = {"from": str(folders["llama"])}
    model = pm.Model(assemble(recipe_of({"streams": {"image": {**image, "enters": enters}}, "backbone": backbone})))
    pixels = np.random.default_rng(0).integers(0, 256, (32, 40, 3), dtype=np.uint8)
    seen, blind = model.logits([pm.Image(pixels), "What?"])[-4:], pm.load(folders["llama"]).logits(["What?"])[-4:]
    # A gate starts closed: before training, the language model is what it was.
    assert np.allclose(seen, blind, atol=1e-6) == (gate == "tanh")


def message(model: dict[str, Any], error: type[Exception] = ConfigError) -> str:
    with pytest.raises(error) as caught:
        assemble(recipe_of(model))
    return str(caught.value)


def test_a_part_that_is_not_there_is_named_with_those_that_are(folders: dict[str, Path]) -> None:
    vit, llava = str(folders["vit"]), str(folders["llava"])
    said = message(seeing({"from": vit}, {"from": vit}))
    assert said.startswith(f"streams.image.connector: found no connector for image in {vit}, expected one connector")
    assert "its parts: streams.image.encoder" in said
    said = message(seeing({"from": {"folder": llava, "part": "streams.imgae.encoder"}}))
    assert "unknown part 'streams.imgae.encoder'; did you mean 'streams.image.encoder'" in said and llava in said
    said = message(towers(sound={"modality": "audio", "encoder": {"from": llava}}))
    assert f"streams.sound.encoder: found no encoder for audio in {llava}" in said


def test_several_candidates_are_named(folders: dict[str, Path]) -> None:
    said = message(towers(eyes={"encoder": {"from": str(folders["clip"])}}))
    assert "streams.eyes.encoder: found streams.image.encoder and streams.text.encoder in" in said
    assert said.endswith("Name one: from: {folder: ..., part: ...}")


def test_a_use_that_contradicts_the_checkpoint_is_refused(folders: dict[str, Path]) -> None:
    said = message(seeing({"use": "resnet", "from": str(folders["vit"])}))
    assert said == f"streams.image.encoder: found use: resnet, {folders['vit']} holds 'vit'; leave 'use' out"


def test_a_source_of_another_form_is_refused(folders: dict[str, Path]) -> None:
    said = message(seeing({"from": {"path": str(folders["vit"])}}))
    assert said.startswith("streams.image.encoder.from: found {'path': ")
    assert said.endswith("expected a folder, a hub id or {folder: ..., part: ...}")


def test_a_connector_of_other_widths_is_refused(folders: dict[str, Path]) -> None:
    model = seeing({"from": str(folders["vit"])}, {"from": str(folders["llava"])}, width=16)
    said = message(model, CheckpointError)
    assert "streams.image.connector.stack.layers.0.weight: found shape (32, 32), expected (16, 32)" in said


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    said = message(seeing({"from": str(tmp_path / "none")}), CheckpointError)
    assert said.startswith(f"{tmp_path / 'none'}: there is no such folder; expected one, or a hub id such as")
    assert "./none: there is no such folder" in message(seeing({"from": "./none"}), CheckpointError)
    (tmp_path / "empty").mkdir()
    assert "empty: holds no config.json" in message(seeing({"from": str(tmp_path / "empty")}), CheckpointError)


def test_a_hub_id_without_a_network_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def refuse(name: str) -> str:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    said = message(seeing({"from": "nobody/nothing"}), CheckpointError)
    assert said == "nobody/nothing: is no folder here and could not be fetched: no route to host"
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "huggingface_hub" in message(seeing({"from": "nobody/nothing"}), MissingExtraError)


def test_a_published_model_learns_to_hear_and_sees_and_speaks_as_before(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    data = published_parts.write_media(tmp_path / "media")
    base = shutil.copytree(folders["llava"], tmp_path / "llava")
    audio = {"modality": "audio", "encoder": {"from": str(folders["whisper"])}, "enters": "sequence"}
    stage = {
        "name": "hear", "train": ["streams.audio.connector"], "data": ["audio.jsonl"], "objectives": {"next_token": 1},
        "batch": {"tokens": 300, "buffer": 4}, "steps": 3, "optimizer": {"use": "adamw", "lr": 0.01},
    }  # fmt: skip
    recipe = recipe_of({"streams": {"audio": audio}}, extend=str(base), data_root=str(data), stages=[stage])
    assert list(recipe.model.streams) == ["image", "audio"]
    report = pm.check(recipe)
    assert report.is_ok, report.failed
    pm.train(recipe, tmp_path / "run", quiet=True)
    shutil.rmtree(base)
    old, new = pm.load(folders["llava"]), pm.load(tmp_path / "run")
    picture = pm.Image(data / "0.png")
    for parts in (["What is it?"], [picture, "What?"], [picture, "and", pm.Image(data / "1.png"), "differ how?"]):
        assert np.array_equal(old.logits(parts), new.logits(parts))
        assert old.chat(*parts, max_new_tokens=8).tokens == new.chat(*parts, max_new_tokens=8).tokens
    state = new.network.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in old.network.state_dict().items())
    heard = [pm.Audio(data / "0.wav"), "What is it?"]
    assert new.logits(heard).shape[0] > old.logits(heard[1:]).shape[0]
    assert pm.load(tmp_path / "run").chat(picture, *heard, max_new_tokens=4).finish in ("stop", "length")


def joined(folders: dict[str, Path], tokenizer: dict[str, Any]) -> pm.Model:
    image = {
        "modality": "image",
        "encoder": {"from": str(folders["clip"]), "layer": -2},
        "connector": "mlp",
        "enters": "sequence",
    }
    model = {"streams": {"image": image}, "backbone": {"from": str(folders["llama"])}, "tokenizer": tokenizer}
    return pm.Model(assemble(recipe_of(model)))


def test_a_joined_model_of_a_cut_tower_answers_the_same_in_the_reference(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """The layout stores the whole tower; the reference reads the states before its last block, as we do."""
    model = joined(folders, {"media": "<pad>"})
    picture = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 52, 3), dtype=np.uint8))
    asked = conversation(pm.Image(picture), "What?")
    plan = model.engine.processor.plan(asked, prompt=True)
    assert model.export(tmp_path / "out") == "llava"
    reference, report = transformers.LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    tower, whole = reference.model.vision_tower, transformers.CLIPModel.from_pretrained(folders["clip"]).vision_model
    assert reference.config.vision_feature_layer == -2
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tower.state_dict()[name], tensor), name
    pixels = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")([picture], return_tensors="pt")
    ids = torch.tensor([plan.ids])
    with torch.inference_mode():
        theirs = reference(input_ids=ids, pixel_values=pixels.pixel_values).logits
        # The last block changes nothing: it stands behind what is read.
        for parameter in tower.encoder.layers[-1].parameters():
            parameter.zero_()
        again = reference(input_ids=ids, pixel_values=pixels.pixel_values).logits
    ours = model.logits([pm.Image(picture), "What?"])
    assert_close(ours, theirs[0])
    assert torch.equal(again, theirs)
    assert np.array_equal(pm.load(tmp_path / "out").logits([pm.Image(picture), "What?"]), ours)


def test_a_joined_model_keeps_its_chat_where_the_language_model_knew_of_no_pictures(tmp_path: Path) -> None:
    """Its template takes strings; processors of the layout write lists of parts, and a start token of their own."""
    folders = {name: published_parts.write(name, tmp_path / name) for name in ("clip", "qwen2")}
    image = {"encoder": {"from": str(folders["clip"]), "layer": -2}, "connector": {"use": "mlp"}, "enters": "sequence"}
    data = {"streams": {"image": image}, "backbone": {"from": str(folders["qwen2"])}, "tokenizer": {"media": "<pad>"}}
    model = pm.Model(assemble(recipe_of(data)))
    picture = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 52, 3), dtype=np.uint8))
    history = [pm.Message("user", (pm.Text("Hm?"),)), pm.Message("assistant", (pm.Text("a {b}"),))]
    assert model.export(tmp_path / "out") == "llava"
    loaded = pm.load(tmp_path / "out")
    asked = Sample("asked", (*history, pm.Message("user", (pm.Text("See"), pm.Image(picture), pm.Text("What?")))))
    ids = [one.engine.processor.plan(asked, prompt=True).ids for one in (model, loaded)]
    assert ids[0] == ids[1]
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "out")
    seen = {"type": "image", "image": picture}
    text = [{"role": "user", "content": "Hm?"}, {"role": "assistant", "content": "a {b}"}]
    turn = {"role": "user", "content": [{"type": "text", "text": "See"}, seen, {"type": "text", "text": "What?"}]}
    theirs = processor.apply_chat_template([*text, turn], add_generation_prompt=True, tokenize=True, return_dict=True)
    assert list(theirs["input_ids"][0]) == ids[0]


def test_a_layout_whose_pictures_have_no_token_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"llava: the tokenizer has no control token '<image>' .*media: <unk>"):
        joined(folders, {}).export(tmp_path / "out", "llava")


def test_parts_from_checkpoints_are_built_without_drawing_weights(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[torch.Size] = []
    draw = torch.nn.init.trunc_normal_

    def count(tensor: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        if tensor.device.type != "meta":
            drawn.append(tensor.shape)
        return draw(tensor, *args, **options)

    monkeypatch.setattr(torch.nn.init, "trunc_normal_", count)
    model = assemble(recipe_of(seeing({"from": str(folders["vit"])}))).network
    assert not without_memory(model)
    encoder = {tuple(x.shape) for x in model.streams["image"].encoder.parameters() if x.ndim == 2}
    assert drawn and not {tuple(shape) for shape in drawn} & (encoder - {(32, 32)})
