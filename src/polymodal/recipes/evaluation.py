"""Evaluation of a run: models by folder, tasks by file or config."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from polymodal.core.config import load_yaml
from polymodal.core.errors import ConfigError
from polymodal.evaluation.baselines import Progress
from polymodal.evaluation.runner import evaluate as run_task
from polymodal.evaluation.scores import Report
from polymodal.evaluation.tasks import TASKS, QuestionsTask, TaskConfig
from polymodal.recipes.loading import dump_recipe, load_recipe
from polymodal.recipes.model import Model
from polymodal.recipes.run_folder import RECIPE
from polymodal.recipes.stored_models import load
from polymodal.training.state_files import hash_tensors


def resolve_task(task: Any, root: str | os.PathLike[str] = ".") -> TaskConfig:
    """A task config from a config, plain data, a YAML file, or a JSON Lines file of questions.

    Args:
        task: any of these.
        root: the folder that a relative ``data`` path starts from.
    """
    if isinstance(task, TaskConfig):
        return task
    if isinstance(task, str | os.PathLike):
        path = Path(task)
        if path.suffix not in (".yaml", ".yml"):
            return QuestionsTask(data=str(path))
        task = load_yaml(path.read_text(encoding="utf-8"), str(path))
        root = path.parent
    data = dict(task)
    if "data" in data:
        data["data"] = str(Path(root) / data["data"])
    return TASKS.parse(data, "task")


def own_tasks(run: str | os.PathLike[str]) -> list[TaskConfig]:
    """The tasks that the recipe of a run names under ``evaluate``; their data are below its ``data_root``.

    Raises:
        ConfigError: if the folder holds no recipe, or the recipe names none.
    """
    path = Path(run) / RECIPE
    if not path.is_file():
        raise ConfigError(f"{path.parent}: holds no {RECIPE} that would name tasks; give a file of questions or a task")
    recipe = load_recipe(path)
    if not recipe.evaluate:
        raise ConfigError(f"{path}: names no task under 'evaluate'; give a file of questions or a task")
    return [resolve_task(entry, recipe.data_root) for entry in recipe.evaluate]


def evaluate(
    model: Model | str | os.PathLike[str],
    task: Any,
    *,
    predictions: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Report:
    """Measure a model on a task, beside its baselines.

    Args:
        model: a loaded model or a run folder.
        task: a task config, its plain data, a YAML file of one, or a JSON Lines file of questions.
        predictions: where to store what the model said, for re-scoring. An evaluation that was interrupted goes on from
            there, if task, data and model are the same.
        progress: called as ``progress(condition, done, total)``.
    """
    loaded = model if isinstance(model, Model) else load(model)
    if predictions is None:
        return run_task(loaded, resolve_task(task), progress=progress)
    stored, own = os.fspath(predictions), fingerprint(loaded)
    return run_task(loaded, resolve_task(task), predictions=stored, progress=progress, fingerprint=own)


def fingerprint(model: Model) -> str:
    """SHA-256 in hex over what a model's answers follow from: weights, recipe and tokenizers."""
    digest = hashlib.sha256(hash_tensors(dict(_stored_tensors(model.network.state_dict()))).encode())
    digest.update(dump_recipe(model.recipe).encode())
    for tokenizer in (model.tokenizer, *model.text_tokenizers.values()):
        digest.update(json.dumps(tokenizer.hub_files(), sort_keys=True).encode())
    return digest.hexdigest()


def _stored_tensors(tensors: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The plain tensors; those in fewer bits are made of several."""
    for name, tensor in tensors.items():
        if type(tensor) not in (Tensor, nn.Parameter) and hasattr(tensor, "__tensor_flatten__"):
            parts, _ = tensor.__tensor_flatten__()
            yield from _stored_tensors({f"{name}.{part}": getattr(tensor, part) for part in parts})
        else:
            yield name, tensor
