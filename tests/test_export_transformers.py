"""A merge of models of transformers as a folder that transformers loads alone."""

import json
import logging
import os
import shutil

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

import adamerge
from adamerge import Recipe, UnlabeledTasks, backbones
from adamerge.backbones import folder as module
from adamerge.backbones.classifiers import Classifier
from adamerge.objectives import FeatureDistillation
from adamerge.task_modules import Surgery, Tint
from adamerge.types import InputError
from tests.checkpoints_hf import CLASSES, Pictures, Texts, write

QUIET = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False, "max_steps": 1}
TEXT, IMAGE = "AutoModelForSequenceClassification", "AutoModelForImageClassification"
# by a name: the kind of network, the auto class of a task's folder (or of the whole), the backbone, the samples
KINDS = {
    **{kind: (kind, TEXT, "TextClassifier", Texts) for kind in ("bert", "distilbert", "roberta", "deberta", "gpt2")},
    **{kind: (kind, IMAGE, "ImageClassifier", Pictures) for kind in ("vit", "resnet")},
    "tokens": ("bert", "AutoModelForTokenClassification", "TokenClassifier", Texts),
    "clip": ("clip", "AutoModel", "CLIP", Pictures),
    "sentences": ("bert", "AutoModel", "SentenceEncoder", Texts),
    "t5": ("t5", "AutoModelForSeq2SeqLM", "Seq2Seq", Texts),
}


@pytest.fixture(scope="module")
def pools(tmp_path_factory):
    root, made = tmp_path_factory.mktemp("pools"), {}

    def of(name):
        kind, auto, *_ = KINDS[name]
        if name not in made:
            made[name] = write(root / name, kind, auto)
        return made[name]

    return of


@pytest.fixture(scope="module")
def runs(pools, tmp_path_factory):
    """Runs by their kind and options, each made once."""
    root, made = tmp_path_factory.mktemp("runs"), {}

    def of(name, *, paths=None, modules=(), **options):
        key = (name, str(paths), tuple(modules), tuple(options))
        if key not in made:
            made[key] = trained(name, paths or pools(name), root / str(len(made)), modules, **options)
        return made[key]

    return of


def trained(name, paths, root, modules=(), **options):
    _, _, backbone, data = KINDS[name]
    more = {"labels": False} if name == "sentences" else {"more": "words"} if name == "tokens" else {}
    recipe = Recipe(
        str(paths["base"]),
        {task: str(paths[task]) for task in CLASSES},
        getattr(backbones, backbone)(**options),
        task_modules=modules,
        objectives=[FeatureDistillation()] if name == "sentences" else None,
    )
    tasks = UnlabeledTasks({task: data(task, **more) for task in CLASSES}, batch_size=4, eval_split=None)
    return adamerge.train(recipe, tasks, trainer=QUIET, run={"root": str(root), "baselines": False})


def batch_of(run, name):
    data = KINDS[name][3]
    return run.merge.prepare(data("a").split("test")[:5], task="a")


def theirs(net, run, batch):
    with torch.inference_mode():
        return net.eval()(**run.merge.backbone.inputs(batch)).logits


