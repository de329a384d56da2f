"""Merges that earlier releases wrote load and answer as they did; `tests/golden/make_merges.py` says how they came."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import adamerge
from adamerge import artifact, files
from adamerge.learnables import learnables_of
from adamerge.types import InputError

ROOT = Path(__file__).parent / "golden" / "merges"
MERGES = sorted(path.parent for path in ROOT.glob("*/*/merge.yaml"))
FAMILIES = {
    *("task_wise", "layer_wise", "concrete", "surgery", "surgery_deep", "tint", "text_classifier", "open_clip"),
}
# Other machines and versions of torch add in another order: fp32 keeps seven digits, of which the cancellation between
# logits up to 25 takes two. A coefficient that moves by a thousandth shows.
NEAR = {"rtol": 1e-4, "atol": 1e-5}


def name_of(folder):
    return folder.relative_to(ROOT).as_posix()


every = pytest.mark.parametrize("folder", MERGES, ids=name_of)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("ADAMERGE_CACHE", str(tmp_path / "cache"))


def load(folder, monkeypatch):
    """Records name their sources relative to the working directory."""
    monkeypatch.chdir(folder.parent / "sources")
    return adamerge.load(folder, trust=True)


def recorded(folder):
    """For each task the batch and the logits."""
    tensors = load_file(folder / "answers.safetensors")
    tasks = sorted(name.removeprefix("logits.") for name in tensors if name.startswith("logits."))

    def batch(task):
        return {n.removeprefix(f"input.{task}."): t for n, t in tensors.items() if n.startswith(f"input.{task}.")}

    return {task: (batch(task), tensors[f"logits.{task}"]) for task in tasks}


@torch.inference_mode()
def compare(merge, folder):
    for task, (batch, logits) in recorded(folder).items():
        torch.testing.assert_close(merge(batch, task=task), logits, **NEAR)


def copied(folder, tmp_path):
    """The merge and its sources, to be changed."""
    for each in (folder, folder.parent / "sources"):
        shutil.copytree(each, tmp_path / each.name)
    return tmp_path / folder.name


def moved(tensor):
    """Each number otherwise: what is normalised would not show a shift that all share."""
    noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0))
    return tensor + 0.1 * noise.to(tensor.dtype) if tensor.is_floating_point() else tensor + 1


def test_every_family_of_the_first_release_is_there():
    assert {path.name for path in MERGES if path.parent.name == "0.1.0"} >= FAMILIES
    assert sum(path.stat().st_size for path in ROOT.rglob("*") if path.is_file()) <= 8_000_000


@every
def test_it_loads_and_answers_as_when_it_was_written(folder, monkeypatch):
    merge = load(folder, monkeypatch)
    assert sorted(merge.tasks) == sorted(recorded(folder))
    compare(merge, folder)


@pytest.mark.parametrize("folder", [path for path in MERGES if (path / "samples.json").exists()], ids=name_of)
def test_samples_are_prepared_as_they_were(folder, monkeypatch):
    merge = load(folder, monkeypatch)
    for task, samples in json.loads((folder / "samples.json").read_text()).items():
        batch, _ = recorded(folder)[task]
        prepared = merge.prepare(samples, task=task)
        assert prepared.keys() == batch.keys()
        assert all(torch.equal(prepared[name], batch[name]) for name in batch)


@every
def test_each_learnable_shows_in_the_answers(folder, monkeypatch):
    """Else the comparison above would prove little."""
    monkeypatch.chdir(folder.parent / "sources")
    merge = artifact.open_merge(folder, trust=True)
    for tensor, _ in learnables_of(merge).values():
        kept = tensor.detach().clone()
        tensor.data.copy_(moved(kept))
        with pytest.raises(AssertionError, match="not close"):
            compare(merge, folder)
        tensor.data.copy_(kept)
    compare(merge, folder)


@every
def test_changed_learnables_are_refused_or_seen(folder, tmp_path, monkeypatch):
    changed = copied(folder, tmp_path)
    weights = {name: moved(tensor) for name, tensor in load_file(changed / "merge.safetensors").items()}
    save_file(weights, changed / "merge.safetensors")
    with pytest.raises(InputError, match=r"is not the file that merge.yaml was written with"):
        load(changed, monkeypatch)
    record = yaml.safe_load((changed / "merge.yaml").read_text(encoding="utf-8"))
    record["weights"] = files.digest(changed / "merge.safetensors")
    (changed / "merge.yaml").write_text(yaml.safe_dump(record), encoding="utf-8")
    with pytest.raises(AssertionError, match="not close"):
        compare(load(changed, monkeypatch), folder)


@every
def test_a_changed_source_is_refused(folder, tmp_path, monkeypatch):
    changed = copied(folder, tmp_path)
    record = yaml.safe_load((changed / "merge.yaml").read_text(encoding="utf-8"))
    for who, entry in record["sources"].items():
        path = tmp_path / "sources" / entry["source"].removeprefix("local-dir:")
        (file,) = path.glob("*.safetensors") if path.is_dir() else [path]
        before = file.read_bytes()
        save_file({name: moved(tensor) for name, tensor in load_file(file).items()}, file)
        with pytest.raises(InputError, match=rf"The {who} \(.*\) has changed since the merge was learned"):
            load(changed, monkeypatch)
        file.write_bytes(before)
    compare(load(changed, monkeypatch), folder)
