"""The bilevel gradient against finite differences of what it is the gradient of."""

from functools import partial

import pytest
import torch

from adamerge.learnables import train_only
from adamerge.loops import Bilevel
from adamerge.rules import Concrete, LayerWise, TaskWise
from tests import tiny
from tests.parity.common import START, inputs_of, pool_of, steps_of, trained
from tests.parity.test_concrete import entropy

RATE = 0.5
RULES = {"task-wise": TaskWise, "layer-wise": LayerWise}
sgd = partial(torch.optim.SGD, lr=RATE)


def start_of():
    """Mask logits away from zero."""
    generator = torch.Generator().manual_seed(3)
    return {
        name: 0.5 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        for name, tensor in pool_of()[1].items()
    }


def model_of(rule):
    model = tiny.merged_of(rule=partial(Concrete, rule=rule), dtype=torch.float64)
    for name, tensor in start_of().items():
        model.rule.logits[name.replace(".", "/")].data.copy_(tensor)
    train_only(model, r"rule\.logits")
    return model


def gradient(rule, **options):
    """What the loop gives the optimiser, flat: one step of SGD at the rate 1 subtracts it."""
    model = model_of(rule)
    loop = Bilevel(**{"inner_optimizer": sgd, **options})
    found = trained(model, steps_of(1), loop=loop, optimizer=partial(torch.optim.SGD, lr=1.0))
    return torch.cat(
        [(start - found[f"rule.logits.{name.replace('.', '/')}"]).flatten() for name, start in start_of().items()]
    )


def differences(rule, *, rate=RATE, width=1e-5):
    """Central differences of x -> loss(theta(x, lambda - rate * d/dlambda loss(theta(x, lambda))))."""
    batch, logits = inputs_of(steps_of(1))[0], start_of()
    first, second = ({task: x[part] for task, x in batch.items()} for part in (slice(None, 2), slice(2, None)))

    def outer():
        lambda_KL = torch.full((3, 1 if rule is TaskWise else len(logits)), START, dtype=torch.float64).requires_grad_()
        (slope_KL,) = torch.autograd.grad(entropy(logits, lambda_KL, first, 0), lambda_KL)
        with torch.no_grad():
            return entropy(logits, lambda_KL - rate * slope_KL, second, 0)

    found = []
    for tensor in logits.values():
        for element in tensor.view(-1).split(1):
            start = element.clone()
            ends = []
            for end in (start + width, start - width):
                element.copy_(end)
                ends.append(outer())
            element.copy_(start)
            found.append((ends[0] - ends[1]) / (2 * width))
    return torch.stack(found)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_the_second_order_gradient_is_that_of_the_outer_objective(rule):
    expected = differences(rule)
    for options in ({}, {"micro_batch": 1}):
        found = gradient(rule, second_order=True, **options)
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-8)
    first_order = gradient(rule)
    assert (first_order - expected).norm() > 0.05 * expected.norm()


def test_without_an_inner_step_both_orders_give_the_plain_gradient():
    expected = differences(TaskWise, rate=0)
    for second_order in (False, True):
        found = gradient(TaskWise, second_order=second_order, inner_optimizer=partial(torch.optim.SGD, lr=0.0))
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize(
    ("options", "rate"),
    [({"momentum": 0.9}, RATE), ({"momentum": 0.9, "nesterov": True}, 1.9 * RATE), ({"maximize": True}, -RATE)],
    ids=["momentum", "nesterov", "maximize"],
)
def test_the_second_order_gradient_is_through_the_step_that_the_optimiser_makes(options, rate):
    """A fresh momentum is the gradient itself, which Nesterov's adds to it; each option scales the same step."""
    found = gradient(TaskWise, second_order=True, inner_optimizer=partial(sgd, **options))
    torch.testing.assert_close(found, differences(TaskWise, rate=rate), rtol=1e-7, atol=1e-8)
