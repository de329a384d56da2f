"""How the merged weights get into the network and the gradients out of it."""

import weakref
from functools import partial

import pytest
import torch
from torch import nn
from torch.func import functional_call

from adamerge.loops import Joint
from adamerge.module import AdaMerge
from adamerge.objectives import Entropy, Supervised
from adamerge.opened import kept_bytes
from adamerge.rules import LayerWise, TaskWise
from adamerge.task_modules import Surgery
from adamerge.types import InputError
from tests.tiny import TASKS, Kept, Net, NormNet, Recurrent, Shift, TiedNet, batches_of, merged_of


class Silent(AdaMerge):
    """The training step without a trainer to log to."""

    def report(self, values, penalties):
        return torch.stack([value for terms in values.values() for value in terms.values()]).sum()


def gradients(model, *, loop=None, objectives=None, batches=None):
    module = Silent(model, objectives=objectives or [Entropy()], loop=loop or Joint())
    scalar = module.loop.step(module, batches or batches_of())
    for parameter in model.parameters():
        parameter.grad = None
    scalar.backward()
    return scalar.detach(), {name: parameter.grad for name, parameter in model.learnables().items()}


def assert_same(one, other, **tolerance):
    torch.testing.assert_close(one[0], other[0], **tolerance)
    assert one[1].keys() == other[1].keys()
    for name in one[1]:
        assert one[1][name].abs().sum() > 0, name
        torch.testing.assert_close(one[1][name], other[1][name], **tolerance)


def reference(build=Net, dtype=torch.float64):
    """Autograd straight through the merge, task by task."""
    model = merged_of(dtype=dtype, modules=[Shift])
    with model.applied():
        total = 0
        for task, batch in batches_of(dtype=dtype).items():
            log_p = model.respond(task, batch).logits_BC.log_softmax(-1)
            total = total - (log_p.exp() * log_p).sum(-1).mean()
        total.backward()
    return total.detach().float(), {name: parameter.grad for name, parameter in model.learnables().items()}


CHECKPOINTING = {"none": None, "non-reentrant": False, "reentrant": True}
TIGHT = {"rtol": 1e-6, "atol": 1e-9}


@pytest.mark.parametrize("checkpointing", CHECKPOINTING.values(), ids=CHECKPOINTING)
@pytest.mark.parametrize("way", ["leaf", "swap"])
@pytest.mark.parametrize("order", ["per_task", "concatenated"])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_every_way_gives_the_reference_gradient(checkpointing, way, order):
    model = merged_of(build=partial(Net, checkpointing), dtype=torch.float64, modules=[Shift], apply_mode=way)
    found = gradients(model, loop=Joint(order=order), batches=batches_of(dtype=torch.float64))
    assert_same(found, reference(), **TIGHT)


@pytest.mark.parametrize(("activations", "batches"), [(0, 3), (1 << 30, 3), (1 << 29, 2), (1 << 20, 1)])
def test_small_tasks_run_together(activations, batches):
    """As many as keep 1 GB; the gradient is the same."""
    model = merged_of(dtype=torch.float64, modules=[Shift])
    model.activations, seen, features = activations, [], model.backbone.features
    model.backbone.features = lambda net, batch: seen.append(batch) or features(net, batch)
    assert_same(gradients(model, batches=batches_of(dtype=torch.float64)), reference(), **TIGHT)
    assert len(seen) == batches


@pytest.mark.parametrize(
    ("loop", "modules"),
    [
        (Joint(order="per_task"), [Shift]),
        (Joint(micro_batch=2), [Shift]),
        (Joint(combine="min_norm"), [Shift]),
        (Joint(), [partial(Surgery, deep=True, rank=2)]),
    ],
    ids=["per task", "micro-batches", "min norm", "inside the network"],
)
def test_what_needs_each_task_alone_gets_it(loop, modules):
    model = merged_of(dtype=torch.float64, modules=modules)
    model.activations = 1
    assert loop._groups(Silent(model, loop=loop), batches_of()) == [[task] for task in TASKS]


