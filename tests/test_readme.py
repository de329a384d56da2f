"""The README's commands and Python run; its printed output is what the commands print."""

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from adamerge.cli import main
from adamerge.config import make_parser
from tests.tiny import Net

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.M | re.S)
COMMANDS = [line for kind, text in BLOCKS if kind == "sh" for line in text.splitlines() if line.startswith("python ")]
OUTPUTS = re.findall(r"<!-- output: (.*?) -->\n```text\n(.*?)```", README, re.S)


def numbers(text):
    return [float(number) for number in re.findall(r"\d+\.\d", text)]


@pytest.mark.parametrize(("command", "printed"), OUTPUTS, ids=[f"output{i}" for i in range(len(OUTPUTS))])
def test_the_output_shown_is_what_is_printed(command, printed, tmp_path, monkeypatch, capsys):
    """All but the trained row, which takes 300 steps; tests/test_configs.py trains it."""
    monkeypatch.chdir(ROOT)
    _, _, _, *arguments = shlex.split(command)
    short = ["--run.root", str(tmp_path), "--trainer.max_steps", "2"]
    monkeypatch.setattr(sys, "argv", ["adamerge.fit", *arguments, *short])
    assert main() == 0
    out = capsys.readouterr().out
    steady = re.compile(r"^(?:Tasks|Merging|Learning|Memory):.*$", re.M)
    assert steady.findall(out) == steady.findall(printed)
    assert len(steady.findall(out)) == 4
    found, shown = (
        [numbers(line) for line in text.splitlines() if line.startswith("│")][:-1] for text in (out, printed)
    )
    assert [len(row) for row in found] == [len(row) for row in shown] == [6] * 5
    # other processors may train slightly other experts
    assert torch.tensor(found).sub(torch.tensor(shown)).abs().mean() < 2


def test_every_command_parses_and_names_what_exists():
    assert len(COMMANDS) == 3
    for command in COMMANDS:
        python, dash, module, *arguments = shlex.split(command)
        assert (python, dash, module) == ("python", "-m", "adamerge.fit")
        make_parser().parse_args([str(ROOT / a) if a.startswith("configs/") else a for a in arguments])
    for target in re.findall(r"`make (\w+)`", README):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)
    for link in re.findall(r"\]\(([\w./-]+)\)", README):
        assert (ROOT / link).exists()


class MyNet(Net):
    """The network of the README's example."""


def test_the_python_runs(tmp_path, monkeypatch):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "checkpoints").mkdir()
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    for name, classes in (("base", None), ("cats", 2), ("dogs", 3)):
        head = {"head.weight": torch.randn(classes, 6), "head.bias": torch.zeros(classes)} if classes else {}
        save_file({**MyNet().state_dict(), **head}, f"checkpoints/{name}.safetensors")
    names = {
        "MyNet": MyNet,
        "cat_images": torch.randn(20, 5),
        "dog_images": torch.randn(20, 5),
        "cat_labels": torch.randint(2, (20,)),
        "dog_labels": torch.randint(3, (20,)),
    }
    for kind, text in BLOCKS:
        if kind == "python":
            exec(text, names)
    assert names["logits"].shape == (500, 2)
    assert names["run"].merge.tasks == ("cats", "dogs")
