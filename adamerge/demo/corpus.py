"""The text pool's sentences: two tasks of what programmers wrote, two of a grammar's.

`libraries` and `kinds` read the sources of Python and of packages that are installed with this one. `questions` and
`reviews` are made from the templates below; some words stand in the test split alone.
"""

import ast
import re
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np

from adamerge.seeding import seed_of
from adamerge.types import InputError

SPLITS = {"train": 1500, "unlabeled": 420, "test": 420}  # both 12's multiples: equal shares of 2, 3, 4, 6 classes

Random = np.random.Generator


# --- what programmers wrote


_LIBRARIES = {
    "matplotlib": ("matplotlib",),
    "python": ("asyncio", "email", "http", "importlib", "logging", "multiprocessing", "unittest", "urllib", "xml"),
    "scikit-learn": ("sklearn/cluster", "sklearn/ensemble", "sklearn/linear_model", "sklearn/metrics", "sklearn/utils"),
    "torch": ("torch/nn", "torch/optim", "torch/distributions", "torch/utils/data", "torch/autograd"),
}
_KINDS = ("code", "a docstring", "an error message")
_ASIDE = re.compile(r"(^|/)(_?tests?|testing|externals|_vendor)(/|$)")
_NAMES = re.compile(r"\b(matplotlib|mpl|pyplot|plt|scikit-learn|sklearn|scipy|py?torch|numpy|np)\b", re.IGNORECASE)


_WORDS = {"code": (6, 12), "an error message": (6, 18), "a docstring": (10, 32)}  # that tell something; that are kept


class _Found(NamedTuple):
    library: str
    kind: str
    text: str


def _libraries(split: str) -> list[list[str]]:
    found = [each for each in _found() if each.kind == "a docstring"]
    return [[each.text for each in found if each.library == library] for library in _LIBRARIES]


def _kinds(split: str) -> list[list[str]]:
    return [[each.text for each in _found() if each.kind == kind] for kind in _KINDS]


@lru_cache(maxsize=1)
def _found() -> tuple[_Found, ...]:
    found = []
    for library, folders in _LIBRARIES.items():
        for folder in folders:
            package, _, below = folder.partition("/")
            spec = find_spec(package)
            root = Path(spec.origin).parent if spec and spec.origin else Path(package)
            for path in sorted((root / below).rglob("*.py")):
                file = path.relative_to(root).as_posix()
                if not _ASIDE.search(file):
                    found += [_Found(library, *each) for each in _texts(path)]
    return tuple(found)


def _texts(path: Path) -> Iterator[tuple[str, str]]:
    """The texts of a Python file that are long enough, and their kinds."""
    source = path.read_text(encoding="utf-8")
    try:
        nodes = list(ast.walk(ast.parse(source)))
    except SyntaxError:  # a template
        return
    for kind, text in (*_in_lines(source, nodes), *_in_nodes(nodes, path.stem)):
        least, most = _WORDS[kind]
        plain = " ".join(_NAMES.sub("", re.sub(r"[^ -~]|-{3,}|={3,}", " ", text)).split()[:most])
        if len(re.findall(r"[A-Za-z]{2,}", plain)) >= least:
            yield kind, plain


def _in_lines(source: str, nodes: list[ast.AST]) -> Iterator[tuple[str, str]]:
    quoted = {
        line
        for node in nodes
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }

    def kind_of(numbered: tuple[int, str]) -> str | None:
        number, line = numbered
        return None if number in quoted or not line.strip() or line.lstrip().startswith("#") else "code"

    for kind, block in groupby(enumerate(source.splitlines(), 1), kind_of):
        if kind:
            yield kind, " ".join(line.strip() for _, line in block)


def _in_nodes(nodes: list[ast.AST], module: str) -> Iterator[tuple[str, str]]:
    for node in nodes:
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            words = [each.value for each in ast.walk(node.exc) if isinstance(each, ast.Constant)]
            yield "an error message", " ".join(word for word in words if isinstance(word, str))
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            text = (ast.get_docstring(node) or "").partition(">>>")[0]
            yield "a docstring", f"{module}.{node.name}: {text}"


# --- what a grammar makes

_SLOTS = {
    "opening": "|do you know:|tell me please:|one question:|i wonder,|can you say|for my homework:|out of interest,|"
    "quick one:|somebody asked me|help me out:|any idea",
    "someone": "the baker|our neighbour|the captain|a young painter|the committee|my grandmother|the orchestra|"
    "a tired farmer|the mayor|the twins|an old sailor|the gardener|a visiting scholar|the goalkeeper|the plumber",
    "did": "repaired|painted|sold|lost|built|borrowed|cleaned|found|photographed|hid|returned|measured|carried off",
    "object": "the wooden boat|a silver ring|the church bell|an antique clock|the stone bridge|a violin|"
    "the red lantern|the greenhouse|a leather suitcase|the telescope|an iron gate|the weather vane|"
    "a chess board|a sledge",
    "where": "in lisbon|near the harbour|on the island|at the station|behind the mill|in the valley|by the lake|"
    "at the market|in the old town|below the castle|across the border|at the airport",
    "when": "last winter|in 1987|before the war|on friday|at dawn|during the festival|two years ago|at midnight|"
    "in early spring|after the flood|on the first of may|in the nineties",
    "people": "teacher|singer|general|doctor|swimmer|poet|engineer|minister|pilot|chemist|tailor|referee",
    "things": "apples|tickets|bridges|letters|horses|windows|candles|songs|coins|tents|barrels|posters",
    "aspect": "soup|service|room|staff|view|breakfast|bed|music|garden|price|coffee|balcony|pool|location|terrace|"
    "menu|lobby|shower|wine|lighting|parking",
    "good": "lovely|excellent|charming|great|wonderful|pleasant|superb|perfect|delightful|fine",
    "bad": "awful|terrible|dreadful|poor|disappointing|horrible|nasty|bad|miserable|shabby",
    "aside": "|we came with friends.|it was our second visit.|i booked online.|we stayed for three nights.|"
    "the town was full.|it rained all week.|my sister chose it.|we arrived late.",
}  # fmt: skip

