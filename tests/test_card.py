"""Model cards, read back as the hub reads them."""

import logging

import pytest
from huggingface_hub import ModelCard

import adamerge
from adamerge.artifact import read_record
from adamerge.card import model_card

SHA = "0123456789abcdef" * 4
COMMIT = "f" * 40


def record_of(**changes):
    def images(path, name=None):
        return {"class_path": "adamerge.data.images.HFDataset", "init_args": {"path": path, "name": name}}

    return {
        "sources": {
            "base": {"source": "hf-hub:org/base", "sha256": SHA, "revision": COMMIT},
            "expert sv_hn": {"source": "org/svhn@v1", "sha256": "a" * 64},
            "expert cars": {"source": "/home/me/secret/cars.safetensors", "sha256": "b" * 64},
            "head cars": {"source": "/home/me/secret/head.safetensors", "sha256": "c" * 64},
        },
        "backbone": {
            "class_path": "adamerge.backbones.OpenCLIP",
            "init_args": {"model": "/home/me/secret/base", "heads": {"cars": "/home/me/secret/head.safetensors"}},
        },
        "rule": {"class_path": "adamerge.rules.LayerWise", "init_args": {"init": 0.3, "activation": "clamp_ste"}},
        "transforms": [{"class_path": "adamerge.transforms.Trim", "init_args": {"keep": 0.2}}],
        "task_modules": [{"class_path": "adamerge.task_modules.Surgery", "init_args": {"rank": 16}}],
        "objectives": [{"class_path": "adamerge.objectives.Entropy", "init_args": {"weight": 1.0, "other": None}}],
        "space": {"group": "block", "skip": None, "buffers": "base"},
        "left_out": {"visual.proj": "not reached by the loss"},
        "classes": {"sv_hn": ["0", "1"], "cars": ["x"]},
        "folds": False,
        "seed": 7,
        "split": "unlabeled",
        "data": {
            "class_path": "adamerge.data.unlabeled.UnlabeledTasks",
            "init_args": {
                "tasks": {"sv_hn": images("ufldl/svhn", "cropped_digits"), "cars": images("/home/me/secret/cars")},
                "split": "unlabeled",
                "eval_split": "test",
            },
        },
        "init_from": "/home/me/secret/runs/before",
        "steps": 500,
        "finished": True,
        "cost": {"learnables": 12345},
        "scores": {
            "base": {"sv_hn": 0.5, "cars": 0.25},
            "TIES": {"sv_hn": 0.6, "cars": 0.5},
            "expert sv_hn": {"sv_hn": 0.9},
            "expert cars": {"cars": 0.8},
            "this merge": {"sv_hn": 0.75, "cars": 0.625},
        },
        "versions": {"adamerge": "0.1.0", "torch": "2.15.0"},
        **changes,
    }


def card_of(record=None, *, licences=None, name="merge-of-two", **options):
    record = record_of() if record is None else record
    text = model_card(record, name=name, licences=licences or {}, **options)
    assert "/home" not in text
    assert "secret" not in text
    return ModelCard(text)


def test_the_front_matter_is_read_back():
    alike = dict.fromkeys(("base", "expert sv_hn", "expert cars", "head cars"), "MIT")
    data = card_of(licences=alike, library_name="open_clip").data
    assert data.base_model == ["org/base", "org/svhn"]
    assert data.base_model_relation == "merge"
    assert data.library_name == "open_clip"
    assert data.tags == ["merge", "adamerge"]
    assert data.datasets == ["ufldl/svhn"]
    assert data.license == "mit"
    assert data.license_name is None
    assert data.model_name == "merge-of-two"
    results = {result.dataset_name: result for result in data.eval_results}
    assert {task: result.metric_value for task, result in results.items()} == {"sv_hn": 0.75, "cars": 0.625}
    svhn, cars = results["sv_hn"], results["cars"]
    assert (svhn.task_type, svhn.dataset_type, svhn.dataset_config, svhn.dataset_split) == (
        *("image-classification", "ufldl/svhn"),
        *("cropped_digits", "test"),
    )
    assert (cars.dataset_type, cars.metric_type, cars.metric_name) == ("cars", "accuracy", "Accuracy")


