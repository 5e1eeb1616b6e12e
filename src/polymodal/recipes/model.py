"""The model as users hold it: chat, stream, embed, logits."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from polymodal.core.errors import ConfigError, SampleError
from polymodal.core.parts import Media, Part, Text, Video
from polymodal.core.samples import Message, Sample, conversation
from polymodal.inference.captions import write_captions
from polymodal.inference.embedding import embed_parts
from polymodal.inference.engine import Engine, Generation
from polymodal.inference.filling import fill
from polymodal.inference.prefix import PrefixCache
from polymodal.inference.sampling import Sampling
from polymodal.inference.speech import Speech, Task, transcribe_speech
from polymodal.inference.transcription import transcribe_ctc
from polymodal.modalities.text import TokenStream
from polymodal.models.adapters import DEFAULT, merge_adapters, use_adapters
from polymodal.models.heads.table import ClassConfig
from polymodal.models.layers.dropping import MediaDrop
from polymodal.models.presets import Vocabulary
from polymodal.models.weights.assign import wanted_names
from polymodal.recipes.adapters_hub import export_adapter, load_adapter
from polymodal.recipes.assemble import Assembly
from polymodal.recipes.exporting import export_hub
from polymodal.recipes.keyframes import keyframes
from polymodal.recipes.tokenizers import export_tokenizers
from polymodal.safety.checks import check_input
from polymodal.training.precision import ComputeConfig

CAPTION_REQUEST = "Describe this image."


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model said.

    Args:
        text: the answer.
        tokens: its token ids.
        finish: ``stop`` (the model ended its turn) or ``length`` (it ran out of room).
        prompt_tokens: length of the prompt, media included.
        reused_tokens: how many of them came from the prefix cache.
        seconds: wall time.
        choices: what was lessened to keep a budget of media tokens, in words.
    """

    text: str
    tokens: tuple[int, ...] = ()
    finish: str = "stop"
    prompt_tokens: int = 0
    reused_tokens: int = 0
    seconds: float = 0.0
    choices: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True, eq=False)
class PartFeatures:
    """An encoder's view of one part.

    Args:
        features: float32 ``[U, N, D]``: of each unit (tile, clip) its features; rows of padding are zero.
        pooled: float32 ``[U, D]``: one vector per unit.
    """

    features: NDArray[np.float32]
    pooled: NDArray[np.float32]


