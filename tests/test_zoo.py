"""The embedded zoo: pictures that keep their splits apart, models that open_clip loads, real interference."""

import hashlib
import multiprocessing
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from datasets import load_from_disk
from safetensors import SafetensorError
from safetensors.torch import load_file

import adamerge
from adamerge.artifact import open_merge
from adamerge.checkpoints import locate
from adamerge.demo import pictures as drawing
from adamerge.demo import zoo, zoo_training
from adamerge.demo.pictures import TASKS, pictures
from adamerge.demo.shipped import POOLS
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
def unpacked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zoo")
    zoo.unpack(folder)
    return folder


def test_the_models_are_open_clips(unpacked):
    clip, _, _ = open_clip.create_model_and_transforms(f"local-dir:{unpacked}/base", require_pretrained=True)
    base = load_file(unpacked / "base" / "open_clip_model.safetensors")
    expert = load_file(unpacked / "latin" / "open_clip_model.safetensors")
    assert set(base) == set(expert) == set(clip.state_dict())
    changed = {name for name in base if not torch.equal(base[name], expert[name])}
    assert changed
    assert all(name.startswith("visual.") for name in changed)
    assert all(tensor.dtype == torch.float32 for tensor in expert.values())


@pytest.mark.parametrize("task", TASKS)
def test_the_pictures_are_in_equal_shares_and_both_splits(unpacked, task):
    data = load_from_disk(str(unpacked / "data" / task))
    assert {split: len(data[split]) for split in data} == zoo.SPLITS
    for split in data:
        counts = np.bincount(data[split]["label"], minlength=len(TASKS[task].classes))
        assert counts.max() - counts.min() <= 1
        assert data[split][0]["image"].size == (32, 32)


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_the_shipped_pictures_are_those_that_are_drawn(unpacked, task):
    data = load_from_disk(str(unpacked / "data" / task))
    for split, number in zoo.SPLITS.items():
        images, labels = pictures(task, split, number)
        held = np.stack([np.asarray(image) for image in data[split]["image"]])
        assert np.array_equal(labels, data[split]["label"])
        # other versions of FreeType and Pillow draw edges a little otherwise
        assert np.abs(held.astype(int) - images).mean() < 2


@pytest.mark.slow
def test_training_is_repeatable_and_writes_all_that_is_unpacked(tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        zoo_training.train(tmp_path / name, effort=TINY)
    first, second = ({f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} for name in ("first", "second"))
    assert first == second
    assert first.keys() == {file.name for file in (POOLS / "zoo").iterdir()}
    (tmp_path / "models").mkdir()
    zoo.unpack(tmp_path / "models", tmp_path / "first")


@pytest.mark.slow
def test_an_expert_trained_here_is_the_shipped_one(unpacked):
    """Compared by what it answers: other processors and versions of torch add up in another order."""
    base = load_file(unpacked / "base" / "open_clip_model.safetensors")
    shipped = load_file(unpacked / "numbers" / "open_clip_model.safetensors")
    towers = [open_clip.create_model_and_transforms(f"local-dir:{unpacked}/base")[0].eval() for _ in range(2)]
    towers[0].load_state_dict(shipped)
    towers[1].load_state_dict({**base, **zoo_training.expert("numbers", base)})
    prompts = [zoo.TEMPLATE.format(name) for name in TASKS["numbers"].classes]
    data = load_from_disk(str(unpacked / "data" / "numbers"))["test"]
    pixels = torch.stack([torch.from_numpy(np.array(image)) for image in data["image"]]).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        head = towers[0].encode_text(open_clip.SimpleTokenizer(context_length=16)(prompts), normalize=True)
        answers = [(tower.encode_image(pixels, normalize=True) @ head.T).argmax(1) for tower in towers]
    right = [(answer == torch.tensor(data["label"])).float().mean() for answer in answers]
    assert (answers[0] == answers[1]).float().mean() > 0.95
    assert abs(right[0] - right[1]) < 0.015
    assert min(right) > 0.93


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


@pytest.mark.slow
def test_two_ranks_learn_what_one_learns(tmp_path):
    options = {"trainer.max_steps": 5, "run.baselines": False, "data.eval_split": None, "run.root": str(tmp_path)}
    one = adamerge.train(ROOT / "configs" / "demo.yaml", **options).learned.rule.raw_TG
    ddp = ["--trainer.devices", 2, "--trainer.strategy", "ddp", "--data.batch_size", 8, "--run.dir", tmp_path / "two"]
    shared = [part for key, value in options.items() for part in (f"--{key}", "null" if value is None else str(value))]
    finish(command("--config", ROOT / "configs" / "demo.yaml", *shared, *ddp))
    two = open_merge(tmp_path / "two").rule.raw_TG
    assert (one - 0.3).abs().max() > 1e-3
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5)  # sums in another order
