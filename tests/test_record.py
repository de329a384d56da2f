"""Records of others: whatever stands in one is read, or refused by one paragraph, in bounded time and memory."""

import copy
import json
import os
import re
import shutil
import time
from contextlib import suppress

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import nn

import adamerge
from adamerge import InputError, Recipe, UnlabeledTasks, artifact, attempts, runs
from adamerge.backbones import TextClassifier
from adamerge.budget import budget
from adamerge.card import model_card
from adamerge.checkpoints import open_state
from adamerge.comparison import Ran
from adamerge.config import data_of, parse
from adamerge.data import HFDataset
from adamerge.data.class_names import class_names
from adamerge.exporting import export
from adamerge.files import digest
from adamerge.hub import card_data
from adamerge.patterns import Pattern
from adamerge.rescore import rescore
from tests.checkpoints_hf import Texts, write
from tests.test_reading import BOMBS, special_files

BROKEN = "is cut short or damaged"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two text classifiers, made of adamerge's own classes alone."""
    home = tmp_path_factory.mktemp("record")
    paths = write(home / "pool", "bert", "AutoModelForSequenceClassification")
    recipe = Recipe(str(paths["base"]), {task: str(paths[task]) for task in "ab"}, TextClassifier())
    data = UnlabeledTasks({task: Texts(task) for task in "ab"}, batch_size=2)
    trainer = {"max_steps": 1, "accelerator": "cpu", "enable_progress_bar": False}
    return adamerge.train(recipe, data, trainer=trainer, run={"root": str(home / "runs"), "baselines": False}).dir


@pytest.fixture
def merge(run, tmp_path):
    return shutil.copytree(run / "merge", tmp_path / "merge")


def put(merge, place, value):
    """Write the record with one value changed; `place` are the keys that lead there, None takes the value away."""
    record = yaml.safe_load((merge / "merge.yaml").read_text())
    *outer, last = place
    inner = record
    for key in outer:
        inner = inner[key]
    inner[last] = copy.deepcopy(value)
    (merge / "merge.yaml").write_text(yaml.safe_dump(record, sort_keys=False))


PLACES = {
    "weights": ([], "x", None, 3),
    "labels": ({}, [], {"task": 3, "group": []}, {"task": ["a", "a", "b"], "group": []}, {"task": ["a"], "group": []}),
    "labels.task": (None, {"a": 1}, [1, 2], ["a", None]),
    "sources": ({}, [], {"base": "x"}, {"base": {"source": "x"}}, None),
    "sources.base": (None, "x", [], {}),
    "sources.base.source": (3, None, ["x"], "", "a\0b", "a\nb"),
    "sources.expert a.sha256": (3, "x", None, "g" * 64),
    "sources.expert a.revision": (3, [], "\x1b[31m"),
    "backbone": ("x", {}, {"class_path": 3}, {"class_path": [1]}, {"class_path": "a..b"}, {"init_args": {}}),
    "backbone.init_args": ([1], "x", {1: 2}, {None: 1}, {"model": {"class_path": 3}}),
    "rule": (None, "adamerge.rules.TaskWise", [], {"class_path": "x y"}, {"class_path": "x" * 2000}),
    "rule.init_args": ([], 3, {"init": {2: 1}}),
    "transforms": (None, {}, "x", ["x"], [3], [{"class_path": None}]),
    "task_modules": (None, {}, [None], [{"class_path": "adamerge.task_modules.Surgery", "rank": 1}]),
    "space": ({"foo": 1}, [], {"group": 3}, {"skip": 3}, {"buffers": "x"}, {"vocabulary": None}),
    "vectors": ({"seed": "x"}, {"seed": -1.5}, {"dtype": "int8"}, {"placement": ["cpu"]}, {"x": 1}),
    "left_out": ([], {1: "x"}, {"x": 1}),
    "classes": ([], {}, {"a": "x"}, {"a": [None], "b": []}, {"a": [["x"]], "b": []}, {"a": []}, {1: []}),
    "widths": ({}, {"features": -1, "blocks": {}}, {"features": 1, "blocks": {"x": "y"}}),
    "scores": ([], {"x": 1}, {"x": {"a": "high"}}, {"x": {1: 0.5}}),
    "versions": ([], {"torch": 2}),
    "objectives": ("x", [3], [{"x": 1}]),
    "data": (3, [], {"init_args": {}}),
    "steps": ("x", -1, 1.5),
    "cost": ([], {"learnables": "x"}, {"seconds": "x"}),
    "split": (3, []),
    "phases": ("x", [3]),
}  # fmt: skip
CASES = [(place, value) for place, values in PLACES.items() for value in values]