def test_only_neighbours_of_one_shape_share_a_batch_and_larger_ones_count_for_more():
    model = merged_of()
    model.activations, model.measured = 1 << 29, 20

    def groups(*sizes):
        batches = {task: {"input": torch.zeros(*size)} for task, size in zip(TASKS, sizes, strict=True)}
        return [len(group) for group in Joint()._groups(Silent(model), batches)]

    assert groups((4, 5), (4, 5), (4, 5)) == [2, 1]
    assert groups((2, 5), (2, 5), (4, 5)) == [3]
    assert groups((8, 5), (4, 5), (4, 5)) == [1, 2]
    assert groups((1, 5), (1, 6), (1, 5)) == [1, 1, 1]


def test_a_backward_may_keep_sparse_tensors():
    weight = torch.randn(3, 2, requires_grad=True)
    with kept_bytes(torch.nn.Tanh()) as kept:
        torch.sparse.mm(torch.eye(3).to_sparse(), weight).sum()
    assert kept() == 0  # neither the weight's numbers nor its gradient are needed


def test_what_a_backward_keeps_is_counted_once_and_without_weights():
    net, x = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3)), torch.randn(4, 5)
    with kept_bytes(net) as kept:
        net(x)
    assert kept() == 4 * (x.numel() + 4 * 7)  # the input, and what tanh puts out, for itself and the layer after it


def test_weights_that_autocast_has_copied_are_not_counted():
    net, x = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 6)), torch.randn(8, 6)
    with kept_bytes(net) as kept, torch.autocast("cpu", torch.bfloat16):
        net(net(x))
    # each time the input and what tanh puts out, bf16; the first input, 6 by 8 as both weights are, was widened before
    assert kept() == 2 * 2 * (x.numel() + 8 * 8)


def test_what_was_counted_is_freed():
    with kept_bytes(torch.nn.Tanh()):
        out = torch.randn(4, requires_grad=True).tanh()  # keeps its own output
    ghost = weakref.ref(out)
    del out
    assert ghost() is None


