import pytest
import torch

from adamerge.rules import LayerWise, TaskWise
from adamerge.types import InputError
from tests.tiny import vectors_of


@pytest.mark.parametrize("activation", ["none", "clamp", "clamp_ste", "sigmoid", "tanh"])
def test_init_is_the_coefficient(activation):
    rule = LayerWise(vectors_of(), init={"a": 0.1, "b": 0.5, "c": 0.9}, activation=activation)
    torch.testing.assert_close(rule.coefficients()[:, 0], torch.tensor([0.1, 0.5, 0.9]))


def test_softmax_shares_one_among_the_tasks():
    rule = TaskWise(vectors_of(), init={"a": 1, "b": 1, "c": 2}, activation="softmax")
    torch.testing.assert_close(rule.coefficients()[:, 0], torch.tensor([0.25, 0.25, 0.5]))
    torch.testing.assert_close(LayerWise(vectors_of(), activation="softmax").coefficients(), torch.full((3, 10), 1 / 3))


def test_clamp_stops_the_gradient_outside_and_straight_through_does_not():
    for activation, expected in (("clamp", [0.0, 1.0, 0.0]), ("clamp_ste", [1.0, 1.0, 1.0])):
        rule = TaskWise(vectors_of(), activation=activation)
        with torch.no_grad():
            rule.raw_TG[:, 0] = torch.tensor([-0.5, 0.5, 1.5])
        coefficients = rule.coefficients()
        assert coefficients[:, 0].tolist() == [0.0, 0.5, 1.0]
        coefficients.sum().backward()
        assert rule.raw_TG.grad[:, 0].tolist() == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": 1.5, "activation": "clamp"}, "`rule.init` is 1.5.*`rule.activation: clamp`.*between 0 and 1"),
        ({"init": 1.0, "activation": "sigmoid"}, "strictly between 0 and 1"),
        ({"init": float("nan")}, "`rule.init` is nan"),
        ({"init": {"a": 0.3, "d": 0.3}}, r"names the tasks \['a', 'd'\]; the merge has \['a', 'b', 'c'\]"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        LayerWise(vectors_of(), **options)


def test_task_wise_has_one_coefficient_per_task():
    assert TaskWise(vectors_of()).raw_TG.shape == (3, 1)
    assert LayerWise(vectors_of(group="block")).raw_TG.shape == (3, 3)
