"""One place decides device and number format."""

from __future__ import annotations

import pytest
import torch

from polymodal.core.errors import ConfigError
from polymodal.training.precision import Compute, ComputeConfig


@pytest.fixture(autouse=True)
def _policy_is_put_back():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


def test_cpu_float32_does_nothing():
    compute = ComputeConfig(device="cpu").resolve()
    assert (compute, str(compute)) == (Compute(torch.device("cpu"), torch.float32), "cpu float32")
    with compute.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_bfloat16_runs_products_in_bfloat16_and_keeps_weights():
    compute = ComputeConfig(device="cpu", dtype="bfloat16").resolve()
    layer = torch.nn.Linear(2, 2)
    with compute.autocast():
        assert layer(torch.ones(1, 2)).dtype == torch.bfloat16
    assert layer.weight.dtype == torch.float32 and str(compute) == "cpu bfloat16"


def test_the_policy_for_float32_products_and_the_threads():
    threads = torch.get_num_threads()
    ComputeConfig(device="cpu").resolve().apply()
    assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cudnn.allow_tf32
    ComputeConfig(device="cpu", dtype="bfloat16").resolve().apply()
    assert torch.get_float32_matmul_precision() == "high" and torch.backends.cudnn.allow_tf32
    assert torch.get_num_threads() == threads


def test_auto_takes_cuda_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert ComputeConfig().resolve().device.type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert ComputeConfig().resolve().device.type == "cuda"
    assert ComputeConfig(device="cpu").resolve().device.type == "cpu"


def test_messages(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"device: found no usable CUDA device \(torch .*\), .* use 'auto' or 'cpu'"):
        ComputeConfig(device="cuda").resolve()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old Card")
    with pytest.raises(ConfigError, match="dtype: Old Card does not support 'bfloat16', expected 'float32'"):
        ComputeConfig(dtype="bfloat16").resolve()
    with pytest.raises(ConfigError, match="dtype: Input should be 'float32' or 'bfloat16'"):
        ComputeConfig.parse({"dtype": "float16"})
