"""Surgery, deep and not, and Tint: nothing at the start, the paper's formula after, and gradients that are right."""

import copy
from collections import namedtuple
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from adamerge.blocks import block_names, channel_axis, pooled, recorded_blocks, tokens_of, with_tokens
from adamerge.learnables import state_of
from adamerge.loops import Joint
from adamerge.task_modules import LinearHead, Surgery, Tint, ZeroShotHead
from adamerge.types import InputError, TaskInfo
from tests.test_engine import CHECKPOINTING, TIGHT, assert_same, gradients
from tests.tiny import CLASSES, INPUT, TASKS, WIDTH, Net, Recurrent, TiedNet, batches_of, merged_of, widths_of

DOUBLE = torch.float64
MODULES = {
    "surgery": partial(Surgery, rank=2),
    "normalized": partial(Surgery, rank=2, normalize=True),
    "deep": partial(Surgery, rank=2, deep=True),
    "head": Tint,
    "layer": partial(Tint, layer="blocks.1.1"),
}
every = pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)


class Tokens(nn.Module):
    """A transformer over three tokens; `after` stands explicitly where the hooks act."""

    batch_first = True

    def __init__(self):
        super().__init__()
        self.stem, self.out = nn.Linear(INPUT, 3 * 8), nn.Linear(8, WIDTH)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(8, 2, 16, dropout=0, batch_first=self.batch_first) for _ in range(3)
        )

    def forward(self, x, after=lambda index, tokens: tokens):
        tokens = self.stem(x).unflatten(-1, (3, 8))
        tokens = tokens if self.batch_first else tokens.transpose(0, 1)
        for index, block in enumerate(self.blocks):
            tokens = after(index, block(tokens))
        return self.out(tokens.mean(1 if self.batch_first else 0))


class SamplesSecond(Tokens):
    batch_first = False


class Pair(nn.Module):
    """A block that puts out its tokens and how large they were."""

    Output = namedtuple("Output", ["tokens", "size"])

    def __init__(self, kind):
        super().__init__()
        self.linear, self.kind = nn.Linear(WIDTH, WIDTH), kind

    def forward(self, tokens):
        tokens = torch.tanh(self.linear(tokens))
        return self.kind((tokens, tokens.abs().mean()))


class Pairs(nn.Module):
    """Blocks whose output is a tuple, a list or a named tuple, of which the next takes both parts."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(INPUT, WIDTH)
        self.blocks = nn.ModuleList(Pair(kind) for kind in (tuple, list, Pair.Output._make))

    def forward(self, x, after=lambda index, tokens: tokens):
        x = self.stem(x)
        for index, block in enumerate(self.blocks):
            tokens, size = block(x)
            x = after(index, tokens) + size
        return x


class Maps(nn.Module):
    """Convolutions of growing width: [B, 3, 4, 4], then [B, 5, 4, 4], then [B, 6, 4, 4] without a list of blocks."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(INPUT, 16)
        self.body = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 5, 3, padding=1), nn.Tanh())
        self.body.append(nn.Conv2d(5, WIDTH, 1))

    def forward(self, x, after=lambda index, tokens: tokens):
        maps = self.stem(x).view(-1, 1, 4, 4)
        index = 0
        for layer in self.body:
            maps = layer(maps)
            if isinstance(layer, nn.Conv2d):
                maps, index = after(index, maps), index + 1
        return maps.mean((2, 3))


def moved(model, scale=0.3):
    """The model with its task modules away from their start."""
    for task in model.tasks:
        generator = torch.Generator().manual_seed(sum(map(ord, task)))
        for module in model.chain(task)[:-1]:
            for parameter in module.parameters():
                parameter.data += scale * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model


def answers(model, **options):
    return {task: model(batch, task=task) for task, batch in batches_of(**options).items()}


def assert_equal(found, expected):
    assert all(torch.equal(found[task], expected[task]) for task in expected)


def surgery(x, down, up):
    return x - F.relu(x @ down.T) @ up.T


# --- at the start


