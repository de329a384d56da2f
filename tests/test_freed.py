"""What is freed leaves the process, when it has grown."""

import sys

import pytest
import torch

from adamerge import freed, step


@pytest.mark.skipif(sys.platform != "linux" or freed._trim() is None, reason="glibc on Linux only")
def test_what_is_freed_below_something_held_goes_back(monkeypatch):
    monkeypatch.setattr(freed, "_settled", 0)
    blocks = [torch.ones(25_000) for _ in range(4_000)]  # 100 kB each, which malloc takes from its heap
    held = freed._resident()
    del blocks[:-1]  # the last one stands at the top, so that the heap cannot shrink by itself
    freed.give_back()
    assert held - freed._resident() > 300e6
    assert blocks[0].sum() == 25_000


def test_only_a_process_that_has_grown_by_a_fifth_is_trimmed(monkeypatch):
    sizes, calls = iter([100, 90, 107, 109, 100, 119]), []
    monkeypatch.setattr(freed, "_settled", 0)
    monkeypatch.setattr(freed, "_resident", lambda: next(sizes))
    monkeypatch.setattr(freed, "_trim", lambda: calls.append)
    freed.give_back()
    assert calls == [0]
    assert freed._settled == 90
    freed.give_back()
    assert calls == [0]
    freed.give_back()
    assert calls == [0, 0]
    assert freed._settled == 100
    freed.give_back()
    assert calls == [0, 0]


def test_nothing_happens_where_memory_cannot_be_given_back(monkeypatch):
    monkeypatch.setattr(freed, "_trim", lambda: None)
    monkeypatch.setattr(freed, "_settled", 0)
    freed.give_back()
    assert freed._settled == 0


def test_every_backward_of_a_step_on_a_cpu_gives_back(monkeypatch):
    calls = []
    monkeypatch.setattr(step, "give_back", lambda: calls.append(None))
    weight = torch.nn.Parameter(torch.ones(2))
    one = step.Step({"weight": weight}, torch.device("cpu"), False, lambda keep: {})
    one.backward(weight.sum())
    one.backward(weight.detach().sum())  # depends on nothing that is trained
    one.backward(2 * weight.sum())
    assert len(calls) == 2
    assert torch.equal(weight.grad, torch.full((2,), 3.0))
