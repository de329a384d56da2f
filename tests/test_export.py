"""A merge as a folder that open_clip loads alone; a tiny CLIP stands for real ones."""

import json

import open_clip
import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import adamerge
from adamerge.backbones import OpenCLIP
from adamerge.data import UnlabeledTasks
from adamerge.data.base import TaskData
from adamerge.demo.zoo import MODEL, PREPROCESS
from adamerge.rescore import rescore
from adamerge.task_modules import TaskModule
from adamerge.types import InputError

TINY = {**MODEL, "text_cfg": {**MODEL["text_cfg"], "width": 16, "layers": 1}}
SIZE = MODEL["vision_cfg"]["image_size"]
CLASSES = {"cats": ["a lion", "a tiger", "a lynx", "a puma", "a cat", "an ocelot"], "dogs": ["a husky", "a poodle"]}
TEMPLATES = {"cats": ["a photo of {}.", "{} in the wild."], "dogs": ["a drawing of {}."]}


class Pictures(TaskData):
    """Random pictures as the network takes them."""

    def __init__(self, task: str, *, classes: list[str] | None = None) -> None:
        self._task, self._classes = task, classes or CLASSES[task]

    @property
    def classes(self):
        return self._classes

    def split(self, name):
        if name not in ("train", "test", "val"):
            raise InputError(f"There is no split '{name}'.")
        generator = torch.Generator().manual_seed(len(name) + len(self._task))
        images = torch.randint(256, (12, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8)
        return [{"image": image, "label": n % len(CLASSES[self._task])} for n, image in enumerate(images)]


class Offset(TaskModule):
    """A task module that cannot fold."""

    def __init__(self, task) -> None:
        super().__init__(task)
        self.offset = nn.Parameter(torch.zeros(MODEL["embed_dim"]))

    def forward(self, features: Tensor) -> Tensor:
        return features + self.offset


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A base and two experts whose image towers differ from it, in open_clip's hub layout."""
    root = tmp_path_factory.mktemp("clips")
    torch.manual_seed(0)
    base = open_clip.CLIP(**TINY).state_dict()
    for seed, name in enumerate(("base", *CLASSES)):
        (root / name).mkdir()
        generator = torch.Generator().manual_seed(seed)
        moved = {
            key: t + 0.1 * t.std() * torch.randn(t.shape, generator=generator)
            if name != "base" and key.startswith("visual.") and t.dim() > 1
            else t
            for key, t in base.items()
        }
        save_file(
            {key: t.clone().contiguous() for key, t in moved.items()}, root / name / "open_clip_model.safetensors"
        )
        config = {"model_cfg": TINY, "preprocess_cfg": PREPROCESS}
        (root / name / "open_clip_config.json").write_text(json.dumps(config))
    return root


def clip_config(clips, root, **model):
    return {
        "model": {
            "base": str(clips / "base"),
            "experts": {task: str(clips / task) for task in CLASSES},
            "backbone": {
                "class_path": "adamerge.backbones.OpenCLIP",
                "init_args": {"model": str(clips / "base"), "templates": TEMPLATES},
            },
            **model,
        },
        "data": {
            "tasks": {
                task: {"class_path": "tests.test_export.Pictures", "init_args": {"task": task}} for task in CLASSES
            },
            "batch_size": 4,
        },
        "trainer": {"max_steps": 2, "accelerator": "cpu", "devices": 1},
        "run": {"baselines": False, "root": str(root)},
    }


@pytest.fixture(scope="module")
def run(clips, tmp_path_factory):
    """Two steps of a merge of both experts."""
    return adamerge.train(clip_config(clips, tmp_path_factory.mktemp("runs")))


def theirs(folder, task, pixels):
    """Logits by open_clip alone, as its own examples make them."""
    clip, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    clip.eval()
    told = json.loads((folder / "tasks.json").read_text())[task]
    with torch.no_grad():
        head = open_clip.build_zero_shot_classifier(
            clip, open_clip.get_tokenizer(f"local-dir:{folder}"), told["classes"], told["templates"]
        )
        mean, std = (torch.tensor(PREPROCESS[key])[:, None, None] for key in ("mean", "std"))
        features = clip.encode_image((pixels / 255 - mean) / std, normalize=True)
        return clip.logit_scale.exp() * features @ head


def pixels():
    return torch.stack([sample["image"] for sample in Pictures("cats").split("test")])


def test_open_clip_alone_gives_the_live_logits(run, tmp_path):
    out = tmp_path / "out"
    exported = adamerge.export(run.dir, out)
    assert exported.dir == out
    told = json.loads((out / "export.json").read_text())
    assert told["max_relative_difference"] == exported.difference <= 1e-5
    assert told["dtype"] == "float32"
    assert told["run"] == run.dir.name
    assert told["versions"]["open_clip_torch"] == open_clip.__version__
    assert str(run_source(run).parent) not in (out / "merge.yaml").read_text()
    assert not (out / "task_modules.safetensors").exists()
    for task in CLASSES:
        live = run.merge({"image": pixels()}, task=task)
        torch.testing.assert_close(theirs(out, task, pixels()), live, rtol=1e-5, atol=1e-4)
    base = load_file(run_source(run) / "open_clip_model.safetensors")
    written = load_file(out / "open_clip_model.safetensors")
    assert set(written) == set(base)
    changed = {name for name in base if not torch.equal(base[name], written[name])}
    assert changed
    assert all(name.startswith("visual.") for name in changed)


def run_source(run):
    record = yaml.safe_load((run.dir / "merge" / "merge.yaml").read_text())
    return type(run.dir)(record["sources"]["base"]["source"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_measured(run, tmp_path, dtype):
    exported = adamerge.export(run.dir, tmp_path / "out", dtype=dtype)
    assert 1e-6 < exported.difference < 0.1
    assert dtype in str(exported)
    written = load_file(tmp_path / "out" / "open_clip_model.safetensors")
    kinds = {name: t.dtype for name, t in written.items() if t.is_floating_point()}
    assert kinds.pop("logit_scale") == torch.float32
    assert set(kinds.values()) == {getattr(torch, dtype)}
    live = run.merge({"image": pixels()}, task="cats")
    assert (theirs(tmp_path / "out", "cats", pixels()) - live).abs().max() < 0.1 * live.abs().max()


def test_task_modules_stand_beside_the_model(clips, tmp_path, caplog):
    config = clip_config(clips, tmp_path / "runs", task_modules=[{"class_path": "tests.test_export.Offset"}])
    run = adamerge.train(config)
    with pytest.raises(InputError, match=r"tests.test_export.Offset', which is not part of adamerge.*--trust"):
        adamerge.export(run.dir, tmp_path / "out")
    exported = adamerge.export(run.dir, tmp_path / "out", trust=True)
    assert exported.difference <= 1e-5
    assert "Task modules do not fold into one dense model: Offset goes beside it" in caplog.text
    beside = load_file(tmp_path / "out" / "task_modules.safetensors")
    assert set(beside) == {"cats.0.offset", "dogs.0.offset"}
    live = run.merge.chain("cats")[0].offset
    assert torch.equal(beside["cats.0.offset"], live)
    assert live.abs().max() > 0
    assert json.loads((tmp_path / "out" / "tasks.json").read_text())["cats"]["task_modules"] == ["Offset"]


def test_an_existing_folder_is_left_alone(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(InputError, match=r"out exists already and is not overwritten"):
        adamerge.export(run.dir, tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]


EXPORT = OpenCLIP.export


def other_network(self, net, base, folder, heads):
    with torch.no_grad():
        next(p for p in net.parameters() if p.dim() > 1)[0].mul_(1.01)
    EXPORT(self, net, base, folder, heads)


def other_text(self, net, base, folder, heads):
    EXPORT(self, net, base, folder, heads)
    state = load_file(folder / "open_clip_model.safetensors")
    state["text_projection"] = F.normalize(state["text_projection"] + 0.1)
    save_file(state, folder / "open_clip_model.safetensors")


def not_a_number(self, net, base, folder, heads):
    with torch.no_grad():
        next(p for p in net.parameters() if p.dim() > 1).fill_(torch.nan)
    EXPORT(self, net, base, folder, heads)


@pytest.mark.parametrize("wrong", [other_network, other_text, not_a_number])
def test_a_failed_check_leaves_nothing(run, tmp_path, monkeypatch, wrong):
    monkeypatch.setattr(OpenCLIP, "export", wrong)
    with pytest.raises(InputError, match=r"The export fails its check and was removed: on task 'cats'"):
        adamerge.export(run.dir, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_network_without_a_layout_is_refused(config, tmp_path):
    run = adamerge.train(config())
    with pytest.raises(InputError, match=r"Module, has no layout of another library.*adamerge.load"):
        adamerge.export(run.dir, tmp_path / "out", trust=True)
    assert not (tmp_path / "out").exists()


def test_a_run_made_of_objects_exports_too(clips, tmp_path):
    backbone = OpenCLIP(str(clips / "base"), templates=TEMPLATES)
    recipe = adamerge.Recipe(str(clips / "base"), {task: str(clips / task) for task in CLASSES}, backbone)
    data = UnlabeledTasks({task: Pictures(task) for task in CLASSES}, batch_size=4)
    options = {"max_steps": 2, "accelerator": "cpu", "devices": 1}
    run = adamerge.train(
        recipe, data, trainer=options, run=adamerge.RunOptions(root=str(tmp_path / "runs"), baselines=False)
    )
    assert adamerge.export(run.dir, tmp_path / "out").difference <= 1e-5


def test_a_clip_is_scored_again(run):
    text = rescore(run.dir, device="cpu", trust=True)
    for task, accuracy in run.scores["this merge"].items():
        assert task in text
        assert f"{100 * accuracy:.1f}" in text