@pytest.mark.parametrize(
    ("backbone", "task_type"),
    [
        ("TextClassifier", "text-classification"),
        ("TokenClassifier", "token-classification"),
        ("Seq2Seq", "text-generation"),
        ("SentenceEncoder", "sentence-similarity"),
        ("ImageClassifier", "image-classification"),
        ("CLIP", "image-classification"),
        ("Module", "image-classification"),  # as the data are taken for
    ],
)
def test_the_kind_of_task_is_the_backbones(backbone, task_type):
    card = card_of(record_of(backbone={"class_path": f"adamerge.backbones.{backbone}", "init_args": {}}))
    assert {result.task_type for result in card.data.eval_results} == {task_type}


def test_the_text_says_what_was_done():
    text = card_of().text
    for line in (
        "# merge-of-two",
        "for the tasks sv\\_hn, cars.",
        "- Rule: `LayerWise` (init: 0.3, activation: clamp\\_ste)",
        "- Coefficients: one for each task and block",
        "- Transforms of the task vectors: `Trim` (keep: 0.2)",
        "- Task modules: `Surgery` (rank: 16)",
        "- Objectives: `Entropy` (weight: 1.0)",
        "- Backbone: OpenCLIP",
        "- Started from: before",
        "- Tensors not merged: visual.proj",
        "- Steps: 500",
        "- Learned numbers: 12,345",
        "- Seed: 7",
        "Task modules, which run beside the merged weights, belong to it. It was adapted on the split `unlabeled`.",
        "Accuracy in % on the split `test`.",
        "|  | sv\\_hn | cars | mean |",
        "| base | 50.0 | 25.0 | 37.5 |",
        "| TIES | 60.0 | 50.0 | 55.0 |",
        "| experts | 90.0 | 80.0 | 85.0 |",
        "| this merge | 75.0 | 62.5 | 68.8 |",
        "| base | [org/base](https://huggingface.co/org/base) | `ffffffffffff` | `0123456789ab` | unknown |",
        "| expert sv\\_hn | [org/svhn](https://huggingface.co/org/svhn) | `v1` | `aaaaaaaaaaaa` | unknown |",
        "| expert cars | cars.safetensors | – | `bbbbbbbbbbbb` | unknown |",
        "adamerge 0.1.0, torch 2.15.0",
    ):
        assert line in text, line
    assert "transductive" not in text


def test_scores_on_the_split_that_was_adapted_on_are_called_transductive():
    data = record_of()["data"]
    data["init_args"]["split"] = "test"
    card = card_of(record_of(split="test", data=data))
    said = "**The scores are transductive**: the merge was adapted on the inputs of the split `test`, which is also"
    assert card.text.count(said) == 2
    assert {result.metric_name for result in card.data.eval_results} == {"Accuracy (transductive)"}


@pytest.mark.parametrize(
    ("licences", "licence", "said"),
    [
        (
            {"org/base": "apache-2.0", "expert sv_hn": "cc-by-nc-4.0", "expert cars": "mit", "head cars": "mit"},
            "other",
            [
                "- apache-2.0: base",
                "- cc-by-nc-4.0: expert sv\\_hn (non-commercial terms bind the merge as well)",
                "- mit: expert cars, head cars",
                "They conflict: the non-commercial terms bind the merge, whatever the others allow.",
            ],
        ),
        (
            {"base": "mit", "org/svhn": "mit", "expert cars": None},
            "other",
            ["- mit: base, expert sv\\_hn", "- unknown: expert cars, head cars", "Where a licence is unknown, find it"],
        ),
        (
            {"base": "mit", "expert sv_hn": "llama3.1", "expert cars": "gpl-3.0", "head cars": "cc-by-nd-4.0"},
            "other",
            ["llama3.1: expert sv\\_hn (it has terms of its own", "gpl-3.0: expert cars (changed", "forbids sharing"],
        ),
        ({}, "unknown", ["The licences of the sources are unknown: find them out."]),
        (
            dict.fromkeys(record_of()["sources"], "cc-by-nc-4.0"),
            "cc-by-nc-4.0",
            ["All sources are under cc-by-nc-4.0 (n"],
        ),
    ],
)
def test_licences(licences, licence, said):
    card = card_of(licences=licences)
    assert card.data.license == licence
    assert card.data.license_name == ("several-see-licences" if licence == "other" else None)
    for line in said:
        assert line in card.text
    assert ("conflict" in card.text) == any(" conflict" in line for line in said)


