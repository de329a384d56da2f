"""Concrete Task Arithmetic and Concrete AdaMerging, transcribed from their formulas in plain PyTorch.

theta^l = theta_0^l + m^l / mean(m^l) * sum_k lambda_k tau_k^l with one mask m = sigmoid((x + logistic noise) / 0.5) for
all tasks. Task Arithmetic: x minimises the entropy at lambda = 0.3. AdaMerging: x minimises the entropy at what lambda
becomes by one step from 0.3 on other samples; then lambda is learned under the mask sigmoid(x).
"""

from functools import partial

import pytest
import torch
from torch.func import functional_call

from adamerge.learnables import train_only
from adamerge.loops import Bilevel
from adamerge.rules import Concrete, LayerWise, TaskWise
from adamerge.seeding import seed_of
from tests import tiny
from tests.parity.common import START, assert_same, inputs_of, pool_of, steps_of, trained

ADAM, SGD = partial(torch.optim.Adam, lr=0.1), partial(torch.optim.SGD, lr=0.5)
WAYS = {
    "Adam": Bilevel(inner_optimizer=ADAM),
    "Adam, concatenated": Bilevel(inner_optimizer=ADAM, order="concatenated"),
    "SGD": Bilevel(inner_optimizer=SGD),
    "SGD, second order": Bilevel(inner_optimizer=SGD, second_order=True),
    "SGD, second order, by samples": Bilevel(inner_optimizer=SGD, second_order=True, micro_batch=1),
}


def mask_of(name, x, step=None):
    """A mask over its mean: step's relaxed draw, or the expected one."""
    mask = torch.sigmoid(x)
    if step is not None:
        generator = torch.Generator().manual_seed(seed_of(seed_of(0, "rule", step), name))
        u = torch.rand(x.shape, generator=generator, dtype=x.dtype).clamp(min=2**-25)
        mask = torch.sigmoid((x + u.log() - (1 - u).log()) / 0.5)
    return mask / mask.mean()


def entropy(logits, lambda_KL, batch, step=None):
    """Of the predictions, summed over tasks; L is 1 or the number of tensors."""
    net, base, experts, heads = pool_of()
    lambda_KL, weights = lambda_KL.expand(-1, len(base)), {}
    for place, (name, origin) in enumerate(base.items()):
        delta = sum(lambda_KL[k, place] * (expert[name] - origin) for k, expert in enumerate(experts.values()))
        weights[name] = origin + mask_of(name, logits[name], step) * delta
    total = 0
    for task, x in batch.items():
        weight, bias = heads[task]
        p = torch.softmax(functional_call(net, weights, (x,)) @ weight.T + bias, 1)
        total = total - (p * p.log()).sum(1).mean()
    return total


def zeros():
    return {name: torch.zeros_like(tensor).requires_grad_() for name, tensor in pool_of()[1].items()}


def task_arithmetic(batches):
    """The logits after one Adam step on each batch."""
    logits, lambda_KL = zeros(), torch.full((3, 1), START).double()
    optimizer = torch.optim.Adam(logits.values(), lr=1e-2)
    for k, batch in enumerate(batches):
        optimizer.zero_grad()
        entropy(logits, lambda_KL, batch, k).backward()
        optimizer.step()
    return logits


def adamerging(start_KL, first_phase, second_phase, *, adam, second_order):
    """The logits after the first phase, the coefficients after the second."""
    logits = zeros()
    optimizer = torch.optim.Adam(logits.values(), lr=1e-2)
    for k, batch in enumerate(first_phase):
        halves = [{task: x[part] for task, x in batch.items()} for part in (slice(None, 2), slice(2, None))]
        lambda_KL = start_KL.clone().requires_grad_()
        (slope_KL,) = torch.autograd.grad(entropy(logits, lambda_KL, halves[0], k), lambda_KL, create_graph=True)
        # a fresh Adam's first step goes against the sign
        reached_KL = lambda_KL - (0.1 * slope_KL / (slope_KL.abs() + 1e-8) if adam else 0.5 * slope_KL)
        optimizer.zero_grad()
        entropy(logits, reached_KL if second_order else reached_KL.detach(), halves[1], k).backward()
        optimizer.step()
    lambda_KL = start_KL.clone().requires_grad_()
    optimizer = torch.optim.Adam([lambda_KL], lr=1e-3)
    for batch in second_phase:
        optimizer.zero_grad()
        entropy(logits, lambda_KL, batch).backward()
        optimizer.step()
    return logits, lambda_KL


def assert_same_logits(found, expected):
    assert sum(name.startswith("rule.logits.") for name in found) == len(expected)
    for name, logits in expected.items():
        assert_same(found[f"rule.logits.{name.replace('.', '/')}"], logits, 0, moved=1e-2)


@pytest.mark.parametrize("way", ["leaf", "swap"])
def test_task_arithmetic(way):
    rule = partial(Concrete, rule=partial(TaskWise, trainable=False))
    model, steps = tiny.merged_of(rule=rule, dtype=torch.float64, apply_mode=way), steps_of()
    found = trained(model, steps, lr=1e-2)
    assert_same_logits(found, task_arithmetic(inputs_of(steps)))
    assert (model.rule.coefficients() == START).all()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("inner", [TaskWise, LayerWise])
def test_adamerging(inner, way):
    model, steps = tiny.merged_of(rule=partial(Concrete, rule=inner), dtype=torch.float64), steps_of(10)
    start_KL = model.rule.inner.raw_TG.detach().clone()
    train_only(model, r"rule\.logits")
    between = trained(model, steps[:5], lr=1e-2, loop=WAYS[way])
    assert torch.equal(between["rule.inner.raw_TG"], start_KL)
    train_only(model, r"rule\.inner")
    found = trained(model, steps[5:], lr=1e-3)
    batches, names = inputs_of(steps), list(pool_of()[1])
    options = {"adam": way.startswith("Adam"), "second_order": "second order" in way}
    logits, lambda_KL = adamerging(start_KL, batches[:5], batches[5:], **options)
    assert_same_logits(between, logits)
    assert_same_logits(found, logits)
    if inner is LayerWise:
        lambda_KL = lambda_KL[:, [names.index(name) for name in model.rule.groups]]
    assert_same(found["rule.inner.raw_TG"], lambda_KL, START, moved=2e-3)


def test_the_ways_differ():
    """By far more than the tolerance, so that the tests above tell them apart."""
    batches, start_KL = inputs_of(steps_of()), torch.full((3, 1), START).double()
    kinds = [(True, False), (False, False), (False, True)]
    found = [adamerging(start_KL, batches, [], adam=adam, second_order=second)[0] for adam, second in kinds]
    flat = [torch.cat([tensor.detach().flatten() for tensor in logits.values()]) for logits in found]
    assert all((one - other).abs().max() > 1e-3 for one, other in [flat[:2], flat[1:], flat[::2]])
