"""The demo pools that come with the package: the same bits for everyone, small, and made by the code beside them."""

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from adamerge.demo import digits, digits_training, texts, zoo
from adamerge.demo.digits import TASKS, DigitNet, samples
from adamerge.demo.shipped import POOLS, load_half, load_sheet, rounded, save_sheet

GOLDEN = Path(__file__).parent / "golden" / "pools.txt"


def contents():
    """A digest of what each shipped file holds once it is read: numbers and pixels, not how they are packed."""
    for file in sorted(POOLS.rglob("*")):
        if file.suffix == ".safetensors":
            parts = [part for name, held in sorted(load_file(file).items()) for part in (name.encode(), held.numpy())]
        elif file.suffix == ".webp":
            parts = [load_sheet(file, 32)]
        else:
            parts = [file.read_bytes()] if file.is_file() else []
        digest = hashlib.sha256()
        for part in parts:
            digest.update(part)
        if parts:
            yield f"{file.relative_to(POOLS).as_posix()} {digest.hexdigest()}"


def recorded():
    """The pools' versions and digests, as they stand in the golden file."""
    versions = [f"{pool.__name__.rpartition('.')[2]} {pool.VERSION}" for pool in (digits, texts, zoo)]
    return "".join(f"{line}\n" for line in [*versions, *contents()])


def test_the_pools_are_the_same_bits_for_everyone():
    """Where this changes on purpose, raise the pool's VERSION, so that caches are made anew."""
    assert recorded() == GOLDEN.read_text()


def test_the_pools_are_small():
    assert sum(file.stat().st_size for file in POOLS.rglob("*")) < 25e6


def test_half_precision_holds_what_is_shipped_or_says_so():
    state = {"weight": torch.randn(3, 4)}
    again = rounded(rounded(state))
    assert torch.equal(again["weight"], rounded(state)["weight"])
    with pytest.raises(ValueError, match=r"Half precision does not hold weight\."):
        rounded({"weight": torch.tensor([1e6])})


def test_a_sheet_gives_back_its_pictures(tmp_path):
    images = np.random.RandomState(0).randint(0, 256, (50, 8, 8, 3)).astype(np.uint8)
    save_sheet(images, tmp_path / "sheet.webp")
    assert np.array_equal(load_sheet(tmp_path / "sheet.webp", 8), images)


def test_the_scans_are_those_of_scikit_learn(tmp_path):
    digits_training.collect_scans(tmp_path)
    shipped, collected = (load_file(folder / "scans.safetensors") for folder in (POOLS / "digits", tmp_path))
    assert torch.equal(collected["ink"], shipped["ink"])
    assert torch.equal(collected["digit"], shipped["digit"])
    # a logarithm may differ in its last bit, and a rounded number with it
    assert (collected["noise"].int() - shipped["noise"].int()).abs().max() <= 1


def answers(state, task):
    """The predictions on the test split by one model of the pool."""
    state = dict(state)
    weight, bias = state.pop("head.weight"), state.pop("head.bias")
    net = DigitNet()
    net.load_state_dict(state)
    with torch.no_grad():
        return (net(samples(task, "test")[0]) @ weight.T + bias).argmax(1)


@pytest.mark.parametrize("task", TASKS)
def test_the_experts_on_digits_are_good(task):
    shipped = load_half(POOLS / "digits" / f"{task}.safetensors")
    assert (answers(shipped, task) == samples(task, "test")[1]).float().mean() > 0.93


@pytest.mark.slow
def test_an_expert_on_digits_trained_here_is_the_shipped_one():
    """Compared by what it answers: other processors and versions of torch add up in another order."""
    base = load_half(POOLS / "digits" / "base.safetensors")
    trained = answers(digits_training.expert("parity", base), "parity")
    assert (trained == answers(load_half(POOLS / "digits" / "parity.safetensors"), "parity")).float().mean() > 0.95


def test_the_command_takes_new_folders_and_known_pools_only(tmp_path):
    def run(*arguments):
        line = [sys.executable, "-m", "adamerge.demo", *map(str, arguments)]
        return subprocess.run(line, capture_output=True, text=True)

    known, strange = run("digits", tmp_path), run("farm", tmp_path / "new")
    assert "exists; name a new folder." in known.stderr
    assert "invalid choice: 'farm'" in strange.stderr
    assert known.returncode == strange.returncode == 2
