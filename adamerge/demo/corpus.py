"""The text pool's sentences, drawn from grammars and word lists of our own: the same on every platform and version.

`words.yaml` has the templates of each task's classes and the words that fill them. Some of both stand in the test split
alone. Draws are digests of counters, so no library's random numbers take part. The lists were shaped on texts of
another seed than those of the test split.
"""

import re
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import yaml

from adamerge.seeding import seed_of
from adamerge.types import InputError

SPLITS = {"train": 1500, "unlabeled": 420, "test": 420}  # both 12's multiples: equal shares of 2, 3, 4, 6 classes
CLASSES = {
    "reviews": ("negative", "positive"),
    "claims": ("a denial", "a fact", "a guess"),
    "messages": ("an apology", "a complaint", "an invitation", "thanks"),
    "questions": ("a number", "a place", "a person", "a time", "a reason", "a thing"),
}


def samples(task: str, seed: int = 0) -> dict[str, tuple[list[str], list[int]]]:
    """Return texts and labels of a task's splits, classes in equal shares; no text is in two splits or has two labels.

    Args:
        task: Its name.
        seed: Another one draws other texts.

    Raises:
        InputError: No such task.
    """
    if task not in CLASSES:
        raise InputError(f"The texts have the tasks {', '.join(CLASSES)}; asked for '{task}'.")
    splits, seen = {}, set[str]()
    for split, size in SPLITS.items():
        label_of: dict[str, int] = {}
        for label, of_class in enumerate(CLASSES[task]):
            grammar = _Grammar(task, of_class, split, seed)
            while len(label_of) < size // len(CLASSES[task]) * (label + 1):
                text = grammar.text()
                if text.lower() not in seen:
                    seen.add(text.lower())
                    label_of[text] = label
        texts = sorted(label_of, key=lambda text: seed_of("texts", text))
        splits[split] = texts, [label_of[text] for text in texts]
    return splits


class _Grammar:
    """Draws texts of one class of a task, as they are in one split: a pure function of its arguments and the calls."""

    def __init__(self, task: str, of_class: str, split: str, seed: int) -> None:
        parts = [_lists()["everywhere"], *([_lists()["test alone"]] if split == "test" else [])]
        self._templates = [template for part in parts for template in part["templates"][task][of_class]]
        self._words = [part["words"] for part in parts]
        self._name, self._count = ("texts", task, of_class, split, seed), count()

    def text(self) -> str:
        filled = " ".join(self._filled(self._drawn(self._templates)).split())
        agreed = re.sub(r"\ba (?=[aeiou])", "an ", filled)
        return re.sub(r"(^|[.!?] )([a-z])", lambda start: start[1] + start[2].upper(), agreed)

    def _filled(self, template: str) -> str:
        def word(slot: re.Match[str]) -> str:
            return self._filled(self._drawn([word for words in self._words for word in words.get(slot[1], ())]))

        return re.sub(r"<(\w+)>", word, template)

    def _drawn(self, options: list[str]) -> str:
        return options[seed_of(*self._name, next(self._count)) % len(options)]


@cache
def _lists() -> dict[str, Any]:
    return yaml.safe_load((Path(__file__).parent / "words.yaml").read_text(encoding="utf-8"))
