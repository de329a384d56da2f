"""Runs from models of the hub, merges and exports pushed to it; the hub is a server on this machine."""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from huggingface_hub import ModelCard, constants
from safetensors.torch import load_file, save_file

import adamerge
from adamerge import Recipe, UnlabeledTasks, backbones
from adamerge import hub as module
from adamerge.artifact import read_record
from adamerge.cli import main
from adamerge.mergekit import mergekit_config
from adamerge.task_modules import Surgery
from adamerge.types import InputError
from tests.checkpoints_hf import CLASSES, Texts, rename, shard, write
from tests.hub_server import served_hub  # noqa: F401

ROOT = Path(__file__).parent.parent
COMMAND = str(Path(sys.executable).parent / "adamerge")
QUIET = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False, "max_steps": 1}


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    return write(tmp_path_factory.mktemp("pool"), "bert", "AutoModelForSequenceClassification")


@pytest.fixture
def online(hub, pool, tmp_path):
    """The pool on the hub: one file, shards, names with a prefix; the commits by repository."""
    commits = {}
    for name, licence in {"base": "apache-2.0", "a": "cc-by-nc-4.0", "b": "mit"}.items():
        folder = tmp_path / "made" / name
        shutil.copytree(pool[name], folder)
        if name == "a":
            shard(folder)
        if name == "b":
            rename(folder, lambda key: f"model.{key}")
        (folder / "README.md").write_text(f"---\nlicense: {licence}\n---\n# {name}\n")
        commits[f"org/{name}"] = hub.add(f"org/{name}", folder)
    return commits


SOURCES = {"base": "org/base", "a": "org/a", "b": "org/b"}


def learned(root, sources=SOURCES, backbone=None, **options):
    recipe = Recipe(
        str(sources["base"]),
        {task: str(sources[task]) for task in CLASSES},
        backbone or backbones.TextClassifier(),
        **options,
    )
    data = UnlabeledTasks({task: Texts(task) for task in CLASSES}, batch_size=4, eval_split="test")
    return adamerge.train(recipe, data, trainer=QUIET, run={"root": str(root), "baselines": False})


def answers(merge):
    samples = {task: Texts(task).split("test")[:5] for task in CLASSES}
    with torch.inference_mode():
        return {task: merge(merge.prepare(samples[task], task=task), task=task) for task in CLASSES}


def same(one, other):
    return all(torch.equal(one[task], other[task]) for task in CLASSES)


def moved(hub, repo, folder):
    """Other weights, and a tokenizer that reads each word as another, on the branch of a repository."""
    (file,) = folder.glob("*.safetensors")
    state = load_file(file)
    save_file({name: t + 1 if t.is_floating_point() else t for name, t in state.items()}, file, {"format": "pt"})
    told = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = told["model"]["vocab"]
    number = {name: n for n, name in enumerate(reversed(list(vocabulary)))}
    told["model"]["vocab"] = number
    (folder / "tokenizer.json").write_text(json.dumps(told))
    return hub.add(repo, folder)


def test_a_run_is_opened_again_as_it_was(hub, online, tmp_path, monkeypatch):
    run = learned(tmp_path / "runs", {**SOURCES, "b": "org/b@main"})
    expected = answers(run.merge)
    _, record = read_record(run.dir)
    for who, name in {"base": "base", "expert a": "a", "expert b": "b"}.items():
        entry = record["sources"][who]
        assert entry["revision"] == online[f"org/{name}"]
        assert len(entry["sha256"]) == 64
    assert record["sources"]["base"]["source"] == "org/base"
    for name in ("base", "b"):
        moved(hub, f"org/{name}", tmp_path / "made" / name)
    loaded = adamerge.load(run.dir)
    assert same(answers(loaded), expected)
    assert loaded.backbone.model == f"org/base@{online['org/base']}"
    assert adamerge.export(run.dir, tmp_path / "out").difference < 1e-5
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "out" / "tasks" / "a")
    assert again.convert_tokens_to_ids("ant") == loaded.backbone.tokenizer.convert_tokens_to_ids("ant")
    assert mergekit_config(run.dir)["base_model"] == f"org/base@{online['org/base']}"
    hub.stop()
    (tmp_path / "org" / "base").mkdir(parents=True)  # which is another thing
    monkeypatch.chdir(tmp_path)
    assert same(answers(adamerge.load(run.dir)), expected)


def test_a_branch_that_moves_while_a_run_reads_it_gives_one_commit(hub, online, tmp_path, monkeypatch):
    real, seen = module._find, []

    def moving(source):
        found = real(source)
        if found.repo == "org/base":
            seen.append(found.commit)
            hub.add("org/base", {"config.json": hub.files("org/base")["config.json"] + b" "})
        return found

    monkeypatch.setattr(module, "_find", moving)
    run = learned(tmp_path / "runs")
    assert len(seen) > 3
    assert set(seen) == {online["org/base"]}
    assert read_record(run.dir)[1]["sources"]["base"]["revision"] == online["org/base"]
    assert module.commit_of("org/base") != online["org/base"]


