"""Every adapter by name."""

from __future__ import annotations

from polymodal.core.config import Table
from polymodal.models.adapters.base import AdapterConfig
from polymodal.models.adapters.bottleneck import BottleneckConfig
from polymodal.models.adapters.dora import DoRAConfig
from polymodal.models.adapters.ia3 import IA3Config
from polymodal.models.adapters.lora import LoRAConfig
from polymodal.models.adapters.prefix import PrefixConfig
from polymodal.models.adapters.prompt import PromptConfig

ADAPTERS: Table[AdapterConfig] = Table(
    "adapter", [LoRAConfig, DoRAConfig, IA3Config, BottleneckConfig, PromptConfig, PrefixConfig]
)
