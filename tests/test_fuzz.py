"""Some hundred mutated inputs at each door; `python -m tests.fuzz` sends 20,000, others each time."""

import time
from pathlib import Path

import pytest
from hypothesis import strategies as st

from adamerge.types import InputError
from tests.fuzz import SECONDS, Door, Tally, main, run, table
from tests.fuzz_doors import DOORS

NUMBERS = {"load": 300, "convert": 400, "images": 300, "index": 300, "evaluate": 200, "config": 30}


@pytest.mark.parametrize(("name", "number"), NUMBERS.items())
def test_a_door_keeps_its_promise(name, number, tmp_path, monkeypatch):
    monkeypatch.setenv("ADAMERGE_CACHE", str(tmp_path / "cache"))
    tally = run(DOORS[name](), number, start=0)
    assert not tally.failures, table({name: tally}, tmp_path)
    assert tally.examples == tally.refused + tally.accepted == number
    assert tally.refused
    assert tally.accepted


def broken(error):
    def enter(folder, out):
        raise error

    return enter


def escaping(folder, out):
    Path(folder, "..", "elsewhere").write_text("x")


def slow(folder, out):
    time.sleep(SECONDS + 1)


@pytest.mark.parametrize(
    ("enter", "kind"),
    [
        (broken(KeyError("a")), "KeyError at elsewhere"),
        (broken(MemoryError()), "MemoryError at elsewhere"),
        (broken(InputError("")), "a message that is not one paragraph"),
        (escaping, "wrote elsewhere"),
        (lambda folder, out: Path("here").write_text("x"), "wrote here/here"),
        (lambda folder, out: bytearray(b"x") * (40 * 2**20), "more than 20 MiB"),
        (slow, "more than 1 s"),
    ],
)
def test_a_broken_promise_is_seen(enter, kind, tmp_path, monkeypatch):
    monkeypatch.setattr("tests.fuzz.SECONDS", 1)
    tally = run(Door(st.just({"a": b"x"}), enter, memory=20 * 2**20), 1, start=0)
    assert list(tally.failures) == [kind]
    assert f"d: 1 × {kind}" in table({"d": tally}, tmp_path)
    assert (tmp_path / "d-0" / "a").read_bytes() == b"x"


def test_the_command(tmp_path, monkeypatch, capsys):
    asked = []

    def watched(name, number, start):
        asked.append((name, number, start))
        tally = Tally(3, 1, 1, 0.5)
        if name == "index":
            tally.fail("KeyError at a.py:1", {"a": b"x"}, "'b'")
        return tally

    monkeypatch.setattr("tests.fuzz.watched", watched)
    options = ["--examples", "3", "--seed", "7", "--keep", str(tmp_path / "kept")]
    assert main([*options, "--door", "images"]) == 0
    assert main(options) == 1
    assert asked == [("images", 3, 7), *((name, 3, 7) for name in DOORS)]
    assert "index: 1 × KeyError at a.py:1" in capsys.readouterr().out
    assert (tmp_path / "kept" / "index-0" / "a").exists()
