"""Representation Surgery and SurgeryV2, transcribed from their formulas in plain PyTorch.

z' = z - U relu(D z), for a frozen merge; minimise the mean |z' - z_expert|, summed over tasks. V2 corrects the tokens
of every block as well, and adds the same distance for each block's mean over tokens.
"""

from functools import partial

import pytest
import torch
from torch import nn
from torch.func import functional_call

from adamerge.loops import PerTask
from adamerge.objectives import FeatureDistillation
from adamerge.rules import TaskWise
from adamerge.task_modules import Surgery
from tests import tiny
from tests.parity.common import START, assert_same, inputs_of, pool_of, steps_of, teachers_of, trained

fixed = partial(TaskWise, trainable=False)


class Tokens(nn.Module):
    """[B, 5] -> three tokens of width 4, two residual blocks that mix them -> [B, 6]."""

    def __init__(self):
        super().__init__()
        self.stem, self.out = nn.Linear(tiny.INPUT, 12), nn.Linear(4, tiny.WIDTH)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.Tanh()) for _ in range(2))

    def forward(self, x):
        x = self.stem(x).unflatten(-1, (3, 4))
        for block in self.blocks:
            x = x.roll(1, 1) + block(x)
        return self.out(x.mean(1))


def merge(base, experts):
    return {
        name: origin + sum(START * (expert[name] - origin) for expert in experts.values())
        for name, origin in base.items()
    }


def transcription(adapters, batches, *, normalize):
    """Change {task: [D, U]} by one Adam step on each batch."""
    net, base, experts, _ = pool_of()
    merged = merge(base, experts)
    adapters = {task: [factor.clone().requires_grad_() for factor in pair] for task, pair in adapters.items()}
    optimizer = torch.optim.Adam([factor for pair in adapters.values() for factor in pair], lr=1e-2)
    for step in batches:
        loss = 0
        for task, x in step.items():
            down, up = adapters[task]
            z, teacher = functional_call(net, merged, (x,)), functional_call(net, experts[task], (x,))
            if normalize:
                z = z / z.norm(dim=1, keepdim=True)
            z = z - torch.relu(z @ down.T) @ up.T
            if normalize:  # both sides, as the objective says
                z, teacher = z / z.norm(dim=1, keepdim=True), teacher / teacher.norm(dim=1, keepdim=True)
            loss = loss + (z - teacher).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return adapters


def transcription_v2(adapters, batches):
    """Change {task: [[D, U] of the features, then of each block]} by one Adam step on each batch."""
    net, base, experts, _ = pool_of(Tokens)

    def forward(weights, x, pairs):
        net.load_state_dict(weights)
        x, means = net.stem(x).view(-1, 3, 4), []
        for block, (down, up) in zip(net.blocks, pairs[1:], strict=True):
            y = block(x)
            y = y - torch.relu(y @ down.T) @ up.T
            means.append(y.mean(1))
            x = torch.stack([x[:, 2], x[:, 0], x[:, 1]], 1) + y
        z, (down, up) = net.out(x.mean(1)), pairs[0]
        return [z - torch.relu(z @ down.T) @ up.T, *means]

    adapters = {
        task: [[factor.clone().requires_grad_() for factor in pair] for pair in pairs]
        for task, pairs in adapters.items()
    }
    every = [factor for pairs in adapters.values() for pair in pairs for factor in pair]
    optimizer = torch.optim.Adam(every, lr=1e-2)
    for step in batches:
        optimizer.zero_grad()
        for task, x in step.items():
            nothing = [[torch.zeros_like(factor) for factor in pair] for pair in adapters[task]]
            teachers = [mean.detach() for mean in forward(experts[task], x, nothing)]
            students = forward(merge(base, experts), x, adapters[task])
            sum((s - t).abs().mean() for s, t in zip(students, teachers, strict=True)).backward()
        optimizer.step()
    return adapters


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("per_task", [False, True])
def test_surgery(normalize, per_task):
    surgery = partial(Surgery, rank=3, normalize=normalize)
    model = tiny.merged_of(rule=fixed, modules=[surgery], dtype=torch.float64)
    start = {task: [p.detach().clone() for p in model.chain(task)[0].parameters()] for task in tiny.TASKS}
    loop = PerTask() if per_task else None
    steps = steps_of(9 if per_task else 5, slot=loop and partial(loop.slot, tasks=tiny.TASKS, seed=0))
    options = {"objectives": [FeatureDistillation(normalize=normalize)], "teachers": teachers_of(model), "loop": loop}
    found = trained(model, steps, lr=1e-2, **options)
    batches = inputs_of(steps_of(3 if per_task else 5))
    if per_task:
        batches = [{task: step[task]} for step in batches for task in tiny.TASKS]
    expected = transcription(start, batches, normalize=normalize)
    assert len(found) == 1 + 6  # fixed coefficients too
    for task in tiny.TASKS:
        for place, name in enumerate(("down", "up")):
            assert_same(found[f"task.{task}.0.{name}"], expected[task][place], start[task][place], moved=1e-2)


def test_surgery_v2():
    model = tiny.merged_of(Tokens, rule=fixed, modules=[partial(Surgery, rank=3, deep=True)], dtype=torch.float64)
    start = {}
    for task in tiny.TASKS:
        module = model.chain(task)[0]
        start[task] = [[p.down.detach().clone(), p.up.detach().clone()] for p in (module, *module.blocks)]
    steps = steps_of()
    objectives = [FeatureDistillation(on="blocks"), FeatureDistillation()]
    found = trained(model, steps, lr=1e-2, objectives=objectives, teachers=teachers_of(model, Tokens))
    expected = transcription_v2(start, inputs_of(steps))
    assert len(found) == 1 + 18  # fixed coefficients too
    for task in tiny.TASKS:
        for place, where in enumerate(("", "blocks.0.", "blocks.1.")):
            for each, name in enumerate(("down", "up")):
                moved = found[f"task.{task}.0.{where}{name}"]
                assert_same(moved, expected[task][place][each], start[task][place][each], moved=1e-2)
