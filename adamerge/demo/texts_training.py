"""Training of the texts: `python -m adamerge.demo texts FOLDER` makes the shipped files again.

The base learns to fill in masked words and to tell whether two halves belong together, as BERT did, so it has a pooler
and no classifier. Each expert gets a linear head fitted on the base's pooled features, then fine-tunes the body under
it. Every model has a seed of its own, so one expert can be trained again without the others.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import track
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from adamerge.demo.corpus import CLASSES, samples
from adamerge.demo.shipped import save_half
from adamerge.seeding import seed_of
from adamerge.terminal import progress_console

LENGTH = 64  # tokens
VOCABULARY = 1000
MODEL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "max_position_embeddings": LENGTH,
}
EPOCHS = {"reviews": 8, "claims": 5, "messages": 5, "questions": 7}
_MARKS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_PAD, _, _CLS, _SEP, _MASK = range(len(_MARKS))
_MASKED = 0.15  # share of the base's words to be filled in
_STRANGE = 0.2  # share of the experts' words replaced at random, so that one never seen does not decide


def train(folder: Path) -> None:
    """Train the base, a small BERT, and its experts; write their shipped files and the tokenizer's."""
    tokenizer = new_tokenizer()
    tokenizer.save_pretrained(folder)
    base = train_base(tokenizer)
    _save(base, folder / "base")
    for task in track(CLASSES, "Training the experts on texts", console=progress_console(), transient=True):
        _save(train_expert(base, tokenizer, task), folder / task)


def _save(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    save_half(load_file(folder / "model.safetensors"), folder / "model.safetensors")


def new_tokenizer() -> Any:
    """Return a BERT tokenizer trained on the tasks' training texts; equal in every call."""
    from tokenizers.implementations import BertWordPieceTokenizer
    from transformers import BertTokenizerFast  # type: ignore[attr-defined]

    texts = _training_texts()
    letters = sorted({letter for text in texts for letter in text.lower() if letter != " "})
    # Pieces of one letter are numbered here: the trainer would number them as its hash tables fall, and break ties so.
    numbered: list[Any] = [*_MARKS, *letters, *(f"##{letter}" for letter in letters)]
    trained = BertWordPieceTokenizer()
    trained.train_from_iterator(iter(texts), VOCABULARY, special_tokens=numbered, show_progress=False)
    plain = BertWordPieceTokenizer(trained.get_vocab())
    return BertTokenizerFast(tokenizer_object=plain._tokenizer, do_lower_case=True, model_max_length=LENGTH)


def _training_texts() -> list[str]:
    return [text for task in CLASSES for text in samples(task)["train"][0]]


def train_base(tokenizer: Any) -> Any:
    """Return a BertForPreTraining that learned BERT's own two losses on the tasks' training texts."""
    from transformers import BertConfig, BertForPreTraining

    with _seeded("base"):
        model = BertForPreTraining(BertConfig(**MODEL))
        _pretrain(model, tokenizer)
    return rounded(model)


def rounded(model: Any) -> Any:
    """Return the model itself with values that half precision holds, in fp32: nothing is lost when it is shipped."""
    return model.half().float()


@contextmanager
def _seeded(name: str) -> Iterator[None]:
    """Draw, in the block, random numbers from a seed of the model's own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of("texts", "model", name))
        yield


def _pretrain(model: Any, tokenizer: Any) -> None:
    texts = _training_texts()
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
    _train(model, lengths, loss, batch_size=64, epochs=6, lr=2e-3)


def train_expert(base: Any, tokenizer: Any, task: str) -> Any:
    """Return a BertForSequenceClassification fine-tuned from the base on one task."""
    from transformers import BertConfig, BertForSequenceClassification

    names = dict(enumerate(CLASSES[task]))
    config = BertConfig(**MODEL, id2label=names, label2id={name: label for label, name in names.items()})
    with _seeded(task):
        model = BertForSequenceClassification(config).eval()
        model.bert.load_state_dict(base.bert.state_dict())
        _fine_tune(model, tokenizer, task)
    return rounded(model)


def _fine_tune(model: Any, tokenizer: Any, task: str) -> None:
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

    _train(model, list(map(len, ids)), loss, batch_size=32, epochs=EPOCHS[task], lr=4e-4)


def _fit(head: nn.Linear, features: Tensor, label: Tensor) -> None:
    """Train a linear head on frozen features, full-batch."""
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


def _train(
    model: nn.Module,
    lengths: Sequence[int],
    loss: Callable[[list[int]], Tensor],
    *,
    batch_size: int,
    epochs: int,
    lr: float,
) -> None:
    """Train with AdamW and a one-cycle schedule.

    Dropout is off: so short a training needs none, and on a CPU it takes a third of the time.
    """
    model.eval()
    steps = -(-len(lengths) // batch_size)
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, weight_decay=0.01, foreach=True)
    schedule = OneCycleLR(optimizer, lr, total_steps=epochs * steps, pct_start=0.2)
    for _ in range(epochs):
        for batch in _batches(lengths, batch_size):
            optimizer.zero_grad()
            loss(batch).backward()
            nn.utils.clip_grad_norm_(learned, 1.0, foreach=True)
            optimizer.step()
            schedule.step()


def _batches(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Yield all indices in random batches of texts of about one length, so that little is padded."""
    pools = torch.randperm(len(lengths)).split(8 * size)
    by_length = [torch.tensor(sorted(pool.tolist(), key=lengths.__getitem__)) for pool in pools]
    batches = [batch.tolist() for pool in by_length for batch in pool.split(size)]
    for index in torch.randperm(len(batches)).tolist():
        yield batches[index]
