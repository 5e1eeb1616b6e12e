"""Whisper against the reference library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import tokenizers
import torch

import polymodal as pm
from polymodal.core.errors import ConfigError
from polymodal.core.samples import conversation
from polymodal.inference.sampling import Sampling
from polymodal.models.compose import MultimodalModel, to_device
from polymodal.models.presets import find_size
from polymodal.models.weights import HubConfigs
from polymodal.models.weights.assign import no_weights, num_parameters

from .reference import assert_close, assert_missing_is_named, assert_same_weights, randomise, save_reference

transformers = pytest.importorskip("transformers")

WORDS = [*"abcdefghijklmnopqrstuvwxyz", *(f"word{n}" for n in range(40))]
CONTROLS = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|de|>", "<|yue|>", "<|translate|>", "<|transcribe|>"]
TIMES = ["<|notimestamps|>", *(f"<|{0.02 * n:.2f}|>" for n in range(101))]
RATE = 16_000


def write_tokenizer(folder: Path) -> Any:
    """A word-level tokenizer with Whisper's control tokens, which are special, and times, which are not."""
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(["<unk>", *WORDS])}, unk_token="<unk>")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.add_special_tokens([*CONTROLS, "<|notimestamps|>"])
    backend.add_tokens([tokenizers.AddedToken(name, special=False) for name in TIMES[1:]])
    words = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|endoftext|>", unk_token="<unk>"
    )
    words.save_pretrained(folder)
    return words


def make(folder: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    words = write_tokenizer(folder)
    id_of = words.convert_tokens_to_ids
    config = transformers.WhisperConfig(
        vocab_size=len(words), d_model=32, encoder_layers=2, decoder_layers=3, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=56, num_mel_bins=20, max_source_positions=100,
        max_target_positions=60, bos_token_id=id_of("<|endoftext|>"), eos_token_id=id_of("<|endoftext|>"),
        pad_token_id=id_of("<|endoftext|>"), decoder_start_token_id=id_of("<|startoftranscript|>"), **changes,
    )  # fmt: skip
    torch.manual_seed(0)
    model = randomise(transformers.WhisperForConditionalGeneration(config))
    with torch.no_grad():
        # Enough for greedy words to depend on what is heard.
        for name, parameter in model.named_parameters():
            if "decoder.layers" in name and parameter.ndim == 2:
                parameter.mul_(8 if "encoder_attn" in name else 3)
        # Words before times, whose logits a trained model keeps apart.
        words_VD = model.model.decoder.embed_tokens.weight
        words_VD[id_of("<|0.00|>") :] *= 0.2
        words_VD[id_of("<|endoftext|>")] *= 0.02
    told = {
        "is_multilingual": True, "return_timestamps": False, "no_timestamps_token_id": id_of("<|notimestamps|>"),
        "lang_to_id": {name: id_of(name) for name in ("<|en|>", "<|de|>", "<|yue|>")},
        "task_to_id": {name: id_of(f"<|{name}|>") for name in ("transcribe", "translate")},
        "suppress_tokens": [id_of("<|startoftranscript|>"), *(id_of(name) for name in CONTROLS[2:]), 5, 11],
        "begin_suppress_tokens": [id_of("a"), id_of("<|endoftext|>")], "max_initial_timestamp_index": 50,
        "max_length": 60, "decoder_start_token_id": id_of("<|startoftranscript|>"),
        "eos_token_id": id_of("<|endoftext|>"), "pad_token_id": id_of("<|endoftext|>"),
    }  # fmt: skip
    model.generation_config = transformers.GenerationConfig(**told)
    extractor = transformers.WhisperFeatureExtractor(feature_size=20, chunk_length=2)
    return save_reference(model, folder, extractor)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("whisper"))


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    return transformers.WhisperForConditionalGeneration.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return pm.load(folder)


def wave(seed: int, seconds: float = 1.3) -> np.ndarray:
    rng = np.random.default_rng(seed)
    time = np.arange(round(seconds * RATE)) / RATE
    tones = sum(rng.uniform(0.1, 0.4) * np.sin(2 * np.pi * rng.uniform(80, 4000) * time) for _ in range(4))
    return (tones + rng.normal(0, 0.01, len(time))).astype(np.float32)


