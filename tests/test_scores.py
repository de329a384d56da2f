"""The baselines' scores are found again by later runs on the same sources and samples, and by no others."""

import json
import logging
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

import adamerge
from adamerge import evaluation, scores, training
from adamerge.backbones import Module, OpenCLIP, TextClassifier
from adamerge.data import HFDataset, TensorTask
from adamerge.objectives import Entropy
from adamerge.recipe import SpaceOptions, VectorOptions
from adamerge.rules import LayerWise, TaskWise
from tests import checkpoints_hf
from tests.clips import CLASSES, write_clip, write_clips

QUIET = {"max_steps": 1, "logger": False, "enable_progress_bar": False, "val_check_interval": None}
SAID = "The baselines' scores are those of an earlier run"


def samples(name, seed=0, number=12):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(number, 3, 16, 16, generator=generator)
    return pixels, torch.arange(number) % len(CLASSES[name])


def tasks_of(number=12, seed=1):
    return {name: TensorTask(CLASSES[name], train=samples(name), test=samples(name, seed, number)) for name in CLASSES}


@pytest.fixture
def scored(tmp_path, monkeypatch, caplog):
    """A function that makes a run and says its scores, how many merges were scored, and whether it found others'."""
    monkeypatch.setenv("ADAMERGE_CACHE", str(tmp_path / "cache"))
    folders = write_clips(tmp_path / "clips")
    caplog.set_level(logging.INFO, logger="adamerge")

    def run(*, tasks=None, data=(), trainer=(), rule=LayerWise, templates=("a photo of a {}.",), **recipe):
        calls, original = [], evaluation.evaluate
        monkeypatch.setattr(training, "evaluate", lambda *given: (calls.append(1), original(*given))[1])
        caplog.clear()
        made = adamerge.Recipe(
            base=str(folders["base"]),
            experts={name: str(folders[name]) for name in CLASSES},
            backbone=OpenCLIP(str(folders["base"]), input="input", templates=templates),
            rule=rule,
            objectives=[Entropy()],
            **recipe,
        )
        given = adamerge.UnlabeledTasks(tasks or tasks_of(), batch_size=4, **dict(data))
        options = {"root": str(tmp_path / "runs"), "baselines": True}
        done = adamerge.train(made, given, trainer={**QUIET, **dict(trainer)}, run=options)
        monkeypatch.setattr(training, "evaluate", original)
        return {n: s for n, s in done.scores.items() if n != "this merge"}, len(calls) - 1, SAID in caplog.text

    run.folders = folders
    return run


def test_a_later_run_finds_them_whatever_it_learns(scored):
    first, merges, found = scored()
    assert merges == 4 + len(CLASSES)
    assert not found
    assert set(first) == {"base", "average", "task arithmetic", "TIES", *(f"expert {name}" for name in CLASSES)}
    assert scored() == (first, 0, True)
    assert scored(rule=partial(TaskWise, init=0.1), trainer={"max_steps": 2}) == (first, 0, True)
    assert scored(space=SpaceOptions(group="block")) == (first, 0, True)


@pytest.mark.slow_unless("other samples", "fewer tensors")
@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"tasks": tasks_of(seed=2)}, id="other samples"),
        pytest.param({"tasks": tasks_of(number=6)}, id="fewer samples"),
        pytest.param({"data": {"eval_batch_size": 3}, "trainer": {"limit_val_batches": 2}}, id="fewer batches"),
        pytest.param({"data": {"eval_split": "train"}}, id="another split"),
        pytest.param({"trainer": {"precision": "bf16-mixed"}}, id="another precision"),
        pytest.param({"templates": ("{} in a box.",)}, id="other heads"),
        pytest.param({"space": SpaceOptions(skip=".*ln_post.*")}, id="fewer tensors"),
        pytest.param({"vectors": VectorOptions(dtype="bfloat16")}, id="narrower vectors"),
    ],
)
def test_whatever_they_depend_on_has_them_made_again(scored, change):
    scored()
    assert scored(**change)[1:] == (4 + len(CLASSES), False)
    assert scored(**change)[1:] == (0, True)
    assert scored()[1:] == (0, True)


def test_another_expert_under_the_same_name_is_scored(scored):
    first, *_ = scored()
    for file in scored.folders["a"].iterdir():
        file.unlink()
    scored.folders["a"].rmdir()
    write_clip(scored.folders["a"], seed=9, near=load_file(scored.folders["base"] / "open_clip_model.safetensors"))
    second, merges, found = scored()
    assert (merges, found) == (4 + len(CLASSES), False)
    assert set(second) == set(first)


