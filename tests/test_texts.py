"""The embedded text pool: texts that keep their splits apart, models that transformers loads, real interference."""

import pytest
import torch
from datasets import load_from_disk
from safetensors.torch import load_file
from transformers import AutoModelForPreTraining, AutoModelForSequenceClassification, AutoTokenizer

from adamerge.checkpoints import locate
from adamerge.demo import corpus, texts
from adamerge.demo.corpus import SPLITS, TASKS, samples
from adamerge.types import InputError


@pytest.mark.parametrize("task", TASKS)
def test_texts_are_a_pure_function_and_splits_share_none(task):
    made = samples(task)
    corpus._found.cache_clear()
    assert samples(task) == made
    assert {split: len(of_split) for split, (of_split, _) in made.items()} == SPLITS
    everything = [text.lower() for of_split, _ in made.values() for text in of_split]
    assert len(set(everything)) == len(everything)
    for of_split, labels in made.values():
        assert len(of_split) == len(labels)
        assert {labels.count(label) for label in range(len(TASKS[task].classes))} == {len(labels) // len(set(labels))}


def test_the_tasks_have_different_numbers_of_classes():
    assert len({len(written.classes) for written in TASKS.values()}) == len(TASKS)


def test_the_tokenizer_is_a_pure_function():
    lines = samples("questions")["train"][0]
    vocabularies = [texts._new_tokenizer(lines).get_vocab() for _ in range(3)]
    assert vocabularies[0] == vocabularies[1] == vocabularies[2]


def test_another_task_or_model_is_refused():
    with pytest.raises(InputError, match="The texts have the tasks reviews, kinds"):
        samples("poems")
    for name in ("poems", "data/poems", "data/base"):
        with pytest.raises(InputError, match=f"The texts have no '{name}'; they have base, reviews"):
            locate(f"demo:texts/{name}")


def test_missing_sources_are_one_clear_error(monkeypatch):
    monkeypatch.setattr(corpus, "_found", lambda: ())
    with pytest.raises(InputError, match="Too few texts for the demo's task 'kinds': sources of Python"):
        samples("kinds")


def state_of(name):
    return load_file(locate(f"demo:texts/{name}") / "model.safetensors")


@pytest.mark.parametrize("task", TASKS)
def test_a_task_is_in_the_layouts_of_transformers_and_datasets(task):
    folder = locate(f"demo:texts/{task}")
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert tuple(model.config.id2label[label] for label in range(model.config.num_labels)) == TASKS[task].classes
    assert model.config.hidden_dropout_prob == 0.1
    assert tokenizer.model_max_length == model.config.max_position_embeddings == 64
    assert len(tokenizer) <= model.config.vocab_size
    data = load_from_disk(str(locate(f"demo:texts/data/{task}")))
    assert {split: len(rows) for split, rows in data.items()} == SPLITS
    assert tuple(data["test"].features["label"].names) == TASKS[task].classes
    if task not in ("kinds", "libraries"):  # of what is installed, which may be another version than when it was made
        assert data["test"][:]["text"] == samples(task)["test"][0]


def test_the_base_has_a_pooler_and_no_classifier():
    _, report = AutoModelForPreTraining.from_pretrained(locate("demo:texts/base"), output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    base, expert = state_of("base"), state_of("reviews")
    body = {name for name in base if name.startswith("bert.")}
    assert "bert.pooler.dense.weight" in body
    assert not [name for name in base if name.startswith("classifier")]
    assert body == {name for name in expert if name.startswith("bert.")}
    assert not torch.equal(base["bert.pooler.dense.weight"], expert["bert.pooler.dense.weight"])


def accuracy(task, body):
    """Of a body under a task's own classifier, on its test split."""
    folder = locate(f"demo:texts/{task}")
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    model.load_state_dict({**model.state_dict(), **{key: value for key, value in body.items() if key[:5] == "bert."}})
    lines, labels = samples(task)["test"]
    with torch.no_grad():
        logits = model.eval()(**tokenizer(lines, truncation=True, padding=True, return_tensors="pt")).logits
    return (logits.argmax(1) == torch.tensor(labels)).double().mean().item()


def test_the_experts_are_good_and_their_average_is_not():
    states = {task: state_of(task) for task in TASKS}
    shared = [name for name in state_of("base") if name.startswith("bert.")]
    average = {name: torch.stack([state[name] for state in states.values()]).mean(0) for name in shared}
    experts = {task: accuracy(task, state) for task, state in states.items()}
    assert min(experts.values()) >= 0.8
    assert sum(accuracy(task, average) for task in TASKS) / len(TASKS) <= sum(experts.values()) / len(TASKS) - 0.05
