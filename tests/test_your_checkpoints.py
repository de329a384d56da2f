"""docs/your_checkpoints.md as a user would follow it, from files on the disk to the hub and back."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file

import adamerge
from adamerge import backbones, cli
from adamerge.artifact import read_record
from tests.checkpoints_hf import WORDS, write
from tests.hub_server import served_hub  # noqa: F401

PAGE = (Path(__file__).parent.parent / "docs" / "your_checkpoints.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.M | re.S)
YAML = [text for kind, text in BLOCKS if kind == "yaml"]
PYTHON = [text for kind, text in BLOCKS if kind == "python"]
COMMANDS = [line for kind, text in BLOCKS if kind == "sh" for line in text.splitlines()]
CLASSES = {
    "reviews": ["negative", "positive"],
    "topics": ["food", "sport", "money"],
    "questions": ["who", "where", "when", "why"],
    "spam": ["no", "yes"],
    "tone": ["calm", "angry", "glad"],
}
SHORT = ["--trainer.max_steps=2", "--trainer.accelerator=cpu", "--data.batch_size=4"]


def lines(samples):
    return "\n".join(map(json.dumps, samples))


@pytest.fixture
def home(tmp_path, monkeypatch, hub):
    """The working directory that the page speaks of, with the base on the hub."""
    paths = write(tmp_path / "made", "bert", "AutoModelForSequenceClassification", base_auto="AutoModelForPreTraining",
                  classes=CLASSES)  # fmt: skip
    hub.add("google-bert/bert-base-uncased", paths["base"])
    here = tmp_path / "here"
    (here / "data").mkdir(parents=True)
    (here / "experts").mkdir()
    for task in CLASSES:
        paths[task].rename(here / "experts" / task)
        texts = [" ".join(WORDS[(n * k) % 16] for k in range(1, 2 + n % 7)) for n in range(20)]
        (here / "data" / f"{task}.jsonl").write_text(lines({"text": text} for text in texts))
        labelled = ({"text": text, "label": CLASSES[task][n % 2]} for n, text in enumerate(texts))
        (here / "data" / f"{task}_test.jsonl").write_text(lines(labelled))
    for name, text in zip(("mine", "labels", "few"), YAML, strict=True):
        (here / f"{name}.yaml").write_text(text)
    monkeypatch.chdir(here)
    return here


@pytest.fixture
def typed(monkeypatch, capsys):
    """Runs a line of the page, `fit` for two steps; returns what it prints."""

    def run(line):
        first, *rest = shlex.split(line)
        if first == "python":
            assert rest[:2] == ["-m", "adamerge.fit"]
            monkeypatch.setattr(sys, "argv", ["adamerge.fit", *rest[2:], *SHORT])
            status = cli.main(cli.fit)
        else:
            monkeypatch.setattr(sys, "argv", ["adamerge", *rest])
            status = cli.main()
        out, errors = capsys.readouterr()
        assert status == 0, errors
        return out

    return run


def directory(out):
    return re.findall(r"^Run directory: (.*)$", out, re.M)[-1]


def test_the_first_configuration_is_short():
    assert len(YAML[0].splitlines()) <= 15
    assert list(yaml.safe_load(YAML[0])["model"]["experts"]) == list(CLASSES)


def test_from_unlabeled_files_to_answers_and_out_again(home, typed, hub, capsys):
    assert "No problems found." in typed(COMMANDS[0])
    run = directory(typed(COMMANDS[1]))
    names = {"adamerge": adamerge, "run_directory": run}
    exec(PYTHON[0], names)
    exec(PYTHON[1], names)
    assert capsys.readouterr().out.strip() in CLASSES["reviews"]
    assert re.fullmatch(r"[0-9a-f]{40}", read_record(run)[1]["sources"]["base"]["revision"])
    export, push_export, push_run, mergekit = COMMANDS[-4:]
    typed(export.replace("RUN", run))
    exec(PYTHON[2], {})
    assert capsys.readouterr().out.strip() in CLASSES["reviews"]
    model = transformers.AutoModelForSequenceClassification.from_pretrained("merged/tasks/reviews").eval()
    batch = {name: value.long() for name, value in names["merge"].prepare([{"text": "The soup was cold."}]).items()}
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, names["logits"], rtol=1e-5, atol=1e-6)
    typed(push_export)
    typed(push_run.replace("RUN", run))
    assert hub.is_private("my-org/merged")
    assert {"merge.yaml", "merge.safetensors", "README.md"} <= set(hub.files("my-org/merge"))
    typed(mergekit.replace("RUN", run))
    assert yaml.safe_load(Path("merged.yaml").read_text())["merge_method"] == "task_arithmetic"


def test_labels_for_some_tasks_only(home, typed):
    out = typed(COMMANDS[2])
    (row,) = [line for line in out.splitlines() if "this merge" in line and "│" in line]
    assert row.count("–") == 4
    assert re.search(r"Not scored.*topics, questions, spam, tone", out)


def test_data_for_some_tasks_only(home, typed):
    run = directory(typed(COMMANDS[3]))
    merge = adamerge.load(run)
    assert set(merge.tasks) == set(CLASSES)
    assert merge(merge.prepare([{"text": "ant"}]), task="spam").shape == (1, 2)


def test_a_pickled_expert_is_converted(home, typed):
    (line,) = [line for line in COMMANDS if line.startswith("adamerge convert")]
    Path("old").mkdir()
    Path("experts/tone").rename("old/expert")
    state = load_file("old/expert/model.safetensors")
    torch.save(state, "old/expert/pytorch_model.bin")
    Path("old/expert/model.safetensors").unlink()
    Path("new").mkdir()
    typed(line)
    found = load_file("new/expert/model.safetensors")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)
    Path("new/expert").rename("experts/tone")
    typed(COMMANDS[0])


def test_all_lines_are_tested_and_all_backbones_listed():
    assert [shlex.split(line)[1 if line.startswith("adamerge") else 2] for line in COMMANDS] == [
        *("check", "adamerge.fit", "adamerge.fit", "adamerge.fit", "convert"),
        *("export", "push", "push", "mergekit"),
    ]
    listed = set(re.findall(r"^\| `(\w+)` \|", PAGE, re.M))
    assert listed == set(backbones.__all__) - {"Backbone"}
