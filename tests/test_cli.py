"""The console script: its commands on finished runs, mostly in this process."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

import adamerge
from adamerge import artifact, runs
from adamerge.cli import main
from adamerge.types import InputError
from tests.clips import write_clips
from tests.tiny import CLASSES, TASKS, data_of
from tests.tiny import Tiny as TinyTask

ROOT = Path(__file__).parent.parent


class Renamed(TinyTask):
    """The tiny task with its classes in another order, or fewer of them."""

    def __init__(self, task: str, *, fewer: bool = False) -> None:
        super().__init__(task)
        self._classes = self._classes[:-1] if fewer else self._classes[::-1]


@pytest.fixture
def adamerge_command(monkeypatch, capsys):
    """Runs the console script in this process, which spares the imports; returns status, output and errors."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["adamerge", *map(str, arguments)])
        try:
            status = main()
        except SystemExit as leave:
            status = leave.code
        return status, *capsys.readouterr()

    return call


@pytest.fixture
def run(config):
    """A finished run with baselines."""
    return adamerge.train(config(run={"baselines": True}))


def edit_config(run, change):
    path = run.dir / "config.yaml"
    read = yaml.safe_load(path.read_text())
    change(read)
    path.write_text(yaml.safe_dump(read))


def rows(text):
    """The table's rows by their first cell."""
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    return {first: others for first, *others in cells}


# --- help and errors


