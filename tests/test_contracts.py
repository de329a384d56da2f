"""What every rule, transform, objective and task module keeps, whoever wrote it."""

import inspect
from dataclasses import replace

import pytest
import torch
from torch.autograd import gradcheck

from adamerge.deltas import DenseDeltas
from adamerge.learnables import labels_of, load_state, state_of
from adamerge.types import TaskInfo, TaskOutput
from tests.contracts import OBJECTIVES, RULES, TASK_MODULES, TRANSFORMS
from tests.tiny import CLASSES, TASKS, Net, TiedNet, batches_of, merged_of, vectors_of

BLOCK_WIDTHS = (3, 5)

rules = pytest.mark.parametrize("make", RULES.values(), ids=RULES)
transforms = pytest.mark.parametrize("make", TRANSFORMS.values(), ids=TRANSFORMS)
objectives = pytest.mark.parametrize("make", OBJECTIVES.values(), ids=OBJECTIVES)


def merge_all(rule, vectors):
    shared = rule.begin()
    return {name: rule.merge(name, vectors.base(name), vectors.deltas(name), shared) for name in vectors.space.shapes}


def perturb(rule):
    """Learnables away from their symmetric start, the same for a task and group whatever their order."""
    labels = {"task": rule.tasks, "group": rule.groups}
    with torch.no_grad():
        for name, parameter in rule.named_parameters():
            phase = torch.zeros(())
            for kind in rule.axes.get(name, (None,) * parameter.dim()):
                along = (
                    [float(sum(map(ord, label)) % 17) for label in labels[kind]]
                    if kind
                    else [0.0] * parameter.shape[phase.dim()]
                )
                phase = phase[..., None] + torch.tensor(along)
            parameter.add_(0.1 * torch.sin(1 + phase))


def snapshot(vectors):
    return {name: (vectors.base(name).clone(), vectors.deltas(name).dense().clone()) for name in vectors.space.shapes}


@rules
def test_rule_merges_to_the_tensors_shape_in_fp32_and_changes_nothing(make):
    vectors = vectors_of()
    before = snapshot(vectors)
    rule = make(vectors)
    for _ in range(3):
        merged = merge_all(rule, vectors)
    for name, shape in vectors.space.shapes.items():
        assert merged[name].shape == shape
        assert merged[name].dtype == torch.float32
        assert torch.equal(before[name][0], vectors.base(name))
        assert torch.equal(before[name][1], vectors.deltas(name).dense())


@rules
def test_rule_learnables_are_fp32_and_stay_so(make):
    rule = make(vectors_of(dtype=torch.bfloat16))
    assert list(rule.parameters())
    rule.to(torch.bfloat16).half()
    assert all(parameter.dtype == torch.float32 for parameter in rule.parameters())


@rules
def test_rule_without_deltas_gives_the_base(make):
    vectors = vectors_of()
    rule = make(vectors)
    perturb(rule)
    shared = rule.begin()
    for name, shape in vectors.space.shapes.items():
        base = vectors.base(name)
        assert torch.equal(rule.merge(name, base, DenseDeltas(torch.zeros(len(TASKS), *shape)), shared), base)


@rules
def test_rule_does_not_care_for_the_order_of_tasks(make):
    forth, back = vectors_of(tasks=TASKS), vectors_of(tasks=TASKS[::-1])
    rule_forth, rule_back = make(forth), make(back)
    perturb(rule_forth), perturb(rule_back)
    one, other = merge_all(rule_forth, forth), merge_all(rule_back, back)
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-6, atol=1e-6)  # sums in another order


@rules
def test_rule_gradient_is_the_finite_difference(make):
    vectors = vectors_of(dtype=torch.float64, group="block")
    rule = make(vectors)
    perturb(rule)
    names = [name for name, _ in rule.named_parameters()]

    def merged(*values):
        for name, value in zip(names, values, strict=True):
            owner, _, attribute = name.rpartition(".")
            rule.get_submodule(owner)._parameters[attribute] = value
        return torch.cat([tensor.reshape(-1) for tensor in merge_all(rule, vectors).values()])

    if "clamp_ste" in str(make):
        pytest.skip("a straight-through gradient is meant to differ from the finite difference outside the box")
    values = [parameter.detach().double().requires_grad_() for parameter in rule.parameters()]
    assert gradcheck(merged, values)


@rules
def test_rule_is_saved_and_loaded_by_name(make):
    here = merged_of(rule=make)
    perturb(here.rule)
    there = merged_of(tasks=TASKS[::-1], rule=make)
    load_state(there, state_of(here), labels_of(here), "the test")
    batch = batches_of()["b"]
    torch.testing.assert_close(here(batch, task="b"), there(batch, task="b"), rtol=1e-5, atol=1e-6)


@rules
@pytest.mark.parametrize("net", [None, TiedNet], ids=["plain", "tied"])
def test_leaf_swap_applied_and_materialised_agree(make, net):
    """Gradients of all ways of applying the weights, in float64; `applied` is autograd straight through it."""
    options = {"rule": make, "dtype": torch.float64, **({"net": net} if net else {})}
    batches = batches_of(dtype=torch.float64)
    gradients, outputs = {}, {}
    for way in ("leaf", "swap"):
        model = merged_of(**options, apply_mode=way)
        perturb(model.rule)
        with model.step() as step:
            losses = [model.respond(task, batch).logits_BC.square().sum() for task, batch in batches.items()]
            for loss in losses:
                step.backward(loss)
        step.scalar(torch.tensor(0.0)).backward()
        gradients[way] = [parameter.grad for parameter in model.rule.parameters()]
        outputs[way] = model(batches["a"], task="a").detach()
    model = merged_of(**options)
    perturb(model.rule)
    with model.applied():
        sum(model.respond(task, batch).logits_BC.square().sum() for task, batch in batches.items()).backward()
    gradients["applied"] = [parameter.grad for parameter in model.rule.parameters()]
    outputs["materialised"] = model.folded()(batches["a"], task="a")
    for way in ("leaf", "swap"):
        for one, other in zip(gradients[way], gradients["applied"], strict=True):
            assert one.abs().sum() > 0
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(outputs[way], outputs["materialised"], rtol=1e-12, atol=1e-12)