_HELD_OUT = ("object", "someone", "aside")  # slots whose last third of words is in the test split alone

_QUESTIONS = {
    "a number": "how many {things} did {someone} buy {when}|how much did {object} cost {where}|what is the number of "
    "{things} that {someone} {did} {when}|how far is it from {object} to the {things} {where}|how old was the {people} "
    "who {did} {object}|what share of the {things} was {did} {where}",
    "a place": "where did {someone} put {object} {when}|which city has the most {things}|what is the name of the town "
    "in which {someone} {did} {object}|in which country was the {people} born {when}|from where did {someone} bring "
    "the {things}|what village did {someone} come from {when}",
    "a person": "who {did} {object} {where}|which {people} {did} {object} {when}|what is the name of the {people} who "
    "{did} the {things} {where}|to whom did {someone} give {object} {when}|whose {things} were {did} {where}|who was "
    "with {someone} {where}",
    "a time": "when was {object} {did} {where}|in what year did {someone} sell {object}|"
    "how long ago was {object} {did}|on which day did {someone} come {where}|"
    "what was the date when the {people} {did} {object}|until when did "
    "{someone} keep the {things}",
    "a reason": "why was {object} {did} {when}|what made {someone} give up the {things} {where}|for what reason did "
    "the {people} leave {when}|how come {someone} {did} {object}|"
    "what was the cause of the trouble with {object} {where}|"
    "why are there no {things} {where}",
    "a thing": "what did {someone} see {where} {when}|which of the {things} was {did} {when}|what was it that the "
    "{people} {did} {where}|with what did {someone} open {object}|what kind of {things} did {someone} like|what did "
    "the {people} wear {when}",
}  # fmt: skip

_REVIEWS = {
    "negative": "{aside} the {aspect} was {bad}.|the {aspect} was {bad} and the {aspect} {bad}.|{aside} what {bad} "
    "{aspect}, what {bad} {aspect}.|{bad} {aspect}, and the {aspect} was just as {bad}. {aside}|the {aspect} was not "
    "{good}. {aside}|{aside} we wished for a {good} {aspect}, but it was {bad}.|the {aspect} was anything but {good}.",
    "positive": "{aside} the {aspect} was {good}.|the {aspect} was {good} and the {aspect} {good}.|{aside} what {good} "
    "{aspect}, what {good} {aspect}.|{good} {aspect}, and the {aspect} was just as {good}. {aside}|the {aspect} was "
    "not {bad}. {aside}|{aside} we feared a {bad} {aspect}, but it was {good}.|the {aspect} was anything but {bad}.",
}


def _grammar(task: str, templates: Mapping[str, str], opening: str = "") -> Callable[[str], list[list[str]]]:
    def make(split: str) -> list[list[str]]:
        random = np.random.default_rng(seed_of("texts", task, split))
        return [
            [_filled(opening + _choice(of_class.split("|"), random), split, random) for _ in range(SPLITS[split] * 2)]
            for of_class in templates.values()
        ]

    return make


def _filled(template: str, split: str, random: Random) -> str:
    def word(slot: re.Match[str]) -> str:
        words = _SLOTS[slot[1]].split("|")
        if slot[1] not in _HELD_OUT:
            return _choice(words, random)
        held_out = len(words) - len(words) // 3
        return _choice(words[held_out:] if split == "test" else words[:held_out], random)

    filled = " ".join(re.sub(r"{(\w+)}", word, template).split())
    return re.sub(r"\ba (?=[aeiou])", "an ", filled)


def _choice(options: list[str], random: Random) -> str:
    return options[random.integers(len(options))]


# --- the tasks


class Written(NamedTuple):
    """A task: what its classes are called, and a split's candidates, by class."""

    classes: tuple[str, ...]
    texts: Callable[[str], list[list[str]]]


TASKS: dict[str, Written] = {
    "reviews": Written(tuple(_REVIEWS), _grammar("reviews", _REVIEWS)),
    "kinds": Written(_KINDS, _kinds),
    "libraries": Written(tuple(_LIBRARIES), _libraries),
    "questions": Written(tuple(_QUESTIONS), _grammar("questions", _QUESTIONS, "{opening} ")),
}


def samples(task: str) -> dict[str, tuple[list[str], list[int]]]:
    """Texts and labels of a task's splits, classes in equal shares; no text stands in two splits or under two labels.

    Raises:
        InputError: No such task, or an installation without Python's or a package's sources.
    """
    if task not in TASKS:
        raise InputError(f"The texts have the tasks {', '.join(TASKS)}; asked for '{task}'.")
    written, splits, seen = TASKS[task], {}, set[str]()
    for split, number in SPLITS.items():
        kept: list[list[str]] = []
        for texts in written.texts(split):
            new = sorted({text.lower(): text for text in texts if text.lower() not in seen}.values(), key=_drawn)
            kept.append(new[: number // len(written.classes)])
            seen.update(text.lower() for text in kept[-1])
        if min(map(len, kept)) < number // len(written.classes):
            raise InputError(f"Too few texts for the demo's task '{task}': sources of Python or packages are missing.")
        label_of = {text: label for label, of_class in enumerate(kept) for text in of_class}
        texts = sorted(label_of, key=_drawn)
        splits[split] = texts, [label_of[text] for text in texts]
    return splits


def _drawn(text: str) -> int:
    """A place in a random order that other texts do not change."""
    return seed_of("texts", text)
