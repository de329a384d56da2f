import errno
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import adamerge
from adamerge import artifact, files
from adamerge.files import atomic_dir
from adamerge.types import InputError
from tests.tiny import TASKS, batches_of

ROOT = Path(__file__).parent.parent


@pytest.fixture
def run(config):
    return adamerge.train(config({"task_modules": [{"class_path": "tests.tiny.Shift"}]}))


def rewrite(run, **changes):
    path = run.dir / "merge" / "merge.yaml"
    record = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**record, **changes}, sort_keys=False))


def test_a_loaded_merge_answers_as_the_trained_one(run):
    loaded = adamerge.load(run.dir, trust=True)
    for task, batch in batches_of().items():
        assert torch.equal(loaded(batch, task=task), run.merge(batch, task=task))
        torch.testing.assert_close(loaded(batch, task=task), run.learned(batch, task=task))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert torch.equal(artifact.open_merge(run.dir / "merge", trust=True).rule.raw_TG, run.learned.rule.raw_TG)


def test_a_fresh_process_answers_the_same(run, tmp_path):
    save_file({task: batch["input"] for task, batch in batches_of().items()}, tmp_path / "in.safetensors")
    # inputs are copied to where torch puts tensors: at odd addresses of a file some processors add up in another order
    code = f"""
import adamerge, torch
from safetensors.torch import load_file, save_file
merge = adamerge.load({str(run.dir)!r}, trust=True)
inputs = load_file({str(tmp_path / "in.safetensors")!r})
outputs = {{t: merge({{"input": x.clone()}}, task=t) for t, x in inputs.items()}}
save_file(outputs, {str(tmp_path / "out.safetensors")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    for task, logits in load_file(tmp_path / "out.safetensors").items():
        assert torch.equal(logits, run.merge(batches_of()[task], task=task))


def test_tasks_and_groups_are_matched_by_name(run):
    """The record lists the experts in another order; rows of the coefficients follow their names."""
    record = yaml.safe_load((run.dir / "merge" / "merge.yaml").read_text())
    sources, classes = record["sources"], record["classes"]
    back = {"base": sources["base"], **{f"expert {task}": sources[f"expert {task}"] for task in reversed(TASKS)}}
    rewrite(run, sources=back, classes={task: classes[task] for task in reversed(TASKS)})
    loaded = adamerge.load(run.dir, trust=True)
    assert loaded.tasks == TASKS[::-1]
    for task, batch in batches_of().items():
        torch.testing.assert_close(loaded(batch, task=task), run.merge(batch, task=task), rtol=1e-5, atol=1e-6)


def test_the_artifact_is_small_and_without_frozen_tensors(run):
    tensors = load_file(run.dir / "merge" / "merge.safetensors")
    assert set(tensors) == {"rule.raw_TG", *(f"task.{task}.0.shift" for task in TASKS)}
    assert (run.dir / "merge" / "merge.safetensors").stat().st_size < 2000


def test_a_changed_source_is_refused(run, pool):
    tensors = load_file(pool["b"])
    tensors["stem.bias"] += 1
    save_file(tensors, pool["b"])
    with pytest.raises(InputError, match=r"The expert b \(.*b.safetensors\) has changed since the merge was learned"):
        adamerge.load(run.dir, trust=True)


def test_a_source_that_is_gone_is_named(run, pool):
    pool["base"].unlink()
    with pytest.raises(InputError, match=r"There is no checkpoint at '.*base.safetensors'"):
        adamerge.load(run.dir, trust=True)


def test_other_learnables_are_refused(run):
    path = run.dir / "merge" / "merge.safetensors"
    save_file({"rule.other": torch.ones(3)}, path)
    with pytest.raises(InputError, match=r"is not the file that merge.yaml was written with"):
        adamerge.load(run.dir, trust=True)
    rewrite(run, weights=files.sha256(path))
    with pytest.raises(InputError, match=r"does not hold this merge's learnables: missing 4"):
        adamerge.load(run.dir, trust=True)


def test_other_groups_are_refused(run):
    record = yaml.safe_load((run.dir / "merge" / "merge.yaml").read_text())
    labels = {**record["labels"], "group": ["x", *record["labels"]["group"][1:]]}
    rewrite(run, labels=labels)
    with pytest.raises(InputError, match=r"was learned for other groups: it lacks 1 \(stem.weight\) and has 1 \(x\)"):
        adamerge.load(run.dir, trust=True)


@pytest.mark.parametrize(
    "change",
    [
        {"rule": {"class_path": "os.system", "init_args": {}}},
        {"backbone": {"class_path": "adamerge.backbones.Module", "init_args": {"build": "os.getcwd"}}},
        {"transforms": [{"class_path": "tests.tiny.Net"}]},
        {"task_modules": [{"class_path": "adamerge_evil.Module"}]},
        {"backbone": {"class_path": "Module", "init_args": {}}},
        {"backbone": {"class_path": "adamerge.files.shutil", "init_args": {}}},
        {"backbone": {"class_path": "adamerge.files.FileLock", "init_args": {}}},
        {"backbone": {"class_path": "adamerge.backbones.Module", "init_args": {"build": "evil.pt"}}},
        {"rule": {"class_path": "adamerge.checkpoints.json", "init_args": {}}},
        {"transforms": [{"class_path": "adamerge.artifact.load", "init_args": {"path": "evil", "trust": True}}]},
        {"transforms": [{"class_path": "adamerge.recorded.revive", "init_args": {"value": {}, "trust": True}}]},
    ],
)
def test_foreign_code_is_not_imported_without_trust(config, change):
    run = adamerge.train(config())
    rewrite(run, **change)
    with pytest.raises(InputError, match=r"is not part of adamerge; pass trust=True"):
        adamerge.load(run.dir)


@pytest.mark.parametrize("section", ["rule", "backbone", "transforms", "space", "vectors"])
def test_text_is_never_parsed_for_code(config, section, tmp_path, monkeypatch):
    (tmp_path / "evil_thing.py").write_text(
        "import pathlib; pathlib.Path(__file__).with_name('ran').touch()\nclass X: pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    run = adamerge.train(
        config({"backbone": {"class_path": "adamerge.backbones.Module", "init_args": {"build": "tests.tiny.Net"}}})
    )
    rewrite(run, **{section: '{"class_path": "evil_thing.X"}'})
    with pytest.raises(InputError, match="cut short or damaged"):
        adamerge.load(run.dir)
    assert not (tmp_path / "ran").exists()


def test_heads_of_their_own_files_are_hashed_and_found_from_anywhere(pool, config, tmp_path, monkeypatch):
    for task in TASKS:
        state = load_file(pool[task])
        save_file({"weight": state["head.weight"], "bias": state["head.bias"]}, tmp_path / f"{task}.safetensors")
    monkeypatch.chdir(tmp_path)
    heads = {task: f"{task}.safetensors" for task in TASKS}
    backbone = {"class_path": "adamerge.backbones.Module", "init_args": {"build": "tests.tiny.Net", "heads": heads}}
    run = adamerge.train(config({"backbone": backbone}))
    monkeypatch.chdir("/")
    loaded = adamerge.load(run.dir, trust=True)
    batch = batches_of()["b"]
    assert torch.equal(loaded(batch, task="b"), run.merge(batch, task="b"))
    save_file({"weight": torch.zeros(3, 6)}, tmp_path / "b.safetensors")
    with pytest.raises(InputError, match=r"The head b .* has changed since the merge was learned"):
        adamerge.load(run.dir, trust=True)


def test_buffers_that_move_with_the_learnables_are_saved(config):
    run = adamerge.train(config({"task_modules": [{"class_path": "tests.tiny.Counting"}]}))
    assert int(run.merge.chain("a")[0].seen) == 4 * 4
    assert int(adamerge.load(run.dir, trust=True).chain("a")[0].seen) == 4 * 4


def test_our_own_demo_needs_no_trust(tmp_path):
    run = adamerge.train(
        ROOT / "configs" / "digits.yaml",
        **{"trainer.max_steps": 1, "run.root": str(tmp_path), "run.baselines": False},
    )
    loaded = adamerge.load(run.dir)
    assert loaded({"input": torch.zeros(2, 1, 8, 8)}, task="parity").shape == (2, 2)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "merge.yaml").unlink(), "holds no saved merge"),
        (lambda d: (d / "merge.safetensors").unlink(), "holds no saved merge"),
        (lambda d: (d / "merge.yaml").write_text("format: 99"), "is not of format 2"),
        (lambda d: (d / "merge.yaml").write_text("[1, 2"), "holds no saved merge"),
        (lambda d: (d / "merge.yaml").write_text("!!python/object/apply:os.getcwd []"), "holds no saved merge"),
        (
            lambda d: (d / "merge.yaml").write_text("format: 2"),
            "is cut short or damaged: `weights` is missing; `labels` is missing; `sources` is missing",
        ),
    ],
)
def test_damaged_artifacts(run, damage, message):
    damage(run.dir / "merge")
    with pytest.raises(InputError, match=message):
        adamerge.load(run.dir / "merge", trust=True)


def test_a_full_disk_leaves_the_old_merge(run, monkeypatch):
    before = {path.name: path.read_bytes() for path in (run.dir / "merge").iterdir()}

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(artifact, "save_file", full)
    with pytest.raises(InputError, match=r"No space left on the disk of .* while saving merge"):
        artifact.save(run.dir / "merge", run.learned, {})
    assert {path.name: path.read_bytes() for path in (run.dir / "merge").iterdir()} == before
    assert [path.name for path in run.dir.iterdir() if ".tmp" in path.name or ".old" in path.name] == []


@pytest.mark.slow
def test_a_killed_save_leaves_old_or_none(tmp_path):
    """The process ends at every point of the save in turn; what stands there is whole or absent."""
    target = tmp_path / "merge"
    for point in range(3):
        shutil.rmtree(target, ignore_errors=True)
        with atomic_dir(target) as new:
            (new / "x").write_text("old")
        code = f"""
import os, pathlib
from adamerge.files import atomic_dir
point, renames = {point}, 0
rename = pathlib.Path.rename
def dying(self, other):
    global renames
    renames += 1
    if renames > point: os._exit(9)
    return rename(self, other)
pathlib.Path.rename = dying
with atomic_dir(pathlib.Path({str(target)!r})) as new:
    (new / "x").write_text("new")
"""
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=point == 2)
        assert not target.exists() or (target / "x").read_text() == ("new" if point == 2 else "old")
