"""The embedded zoo: pictures that keep their splits apart, models that open_clip loads, real interference."""

import hashlib
import multiprocessing
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

import adamerge
from adamerge.artifact import open_merge
from adamerge.checkpoints import locate
from adamerge.demo import pictures as drawing
from adamerge.demo import zoo
from adamerge.demo.pictures import TASKS, pictures
from adamerge.files import built_once
from adamerge.types import InputError
from tests.test_command import ROOT, command, finish

TINY = 0.02


@pytest.mark.parametrize("task", TASKS)
def test_pictures_are_a_pure_function_and_splits_share_none(task):
    drawn = {split: pictures(task, split, 60) for split in ("train", "unlabeled", "test", "pretrain")}
    digests = {split: {hashlib.sha256(image).digest() for image in images} for split, (images, _) in drawn.items()}
    for split, (images, labels) in drawn.items():
        again, same = pictures(task, split, 60)
        assert np.array_equal(again, images)
        assert np.array_equal(same, labels)
        assert images.shape == (60, 32, 32, 3)
        counts = np.bincount(labels, minlength=len(TASKS[task].classes))
        assert counts.max() - counts.min() <= 1
        assert len(digests[split]) == 60
        assert images.std(axis=(1, 2, 3)).min() > 3  # nothing blank
        for other in set(digests) - {split}:
            assert not digests[split] & digests[other]


def test_the_fonts_of_the_test_split_are_in_no_other_and_hold_every_glyph():
    from matplotlib import get_data_path
    from matplotlib.ft2font import FT2Font

    training, test = drawing._TRAINING_FONTS, drawing._TEST_FONTS
    assert not set(training) & set(test)
    wanted = {
        "0123456789",
        "ABCDEFGHIJKLMNOPQRSTUVWXYZ",
        "αβγδεζηθικλμνξοπρστυφχψω",
        *drawing._CYRILLIC,
        *drawing._SYMBOLS,
    }
    for font in (*training, *test):
        held = FT2Font(str(Path(get_data_path()) / "fonts" / "ttf" / f"{font}.ttf")).get_charmap()
        assert not [character for text in wanted for character in text if ord(character) not in held]


