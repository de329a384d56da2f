"""Every shipped configuration runs, a preset does what it promises, and a name finds the same file everywhere."""

import csv
import json
import re
import subprocess
import sys
import textwrap
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from PIL import Image as Picture

import adamerge
from adamerge.artifact import read_record
from adamerge.config import SHIPPED, find_config, job_from_arguments, parse, shipped_configs
from adamerge.learnables import learnables_of
from adamerge.types import InputError
from tests.clips import write_clip

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs"
SWEEPS = {CONFIGS / "sweep.yaml"}  # for `wandb sweep`; see tests/test_tracking.py
FILES = sorted({*CONFIGS.rglob("*.yaml")} - SWEEPS)
HUB = [path for path in FILES if path.name.startswith("vit_")]
PAPER = [path for path in FILES if re.fullmatch(r"(zoo|vit_b32)_(task|layer)_wise(_pp)?", path.stem)]
RECIPES = [path for path in FILES if path.name.startswith("zoo_")]
ELSEWHERE = [path for path in FILES if path.name.startswith(("clip_", "glue_"))]  # see tests/test_recipes.py
ALONE = [path for path in FILES if path not in (*HUB, *RECIPES, *ELSEWHERE)]
SHORT = {"trainer.max_steps": 2, "run.baselines": False}


def stack(path):
    """The files that a configuration is run with, by what its first line says."""
    first = path.read_text().partition("\n")[0]
    below = re.match(r"# Stack on (\S+\.yaml)", first)
    if below:
        return [*stack(ROOT / below[1]), path]
    if first.startswith("# Stack on any configuration"):
        return [CONFIGS / "demo.yaml", path]
    return [path, CONFIGS / "demo.yaml"] if first.startswith("# Stack your own on this") else [path]


def run(path, folder, **overrides):
    return adamerge.train(stack(path), **{**SHORT, "run.root": str(folder), **overrides})


START = {"raw_TG": 0.3, "logits": 0.0, "up": 0.0, "offset": 0.0}


def moved(run):
    """Of each kind of learnable at least one is not where it started."""
    kinds, trainable = {}, set(map(id, run.learned.trainable().values()))
    for name, learned in learnables_of(run.learned).items():
        if id(learned.parameter) not in trainable:
            continue  # fixed coefficients
        kind = next((kind for kind in START if re.search(rf"\.{kind}\b|\.{kind}_", name)), None)
        if kind is not None:
            kinds.setdefault(kind, []).append(bool((learned.parameter != START[kind]).any()))
    return bool(kinds) and all(map(any, kinds.values()))


def losses(run):
    rows = csv.DictReader((run.dir / "metrics.csv").open())
    return [float(row["train/loss"]) for row in rows if row["train/loss"]]


@pytest.mark.parametrize("path", ALONE, ids=lambda path: path.stem)
def test_configuration_runs(path, tmp_path):
    done = run(path, tmp_path, **{"data.eval_batch_size": 20, "trainer.limit_val_batches": 1})
    assert done.dir.parent.name == stack(path)[-1].stem
    assert moved(done)