def test_how_to_load_and_files():
    text = card_of(load="import adamerge\nadamerge.load('org/merge')", files="- `model.safetensors`: the merge").text
    assert "## How to load\n\n```python\nimport adamerge\nadamerge.load('org/merge')\n```" in text
    assert "## Files\n\n- `model.safetensors`: the merge" in text
    assert text.count("```") == 2
    own = "Like this:\n```bash\nls\n```"
    assert f"## How to load\n\n{own}\n" in card_of(load=own).text
    assert "## Files" not in card_of().text


def test_nothing_scored_and_no_hub_sources():
    sources = {who: {"source": f"/home/me/secret/{who}.pt", "sha256": SHA} for who in ("base", "expert cars")}
    card = card_of(record_of(scores={}, sources=sources, split=None, data="<Data>", finished=False))
    assert card.data.base_model is None
    assert card.data.eval_results is None
    assert card.data.datasets is None
    assert "model-index" not in str(card)
    assert "Nothing was scored." in card.text
    assert "**The run that made it was not finished.**" in card.text
    assert "| base | base.pt | – |" in card.text


def test_tasks_of_one_data_set_keep_their_results_apart():
    data = record_of()["data"]
    one = {"class_path": "adamerge.data.images.HFDataset", "init_args": {"path": "org/both"}}
    data["init_args"]["tasks"] = {"sv_hn": one, "cars": one}
    results = card_of(record_of(data=data)).data.eval_results
    assert {(r.dataset_name, r.metric_value) for r in results} == {("sv_hn", 0.75), ("cars", 0.625)}


def test_odd_names_break_neither_table_nor_front_matter():
    odd = "a|b: *c*\n# d"
    scores = {"base": {odd: 0.5}, "this merge": {odd: 0.75}}
    record = record_of(scores=scores, classes={odd: ["x"]}, left_out={})
    card = card_of(record, name="a: b\n---\n| c", licences={"base": "x: [y"})
    assert card.data.model_name == "a: b\n---\n| c"
    assert card.data.eval_results[0].dataset_name == odd
    table = [line for line in card.text.splitlines() if line.startswith("| base | 50.0")]
    assert table == ["| base | 50.0 | 50.0 |"]
    assert "|  | a\\|b: \\*c\\* # d | mean |" in card.text


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("demo:zoo/base", "demo:zoo/base"),
        ("open_clip:ViT-B-32/openai", "open\\_clip:ViT-B-32/openai"),
        ("local-dir:/home/me/secret/clip", "clip"),
        ("C:\\secret\\clip.pt", "clip.pt"),
        ("~/secret/clip", "clip"),
        (
            "org/base+org/lora",
            "[org/base](https://huggingface.co/org/base) + [org/lora](https://huggingface.co/org/lora)",
        ),
    ],
)
def test_sources_of_every_kind(source, shown):
    card = card_of(record_of(sources={"base": {"source": source, "sha256": SHA}}))
    assert f"| base | {shown} | –" in card.text
    assert card.data.base_model == (["org/base", "org/lora"] if "+" in source else None)


def test_a_real_run(config, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    run = adamerge.train(config({"task_modules": [{"class_path": "tests.tiny.Shift"}]}, data={"eval_split": "test"}))
    _, record = read_record(run.dir)
    text = model_card(record, name="tiny", licences=dict.fromkeys(record["sources"], "mit"), load="x = 1")
    assert str(tmp_path) not in text
    card = ModelCard(text)
    scores = {result.dataset_name: result.metric_value for result in card.data.eval_results}
    assert scores == pytest.approx(run.scores["this merge"], abs=1e-6)
    assert card.data.license == "mit"
    assert "- Task modules: `Shift` (width: 6)" in card.text
    for source in ("base", "expert a"):
        assert record["sources"][source]["sha256"][:12] in card.text