def test_a_model_other_than_the_base_is_recorded_with_its_commit(hub, online, pool, tmp_path):
    hub.add("org/words", pool["base"])
    commit = module.commit_of("org/words")
    run = learned(tmp_path / "runs", backbone=backbones.TextClassifier("org/words"))
    expected = answers(run.merge)
    shutil.copytree(pool["base"], tmp_path / "words")
    moved(hub, "org/words", tmp_path / "words")
    loaded = adamerge.load(run.dir)
    assert loaded.backbone.model == f"org/words@{commit}"
    assert same(answers(loaded), expected)


def test_a_source_that_has_vanished_is_named(hub, online, tmp_path):
    run = learned(tmp_path / "runs")
    gone = hub.repos["model", "org/a"]
    sha = online["org/a"]
    gone.commits = {"e" * 40: gone.commits[sha]}
    gone.refs = {"main": "e" * 40}
    with pytest.raises(InputError, match=f"'org/a' has no revision '{sha}'"):
        adamerge.load(run.dir)
    del hub.repos["model", "org/a"]
    with pytest.raises(InputError, match=r"There is no 'org/a' on http.* that you may read"):
        adamerge.load(run.dir)


def test_a_pushed_merge_answers_on_another_machine(hub, online, tmp_path, caplog):
    caplog.set_level(logging.WARNING, "adamerge")
    run = learned(tmp_path / "runs")
    where = adamerge.push_to_hub(run.dir, "org/merge")
    assert where.startswith(hub.url)
    assert hub.is_private("org/merge")
    assert set(hub.files("org/merge")) - {".gitattributes"} == {"merge.yaml", "merge.safetensors", "README.md"}
    assert "Nobody else" not in caplog.text
    for data in hub.files("org/merge").values():
        assert str(tmp_path).encode() not in data
    first = module.commit_of("org/merge")
    hub.add("org/merge", {"merge.yaml": b"format: 99"})
    for name in ("base", "b"):
        moved(hub, f"org/{name}", tmp_path / "made" / name)
    code = f"""
import torch, adamerge
from safetensors.torch import save_file
from tests.test_hub_runs import answers
save_file(answers(adamerge.load("org/merge@{first}")), "out.safetensors")
"""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {**os.environ, **hub.environment, "HF_HOME": str(elsewhere), "PYTHONPATH": str(ROOT)}
    environment |= {"HF_HUB_CACHE": str(elsewhere / "hub"), "ADAMERGE_CACHE": str(elsewhere / "cache")}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=elsewhere, env=environment)
    assert same(load_file(elsewhere / "out.safetensors"), answers(run.merge))
    with pytest.raises(InputError, match="is not of format 2"):
        adamerge.load("org/merge")

    card = ModelCard(hub.files("org/merge", revision=first)["README.md"].decode())
    assert card.data.base_model == ["org/base", "org/a", "org/b"]
    assert card.data.base_model_relation == "merge"
    assert card.data.library_name == "adamerge"
    assert card.data.license == "other"
    assert "cc-by-nc-4.0: expert a (non-commercial" in card.text
    assert "They conflict" in card.text
    assert {r.dataset_name: r.metric_value for r in card.data.eval_results} == pytest.approx(
        run.scores["this merge"], abs=1e-6
    )


def test_the_command_pushes_a_branch_of_one_s_own(hub, online, tmp_path, monkeypatch, capsys):
    run = learned(tmp_path / "runs")
    done = command(hub, "push", run.dir, "mine", "--public", "--revision", "v2")
    assert done.returncode == 0, done.stderr
    assert f"Pushed to {hub.url}/tester/mine/commit/" in done.stdout
    assert not hub.is_private("tester/mine")
    assert 'adamerge.load("tester/mine@v2")' in hub.files("tester/mine", revision="v2")["README.md"].decode()
    assert set(hub.files("tester/mine")) == {".gitattributes"}
    assert same(answers(adamerge.load("tester/mine@v2")), answers(run.merge))
    for arguments, said in {
        (str(run.dir), "stranger/x"): "Your token may not write to 'stranger/x'",
        (str(tmp_path / "nothing"), "org/x"): "holds no saved merge",
    }.items():
        monkeypatch.setattr(sys, "argv", ["adamerge", "push", *arguments])
        assert main() == 2
        assert said in capsys.readouterr().err


def command(hub, *arguments):
    environment = {**os.environ, **hub.environment}
    return subprocess.run([COMMAND, *map(str, arguments)], capture_output=True, text=True, env=environment, cwd=ROOT)


def test_local_sources_are_pushed_by_name_with_a_warning(hub, pool, tmp_path, caplog, monkeypatch):
    run = learned(tmp_path / "runs", pool)
    adamerge.push_to_hub(run.dir, "org/merge")
    assert "Nobody else can load this merge: base, expert a, expert b stand on this machine alone" in caplog.text
    home = str(pool["base"].parent)
    for data in hub.files("org/merge").values():
        assert home.encode() not in data
        assert str(tmp_path).encode() not in data
    sources = yaml.safe_load(hub.files("org/merge")["merge.yaml"])["sources"]
    assert sources["expert a"]["source"] == "local-dir:a"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"The base of this merge, 'base', stands on the machine that it was made on"):
        adamerge.load("org/merge")
    monkeypatch.chdir(home)  # the advice, followed
    assert same(answers(adamerge.load("org/merge")), answers(run.merge))
    assert same(answers(adamerge.load(run.dir)), answers(run.merge))