@pytest.mark.parametrize("activation", ["sigmoid", "softmax", "clamp"])
@pytest.mark.parametrize("way", ["leaf", "swap"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_that_save_tensors_survive_checkpointing(activation, way, checkpointing):
    rule = partial(LayerWise, activation=activation)
    batches = batches_of(dtype=torch.float64)
    plain = gradients(merged_of(rule=rule, dtype=torch.float64), batches=batches)
    found = gradients(
        merged_of(rule=rule, build=partial(Net, checkpointing), dtype=torch.float64, apply_mode=way), batches=batches
    )
    assert_same(found, plain, **TIGHT)


def test_swapping_out_before_backward_would_be_silently_wrong():
    """Why the weights stay in place until after backward: reentrant checkpointing runs the forward again."""

    def gradient(restored):
        torch.manual_seed(0)
        net = Net(checkpointing=True).eval()
        weights = {name: (p.detach() + 0.5).requires_grad_() for name, p in net.named_parameters()}
        inputs = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
        loss = functional_call(net, weights, (inputs,)).square().sum()
        if not restored:
            for name, p in net.named_parameters():
                p.data = weights[name].detach()
        loss.backward()
        return weights["stem.weight"].grad

    wrong, right = gradient(restored=True), gradient(restored=False)
    assert (wrong - right).norm() / right.norm() > 0.05


@pytest.mark.parametrize("size", [1, 3, 4])
@pytest.mark.parametrize(
    "objectives", [[Entropy()], [Supervised()], [Entropy(), Kept()]], ids=["entropy", "labels", "filter"]
)
def test_micro_batches_change_nothing(size, objectives):
    whole = gradients(merged_of(modules=[Shift]), objectives=objectives)
    parts = gradients(merged_of(modules=[Shift]), objectives=objectives, loop=Joint(micro_batch=size))
    assert_same(parts, whole, rtol=1e-4, atol=1e-6)  # fp32 sums in another order


def test_a_filter_that_keeps_nothing_gives_zero_not_nan():
    batches = batches_of()
    for batch in batches.values():
        batch["input"][:, 0] = -1
    value, found = gradients(merged_of(), objectives=[Kept()], batches=batches)
    assert value == 0
    assert all(not gradient.any() for gradient in found.values())


def test_weights_and_tasks_weigh():
    plain = gradients(merged_of())[1]["rule.raw_TG"]
    double = gradients(merged_of(), objectives=[Entropy(weight=2)])[1]["rule.raw_TG"]
    torch.testing.assert_close(double, 2 * plain)
    alone = gradients(merged_of(), objectives=[Entropy(task_weights={"a": 0, "b": 0})])[1]["rule.raw_TG"]
    torch.testing.assert_close(alone, gradients(merged_of(), batches={"c": batches_of()["c"]})[1]["rule.raw_TG"])


def test_dividing_by_log_classes_bounds_the_entropy():
    value, _ = gradients(merged_of(), objectives=[Entropy(divide_by_log_classes=True)])
    assert 0 < value < len(TASKS)


def test_masked_classes_keep_entropy_finite():
    from adamerge.types import TaskOutput

    logits = torch.tensor([[0.0, 0.0, -torch.inf]], requires_grad=True)
    term = Entropy()(TaskOutput("a", logits, logits), {})["entropy"]
    torch.testing.assert_close(term.sum, torch.tensor(2.0).log())
    term.sum.backward()
    assert logits.grad.isfinite().all()


def test_tied_weights_are_one_and_get_both_gradients():
    model = merged_of(TiedNet)
    net = model.materialize()
    assert net.outer.weight is net.inner.weight
    assert_same(gradients(model), gradients(merged_of(TiedNet, apply_mode="swap")), rtol=1e-5, atol=1e-7)
    with merged_of(TiedNet).applied() as placed:
        assert placed.outer.weight is placed.inner.weight


def test_parameters_that_share_memory_as_two_objects_are_both_swapped():
    class Shared(Net):
        def __init__(self):
            super().__init__()
            self.blocks[1][1].weight.data = self.blocks[0][1].weight.data

    model = merged_of(Shared)
    with model.applied() as net:
        assert net.blocks[1][1].weight is net.blocks[0][1].weight
        assert not torch.equal(net.blocks[1][1].weight, model.vectors.base("blocks.0.1.weight"))


def test_a_narrow_model_materialises_to_fp32_without_rounding():
    expected = merged_of().materialize()
    net = merged_of().to(torch.bfloat16).materialize(dtype=torch.float32)
    assert torch.equal(net.stem.weight, expected.stem.weight)


def test_recurrent_networks_are_swapped_in_both_their_lists():
    model = merged_of(Recurrent)
    value, found = gradients(model)
    assert found["rule.raw_TG"].abs().sum() > 0
    batch = batches_of()["a"]
    torch.testing.assert_close(model(batch, task="a"), model.folded()(batch, task="a"))
    assert_same((value, found), gradients(merged_of(Recurrent, apply_mode="swap")), rtol=1e-5, atol=1e-7)


def test_terms_of_one_name_are_all_kept():
    module = Silent(merged_of(), objectives=[Entropy(), Entropy(weight=2), Entropy(weight=3)])
    batch = batches_of()["a"]
    with module.model.applied():
        assert [w.weight for w in module.terms(module.model.respond("a", batch), batch).values()] == [1, 2, 3]


def test_materialising_inside_the_block_is_refused():
    model = merged_of()
    with model.applied(), pytest.raises(RuntimeError, match="materialize outside"):
        model.materialize()


def test_nothing_frozen_is_changed_or_seen():
    model = merged_of(NormNet)
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"rule", "task_modules"}
    assert not list(model.buffers())
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}
    model.train()
    with model.applied() as net:
        before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    gradients(model)
    with model.applied() as net:
        assert not net.training
        assert all(torch.equal(before[name], buffer) for name, buffer in net.named_buffers())


def test_dropout_never_acts():
    model = merged_of()
    model.train()
    batch = batches_of()["a"]
    assert torch.equal(model(batch, task="a"), model(batch, task="a"))


