"""Classifiers of transformers, of images, texts and tokens."""

import re
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from adamerge.backbones.folder import FolderWriter
from adamerge.backbones.layout import Layout, output_layer
from adamerge.backbones.pixels import ImageInput
from adamerge.backbones.text import IDS, MASK, TextInput, rows_of, trimmed
from adamerge.backbones.transformers import Transformers, has_config
from adamerge.checkpoints import State, locate
from adamerge.naming import folder_of, literal
from adamerge.task_modules import ClassifierHead, TaskModule
from adamerge.types import ROWS, UNLABELED, Batch, InputError, TaskInfo, some

_ANSWERS = "answers"


class Classifier(Transformers):
    """Base of the classifiers: the body is merged, and each task keeps its expert's head, whatever its classes."""

    has_heads = True

    def __init__(
        self,
        model: str | None = None,
        *,
        train_heads: bool = False,
        attention: str | None = None,
        remote_code: bool = False,
        blocks: str | None = None,
    ) -> None:
        super().__init__(model, attention=attention, remote_code=remote_code, blocks=blocks)
        self._train_heads = train_heads

    def _labelled(self, labels: int) -> Any:
        config = self._config()
        config.num_labels = labels
        return self._make(config)

    @cached_property
    def output(self) -> str:
        """The name of the layer that makes the logits."""
        with torch.device("meta"):
            return output_layer(self._labelled, f"The {self.config.model_type} of '{self.model}'")

    @cached_property
    def layout(self) -> Layout:
        with torch.device("meta"):
            return Layout.of(self._labelled(3), output=f"{self.output}.")

    def build(self) -> nn.Module:
        return self._bare(self._labelled(3))

    def _bare(self, net: nn.Module) -> nn.Module:
        """The network without its output layer, so that its logits are the features."""
        net.set_submodule(self.output, nn.Identity())
        return net.eval()

    def features(self, net: nn.Module, batch: Batch) -> Tensor:
        return net(**self.inputs(batch)).logits

    @abstractmethod
    def inputs(self, batch: Batch) -> Mapping[str, Tensor]:
        """Return the parts of a batch that the network takes."""

    def head(self, task: TaskInfo) -> TaskModule:
        assert isinstance(task.base, State)
        prefix = f"{self.output}."
        inner = [name for name in self.own(task.base) if not name.startswith(prefix)]
        return ClassifierHead(task, prefix=prefix, inner=inner, trainable=self._train_heads)

    def head_problems(self, task: str, state: State, classes: Sequence[str]) -> Iterator[str]:
        name = f"{self.output}.weight"
        inner = [each for each in self.layout.own if each not in state and not each.startswith(f"{self.output}.")]
        if name in state and inner:
            yield f"Task '{task}': {state.source} lacks {some(inner)} of its head; give one that was saved whole."
        if name not in state:
            yield f"Task '{task}': {state.source} has no head '{name}'; give an expert that was saved with its head."
        elif classes and state.meta(name)[0][0] != len(classes):
            yield f"Task '{task}' has {len(classes)} classes, its head in {state.source} {state.meta(name)[0][0]}."

    def classes(self, source: str, given: Sequence[str]) -> Sequence[str]:
        if not has_config(source):
            return given
        names = [str(name) for _, name in sorted(self.config_of(source).id2label.items())]
        if not given:
            return names
        unnamed = all(re.fullmatch(r"LABEL_\d+", name) for name in names)
        plain = [[re.sub(r"[\W_]+", " ", name).strip().lower() for name in each] for each in (given, names)]
        if not unnamed and plain[0] != plain[1] and sorted(plain[0]) == sorted(plain[1]):
            raise InputError(
                f"{source} numbers its classes {', '.join(names[:4])}; the data number them {', '.join(given[:4])}. "
                "Give the labels of the data in the expert's order."
            )
        return given

    def export(self, net: nn.Module, base: State, folder: Path, heads: Mapping[str, TaskModule]) -> None:
        writer = FolderWriter(self.layout, locate(self.model, weights=False))
        body = net.base_model if self.layout.body else net
        writer.whole(net, folder, self.config, type(body).__name__, without=self.layout.own)
        for task, head in heads.items():
            assert isinstance(head, ClassifierHead)
            config = self._config()
            config.id2label = dict(enumerate(head.classes or [f"LABEL_{c}" for c in range(len(head.weight))]))
            config.label2id = {name: number for number, name in config.id2label.items()}
            writer.task(folder, task, config, type(net).__name__, head.tensors())

    def about(self, task: str) -> Mapping[str, Any]:
        return {} if folder_of(task) == task else {"folder": f"tasks/{folder_of(task)}"}

    def exported(self, folder: Path) -> nn.Module:
        first = sorted((folder / "tasks").iterdir())[0]
        return self._bare(self._pretrained(first, str(first)))

    def answers(self, folder: Path, tasks: Sequence[str]) -> Mapping[str, Callable[[Batch], Tensor]]:
        def of(task: str) -> Callable[[Batch], Tensor]:
            home = folder / "tasks" / folder_of(task)
            net = self._pretrained(home, str(home))
            return lambda batch: self.features(net.to(next(iter(batch.values())).device), batch)

        return {task: of(task) for task in tasks}


