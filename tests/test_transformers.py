"""Real checkpoints of transformers in, real ones out: each kind of backbone, each layout of the experts, both modes."""

import shutil

import pytest
import torch
import transformers

import adamerge
import adamerge.loops
from adamerge import Recipe, UnlabeledTasks, backbones
from adamerge.objectives import Entropy, FeatureDistillation
from tests.checkpoints_hf import CLASSES, Pictures, Texts, rename, shard, write

QUIET = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False, "max_steps": 2}
PICTURES = {"data": Pictures, "auto": "AutoModelForImageClassification", "backbone": "ImageClassifier"}
TEXTS = {"data": Texts, "auto": "AutoModelForSequenceClassification", "backbone": "TextClassifier"}
# by a name: the kind of network, its auto class, the backbone, the samples
KINDS = {
    **{kind: {**PICTURES, "kind": kind} for kind in ("vit", "dinov2", "convnext", "resnet")},
    **{k: {**TEXTS, "kind": k} for k in ("bert", "distilbert", "roberta", "deberta", "qwen2", "gpt2", "bart")},
    "pairs": {**TEXTS, "kind": "bert", "samples": {"more": "pair"}},
    "clip": {"kind": "clip", "auto": "AutoModel", "backbone": "CLIP", "data": Pictures},
    "clip vision": {"kind": "clip", "auto": "CLIPVisionModel", "base": "AutoModel", "backbone": "CLIP", "data": Pictures},
    "clip classifier": {**PICTURES, "kind": "clip"},
    "tokens": {"kind": "bert", "auto": "AutoModelForTokenClassification", "backbone": "TokenClassifier", "data": Texts,
               "samples": {"more": "words"}},
    "sentences": {"kind": "bert", "auto": "AutoModel", "backbone": "SentenceEncoder", "data": Texts,
                  "objective": FeatureDistillation, "labels": False},
    "t5": {"kind": "t5", "auto": "AutoModelForSeq2SeqLM", "backbone": "Seq2Seq", "data": Texts},
    "t5 targets": {"kind": "t5", "auto": "AutoModelForSeq2SeqLM", "backbone": "Seq2Seq", "data": Texts,
                   "samples": {"more": "target"}},
}  # fmt: skip
MATRIX = ("vit", "clip", "bert", "tokens", "sentences", "t5")  # one for each kind of backbone


@pytest.fixture(scope="module")
def pools(tmp_path_factory):
    """Checkpoints by name and layout, made when first asked for."""
    root, made = tmp_path_factory.mktemp("pools"), {}

    def of(name, layout="full"):
        if (name, layout) not in made:
            folder = root / f"{name}-{layout}".replace(" ", "_")
            if layout == "full":
                options = KINDS[name]
                auto = options["auto"]
                experts = auto if auto.startswith("Auto") else "AutoModel"
                made[name, layout] = write(folder, options["kind"], experts, base_auto=options.get("base"))
                if experts != auto:
                    for task in CLASSES:
                        as_vision_model(made[name, layout][task])
            else:
                shutil.copytree(of(name)["base"].parent, folder)
                for task in CLASSES:
                    shard(folder / task) if layout == "sharded" else rename(folder / task, lambda key: f"model.{key}")
                made[name, layout] = {key: folder / key for key in ("base", *CLASSES)}
        return made[name, layout]

    return of


def as_vision_model(folder):
    """A whole CLIP's checkpoint as that of its vision tower alone."""
    tower = transformers.CLIPVisionModel.from_pretrained(folder)
    shutil.rmtree(folder)
    tower.save_pretrained(folder)


def train(paths, name, root, *, mode="leaf", order="auto", backbone=None, objectives=None, data=None, **trainer):
    options = KINDS[name]
    recipe = Recipe(
        str(paths["base"]),
        {task: str(paths[task]) for task in CLASSES},
        backbone or getattr(backbones, options["backbone"])(),
        apply_mode=mode,
        loop=adamerge.loops.Joint(order=order),
        objectives=objectives or [options.get("objective", Entropy)()],
    )
    tasks = data or {task: options["data"](task, **options.get("samples", {})) for task in CLASSES}
    split = "test" if options.get("labels", True) else None
    unlabeled = UnlabeledTasks(tasks, batch_size=4, eval_split=split, eval_batch_size=8)
    return adamerge.train(recipe, unlabeled, trainer={**QUIET, **trainer}, run={"root": str(root), "baselines": False})


def answers(merge, name):
    """Of each task on the first samples."""
    options = KINDS[name]
    found = {}
    for task in CLASSES:
        samples = options["data"](task, **options.get("samples", {})).split("test")[:5]
        with torch.inference_mode():
            found[task] = merge(merge.prepare(samples, task=task), task=task)
    return found


@pytest.mark.parametrize("mode", ["leaf", "swap"])
@pytest.mark.parametrize("layout", ["full", "sharded", "prefixed"])
@pytest.mark.parametrize("name", MATRIX)
def test_it_trains_saves_loads_exports_and_loads_again(name, layout, mode, pools, tmp_path):
    paths = pools(name, layout)
    run = train(paths, name, tmp_path / "runs", mode=mode)
    start = run.learned.rule.raw_TG.detach()
    assert (start != 0.3).any(1).all()
    expected = answers(run.merge, name)
    loaded = answers(adamerge.load(run.dir), name)
    for task, logits in expected.items():
        torch.testing.assert_close(loaded[task], logits, rtol=0, atol=0)
    assert adamerge.export(run.dir, tmp_path / "out").difference < 1e-5


@pytest.mark.parametrize("name", [name for name in KINDS if name not in MATRIX])
def test_other_architectures_too(name, pools, tmp_path):
    run = train(pools(name), name, tmp_path / "runs")
    expected, loaded = answers(run.merge, name), answers(adamerge.load(run.dir), name)
    assert all(torch.equal(expected[task], loaded[task]) for task in CLASSES)
    assert adamerge.export(run.dir, tmp_path / "out").difference < 1e-5


def test_layouts_of_one_pool_give_one_merge(pools, tmp_path):
    found = [answers(train(pools("bert", each), "bert", tmp_path / each).merge, "bert") for each in
             ("full", "sharded", "prefixed")]  # fmt: skip
    for other in found[1:]:
        for task in CLASSES:
            torch.testing.assert_close(other[task], found[0][task], rtol=0, atol=0)


@pytest.mark.parametrize("name", MATRIX)
def test_the_card_of_an_export_loads_it_without_us(name, pools, tmp_path, capsys, monkeypatch):
    run = train(pools(name), name, tmp_path / "runs")
    out = tmp_path / "out"
    adamerge.export(run.dir, out)
    card = (out / "README.md").read_text()
    code = card.partition("```python\n")[2].partition("```")[0]
    assert "adamerge" not in code
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    Pictures("a").split("test")[0]["image"].save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    exec(code.replace("picture.png", str(tmp_path / "picture.png")), {})
    said = capsys.readouterr().out
    assert said.strip()
    if name in ("bert", "vit", "clip"):
        assert any(label in said for label in CLASSES["a"])
