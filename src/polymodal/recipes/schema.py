"""The recipe: one declarative file that is the whole model, its training and its evaluation."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, model_validator

from polymodal.core.config import Config, unknown
from polymodal.core.errors import ConfigError
from polymodal.core.limits import Limits
from polymodal.core.passes import kind_of
from polymodal.models.backbones.decoder import DecoderConfig
from polymodal.models.compose.config import ModelConfig
from polymodal.models.compose.readouts import supports
from polymodal.models.heads.table import ClassConfig, ProjectionConfig
from polymodal.models.layers.dropping import MediaDrop
from polymodal.objectives.classify import Classify
from polymodal.objectives.report import ObjectiveConfig
from polymodal.training.precision import ComputeConfig
from polymodal.training.stage import StageConfig


class PartSource(Config):
    """Where a part's first weights come from.

    Args:
        folder: a checkpoint folder, or a run folder's parts by the same paths.
        part: the part's path within that checkpoint's own model (``streams.image.encoder``).
        architecture: what its layout is called; an export tries it first. "" where it has no native form.
    """

    folder: str
    part: str
    architecture: str = ""


class Recipe(Config):
    """A complete run."""

    name: str
    """Of the run; its folder is ``runs/NAME`` unless told otherwise."""
    model: ModelConfig
    """Streams, backbone, heads and tokenizer."""
    stages: tuple[StageConfig, ...] = ()
    """In the order in which they run; none for a model that is only used."""
    evaluate: tuple[dict[str, Any], ...] = ()
    """Tasks that a trained model is measured on; ``data`` starts from ``data_root``."""
    data_root: str = "."
    """Folder that data paths start from; relative to where the command runs."""
    seed: int = 0
    """Of everything random: weights, order of the data, dropout."""
    precision: ComputeConfig = ComputeConfig()
    """Device and number formats."""
    limits: Limits = Limits()
    """Upper bounds of media; what is above is refused by name."""
    overflow: Literal["refuse", "cut_text"] = "refuse"
    """What happens to samples longer than the backbone's ``max_tokens``."""
    tokens: PositiveInt | None = None
    """The most tokens of all media of a sample: tiles, frames and detail become fewer until they fit. None: any
    number."""
    drop_media: MediaDrop | None = None
    """Media tokens that the decoder goes on without when it answers; training reads all of them. None: none."""
    max_bad_rate: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.05
    """Share of unusable samples above which a run stops."""
    keep_last: PositiveInt = 2
    """Checkpoints kept besides the best."""
    extend: str | None = None
    """A finished run or checkpoint folder that this recipe adds to: its model is the folder's with what stands here on
    top, and every part that is there starts with its weights."""
    sources: dict[str, PartSource] = Field(default_factory=dict)
    """Per part (``streams.image.encoder``, ``backbone``), the checkpoint that its first weights come from; filled in
    where a part says ``from``. The path "" stands for the whole model."""
    tensorboard: bool = False
    """Write TensorBoard logs into the run folder (extra ``log``)."""

    @model_validator(mode="before")
    @classmethod
    def _fill_classes(cls, data: Any) -> Any:
        """A ``classify`` objective without ``classes`` takes those of the model's class head."""
        heads = _entry(_entry(data, "model"), "heads")
        classes = [_entry(head, "classes") for head in _values(heads) if _entry(head, "use") == "class"]
        stages = _entry(data, "stages")
        if not classes or not classes[0] or not isinstance(stages, list | tuple):
            return data
        return {**data, "stages": [_with_classes(stage, classes[0]) for stage in stages]}

    @model_validator(mode="after")
    def _agree(self) -> Recipe:
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ValueError(f"stages: found the names {names}, expected each once")
        self._check_drop()
        can = supports(self.model)
        for stage in self.stages:
            self._check_codes(stage)
            for name, _, objective in stage.parsed_objectives():
                place = f"stages.{stage.name}.objectives.{name}"
                if objective.needs is not None and kind_of(objective.needs) not in can:
                    raise ValueError(
                        f"{place}: needs the pass {kind_of(objective.needs)!r}, which this model cannot run; "
                        f"{unknown('pass', kind_of(objective.needs), sorted(can))}"
                    )
                self._check_streams(place, objective.streams)
                self._check_classes(place, objective)
        return self

    def _check_drop(self) -> None:
        """Only our own decoder goes on with fewer tokens, and only before its last block."""
        backbone, drop = self.model.backbone, self.drop_media
        if drop is None:
            return
        if not isinstance(backbone, DecoderConfig) or backbone.transformer.depth <= drop.after:
            depth = f" of {backbone.transformer.depth} blocks" if isinstance(backbone, DecoderConfig) else ""
            raise ValueError(
                f"drop_media: found after: {drop.after} and the backbone {backbone.use!r}{depth}, expected a 'decoder' "
                "with more blocks"
            )
        if self.model.watched_streams or backbone.transformer.window or backbone.transformer.relative_buckets:
            raise ValueError("drop_media: found cross-attention, a window or relative positions, expected none of them")

    def _check_codes(self, stage: StageConfig) -> None:
        """Only streams of discrete codes have centres."""
        coded = [name for name, stream in self.model.streams.items() if stream.encoder.use == "quantised"]
        for name in stage.fit_codes:
            if name not in coded:
                raise ValueError(
                    f"stages.{stage.name}.fit_codes: {unknown('stream with a quantised encoder', name, coded)}"
                )

    def _check_streams(self, place: str, named: tuple[str, ...]) -> None:
        """The streams that an objective names must stand in the shared space."""
        spaces = [head for head in self.model.heads.values() if isinstance(head, ProjectionConfig)]
        valid = [name for head in spaces for name in head.streams or tuple(self.model.streams)]
        for name in named:
            if name not in valid:
                raise ValueError(f"{place}: {unknown('stream of the projection head', name, valid)}")

    def _check_classes(self, place: str, objective: ObjectiveConfig) -> None:
        heads = [head for head in self.model.heads.values() if isinstance(head, ClassConfig)]
        if not isinstance(objective, Classify):
            return
        if not heads:
            raise ValueError(f"{place}: needs a head of the kind 'class', the model has {sorted(self.model.heads)}")
        if objective.classes != heads[0].classes:
            raise ValueError(
                f"{place}: found the classes {list(objective.classes)}, expected those of the class head in their "
                f"order, {list(heads[0].classes)}; leave 'classes' out, and they are taken from there"
            )

    def stage(self, name: str) -> StageConfig:
        """The stage called ``name``.

        Raises:
            ConfigError: if there is none.
        """
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise ConfigError(unknown("stage", name, [stage.name for stage in self.stages]))


def _entry(data: Any, key: str) -> Any:
    """``data[key]`` or the attribute, as far as there is one: a recipe may be given as plain data or as configs."""
    return data.get(key) if isinstance(data, dict) else getattr(data, key, None)


def _values(data: Any) -> list[Any]:
    return list(data.values()) if isinstance(data, dict) else []


def _with_classes(stage: Any, classes: Any) -> Any:
    if not isinstance(stage, dict) or not isinstance(stage.get("objectives"), dict):
        return stage
    objectives = {}
    for name, value in stage["objectives"].items():
        options = dict(value) if isinstance(value, dict) else {"weight": value}
        if options.get("use", name) == "classify" and "classes" not in options:
            value = {**options, "classes": list(classes)}
        objectives[name] = value
    return {**stage, "objectives": objectives}
