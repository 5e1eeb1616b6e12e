"""The public functions: build, check, train, evaluate, load."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from torch import nn

from polymodal.recipes import run as runs
from polymodal.recipes.assemble import assemble
from polymodal.recipes.check import CheckReport, check_recipe
from polymodal.recipes.evaluation import evaluate
from polymodal.recipes.loading import load_recipe
from polymodal.recipes.stored_models import load

__all__ = ["build", "check", "evaluate", "load", "train"]


def build(recipe: Any, overrides: Iterable[str] = ()) -> nn.Module:
    """The network of a recipe, with random weights drawn from its seed.

    Args:
        recipe: preset name, YAML file, plain data or :class:`Recipe`.
        overrides: ``key.sub=value`` changes.
    """
    return assemble(load_recipe(recipe, overrides)).network


def check(recipe: Any, overrides: Iterable[str] = ()) -> CheckReport:
    """Prove a recipe before a step is spent; see :mod:`polymodal.recipes.check`."""
    return check_recipe(load_recipe(recipe, overrides))


def train(
    recipe: Any, out: str | os.PathLike[str], overrides: Iterable[str] = (), *, quiet: bool = False
) -> runs.RunResult:
    """Train a recipe into a run folder, or resume the run that is there; see :mod:`polymodal.recipes.run`."""
    return runs.train(load_recipe(recipe, overrides), out, quiet=quiet)