@every
@pytest.mark.parametrize("net", [Net, Tokens, Pairs])
def test_nothing_changes_at_the_start(make, net):
    model = merged_of(net, modules=[make if make is not MODULES["layer"] else partial(Tint, layer="blocks.1")])
    with model.applied(), model.attached("a"):
        features = model.features(batches_of()["a"])
        out = model.answer("a", features)
    if make is MODULES["normalized"]:
        assert torch.equal(out.features_BD, F.normalize(features, dim=-1))
    else:
        assert_equal(answers(model), answers(merged_of(net)))
        assert torch.equal(out.features_BD, features)


def test_a_surgery_starts_the_same_whatever_stands_beside_it():
    def downs(tasks, **info):
        info = {"width": 8, "blocks": {"x": 8, "y": 4}, **info}
        made = {task: Surgery(TaskInfo(task, **info), deep=True, rank=3) for task in tasks}
        return {task: [module.down, *(block.down for block in module.blocks)] for task, module in made.items()}

    torch.manual_seed(0)
    expected = downs(["a", "b"])
    torch.manual_seed(1)
    found = downs(["c", "b", "a"])
    after = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(3), after)
    for task in ("a", "b"):
        assert all(map(torch.equal, found[task], expected[task]))
    a, b = found["a"], found["b"]
    assert not torch.equal(a[0], b[0])
    assert not torch.equal(a[0], a[1])
    assert not torch.equal(a[0], downs(["a"], seed=1)["a"][0])
    assert torch.equal(a[1], downs(["a"], blocks={"y": 4, "x": 8})["a"][2])
    assert a[0].abs().max() <= 8**-0.5  # Kaiming's bound for a = sqrt(5)
    assert a[0].abs().max() > 0.8 * 8**-0.5


# --- the formula


@pytest.mark.parametrize("normalize", [False, True])
def test_surgery_takes_the_adapters_output_away(normalize):
    module = Surgery(TaskInfo("a", width=WIDTH), rank=2, normalize=normalize)
    nn.init.normal_(module.up)
    x = torch.randn(4, WIDTH)
    start = x / x.norm(dim=-1, keepdim=True) if normalize else x
    torch.testing.assert_close(module(x), surgery(start, module.down, module.up))
    assert {name: list(p.shape) for name, p in module.named_parameters()} == {"down": [2, WIDTH], "up": [WIDTH, 2]}


@pytest.mark.parametrize("net", [Net, Tokens, SamplesSecond, Pairs, Maps])
def test_corrected_tokens_feed_the_next_block(net):
    model = moved(merged_of(net, modules=[MODULES["deep"]], dtype=DOUBLE))
    for task, batch in batches_of(dtype=DOUBLE).items():
        module, head = model.chain(task)

        def after(index, x, module=module):
            block = module.blocks[index]
            if x.dim() == 4:
                return surgery(x.permute(0, 2, 3, 1), block.down, block.up).permute(0, 3, 1, 2)
            return surgery(x, block.down, block.up)

        with model.applied() as placed:
            if net is Net:
                x = placed.stem(batch["input"])
                for index, block in enumerate(placed.blocks):
                    x = x + after(index, block(x))
            else:
                x = placed(batch["input"], after)
        expected = head(surgery(x, module.down, module.up))
        torch.testing.assert_close(model(batch, task=task), expected)
        assert not torch.allclose(expected, merged_of(net, dtype=DOUBLE)(batch, task=task))


def test_only_what_changes_the_network_works_inside_it():
    found = {name: merged_of(modules=[make]).chain("a")[0].inside for name, make in MODULES.items()}
    assert found == {"surgery": False, "normalized": False, "deep": True, "head": False, "layer": True}
    assert not merged_of().chain("a")[-1].inside


def test_each_block_has_an_adapter_of_its_width_under_a_stable_name():
    assert widths_of(Maps()) == {"body.0": 3, "body.2": 5, "body.4": WIDTH}
    names = {name: list(tensor.shape) for name, tensor in state_of(merged_of(Maps, modules=[MODULES["deep"]])).items()}
    assert names["task.a.0.up"] == [WIDTH, 2]
    assert [names[f"task.a.0.blocks.{block}.down"] for block in range(3)] == [[2, 3], [2, 5], [2, WIDTH]]


