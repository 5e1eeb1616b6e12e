"""``open_clip`` and ``timm`` without torchvision, whose package loads only beside a CUDA torch."""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
import types
from typing import Any

import pytest

_NAMES = (
    "torchvision",
    "torchvision.models",
    "torchvision.models.feature_extraction",
    "torchvision.ops",
    "torchvision.ops.misc",
    "torchvision.transforms",
    "torchvision.transforms.functional",
    "torchvision.transforms.v2",
    "torchvision.datasets",
    "torchvision.utils",
)


class _AnyAttribute(type):
    """A class whose attributes are their own names: enough for enumerations that are only looked up."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Stub(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _AnyAttribute(name, (), {})


def import_stubbed(name: str) -> Any:
    """A module that imports torchvision and does not need it; skips the test where it is not installed."""
    if name in sys.modules:
        return sys.modules[name]
    stubs = {module: _Stub(module) for module in _NAMES}
    for module, stub in stubs.items():
        stub.__spec__ = importlib.machinery.ModuleSpec(module, None)
        stub.__path__ = []
        stub.__version__ = "0.0"
    for module in _NAMES[1:]:
        parent, child = module.rsplit(".", 1)
        setattr(stubs[parent], child, stubs[module])
    real = {module: sys.modules.get(module) for module in _NAMES}
    sys.modules.update(stubs)
    try:
        return importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"{name} is not here: {error}")
    finally:
        # Nothing else may take the stub for the library.
        for module, before in real.items():
            sys.modules.pop(module)
            if before is not None:
                sys.modules[module] = before
