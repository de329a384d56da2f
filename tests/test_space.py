import pytest
import torch
from torch import nn

from adamerge.space import ParamSpace
from adamerge.types import InputError
from tests.tiny import Net, NormNet, TiedNet


def test_every_parameter_is_merged_or_left_out_with_its_reason():
    net = NormNet()
    space = ParamSpace.of(net, skip="frozen")
    space = space.without(["unused"], "not reached by the loss")
    assert set(space.shapes) | set(space.left_out) == {name for name, _ in net.named_parameters()}
    assert space.left_out == {"frozen": "skipped", "unused": "not reached by the loss"}
    assert "skipped: 1 (frozen)" in space.describe()
    assert "not reached by the loss: 1 (unused)" in space.describe()
    assert tuple(space.buffers) == ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked")


def test_tied_tensors_appear_once_under_their_first_name():
    space = ParamSpace.of(TiedNet())
    assert "inner.weight" in space.shapes
    assert "outer.weight" not in space.shapes
    assert space.aliases == {"outer.weight": "inner.weight"}
    assert space.num_elements == sum(p.numel() for p in TiedNet().parameters())
    assert space.checkpoint_names()["inner.weight"] == ["inner.weight", "outer.weight"]


def test_parameters_that_share_memory_are_tied_even_as_two_objects():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight.data = net[0].weight.data
    assert ParamSpace.of(net).aliases == {"1.weight": "0.weight"}


def test_a_tied_tensor_stays_when_only_a_further_name_of_it_is_apart():
    """As an output layer that no checkpoint holds, since it is the embedding."""
    space = ParamSpace.of(TiedNet())
    stays = space.apart({"outer.weight": "not in the base"})
    assert stays.shapes == space.shapes
    assert stays.left_out == {}
    for gone in ({"inner.weight": "own"}, {"inner.weight": "own", "outer.weight": "own"}):
        assert set(space.apart(gone).shapes) == {"first.weight", "first.bias", "outer.bias"}
        assert space.apart(gone).left_out == gone


@pytest.mark.parametrize(
    ("group", "names"),
    [
        ("model", ("model",)),
        ("block", ("stem", "blocks.0", "blocks.1")),
        (r"(stem|blocks)", ("stem", "blocks")),
        (r"blocks\.\d+", ("rest", "blocks.0", "blocks.1")),
    ],
)
def test_groups(group, names):
    space = ParamSpace.of(Net(), group=group)
    assert space.group_names == names
    assert set(space.group_of) == set(space.shapes)
    assert sorted(set(space.group_of.values())) == list(range(len(names)))


def test_a_group_goes_with_its_last_tensor():
    space = ParamSpace.of(Net(), group="block").without(["stem.weight", "stem.bias"], "x")
    assert space.group_names == ("blocks.0", "blocks.1")
    assert space.group_of["blocks.1.0.weight"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"skip": "("}, "`space.skip` is no regular expression"),
        ({"group": "("}, "`space.group` is no regular expression"),
        ({"group": "blocs"}, "`space.group` is 'blocs', which matches no tensor"),
        ({"skip": "."}, "No tensor is left to merge"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        ParamSpace.of(Net(), **options)


def test_integer_parameters_are_left_out():
    net = Net()
    net.register_parameter("steps", nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False))
    assert ParamSpace.of(net).left_out == {"steps": "not floating"}
