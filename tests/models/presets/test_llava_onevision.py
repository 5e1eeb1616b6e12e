"""LLaVA-OneVision against the reference library: one picture in tiles, several pictures, and videos."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import polymodal as pm
from polymodal.core.errors import CheckpointError, ConfigError
from polymodal.core.samples import conversation
from polymodal.models.compose import ModelConfig, MultimodalModel
from polymodal.models.presets.llava_onevision import LLAVA_ONEVISION
from polymodal.models.weights import HubConfigs
from polymodal.models.weights.assign import no_weights, num_parameters

from .languages import byte_tokenizer
from .prompts import assert_same_answers, assert_same_logits
from .reference import assert_close, assert_same_weights
from .test_llava_next import PICTURES, TEMPLATE, sharpen

transformers = pytest.importorskip("transformers")

_VISION = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 26,
    "patch_size": 8, "vision_use_head": False,
}  # fmt: skip
_TEXT = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 64, "vocab_size": 300, "max_position_embeddings": 512, "pad_token_id": 258,
    "bos_token_id": 256, "eos_token_id": 257,
}  # fmt: skip
PINPOINTS = [[26 * rows, 26 * cols] for rows in range(1, 5) for cols in range(1, 5)]
_RNG = np.random.default_rng(1)
VIDEOS = [_RNG.integers(0, 256, (frames, 40, 60, 3), dtype=np.uint8) for frames in (5, 3)]
PROMPTS: list[list[Any]] = [
    ["No picture at all, only a rather longer text before the answer."],
    [PICTURES[5], "A large picture?"],
    [PICTURES[3], "A high one?"],
    [PICTURES[0], PICTURES[2], "and", PICTURES[4], "differ how?"],
    [VIDEOS[0], "What happens?"],
    [PICTURES[1], VIDEOS[1], "Together?"],
]


PROCESSOR = {
    "num_image_tokens": 9, "vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_4",
    "image_token": "<image>", "video_token": "<video>",
}  # fmt: skip


class Frames:
    """Frames by the library's processor of pictures: its processor of videos needs torchvision."""

    model_input_names = ("pixel_values_videos",)

    def __init__(self, config: dict[str, Any]) -> None:
        keys = ("size", "resample", "rescale_factor", "image_mean", "image_std")
        self.frames = transformers.SiglipImageProcessor(**{key: config[key] for key in keys})

    def __call__(self, videos: Any, **options: Any) -> Any:
        found = [self.frames(list(video), return_tensors="pt").pixel_values for video in videos]
        return transformers.BatchFeature({"pixel_values_videos": torch.stack(found)})


