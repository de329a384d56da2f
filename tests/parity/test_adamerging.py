"""AdaMerging, transcribed from its formulas in plain PyTorch without anything of adamerge.

theta^l = theta_0^l + sum_k lambda_k^l tau_k^l; minimise the mean entropy, summed over tasks; Adam 1e-3, start 0.3.
"""

import csv
from functools import partial

import pytest
import torch
from torch.func import functional_call

from adamerge.rules import LayerWise, TaskWise
from tests import tiny
from tests.parity.common import START, assert_same, inputs_of, pool_of, steps_of, trained


def transcription(base, experts, heads, net, batches, *, clamp, task_wise=False, start=None):
    """Coefficients {tensor: [K]} and losses after one Adam step per batch."""
    tasks = list(experts)
    start = torch.full((len(tasks),), 0.3) if start is None else start
    shared = start.clone().requires_grad_()
    lambdas = {name: shared if task_wise else start.clone().requires_grad_() for name in base}
    optimizer = torch.optim.Adam(set(lambdas.values()), lr=1e-3)
    losses = []
    for step in batches:
        weights = {}
        for name, origin in base.items():
            factor = lambdas[name].clamp(0, 1) if clamp else lambdas[name]
            weights[name] = origin + sum(factor[k] * (experts[task][name] - origin) for k, task in enumerate(tasks))
        loss = 0
        for task in tasks:
            weight, bias = heads[task]
            p = torch.softmax(functional_call(net, weights, (step[task],)) @ weight.T + bias, -1)
            loss = loss - (p * torch.log(p)).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return lambdas, losses


def assert_parity(config, clamp):
    import adamerge

    steps = 20
    rule = {
        "class_path": "adamerge.rules.LayerWise",
        "init_args": {"init": 0.3, "activation": "clamp" if clamp else "none"},
    }
    run = adamerge.train(config({"rule": rule}, trainer={"max_steps": steps, "log_every_n_steps": 1}))
    pool = tiny.states()
    stream = tiny.data_of().stream()
    batches = [{task: stream[k][task]["input"] for task in tiny.TASKS} for k in range(steps)]
    heads = {task: (pool[task].pop("head.weight"), pool[task].pop("head.bias")) for task in tiny.TASKS}
    base = pool.pop("base")
    lambdas, losses = transcription(base, pool, heads, tiny.Net().eval(), batches, clamp=clamp)
    learned = run.learned.rule.raw_TG.detach()
    for group, name in enumerate(run.learned.rule.groups):
        torch.testing.assert_close(learned[:, group], lambdas[name].detach(), rtol=1e-4, atol=1e-5)
        assert (learned[:, group] - 0.3).abs().max() > 5e-3
    rows = [float(row["train/loss"]) for row in csv.DictReader((run.dir / "metrics.csv").open()) if row["train/loss"]]
    torch.testing.assert_close(torch.tensor(rows), torch.tensor(losses), rtol=1e-4, atol=1e-5)


def test_twenty_steps_give_the_same_coefficients_and_losses(config):
    assert_parity(config, clamp=False)


def test_with_the_papers_clamp_too(config):
    assert_parity(config, clamp=True)


@pytest.mark.parametrize("way", ["leaf", "swap"])
@pytest.mark.parametrize("clamp", [False, True])
@pytest.mark.parametrize("task_wise", [False, True])
def test_five_steps_in_float64(task_wise, clamp, way):
    init = {"a": 0.9985, "b": 0.0015, "c": START} if clamp else START  # near both bounds
    start = torch.tensor([0.9985, 0.0015, START] if clamp else [START] * 3).double()
    rule = partial(TaskWise if task_wise else LayerWise, init=init, activation="clamp" if clamp else "none")
    model, steps = tiny.merged_of(rule=rule, dtype=torch.float64, apply_mode=way), steps_of()
    found = trained(model, steps)["rule.raw_TG"]
    net, base, experts, heads = pool_of()
    options = {"clamp": clamp, "task_wise": task_wise, "start": start}
    lambdas, _ = transcription(base, experts, heads, net, inputs_of(steps), **options)
    for group, name in enumerate(["stem.weight"] if task_wise else model.rule.groups):
        assert_same(found[:, group], lambdas[name], start, moved=5e-4)
    outside = (found < 0) | (found > 1)
    assert bool(outside.any()) == clamp
