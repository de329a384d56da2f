"""A small BERT and four text classifiers fine-tuned from it, trained on this machine on first use and cached.

The base learns to fill in masked words and to tell whether two halves belong together, as BERT did, so it has a pooler
and no classifier. Each expert gets a linear head fitted on the base's pooled features, then fine-tunes the body under
it. All is written in the layouts that users have: transformers' folder for each model, its tokenizer beside it, and a
`datasets` folder for each task's texts.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from adamerge.demo.corpus import TASKS, samples
from adamerge.files import built_once, cache_dir
from adamerge.terminal import progress_console
from adamerge.types import InputError

VERSION = "1"  # part of the cache's path: raise it when anything here or in the corpus changes what is built
LENGTH = 64  # tokens
VOCABULARY = 3000
MODEL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "max_position_embeddings": LENGTH,
}
EPOCHS = {"reviews": 8, "kinds": 3, "libraries": 5, "questions": 7}
_MARKS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_PAD, _, _CLS, _SEP, _MASK = range(len(_MARKS))
_MASKED = 0.15  # share of the base's words to be filled in
_STRANGE = 0.2  # share of the experts' words replaced at random, so that one never seen does not decide


def locate(name: str) -> Path:
    """The folder of `base`, of a task's expert, or of a task's texts (`data/TASK`); all are made if not cached.

    Raises:
        InputError: No such model or task.
    """
    if name.removeprefix("data/") not in (*TASKS, *(() if name.startswith("data/") else ("base",))):
        raise InputError(f"The texts have no '{name}'; they have base, {', '.join(TASKS)}, and data/TASK for each.")
    return built_once(cache_dir() / "demo" / f"texts-{VERSION}", build) / name


def build(folder: Path, effort: float = 1.0) -> None:
    """Write the texts, train the base and its experts into a folder; the same bits with one number of threads.

    Args:
        folder: Where.
        effort: How many epochs to train, as a share of the real pool's.
    """
    from transformers import BertConfig, BertForPreTraining

    with torch.random.fork_rng(devices=[]), Progress(console=progress_console(), transient=True) as progress:
        torch.manual_seed(0)
        bar = progress.add_task("Making the texts' demo, once: texts", total=2 + 8 + len(TASKS))
        for task in TASKS:
            _save_texts(folder / "data" / task, task)
        tokenizer = _new_tokenizer([text for task in TASKS for text in samples(task)["train"][0]])
        progress.update(bar, completed=2)
        base = BertForPreTraining(BertConfig(**MODEL))
        for share in _pretrain(base, tokenizer, effort):
            progress.update(bar, description="Making the texts' demo, once: base", completed=2 + 8 * share)
        _save_model(folder / "base", base, tokenizer)
        for task in TASKS:
            progress.update(bar, description=f"Making the texts' demo, once: expert {task}")
            _save_model(folder / task, _fine_tuned(base, tokenizer, task, effort), tokenizer)
            progress.advance(bar)


def _save_texts(folder: Path, task: str) -> None:
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, disable_progress_bars, enable_progress_bars

    features = Features({"text": Value("string"), "label": ClassLabel(names=list(TASKS[task].classes))})
    disable_progress_bars()
    splits = {
        split: Dataset.from_dict({"text": texts, "label": labels}, features=features)
        for split, (texts, labels) in samples(task).items()
    }
    DatasetDict(splits).save_to_disk(str(folder))
    enable_progress_bars()


def _new_tokenizer(texts: Sequence[str]) -> Any:
    from tokenizers.implementations import BertWordPieceTokenizer
    from transformers import BertTokenizerFast  # type: ignore[attr-defined]

    letters = sorted({letter for text in texts for letter in text.lower() if letter != " "})
    # Pieces of one letter are numbered here: the trainer would number them as its hash tables fall, and break ties so.
    numbered: list[Any] = [*_MARKS, *letters, *(f"##{letter}" for letter in letters)]
    trained = BertWordPieceTokenizer()
    trained.train_from_iterator(iter(texts), VOCABULARY, special_tokens=numbered, show_progress=False)
    plain = BertWordPieceTokenizer(trained.get_vocab())
    return BertTokenizerFast(tokenizer_object=plain._tokenizer, do_lower_case=True, model_max_length=LENGTH)


def _save_model(folder: Path, model: Any, tokenizer: Any) -> None:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if shown:
        logging.enable_progress_bar()


def _pretrain(model: Any, tokenizer: Any, effort: float) -> Iterator[float]:
    """BERT's own two losses on the tasks' training texts; yields the share done."""
    texts = [text for task in TASKS for text in samples(task)["train"][0]]
    ids = tokenizer(texts, add_special_tokens=False, truncation=True, max_length=LENGTH - 3)["input_ids"]

    def loss(batch: list[int]) -> Tensor:
        follows = torch.rand(len(batch)) < 0.5
        halves = zip(batch, [*batch[1:], batch[0]], follows.tolist(), strict=True)
        pairs = [(ids[one], ids[one if same else other]) for one, other, same in halves]
        first = [[_CLS, *one[: len(one) // 2], _SEP] for one, _ in pairs]
        second = [[*other[len(other) // 2 :], _SEP] for _, other in pairs]
        inputs = _padded([one + other for one, other in zip(first, second, strict=True)])
        place = torch.arange(inputs["input_ids"].shape[1])
        is_second = place >= torch.tensor([[len(one)] for one in first])
        inputs["token_type_ids"] = is_second.long() * inputs["attention_mask"]
        words = inputs["input_ids"].clone()
        hidden = (torch.rand(words.shape) < _MASKED) & (words >= len(_MARKS))
        chance = torch.rand(words.shape)
        inputs["input_ids"][hidden & (chance < 0.8)] = _MASK
        strange = hidden & (chance > 0.9)
        inputs["input_ids"][strange] = torch.randint(len(_MARKS), VOCABULARY, words.shape)[strange]
        output = model.bert(**inputs)
        filled = model.cls.predictions(output.last_hidden_state[hidden])
        belongs = model.cls.seq_relationship(output.pooler_output)
        return F.cross_entropy(filled, words[hidden]) + F.cross_entropy(belongs, (~follows).long())

    lengths = list(map(len, ids))
    yield from _trained(model, lengths, loss, batch_size=64, epochs=max(1, round(6 * effort)), lr=2e-3)


def _fine_tuned(base: Any, tokenizer: Any, task: str, effort: float) -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    names = dict(enumerate(TASKS[task].classes))
    config = BertConfig(**MODEL, id2label=names, label2id={name: label for label, name in names.items()})
    model = BertForSequenceClassification(config).eval()
    model.bert.load_state_dict(base.bert.state_dict())
    texts, labels = samples(task)["train"]
    ids, label = tokenizer(texts, truncation=True)["input_ids"], torch.tensor(labels)
    with torch.no_grad():
        batches = torch.arange(len(ids)).split(100)
        pooled = torch.cat([model.bert(**_padded([ids[i] for i in batch.tolist()])).pooler_output for batch in batches])
    _fit(model.classifier, pooled, label)
    model.classifier.requires_grad_(False)

    def loss(batch: list[int]) -> Tensor:
        inputs = _padded([ids[i] for i in batch])
        words = inputs["input_ids"]
        strange = (torch.rand(words.shape) < _STRANGE) & (words >= len(_MARKS))
        words[strange] = torch.randint(len(_MARKS), VOCABULARY, words.shape)[strange]
        return F.cross_entropy(model(**inputs).logits, label[batch])

    epochs = max(1, round(EPOCHS[task] * effort))
    for _ in _trained(model, list(map(len, ids)), loss, batch_size=32, epochs=epochs, lr=1e-3):
        pass
    return model


def _fit(head: nn.Linear, features: Tensor, label: Tensor) -> None:
    """A linear head on frozen features, full-batch."""
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=50, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(head(features), label) + 1e-2 * head.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)


def _padded(sequences: list[list[int]]) -> dict[str, Tensor]:
    ids = nn.utils.rnn.pad_sequence([torch.tensor(each) for each in sequences], batch_first=True, padding_value=_PAD)
    return {"input_ids": ids, "attention_mask": (ids != _PAD).long()}


def _trained(
    model: nn.Module,
    lengths: Sequence[int],
    loss: Callable[[list[int]], Tensor],
    *,
    batch_size: int,
    epochs: int,
    lr: float,
) -> Iterator[float]:
    """AdamW with a one-cycle schedule; yields the share done after each epoch.

    Dropout is off: so short a training needs none, and on a CPU it takes a third of the time.
    """
    model.eval()
    steps = -(-len(lengths) // batch_size)
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, weight_decay=0.01, foreach=True)
    schedule = OneCycleLR(optimizer, lr, total_steps=epochs * steps, pct_start=0.2)
    for epoch in range(epochs):
        for batch in _batches(lengths, batch_size):
            optimizer.zero_grad()
            loss(batch).backward()
            nn.utils.clip_grad_norm_(learned, 1.0, foreach=True)
            optimizer.step()
            schedule.step()
        yield (epoch + 1) / epochs


def _batches(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """All places in random batches of texts of about one length, so that little is padded."""
    pools = torch.randperm(len(lengths)).split(8 * size)
    by_length = [torch.tensor(sorted(pool.tolist(), key=lengths.__getitem__)) for pool in pools]
    batches = [batch.tolist() for pool in by_length for batch in pool.split(size)]
    for index in torch.randperm(len(batches)).tolist():
        yield batches[index]
