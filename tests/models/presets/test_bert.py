"""BERT against the reference library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import polymodal as pm
from polymodal.core.errors import CheckpointError, ConfigError
from polymodal.models.compose import MultimodalModel
from polymodal.models.presets.bert import BERT
from polymodal.models.weights import HubConfigs
from polymodal.models.weights.assign import no_weights, num_parameters

from .reference import assert_close, assert_same_weights, randomise, save_reference

transformers = pytest.importorskip("transformers")

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "cube", "##s", "and", "."]
TEXTS = ["A red cube and blue cubes.", "red", "a blue cube", ""]
KINDS = ("BertModel", "BertForMaskedLM", "BertForPreTraining")


def make(folder: Path, kind: str) -> Path:
    config = transformers.BertConfig(
        vocab_size=16,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=40,
        max_position_embeddings=24,
    )
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    torch.manual_seed(0)
    return save_reference(randomise(getattr(transformers, kind)(config)), folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: make(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


def encoded(folder: Path) -> Any:
    tokenizer = transformers.BertTokenizer.from_pretrained(folder)
    return tokenizer(TEXTS, return_tensors="pt", padding=True)


@pytest.mark.parametrize("kind", KINDS)
def test_features_equal_the_reference_for_a_batch_of_mixed_lengths(kind: str, folders: dict[str, Path]) -> None:
    theirs = getattr(transformers, kind).from_pretrained(folders[kind])
    batch = encoded(folders[kind])
    with torch.no_grad():
        body = theirs if kind == "BertModel" else theirs.bert
        expected = body(**batch)
    ours = pm.load(folders[kind])
    found = ours.features(TEXTS)
    for row, part in enumerate(found):
        length = int(batch.attention_mask[row].sum())
        assert_close(part.features[0], expected.last_hidden_state[row, :length])
        pooled = expected.last_hidden_state[:, 0] if kind == "BertForMaskedLM" else expected.pooler_output
        assert_close(part.pooled[0], pooled[row])
    if kind != "BertModel":
        with torch.no_grad():
            mine = ours.network.heads["masked"](torch.from_numpy(found[0].features[0]))
            logits = theirs(**batch)
        assert_close(mine, getattr(logits, "prediction_logits", getattr(logits, "logits", None))[0])


@pytest.mark.parametrize("kind", KINDS[:2])
def test_export_reloads_there_bit_for_bit(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    ours = pm.load(folders[kind])
    assert ours.export(tmp_path / "out") == "bert"
    reference = getattr(transformers, kind)
    assert_same_weights(reference.from_pretrained(tmp_path / "out"), reference.from_pretrained(folders[kind]))
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again(TEXTS[0]).input_ids == encoded(folders[kind]).input_ids[0].tolist()
    mine, theirs = pm.load(tmp_path / "out").features(TEXTS[:1])[0], ours.features(TEXTS[:1])[0]
    assert mine.features.tolist() == theirs.features.tolist()


def test_the_names_of_the_first_checkpoints_are_read(folders: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for name in ("config.json", "vocab.txt"):
        (tmp_path / name).write_bytes((folders["BertModel"] / name).read_bytes())
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    tensors = load_file(folders["BertModel"] / "model.safetensors")
    renamed = {}
    for name, tensor in tensors.items():
        for new, past in old.items():
            name = name.replace(new, past)
        renamed["bert." + name] = tensor
    renamed["cls.seq_relationship.bias"] = torch.zeros(2)
    save_file(renamed, tmp_path / "model.safetensors")
    mine, theirs = (pm.load(path).features(TEXTS[:1])[0] for path in (tmp_path, folders["BertModel"]))
    assert mine.features.tolist() == theirs.features.tolist()
    del renamed["bert.pooler.dense.bias"]
    save_file(renamed, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 tensor\(s\) missing: bert.pooler.dense.bias"):
        pm.load(tmp_path)


def test_what_is_not_built_is_refused() -> None:
    for change, message in (
        (
            {"position_embedding_type": "relative_key"},
            "found position_embedding_type: 'relative_key', expected",
        ),
        ({"is_decoder": True}, "found is_decoder: True"),
        ({"architectures": ["BertForQuestionAnswering"]}, "found the class BertForQuestionAnswering, expected one of"),
    ):
        with pytest.raises(ConfigError, match=message):
            BERT.model(HubConfigs({"model_type": "bert", **change}))


@pytest.mark.parametrize("name", BERT.sizes)
def test_published_sizes_have_the_published_parameters(name: str) -> None:
    size = BERT.sizes[name]
    model = BERT.model(HubConfigs(size.config))
    with no_weights():
        network = MultimodalModel(model, model.tokenizer.rows or 0)
    assert num_parameters(network) == size.parameters
    config = transformers.AutoConfig.for_model(**size.config)
    with torch.device("meta"):
        assert num_parameters(transformers.AutoModel.from_config(config)) == size.parameters