@pytest.mark.parametrize(("place", "value"), CASES, ids=[f"{place}={value!r}"[:60] for place, value in CASES])
def test_a_part_of_another_type_is_refused_at_the_door(merge, place, value):
    put(merge, place.split("."), value)
    for use in (artifact.read_record, adamerge.load):
        with pytest.raises(InputError, match=rf"merge\.yaml (?:{BROKEN}|names a task)") as refused:
            use(merge)
        assert place.split(".")[0] in str(refused.value)
    assert runs.tell(merge.parent).state == "damaged"


def test_the_place_is_named(merge):
    put(merge, ["sources", "expert a", "sha256"], 3)
    with pytest.raises(InputError, match=r"`sources.expert a.sha256` is 3, and must be a sha256, 64 hex"):
        adamerge.load(merge)


HUGE_RANK = {"class_path": "adamerge.task_modules.Surgery", "init_args": {"rank": 10**9}}
OPTIONS = {
    "rule.init_args": [
        *({"init": value} for value in ("hello", [1], {"a": 0.1, "x": 1})),
        *({"activation": value} for value in ("hello", ["none"])),
        {"penalties": {"l1": "x"}},
        {"trainable": "yes please"},
        {"unknown": 1},
    ],
    "rule": [
        *({"class_path": path} for path in ("adamerge.data.HFDataset", "adamerge.rules.Nothing", "adamerge.rules")),
        {"class_path": "adamerge.rules.MergeRule"},
        {"class_path": "adamerge.rules.Concrete", "init_args": {"temperature": -1, "density": -5}},
        {"class_path": "adamerge.rules.Concrete", "init_args": {"inner": {"class_path": "adamerge.transforms.Trim"}}},
        {"class_path": "adamerge.rules.TaskWise"},
    ],
    "backbone": [
        {"class_path": "adamerge.rules.TaskWise"},
        {"class_path": "adamerge.backbones.Module", "init_args": {"build": 3}},
        {"class_path": "adamerge.backbones.Backbone"},
    ],
    "backbone.init_args": [
        {"max_length": {"a": 1}},
        *({"model": value} for value in ("/dev/zero", "~nobody/x", "x" * 5000, "\0", [1])),
        *({"blocks": value} for value in ("(", 3)),
        {"attention": "hello"},
    ],
    "transforms": [
        [{"class_path": "adamerge.transforms.Trim", "init_args": {"keep": value}}] for value in (-1, "x", [1])
    ],
    "task_modules": [
        [HUGE_RANK],
        [{"class_path": "adamerge.task_modules.Tint", "init_args": {"layer": ["head"]}}],
        [{"class_path": "adamerge.transforms.Trim"}],
    ],
    "space": [{"skip": "("}, {"group": "(a+)+$"}, {"skip": "((a{1000}){1000}){1000}"}],
    "left_out": [{"nowhere": "because"}],
    "classes": [{"a": ["x"], "b": ["y"]}],
    "labels": [{"task": ["a", "b"], "group": ["x"]}],
    "sources.base.source": ["x" * 3000, "~nobody/x", "/dev/zero", "local-dir:nowhere", "open_clip:x"],
}
OPTION_CASES = [(place, value) for place, values in OPTIONS.items() for value in values]


