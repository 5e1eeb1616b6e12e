"""Small published models and how the reference library and ours compute their outputs, for comparisons of precision."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import polymodal as pm
from polymodal.core.samples import conversation
from polymodal.models.compose import to_device
from polymodal.models.compose.joint import JointRun

from . import (
    test_bert,
    test_blip,
    test_blip2,
    test_blip2_retrieval,
    test_blip_retrieval,
    test_clap,
    test_clip,
    test_dinov2,
    test_flava,
    test_idefics,
    test_instructblip,
    test_language,
    test_llava,
    test_llava_next,
    test_llava_onevision,
    test_patchtst,
    test_perceiver,
    test_qwen2_audio,
    test_qwen2_audio_tower,
    test_resnet,
    test_siglip,
    test_t5,
    test_timesformer,
    test_videomae,
    test_vilt,
    test_vit,
    test_wav2vec2,
    test_whisper,
    test_xclip,
)
from .languages import byte_tokenizer, save_language

Theirs = Callable[[Any, Callable[[Any], Any], Path], Any]


@dataclass(frozen=True, slots=True)
class Case:
    """One published model.

    Args:
        write: writes a small random checkpoint.
        kind: the reference library's class.
        theirs: the reference's outputs, given the model, what casts its inputs, and the folder.
        ours: the same of our model.
    """

    write: Callable[[Path], Any]
    kind: str
    theirs: Theirs
    ours: Callable[[pm.Model], Any]


# Towers: features and what is pooled of them.


def _image(picture: Any, has_pooled: bool = True) -> Callable[[pm.Model], list[Any]]:
    def ours(model: pm.Model) -> list[Any]:
        found = model.features([pm.Image(picture)])[0]
        return [found.features, found.pooled] if has_pooled else [found.features]

    return ours


def _vit(model: Any, cast: Any, folder: Path) -> list[Tensor]:
    found = model(cast(test_vit.VALUES))
    return [found.last_hidden_state[:, 1:], found.pooler_output]


def _dinov2(skip: int) -> Theirs:
    def theirs(model: Any, cast: Any, folder: Path) -> list[Tensor]:
        found = model(cast(test_dinov2.prepared(folder)))
        return [found.last_hidden_state[:, skip:]]

    return theirs


def _resnet(model: Any, cast: Any, folder: Path) -> list[Tensor]:
    found = model(cast(test_resnet.prepared(folder)))
    return [found.last_hidden_state.flatten(2).transpose(1, 2), found.pooler_output.flatten(1)]


def _contrast(inputs: Callable[[Path], Any]) -> Theirs:
    def theirs(model: Any, cast: Any, folder: Path) -> list[Tensor]:
        found = model(**cast(inputs(folder)))
        return [found.image_embeds, found.text_embeds]

    return theirs


def _pairs(pictures: Sequence[Any], texts: list[str]) -> Callable[[pm.Model], list[Any]]:
    return lambda model: [model.embed([pm.Image(picture) for picture in pictures]), model.embed(texts)]


def _clip_inputs(folder: Path) -> Any:
    words = transformers.AutoTokenizer.from_pretrained(folder)
    images = transformers.AutoImageProcessor.from_pretrained(folder)
    texts = words(test_clip.TEXTS, padding=True, truncation=True, max_length=16, return_tensors="pt")
    return {**images(test_siglip.PICTURES, return_tensors="pt"), **texts}


def _bert(model: Any, cast: Any, folder: Path) -> list[Tensor]:
    batch = test_bert.encoded(folder)
    found = model(**batch)
    return [*found.last_hidden_state[batch.attention_mask.bool()], *found.pooler_output]


def _our_bert(model: pm.Model) -> list[Any]:
    found = model.features(test_bert.TEXTS)
    return [*(row for part in found for row in part.features[0]), *(part.pooled[0] for part in found)]


def _clap(model: Any, cast: Any, folder: Path) -> list[Tensor]:
    extractor = transformers.ClapFeatureExtractor.from_pretrained(folder)
    heard = extractor(test_clap.sound(1.1), sampling_rate=test_clap.RATE, return_tensors="pt")
    words = transformers.AutoTokenizer.from_pretrained(folder)(test_clap.TEXTS, padding=True, return_tensors="pt")
    return [model.get_audio_features(**cast(heard)).pooler_output, model.get_text_features(**words).pooler_output]


def _our_clap(model: pm.Model) -> list[Any]:
    return [model.embed([pm.Audio(test_clap.sound(1.1), rate_hz=test_clap.RATE)]), model.embed(test_clap.TEXTS)]


def _wave(model: Any, cast: Any, folder: Path) -> Tensor:
    extractor = transformers.Wav2Vec2FeatureExtractor.from_pretrained(folder)
    heard = extractor(test_wav2vec2.sounds(1)[0], sampling_rate=16_000, return_tensors="pt")
    return model(cast(heard.input_values)).last_hidden_state


def _our_wave(model: pm.Model) -> Any:
    return model.features(test_wav2vec2.parts(test_wav2vec2.sounds(1)))[0].features


def _qwen_tower(model: Any, cast: Any, folder: Path) -> Tensor:
    wave = test_qwen2_audio_tower.waves(16_000)[0]
    extractor = transformers.WhisperFeatureExtractor.from_pretrained(folder)
    return model(cast(extractor(wave, sampling_rate=16_000, return_tensors="pt").input_features)).last_hidden_state


def _our_qwen_tower(model: pm.Model) -> Any:
    return model.features([pm.Audio(test_qwen2_audio_tower.waves(16_000)[0], rate_hz=16_000)])[0].features


def _videomae(model: Any, cast: Any, folder: Path) -> Tensor:
    return model(cast(test_videomae.pixel_values(folder, test_videomae.clip()))).last_hidden_state


def _our_videomae(model: pm.Model) -> Any:
    return model.features([pm.Video(test_videomae.clip(), fps=8)])[0].features


def _timesformer(model: Any, cast: Any, folder: Path) -> list[Tensor]:
    states = model(cast(test_timesformer.frames())).last_hidden_state
    return [states[:, 1:].unflatten(1, (4, 3)).transpose(1, 2).flatten(1, 2), states[:, 0]]


def _our_timesformer(model: pm.Model) -> list[Tensor]:
    encoder = model.network.streams["video"].encoder
    found = encoder(test_timesformer.frames().to(encoder.dtype), torch.tensor([3, 3]))
    return [found.x_UND, found.pooled_UD]


def _patchtst(model: Any, cast: Any, folder: Path) -> Tensor:
    return model(cast(test_patchtst.recordings())).last_hidden_state.transpose(1, 2).flatten(1, 2)


def _our_patchtst(model: pm.Model) -> Tensor:
    encoder = model.network.streams["sensor"].encoder
    return encoder(test_patchtst.recordings().to(encoder.dtype), torch.tensor([21, 21])).x_UND


def _xclip(model: Any, cast: Any, folder: Path) -> list[Tensor]:
    found = model(**cast(test_xclip.inputs(folder)))
    return [found.video_embeds, found.text_embeds]


def _our_xclip(model: pm.Model) -> list[Tensor]:
    batch = test_xclip.batch(model)
    video, text = (model.network.encode(name, batch.streams[name]) for name in ("video", "text"))
    scores = model.network.heads["prompted_pairs"](video, text.pooled_UD)
    return [scores.video_VE, scores.text_VTE]


# Pictures and words in one sequence of an encoder.


def _vilt_inputs(folder: Path) -> Any:
    return test_vilt.inputs(transformers.ViltProcessor.from_pretrained(folder))


def _vilt(model: Any, cast: Any, folder: Path) -> Tensor:
    return model(**cast(_vilt_inputs(folder))).pooler_output


def _flava_inputs(folder: Path) -> Any:
    images = transformers.FlavaImageProcessor.from_pretrained(folder)
    words = transformers.AutoTokenizer.from_pretrained(folder)
    return images(test_flava.PICTURES, return_tensors="pt") | words(test_flava.TEXTS, padding=True, return_tensors="pt")


def _flava(model: Any, cast: Any, folder: Path) -> list[Tensor]:
    found = model(**cast(_flava_inputs(folder)))
    return [found.multimodal_embeddings[:, 1:11], found.multimodal_embeddings[:, 0]]


def _our_flava(model: pm.Model) -> list[Tensor]:
    batch = to_device(model.engine.processor.batch(test_flava.SAMPLES), "cpu")
    streams = {name: stream for name, stream in batch.streams.items() if name != "codebook"}
    run = JointRun(model.network, batch, {n: model.network.encode(n, s) for n, s in streams.items()})
    states = run.states(*run.lay_out(run.features))
    return [states.x["image"], states.pooled_SW]


def _perceiver(model: Any, cast: Any, folder: Path) -> Tensor:
    words = transformers.PerceiverTokenizer()
    return model(
        **words(["a word", "longer than that"], padding="max_length", max_length=24, return_tensors="pt")
    ).logits


def _our_perceiver(model: pm.Model) -> Tensor:
    words = transformers.PerceiverTokenizer()
    given = words(["a word", "longer than that"], padding="max_length", max_length=24, return_tensors="pt")
    lengths = given["attention_mask"].sum(1)
    features = model.network.streams["text"].encoder(given["input_ids"][:, : lengths.max()], lengths)
    latents = model.network.backbone({"text": features.x_UND}, {"text": features.is_valid_UN})
    return model.network.heads["query_token"](latents)


def _blip_match(model: Any, cast: Any, folder: Path) -> Tensor:
    processor = transformers.BlipProcessor.from_pretrained(folder)
    given = processor(test_blip_retrieval.PICTURES, test_blip_retrieval.TEXTS, padding=True, return_tensors="pt")
    scores = model(**cast(given)).itm_score
    return scores[:, 1] - scores[:, 0]


def _blip2_match(model: Any, cast: Any, folder: Path) -> Tensor:
    words = transformers.AutoTokenizer.from_pretrained(folder)
    images = transformers.AutoImageProcessor.from_pretrained(folder)
    given = {
        **words(test_blip2_retrieval.TEXTS, padding=True, return_tensors="pt", return_token_type_ids=False),
        **images(test_blip2_retrieval.PICTURES, return_tensors="pt"),
    }
    logits = model(**cast(given), use_image_text_matching_head=True).logits_per_image
    return logits[:, 1] - logits[:, 0]


# Decoders: logits of a prompt, or of an answer.


def _write_language(name: str) -> Callable[[Path], Any]:
    family, options = test_language.CASES[name]

    def write(folder: Path) -> Any:
        config = getattr(transformers, f"{family}Config")(**options)
        torch.manual_seed(0)
        return save_language(getattr(transformers, _language_kind(name))(config), folder)

    return write


def _language_kind(name: str) -> str:
    family = test_language.CASES[name][0]
    return "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"


def _language(model: Any, cast: Any, folder: Path) -> Tensor:
    return model(byte_tokenizer()(test_language.TEXTS[2], return_tensors="pt").input_ids).logits[0]


def _our_language(model: pm.Model) -> Any:
    return model.logits([test_language.TEXTS[2]])


def _prompted(module: Any, row: int) -> tuple[Theirs, Callable[[pm.Model], Any]]:
    """Logits of the ``row``-th prompt of a test module of models that chat."""

    def theirs(model: Any, cast: Any, folder: Path) -> Tensor:
        return model(**cast(module.inputs_of(folder, module.PROMPTS[row]))).logits[0]

    return theirs, lambda model: model.engine.logits(module.asked(module.PROMPTS[row]))


def _idefics(model: Any, cast: Any, folder: Path) -> Tensor:
    inputs = test_idefics.inputs_of(folder, test_idefics.PROMPTS[1])
    rest = {name: value[:, 1:] for name, value in inputs.items() if name != "pixel_values"}
    return model(pixel_values=cast(inputs.pixel_values), **rest).logits[0]


def _answers(text: str = "A red cat.") -> list[int]:
    return byte_tokenizer(None)(text + "</s>").input_ids


def _blip2(text: str) -> Theirs:
    def theirs(model: Any, cast: Any, folder: Path) -> Tensor:
        inputs = test_blip2.inputs_of(folder, 0, text)
        if text == "t5":
            said = torch.tensor([[258, *_answers()]])
            return model(**cast(inputs), decoder_input_ids=said).logits[0, :-1]
        return model(**cast(inputs)).logits[0]

    return theirs


def _instructblip(text: str) -> Theirs:
    def theirs(model: Any, cast: Any, folder: Path) -> Tensor:
        inputs = test_instructblip.inputs_of(folder, 0, text)
        if text == "t5":
            said = torch.tensor([[258, *_answers()]])
            return model(**cast(inputs), decoder_input_ids=said).logits[0, :-1]
        return model(**cast(inputs)).logits[0]

    return theirs


def _asked_blip2(text: str, question: str) -> Callable[[pm.Model], Any]:
    asked = (pm.Image(test_blip2.PICTURES[0]), question)
    if text == "t5":
        sample = conversation(*asked, answer="A red cat.")
        return lambda model: model.engine.logits(sample, prompt=False)[: len(_answers())]
    return lambda model: model.engine.logits(conversation(*asked))


# Many: the sharp weights of that test make the error of a single question a matter of luck.
_ASKED = [
    *test_t5.QUESTIONS,
    *(f"{word} the {word}?" for word in ("house", "red", "on", "by", "left", "which", "zebra")),
]


def _t5(model: Any, cast: Any, folder: Path) -> list[Tensor]:
    words = transformers.AutoTokenizer.from_pretrained(folder)
    said = torch.tensor([[words.pad_token_id, *_answers()]])
    return [model(**test_t5.asked(words, [text]), decoder_input_ids=said).logits[0, :-1] for text in _ASKED]


def _our_t5(model: pm.Model) -> list[Any]:
    samples = [conversation(text, answer="A red cat.") for text in _ASKED]
    return [model.engine.logits(sample, prompt=False)[: len(_answers())] for sample in samples]


def _blip(kind: str) -> tuple[Theirs, Callable[[pm.Model], Any]]:
    sample = conversation(pm.Image(test_blip.PICTURES[1]), test_blip.TEXTS[1], answer="the red cat.")

    def theirs(model: Any, cast: Any, folder: Path) -> Tensor:
        plan = pm.load(folder).engine.processor.plan(sample)
        inputs = cast(test_blip.inputs_of(folder, 1))
        seen = model.vision_model(inputs["pixel_values"])[0]
        if kind == "answer":
            seen = model.text_encoder(inputs["input_ids"], encoder_hidden_states=seen)[0]
        return model.text_decoder(torch.tensor([plan.ids[plan.num_source :]]), encoder_hidden_states=seen).logits[0]

    return theirs, lambda model: model.engine.logits(sample, prompt=False)


_HEARD = conversation(pm.Audio(test_whisper.wave(1), rate_hz=test_whisper.RATE), answer="word3 word7 b")


def _whisper(model: Any, cast: Any, folder: Path) -> Tensor:
    batch = to_device(pm.load(folder).engine.processor.batch([_HEARD]), "cpu")
    return model(cast(batch.streams["audio"].values.transpose(1, 2)), decoder_input_ids=batch.ids).logits[0]


_IMAGES = test_siglip.PICTURES
_QUESTIONS = {"blip2": test_blip2.QUESTIONS[0], "instructblip": test_instructblip.QUESTIONS[0]}
CASES: dict[str, Case] = {
    "vit": Case(lambda f: test_vit.make(f, "ViTModel"), "ViTModel", _vit, _image(test_vit.PIXELS)),
    "dinov2": Case(
        lambda f: test_dinov2.make(f, "Dinov2", "Model", use_swiglu_ffn=True),
        "Dinov2Model", _dinov2(1), _image(test_dinov2.PICTURE, False),
    ),
    "dinov2-registers": Case(
        lambda f: test_dinov2.make(f, "Dinov2WithRegisters", "Model", num_register_tokens=3),
        "Dinov2WithRegistersModel", _dinov2(4), _image(test_dinov2.PICTURE, False),
    ),
    "resnet": Case(lambda f: test_resnet.make(f, "ResNetModel"), "ResNetModel", _resnet, _image(test_resnet.PICTURE)),
    "clip": Case(
        lambda f: test_clip.make(f, "CLIPModel"), "CLIPModel", _contrast(_clip_inputs), _pairs(_IMAGES, test_clip.TEXTS)
    ),
    "siglip": Case(
        lambda f: test_siglip.make(f, "SiglipModel"),
        "SiglipModel", _contrast(test_siglip.inputs), _pairs(_IMAGES, test_siglip.TEXTS),
    ),
    "bert": Case(lambda f: test_bert.make(f, "BertModel"), "BertModel", _bert, _our_bert),
    "clap": Case(lambda f: test_clap.make(f, fused=False), "ClapModel", _clap, _our_clap),
    **{
        name: Case(
            lambda f, family=family, changes=changes: test_wav2vec2.make(f, family, changes),
            f"{family}Model", _wave, _our_wave,
        )
        for name, family, changes in (
            ("wav2vec2", "Wav2Vec2", {}),
            ("wav2vec2-stable", "Wav2Vec2", test_wav2vec2.STABLE),
            ("hubert", "Hubert", {}),
        )
    },
    "qwen2-audio-tower": Case(test_qwen2_audio_tower.make, "Qwen2AudioEncoder", _qwen_tower, _our_qwen_tower),
    "videomae": Case(lambda f: test_videomae.saved(f, "VideoMAEModel"), "VideoMAEModel", _videomae, _our_videomae),
    "timesformer": Case(
        lambda f: test_timesformer.saved(f, "TimesformerModel"), "TimesformerModel", _timesformer, _our_timesformer
    ),
    "patchtst": Case(test_patchtst.saved, "PatchTSTModel", _patchtst, _our_patchtst),
    "xclip": Case(test_xclip.make, "XCLIPModel", _xclip, _our_xclip),
    "vilt": Case(
        lambda f: test_vilt.make(f, "ViltModel"), "ViltModel", _vilt,
        lambda model: test_vilt.merged(model, test_vilt.SAMPLES)[2],
    ),
    "flava": Case(lambda f: test_flava.make(f, "FlavaModel"), "FlavaModel", _flava, _our_flava),
    "perceiver": Case(
        lambda f: test_perceiver.saved(f, "PerceiverForMaskedLM", qk_channels=8, v_channels=32),
        "PerceiverForMaskedLM", _perceiver, _our_perceiver,
    ),
    "blip-retrieval": Case(
        test_blip_retrieval.make, "BlipForImageTextRetrieval", _blip_match,
        lambda model: model.engine.match_logits(test_blip_retrieval.SAMPLES),
    ),
    "blip2-retrieval": Case(
        test_blip2_retrieval.make, "Blip2ForImageTextRetrieval", _blip2_match,
        lambda model: model.engine.match_logits(test_blip2_retrieval.SAMPLES),
    ),
    **{
        name: Case(_write_language(name), _language_kind(name), _language, _our_language)
        for name in test_language.CASES
    },
    **{
        f"t5-{name}": Case(
            lambda f, changes=changes: test_t5.make(f, changes), "T5ForConditionalGeneration", _t5, _our_t5
        )
        for name, changes in test_t5.CASES.items()
    },
    **{
        f"blip-{name}": Case(lambda f, kind=kind: test_blip.make(f, kind), kind, *_blip(name))
        for name, kind in test_blip.KINDS.items()
    },
    **{
        f"blip2-{text}": Case(
            lambda f, text=text: test_blip2.make(f, text),
            "Blip2ForConditionalGeneration", _blip2(text), _asked_blip2(text, _QUESTIONS["blip2"]),
        )
        for text in ("opt", "llama", "t5")
    },
    **{
        f"instructblip-{text}": Case(
            lambda f, text=text: test_instructblip.make(f, text),
            "InstructBlipForConditionalGeneration", _instructblip(text), _asked_blip2(text, _QUESTIONS["instructblip"]),
        )
        for text in ("llama", "t5")
    },
    **{
        f"llava-{text}": Case(
            lambda f, text=text: test_llava.make(f, text), "LlavaForConditionalGeneration", *_prompted(test_llava, 2)
        )
        for text in ("clip", "siglip")
    },
    "llava-next": Case(
        lambda f: test_llava_next.make(f, "llama"), "LlavaNextForConditionalGeneration", *_prompted(test_llava_next, 2)
    ),
    "llava-onevision": Case(
        test_llava_onevision.make, "LlavaOnevisionForConditionalGeneration", *_prompted(test_llava_onevision, 5)
    ),
    "qwen2-audio": Case(
        test_qwen2_audio.make, "Qwen2AudioForConditionalGeneration", *_prompted(test_qwen2_audio, 2)
    ),
    **{
        f"idefics-{name}": Case(
            lambda f, changes=changes: test_idefics.make(f, changes), "IdeficsForVisionText2Text", _idefics,
            lambda model: model.engine.logits(test_idefics.asked(test_idefics.PROMPTS[1])),
        )
        for name, changes in test_idefics.CASES.items()
    },
    "whisper": Case(
        test_whisper.make, "WhisperForConditionalGeneration", _whisper,
        lambda model: model.engine.logits(_HEARD, prompt=False),
    ),
}  # fmt: skip
