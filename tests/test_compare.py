"""Recipes compared: a few real processes, and stand-ins for them where only the book-keeping is in question."""

import csv
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean, stdev

import pytest
import yaml
from safetensors.torch import save_file

from adamerge import artifact, attempts
from adamerge.artifact import read_record
from adamerge.cli import command_parser
from adamerge.comparing import _candidates, _common_tasks, _job, compare
from adamerge.comparison import EXPERTS, Comparison, Ran, Row
from adamerge.files import digest
from adamerge.types import InputError
from tests.tiny import TASKS

ROOT = Path(__file__).parent.parent
BASELINES = ["base", "average", "task arithmetic", "TIES", EXPERTS]


@pytest.fixture
def files(config, tmp_path, monkeypatch):
    """What all stand on and two recipes, in the working directory; processes find the tests' classes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    Path("pool.yaml").write_text(yaml.safe_dump(config()))
    for name in ("LayerWise", "TaskWise"):
        Path(f"{name}.yaml").write_text(yaml.safe_dump({"model": {"rule": {"class_path": f"adamerge.rules.{name}"}}}))
    return ["LayerWise.yaml", "TaskWise.yaml"]


def read(folder="runs/compare"):
    """The table on disk by method."""
    with Path(folder, "compare.csv").open(newline="") as file:
        return {row["method"]: row for row in csv.DictReader(file)}


def page(folder="runs/compare"):
    """The page on disk: the head, the other lines by method, and the text below."""
    lines = Path(folder, "compare.md").read_text().splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return table[0], {first: others for first, *others in table[2:]}, lines[-1]


# --- real processes


@pytest.mark.slow
def test_the_table_holds_the_runs_numbers_and_only_what_is_missing_runs(files, tmp_path):
    """Four processes: two recipes with two seeds, of which one fails first and is made up for later."""
    killed = tmp_path / "mine.py"
    killed.write_text(  # in the working directory, as a user's would be; one run with it fails
        "import os, pathlib\nfrom adamerge.rules import TaskWise\n\n\nclass Once(TaskWise):\n"
        "    def begin(self):\n        if not pathlib.Path('mended').exists() and '--seed_everything=1' in "
        "' '.join(__import__('sys').argv):\n            raise RuntimeError('not\\nmended yet')\n"
        "        return super().begin()\n"
    )
    Path("TaskWise.yaml").write_text(yaml.safe_dump({"model": {"rule": {"class_path": "mine.Once"}}}))
    arguments = {"on": ["pool.yaml"], "seeds": [0, 1], "options": ["trainer.max_steps=3"], "jobs": 2}
    with pytest.raises(InputError, match=r"1 of 4 runs failed; .*\n  - TaskWise, seed 1: .*mended yet.*seed-1\.log$"):
        compare(files, **arguments)
    assert list(read()) == [*BASELINES, "LayerWise", "TaskWise"]
    assert [read()[name]["seeds"] for name in ("LayerWise", "TaskWise")] == ["2", "1"]
    assert "TaskWise (1 of 2 seeds)" in page()[1]
    before = sorted(Path("runs/compare").rglob("merge.safetensors"))
    assert len(before) == 3 + 1  # the failed run's is of its last good step

    Path("mended").touch()
    comparison = compare(files, **arguments)
    (again,) = set(Path("runs/compare").rglob("merge.safetensors")) - set(before)
    assert again.parent.parent.name == "seed-1-2"
    runs = {folder.name: folder for folder in Path("runs/compare").iterdir() if folder.is_dir()}
    for name in ("LayerWise", "TaskWise"):
        (home,) = (folder for key, folder in runs.items() if key.startswith(f"{name}-"))
        assert re.fullmatch(rf"{name}-[0-9a-f]{{8}}", home.name)
        second = "seed-1" if name == "LayerWise" else "seed-1-2"
        records = [read_record(home / seed)[1] for seed in ("seed-0", second)]
        assert [record["seed"] for record in records] == [0, 1]
        assert [record["steps"] for record in records] == [3, 3]
        scores = [record["scores"]["this merge"] for record in records]
        row = read()[name]
        for task in TASKS:
            assert float(row[f"accuracy/{task}"]) == pytest.approx(100 * fmean(each[task] for each in scores), abs=1e-5)
        means = [100 * fmean(each.values()) for each in scores]
        assert float(row["mean"]) == pytest.approx(fmean(means), abs=1e-5)
        assert float(row["std"]) == pytest.approx(stdev(means), abs=1e-5)
        assert (row["steps"], row["seeds"]) == ("3.0", "2")
        costs = [record.get("cost", {}).get("seconds") for record in records]
        assert row["seconds"] == "" if None in costs else float(row["seconds"]) == pytest.approx(fmean(costs), abs=1e-5)
    (first,) = (record for record in map(scored, before) if len(record) > 1)  # one run scored the baselines
    for name in BASELINES[:4]:
        assert float(read()[name]["mean"]) == pytest.approx(100 * fmean(first[name].values()), abs=1e-5)
    for task in TASKS:
        assert float(read()[EXPERTS][f"accuracy/{task}"]) == pytest.approx(
            100 * first[f"expert {task}"][task], abs=1e-5
        )
    best = max(float(read()[name]["mean"]) for name in BASELINES[:4])
    for name in ("LayerWise", "TaskWise"):
        assert float(read()[name]["gain"]) == pytest.approx(float(read()[name]["mean"]) - best, abs=1e-5)

    head, lines, about = page()
    assert head == ["", *TASKS, "mean", "gain", "steps", "seconds", "memory in GB", "learnables", "folds"]
    assert list(lines) == list(read())
    for name, cells in lines.items():
        assert cells[:3] == [f"{float(read()[name][f'accuracy/{task}']):.1f}" for task in TASKS]
    assert re.fullmatch(r"\d+\.\d ± \d+\.\d", lines["LayerWise"][3])
    assert "adamerge compare LayerWise.yaml TaskWise.yaml --config=pool.yaml --seeds 0 1" in about
    assert "torch " in about
    assert all(name in str(comparison) for name in lines)


def scored(weights):
    return read_record(weights.parent)[1]["scores"]


@pytest.mark.slow
def test_ctrl_c_ends_the_runs_and_says_how_to_go_on(files):
    """Two processes: the comparison and its first run."""
    command = "import sys; from adamerge.cli import main; sys.exit(main())"
    options = ["--config", "pool.yaml", "--seeds", "0", "--set", "trainer.max_steps=100000"]
    process = subprocess.Popen(
        [sys.executable, "-c", command, "compare", *files, *options],
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a shell's background jobs ignore
    )
    try:
        for _ in range(900):
            time.sleep(0.1)
            if any(path.stat().st_size > 100 for path in Path("runs").rglob("metrics.csv")):
                break
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.terminate()  # if it is still there, it ends its runs
    assert process.returncode == 130, f"{out}\n{err}"
    assert "Stopped with 2 of 2 runs left; the same command goes on with them." in out
    assert err == "adamerge: stopped by Ctrl-C.\n"
    assert not list(Path("runs").rglob("*.done.json"))
    assert len(list(Path("runs").rglob("merge.safetensors"))) == 1  # it was let finish its step and save
    assert not Path("runs/compare/compare.csv").exists()


# --- stand-ins for processes


NOTHING = {  # the parts of a record that no table looks at
    **{part: {"class_path": "adamerge.Nothing"} for part in ("backbone", "rule")},
    **{"transforms": [], "task_modules": [], "space": {}, "vectors": {}, "left_out": {}},
    "widths": {"features": 0, "blocks": {}},
}


class Standin:
    """Instead of a process: writes what a run leaves behind, or fails."""

    def __init__(self, command, *, stdout, **_):
        options = dict(part[2:].split("=", 1) for part in command if part.startswith("--"))
        self.seed, self.folder = int(options["seed_everything"]), Path(options["run.dir"])
        self.baselines = options["run.baselines"] == "true"
        self.recipe = self.folder.parent.name.rpartition("-")[0]
        self.returncode = None
        self.started.append((self.recipe, self.seed, self.baselines))
        if (self.recipe, self.seed) in self.failing:
            stdout.write(b"Tasks: many\nadamerge: The moon is full.\n\n")
        else:
            self.write()

    def write(self):
        merge = self.folder / "merge"
        merge.mkdir(parents=True)
        save_file({}, merge / "merge.safetensors")
        value = {"LayerWise": 0.5, "TaskWise": 0.6}.get(self.recipe, 0.1) + self.seed / 10
        scores = {f"expert {task}": {task: 0.9} for task in TASKS} | {"TIES": dict.fromkeys(TASKS, 0.4)}
        scores = {"base": dict.fromkeys(TASKS, 0.2), **scores} if self.baselines else {}
        record = {
            **{"format": artifact.FORMAT, "weights": digest(merge / "merge.safetensors")},
            **NOTHING,
            "sources": {
                "base": {"source": "base", "sha256": self.sha},
                **{f"expert {task}": {"source": task, "sha256": "22" * 32} for task in TASKS},
            },
            "classes": {task: [] for task in TASKS},
            "labels": {"task": [*TASKS], "group": []},
            "scores": {**scores, "this merge": dict(zip(TASKS, (value, value, value + 0.03), strict=True))},
            **{"steps": 5 + self.seed, "finished": True, "folds": self.recipe == "LayerWise"},
            "cost": {"seconds": 1.5 + self.seed, "peak_memory": 2_000_000_000 + self.seed, "learnables": 18},
            "versions": {"torch": self.version},
        }
        (merge / "merge.yaml").write_text(yaml.safe_dump(record))

    def poll(self):
        self.returncode = int((self.recipe, self.seed) in self.failing)
        return self.returncode


@pytest.fixture
def started(monkeypatch):
    """Runs are stand-ins; which were started, with which seed, and whether they scored the baselines."""
    Standin.started, Standin.failing, Standin.sha, Standin.version = [], set(), "00" * 32, "2.10"
    monkeypatch.setattr(attempts, "_popen", Standin)
    return Standin.started


def test_a_run_is_made_once_and_the_first_scores_the_baselines(files, started):
    compare(files, on=["pool.yaml"], seeds=[0, 1])
    assert started == [("LayerWise", 0, True), ("LayerWise", 1, False), ("TaskWise", 0, False), ("TaskWise", 1, False)]
    table = Path("runs/compare/compare.csv").read_text()
    started.clear()
    compare(files, on=["pool.yaml"], seeds=[0, 1])
    assert (started, Path("runs/compare/compare.csv").read_text()) == ([], table)

    (marker,) = Path("runs/compare").glob("TaskWise-*/seed-1.done.json")
    marker.unlink()
    compare(files, on=["pool.yaml"], seeds=[0, 1])
    assert started == [("TaskWise", 1, False)]
    assert {path.name for path in marker.parent.iterdir()} == {
        *("seed-0", "seed-0.log", "seed-0.done.json", "seed-1", "seed-1.log", "seed-1-2", "seed-1-2.log"),
        "seed-1.done.json",
    }
    marker.write_text("{}")  # damaged
    compare(files, on=["pool.yaml"], seeds=[0, 1])
    assert started[1:] == [("TaskWise", 1, False)]

    started.clear()
    compare(files, on=["pool.yaml"], seeds=[0, 1, 2])
    assert started == [("LayerWise", 2, False), ("TaskWise", 2, False)]


def test_numbers_of_the_table(files, started):
    comparison = compare(files, on=["pool.yaml"], seeds=[0, 1], title="Which one?")
    row = read()["TaskWise"]
    assert [float(row[f"accuracy/{task}"]) for task in TASKS] == [65, 65, 68]
    assert [float(row[key]) for key in ("mean", "std", "gain")] == pytest.approx([66, 7.071068, 26])
    assert [float(row[key]) for key in ("steps", "seconds", "peak_memory_gb")] == [5.5, 2, 2]
    assert [row[key] for key in ("learnables", "folds", "seeds")] == ["18", "no", "2"]
    assert read()["LayerWise"]["folds"] == "yes"
    assert list(read()) == ["base", "TIES", EXPERTS, "LayerWise", "TaskWise"]
    assert [read()["TIES"][key] for key in ("mean", "std", "gain", "seeds", "steps")] == ["40.0", "", "", "", ""]
    assert page()[1]["TaskWise"] == ["65.0", "65.0", "68.0", "66.0 ± 7.1", "+26.0", "6", "2.0", "2.00", "18", "no"]
    assert page()[1]["TIES"] == ["40.0"] * 4 + ["–"] * 6
    assert "best without training, TIES." in page()[2]
    text = str(comparison)
    assert text.startswith("Which one?")
    assert "66.0 ± 7.1" in text
    assert text.endswith("Written: runs/compare/compare.csv, runs/compare/compare.md")


def test_one_seed_has_no_spread(files, started):
    compare(files, on=["pool.yaml"], seeds=[0])
    assert read()["TaskWise"]["std"] == ""
    assert page()[1]["TaskWise"][3] == "61.0"


def test_a_table_too_wide_for_the_terminal_is_two(monkeypatch, tmp_path):
    run = Ran("x", {"a": 0.5}, None, 5, None, None, None, None, {}, {})
    rows = [Row("base", [{"a": 0.4}]), Row("mine", [{"a": 0.5}], [run], 1)]
    comparison = Comparison(rows, ("a",), tmp_path, "Which one?", "")
    monkeypatch.setenv("COLUMNS", "120")
    assert str(comparison).count("│ mine") == 1
    monkeypatch.setenv("COLUMNS", "40")
    assert [str(comparison).count(f"│ {name}") for name in ("base", "mine")] == [1, 2]
    assert max(len(line) for line in str(comparison).splitlines() if "│" in line) < 75


def test_a_failing_run_is_named_and_the_rest_is_complete(files, started, caplog):
    Standin.failing = {("LayerWise", 0)}
    with caplog.at_level("INFO", "adamerge"), pytest.raises(InputError) as failed:
        compare(files, on=["pool.yaml"], seeds=[0, 1])
    first, second = str(failed.value).splitlines()
    assert first.startswith("1 of 4 runs failed; what is finished is kept, and the same command runs only")
    assert re.fullmatch(
        r"  - LayerWise, seed 0: The moon is full. \(Status 1.\) Its log: .*LayerWise-\w{8}/seed-0.log", second
    )
    assert started[:2] == [("LayerWise", 0, True), ("LayerWise", 1, True)]  # the next one scores the baselines
    assert {name: row["seeds"] for name, row in read().items() if row["seeds"]} == {"LayerWise": "1", "TaskWise": "2"}
    assert "LayerWise (1 of 2 seeds)" in page()[1]
    assert "LayerWise (1 of 2 seeds)" in caplog.text  # the table is shown as well
    Standin.failing, started[:] = set(), []
    compare(files, on=["pool.yaml"], seeds=[0, 1])
    assert started == [("LayerWise", 0, False)]
    assert "LayerWise" in page()[1]


def test_where_all_fail_there_is_no_table(files, started):
    Standin.failing = {("LayerWise", 0), ("TaskWise", 0)}
    with pytest.raises(InputError, match="2 of 2 runs failed"):
        compare(files, on=["pool.yaml"], seeds=[0])
    assert not Path("runs/compare/compare.csv").exists()


def test_without_baselines_of_its_own_the_first_run_is_made_again(files, started):
    compare(files, on=["pool.yaml"], seeds=[0])
    started.clear()
    compare(files[1:], on=["pool.yaml"], seeds=[0])
    assert started == [("TaskWise", 0, True)]
    compare(files[1:], on=["pool.yaml"], seeds=[0])
    assert len(started) == 1


def test_a_changed_recipe_or_option_is_another_run(files, started):
    compare(files, on=["pool.yaml"], seeds=[0])
    Path(files[0]).write_text(Path(files[0]).read_text() + "seed_everything: 3\n")
    compare(files, on=["pool.yaml"], seeds=[0])
    assert started[2:] == [("LayerWise", 0, True)]
    compare(files, on=["pool.yaml"], seeds=[0], options=["trainer.max_steps=3"])
    assert len(started) == 5
    assert len(list(Path("runs/compare").glob("*-*/seed-0"))) == 5


def test_one_stem_from_two_folders(files, started):
    Path("other").mkdir()
    Path("other/TaskWise.yaml").write_text("model: {rule: {class_path: adamerge.rules.TaskWise, init_args: {init: 1}}}")
    Path("TIES.yaml").write_text("trainer: {max_steps: 2}")
    compare(["TaskWise.yaml", "other/TaskWise.yaml", "TIES.yaml"], on=["pool.yaml"], seeds=[0])
    assert list(read())[-3:] == ["TaskWise.yaml", "other/TaskWise.yaml", "TIES.yaml"]
    assert len(started) == 3


def test_files_that_changed_between_runs_are_not_in_one_table(files, started):
    compare(files, on=["pool.yaml"], seeds=[0])
    Standin.sha = "11" * 32
    with pytest.raises(InputError, match=r"LayerWise, seed 1 and LayerWise, seed 0 .* different files .*: 1 \(base\)"):
        compare(files[:1], on=["pool.yaml"], seeds=[0, 1])


def test_versions_that_changed_are_both_named(files, started):
    compare(files, on=["pool.yaml"], seeds=[0])
    Standin.version = "2.11"
    compare(files, on=["pool.yaml"], seeds=[0, 1])
    assert "torch 2.10 and 2.11" in page()[2]


# --- refused before anything runs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recipes": []}, "nothing to compare"),
        ({"recipes": ["TaskWise.yaml", "./TaskWise.yaml"]}, "'TaskWise.yaml' and './TaskWise.yaml' are the same"),
        ({"recipes": ["nowhere.yaml"]}, "There is no configuration 'nowhere.yaml'"),
        ({"on": []}, "The recipe 'LayerWise.yaml' cannot be run: .*required"),
        ({"seeds": []}, "`--seeds` is empty"),
        ({"seeds": [0, 1, 0]}, "`--seeds` names 0 more than once"),
        ({"seeds": [-1]}, "`--seeds` has -1"),
        ({"jobs": 0}, "`--jobs` is 0"),
        ({"options": ["max_steps"]}, "`--set max_steps` is no option of a run"),
        ({"options": ["seed_everything=3"]}, "is no option of a run"),
        ({"options": ["run.dir=here"]}, "`--set run.dir` is what the comparison itself decides"),
        ({"options": ["trainer.steps=3"]}, "'LayerWise.yaml' cannot be run: .*trainer.steps"),
        ({"options": ["data.eval_split=null"]}, "evaluates on no split"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_runs(files, started, change, message):
    arguments = {"recipes": files, "on": ["pool.yaml"], **change}
    with pytest.raises(InputError, match=message):
        compare(arguments.pop("recipes"), **arguments)
    assert started == []
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"model": {"base": "elsewhere.pt"}}, r"`model.base` is '.*elsewhere.pt', not '.*base.safetensors'"),
        ({"model": {"experts": {"b": "b.pt", "a": "a.pt"}}}, r"`model.experts` differs in 3 \(a, b, c\)"),
        ({"data": {"tasks": {"a": {"class_path": "tests.tiny.Tiny", "init_args": {"task": "b"}}}}}, "`data.tasks` dif"),
        ({"data": {"split": "test"}}, "`data.split` is 'test', not 'train'"),
        ({"data": {"eval_split": "train"}}, "`data.eval_split` is 'train', not 'test'"),
    ],
)  # fmt: skip
def test_other_sources_are_refused_before_anything_runs(files, started, other, message):
    Path("other.yaml").write_text(yaml.safe_dump(other))
    with pytest.raises(InputError, match=f"'other' cannot be compared with 'LayerWise': its {message}"):
        compare([*files, "other.yaml"], on=["pool.yaml"])
    assert started == []
    assert not Path("runs").exists()


def test_two_comparisons_do_not_share_a_folder(files, started, monkeypatch):
    nested = []

    class Nosy(Standin):
        def poll(self):
            with pytest.raises(InputError, match="Another comparison is at work in"):
                compare(files, on=["pool.yaml"], seeds=[0])
            nested.append(1)
            return super().poll()

    monkeypatch.setattr(attempts, "_popen", Nosy)
    compare(files[:1], on=["pool.yaml"], seeds=[0])
    assert nested == [1]


def test_the_readmes_command_is_one_that_works(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (line,) = re.findall(r"^adamerge (compare .*)$", (ROOT / "README.md").read_text(), re.M)
    options = command_parser().parse_args(shlex.split(line)).compare
    found = _candidates(options.recipes, options.config, options.set, tmp_path)
    assert len(_common_tasks([(each.name, _job(each)) for each in found])) == 8
    assert (options.root, options.jobs, options.seeds) == ("runs/compare", 1, [0, 1, 2])