@pytest.mark.parametrize(("place", "value"), OPTION_CASES, ids=[f"{p}={v!r}"[:80] for p, v in OPTION_CASES])
def test_an_option_that_cannot_be_is_refused_in_time(merge, place, value):
    put(merge, place.split("."), value)
    start = time.process_time()
    with suppress(InputError):  # a few change nothing that counts, such as the names of classes
        adamerge.load(merge)
    with suppress(InputError):
        export(merge, merge.parent / "out")
    assert time.process_time() - start < 20


@pytest.mark.parametrize("name", [*BOMBS, "UTF-16", "bytes", "nothing"])
def test_a_record_that_is_a_bomb_or_no_text_is_refused(merge, name):
    record = (merge / "merge.yaml").read_text()
    raw = {"UTF-16": record.encode("utf-16"), "bytes": bytes(range(256)), "nothing": b""}.get(name)
    (merge / "merge.yaml").write_bytes(f"{record}\nbomb:\n".encode() + BOMBS[name].encode() if raw is None else raw)
    start = time.process_time()
    with pytest.raises(InputError, match=r"merge\.yaml"):
        adamerge.load(merge)
    assert time.process_time() - start < 10


@pytest.mark.parametrize("name", ["merge.yaml", "merge.safetensors"])
def test_no_pipe_or_device_stands_for_a_file_of_a_merge(merge, name, tmp_path):
    (tmp_path / "special").mkdir()
    for path in special_files(tmp_path / "special"):
        (merge / name).unlink()
        (merge / name).symlink_to(path)
        with pytest.raises(InputError, match="holds no saved merge"):
            adamerge.load(merge)


def test_no_pipe_or_device_stands_for_a_checkpoint(run, tmp_path):
    record = yaml.safe_load((run / "merge" / "merge.yaml").read_text())
    whole = record["sources"]["base"]["source"]
    (tmp_path / "special").mkdir()
    for path in special_files(tmp_path / "special"):
        for name in ("a.safetensors", "a.pt", "model.safetensors", "model-00001-of-00001.safetensors", "config.json"):
            home = tmp_path / "home"
            shutil.copytree(whole, home)
            (home / name).unlink(missing_ok=True)
            (home / name).symlink_to(path)
            if path.name != "folder":
                with pytest.raises(InputError, match="not a file"):
                    open_state(home)
            if name.startswith("a."):
                with pytest.raises(InputError, match=r"not a file|holds 0|holds no"):
                    open_state(home / name)
            shutil.rmtree(home)
        with pytest.raises(InputError, match="not a file"):
            digest(path)


def test_readers_of_a_run_s_other_files_are_not_held_up(run, tmp_path):
    home = shutil.copytree(run, tmp_path / "run")
    for name in ("config.yaml", "metrics.csv"):
        (home / name).unlink(missing_ok=True)
        os.mkfifo(home / name)
    with pytest.raises(InputError, match="not a file"):
        data_of(home / "config.yaml")
    with pytest.raises(InputError, match="not a file"):
        rescore(home)
    assert runs._logged_steps(home) is None
    os.mkfifo(tmp_path / "README.md")
    assert card_data(str(tmp_path)) == {}
    (tmp_path / "README.md").unlink()
    (tmp_path / "README.md").write_text(f"---\nlicense: mit\nx: {BOMBS['5,000 [']}\n---\n")
    assert card_data(str(tmp_path)) == {}


def test_no_pipe_or_endless_file_stands_for_a_file_of_the_data(tmp_path):
    os.mkfifo(tmp_path / "dataset_dict.json")
    with pytest.raises(InputError, match="not a file"):
        HFDataset(str(tmp_path)).classes  # noqa: B018
    with (tmp_path / "names.txt").open("wb") as file:
        file.truncate(10**12)  # takes no room on the disk
    with pytest.raises(InputError, match="larger than 16 MiB"):
        class_names(str(tmp_path / "names.txt"))


