"""wav2vec 2.0 and HuBERT against the reference library."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

import polymodal as pm
from polymodal.core.errors import ConfigError
from polymodal.models.compose import to_device

from .reference import (
    assert_close,
    assert_missing_is_named,
    assert_published_size,
    assert_same_weights,
    randomise,
    save_reference,
)

transformers = pytest.importorskip("transformers")

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "conv_dim": [16, 16, 24],
    "conv_kernel": [10, 3, 2],
    "conv_stride": [5, 2, 2],
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "vocab_size": 32,
    "mask_time_prob": 0.3,
}
STABLE = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True, "num_conv_pos_embeddings": 7}
ALPHABET = ["<pad>", "<s>", "</s>", "<unk>", "|", "'", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ"]
CASES = [("Wav2Vec2", {}), ("Wav2Vec2", STABLE), ("Hubert", {}), ("Hubert", STABLE)]

cases = pytest.mark.parametrize(
    "family, changes", CASES, ids=["wav2vec2", "wav2vec2-stable", "hubert", "hubert-stable"]
)


def reference_class(family: str, kind: str) -> Any:
    return getattr(transformers, f"{family}{kind}")


def make(folder: Path, family: str, changes: dict[str, Any], kind: str = "Model") -> Path:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SMALL, **changes})
    extractor = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=bool(changes))
    return save_reference(randomise(reference_class(family, kind)(config)), folder, extractor)


def with_tokenizer(folder: Path) -> Any:
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(ALPHABET)}))
    tokenizer = transformers.Wav2Vec2CTCTokenizer(folder / "vocab.json")
    tokenizer.save_pretrained(folder)
    return tokenizer


def sounds(count: int = 3) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.uniform(-0.9, 0.9, 700 + 411 * index).astype(np.float32) for index in range(count)]


def parts(waves: list[np.ndarray]) -> list[pm.Audio]:
    return [pm.Audio(wave, rate_hz=16_000) for wave in waves]


@cases
def test_features_equal_the_reference(tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    folder = make(tmp_path, family, changes)
    model, wave = pm.load(folder), sounds(1)[0]
    extractor = transformers.Wav2Vec2FeatureExtractor.from_pretrained(folder)
    reference = reference_class(family, "Model").from_pretrained(folder)
    with torch.no_grad():
        states = reference(extractor(wave, sampling_rate=16_000, return_tensors="pt").input_values).last_hidden_state
    assert_close(model.features(parts([wave]))[0].features, states)


@cases
def test_a_padded_batch_is_what_each_recording_is_alone(tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    """With an attention mask the reference of the stable form gives the same; the other was never trained with one."""
    folder, waves = make(tmp_path, family, changes, "ForCTC"), sounds()
    model = pm.load(folder)
    extractor = transformers.Wav2Vec2FeatureExtractor.from_pretrained(folder)
    reference = reference_class(family, "ForCTC").from_pretrained(folder)
    processor = model.engine.processor
    samples = [pm.Sample(f"s{index}", views={"audio": part}) for index, part in enumerate(parts(waves))]
    with torch.no_grad():
        ours = model.network(to_device(processor.batch(samples), "cpu"), passes=("ctc",)).ctc
        alone = [reference(extractor(wave, sampling_rate=16_000, return_tensors="pt").input_values) for wave in waves]
        together = reference(
            **extractor(waves, sampling_rate=16_000, padding=True, return_attention_mask=True, return_tensors="pt")
        )
    for row, single in enumerate(alone):
        length = int(ours.lengths[row])
        assert length == single.logits.shape[1]
        assert_close(ours.logits[row, :length], single.logits[0])
        if changes:
            assert_close(ours.logits[row, :length], together.logits[row, :length])


@pytest.mark.parametrize("family", ["Wav2Vec2", "Hubert"])
def test_transcripts_equal_the_reference_from_files(tmp_path: Path, family: str) -> None:
    folder, waves = make(tmp_path / "hub", family, STABLE, "ForCTC"), sounds()
    tokenizer = with_tokenizer(folder)
    files = [tmp_path / f"{index}.wav" for index in range(len(waves))]
    for file, wave in zip(files, waves, strict=True):
        soundfile.write(file, wave, 16_000, subtype="FLOAT")
    extractor = transformers.Wav2Vec2FeatureExtractor.from_pretrained(folder)
    reference = reference_class(family, "ForCTC").from_pretrained(folder)
    with torch.no_grad():
        logits = [reference(extractor(wave, sampling_rate=16_000, return_tensors="pt").input_values) for wave in waves]
    expected = [tokenizer.decode(found.logits[0].argmax(-1)) for found in logits]
    assert len("".join(expected)) > 20
    model = pm.load(folder)
    assert model.transcribe([pm.Audio(file) for file in files], batch_size=2) == expected
    head = model.recipe.model.heads["ctc"]
    assert head.encode("it's a cat".upper()) == tokenizer("IT'S A CAT").input_ids
    assert head.encode("it's a cat") == head.encode("IT'S A CAT")
    assert head.encode("A5") == [ALPHABET.index("A"), ALPHABET.index("<unk>")]


def test_preprocessing_equals_the_reference(tmp_path: Path) -> None:
    make(tmp_path, "Wav2Vec2", {})
    wave = sounds(1)[0]
    extractor = transformers.Wav2Vec2FeatureExtractor.from_pretrained(tmp_path)
    reader = pm.load(tmp_path).engine.processor.streams["audio"].reader
    expected = extractor(wave, sampling_rate=16_000, return_tensors="np").input_values[0]
    assert_close(reader.read(parts([wave])[0]).units[0][:, 0], expected, rel=1e-5)


@cases
@pytest.mark.parametrize("kind", ["Model", "ForCTC"])
def test_export_reloads_there_bit_for_bit(tmp_path: Path, family: str, changes: dict[str, Any], kind: str) -> None:
    folder = make(tmp_path / "in", family, changes, kind)
    if kind == "ForCTC":
        with_tokenizer(folder)
    # Both families are one model to us: which names to write must be said, or the first that fits is taken.
    assert pm.load(folder).export(tmp_path / "out") == family.lower()
    kinds = reference_class(family, kind)
    again, first = (kinds.from_pretrained(tmp_path / name) for name in ("out", "in"))
    assert_same_weights(again, first)
    assert again.config.do_stable_layer_norm == first.config.do_stable_layer_norm
    if kind == "ForCTC":
        tokenizers = [transformers.Wav2Vec2CTCTokenizer.from_pretrained(tmp_path / name) for name in ("in", "out")]
        assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
        assert tokenizers[0].pad_token_id == tokenizers[1].pad_token_id == again.config.pad_token_id


def test_pretraining_checkpoints_give_their_encoder(tmp_path: Path) -> None:
    small = {"codevector_dim": 8, "proj_codevector_dim": 8, "num_codevectors_per_group": 4}
    folder = make(tmp_path, "Wav2Vec2", small, "ForPreTraining")
    wave = sounds(1)[0]
    reference = transformers.Wav2Vec2ForPreTraining.from_pretrained(folder).wav2vec2.eval()
    extractor = transformers.Wav2Vec2FeatureExtractor.from_pretrained(folder)
    with torch.no_grad():
        states = reference(extractor(wave, sampling_rate=16_000, return_tensors="pt").input_values).last_hidden_state
    assert_close(pm.load(folder).features(parts([wave]))[0].features, states)


def test_names_of_older_files_are_read(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = make(tmp_path / "new", "Wav2Vec2", {})
    shutil.copytree(folder, tmp_path / "old")
    tensors = load_file(folder / "model.safetensors")
    stem = "encoder.pos_conv_embed.conv."
    tensors[stem + "weight_g"] = tensors.pop(stem + "parametrizations.weight.original0")
    tensors[stem + "weight_v"] = tensors.pop(stem + "parametrizations.weight.original1")
    del tensors["masked_spec_embed"]
    save_file(tensors, tmp_path / "old" / "model.safetensors")
    part = parts(sounds(1))
    old, new = pm.load(tmp_path / "old").features(part), pm.load(folder).features(part)
    np.testing.assert_array_equal(old[0].features, new[0].features)


def test_what_there_is_no_native_form_of_is_refused(tmp_path: Path) -> None:
    folder = make(tmp_path, "Wav2Vec2", {})
    config = json.loads((folder / "config.json").read_text())
    for change, message in (
        ({"add_adapter": True}, "wav2vec2: found add_adapter: True, expected False"),
        ({"architectures": ["Wav2Vec2ForXVector"]}, r"wav2vec2: found \['Wav2Vec2ForXVector'\], expected one of"),
    ):
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ConfigError, match=message):
            pm.load(folder)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    assert_missing_is_named(make(tmp_path, "Hubert", {}), "encoder.layers.1.attention.k_proj.weight")


@pytest.mark.parametrize(
    "name",
    [
        "wav2vec2-base",
        "wav2vec2-base-960h",
        "wav2vec2-large",
        "wav2vec2-large-960h-lv60",
        "hubert-base-ls960",
        "hubert-large-ll60k",
        "hubert-xlarge-ll60k",
    ],
)
def test_published_sizes_have_their_number_of_parameters(name: str) -> None:
    assert_published_size(name, rows=64)