def test_alone_it_prints_help(adamerge_command):
    status, out, err = adamerge_command()
    assert (status, err) == (0, "")
    assert out == adamerge_command("--help")[1]
    for name in ("fit", "compare", "evaluate", "export", "runs", "report"):
        assert re.search(rf"^    {name} +[A-Z]", out, re.M)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("fit", ["usage: adamerge fit", "--config", "--model.rule", "--trainer.max_steps"]),
        ("compare", ["recipes", "--config", "--seeds", "--root", "--jobs", "--set KEY=VALUE", "trainer.max_steps=10"]),
        ("evaluate", ["run", "--split", "--batch_size", "--device", "--trust"]),
        ("export", ["run", "out", "--dtype {float32,bfloat16,float16}", "--device", "--trust"]),
        ("runs", ["root", "--sort {time,score}"]),
        ("report", ["run", "--trust"]),
    ],
)
def test_each_command_has_help(adamerge_command, name, words):
    status, out, _ = adamerge_command(name, "--help")
    assert status == 0
    for word in words:
        assert word in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["marge"], "invalid choice: 'marge'"),
        (["compare"], "arguments are required"),
        (["compare", "nowhere.yaml"], "There is no configuration 'nowhere.yaml'"),
        (["compare", "nowhere.yaml", "--seeds", "two"], "two"),
        (["evaluate"], "arguments are required"),
        (["evaluate", "nowhere"], "'nowhere' holds no saved merge"),
        (["evaluate", "nowhere", "--device", "tpu"], "tpu"),
        (["export", "nowhere", "nowhere-either"], "'nowhere' holds no saved merge"),
        (["runs", "nowhere"], "There is no folder 'nowhere'"),
        (["report", "nowhere"], "'nowhere' holds no saved merge"),
        (["fit", "--trainer.max_steps", "many"], "max_steps"),
        (["fit"], "--config FILE"),
    ],
)
def test_errors_are_one_paragraph(adamerge_command, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    status, out, err = adamerge_command(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("adamerge: ")
    assert message in err
    assert "usage:" not in err
    assert err.count("\n") == 1
    assert list(tmp_path.glob("nowhere*")) == []


# --- fit


def test_fit_says_the_plan_first_and_the_table_last(adamerge_command, config, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(config(trainer={"max_steps": 40, "log_every_n_steps": 1})))
    status, out, err = adamerge_command("fit", "--config", path, "--model.rule.init_args.init", "0.2")
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("Tasks:")
    assert lines[-1].startswith("Run directory:")
    assert len(lines) < 20  # nothing for each step
    assert list((tmp_path / "runs" / "mine").iterdir())


@pytest.mark.slow
def test_two_processes_of_the_console_script(config, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(config()))
    several = ["--trainer.strategy", "ddp", "--trainer.devices", "2", "--data.batch_size", "2"]
    script = [sys.executable, Path(sys.executable).parent / "adamerge"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*script, "fit", "--config", path, *several], capture_output=True, text=True, env=environment, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Tasks:") == done.stdout.count("Run directory:") == 1
    assert "2 ranks" in done.stdout
    assert "GPU available" not in done.stdout + done.stderr  # Lightning's chatter
    (folder,) = (tmp_path / "runs" / "mine").iterdir()
    straight = adamerge.train(config(trainer={"max_steps": 4}))
    found = artifact.open_merge(folder, trust=True).rule.raw_TG
    torch.testing.assert_close(found, straight.learned.rule.raw_TG, rtol=1e-4, atol=1e-6)


# --- evaluate


def test_the_runs_own_numbers_come_out_again(adamerge_command, run):
    status, out, err = adamerge_command("evaluate", run.dir, "--device", "cpu", "--trust")
    assert (status, err) == (0, "")
    assert "Accuracy in % on 'test'" in out
    told = str(run).splitlines()
    assert rows(out) == rows(str(run))
    assert out.splitlines()[-1] == told[-2]  # the gain
    assert adamerge_command("evaluate", run.dir / "merge", "--batch_size", 3, "--trust")[1] == out


def test_another_split_is_shown_without_the_baselines(adamerge_command, run):
    status, out, _ = adamerge_command("evaluate", run.dir, "--split", "train", "--trust")
    assert status == 0
    assert list(rows(out)) == ["this merge"]
    assert "baselines were scored on 'test', and are left out" in out
    loaders = data_of(eval_split="train").eval_loaders()
    scores = adamerge.evaluation.evaluate(run.merge, loaders, CLASSES, torch.device("cpu"))
    assert rows(out)["this merge"][:3] == [f"{100 * scores[task]:.1f}" for task in TASKS]


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_the_runs_precision_is_kept(adamerge_command, config, precision):
    run = adamerge.train(config(trainer={"precision": precision}))
    _, out, _ = adamerge_command("evaluate", run.dir, "--trust")
    assert rows(out) == rows(str(run))


def test_evaluate_finds_data_with_relative_paths_from_anywhere(tmp_path, monkeypatch, adamerge_command):
    monkeypatch.chdir(tmp_path)
    write_clips(tmp_path / "clips")
    for kind in ("cat", "dog"):
        folder = tmp_path / "images" / "test" / kind
        folder.mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (20, 20), (60 * number, 0, 90 * (kind == "dog"))).save(folder / f"{number}.png")
    config = {
        "model": {"base": "clips/base", "experts": {"a": "clips/a"},
                  "backbone": {"class_path": "adamerge.backbones.OpenCLIP", "init_args": {"model": "clips/base"}}},
        "data": {"tasks": {"a": {"class_path": "adamerge.data.ImageFolder", "init_args": {"root": "images"}}},
                 "split": "test", "batch_size": 2},
        "trainer": {"max_steps": 2},
    }  # fmt: skip
    run = adamerge.train(config, **{"run.root": str(tmp_path / "runs"), "run.baselines": False})
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    status, out, err = adamerge_command("evaluate", run.dir)
    assert status == 0, err
    assert f"{100 * run.scores['this merge']['a']:.1f}" in out


@pytest.mark.parametrize("fewer", [False, True])
def test_other_classes_are_refused(adamerge_command, run, fewer):
    def rename(read):
        init = {"task": "b", "fewer": fewer}
        read["data"]["tasks"]["b"] = {"class_path": "tests.test_cli.Renamed", "init_args": init}

    edit_config(run, rename)
    status, _, err = adamerge_command("evaluate", run.dir, "--trust")
    assert status == 2
    assert "The classes of task 'b' are not those that the merge's head was made for" in err


def test_other_tasks_are_refused(adamerge_command, run):
    edit_config(run, lambda read: read["data"]["tasks"].update(d=read["data"]["tasks"].pop("b")))
    assert "The data have the tasks a, c, d; the merge a, b, c." in adamerge_command("evaluate", run.dir, "--trust")[2]


def test_foreign_data_are_not_imported_without_trust(adamerge_command, run, tmp_path, monkeypatch):
    (tmp_path / "evil.py").write_text("import pathlib; pathlib.Path(__file__).with_name('ran').touch()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    edit_config(run, lambda read: read["data"]["tasks"].update(a={"class_path": "evil.Data"}))
    status, _, err = adamerge_command("evaluate", run.dir)
    assert status == 2
    assert "'evil.Data', which is not part of adamerge; pass trust=True (in a command: --trust)" in err
    assert not (tmp_path / "ran").exists()


def test_data_made_of_objects_cannot_be_made_again(adamerge_command, config, tmp_path):
    plain = config()["model"]
    backbone = adamerge.backbones.Module(adamerge.recorded._resolve("tests.tiny.Net", trust=True))
    space = adamerge.recipe.SpaceOptions(**plain["space"])
    recipe = adamerge.Recipe(plain["base"], plain["experts"], backbone, space=space)

    class Local(TinyTask):
        """A class that no text can name."""

    data = adamerge.UnlabeledTasks({task: Local(task) for task in TASKS}, batch_size=4)
    options = {"max_steps": 1, "accelerator": "cpu", "devices": 1}
    run = adamerge.train(recipe, data, trainer=options, run=adamerge.RunOptions(dir=str(tmp_path / "run")))
    status, _, err = adamerge_command("evaluate", run.dir, "--trust")
    assert status == 2
    assert "made from Python objects, which have no text form" in err
    assert "adamerge.load" in err


def test_a_run_without_evaluation_wants_a_split(adamerge_command, config):
    run = adamerge.train(config(data={"eval_split": None}))
    assert "name one that has labels with --split" in adamerge_command("evaluate", run.dir, "--trust")[2]
    status, out, _ = adamerge_command("evaluate", run.dir, "--trust", "--split", "test")
    assert status == 0
    assert "this merge" in rows(out)


# --- runs


def test_all_runs_in_one_table(adamerge_command, run, config, tmp_path):
    root = run.dir.parent.parent
    other = adamerge.train(config(data={"eval_split": None}, run={"name": "other"}, trainer={"max_steps": 2}))
    (root / "half" / "one").mkdir(parents=True)
    (root / "half" / "one" / "config.yaml").write_text("model:")
    shutil.copytree(run.dir, root / "broken")
    (root / "broken" / "merge" / "merge.yaml").write_text("format: 1\nweights: [")
    shutil.copytree(run.dir, root / "stopped")
    record = yaml.safe_load((root / "stopped" / "merge" / "merge.yaml").read_text())
    record["scores"].pop("this merge")
    (root / "stopped" / "merge" / "merge.yaml").write_text(yaml.safe_dump({**record, "finished": False, "steps": 3}))
    (root / "notes").mkdir()
    status, out, err = adamerge_command("runs", root)
    assert (status, err) == (0, "")
    table = rows(out)
    mine = table[str(run.dir.relative_to(root))]
    scores = [run.scores["this merge"][task] for task in TASKS]
    assert mine[:4] == ["LayerWise / Entropy", "3", "4", f"{100 * sum(scores) / 3:.1f}"]
    assert re.fullmatch(r"[+-]\d+\.\d \((base|average|task arithmetic|TIES)\)", mine[4])
    assert mine[5] == "finished"
    assert table[str(other.dir.relative_to(root))] == ["LayerWise / Entropy", "3", "2", "–", "–", "finished"]
    assert table["half/one"] == ["–", "–", "–", "–", "–", "no merge yet: running or killed"]
    assert table["broken"][5] == "damaged"
    assert table["stopped"][2:] == ["3", "–", "–", "stopped early"]
    assert len(table) == 5
    assert len({len(line) for line in out.splitlines()[2:]}) == 1  # no row is broken into two


def test_the_newest_or_the_best_run_comes_first(run, tmp_path):
    root = run.dir.parent.parent
    for name, age, score in (("old", 100, 0.9), ("new", 1, 0.1)):
        shutil.copytree(run.dir, root / name)
        path = root / name / "merge" / "merge.yaml"
        record = yaml.safe_load(path.read_text())
        record["scores"]["this merge"] = dict.fromkeys(TASKS, score)
        path.write_text(yaml.safe_dump(record))
        made = (run.dir / "config.yaml").stat().st_mtime - age
        os.utime(root / name / "config.yaml", (made, made))
    first = str(run.dir.relative_to(root))
    assert list(rows(runs.listing(root))) == [first, "new", "old"]
    assert next(iter(rows(runs.listing(root, sort="score")))) == "old"
    assert list(rows(runs.listing(root, sort="score")))[-1] == "new"


def test_an_empty_root_gets_one_sentence(adamerge_command, tmp_path):
    (tmp_path / "empty" / "folder").mkdir(parents=True)
    status, out, _ = adamerge_command("runs", tmp_path / "empty")
    assert status == 0
    assert re.fullmatch(r"There are no runs in .*empty yet\.\n", out)


@pytest.mark.parametrize(
    "text", ["", "[]", "format: 1", "format: 1\nweights: x\nlabels: {}", "scores: {a: b}", "\x00", "a: !!python/none x"]
)
def test_no_damage_breaks_the_listing(run, text):
    (run.dir / "merge" / "merge.yaml").write_text(text)
    (run.dir / "metrics.csv").write_text("step,train/loss\nx,y\n")
    assert rows(runs.listing(run.dir))["."][5] == "damaged"


@pytest.mark.parametrize(
    "change", [{"rule": {}}, {"scores": [1]}, {"scores": {"this merge": {"a": "x"}}}, {"steps": "x"}]
)
def test_a_record_edited_by_hand_is_damaged(run, change):
    path = run.dir / "merge" / "merge.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **change}))
    assert runs.tell(run.dir).state == "damaged"


def test_a_run_that_fails_is_told_as_stopped_with_its_step(config, tmp_path, monkeypatch):
    steps = []
    monkeypatch.setattr(
        "adamerge.finite.FiniteWatch.raise_if_marked", lambda self: steps.append(1) if len(steps) < 2 else 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        adamerge.train(config(trainer={"max_steps": 9, "log_every_n_steps": 1}, run={"dir": str(tmp_path / "run")}))
    told = runs.tell(tmp_path / "run")
    assert (told.state, told.steps) == ("stopped early", 3)


# --- report


def test_a_report_draws_again_without_data(adamerge_command, run, monkeypatch):
    shutil.rmtree(run.dir / "plots")
    edit_config(run, lambda read: read.pop("data"))
    status, out, err = adamerge_command("report", run.dir, "--trust")
    assert (status, err) == (0, "")
    assert rows(out) == rows(str(run))
    names = {"coefficients.png", "accuracy.png", "curves.png", "cosine.png"}
    assert {path.name for path in (run.dir / "plots").iterdir()} >= names - {"curves.png"}
    assert "accuracy.png" in out


def test_a_report_without_the_sources_draws_the_rest(adamerge_command, run, pool):
    pool["base"].unlink()
    shutil.rmtree(run.dir / "plots")
    status, out, _ = adamerge_command("report", run.dir, "--trust")
    assert status == 0
    assert "Coefficients and task vectors are not drawn again: There is no checkpoint at" in out
    assert "accuracy.png" in {path.name for path in (run.dir / "plots").iterdir()}


def test_a_report_of_an_unscored_run(adamerge_command, config):
    run = adamerge.train(config(data={"eval_split": None}))
    assert "Nothing was scored." in adamerge_command("report", run.dir, "--trust")[1]


def test_a_bad_batch_size_is_named(run):
    from adamerge.rescore import rescore

    with pytest.raises(InputError, match="`--batch_size` is 0"):
        rescore(run.dir, batch_size=0, trust=True)
