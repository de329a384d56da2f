"""What is freed leaves the process, when it has grown."""

import mmap
import sys

import pytest
import torch

from adamerge import freed, step


@pytest.mark.skipif(sys.platform != "linux" or freed._trim() is None, reason="glibc on Linux only")
def test_what_is_freed_below_something_held_goes_back(monkeypatch):
    monkeypatch.setattr(freed, "_settled", 0)
    monkeypatch.setattr(freed, "_again", 0.0)
    blocks = [torch.ones(25_000) for _ in range(4_000)]  # 100 kB each, which malloc takes from its heap
    held = freed._resident()
    del blocks[:-1]  # the last one stands at the top, so that the heap cannot shrink by itself
    freed.give_back()
    assert held - freed._resident() > 300e6
    assert blocks[0].sum() == 25_000


@pytest.fixture
def process(monkeypatch):
    """A process of a given size, whose trims take it to another; and a clock."""

    class Process:
        def __init__(self):
            self.size, self.trimmed, self.now, self.trims = 0, 0, 0.0, 0

        def trim(self, pad):
            self.size, self.trims = self.trimmed, self.trims + 1

        def gives_back(self, size, trimmed, now):
            self.size, self.trimmed, self.now, before = size, trimmed, now, self.trims
            freed.give_back()
            return self.trims > before

    process = Process()
    monkeypatch.setattr(freed, "_settled", 0)
    monkeypatch.setattr(freed, "_again", 0.0)
    monkeypatch.setattr(freed, "_resident", lambda: process.size)
    monkeypatch.setattr(freed, "_trim", lambda: process.trim)
    monkeypatch.setattr(freed.time, "monotonic", lambda: process.now)
    return process


def test_only_a_process_that_has_grown_by_a_fifth_is_trimmed(process):
    assert process.gives_back(100, trimmed=90, now=1)
    assert not process.gives_back(107, trimmed=90, now=2)
    assert process.gives_back(109, trimmed=100, now=3)
    assert not process.gives_back(119, trimmed=100, now=4)


def test_what_is_taken_again_at_once_is_not_given_back_each_time(process):
    """A process that swings between 1 and 2 GB: every six seconds, which costs a quarter of one."""
    assert process.gives_back(2e9, trimmed=1e9, now=1)
    times = [now for now in range(2, 32) if process.gives_back(2e9, trimmed=1e9, now=now)]
    assert times == [7, 13, 19, 25, 31]


@pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
def test_mapped_files_do_not_count(tmp_path):
    (tmp_path / "file").write_bytes(bytes(100_000_000))
    with open(tmp_path / "file", "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        before = freed._resident()
        assert sum(mapped[::4096]) == 0
        assert freed._resident() - before < 50e6


def test_nothing_happens_where_memory_cannot_be_given_back(monkeypatch):
    monkeypatch.setattr(freed, "_trim", lambda: None)
    monkeypatch.setattr(freed, "_settled", 0)
    monkeypatch.setattr(freed, "_again", 0.0)
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