@pytest.mark.slow
def test_an_export_is_loaded_from_the_hub_by_its_library(hub, online, tmp_path, capsys):
    run = learned(tmp_path / "runs")
    adamerge.export(run.dir, tmp_path / "out")
    for data in (file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()):
        assert str(tmp_path).encode() not in data
    adamerge.push_to_hub(tmp_path / "out", "org/export")
    assert hub.is_private("org/export")
    local = {file.relative_to(tmp_path / "out").as_posix(): file for file in (tmp_path / "out").rglob("*")}
    for name, file in local.items():
        if file.is_file() and name != "README.md":
            assert hub.files("org/export")[name] == file.read_bytes()
    shards = {name: data for name, data in hub.files("org/export").items() if name.endswith(".safetensors")}
    assert len(hub.uploaded) == len(set(shards.values())) < len(shards)  # what tasks share is sent once
    for task in CLASSES:
        net = transformers.AutoModelForSequenceClassification.from_pretrained("org/export", subfolder=f"tasks/{task}")
        tokenizer = transformers.AutoTokenizer.from_pretrained("org/export", subfolder=f"tasks/{task}")
        assert net.config.id2label == dict(enumerate(CLASSES[task]))
        texts = [sample["text"] for sample in Texts(task).split("test")[:5]]
        with torch.inference_mode():
            logits = net(**tokenizer(texts, padding=True, return_tensors="pt")).logits
        torch.testing.assert_close(logits, answers(run.merge)[task], rtol=1e-5, atol=1e-5)
    card = ModelCard(hub.files("org/export")["README.md"].decode())
    assert card.data.base_model == ["org/base", "org/a", "org/b"]
    assert card.data.library_name == "transformers"
    code = card.text.partition("```python\n")[2].partition("```")[0]
    assert 'folder = "org/export"' in code
    exec(code, {})
    said = capsys.readouterr().out
    assert any(label in said for label in CLASSES["a"])
    with pytest.raises(InputError, match="'org/export' is an export, which the model's own library loads"):
        adamerge.load("org/export")

    shutil.rmtree(tmp_path / "out" / "tasks" / "b")  # what a later push has not is removed
    adamerge.push_to_hub(tmp_path / "out", "org/export", revision="v2")
    assert not [name for name in hub.files("org/export", revision="v2") if name.startswith("tasks/b/")]
    card = hub.files("org/export", revision="v2")["README.md"].decode()
    code = card.partition("```python\n")[2].partition("```")[0]
    assert 'snapshot_download("org/export", revision="v2")' in code
    exec(code, {})


def test_pickles_of_the_hub_are_converted_as_the_error_says(hub, online, pool, tmp_path):
    net = transformers.AutoModelForSequenceClassification.from_pretrained(pool["a"])
    torch.save(net.state_dict(), tmp_path / "pytorch_model.bin")
    beside = {file.name: file for file in pool["a"].iterdir() if file.suffix == ".json"}
    hub.add("org/old", {**beside, "pytorch_model.bin": tmp_path / "pytorch_model.bin"})
    with pytest.raises(InputError, match=r"`hf download org/old --local-dir FOLDER`.*`adamerge convert`"):
        learned(tmp_path / "runs", {**SOURCES, "a": "org/old"})
    hf = [str(Path(sys.executable).parent / "hf"), "download", "org/old", "--local-dir", str(tmp_path / "old")]
    subprocess.run(hf, check=True, capture_output=True, env={**os.environ, **hub.environment})
    done = command(hub, "convert", tmp_path / "old", tmp_path / "new")
    assert done.returncode == 0, done.stderr
    assert "equal bit by bit" in done.stdout
    run = learned(tmp_path / "runs", {**SOURCES, "a": tmp_path / "new"})
    assert same(answers(run.merge), answers(learned(tmp_path / "more").merge))


def test_offline_with_nothing_cached(hub, tmp_path):
    hub.stop()
    with pytest.raises(InputError, match=f"not, or not wholly, in the cache {constants.HF_HUB_CACHE}"):
        learned(tmp_path / "runs")


def test_what_runs_beside_an_export_is_pushed_with_it(hub, online, tmp_path, caplog):
    run = learned(tmp_path / "runs", task_modules=[Surgery])
    adamerge.export(run.dir, tmp_path / "out")
    assert "Task modules do not fold" in caplog.text
    adamerge.push_to_hub(tmp_path / "out", "org/export")
    assert "task_modules.safetensors" in hub.files("org/export")
    adamerge.push_to_hub(run.dir, "org/merge")
    assert same(answers(adamerge.load("org/merge")), answers(run.merge))
