"""The one place that decides where a run computes and in which number format."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from polymodal.core.config import Config
from polymodal.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Compute:
    """A decided device and number format. Weights and optimizer state stay float32 whatever ``dtype`` says.

    Args:
        device: where the model and its inputs live.
        dtype: what matrix products run in.
    """

    device: torch.device
    dtype: torch.dtype

    def autocast(self) -> AbstractContextManager[Any]:
        """The context for forward passes: mixed precision for bfloat16, nothing for float32."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def apply(self) -> None:
        """Set the process-wide policy for float32 matrix products.

        float32 means float32: TF32 is off, and a GPU run is comparable with a CPU run. A bfloat16 run lets the few
        products that stay float32 use TF32. The number of threads is never touched.
        """
        torch.set_float32_matmul_precision("highest" if self.dtype == torch.float32 else "high")
        torch.backends.cudnn.allow_tf32 = self.dtype != torch.float32

    def __str__(self) -> str:
        return f"{self.device.type} {str(self.dtype).removeprefix('torch.')}"


class ComputeConfig(Config):
    """What a recipe asks for.

    Args:
        device: ``auto`` is CUDA where there is one, else the CPU.
        dtype: the number format of matrix products.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"

    def resolve(self) -> Compute:
        """Decide.

        Raises:
            ConfigError: if CUDA is asked for and absent, or lacks bfloat16.
        """
        has_cuda = torch.cuda.is_available()
        if self.device == "cuda" and not has_cuda:
            raise ConfigError(
                f"device: found no usable CUDA device (torch {torch.__version__}), expected one for 'cuda'; "
                "use 'auto' or 'cpu', or install a CUDA build of torch"
            )
        device = torch.device("cuda" if has_cuda and self.device != "cpu" else "cpu")
        dtype = torch.bfloat16 if self.dtype == "bfloat16" else torch.float32
        if dtype == torch.bfloat16 and device.type == "cuda" and not torch.cuda.is_bf16_supported():
            name = torch.cuda.get_device_name(device)
            raise ConfigError(f"dtype: {name} does not support 'bfloat16', expected 'float32' on this device")
        return Compute(device, dtype)