def test_another_preprocessing_scores_anew(scored):
    first = scored()
    edit({"base": scored.folders["base"]}, "open_clip_config.json", squash)
    assert first[1:] == scored()[1:] == (4 + len(CLASSES), False)


def squash(known):
    known["preprocess_cfg"]["resize_mode"] = "squash"


def test_other_code_scores_anew(scored, monkeypatch):
    scored()
    assert scores._code() == scores._code.__wrapped__()
    monkeypatch.setattr(scores, "_code", lambda: "changed")
    assert scored()[1:] == (4 + len(CLASSES), False)


@pytest.mark.parametrize("damaged", ["{", "{}", '{"base": {}}', "[]"])
def test_what_was_damaged_is_made_again(scored, tmp_path, damaged):
    first, *_ = scored()
    (file,) = (tmp_path / "cache" / "scores").iterdir()
    file.write_text(damaged)
    assert scored() == (first, 4 + len(CLASSES), False)
    assert scored()[1:] == (0, True)


def test_code_of_ones_own_may_change_under_its_name(tmp_path, monkeypatch, config):
    monkeypatch.setenv("ADAMERGE_CACHE", str(tmp_path / "cache"))
    run = adamerge.train(config(run={"baselines": True}))
    assert isinstance(run.learned.backbone, Module)
    assert "average" in run.scores
    assert not (tmp_path / "cache" / "scores").exists()


@pytest.fixture
def texts(tmp_path, monkeypatch):
    """A function that makes a run over tiny BERTs and says how many merges it has scored; its `paths` may change."""
    monkeypatch.setenv("ADAMERGE_CACHE", str(tmp_path / "cache"))
    paths = checkpoints_hf.write(tmp_path / "berts", "bert", "AutoModelForSequenceClassification")
    tasks = {}
    for task, names in checkpoints_hf.CLASSES.items():
        file = tmp_path / f"{task}.jsonl"
        rows = [{"text": " ".join(checkpoints_hf.WORDS[n % 5 : n % 5 + 3]), "label": n % len(names)} for n in range(12)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        tasks[task] = HFDataset({"train": str(file), "test": str(file)}, classes=names)

    def run(seed=0, skip=None, **options):
        calls, original = [], evaluation.evaluate
        monkeypatch.setattr(training, "evaluate", lambda *given: (calls.append(1), original(*given))[1])
        experts = {task: str(paths[task]) for task in tasks}
        recipe = adamerge.Recipe(
            str(paths["base"]),
            experts,
            TextClassifier(**options),
            space=SpaceOptions(skip=skip),
            objectives=[Entropy()],
        )
        data = adamerge.UnlabeledTasks(tasks, batch_size=4)
        made = {"root": str(tmp_path / "runs"), "baselines": True}
        adamerge.train(recipe, data, trainer=QUIET, run=made, seed_everything=seed)
        monkeypatch.setattr(training, "evaluate", original)
        return len(calls) - 1

    run.paths = paths
    return run


def edit(paths, file, change):
    for folder in paths.values():
        known = json.loads((folder / file).read_text())
        change(known)
        (folder / file).write_text(json.dumps(known))


def test_another_architecture_or_tokenizer_under_the_same_weights_scores_anew(texts):
    assert (texts(), texts(seed=3)) == (6, 0)
    edit(texts.paths, "config.json", lambda known: known.update(num_attention_heads=8, hidden_act="relu"))
    assert (texts(), texts()) == (6, 0)

    def exchange(known):
        words = known["model"]["vocab"]
        words["pig"], words["owl"] = words["owl"], words["pig"]  # in no sample

    edit(texts.paths, "tokenizer.json", exchange)
    assert (texts(), texts()) == (6, 0)


def test_remote_code_may_change_under_its_name(texts):
    assert (texts(remote_code=True), texts(remote_code=True)) == (6, 6)


def test_tensors_that_nobody_gives_are_the_seeds(texts):
    for folder in texts.paths.values():
        file = folder / "model.safetensors"
        kept = {name: tensor for name, tensor in load_file(file).items() if "layer.0.intermediate" not in name}
        save_file(kept, file, {"format": "pt"})
    skip = {"skip": r".*layer\.0\.intermediate.*"}
    assert (texts(**skip), texts(**skip), texts(seed=7, **skip)) == (6, 0, 6)


def test_samples_whose_fingerprint_is_no_text_are_not_known(scored, monkeypatch):
    monkeypatch.setattr("adamerge.data.base._Tensors.fingerprint", b"abc")
    assert scored()[1:] == scored()[1:] == (4 + len(CLASSES), False)