def heard(folder: Path, waves: list[np.ndarray]) -> torch.Tensor:
    extractor = transformers.WhisperFeatureExtractor.from_pretrained(folder)
    return extractor(waves, sampling_rate=RATE, return_tensors="pt").input_features


def test_features_equal_the_reference(folder: Path, model: Any, reference: Any) -> None:
    part = pm.Audio(wave(0), rate_hz=RATE)
    frames_LM = model.engine.processor.streams["audio"].reader.read(part).units[0]
    with torch.no_grad():
        states = reference.model.encoder(torch.from_numpy(frames_LM.T[None])).last_hidden_state
    assert_close(model.features([part])[0].features, states)


@pytest.mark.parametrize("feature_size", [80, 128])
def test_spectrograms_of_thirty_seconds_equal_the_reference(tmp_path: Path, feature_size: int) -> None:
    """As published: 30 s, 80 or 128 bands, from a file."""
    from polymodal.core.limits import Limits
    from polymodal.modalities.audio import AudioReader
    from polymodal.models.encoders.whisper import WhisperConfig

    soundfile.write(tmp_path / "a.wav", wave(3, 4.37), RATE, subtype="FLOAT")
    reader = AudioReader(WhisperConfig(num_mels=feature_size).default_reader(), Limits())
    part = pm.Audio(tmp_path / "a.wav")
    found = reader.read(part)
    assert reader.measure(part) == found.lengths == (3000,)
    extractor = transformers.WhisperFeatureExtractor(feature_size=feature_size)
    expected = extractor(wave(3, 4.37), sampling_rate=RATE, return_tensors="np").input_features[0]
    assert np.abs(found.units[0].T - expected).max() < 1e-3
    folder = make(tmp_path / "hub")
    ours = pm.load(folder).engine.processor.streams["audio"].reader.read(part)
    assert len(ours.units) == 3, "4.37 s in clips of 2 s"
    assert_close(ours.units[0].T, heard(folder, [wave(3, 4.37)[: 2 * RATE]])[0], rel=1e-3)


def test_logits_equal_the_reference(folder: Path, model: Any, reference: Any) -> None:
    sample = conversation(pm.Audio(wave(1), rate_hz=RATE), answer="word3 word7 b")
    batch = to_device(model.engine.processor.batch([sample]), "cpu")
    with torch.no_grad():
        ours = model.network.token_logits(model.network.states(batch))
        theirs = reference(batch.streams["audio"].values.transpose(1, 2), decoder_input_ids=batch.ids).logits
    assert_close(ours, theirs)
    assert int(batch.is_supervised.sum()) == 4


@pytest.mark.parametrize("language, task", [("de", "transcribe"), ("en", "translate"), ("yue", "transcribe")])
def test_transcripts_equal_the_reference(folder: Path, model: Any, reference: Any, language: str, task: str) -> None:
    waves = [wave(seed, 0.5 + 0.4 * seed) for seed in range(4)]
    words = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        ids = reference.generate(heard(folder, waves), language=language, task=task, max_new_tokens=32)
    expected = [text.strip() for text in words.batch_decode(ids, skip_special_tokens=True)]
    parts = [pm.Audio(each, rate_hz=RATE) for each in waves]
    found = model.transcribe(parts, language=language, task=task, batch_size=3)
    assert [" ".join(text.split()[:32]) for text in found] == expected
    assert len(set(expected)) == 4 and min(len(text.split()) for text in expected) >= 32
    assert model.transcribe(parts[1], language=language, task=task) == found[1]


def test_the_language_is_heard_where_none_is_given(folder: Path, model: Any, reference: Any) -> None:
    parts = [pm.Audio(wave(seed), rate_hz=RATE) for seed in range(3)]
    ids = reference.detect_language(heard(folder, [wave(seed) for seed in range(3)]))
    codes = [
        name.strip("<|>") for name in transformers.AutoTokenizer.from_pretrained(folder).convert_ids_to_tokens(ids)
    ]
    assert model.transcribe(parts) == [
        model.transcribe(part, language=code) for part, code in zip(parts, codes, strict=True)
    ]


