"""Real checkpoints of transformers in, real ones out: each kind of backbone, each layout of the experts, both modes."""

import shutil

import pytest
import torch
import transformers
from PIL import Image

import adamerge
import adamerge.loops
from adamerge import Recipe, UnlabeledTasks, backbones
from adamerge.objectives import Entropy, FeatureDistillation
from adamerge.types import InputError
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
    "clip vision": {"kind": "clip", "auto": "CLIPVisionModel", "base": "AutoModel", "backbone": "CLIP",
                    "data": Pictures},
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


@pytest.mark.slow_unless("vit-full-leaf", "bert-sharded-leaf", "t5-full-leaf")
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


@pytest.mark.slow_unless("roberta")
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


@pytest.mark.slow_unless("bert", "clip")
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


@pytest.mark.parametrize("name", ["clip", "clip vision"])
def test_a_clip_is_merged_as_by_hand(name, pools, tmp_path):
    """The projection too where experts have one; it stays the base's where none has."""
    paths = pools(name)
    run = train(paths, name, tmp_path / "runs")
    load = transformers.CLIPModel.from_pretrained
    base, whole = load(paths["base"]), load(paths["base"])
    kind = load if name == "clip" else transformers.CLIPVisionModel.from_pretrained
    experts = {task: kind(paths[task]).state_dict() for task in CLASSES}
    weights = dict(run.learned.weights())
    assert ("visual_projection.weight" in weights) == (name == "clip")
    rule, space = run.learned.rule, run.learned.vectors.space
    with torch.no_grad():
        for key, tensor in base.state_dict().items():
            found = next((k for k in weights if k == key), None)
            if found is not None:
                moved = [next(v for k, v in state.items() if k == key or key.endswith(f".{k}")) - tensor
                         for state in experts.values()]  # fmt: skip
                coef_T = rule.raw_TG[:, space.group_of[found]]
                merged = tensor + sum(c * tau for c, tau in zip(coef_T, moved, strict=True))
                torch.testing.assert_close(weights[found], merged, rtol=1e-5, atol=1e-6)
                whole.state_dict()[key].copy_(merged)
        batch = run.merge.prepare(Pictures("a").split("test")[:3])
        pixels = run.merge.backbone.inputs(batch)
        found = whole.eval().get_image_features(**pixels)
        expected = getattr(found, "pooler_output", found)
        torch.testing.assert_close(run.merge.features(batch), expected, rtol=1e-4, atol=1e-5)


def test_a_base_without_a_tokenizer_is_refused(pools, tmp_path):
    paths = {name: tmp_path / "pool" / name for name in ("base", *CLASSES)}
    shutil.copytree(pools("bert")["base"].parent, tmp_path / "pool")
    for file in paths["base"].glob("token*"):
        file.unlink()
    with pytest.raises(InputError, match=r"has no tokenizer; put the files of its own there"):
        train(paths, "bert", tmp_path / "runs")


def test_positions_that_are_not_for_tokens_do_not_count(pools):
    backbone = backbones.TextClassifier(str(pools("roberta")["base"]))
    backbone.tokenizer.model_max_length = 10**30
    assert backbone.length == 16
    assert backbone.prepare({"text": "ant " * 99})["input_ids"].shape == (16,)


@pytest.mark.parametrize("mode", ["I;16", "L", "RGBA", "P"])
def test_pictures_of_any_mode_are_what_the_processor_makes_of_them(mode, pools):
    backbone = backbones.ImageClassifier(str(pools("vit")["base"]))
    grey = torch.arange(256, dtype=torch.uint8).view(16, 16).numpy()
    picture = Image.fromarray(grey).convert(mode) if mode != "I;16" else Image.fromarray(grey.astype("uint16") << 8)
    found = backbone.inputs({"pixel_values": backbone.prepare({"image": picture})["pixel_values"][None]})
    plain = Image.fromarray(grey) if mode == "I;16" else picture
    expected = torch.as_tensor(backbone.processor(plain.convert("RGB"))["pixel_values"][0])
    torch.testing.assert_close(found["pixel_values"][0], expected.float(), rtol=0, atol=1e-5)
