"""Layer-wise AdaMerging, transcribed from its formulas in plain PyTorch without anything of adamerge.

theta^l = theta_0^l + sum_k lambda_k^l tau_k^l; minimise the mean entropy, summed over tasks; Adam 1e-3, start 0.3.
"""

import csv

import torch
from torch.func import functional_call

from tests import tiny


def transcription(base, experts, heads, net, batches, *, clamp):
    """Coefficients {tensor: [K]} and losses after one Adam step per batch."""
    tasks = list(experts)
    lambdas = {name: torch.full((len(tasks),), 0.3, requires_grad=True) for name in base}
    optimizer = torch.optim.Adam(lambdas.values(), lr=1e-3)
    losses = []
    for step in batches:
        weights = {}
        for name, start in base.items():
            factor = lambdas[name].clamp(0, 1) if clamp else lambdas[name]
            weights[name] = start + sum(factor[k] * (experts[task][name] - start) for k, task in enumerate(tasks))
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