def test_the_network_is_empty_outside_the_block_also_after_an_error():
    model = merged_of()
    with pytest.raises(RuntimeError, match="not in place"):
        model.features(batches_of()["a"])
    with pytest.raises(KeyError), model.step():
        raise KeyError
    with pytest.raises(RuntimeError, match="not in place"):
        model.features(batches_of()["a"])
    assert all(isinstance(parameter, nn.Parameter) for parameter in model.rule.parameters())
    with model.applied(), pytest.raises(RuntimeError, match="do not nest"), model.step():
        pass


def test_the_step_leaves_gradients_of_parameters_alone_until_backward():
    model = merged_of(modules=[Shift])
    scalars = []
    for _ in range(2):
        with model.step() as step:
            step.backward(model.respond("a", batches_of()["a"]).logits_BC.sum())
        assert all(parameter.grad is None for parameter in model.parameters())
        scalars.append(step.scalar(torch.tensor(1.0)))
    (scalars[0] / 2).backward()
    once = {n: p.grad.clone() for n, p in model.learnables().items()}
    (scalars[1] / 2).backward()
    for name, parameter in model.learnables().items():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, 2 * once[name])
    assert once["rule.raw_TG"].any()


def test_a_wrong_task_is_one_clear_error():
    model = merged_of()
    for task in ("d", None):
        with pytest.raises(InputError, match=r"knows the tasks a, b, c; asked for"):
            model(batches_of()["a"], task=task)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_model_merges_in_fp32_and_casts_once(dtype):
    model = merged_of()
    expected = {name: weight.to(dtype) for name, weight in model.weights().items()}
    model.to(dtype)
    found = model.weights()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert model.rule.raw_TG.dtype == torch.float32
    batch = {key: value.to(dtype) if value.is_floating_point() else value for key, value in batches_of()["a"].items()}
    assert model(batch, task="a").dtype == torch.float32


def test_compiled_network_gives_the_same_gradient():
    def build():
        net = Net()
        net.compile(backend="aot_eager")
        return net

    for way in ("leaf", "swap"):
        compiled = merged_of(build=build, apply_mode=way)
        for k in range(2):
            found = gradients(compiled, batches=batches_of(k=k))
            assert_same(found, gradients(merged_of(), batches=batches_of(k=k)), rtol=1e-5, atol=1e-7)


def test_one_materialisation_and_one_pull_back_per_step(monkeypatch):
    """Also for many tasks and micro-batches; counted at the two products."""
    from adamerge.deltas import DenseDeltas

    calls = {"_combine": 0, "_inner": 0}
    for name in calls:
        original = getattr(DenseDeltas, name)

        def counted(self, *args, name=name, original=original):
            calls[name] += 1
            return original(self, *args)

        monkeypatch.setattr(DenseDeltas, name, counted)
    model = merged_of()
    gradients(model, loop=Joint(micro_batch=1))
    tensors = len(model.vectors.space.shapes)
    assert calls == {"_combine": tensors, "_inner": tensors}


def test_a_frozen_rule_costs_no_gradient_of_weights():
    model = merged_of(modules=[Shift], rule=TaskWise)
    model.rule.requires_grad_(False)
    _, found = gradients(model)
    assert set(found) == {f"task_modules.{i}.0.shift" for i in range(3)}
    assert all(gradient.any() for gradient in found.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objectives": []}, "There is no objective"),
        ({"objectives": [Entropy(task_weights={"x": 1})]}, "`task_weights` of Entropy names x; the tasks are a, b, c"),
        ({"loop": Joint(order="concatenated", micro_batch=2)}, "`loop.micro_batch` splits"),
    ],
)
def test_parts_that_do_not_fit_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        AdaMerge(merged_of(), **options)


def test_nothing_to_learn_is_refused():
    model = merged_of()
    model.rule.requires_grad_(False)
    with pytest.raises(InputError, match="nothing to learn"):
        AdaMerge(model)


@pytest.mark.parametrize(
    ("samples", "said"),
    [("a text", "takes a list"), (["a text"], "takes a list"), ({"input": 1}, "takes a list"), ([], "was given no")],
)
def test_samples_are_a_list_with_inputs_by_name(samples, said):
    with pytest.raises(InputError, match=rf"`prepare` {said}"):
        merged_of().prepare(samples)