@transforms
def test_transform_keeps_shape_and_inputs(make):
    vectors = vectors_of()
    before = snapshot(vectors)
    after = vectors.transformed([make()])
    for name, shape in vectors.space.shapes.items():
        assert after.deltas(name).dense().shape == (len(TASKS), *shape)
        assert torch.equal(before[name][1], vectors.deltas(name).dense())
        assert torch.equal(after.base(name), before[name][0])


@transforms
def test_transform_repeats_and_does_not_care_for_the_order_of_tasks(make):
    one = vectors_of(tasks=TASKS).transformed([make()], seed=3)
    again = vectors_of(tasks=TASKS).transformed([make()], seed=3)
    back = vectors_of(tasks=TASKS[::-1]).transformed([make()], seed=3)
    for name in one.space.shapes:
        assert torch.equal(one.deltas(name).dense(), again.deltas(name).dense())
        assert torch.equal(one.deltas(name).dense(), back.deltas(name).dense().flip(0))


@transforms
def test_transform_of_nothing_is_nothing(make):
    vectors = vectors_of()
    for name in vectors.space.shapes:
        vectors.deltas(name).stacked.zero_()
    after = vectors.transformed([make()])
    assert all(not after.deltas(name).dense().any() for name in vectors.space.shapes)


@objectives
def test_objective_adds_up_over_parts_of_a_batch(make):
    objective = make()
    if objective.couples_batch:
        pytest.skip("looks at the batch as a whole")
    model, batch = merged_of(), taught(batches_of()["a"])
    whole = objective(model_output(model, batch), batch)
    halves = [
        {k: [t[part] for t in v] if isinstance(v, list) else v[part] for k, v in batch.items()}
        for part in (slice(0, 1), slice(1, None))
    ]
    parts = [objective(model_output(model, half), half) for half in halves]
    for name, term in whole.items():
        assert term.sum.shape == ()
        torch.testing.assert_close(term.sum, sum(part[name].sum for part in parts))
        assert int(term.count) == sum(int(part[name].count) for part in parts)


@objectives
def test_objective_gradient_is_the_finite_difference(make):
    torch.manual_seed(0)
    objective, batch = make(), taught(batches_of(dtype=torch.float64)["a"])
    values = [
        torch.randn(4, width, dtype=torch.float64, requires_grad=True) for width in (6, CLASSES["a"], *BLOCK_WIDTHS)
    ]

    def total(features, logits, *blocks):
        return sum(term.sum for term in objective(TaskOutput("a", features, logits, blocks), batch).values())

    assert total(*values).requires_grad
    assert gradcheck(total, values)


@objectives
def test_objective_takes_a_teacher_in_another_precision(make):
    objective, model, batch = make(), merged_of(), taught(batches_of()["a"])
    out = model_output(model, batch)
    expected = objective(out, batch)
    for dtype in (torch.float16, torch.float64):
        for name, term in objective(out, taught(batch, dtype)).items():
            assert term.sum.dtype == torch.float32
            torch.testing.assert_close(term.sum, expected[name].sum)


@objectives
def test_objective_needs_what_it_says_and_no_more(make):
    objective, model, batch = make(), merged_of(), taught(batches_of()["a"])
    needed = {"label" if need == "labels" else need for need in objective.needs}
    bare = {key: value for key, value in batch.items() if key in {"input", *needed}}
    out = model_output(model, bare)
    assert objective(out, bare)
    for need in needed:
        with pytest.raises(KeyError, match=need):
            objective(out, {key: value for key, value in bare.items() if key != need})


def taught(batch, dtype=None):
    """The batch with what a teacher says of its samples."""
    size, dtype = len(batch["input"]), dtype or batch["input"].dtype
    generator = torch.Generator().manual_seed(0)
    logits, features, *blocks = (
        torch.randn(size, width, generator=generator).half().to(dtype) for width in (CLASSES["a"], 6, *BLOCK_WIDTHS)
    )
    return {**batch, "expert.logits": logits, "expert.features": features, "expert.blocks": blocks}


def model_output(model, batch):
    """What the model says, with blocks where the batch's teacher has some."""
    with model.applied():
        out = model.respond("a", batch)
    blocks = [out.features_BD[:, :width] for width in BLOCK_WIDTHS] if "expert.blocks" in batch else ()
    return replace(out, blocks=blocks)


@pytest.mark.parametrize("make", TASK_MODULES.values(), ids=TASK_MODULES)
def test_task_module_keeps_fp32(make):
    model = merged_of()
    kind = make if inspect.isclass(make) else make.func
    module = next((m for m in model.modules() if isinstance(m, kind)), None)
    if module is None:
        expert = {"head.weight": torch.randn(4, 6)}
        needed = {"ZeroShotHead": {"weight": torch.randn(4, 6), "scale": 10.0}, "ClassifierHead": {"prefix": "head."},
                  "Words": {"tokens": [0, 2]}}  # fmt: skip
        info = TaskInfo("a", head=model.chain("a")[-1], net=Net(), width=6, expert=expert)
        module = kind(info, **needed.get(kind.__name__, {}))
    module.to(torch.bfloat16)
    assert all(parameter.dtype == torch.float32 for parameter in module.parameters())