@pytest.mark.parametrize("text", [BOMBS["5,000 ["], '{"dir": 1, "x": 2}', "[]", "3", '{"dir": "\\ud800"}'])
def test_a_done_marker_that_is_none_is_passed_over(text, tmp_path):
    planned = attempts.Planned(attempts.Candidate("x", "x", (), tmp_path), 0)
    planned.marker.write_text(text)
    assert planned.done() is None or isinstance(planned.done(), Ran)


@pytest.mark.parametrize("name", ["aliases", "self-reference", "5,000 [", "merge keys"])
def test_a_configuration_that_is_a_bomb_is_refused(name, tmp_path):
    (tmp_path / "mine.yaml").write_text(f"x:\n{BOMBS[name]}" if "\n" not in BOMBS[name] else BOMBS[name])
    with pytest.raises(InputError, match=r"mine\.yaml"):
        parse(tmp_path / "mine.yaml", {})


def rewritten(merge, change):
    """The merge with other learnables, and the digest of their file in the record."""
    file = merge / "merge.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    put(merge, ["weights"], digest(file))


NAME = "rule.raw_TG"
LEARNABLES = {
    "NaN": (lambda t: t[NAME].view(-1)[0].fill_(torch.nan), "holds NaN or Inf"),
    "Inf": (lambda t: t[NAME].view(-1)[-1].fill_(-torch.inf), "holds NaN or Inf"),
    "whole numbers": (lambda t: t.update({NAME: t[NAME].long()}), "is of the type int64"),
    "truth values": (lambda t: t.update({NAME: t[NAME] > 0}), "is of the type bool"),
    "complex": (lambda t: t.update({NAME: t[NAME].to(torch.complex64)}), "is of the type complex64"),
    "fewer axes": (lambda t: t.update({NAME: t[NAME][0].clone()}), "has the shape"),
    "no axes": (lambda t: t.update({NAME: torch.zeros(())}), "has the shape"),
    "fewer groups": (lambda t: t.update({NAME: t[NAME][:, :-1].clone()}), "has the shape"),
    "empty": (lambda t: t.update({NAME: torch.zeros(0, 0)}), "has the shape"),
    "another name": (lambda t: t.update({"x": t.pop(NAME)}), "does not hold this merge's learnables"),
    "one more": (lambda t: t.update({"x": torch.zeros(2)}), "does not hold this merge's learnables"),
}


@pytest.mark.parametrize("name", LEARNABLES)
def test_learnables_that_no_run_saves_are_refused(merge, name):
    change, message = LEARNABLES[name]
    rewritten(merge, change)
    with pytest.raises(InputError, match=message):
        adamerge.load(merge)


def test_learnables_in_16_bits_are_loaded(merge):
    rewritten(merge, lambda tensors: tensors.update({NAME: tensors[NAME].bfloat16()}))
    adamerge.load(merge)


@pytest.mark.parametrize("text", ["class names | of\n# a table", "](javascript:x)", "<script>", "\\", "&lt;"])
def test_no_text_of_a_record_is_markup_in_a_card(merge, text):
    _, record = artifact.read_record(merge)
    entry = record["sources"]["base"]
    record = {**record, "versions": {text: text}, "split": text, "init_from": text, "left_out": {text: text}}
    card = model_card(record, name="m", licences={"base": text, "expert a": text, "expert b": text})
    assert entry["source"] not in card
    body = re.sub("`[^`\n]*`", "", card.split("\n---\n", 1)[1])  # what is code is no markup
    for wrong in ("\n# a table", "](javascript", "<script>", "&lt;"):
        assert wrong not in body.replace("\\" + wrong[0], "")


