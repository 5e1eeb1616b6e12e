"""What every connector promises, over every entry of the table: a new connector is tested by existing.

Entries are built from their defaults, which are small; ``VARIANTS`` adds the settings that change a tensor's way.
"""

from typing import Any

import pytest
import torch
from gradients import assert_reach_all_but_frozen
from torch import Tensor

from polymodal.core.errors import ConfigError
from polymodal.models.connectors import CONNECTORS, Connector, ConnectorConfig

VARIANTS: list[dict[str, Any]] = [
    {"use": "mlp", "depth": 3, "activation": "relu"},
    {"use": "pool", "over": "grid", "factor": 3},
    {"use": "pool", "over": "grid", "grid_features": 4},
    {"use": "pool", "factor": 5},
    {"use": "pixel_shuffle", "depth": 2, "grid_features": 4},
    {"use": "qformer", "queries": 3, "cross_every": 1},
    {"use": "perceiver", "latents": 5, "depth": 1},
    {"use": "temporal_attention", "output": "summary"},
    {"use": "temporal_attention", "output": "summary", "causal": True},
    {"use": "temporal_attention", "causal": True, "depth": 2},
    {"use": "temporal_lstm", "output": "summary"},
    {"use": "temporal_lstm", "output": "summary", "bidirectional": True, "depth": 2},
    {"use": "temporal_lstm", "bidirectional": True},
]
CASES = [{"use": name} for name in CONNECTORS] + VARIANTS
CANDIDATES = (16, 1, 4, 36, 0, 7, 20)
IN_DIM, OUT_DIM = 12, 24

cases = pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(value) for value in case.values()))


def out_dim(config: ConnectorConfig) -> int:
    """Tokens are as wide as features where nothing maps them."""
    return IN_DIM if config.use == "identity" else OUT_DIM


def make(case: dict[str, Any]) -> tuple[ConnectorConfig, Connector]:
    torch.manual_seed(0)
    config = CONNECTORS.parse(case)
    return config, config.build(IN_DIM, out_dim(config)).eval()


def features(config: ConnectorConfig) -> list[Tensor]:
    """Ragged units of every size that the connector says it takes."""
    generator = torch.Generator().manual_seed(0)
    counts = []
    for count in CANDIDATES:
        try:
            config.num_tokens(count)
        except ConfigError:
            continue
        counts.append(count)
    assert len(counts) >= 3
    return [torch.randn(count, IN_DIM, generator=generator) for count in counts]


def collate(units: list[Tensor], extra: int = 0, fill: float = 0.0) -> tuple[Tensor, Tensor]:
    longest = max(len(unit) for unit in units) + extra
    x_UND = torch.full((len(units), longest, IN_DIM), fill)
    is_valid_UN = torch.zeros(len(units), longest, dtype=torch.bool)
    for row, unit in enumerate(units):
        x_UND[row, : len(unit)], is_valid_UN[row, : len(unit)] = unit, True
    return x_UND, is_valid_UN


@cases
def test_counts_shapes_and_masks_are_exact(case: dict[str, Any]) -> None:
    config, connector = make(case)
    units = features(config)
    tokens, is_valid = connector(*collate(units))
    counts = [config.num_tokens(len(unit)) for unit in units]
    assert is_valid.dtype == torch.bool and is_valid.shape == tokens.shape[:2]
    assert tokens.shape[0] == len(units) and tokens.shape[2] == out_dim(config)
    assert is_valid.sum(1).tolist() == counts
    for row, count in enumerate(counts):
        assert is_valid[row, :count].all()
        assert not tokens[row, count:].any()
    assert tokens.isfinite().all()
    assert config.num_tokens(0) == 0


@cases
def test_num_tokens_is_exact_or_refused_for_every_count(case: dict[str, Any]) -> None:
    config, connector = make(case)
    for count in range(1, 50):
        x_UND, is_valid = collate([torch.randn(count, IN_DIM)])
        try:
            expected = config.num_tokens(count)
        except ConfigError:
            with pytest.raises(ConfigError):
                connector(x_UND, is_valid)
            continue
        assert connector(x_UND, is_valid)[0].shape[1] == expected, count


@cases
def test_padding_order_and_neighbours_do_not_matter(case: dict[str, Any]) -> None:
    config, connector = make(case)
    units = features(config)
    with torch.no_grad():
        together, _ = connector(*collate(units, fill=100.0))
        reverse, _ = connector(*collate(units[::-1], extra=3))
        for row, unit in enumerate(units):
            if not len(unit):
                continue
            alone, _ = connector(*collate([unit]))
            for tokens, place in ((together, row), (reverse, len(units) - 1 - row)):
                found = tokens[place, : config.num_tokens(len(unit))]
                torch.testing.assert_close(found, alone[0], atol=1e-5, rtol=1e-5)


@cases
def test_every_trainable_parameter_learns_and_no_frozen_one(case: dict[str, Any]) -> None:
    config, connector = make(case)
    if config.use == "identity":
        pytest.skip("has no parameters")
    connector.train()
    batch = collate(features(config))
    weights = torch.Generator().manual_seed(1)

    def backward() -> None:
        tokens, _ = connector(*batch)
        (tokens * torch.randn(tokens.shape, generator=weights)).sum().backward()

    assert_reach_all_but_frozen(connector, backward)


@cases
def test_gradients_reach_the_features_and_only_the_valid_ones(case: dict[str, Any]) -> None:
    config, connector = make(case)
    x_UND, is_valid_UN = collate(features(config), extra=2)
    x_UND.requires_grad_(True)
    tokens, _ = connector(x_UND, is_valid_UN)
    (tokens * torch.randn(tokens.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    reached = x_UND.grad.abs().sum(-1) > 0
    assert torch.equal(reached, is_valid_UN)


@cases
def test_the_same_seed_gives_the_same_module_and_the_same_result(case: dict[str, Any]) -> None:
    (config, one), (_, other) = make(case), make(case)
    batch = collate(features(config))
    assert torch.equal(one(*batch)[0], one(*batch)[0])
    assert torch.equal(one(*batch)[0], other(*batch)[0])


@cases
def test_weights_and_config_go_out_and_come_back(case: dict[str, Any]) -> None:
    config, connector = make(case)
    torch.manual_seed(1)
    again = CONNECTORS.parse(config.to_data())
    assert again == config
    copy = again.build(IN_DIM, out_dim(again)).eval()
    copy.load_state_dict(connector.state_dict())
    batch = collate(features(config))
    assert torch.equal(copy(*batch)[0], connector(*batch)[0])
