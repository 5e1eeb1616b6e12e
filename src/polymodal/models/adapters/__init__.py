"""Adapters: a few new parameters on a frozen part, several at once under names."""

from polymodal.models.adapters.apply import (
    adapter_names,
    adapter_parameters,
    apply_adapter,
    asleep_parameters,
    use_adapters,
)
from polymodal.models.adapters.base import DEFAULT, Adapted, Adapter, AdapterConfig, adapted_modules
from polymodal.models.adapters.merge import Merged, check_merge, merge_adapters, merge_layers
from polymodal.models.adapters.table import ADAPTERS

__all__ = [
    "ADAPTERS",
    "DEFAULT",
    "Adapted",
    "Adapter",
    "AdapterConfig",
    "Merged",
    "adapted_modules",
    "adapter_names",
    "adapter_parameters",
    "apply_adapter",
    "asleep_parameters",
    "check_merge",
    "merge_adapters",
    "merge_layers",
    "use_adapters",
]