HUGE = {
    "a layer": lambda: nn.Linear(10**6, 10**6),
    "many layers": lambda: [nn.Linear(100, 100) for _ in range(10**6)],
    "many modules": lambda: nn.ModuleList(nn.Identity() for _ in range(10**7)),
    "zeros": lambda: torch.zeros(10**12),
    "drawn": lambda: torch.randn(10**12),
    "a range": lambda: torch.arange(10**12),
    "a square": lambda: torch.eye(10**5),
    "repeated": lambda: torch.zeros(3).repeat(10**10),
    "a row repeated": lambda: torch.zeros(10**5).repeat(100, 1),
    "an outer product": lambda: torch.einsum("i,j->ij", torch.arange(10**5).float(), torch.ones(10**5)),
    "a product": lambda: torch.ones(10**5, 1) @ torch.ones(1, 10**5),
    "differences": lambda: torch.arange(10**5)[:, None] - torch.arange(10**5)[None, :],
    "a view written out": lambda: torch.ones(1).expand(10**12).contiguous(),
}


@pytest.mark.parametrize("name", HUGE)
def test_what_does_not_fit_a_budget_is_refused_before_it_is_made(name):
    with pytest.raises(InputError, match="is asked for"), budget(10**6, modules=10_000):
        HUGE[name]()


def test_a_budget_lets_pass_what_fits_and_ends_with_its_block():
    with budget(10**6):
        assert nn.Linear(10, 10)(torch.ones(2, 10)).shape == (2, 10)
    assert torch.zeros(10**6 + 1).numel() > 10**6


COUNTS = [{"num_hidden_layers": 10**5}, {"num_hidden_layers": 10**9}, {"num_labels": 10**9, "id2label": None}]


@pytest.mark.parametrize(
    "counts", COUNTS, ids=[" ".join(counts) + f" {max(map(str, counts.values()))}" for counts in COUNTS]
)
def test_a_model_s_configuration_takes_bounded_time(run, counts, tmp_path):
    record = yaml.safe_load((run / "merge" / "merge.yaml").read_text())
    for who, entry in record["sources"].items():
        home = shutil.copytree(entry["source"], tmp_path / who)
        told = json.loads((home / "config.json").read_text())
        (home / "config.json").write_text(json.dumps({**told, **counts}))
        entry["source"] = str(home)
    record["backbone"]["init_args"]["model"] = record["sources"]["base"]["source"]
    merge = shutil.copytree(run / "merge", tmp_path / "merge")
    (merge / "merge.yaml").write_text(yaml.safe_dump(record, sort_keys=False))
    start = time.process_time()
    with pytest.raises(InputError, match=r"modules is asked for|no model has more than"):
        adamerge.load(merge)
    assert time.process_time() - start < 20


@pytest.mark.parametrize("pattern", ["^(([a-z.])+.)+[A-Z]([a-z])+$", "(x+x+)+y", "(a|a)*$", "(.*)*!", ".*.*.*.*.*.*!"])
def test_a_pattern_takes_bounded_time(pattern, monkeypatch):
    monkeypatch.setattr("adamerge.patterns.SECONDS", 0.5)
    start = time.process_time()
    searched = Pattern(pattern, "space.skip")
    for name in ("x" * 60, "a" * 500, "blocks.11.attn.in_proj_weight" * 10):
        with suppress(InputError):
            searched.search(name)
    assert time.process_time() - start < 5


@pytest.mark.parametrize("pattern", ["(", "(?R)", "a{1000}{1000}", "((a{999}){999}){999}", "(" * 5000])
def test_what_is_no_pattern_of_pythons_is_refused(pattern):
    with pytest.raises(InputError, match=r"`space\.skip` is"):
        Pattern(pattern, "space.skip")


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        *(("a{x}", "a{x}"), ("a{e<=2}", "a{e<=2}"), (r"a\{3\}", "a{3}"), ("[{]{2}", "{{"), ("[^]]{3}", "abc")),
        ("[0-9a-f]{64}.{0,200}", "0" * 64),
        ("|".join(f"model.layers.{layer}.mlp.weight" for layer in range(2000)), "model.layers.1999.mlp.weight"),
    ],
    ids=range(7),
)
def test_a_pattern_of_pythons_means_what_it_means_there(pattern, name):
    assert re.search(pattern, name)
    assert Pattern(pattern, "space.skip").search(name)
