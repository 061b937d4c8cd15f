"""First weights, parameter groups and learning rates are those of the earlier package, or of torch's own schedules."""

import math

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as torchs

from iabn_hub.layers import ABN, InPlaceABN
from iabn_hub.recipes import RecipeError, recipe_from
from iabn_hub.training.network import build_network
from iabn_hub.training.optimisation import LearningRate, build_optimizer

from ..conftest import TINY

STEPS, EPOCHS = 7, 9


def recipe(**changes):
    return recipe_from({name: {**section, **changes.get(name, {})} for name, section in TINY.items()}, "recipe")


def schedule(kind, mode="epoch", **params):
    return {"schedule": {"type": kind, "mode": mode, "epochs": EPOCHS, "params": params}}


def factors(content, **more):
    rate = LearningRate(recipe(optimizer=content, **more), STEPS)
    return [rate.factor(step) for step in range(STEPS * EPOCHS)]


@pytest.mark.parametrize("mode", ["epoch", "step"])
@pytest.mark.parametrize(
    ("kind", "params", "theirs"),
    [
        ("constant", {}, lambda o, n: torchs.ConstantLR(o, 1.0)),
        ("step", {"step_size": 4, "gamma": 0.3}, lambda o, n: torchs.StepLR(o, 4, 0.3)),
        ("multistep", {"milestones": [2, 5], "gamma": 0.3}, lambda o, n: torchs.MultiStepLR(o, [2, 5], 0.3)),
        ("exponential", {"gamma": 0.9}, lambda o, n: torchs.ExponentialLR(o, 0.9)),
        ("linear", {"alpha": -0.01, "beta": 1.0}, lambda o, n: torchs.LambdaLR(o, lambda t: 1 - 0.01 * t)),
        ("cosine", {}, torchs.CosineAnnealingLR),
    ],
)
def test_schedules_are_torchs(kind, params, theirs, mode):
    times = EPOCHS if mode == "epoch" else EPOCHS * STEPS
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = theirs(optimizer, times)
    expected = []
    for _ in range(times):
        expected += [optimizer.param_groups[0]["lr"]] * (STEPS if mode == "epoch" else 1)
        optimizer.step()
        scheduler.step()
    assert factors(schedule(kind, mode, **params)) == pytest.approx(expected, abs=1e-9)


def test_warm_up_is_a_line_and_the_cosine_begins_after_it():
    found = factors(schedule("cosine", "step"), training={"warmup_epochs": 2, "warmup_factor": 0.1})
    warm = 2 * STEPS
    assert found[:warm] == pytest.approx([0.1 + 0.9 * step / warm for step in range(warm)])
    rest = STEPS * EPOCHS - warm
    assert found[warm:] == pytest.approx([(1 + math.cos(math.pi * step / rest)) / 2 for step in range(rest)])


def test_the_published_linear_schedule_ends_at_zero():
    rate = LearningRate(recipe(optimizer=schedule("linear", "step", alpha=-1 / 60, beta=1.0)), STEPS)
    assert [rate.factor(step) for step in (0, 30, 60, 62)] == [1, 0.5, 0, 0]


def test_a_schedule_that_is_over_too_early_is_refused():
    with pytest.raises(RecipeError, match="falls to 0 before step 56, where the last epoch begins"):
        factors(schedule("linear", "step", alpha=-1 / 50, beta=1.0))


@pytest.mark.parametrize("init", ["xavier_normal", "xavier_uniform", "kaiming_normal", "kaiming_uniform", "orthogonal"])
@pytest.mark.parametrize("activation", ["leaky_relu", "elu", "identity"])
def test_first_weights_have_the_gain_of_the_activation(init, activation):
    torch.manual_seed(0)
    network = build_network(recipe(network={"weight_init": init, "activation": activation, "activation_param": 0.2}))
    slope = 0.2 if activation == "leaky_relu" else 0.0
    # The earlier package gives kaiming's functions 0 for elu, and xavier's the gain of relu; identity has a gain of 1.
    gain = 1.0 if activation == "identity" and not init.startswith("kaiming") else math.sqrt(2 / (1 + slope**2))
    weight = network.layer4[0].conv2.weight  # (96, 96, 3, 3)
    fan = weight[0].numel()
    deviation = {"xavier": gain / math.sqrt(fan), "kaiming": gain / math.sqrt(fan), "orthogonal": gain / math.sqrt(fan)}
    assert weight.std().item() == pytest.approx(deviation[init.partition("_")[0]], rel=0.02)
    bound = 0.1 * math.sqrt(6 / sum(network.fc.weight.shape))
    assert 0.95 * bound < network.fc.weight.abs().max().item() <= bound
    assert network.fc.bias.abs().max() == 0
    assert all((m.weight == 1).all() and (m.bias == 0).all() for m in network.modules() if isinstance(m, ABN))


@pytest.mark.parametrize(("mode", "kind"), [("standard", ABN), ("inplace", InPlaceABN)])
def test_the_network_is_the_one_of_the_recipe(mode, kind):
    network = build_network(recipe(network={"bn_mode": mode, "classes": 7}, training={"signed_scale": True}))
    assert type(network.bn1) is kind
    assert network.fc.out_features == 7
    assert getattr(network.bn1, "signed_scale", True)


def test_groups_of_the_optimizer():
    content = recipe(optimizer={"classifier_lr": 0.5, "weight_decay": 1e-3}, training={"decay_norms": False})
    network = build_network(content)
    optimizer = build_optimizer(content, network)
    found = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    for name, parameter in network.named_parameters():
        rate = 0.5 if name.startswith("fc.") else TINY["optimizer"]["learning_rate"]
        assert found[id(parameter)] == (rate, 1e-3 if parameter.dim() > 1 else 0.0), name
    assert LearningRate(content, STEPS).set(optimizer, 3 * STEPS) == pytest.approx(
        TINY["optimizer"]["learning_rate"] / 2
    )
    assert {g["lr"] for g in optimizer.param_groups} == {TINY["optimizer"]["learning_rate"] / 2, 0.5 / 2}


def test_kinds_of_optimizer():
    assert isinstance(
        build_optimizer(recipe(optimizer={"type": "Adam", "nesterov": False}), nn.Linear(2, 2)), torch.optim.Adam
    )
    sgd = build_optimizer(recipe(), nn.Linear(2, 2))
    assert (sgd.defaults["momentum"], sgd.defaults["nesterov"]) == (0.9, True)
