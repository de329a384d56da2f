"""Model Tinting (SyMerge) and Tinting++, transcribed from their formulas in plain PyTorch.

theta = theta_0 + sum_k clip(lambda_k^l) tau_k^l and a copy of the head for each task; cross-entropy with the expert's
class, one Adam step at 1e-2 per task in turn. Tinting++ keeps the samples where both agree or the expert is as sure.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

from adamerge.loops import PerTask
from adamerge.objectives import PseudoLabel
from adamerge.rules import LayerWise
from adamerge.seeding import seed_of
from adamerge.task_modules import Tint
from tests import tiny
from tests.parity.common import assert_same, inputs_of, pool_of, steps_of, teachers_of, trained

STEPS = 8  # of three tasks: two rounds and a part
INIT = {"a": 0.985, "b": 0.015, "c": 0.3}  # near both ends of the clip


def order_of(shuffled):
    """The round and the task of each step."""
    places = []
    for number in range(3):
        generator = torch.Generator().manual_seed(seed_of(0, "task order", number))
        places += torch.randperm(3, generator=generator).tolist() if shuffled else [0, 1, 2]
    return [(step // 3, tiny.TASKS[place]) for step, place in enumerate(places[:STEPS])]


def transcription(batches, *, shuffled, confident):
    """Coefficients [K, L], heads {task: [weight, bias]}, and for each step which samples were kept."""
    net, base, experts, heads = pool_of()
    start = torch.tensor([INIT[task] for task in experts]).double()
    lambda_KL = start[:, None].repeat(1, len(base)).requires_grad_()
    tinted = {task: [tensor.clone().requires_grad_() for tensor in head] for task, head in heads.items()}
    optimizer = torch.optim.Adam([lambda_KL, *(tensor for head in tinted.values() for tensor in head)], lr=1e-2)
    kept = []
    for number, task in order_of(shuffled):
        x, factor_KL = batches[number][task], lambda_KL.clamp(0, 1)
        weights = {
            name: origin
            + sum(factor_KL[k, place] * (expert[name] - origin) for k, expert in enumerate(experts.values()))
            for place, (name, origin) in enumerate(base.items())
        }
        logits = F.linear(functional_call(net, weights, (x,)), *tinted[task])
        teacher = F.linear(functional_call(net, experts[task], (x,)), *heads[task])
        label, keep = teacher.argmax(1), torch.ones(len(x), dtype=torch.bool)
        if confident:
            surer = teacher.softmax(1).max(1).values >= logits.softmax(1).max(1).values
            keep = (logits.argmax(1) == label) | surer
        optimizer.zero_grad()
        (-logits.log_softmax(1)[range(len(x)), label] * keep).sum().div(max(1, int(keep.sum()))).backward()
        optimizer.step()
        kept.append(keep)
    return lambda_KL, tinted, torch.stack(kept)


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("confident", [False, True])
def test_tinting(shuffled, confident):
    rule = partial(LayerWise, init=INIT, activation="clamp")
    model = tiny.merged_of(rule=rule, modules=[Tint], dtype=torch.float64)
    loop = PerTask(task_order="shuffled" if shuffled else "fixed")
    steps = steps_of(STEPS, slot=partial(loop.slot, tasks=tiny.TASKS, seed=0), batch_size=8)
    options = {"objectives": [PseudoLabel(confident=confident)], "loop": loop, "teachers": teachers_of(model)}
    found = trained(model, steps, lr=1e-2, **options)

    batches = inputs_of(steps_of(3, batch_size=8))
    lambda_KL, tinted, kept = transcription(batches, shuffled=shuffled, confident=confident)
    start = torch.tensor([[INIT[task]] for task in tiny.TASKS]).double()
    names, heads = list(pool_of()[1]), pool_of()[3]
    expected = lambda_KL[:, [names.index(name) for name in model.rule.groups]]
    assert_same(found["rule.raw_TG"], expected, start, moved=1e-2)
    assert ((found["rule.raw_TG"] - start).abs().amax(0) > 1e-2).all()
    assert ((found["rule.raw_TG"] < 0) | (found["rule.raw_TG"] > 1)).any()
    assert bool(kept.all()) != confident
    assert kept.any(1).all()
    for task in tiny.TASKS:
        for name, head, origin in zip(("weight", "bias"), tinted[task], heads[task], strict=True):
            assert_same(found[f"task.{task}.0.offset_{name}"], head - origin, 0, moved=1e-2)


def test_the_order_is_shuffled_anew_for_each_round():
    fixed, shuffled = order_of(shuffled=False), order_of(shuffled=True)
    assert fixed != shuffled
    assert shuffled[:3] != [(0, task) for _, task in shuffled[3:6]]
    assert {task for _, task in shuffled[:3]} == set(tiny.TASKS)
