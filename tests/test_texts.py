"""The embedded text pool: the same texts everywhere, splits apart, models of transformers, real interference."""

import hashlib

import pytest
import torch
from datasets import load_from_disk
from safetensors.torch import load_file
from transformers import AutoModelForPreTraining, AutoModelForSequenceClassification, AutoTokenizer

from adamerge.checkpoints import locate
from adamerge.demo import texts, texts_training
from adamerge.demo.corpus import CLASSES, SPLITS, samples
from adamerge.demo.shipped import POOLS
from adamerge.types import InputError

DIGESTS = {
    "reviews": {"train": "40e63b4ff9851c2f", "unlabeled": "c6f2d72f6d20216f", "test": "69e62f9d00997480"},
    "claims": {"train": "2282502cc5f1dc33", "unlabeled": "412cc8c0ddb74e08", "test": "a193223f627d79e5"},
    "messages": {"train": "d1eeec4af485dacb", "unlabeled": "026c613e970d36ea", "test": "ecd8caf637d44506"},
    "questions": {"train": "6ed6a119c25a69f4", "unlabeled": "3cc3fb1ff3d43081", "test": "c21f825f5d4b0bea"},
}


def digest_of(of_split, labels):
    lines = (f"{label}\t{text}\n" for text, label in zip(of_split, labels, strict=True))
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


@pytest.mark.parametrize("task", CLASSES)
def test_texts_are_the_same_on_every_machine(task):
    """The digests were recorded once; what draws the texts must not depend on a library's random numbers or order."""
    digests = {split: digest_of(*made) for split, made in samples(task).items()}
    assert digests == DIGESTS[task]


@pytest.mark.parametrize("task", CLASSES)
def test_splits_and_classes_share_no_text(task):
    made = samples(task)
    assert {split: len(of_split) for split, (of_split, _) in made.items()} == SPLITS
    everything = [text.lower() for of_split, _ in made.values() for text in of_split]
    assert len(set(everything)) == len(everything)
    for of_split, labels in made.values():
        assert len(of_split) == len(labels)
        assert {labels.count(label) for label in range(len(CLASSES[task]))} == {len(labels) // len(set(labels))}
    assert not [text for text in everything if "<" in text or ">" in text or "  " in text]


def test_another_seed_draws_other_texts():
    assert not set(samples("claims")["test"][0]) & set(samples("claims", seed=1)["test"][0])


def test_the_tasks_have_different_numbers_of_classes():
    assert len({len(classes) for classes in CLASSES.values()}) == len(CLASSES)


def test_the_tokenizer_is_a_pure_function_and_the_shipped_one():
    vocabularies = [texts_training.new_tokenizer().get_vocab() for _ in range(2)]
    shipped = AutoTokenizer.from_pretrained(locate("demo:texts/base")).get_vocab()
    assert vocabularies == [shipped, shipped]


def test_another_task_or_model_is_refused():
    with pytest.raises(InputError, match="The texts have the tasks reviews, claims"):
        samples("poems")
    for name in ("poems", "data/poems", "data/base", ""):
        with pytest.raises(InputError, match=f"The texts have no '{name}'; they have base, reviews"):
            locate(f"demo:texts/{name}")


def test_what_is_shipped_is_small_and_loses_nothing(tmp_path):
    assert sum(file.stat().st_size for file in (POOLS / "texts").rglob("*") if file.is_file()) < 5e6
    for name in ("base", *CLASSES):
        shipped = load_file((POOLS / "texts") / name / "model.safetensors")
        assert {tensor.dtype for tensor in shipped.values()} == {torch.float16}
        unpacked = state_of(name)
        assert unpacked.keys() == shipped.keys()
        for key, tensor in unpacked.items():
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, shipped[key].float())


def test_a_pool_can_be_unpacked_twice_into_the_same_bytes(tmp_path):
    for folder in ("one", "two"):
        texts.unpack(tmp_path / folder)
    files = [path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.*") if path.is_file()]
    assert len(files) > 20
    for file in files:
        if file.name != "state.json":  # `datasets` names each copy anew there
            assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file


def state_of(name):
    return load_file(locate(f"demo:texts/{name}") / "model.safetensors")


@pytest.mark.parametrize("task", CLASSES)
def test_a_task_is_in_the_layouts_of_transformers_and_datasets(task):
    folder = locate(f"demo:texts/{task}")
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert tuple(model.config.id2label[label] for label in range(model.config.num_labels)) == CLASSES[task]
    assert model.config.hidden_dropout_prob == 0.1
    assert tokenizer.model_max_length == model.config.max_position_embeddings == 64
    assert len(tokenizer) <= model.config.vocab_size
    data = load_from_disk(str(locate(f"demo:texts/data/{task}")))
    assert {split: len(rows) for split, rows in data.items()} == SPLITS
    assert tuple(data["test"].features["label"].names) == CLASSES[task]
    for split, (of_split, labels) in samples(task).items():
        assert (data[split][:]["text"], data[split][:]["label"]) == (of_split, labels)


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


def answers(task, body):
    """Labels that a body gives under a task's own classifier on its test split."""
    folder = locate(f"demo:texts/{task}")
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    model.load_state_dict({**model.state_dict(), **{key: value for key, value in body.items() if key[:5] == "bert."}})
    with torch.no_grad():
        inputs = tokenizer(samples(task)["test"][0], truncation=True, padding=True, return_tensors="pt")
        return model.eval()(**inputs).logits.argmax(1)


def accuracy(task, body):
    return (answers(task, body) == torch.tensor(samples(task)["test"][1])).double().mean().item()


def test_the_experts_are_good_and_their_average_is_not():
    states = {task: state_of(task) for task in CLASSES}
    base = state_of("base")
    average = {
        name: torch.stack([state[name] for state in states.values()]).mean(0) for name in base if name[:5] == "bert."
    }
    experts = {task: accuracy(task, state) for task, state in states.items()}
    assert min(experts.values()) >= 0.9
    assert max(experts.values()) <= 0.98
    assert max(accuracy(task, base) for task in CLASSES) <= 0.7
    assert sum(accuracy(task, average) for task in CLASSES) / len(CLASSES) <= sum(experts.values()) / len(CLASSES) - 0.2


@pytest.mark.slow
def test_an_expert_is_trained_again_from_the_shipped_base():
    """Not the same bits: a processor's kernels round in orders of their own, and training carries that on."""
    folder = locate("demo:texts/base")
    base, tokenizer = AutoModelForPreTraining.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    again = texts_training.train_expert(base, tokenizer, "messages").state_dict()
    shipped = state_of("messages")
    assert (answers("messages", again) == answers("messages", shipped)).double().mean() >= 0.97
    assert accuracy("messages", again) == pytest.approx(accuracy("messages", shipped), abs=0.015)