@pytest.mark.slow_unless("bert", "resnet")
@pytest.mark.parametrize("name", ["bert", "distilbert", "roberta", "deberta", "gpt2", "vit", "resnet"])
def test_each_task_s_folder_is_a_whole_model(name, runs, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHARD", "2KB")
    run, out = runs(name), tmp_path / "out"
    exported = adamerge.export(run.dir, out)
    told = json.loads((out / "export.json").read_text())
    assert told["max_relative_difference"] == exported.difference <= 1e-5
    assert (told["dtype"], told["run"]) == ("float32", run.dir.name)
    whole = transformers.AutoModel.from_pretrained(out)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    batch = batch_of(run, name)
    body = dict(whole.named_parameters())
    for task, names in CLASSES.items():
        home = out / "tasks" / task
        net, info = getattr(transformers, KINDS[name][1]).from_pretrained(home, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert net.config.id2label == dict(enumerate(names))
        assert net.config.label2id == {label: number for number, label in enumerate(names)}
        assert net.config.architectures == [type(net).__name__]
        live = run.merge(batch, task=task)
        torch.testing.assert_close(theirs(net, run, batch), live, rtol=1e-4, atol=1e-5)
        own = dict(net.base_model.named_parameters())
        assert all(torch.equal(own[key], body[key]) for key in set(own) & set(body))
        assert set(own) & set(body)
        shared = [file for file in home.glob("*.safetensors") if file.stat().st_nlink == 1 + len(CLASSES)]
        assert len(shared) == len(list(home.glob("*.safetensors"))) - 1
        auto = transformers.AutoTokenizer if name not in ("vit", "resnet") else transformers.AutoImageProcessor
        auto.from_pretrained(home)
    assert disk(out) < 1.6 * sum(file.stat().st_size for file in out.glob("*.safetensors"))


def disk(folder):
    """Bytes of weights, those under several names once."""
    sizes = {file.stat().st_ino: file.stat().st_size for file in folder.rglob("*.safetensors")}
    return sum(sizes.values())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["roberta", "clip", "t5"])
def test_half_precision(name, dtype, runs, tmp_path):
    run, out = runs(name), tmp_path / "out"
    assert 0 < adamerge.export(run.dir, out, dtype=dtype).difference < 0.1
    homes = [out / "tasks" / task for task in CLASSES] if name == "roberta" else [out]
    for home in homes:
        told = json.loads((home / "config.json").read_text())
        assert told.get("dtype", told.get("torch_dtype")) == dtype
        states = [load_file(file) for file in home.glob("model*.safetensors")]
        kinds = {key: t.dtype for state in states for key, t in state.items() if t.is_floating_point()}
        kinds.pop("logit_scale", None)
        assert set(kinds.values()) == {getattr(torch, dtype)}
        net = getattr(transformers, KINDS[name][1]).from_pretrained(home, dtype="auto")
        assert net.dtype == getattr(torch, dtype)


@pytest.mark.parametrize("name", ["bert", "distilbert", "roberta"])
def test_trained_heads_go_along(name, runs, tmp_path):
    run = runs(name, train_heads=True)
    before, after = (each.merge.chain("b")[-1].tensors() for each in (runs(name), run))
    assert any(not torch.equal(before[key], after[key]) for key in before)
    assert len(before) > 2 or name == "bert"
    adamerge.export(run.dir, tmp_path / "out")
    net = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "tasks" / "b")
    batch = batch_of(run, name)
    torch.testing.assert_close(theirs(net, run, batch), run.merge(batch, task="b"), rtol=1e-4, atol=1e-5)


def spoiled(what):
    """An export that writes something else: of the shared body, of a task's last layer or of its inner one."""
    real = Classifier.export

    def export(self, net, base, folder, heads):
        real(self, net, base, folder, heads)
        files = {"body": folder / "model.safetensors"} | {
            "head": folder / "tasks" / "b" / "model-00002-of-00002.safetensors"
        }
        if what == "labels":  # the heads of two tasks in each other's place
            for task in CLASSES:
                (folder / "tasks" / task).rename(folder / "tasks" / f"{task}~")
            (folder / "tasks" / "a~").rename(folder / "tasks" / "b")
            (folder / "tasks" / "b~").rename(folder / "tasks" / "a")
            return
        file = files["body" if what == "body" else "head"]
        state = load_file(file)
        last = [key for key in state if ("dense" in key) == (what == "inner")] if what != "body" else list(state)
        state = {key: 1.05 * t if key in last else t for key, t in state.items()}
        save_file(state, file.with_suffix(".new"), {"format": "pt"})
        if what == "body":  # all links at once
            file.write_bytes(file.with_suffix(".new").read_bytes())
            file.with_suffix(".new").unlink()
        else:
            os.replace(file.with_suffix(".new"), file)

    return export