# --- the recipes of the zoo


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The recipes of the zoo by name, each trained for two steps when it is first asked for."""
    home = tmp_path_factory.mktemp("recipes")
    few = {"data.eval_batch_size": 50, "trainer.limit_val_batches": 2}
    paths = {path.stem: path for path in RECIPES}
    return cache(lambda name: run(paths[name], home, **few))


@pytest.mark.slow_unless("zoo_distilled_layer_wise", "zoo_surgery_v2", "zoo_concrete_task_arithmetic")
@pytest.mark.parametrize("name", [path.stem for path in RECIPES])
def test_a_recipe_learns_every_part_and_exports_to_the_same_outputs(name, trained, tmp_path):
    done = trained(name)
    _, record = read_record(done.dir)
    assert done.dir.parent.name == name
    assert moved(done)
    assert record["folds"] == (not record["task_modules"])
    exported = adamerge.export(done.dir, tmp_path / "merged")  # compares the logits, task modules included
    assert exported.difference <= 1e-5
    assert (tmp_path / "merged" / "task_modules.safetensors").exists() == (not record["folds"])


@pytest.mark.slow
def test_a_fresh_process_scores_all_recipes_as_their_runs_did(trained):
    code = """
        import json, sys, torch, adamerge
        from adamerge.config import data_of
        from adamerge.evaluation import evaluate
        from itertools import islice
        from pathlib import Path
        found = {}
        for name, run in json.loads(sys.argv[1]).items():
            merge, data = adamerge.load(run), data_of(Path(run) / "config.yaml")
            data.preparer = merge.backbone.preparer
            batches = {task: islice(loader, 2) for task, loader in data.eval_loaders().items()}
            found[name] = evaluate(merge, batches, data.num_classes, torch.device("cpu"))
        print(json.dumps(found))
    """
    done = {path.stem: trained(path.stem) for path in RECIPES}
    runs = json.dumps({name: str(run.dir) for name, run in done.items()})
    fresh = [sys.executable, "-c", textwrap.dedent(code), runs]
    found = json.loads(subprocess.run(fresh, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    assert found == {name: run.scores["this merge"] for name, run in done.items()}


# --- the recipes of the papers


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_a_recipe_holds_the_papers_numbers(path):
    job = parse(stack(path), {})
    found = yaml.safe_load(job.config)
    method = found["model"]["rule"]
    assert method["class_path"] == f"adamerge.rules.{'TaskWise' if '_task_wise' in path.stem else 'LayerWise'}"
    assert method["init_args"] == {"init": 0.3, "activation": "clamp", "trainable": True, "penalties": None}
    assert [each["class_path"] for each in found["model"]["objectives"] or ()] in ([], ["adamerge.objectives.Entropy"])
    transforms = [each["class_path"].rpartition(".")[2] for each in found["model"]["transforms"] or ()]
    assert transforms == (["Trim", "ElectSign"] if path.stem.endswith("_pp") else [])
    assert all(each.get("init_args") in (None, {"keep": 0.2}) for each in found["model"]["transforms"] or ())
    optimizer = found["model"]["optimizer"]
    assert (optimizer["class_path"], optimizer["init_args"]["lr"]) == ("torch.optim.Adam", 0.001)
    assert (job.trainer["max_steps"], job.data.batch_size) == (500, 16)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A folder in which the checkpoints and data sets of the ViT-B/32 recipes lie under the names given there, tiny."""
    home = tmp_path_factory.mktemp("hub")
    found = yaml.safe_load((CONFIGS / "recipes" / "vit_b32_eight_tasks.yaml").read_text())
    base = write_clip(home / "base")
    for seed, file in enumerate(found["model"]["experts"].values(), start=1):
        (home / file).parent.parent.mkdir(parents=True, exist_ok=True)
        write_clip((home / file).parent, seed=seed, near=base)
        (home / file).with_name("open_clip_model.safetensors").rename(home / file)
    for data in found["data"]["tasks"].values():
        options = data["init_args"]
        names = [str(number) for number in range(len(options.get("classes", "abc")))]
        rows = [{"image": Picture.effect_noise((20, 24), 50), "label": number % len(names)} for number in range(8)]
        features = Features({"image": Image(), "label": ClassLabel(names=names)})
        split = Dataset.from_list(rows, features=features)
        DatasetDict(train=split, test=split).save_to_disk(str(home / options["path"]))
    return home