@pytest.mark.parametrize("tuples", [tuple, list, Pair.Output._make])
def test_the_rest_of_a_blocks_output_stays(tuples):
    output = tuples([torch.ones(2), "rest"])
    found = with_tokens(output, torch.zeros(2))
    assert type(found) is type(output)
    assert found[1] == "rest"
    assert not tokens_of(found).any()


@pytest.mark.parametrize("output", [None, {"tokens": torch.ones(1)}, (), (None, torch.ones(1))])
def test_a_block_that_puts_out_no_tensor_is_one_clear_error(output):
    with pytest.raises(InputError, match=r"neither a tensor nor begins with one; name other modules with"):
        tokens_of(output)


@pytest.mark.parametrize(
    ("shape", "axis"), [([4, 8], 1), ([4, 3, 8], 2), ([4, 8, 5, 5], 1), ([4, 5, 5, 8], 3), ([4, 8, 8, 8], 1)]
)
def test_the_channels_are_found(shape, axis):
    assert channel_axis(torch.zeros(shape)) == axis
    assert list(pooled(torch.zeros(shape), 4).shape) == [4, 8]


# --- hooks


def hooks_of(net):
    return sum(len(module._forward_hooks) for module in net.modules())


def test_hooks_are_gone_after_the_block_also_after_an_error():
    model = merged_of(modules=[MODULES["deep"]])
    with model.applied() as net:
        with model.attached("a"):
            assert hooks_of(net) == 2
        assert hooks_of(net) == 0
        with pytest.raises(KeyError), model.attached("a"):
            raise KeyError
        assert hooks_of(net) == 0
    folded = model.folded()
    with pytest.raises(RuntimeError):
        folded({"input": torch.zeros(2, INPUT + 1)}, task="a")
    assert hooks_of(folded) == 0


@pytest.mark.parametrize("recorded_first", [False, True])
def test_what_is_recorded_of_a_block_is_corrected(recorded_first):
    model = moved(merged_of(modules=[MODULES["deep"]]))
    batch = batches_of()["a"]
    with model.applied() as net:
        attached, recorded = model.attached("a"), recorded_blocks(net, block_names(net), 4)
        if recorded_first:
            with recorded as found, attached:
                model.features(batch)
        else:
            with attached, recorded as found:
                model.features(batch)
        block = model.chain("a")[0].blocks[0]
        torch.testing.assert_close(found[0], surgery(net.blocks[0](net.stem(batch["input"])), block.down, block.up))


def test_a_compiled_network_does_not_pass_by_the_hooks():
    def build():
        net = Net()
        net.compile(backend="aot_eager")
        return net

    modules = [MODULES["deep"], MODULES["layer"]]
    model, plain = (moved(merged_of(modules=modules, build=make)) for make in (build, None))
    with model.applied() as net:  # compiled here, before there is any hook
        expected = net(batches_of()["a"]["input"])
        with recorded_blocks(net, block_names(net), 4) as found:
            net(batches_of()["a"]["input"])
    assert len(found) == 2
    for task, logits in answers(plain).items():
        torch.testing.assert_close(model(batches_of()[task], task=task), logits)
    with model.applied() as net:
        torch.testing.assert_close(net(batches_of()["a"]["input"]), expected)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_blocks_hidden_from_the_gradient_are_one_clear_error_and_the_advice_works():
    x = torch.randn(2, INPUT, requires_grad=True)

    def recorded(net, **options):
        with recorded_blocks(net.eval(), block_names(net), 2, **options) as found:
            net(x)
        return found

    hidden = Net(checkpointing=True)
    with pytest.raises(InputError, match=r"without gradient.*`use_reentrant=False`"):
        recorded(hidden, learned=True)
    assert len(recorded(hidden)) == 2
    with torch.no_grad():
        assert len(recorded(hidden, learned=True)) == 2
    plain, seen = Net(), Net(checkpointing=False)
    seen.load_state_dict(plain.state_dict())
    for net in (plain, seen):
        sum(block.square().sum() for block in recorded(net, learned=True)).backward()
    torch.testing.assert_close(seen.stem.weight.grad, plain.stem.weight.grad)