class Model:
    """A trained (or random) model with everything it needs to be used.

    Args:
        assembly: recipe, tokenizer, processor and network.
        device: where to run; None takes the recipe's choice.
    """

    def __init__(self, assembly: Assembly, device: str | None = None) -> None:
        self.recipe = assembly.recipe
        self.tokenizer = assembly.tokenizer
        self.text_tokenizers = assembly.text_tokenizers
        self.network = assembly.network
        precision = self.recipe.precision.to_data()
        self.compute = ComputeConfig.parse(precision if device is None else {**precision, "device": device}).resolve()
        self.network.to(self.compute.device)
        self.engine = Engine(self.network, assembly.processor, drop=self.recipe.drop_media)

    def chat(
        self,
        *parts: Part | str,
        history: Sequence[Message] = (),
        sampling: Sampling | None = None,
        tokens: int | None = None,
        drop_media: MediaDrop | Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Answer:
        """Answer one user turn.

        Args:
            parts: text and media in reading order.
            history: earlier messages.
            sampling: how to draw; or its fields as keywords (``max_new_tokens=20``).
            tokens: the most tokens of all media; ``Answer.choices`` says what became fewer for it.
            drop_media: media tokens that the decoder goes on without (``{"after": 2, "share": 0.5}``), in the place of
                the recipe's; see :class:`~polymodal.models.layers.dropping.MediaDrop`.
            options: fields of :class:`Sampling`.

        Raises:
            SampleError: if the turn cannot be laid out for this model.
            MediaError: if a media item cannot be used.
        """
        started = time.perf_counter()
        generation = Generation()
        drawn = sampling or Sampling.parse(options)
        pieces = list(self._stream(_turn(parts, history, tokens), drawn, generation, drop_media))
        return Answer(
            "".join(pieces),
            tuple(generation.ids),
            generation.finish,
            generation.num_prompt_tokens,
            generation.num_reused_tokens,
            time.perf_counter() - started,
            tuple(generation.choices),
        )

    def stream(
        self,
        *parts: Part | str,
        history: Sequence[Message] = (),
        sampling: Sampling | None = None,
        tokens: int | None = None,
        drop_media: MediaDrop | Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Iterator[str]:
        """Like :meth:`chat`, yielding the text piece by piece as it is drawn."""
        drawn = sampling or Sampling.parse(options)
        return self._stream(_turn(parts, history, tokens), drawn, Generation(), drop_media)

    def answer(
        self,
        samples: Sequence[Sample],
        max_new_tokens: int = 32,
        drop_media: MediaDrop | Mapping[str, Any] | None = None,
    ) -> list[str]:
        """Greedy answers to many conversations, batched; trailing assistant turns are left out of the prompts."""
        prompts = [_without_answer(sample) for sample in samples]
        drop = _parsed(drop_media)
        generations = self.engine.generate(prompts, Sampling(max_new_tokens=max_new_tokens), drop=drop)
        return [self.tokenizer.decode(generation.ids).strip() for generation in generations]

    def caption(
        self,
        media: Sequence[Media | None],
        request: str = CAPTION_REQUEST,
        sampling: Sampling | None = None,
        **options: Any,
    ) -> list[str]:
        """A caption of each medium, greedily unless the sampling says otherwise.

        Args:
            media: what to describe; None stands for nothing, as a control: what the words alone would be.
            request: what a model that chats is asked (an empty text: nothing but the medium, as BLIP's captioner wants
                it). Models with an encoder backbone read no words and are asked nothing.
            sampling: how to draw; or its fields as keywords (``max_new_tokens=40``).
            options: fields of :class:`Sampling`; 96 new tokens unless told.

        Raises:
            ConfigError: if the model cannot write captions.
            SampleError: if the model does not take a medium.
            MediaError: if one cannot be used.
        """
        drawn = sampling or Sampling.parse({"max_new_tokens": 96, **options})
        if self.engine.processor.chat is None:
            return [written.text for written in write_captions(self.engine, media, drawn)]
        turns = [tuple(part for part in (medium, request and Text(request)) if part) for medium in media]
        asked = [Sample(f"medium {i}", (Message("user", parts),)) for i, parts in enumerate(turns)]
        generations = self.engine.generate(asked, drawn)
        return [self.tokenizer.decode(generation.ids).strip() for generation in generations]

    def embed(
        self, parts: Sequence[Part | str], batch_size: int = 64, stream: str | None = None
    ) -> NDArray[np.float32]:
        """Unit vectors in the model's shared space, float32 ``[N, E]``, one per part.

        A stream whose items have several, of which the best counts (BLIP-2's pictures), gives ``[N, M, E]``.

        Args:
            parts: texts and media.
            batch_size: parts at a time; the vector of one does not depend on the others.
            stream: the stream that reads all of them; None takes the first of each part's modality without a view of
                its own (``depth``).

        Raises:
            ConfigError: if the model has no projection head, or no such stream, or some parts have one vector and some
                several.
            SampleError: if no stream of the shared space takes a part's modality.
        """
        return embed_parts(self.engine, [_part(part) for part in parts], batch_size, stream)

    def keyframes(self, video: Video, question: str, count: int, candidates: int = 64) -> Video:
        """The ``count`` frames of a video most like a question, of ``candidates`` spread over it.

        See :func:`polymodal.recipes.keyframes.keyframes`.
        """
        return keyframes(self, video, question, count, candidates)

    def classify(self, samples: Sequence[Sample], batch_size: int = 256) -> tuple[list[str], NDArray[np.float32]]:
        """The class of each view set by the model's class head.

        Args:
            samples: view sets; any of the model's modalities may be absent from any of them.
            batch_size: samples at a time; the result of one does not depend on the others.

        Returns:
            The likeliest label of each sample, and probabilities float32 ``[S, C]`` in the order of the head's
            ``classes``.

        Raises:
            ConfigError: if the model has no class head.
            SampleError: if a sample has none of the model's modalities.
        """
        self.network.head("class")
        classes = next((h.classes for h in self.recipe.model.heads.values() if isinstance(h, ClassConfig)), ())
        chances = [
            self.engine.class_logits(samples[start : start + batch_size]).softmax(1).numpy()
            for start in range(0, len(samples), batch_size)
        ]
        probabilities_SC = np.concatenate([*chances, np.zeros((0, len(classes)), np.float32)])
        return [classes[index] for index in probabilities_SC.argmax(1)], probabilities_SC

    @property
    def can_match(self) -> bool:
        """Whether the model has a matching head, so that :meth:`match` works."""
        return any(head.use == "matching" for head in self.recipe.model.heads.values())

    def match(self, samples: Sequence[Sample], batch_size: int = 256) -> NDArray[np.float32]:
        """The chance that the parts of each view set belong together, by the model's matching head, float32 ``[S]``.

        Raises:
            ConfigError: if the model has no matching head.
            SampleError: if a sample has none of the model's modalities.
        """
        found = [
            self.engine.match_logits(samples[start : start + batch_size]).sigmoid().numpy()
            for start in range(0, len(samples), batch_size)
        ]
        return np.concatenate([*found, np.zeros(0, np.float32)]).astype(np.float32)

    def fill(self, samples: Sequence[Sample], hidden: Sequence[tuple[int, int]], head: str = "") -> list[str]:
        """What stands in the text of each view set at the hidden characters ``[start, end)``.

        See :func:`polymodal.inference.filling.fill`.
        """
        return fill(self.engine, samples, hidden, head)

    @overload
    def transcribe(
        self,
        parts: Part,
        *,
        language: str | None = None,
        task: Task = "transcribe",
        timestamps: bool = False,
        batch_size: int = 8,
    ) -> str: ...

    @overload
    def transcribe(
        self,
        parts: Sequence[Part],
        *,
        language: str | None = None,
        task: Task = "transcribe",
        timestamps: bool = False,
        batch_size: int = 8,
    ) -> list[str]: ...

    def transcribe(
        self,
        parts: Part | Sequence[Part],
        *,
        language: str | None = None,
        task: Task = "transcribe",
        timestamps: bool = False,
        batch_size: int = 8,
    ) -> str | list[str]:
        """What was said in a recording, or in each of several.

        Args:
            parts: a recording, or several.
            language: spoken in them, as its code (``en``), for models that are told (Whisper); None listens.
            task: ``transcribe``, or ``translate`` into English.
            timestamps: whether the text says when each stretch begins and ends.
            batch_size: recordings (or clips of one) at a time; the transcript of one does not depend on the others.

        Raises:
            ConfigError: if the model cannot transcribe, or not like that.
            MediaError: if a recording cannot be used.
        """
        several = [parts] if isinstance(parts, Part) else list(parts)
        if any(head.use == "ctc" for head in self.recipe.model.heads.values()):
            if language is not None or task != "transcribe" or timestamps:
                raise ConfigError("transcribe: this model writes what it hears, without language, task or timestamps")
            found = transcribe_ctc(self.engine, several, batch_size)
        else:
            found = transcribe_speech(self.engine, several, Speech(language, task, timestamps), batch_size)
        return found[0] if isinstance(parts, Part) else found

    def features(self, parts: Sequence[Part | str], stream: str | None = None) -> list[PartFeatures]:
        """What the encoders make of parts, one result per part.

        Args:
            parts: media, or texts for a model with a text stream.
            stream: which stream's encoder; None takes the first of the part's modality.

        Raises:
            SampleError: if no stream takes a part's modality.
        """
        return [self._features(_part(part), stream) for part in parts]

    def _features(self, part: Part, stream: str | None) -> PartFeatures:
        streams = self.recipe.model.streams
        fitting = [n for n, s in streams.items() if s.modality == part.modality and stream in (None, n)]
        if not fitting:
            raise SampleError(getattr(part, "name", part.modality), f"is {part.modality}, no stream takes it")
        return PartFeatures(*self.engine.features(fitting[0], part))

    def logits(self, parts: Sequence[Part | str]) -> NDArray[np.float32]:
        """Logits over the fused sequence of one user turn and the opening of its answer, float32 ``[T, V]``."""
        return np.asarray(self.engine.logits(_turn(tuple(parts), ())).cpu().numpy(), dtype=np.float32)

    def export(self, out: str | os.PathLike[str], architecture: str | None = None) -> str:
        """Write the model as a checkpoint folder that the reference library and common servers read.

        Args:
            out: a new or empty folder.
            architecture: the published layout; None takes the first that says everything about this model.

        Returns:
            The architecture's name.

        Raises:
            ConfigError: if no published layout holds this model, saying why for each.
            CheckpointError: if ``out`` is not empty.
        """
        tensors = self.network.state_dict()
        unique = {name: tensors[name] for name in wanted_names(self.network)}
        own = self.tokenizer
        has_pad = own.names.pad is not None
        vocabulary = Vocabulary(own.size, own.controls, own.bos_id, own.eos_id, own.pad_id if has_pad else None)
        name = export_hub(self.recipe.model, unique, vocabulary, Path(out), architecture, self.recipe.sources)
        export_tokenizers(self.recipe, own, self.text_tokenizers, Path(out))
        return name

    def load_adapter(self, source: str | os.PathLike[str], name: str = DEFAULT) -> list[str]:
        """Give the model an adapter in the hub's layout; it acts from now on, beside those that act already.

        Args:
            source: a folder with ``adapter_config.json``, or a hub id.
            name: what to call it.

        Returns:
            The paths of the adapted modules.

        Raises:
            CheckpointError: if the folder is no adapter, or tensors of it match nothing in the model; all are listed.
            ConfigError: if the name is taken, or there is no native form of its kind.
        """
        paths = load_adapter(self.recipe, self.network, source, name)
        self._forget()
        return paths

    def use_adapters(self, names: Sequence[str]) -> None:
        """Let exactly these adapters act; none: the model as it is without.

        Raises:
            ConfigError: if there is no adapter of a name.
        """
        use_adapters(self.network, names)
        self._forget()

    def merge(self, names: Sequence[str] | None = None) -> list[str]:
        """Merge adapters into the weights; every output stays the same, within rounding.

        Args:
            names: which ones; None: those that act.

        Returns:
            The paths of the merged layers.

        Raises:
            ConfigError: if one cannot be merged; nothing has been changed then.
        """
        layers = merge_adapters(self.network, names).layers
        self._forget()
        return layers

    def export_adapter(self, out: str | os.PathLike[str], name: str = DEFAULT) -> Path:
        """Write one adapter in the hub's layout; see :func:`polymodal.recipes.adapters_hub.export_adapter`."""
        return export_adapter(self.recipe, self.network, name, out)

    def _forget(self) -> None:
        """Keys and values of earlier prompts are those of other weights now."""
        self.engine.prefixes = PrefixCache(self.engine.prefixes.max_bytes)

    def _stream(
        self,
        sample: Sample,
        sampling: Sampling,
        generation: Generation,
        drop: MediaDrop | Mapping[str, Any] | None,
    ) -> Iterator[str]:
        verdict = check_input(sample)
        if verdict.action == "block":
            found = "; ".join(reason.message for reason in verdict.reasons)
            raise SampleError(sample.id, f"refused by the input check: {found}")
        decoder = TokenStream(self.tokenizer)
        for token in self.engine.stream(sample, sampling, generation, _parsed(drop)):
            piece = decoder.push(token)
            if piece:
                yield piece
        rest = decoder.finish()
        if rest:
            yield rest


def _part(part: Part | str) -> Part:
    return Text(part) if isinstance(part, str) else part


def _parsed(drop: MediaDrop | Mapping[str, Any] | None) -> MediaDrop | None:
    return None if drop is None else MediaDrop.parse(drop, "drop_media")


def _turn(parts: tuple[Part | str, ...], history: Sequence[Message], tokens: int | None = None) -> Sample:
    if not parts:
        raise ConfigError("found nothing to answer, expected at least one text or media part")
    turn = conversation(*parts)
    return Sample(turn.id, (*history, *turn.messages), tokens=tokens)


def _without_answer(sample: Sample) -> Sample:
    messages = sample.messages
    if messages and messages[-1].role == "assistant":
        messages = messages[:-1]
    return Sample(sample.id, messages, sample.views, sample.label, sample.meta, sample.tokens)