class ImageClassifier(ImageInput, Classifier):
    """Any `AutoModelForImageClassification`: ViT, DINOv2, ConvNeXt, Swin, ….

    The body is merged; each task keeps its expert's head. Samples are PIL images under `image`, prepared by the model's
    own processor.

    Args:
        model: Where architecture and processor come from: a folder, or a hub id with or without `@revision`. By default
            the merge's base.
        train_heads: Train the heads along with the merge; they are frozen otherwise.
        attention: Attention implementation, as transformers names them; by default the fastest it finds.
        remote_code: Run code that the model's folder brings along. Only for models you trust as you would code.
        blocks: Regular expression of the whole names of the network's blocks; by default the parts of its largest
            `nn.ModuleList`.

    Raises:
        InputError: No such model, no processor, or an output that is not one linear layer.
    """

    auto: ClassVar[str] = "AutoModelForImageClassification"

    def loading(self, task: str) -> str:
        return f"""from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

folder = "{{folder}}"
model = AutoModelForImageClassification.from_pretrained(folder, subfolder={literal(f"tasks/{folder_of(task)}")})
processor = AutoImageProcessor.from_pretrained(folder)
logits = model(**processor(Image.open("picture.png"), return_tensors="pt")).logits
print(model.config.id2label[int(logits.argmax())])"""


class TextClassifier(TextInput, Classifier):
    """Any `AutoModelForSequenceClassification`: BERT, RoBERTa, DistilBERT, DeBERTa, ….

    The body is merged; each task keeps its expert's head. Samples are texts under `text`, with a second one under
    `pair` where the task has pairs, cut into tokens by the model's own tokenizer.

    Args:
        model: Where architecture and tokenizer come from: a folder, or a hub id with or without `@revision`. By default
            the merge's base.
        max_length: Longer samples are cut to so many tokens; by default what tokenizer and network allow.
        train_heads: Train the heads along with the merge; they are frozen otherwise.
        attention: Attention implementation, as transformers names them; by default the fastest it finds.
        remote_code: Run code that the model's folder brings along. Only for models you trust as you would code.
        blocks: Regular expression of the whole names of the network's blocks; by default the parts of its largest
            `nn.ModuleList`.

    Raises:
        InputError: No such model, no tokenizer, or an output that is not one linear layer.
    """

    auto: ClassVar[str] = "AutoModelForSequenceClassification"

    def __init__(
        self,
        model: str | None = None,
        *,
        max_length: int | None = None,
        train_heads: bool = False,
        attention: str | None = None,
        remote_code: bool = False,
        blocks: str | None = None,
    ) -> None:
        super().__init__(model, train_heads=train_heads, attention=attention, remote_code=remote_code, blocks=blocks)
        self._max_length = max_length

    def loading(self, task: str) -> str:
        return f"""from transformers import {self.auto}, AutoTokenizer

folder = "{{folder}}"
model = {self.auto}.from_pretrained(folder, subfolder={literal(f"tasks/{folder_of(task)}")})
tokenizer = AutoTokenizer.from_pretrained(folder)
logits = model(**tokenizer("a text", return_tensors="pt")).logits
print([model.config.id2label[int(c)] for c in logits.argmax(-1).flatten()])"""


class TokenClassifier(TextClassifier):
    """Any `AutoModelForTokenClassification`: named entities, parts of speech.

    As `TextClassifier`, with an answer for every word: its first token. Samples are lists of words under `words` with
    a label for each, or texts under `text`, where every token is answered. Features and logits of a batch have one row
    for each answer, in the order of the samples.
    """

    auto: ClassVar[str] = "AutoModelForTokenClassification"

    def prepare(self, sample: Mapping[str, Any]) -> Mapping[str, Any]:
        if IDS in sample:
            return sample
        words, text = sample.get("words"), sample.get("text")
        if words is None and not isinstance(text, str):
            raise InputError(
                f"A sample has no words, but {', '.join(sorted(sample))}; say in `columns` of the data which column "
                "holds the `words`."
            )
        if not self.tokenizer.is_fast:
            raise InputError(f"The tokenizer of '{self.model}' is a slow one, which does not say where words begin.")
        source = list(words) if words is not None else text
        made = self.tokenizer(
            source,
            **{"truncation": True, "max_length": self.length, "padding": "max_length"},
            is_split_into_words=words is not None,
            return_special_tokens_mask=True,
        )
        number = made.word_ids(0) if words is not None else list(range(len(made[IDS])))
        before = [None, *number[:-1]]
        first_L = torch.tensor(
            [n is not None and n != b and not special
             for n, b, special in zip(number, before, made["special_tokens_mask"], strict=True)]
        )  # fmt: skip
        tokens = {n: torch.tensor(made[n], dtype=torch.int32) for n in made if n in self._taken}
        return {**tokens, _ANSWERS: first_L, **self._labels(sample, number, first_L)}

    def _labels(self, sample: Mapping[str, Any], number: Sequence[int | None], first_L: Tensor) -> dict[str, Tensor]:
        label = sample.get("label")
        if label is None:
            return {}
        if isinstance(label, int):  # no labels, said by one number
            label = [label] * (1 + max((n for n in number if n is not None), default=0))
        if sample.get("words") is not None and len(label) != len(sample["words"]):
            raise InputError(f"A sample has {len(sample['words'])} words and {len(label)} labels.")
        found = [label[n] if first and n is not None else UNLABELED for n, first in zip(number, first_L, strict=True)]
        return {"label": torch.tensor(found, dtype=torch.int32)}

    def collate(self, samples: Sequence[Mapping[str, Any]]) -> Batch:
        batch = trimmed(default_collate(list(samples)))
        answers_BL = batch.pop(_ANSWERS, None)
        return batch if answers_BL is None else rows_of(batch, answers_BL)

    def features(self, net: nn.Module, batch: Batch) -> Tensor:
        features_BLD = net(**self.inputs(batch)).logits
        return features_BLD.flatten(0, 1)[batch[ROWS]]

    def example(self, net: nn.Module, number: int) -> Batch:
        batch = dict(super().example(net, number))
        return rows_of(batch, batch[MASK].bool())