def test_another_task_or_model_is_refused():
    with pytest.raises(InputError, match="The zoo has the tasks scans, numbers"):
        pictures("dogs", "test", 1)
    with pytest.raises(InputError, match="The zoo has no 'dogs'; it has base, scans"):
        locate("demo:zoo/dogs")
    with pytest.raises(InputError, match="There is no demo pool 'farm'; there are digits, zoo"):
        locate("demo:farm/cow")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A zoo of very little effort, twice."""
    folders = [tmp_path_factory.mktemp(name) for name in ("first", "second")]
    for folder in folders:
        zoo.build(folder, effort=TINY)
    return folders


def test_the_same_seed_gives_the_same_bits(built):
    first, second = (
        {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*.safetensors")} for folder in built
    )
    assert len(first) == 1 + len(TASKS)
    assert first == second


def test_the_models_are_open_clips(built):
    clip, _, _ = open_clip.create_model_and_transforms(f"local-dir:{built[0]}/base", require_pretrained=True)
    base = load_file(built[0] / "base" / "open_clip_model.safetensors")
    expert = load_file(built[0] / "latin" / "open_clip_model.safetensors")
    assert set(base) == set(expert) == set(clip.state_dict())
    changed = {name for name in base if not torch.equal(base[name], expert[name])}
    assert changed
    assert all(name.startswith("visual.") for name in changed)


def build_slowly(folder):
    (folder / "model").write_text("whole")
    (folder / "built").write_text(str(multiprocessing.current_process().pid))


def _locate(target, queue):
    queue.put((built_once(target, build_slowly) / "built").read_text())


def test_two_processes_build_once(tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=_locate, args=(tmp_path / "zoo", queue)) for _ in range(2)]
    for process in processes:
        process.start()
    assert queue.get(timeout=30) == queue.get(timeout=30)
    for process in processes:
        process.join()


@pytest.mark.parametrize("damage", ["cut", "lost", "manifest"])
def test_a_cache_cut_in_half_is_built_again(tmp_path, damage, caplog):
    folder = built_once(tmp_path / "zoo", build_slowly)
    built_once(tmp_path / "zoo", lambda new: pytest.fail("built twice"))
    if damage == "cut":
        (folder / "model").write_text("wh")
    else:
        (folder / ("model" if damage == "lost" else "manifest.json")).unlink()
    with caplog.at_level("WARNING", "adamerge"):
        assert (built_once(tmp_path / "zoo", build_slowly) / "model").read_text() == "whole"
    assert "is not whole and is made again" in caplog.text


@pytest.mark.parametrize("library", ["safetensors", "python"])
def test_a_full_disk_is_one_clear_error(tmp_path, library):
    """`/dev/full` is a disk without room: what is written to it fails as on one."""

    def fills(folder):
        if library == "safetensors":  # in its own words, as found on a full disk
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        (folder / "model").symlink_to("/dev/full")
        (folder / "model").write_bytes(bytes(100_000))

    with pytest.raises(InputError, match=r"No space left on the disk of .* while saving zoo"):
        built_once(tmp_path / "zoo", fills)
    assert not (tmp_path / "zoo").exists()


def test_a_build_that_dies_leaves_nothing_that_looks_whole(tmp_path):
    def dies(folder):
        (folder / "model").write_text("wh")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        built_once(tmp_path / "zoo", dies)
    assert not (tmp_path / "zoo").exists()
    assert (built_once(tmp_path / "zoo", build_slowly) / "model").read_text() == "whole"


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo's command with two steps: baselines and experts are scored in full."""
    root = tmp_path_factory.mktemp("runs")
    return adamerge.train(ROOT / "configs" / "demo.yaml", **{"trainer.max_steps": 2, "run.root": str(root)})


def mean(scores):
    return sum(scores.values()) / len(scores)


def test_the_experts_are_good_and_their_average_is_not(demo):
    experts = {task: demo.scores[f"expert {task}"][task] for task in TASKS}
    assert mean(experts) >= 0.9
    assert mean(demo.scores["average"]) <= mean(experts) - 0.15
    assert mean(demo.scores["base"]) < mean(demo.scores["average"])


def test_the_learned_merge_answers_for_raw_images(demo):
    """`prepare` and `classes`: from a picture to a word, with the accuracy that the run reports."""
    merge = adamerge.load(demo.dir)
    samples = adamerge.data.HFDataset("demo:zoo/data/scans").split("test")
    right = 0
    for start in range(0, len(samples), 250):
        rows = [samples[index] for index in range(start, start + 250)]
        with torch.no_grad():
            logits = merge(merge.prepare([{"image": row["image"]} for row in rows]), task="scans")
        right += int((logits.argmax(1) == torch.tensor([row["label"] for row in rows])).sum())
    assert right / len(samples) == pytest.approx(demo.scores["this merge"]["scans"])
    assert merge.classes("scans")[3] == "the digit three"


def test_two_ranks_learn_what_one_learns(tmp_path):
    options = {"trainer.max_steps": 5, "run.baselines": False, "data.eval_split": None, "run.root": str(tmp_path)}
    one = adamerge.train(ROOT / "configs" / "demo.yaml", **options).learned.rule.raw_TG
    ddp = ["--trainer.devices", 2, "--trainer.strategy", "ddp", "--data.batch_size", 8, "--run.dir", tmp_path / "two"]
    shared = [part for key, value in options.items() for part in (f"--{key}", "null" if value is None else str(value))]
    finish(command("--config", ROOT / "configs" / "demo.yaml", *shared, *ddp))
    two = open_merge(tmp_path / "two").rule.raw_TG
    assert (one - 0.3).abs().max() > 1e-3
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5)  # sums in another order