class Processor(transformers.LlavaOnevisionProcessor):
    """The library's, with another processor of videos."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        return type(argument)


def _write(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data))


def make(folder: Path) -> Path:
    words = byte_tokenizer(bos=None)
    words.add_special_tokens({"additional_special_tokens": ["<image>", "<video>"]})
    config = transformers.LlavaOnevisionConfig(
        vision_config=transformers.SiglipVisionConfig(**_VISION),
        text_config=transformers.Qwen2Config(**_TEXT),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        video_token_index=words.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=PINPOINTS,
        vision_aspect_ratio="anyres_max_4",
    )
    torch.manual_seed(0)
    sharpen(transformers.LlavaOnevisionForConditionalGeneration(config)).save_pretrained(folder)
    side = {"height": 26, "width": 26}
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    transformers.LlavaOnevisionImageProcessor(size=side, image_grid_pinpoints=PINPOINTS, **half).save_pretrained(folder)
    words.chat_template = TEMPLATE
    words.save_pretrained(folder)
    _write(folder / "processor_config.json", {"processor_class": "LlavaOnevisionProcessor", **PROCESSOR})
    videos = {"do_resize": True, "size": side, "resample": 3, "do_rescale": True, "rescale_factor": 1 / 255}
    videos |= {"do_center_crop": None, "crop_size": None, "do_normalize": True, **half}
    _write(folder / "video_preprocessor_config.json", videos)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = make(tmp_path_factory.mktemp("onevision"))
    return folder, transformers.LlavaOnevisionForConditionalGeneration.from_pretrained(folder).eval()


def inputs_of(folder: Path, prompt: list[Any]) -> Any:
    processor = Processor(
        transformers.LlavaOnevisionImageProcessor.from_pretrained(folder),
        transformers.AutoTokenizer.from_pretrained(folder),
        Frames(json.loads((folder / "video_preprocessor_config.json").read_text())),
        chat_template=TEMPLATE,
        **PROCESSOR,
    )
    kinds = {str: "text", np.ndarray: "video"}
    parts = [{"type": kinds.get(type(part), "image"), "text": part} for part in prompt]
    text = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    pictures = [part for part, kind in zip(prompt, parts, strict=True) if kind["type"] == "image"]
    videos = [part for part in prompt if isinstance(part, np.ndarray)]
    # Pictures of one prompt are a list of their own: several of them are not cut.
    return processor(images=[pictures] if pictures else None, videos=videos or None, text=[text], return_tensors="pt")


def asked(prompt: list[Any]) -> pm.Sample:
    return conversation(
        *(
            part
            if isinstance(part, str)
            else pm.Video(part, fps=5.0)
            if isinstance(part, np.ndarray)
            else pm.Image(part)
            for part in prompt
        )
    )


def test_logits_and_placeholders_equal_the_reference(made: tuple[Path, Any]) -> None:
    folder, reference = made
    model = pm.load(folder)
    video, image = reference.config.video_token_id, reference.config.image_token_id
    for prompt in PROMPTS:
        inputs = inputs_of(folder, prompt)
        plan = model.engine.processor.plan(asked(prompt), prompt=True)
        # The placeholder of both is one token here: its embedding is written over.
        assert plan.ids == [image if id == video else id for id in inputs.input_ids[0].tolist()]
        assert_same_logits(model, plan, reference, inputs)


def test_greedy_answers_equal_the_reference(made: tuple[Path, Any]) -> None:
    folder, reference = made
    inputs = [inputs_of(folder, prompt) for prompt in PROMPTS]
    assert_same_answers(pm.load(folder), [asked(prompt) for prompt in PROMPTS], reference, inputs)


def test_pixels_equal_the_reference(made: tuple[Path, Any]) -> None:
    folder, _ = made
    model = pm.load(folder)
    for prompt in PROMPTS[1:]:
        inputs = inputs_of(folder, prompt)
        example = model.engine.processor.load(model.engine.processor.plan(asked(prompt), prompt=True))
        for item, theirs in zip(example.inputs.get("image", []), inputs.get("pixel_values", []), strict=True):
            assert_close(np.stack(item.units), theirs[: len(item.units)], rel=1e-3)
        for item, theirs in zip(example.inputs.get("video", []), inputs.get("pixel_values_videos", []), strict=True):
            assert_close(item.units[0], theirs, rel=1e-3)


def test_a_picture_among_several_is_never_reused_for_one_alone(made: tuple[Path, Any]) -> None:
    model = pm.load(made[0])
    alone, among = asked([PICTURES[5], "?"]), asked([PICTURES[5], PICTURES[2], "?"])
    keys = [
        model.engine.processor.plan(sample, prompt=True).items["image"][0][0].content_key() for sample in (alone, among)
    ]
    assert keys[0] != keys[1]


def test_export_reloads_there_bit_for_bit(made: tuple[Path, Any], tmp_path: Path) -> None:
    folder, reference = made
    assert pm.load(folder).export(tmp_path / "out") == "llava_onevision"
    again = transformers.LlavaOnevisionForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    assert_same_weights(again, reference)
    for prompt in PROMPTS[3:5]:
        inputs = inputs_of(tmp_path / "out", prompt)
        with torch.inference_mode():
            assert torch.equal(again(**inputs).logits, reference(**inputs_of(folder, prompt)).logits)
    assert pm.load(tmp_path / "out").logits(["Hi"]).tolist() == pm.load(folder).logits(["Hi"]).tolist()


def test_a_missing_newline_is_named(made: tuple[Path, Any], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder, _ = made
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    del tensors[next(name for name in tensors if name.endswith("image_newline"))]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="image_newline"):
        pm.load(tmp_path)


def test_streams_that_share_tokens_have_one_connector(made: tuple[Path, Any]) -> None:
    model = pm.load(made[0])
    image, video = model.network.streams["image"], model.network.streams["video"]
    assert image.connector is video.connector
    assert image.arrangement.newline is video.arrangement.newline
    data = model.recipe.model.to_data()
    data["streams"]["video"]["connector"] = {"use": "linear"}
    with pytest.raises(ConfigError, match="shares_tokens: the connectors of 'video' and 'image' differ"):
        MultimodalModel(ModelConfig.parse(data), 300)
    data["streams"]["video"]["shares"] = None
    with pytest.raises(ConfigError, match="shares_tokens: found no 'shares' that says whose"):
        ModelConfig.parse(data)


@pytest.mark.parametrize("name", list(LLAVA_ONEVISION.sizes))
def test_published_sizes_have_the_references_parameters(name: str) -> None:
    size = LLAVA_ONEVISION.sizes[name]
    vision, text = dict(size.config["vision_config"]), dict(size.config["text_config"])
    config = transformers.LlavaOnevisionConfig(
        vision_config=transformers.SiglipVisionConfig(**{k: v for k, v in vision.items() if k != "model_type"}),
        text_config=transformers.Qwen2Config(**{k: v for k, v in text.items() if k != "model_type"}),
        tie_word_embeddings=size.config["tie_word_embeddings"],
    )
    with torch.device("meta"):
        reference = transformers.LlavaOnevisionForConditionalGeneration(config)
    reference.tie_weights()
    with no_weights():
        ours = MultimodalModel(LLAVA_ONEVISION.model(HubConfigs(size.config)), text["vocab_size"])
    assert num_parameters(ours) == num_parameters(reference) == size.parameters