def test_a_block_without_tokens_is_left_out_of_the_record():
    class Odd(nn.Module):
        def forward(self, x):
            return {"x": x}

    net = nn.Sequential(nn.Linear(INPUT, 2), Odd())
    with recorded_blocks(net, ["0", "1"], 3) as found:
        net(torch.zeros(3, INPUT))
    assert [list(block.shape) for block in found] == [[3, 2]]


# --- gradients


@every
@pytest.mark.parametrize("net", [Net, Tokens])
def test_gradients_are_those_of_finite_differences(make, net):
    make = make if make is not MODULES["layer"] else partial(Tint, layer="blocks.1")
    model = moved(merged_of(net, tasks=("a", "b"), modules=[make], dtype=DOUBLE))
    batches = batches_of(("a", "b"), dtype=DOUBLE)

    def loss(logits):
        return logits.log_softmax(-1)[:, 0].sum()

    def total():
        return sum(loss(model(batch, task=task)) for task, batch in batches.items())

    with model.step() as step:
        for task, batch in batches.items():
            with model.attached(task):
                step.backward(loss(model.respond(task, batch).logits_BC))
    step.scalar(torch.zeros(())).backward()
    assert len(model.learnables()) > 1
    for name, parameter in model.learnables().items():
        direction = torch.randn(parameter.shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))
        values = []
        for sign in (1, -1):
            parameter.data += sign * 1e-6 * direction
            values.append(total())
            parameter.data -= sign * 1e-6 * direction
        expected = (values[0] - values[1]) / 2e-6
        assert parameter.grad.any(), name
        torch.testing.assert_close((parameter.grad * direction).sum(), expected, rtol=1e-5, atol=1e-7, msg=name)


@every
@pytest.mark.parametrize("checkpointing", CHECKPOINTING.values(), ids=CHECKPOINTING)
@pytest.mark.parametrize("micro_batch", [None, 3])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_checkpointing_and_micro_batches_change_nothing(make, checkpointing, micro_batch):
    build = partial(Net, checkpointing)
    plain, other = (moved(merged_of(modules=[make], build=b, dtype=DOUBLE)) for b in (Net, build))
    batches = batches_of(dtype=DOUBLE)
    found = gradients(other, batches=batches, loop=Joint(micro_batch=micro_batch))
    assert_same(found, gradients(plain, batches=batches), **TIGHT)


@pytest.mark.parametrize("way", ["leaf", "swap"])
@pytest.mark.parametrize("make", [MODULES["surgery"], MODULES["head"]], ids=["surgery", "head"])
def test_what_leaves_the_network_alone_works_on_all_tasks_at_once(make, way):
    plain, other = (moved(merged_of(modules=[make], dtype=DOUBLE, apply_mode=mode)) for mode in ("leaf", way))
    batches = batches_of(dtype=DOUBLE)
    found = gradients(other, batches=batches, loop=Joint(order="concatenated"))
    assert_same(found, gradients(plain, batches=batches), **TIGHT)


# --- precision


