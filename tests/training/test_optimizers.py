"""Groups by rule, Lion by its closed form, AdamW by torch's reference, resuming to the bit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from polymodal.core.errors import ConfigError
from polymodal.training.optimizers import OPTIMIZERS, AdamW, Lion, LionConfig, clip_gradients, set_rate


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(5, 4)
        self.norm = nn.LayerNorm(4)
        self.body = nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 4, 1))
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, ids):
        x = self.body[1](self.body[0](self.norm(self.embed(ids))).transpose(1, 2)).transpose(1, 2)
        return self.head(x) * self.scale


def train(model, optimizer, steps):
    losses = []
    for step in range(steps):
        ids = (torch.arange(6).reshape(2, 3) + step) % 5
        loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), (ids.flatten() + 1) % 5)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def decays(optimizer):
    return {name: group["weight_decay"] for group in optimizer.param_groups for name in group["names"]}


@pytest.mark.parametrize("use", OPTIMIZERS)
def test_every_optimizer_learns_and_decays_only_matrices(use):
    model = Model()
    # Muon gives the embedding, which is most of this model, a third of its rate.
    lr = 0.03 if use == "muon" else 0.01
    optimizer = OPTIMIZERS.parse({"use": use, "lr": lr, "weight_decay": 0.1}).build(model)
    assert {name for name, decay in decays(optimizer).items() if decay} == {"body.0.weight", "body.1.weight"}
    assert set(decays(optimizer)) == {name for name, _ in model.named_parameters()}
    losses = train(model, optimizer, 40)
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("use", OPTIMIZERS)
def test_every_optimizer_resumes_to_the_bit(use):
    config = OPTIMIZERS.parse({"use": use, "lr": 0.01})
    model = Model()
    optimizer = config.build(model)
    train(model, optimizer, 5)
    again = copy.deepcopy(model)
    resumed = config.build(again)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, 5)
    train(again, resumed, 5)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("use", OPTIMIZERS)
def test_parameters_without_a_gradient_are_left_alone(use):
    model = Model()
    optimizer = OPTIMIZERS.parse({"use": use, "lr": 0.1, "weight_decay": 0.5}).build(model)
    before = model.body[0].weight.detach().clone()
    model.scale.sum().backward()
    optimizer.step()
    assert torch.equal(model.body[0].weight, before)


def test_only_trainable_parameters_are_taken():
    model = Model()
    model.requires_grad_(False)
    model.norm.requires_grad_(True)
    assert set(decays(AdamW().build(model))) == {"norm.weight", "norm.bias"}


def test_rates_by_pattern_and_by_schedule():
    optimizer = AdamW(lr=0.1, lr_scale={"body": 0.5, "body.1": 0.1}).build(Model())
    set_rate(optimizer, 0.5)
    rates = {name: group["lr"] for group in optimizer.param_groups for name in group["names"]}
    assert rates["embed.weight"] == pytest.approx(0.05)
    assert rates["body.0.weight"] == rates["body.0.bias"] == pytest.approx(0.025)
    assert rates["body.1.weight"] == pytest.approx(0.005), "the last match counts"


def test_lion_by_hand():
    weight = nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))
    optimizer = Lion([weight], lr=0.1, betas=(0.9, 0.99), weight_decay=0.5)
    expected, momentum = weight.detach().clone(), torch.zeros(3)
    for grad in (torch.tensor([0.3, -0.1, 0.0]), torch.tensor([-0.001, 2.0, 0.0]), torch.tensor([-5.0, 0.01, 1.0])):
        weight.grad = grad
        optimizer.step()
        direction = torch.sign(0.9 * momentum + 0.1 * grad)
        expected = expected - 0.1 * (direction + 0.5 * expected)
        momentum = 0.99 * momentum + 0.01 * grad
    torch.testing.assert_close(weight.detach(), expected)
    torch.testing.assert_close(optimizer.state[weight]["momentum"], momentum)


def test_lion_takes_a_closure():
    weight = nn.Parameter(torch.ones(2))
    optimizer = Lion([weight], lr=0.1)

    def closure():
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 2.0
    torch.testing.assert_close(weight.detach(), torch.full((2,), 0.9))


def test_adamw_is_torchs_with_one_fused_kernel():
    model, reference = Model(), Model()
    optimizer = AdamW(lr=0.01, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.0).build(model)
    assert optimizer.defaults["fused"] is True
    plain = torch.optim.AdamW(reference.parameters(), lr=0.01, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.0)
    train(model, optimizer, 3)
    train(reference, plain, 3)
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_clipping():
    model = Model()
    optimizer = LionConfig().build(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    num = sum(parameter.numel() for parameter in model.parameters())
    assert clip_gradients(optimizer, 1.0) == pytest.approx(num**0.5)
    assert clip_gradients(optimizer, 1.0) == pytest.approx(1.0, abs=1e-4)
    model.scale.grad.fill_(float("nan"))
    assert clip_gradients(optimizer, 1.0) != clip_gradients(optimizer, 1.0), "NaN is reported, not hidden"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"use": "adam"}, "unknown optimizer 'adam'; did you mean 'adamw'"),
        ({"use": "adamw", "lr": 0}, "adamw.lr: Input should be greater than 0; found 0"),
        ({"use": "adamw", "betas": [0.9, 1.0]}, r"found betas \[0.9, 1.0\], expected two numbers in \[0, 1\)"),
        ({"use": "lion", "betas": [-0.1, 0.9]}, r"expected two numbers in \[0, 1\)"),
        ({"use": "lion", "eps": 1e-8}, "unknown key 'eps'"),
        (
            {"use": "adamw", "lr_scale": {"body": 0}},
            "the factor of 'body' is 0.0, expected above 0; freeze a part",
        ),
        (
            {"use": "adamw", "lr_scale": {"bdy": 0.1}},
            "lr_scale: no trainable parameter matches 'bdy'; nearest: body",
        ),
    ],
)
def test_messages(data, message):
    with pytest.raises(ConfigError, match=message):
        OPTIMIZERS.parse(data).build(Model())


def test_nothing_to_train():
    with pytest.raises(ConfigError, match="found no trainable parameter, expected at least one; see the stage's"):
        AdamW().build(Model().requires_grad_(False))