@pytest.mark.slow_unless("vit_b32_eight_tasks", "vit_b32_layer_wise")
@pytest.mark.parametrize("path", HUB, ids=lambda path: path.stem)
def test_a_recipe_of_the_hub_runs_on_tiny_files_of_its_layout(path, hub, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(hub)
    monkeypatch.setenv("ADAMERGE_CACHE", str(hub / "cache"))
    tiny = {"model.base": "base", "model.backbone.init_args.model": "local-dir:base", "data.num_workers": 0}
    done = run(path, tmp_path, **tiny)
    assert moved(done)
    assert " ".join(done.learned.tasks) == "sun397 cars resisc45 eurosat svhn gtsrb mnist dtd"  # the papers' order
    assert (done.learned.learnables()["rule.raw_TG"].shape[1] == 1) == ("_task_wise" in path.stem)
    assert "transductive" in caplog.text


# --- the presets


def test_fast_looks_at_few_samples_on_the_cpu(tmp_path):
    preset = CONFIGS / "debug" / "fast.yaml"
    done = adamerge.train(stack(preset), **{"run.root": str(tmp_path), "data.eval_batch_size": 5})
    assert len(losses(done)) == 2
    assert list(done.scores) == ["this merge"]
    assert all(round(10 * accuracy, 6).is_integer() for accuracy in done.scores["this merge"].values())  # of 10 samples


@pytest.mark.slow
def test_overfit_learns_the_same_two_batches(tmp_path):
    preset = CONFIGS / "debug" / "overfit.yaml"
    options = {"run.root": str(tmp_path), "trainer.max_steps": 40}
    frozen = {"model.optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.0}}, "trainer.max_steps": 6}
    still = losses(adamerge.train(stack(preset), **{**options, **frozen}))
    assert still[0] != pytest.approx(still[1])
    assert still == pytest.approx(still[:2] * 3)  # the same two batches, in turn
    found = losses(adamerge.train(stack(preset), **options))
    assert found[-1] < found[1]
    assert found[-2] < found[0]


@pytest.mark.slow
def test_profile_writes_a_table_and_a_trace(tmp_path):
    done = adamerge.train(stack(CONFIGS / "debug" / "profile.yaml"), **{"run.root": str(tmp_path)})
    assert "aten::convolution_backward" in (done.dir / "fit-profile.txt").read_text()
    (trace,) = done.dir.glob("fit-profile*.pt.trace.json")
    assert trace.stat().st_size > 1000


# --- where a configuration is found


def test_a_file_of_ones_own_comes_before_the_shipped_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config("configs/demo.yaml") == SHIPPED / "demo.yaml"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "demo.yaml").write_text("trainer: {max_steps: 7}")
    assert find_config("configs/demo.yaml") == Path("configs/demo.yaml")
    assert find_config(tmp_path / "configs" / "demo.yaml") == tmp_path / "configs" / "demo.yaml"


@pytest.mark.parametrize("flags", [["--config", "{}"], ["--config={}"], ["-c", "{}"]], ids=["two", "equals", "short"])
def test_the_command_finds_shipped_files_and_says_so(flags, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO", "adamerge")
    names = ["configs/digits.yaml", "configs/digits_supervised.yaml"]
    job = job_from_arguments([flag.format(name) for name in names for flag in flags])
    assert job.run.name == "digits_supervised"
    assert [name for name in names if f"{name} is not here" in caplog.text] == names


def test_what_is_in_the_working_directory_is_taken_in_silence(monkeypatch, caplog):
    monkeypatch.chdir(ROOT)
    caplog.set_level("INFO", "adamerge")
    parse("configs/demo.yaml", {})
    assert not caplog.text


def test_configurations_can_be_written_on_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = job_from_arguments(["--config", "configs/demo.yaml", "--config", "{trainer: {max_steps: 7}}"])
    assert job.trainer["max_steps"] == 7


@pytest.mark.parametrize("name", ["configs/demoo.yaml", "demo.yaml", "configs", "configs/recipes/demo.yaml"])
def test_an_unknown_name_lists_the_shipped_ones(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for ask in (lambda: job_from_arguments(["--config", name]), lambda: adamerge.train(name)):
        with pytest.raises(InputError, match=f"There is no configuration '{name}' ") as raised:
            ask()
        assert "\n" not in str(raised.value)
        said = "".join(
            f" {folder}/{stem}.yaml"
            for folder, stems in re.findall(r"(configs[\w/]*)/\{([\w,]+)\}\.yaml", str(raised.value))
            for stem in stems.split(",")
        )
        assert sorted(said.split()) == shipped_configs()
    assert sorted(shipped_configs()) == sorted(file.relative_to(ROOT).as_posix() for file in FILES)
    for shipped in shipped_configs():  # the advice can be followed
        assert find_config(shipped).is_file()


def test_one_that_stands_on_nothing_says_how_to_stack_it():
    with pytest.raises(InputError, match=r"required: model\.base.*`Stack on OTHER`.*--config OTHER --config FILE"):
        parse(CONFIGS / "recipes" / "zoo_task_wise.yaml", {})


# --- learning


@pytest.mark.slow
def test_supervised_beats_task_arithmetic_by_five_points_over_three_seeds(tmp_path):
    """Training really learns: on the digits, from labels of the unlabeled split, scored on the test split."""
    files = [CONFIGS / "digits.yaml", CONFIGS / "digits_supervised.yaml"]
    gains = []
    for seed in range(3):
        options = {"seed_everything": seed, "data.seed": seed, "run.root": str(tmp_path), "run.baselines": seed == 0}
        run = adamerge.train(files, **options)
        if seed == 0:
            arithmetic = run.scores["task arithmetic"]
        gains.append(sum(run.scores["this merge"][task] - arithmetic[task] for task in arithmetic) / len(arithmetic))
    assert torch.tensor(gains).mean() >= 0.05, gains