def test_times_equal_the_reference(folder: Path, model: Any, reference: Any) -> None:
    waves = [wave(seed, 2.0) for seed in (5, 6)]
    words = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        ids = reference.generate(
            heard(folder, waves), language="en", task="transcribe", return_timestamps=True, max_new_tokens=24
        )
    parts = [pm.Audio(each, rate_hz=RATE) for each in waves]
    for part, row in zip(parts, ids, strict=True):
        expected = [token for token in words.convert_ids_to_tokens(row) if token not in CONTROLS]
        found = model.transcribe(part, language="en", timestamps=True)
        found = found.replace("><", "> <").split()
        # After finished stretches the reference listens anew from their end; the first tokens are from the beginning.
        assert len(expected) >= 12 and expected[0].startswith("<|") and found[:12] == expected[:12]


def test_a_long_recording_is_transcribed_clip_by_clip(model: Any) -> None:
    long = np.concatenate([wave(1, 2.0), wave(2, 1.2)])
    pieces = [pm.Audio(long[: 2 * RATE], rate_hz=RATE), pm.Audio(long[2 * RATE :], rate_hz=RATE)]
    expected = [model.transcribe(piece, language="en") for piece in pieces]
    assert model.transcribe(pm.Audio(long, rate_hz=RATE), language="en") == " ".join(expected)


def test_a_recording_can_be_asked_about_as_any_medium(model: Any) -> None:
    part = pm.Audio(wave(1), rate_hz=RATE)
    answer = model.chat(part, max_new_tokens=12)
    assert answer.text.split() == model.transcribe(part, language="en").split()[:12]


def test_export_reloads_there_bit_for_bit(folder: Path, tmp_path: Path, reference: Any) -> None:
    assert pm.load(folder).export(tmp_path / "out") == "whisper"
    again = transformers.WhisperForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    assert_same_weights(again, reference)
    for key in ("suppress_tokens", "begin_suppress_tokens", "lang_to_id", "task_to_id", "no_timestamps_token_id"):
        assert getattr(again.generation_config, key) == getattr(reference.generation_config, key), key
    features = transformers.WhisperFeatureExtractor.from_pretrained(tmp_path / "out")
    assert features.n_samples == 2 * RATE and features.feature_size == 20
    with torch.no_grad():
        told = {"language": "de", "task": "transcribe", "max_new_tokens": 32}
        assert torch.equal(
            again.generate(heard(tmp_path / "out", [wave(0)]), **told),
            reference.generate(heard(folder, [wave(0)]), **told),
        )


def test_what_it_cannot_do_is_refused(folder: Path, model: Any) -> None:
    with pytest.raises(ConfigError, match="unknown language 'fr'"):
        model.transcribe(pm.Audio(wave(0), rate_hz=RATE), language="fr")
    with pytest.raises(ConfigError, match="scale_embedding: True"):
        find_size("whisper-tiny")[0].model(HubConfigs({"model_type": "whisper", "scale_embedding": True}))


def test_a_missing_tensor_is_named(folder: Path) -> None:
    assert_missing_is_named(folder, "model.decoder.layers.1.encoder_attn.k_proj.weight")


@pytest.mark.parametrize("name", list(find_size("whisper-tiny")[0].sizes))
def test_published_sizes_have_their_number_of_parameters(name: str) -> None:
    architecture, size = find_size(name)
    model = architecture.model(HubConfigs(size.config, size.preprocessor))
    with no_weights():
        network = MultimodalModel(model, size.config["vocab_size"])
    # Its positions are stored and never trained: a buffer to us, a parameter to the reference.
    ours = num_parameters(network) + network.streams["audio"].encoder.positions_ND.numel()
    with torch.device("meta"):
        reference = transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**size.config))
    assert ours == num_parameters(reference) == size.parameters


def test_sampling_never_draws_what_the_head_suppresses(model: Any) -> None:
    part = pm.Audio(wave(1), rate_hz=RATE)
    head = model.recipe.model.heads["text"]
    drawn = [
        model.chat(part, sampling=Sampling(max_new_tokens=30, temperature=3.0, seed=seed)).tokens for seed in range(5)
    ]
    assert not {token for tokens in drawn for token in tokens} & set(head.suppress)
    assert not {tokens[0] for tokens in drawn} & set(head.suppress_first)