@pytest.mark.parametrize("modules", [(), (Surgery,)])
@pytest.mark.parametrize("what", ["body", "head", "inner", "labels"])
def test_a_wrong_export_is_caught(what, modules, runs, tmp_path, monkeypatch):
    run = runs("roberta", modules=modules)
    monkeypatch.setattr(Classifier, "export", spoiled(what))
    with pytest.raises(InputError, match=r"The export fails its check and was removed: on task '[ab]'"):
        adamerge.export(run.dir, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_crash_in_the_middle_leaves_nothing(runs, tmp_path, monkeypatch):
    run = runs("bert")
    monkeypatch.setattr(module.FolderWriter, "task", lambda *args: 1 / 0)
    with pytest.raises(InputError, match="ZeroDivisionError: division by zero"):
        adamerge.export(run.dir, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", [Surgery, Tint])
def test_modules_beside_the_model(kind, runs, tmp_path, caplog):
    caplog.set_level(logging.WARNING, "adamerge")
    run = runs("bert", modules=(kind,))
    assert adamerge.export(run.dir, tmp_path / "out").difference < 1e-5
    assert f"Task modules do not fold into one dense model: {kind.__name__} goes beside it" in caplog.text
    beside = load_file(tmp_path / "out" / "task_modules.safetensors")
    for task in CLASSES:
        for name, tensor in run.merge.chain(task)[0].state_dict().items():
            assert torch.equal(beside[f"{task}.0.{name}"], tensor)
    assert json.loads((tmp_path / "out" / "tasks.json").read_text())["a"]["task_modules"] == [kind.__name__]
    assert "Task modules, which run beside the merged weights" in (tmp_path / "out" / "README.md").read_text()


def test_a_token_classifier_s_folder(runs, tmp_path):
    adamerge.export(runs("tokens").dir, tmp_path / "out")
    for task, names in CLASSES.items():
        net = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path / "out" / "tasks" / task)
        assert net.config.id2label == dict(enumerate(names))


def test_the_root_of_the_others_is_the_whole_model(runs, tmp_path):
    for name in ("clip", "sentences", "t5"):
        run, out = runs(name), tmp_path / name
        assert adamerge.export(run.dir, out).difference < 1e-5
        auto = getattr(transformers, KINDS[name][1])
        net, info = auto.from_pretrained(out, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert type(net).__name__ in net.config.architectures
        assert not (out / "tasks").exists()


@pytest.mark.parametrize("tied", [True, False])
def test_an_output_layer_that_is_no_embedding_stays_one(tied, pools, tmp_path):
    """Flan-T5 has an output layer of its own, which its config.json says."""
    paths = {name: tmp_path / name for name in ("base", *CLASSES)}
    for seed, (name, path) in enumerate(paths.items()):
        shutil.copytree(pools("t5")[name], path)
        told = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**told, "tie_word_embeddings": tied}))
        state = load_file(path / "model.safetensors")
        if not tied:
            generator = torch.Generator().manual_seed(seed)
            noise = torch.randn(state["shared.weight"].shape, generator=generator)
            state["lm_head.weight"] = torch.linspace(-1, 1, 16).repeat(21, 1) + 0.05 * noise
            save_file(state, path / "model.safetensors", {"format": "pt"})
    run, out = trained("t5", paths, tmp_path / "runs"), tmp_path / "out"
    assert adamerge.export(run.dir, out).difference < 1e-5
    assert (json.loads((out / "config.json").read_text()).get("tie_word_embeddings") is False) is not tied
    written = load_file(out / "model.safetensors")
    assert ("lm_head.weight" in written) is not tied
    net = transformers.AutoModelForSeq2SeqLM.from_pretrained(out).eval()
    if not tied:
        assert torch.equal(net.lm_head.weight, written["lm_head.weight"])
    batch = batch_of(run, "t5")
    with torch.inference_mode():
        expected = run.merge.features(batch)
        torch.testing.assert_close(run.merge.backbone.features(net, batch), expected, rtol=1e-4, atol=1e-5)
    loaded = adamerge.load(run.dir)
    with torch.inference_mode():
        assert torch.equal(loaded(batch, task="a"), run.merge(batch, task="a"))


def test_the_card_of_local_sources(pools, tmp_path):
    paths = {name: tmp_path / "made" / name for name in ("base", *CLASSES)}
    for (name, path), licence in zip(paths.items(), ("apache-2.0", "mit", "cc-by-nc-4.0"), strict=True):
        shutil.copytree(pools("bert")[name], path)
        (path / "README.md").write_text(f"---\nlicense: {licence}\n---\n")
    run = trained("bert", paths, tmp_path / "runs")
    adamerge.export(run.dir, tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    card = ModelCard(text)
    assert card.data.base_model is None
    assert card.data.library_name == "transformers"
    assert card.data.license == "other"
    for line in ("- apache-2.0: base", "- mit: expert a", "- cc-by-nc-4.0: expert b (non-commercial", "They conflict"):
        assert line in text
    for file in (tmp_path / "out").rglob("*"):
        if file.is_file():
            assert str(tmp_path).encode() not in file.read_bytes(), file