@pytest.mark.parametrize("way", ["bfloat16", "autocast"])
def test_an_adapter_computes_in_fp32_and_gives_the_blocks_dtype(way):
    module = Surgery(TaskInfo("a", width=WIDTH, blocks={"0": WIDTH}), rank=2, deep=True).to(torch.bfloat16)
    block = module.blocks[0]
    nn.init.normal_(block.up)
    net = nn.Sequential(nn.Linear(INPUT, WIDTH))
    net = net.to(torch.bfloat16) if way == "bfloat16" else net
    x = torch.randn(3, INPUT, dtype=next(net.parameters()).dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        before = net(x)
        with module.attach(net):
            found = net(x)
    assert before.dtype == found.dtype == torch.bfloat16
    assert torch.equal(found, surgery(before.float(), block.down, block.up).bfloat16())


@every
def test_a_narrow_model_answers_and_keeps_its_modules_in_fp32(make):
    model = merged_of(modules=[make]).to(torch.bfloat16)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    batch = batches_of(dtype=torch.bfloat16)["a"]
    if make is not MODULES["normalized"]:
        assert torch.equal(model(batch, task="a"), merged_of().to(torch.bfloat16)(batch, task="a"))
    _, found = gradients(moved(model), batches=batches_of(dtype=torch.bfloat16))
    assert all(gradient.isfinite().all() and gradient.any() for gradient in found.values())


# --- tint


@pytest.mark.parametrize("layer", ["head", "blocks.1.1", "stem"])
def test_only_the_tinted_tasks_answers_change(layer):
    model = merged_of(modules=[partial(Tint, layer=layer)])
    before = answers(model)
    for parameter in model.chain("b")[0].parameters():
        parameter.data += 0.5
    after = answers(model)
    assert_equal({t: after[t] for t in "ac"}, {t: before[t] for t in "ac"})
    assert not torch.allclose(after["b"], before["b"])
    head = model.chain("b")[-1]
    assert torch.equal(head.weight, merged_of().chain("b")[-1].weight)
    assert isinstance(head.weight, nn.Parameter)


def test_a_tinted_head_is_the_shared_one_and_the_offset():
    model = moved(merged_of(modules=[Tint]))
    tint, head = model.chain("a")
    batch = batches_of()["a"]
    with model.applied():
        expected = F.linear(model.features(batch), head.weight + tint.offset_weight, head.bias + tint.offset_bias)
    torch.testing.assert_close(model(batch, task="a"), expected)
    assert {name for name in state_of(model) if "task.a" in name} == {"task.a.0.offset_weight", "task.a.0.offset_bias"}
    assert not any(name.startswith("task_modules.0.1.") for name in model.learnables())


def test_a_tinted_layer_is_the_shared_one_and_the_offset():
    model = moved(merged_of(modules=[partial(Tint, layer="blocks.1")]))
    tint, head = model.chain("a")
    batch = batches_of()["a"]
    net = model.materialize()
    for name, parameter in net.blocks[1].named_parameters():
        parameter.data += tint.get_parameter("offset_" + name.replace(".", "/")).data
    torch.testing.assert_close(model(batch, task="a"), head(net(batch["input"])))


def test_a_zero_shot_head_is_tinted_and_one_without_bias_gets_none():
    head = ZeroShotHead(TaskInfo("a"), torch.randn(4, WIDTH), 10.0, -1.0)
    assert dict(Tint(TaskInfo("a", head=head)).named_parameters()).keys() == {"offset_weight", "offset_bias"}
    bare = LinearHead(TaskInfo("a", expert={"head.weight": torch.randn(4, WIDTH)}))
    tint = Tint(TaskInfo("a", head=bare))
    assert dict(tint.named_parameters()).keys() == {"offset_weight"}
    nn.init.normal_(tint.offset_weight)
    x, shared = torch.randn(2, WIDTH), bare.weight.clone()
    with tint.attach(nn.Module()):
        torch.testing.assert_close(bare(x), x @ (shared + tint.offset_weight).T)
    torch.testing.assert_close(bare(x), x @ shared.T)


def test_gradients_reach_the_shared_tensor_past_the_offset():
    """At the start of a tint the rule's gradient is what it is without."""
    _, expected = gradients(merged_of(dtype=DOUBLE), batches=batches_of(dtype=DOUBLE))
    _, found = gradients(
        merged_of(dtype=DOUBLE, modules=[partial(Tint, layer="stem")]), batches=batches_of(dtype=DOUBLE)
    )
    torch.testing.assert_close(found["rule.raw_TG"], expected["rule.raw_TG"])
    assert all(gradient.any() for gradient in found.values())


def test_a_trained_head_can_be_tinted_as_well():
    def trained(info):
        info.head.requires_grad_(True)
        return Tint(info)

    _, found = gradients(merged_of(modules=[trained]))
    for place in range(len(TASKS)):
        assert torch.equal(found[f"task_modules.{place}.0.offset_weight"], found[f"task_modules.{place}.1.weight"])


@pytest.mark.parametrize("layer", ["inner", "outer"])
def test_tied_parameters_are_tinted_at_all_their_places(layer):
    model = moved(merged_of(TiedNet, modules=[partial(Tint, layer=layer)]))
    with model.applied() as net:
        with model.attached("a"):
            assert net.outer.weight is net.inner.weight
            tinted = net.outer.weight
        shared = net.outer.weight
        assert shared is net.inner.weight
    torch.testing.assert_close(tinted, shared + model.chain("a")[0].offset_weight)
    assert_equal(answers(model), answers(model.folded()))


def test_recurrent_layers_are_tinted_in_both_their_lists():
    model = moved(merged_of(Recurrent, modules=[partial(Tint, layer="cell")]))
    assert_equal(answers(model), answers(model.folded()))
    assert not torch.allclose(answers(model)["a"], answers(merged_of(Recurrent))["a"])


def test_parameters_that_are_not_merged_are_tinted_too():
    """A frozen parameter stands in the network as it is; the task's offset is trained."""

    class Frozen(Net):
        def __init__(self):
            super().__init__()
            self.stem.requires_grad_(False)

    model = merged_of(Frozen, modules=[partial(Tint, layer="stem")])
    _, found = gradients(model)
    assert found["task_modules.0.0.offset_weight"].any()


# --- copies


@every
def test_copies_keep_the_modules_and_are_their_own(make):
    model = moved(merged_of(modules=[make]))
    expected = answers(model)
    folded, twin = model.folded(), copy.deepcopy(model)
    assert_equal(answers(folded), expected)
    assert_equal(answers(twin), expected)
    assert_equal(answers(copy.deepcopy(folded)), expected)
    for task in TASKS:
        for parameter in model.chain(task)[0].parameters():
            parameter.data.zero_()
        model.chain(task)[-1].weight.data.zero_()
    assert_equal(answers(folded), expected)
    assert_equal(answers(twin), expected)
    assert not [parameter for parameter in folded.parameters() if parameter.requires_grad]


def test_a_head_stands_once_among_the_modules():
    model = merged_of(modules=[Tint, MODULES["layer"]])
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    assert len(names) == len(set(map(id, model.parameters())))


# --- errors


def test_what_does_not_fit_surgery_is_one_clear_error_and_the_advice_works():
    with pytest.raises(InputError, match=r"`rank` of Surgery is 0; .* at least 1"):
        Surgery(TaskInfo("a", width=4), rank=0)
    with pytest.raises(InputError, match=r"that of task 'a' is not known; give `TaskInfo` its `width`"):
        Surgery(TaskInfo("a"))
    with pytest.raises(InputError, match=r"`deep` of Surgery needs .*name them with `backbone.blocks`"):
        merged_of(TiedNet, modules=[MODULES["deep"]])
    named = dict.fromkeys(block_names(TiedNet(), "inner|outer"), WIDTH)
    for options in ({"rank": 1}, {"deep": True}):
        Surgery(TaskInfo("a", width=WIDTH, blocks=named), **options)


def test_what_does_not_fit_tint_is_one_clear_error_and_the_advice_works():
    net, head = Net(), LinearHead(TaskInfo("a", expert={"head.weight": torch.randn(4, WIDTH)}))
    info = TaskInfo("a", net=net, head=head)
    with pytest.raises(InputError, match=r"`layer` of Tint is 'block.1', which .* the nearest are blocks.1") as error:
        Tint(info, layer="block.1")
    Tint(info, layer=str(error.value).split("nearest are ")[1].split(",")[0])
    with pytest.raises(InputError, match=r"`layer` of Tint is 'blocks.0.2', for task 'a' a Tanh without parameters"):
        Tint(info, layer="blocks.0.2")
    with pytest.raises(InputError, match=r"is 'head', for task 'a' a Identity without parameters"):
        Tint(TaskInfo("a", head=nn.Identity()))
    for layer, lacks in (("head", "head"), ("stem", "net")):
        with pytest.raises(InputError, match=rf"is '{layer}', but `TaskInfo` of 'a' has no `{lacks}`; give it one"):
            Tint(TaskInfo("a"), layer=layer)
        Tint(info, layer=layer)


# --- heads


def test_a_zero_shot_head_is_linear_in_normalised_features():
    weight, x = torch.randn(CLASSES["a"], WIDTH), torch.randn(5, WIDTH)
    head = ZeroShotHead(TaskInfo("a"), weight, 14.3, -2.5)
    expected = 14.3 * F.normalize(x, dim=-1) @ F.normalize(weight, dim=-1).T - 2.5
    torch.testing.assert_close(head(x), expected)
    assert set(head.state_dict()) == {"weight", "bias"}
    assert not any(parameter.requires_grad for parameter in head.parameters())
