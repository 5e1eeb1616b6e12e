"""Keys that a translation does not read are said, and none of those that published configs have is such a one."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

import polymodal as pm
from polymodal.models.presets import ARCHITECTURES
from polymodal.models.presets.unread import HARMLESS, unread_keys
from polymodal.models.weights import HubConfigs

from .test_minigpt4_release import WEIGHTS
from .test_t5 import FLAN, make

transformers = pytest.importorskip("transformers")

KINDS = [
    (name, kind)
    for name, architecture in ARCHITECTURES.items()
    for kind in architecture.model_types
    if kind in transformers.CONFIG_MAPPING
]


def config_of(name: str, kind: str) -> dict[str, Any]:
    """Every key that the reference library's class of today has, with its default."""
    config: dict[str, Any] = json.loads(transformers.CONFIG_MAPPING[kind]().to_json_string(use_diff=False))
    config["architectures"] = list(ARCHITECTURES[name].classes[:1])
    if name == "perceiver":
        config["architectures"] = ["PerceiverForMaskedLM"]
    if name == "blip-2-retrieval":
        config["qformer_config"]["use_qformer_text_input"] = True
    return config


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_the_reference_library_s_own_keys_are_all_known(name: str, kind: str) -> None:
    config = config_of(name, kind)
    assert unread_keys(ARCHITECTURES[name], HubConfigs(config)) == []
    more = {**config, "new_scale": 0.5, "new_switch": False, "new_list": [], "new_none": None}
    assert unread_keys(ARCHITECTURES[name], HubConfigs(more)) == ["new_scale"]


@pytest.mark.parametrize("name", [size for each in ARCHITECTURES.values() for size in each.sizes])
def test_configs_of_published_sizes_are_read_to_the_last_key(name: str) -> None:
    architecture = next(each for each in ARCHITECTURES.values() if name in each.sizes)
    size = architecture.sizes[name]
    assert unread_keys(architecture, HubConfigs(size.config, size.preprocessor)) == []


def test_keys_within_parts_are_named_by_their_path() -> None:
    config = config_of("llava", "llava")
    config["text_config"] = {**config["text_config"], "residual_multiplier": 0.22, "layer_types": ["sliding_attention"]}
    config["vision_config"]["new_option"] = {"inner": 3}
    config["text_config"]["rope_parameters"] = {"rope_theta": 1e4, "rope_type": "default", "new_factor": 2.0}
    assert unread_keys(ARCHITECTURES["llava"], HubConfigs(config)) == [
        "text_config.rope_parameters.new_factor",
        "text_config.residual_multiplier",
        "text_config.layer_types",
        "vision_config.new_option",
    ]


def test_a_tower_that_a_class_leaves_out_says_nothing() -> None:
    config = config_of("clip", "clip")
    config["text_config"]["new_scale"] = 2.0
    assert unread_keys(ARCHITECTURES["clip"], HubConfigs(config)) == ["text_config.new_scale"]
    config["architectures"] = ["CLIPForImageClassification"]
    assert unread_keys(ARCHITECTURES["clip"], HubConfigs(config)) == []


def test_windows_that_are_switched_off_say_nothing() -> None:
    qwen2 = {**config_of("qwen2", "qwen2"), "sliding_window": 4096, "layer_types": ["full_attention"] * 32}
    assert unread_keys(ARCHITECTURES["qwen2"], HubConfigs(qwen2)) == []
    llama = {**config_of("llama", "llama"), "sliding_window": 4096}
    assert unread_keys(ARCHITECTURES["llama"], HubConfigs(llama)) == ["sliding_window"]


def test_our_own_formats_name_what_is_misspelt() -> None:
    albef = HubConfigs({"model_type": "albef", "weights": "ALBEF.pth", "image_sise": 384})
    assert unread_keys(ARCHITECTURES["albef"], albef) == ["image_sise"]
    release = HubConfigs({"model_type": "minigpt4", "weights": WEIGHTS, "num_query_tokens": 32})
    assert unread_keys(ARCHITECTURES["minigpt4"], release) == []


def test_it_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = make(tmp_path / "t5", FLAN)
    pm.load(folder)
    assert not [record for record in caplog.records if record.name.startswith("polymodal")]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "attention_sinks": 4, "logit_cap": 30.0}))
    with caplog.at_level(logging.WARNING, "polymodal"):
        for _ in range(2):
            pm.load(folder)
    said = [record.getMessage() for record in caplog.records if record.name.startswith("polymodal")]
    assert len(said) == 1
    assert "t5/config.json: found attention_sinks, logit_cap, which t5 does not read, expected keys that" in said[0]
    assert "take the model as a part, {use: transformers, from: FOLDER}" in said[0]


def test_no_key_is_listed_twice_or_in_vain() -> None:
    import polymodal.models.presets.unread as module

    listed = " ".join(
        (module._ORIGIN, module._SPECIAL, module._GENERATION, module._TRAINING, module._ELSEWHERE)
    ).split()
    assert len(listed) == len(set(listed)) == len(HARMLESS) - 1
