"""The schema of a merge's record: checked once, where it is read, so that all who use its parts may rely on it."""

import re
import typing
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from adamerge.naming import check_task_names
from adamerge.recipe import SpaceOptions, VectorOptions
from adamerge.types import InputError

_LONGEST = 100_000  # characters of a text: regular expressions may list tensors
_MOST_TASKS = 1_000
_LARGEST = 2**40  # of a count or width
_SHOWN = 3  # problems in one message

Problems = Iterator[str]
Check = Callable[[Any, str], Problems]  # of a value that stands at a place


def check_record(record: Mapping[str, Any], file: Path) -> None:
    """Check that a record has all its parts, of the types that readers of records take them for, and that they agree.

    Args:
        record: What the file holds, as plain data.
        file: Where it stands, for messages.

    Raises:
        InputError: A part is missing, has another type or contradicts another; the message names the place.
    """
    problems = list(islice(_RECORD(record, ""), _SHOWN)) or list(islice(_disagreements(record), _SHOWN))
    if problems:
        raise InputError(
            f"{file} is cut short or damaged: {'; '.join(problems)}. Copy it again from where it was written, or learn "
            "the merge again."
        )
    check_task_names(record["classes"], str(file))


# --- the kinds of values


def _is(value: Any, kind: str, place: str) -> str:
    shown = ascii(value)[:60] if isinstance(value, (str, bool, int, float, type(None))) else f"a {type(value).__name__}"
    return f"`{place}` is {shown}, and must be {kind}"


def _of_type(kind: str, *types: type) -> Check:
    def check(value: Any, place: str) -> Problems:
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            yield _is(value, kind, place)

    return check


def _text(kind: str, pattern: str, longest: int = _LONGEST) -> Check:
    compiled = re.compile(pattern)

    def check(value: Any, place: str) -> Problems:
        if not isinstance(value, str) or len(value) > longest or not compiled.fullmatch(value):
            yield _is(value, kind, place)

    return check


def _count(value: Any, place: str) -> Problems:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < _LARGEST:
        yield _is(value, "a whole number from 0", place)


def _optional(check: Check) -> Check:
    return lambda value, place: iter(()) if value is None else check(value, place)


def _one_of(*values: Any) -> Check:
    def check(value: Any, place: str) -> Problems:
        if not any(value is each or (isinstance(value, str) and value == each) for each in values):
            yield _is(value, f"one of {', '.join(map(str, values))}", place)

    return check


def _list_of(check: Check) -> Check:
    def checked(value: Any, place: str) -> Problems:
        if not isinstance(value, list):
            yield _is(value, "a list", place)
        else:
            for number, each in enumerate(value):
                yield from check(each, f"{place}[{number}]")

    return checked


def _mapping_of(check: Check) -> Check:
    def checked(value: Any, place: str) -> Problems:
        if not isinstance(value, dict):
            yield _is(value, "a mapping", place)
        else:
            for key, each in value.items():
                if not isinstance(key, str):
                    yield f"the key {ascii(key)[:60]} of `{place}` must be a text"
                yield from check(each, f"{place}.{ascii(key)[1:61].rstrip(chr(39))}")

    return checked


def _fields(needed: Mapping[str, Check], others: Mapping[str, Check] | None = None, *, closed: bool = False) -> Check:
    known = {**needed, **(others or {})}

    def check(value: Any, place: str) -> Problems:
        if not isinstance(value, dict):
            yield _is(value, "a mapping", place)
            return
        prefix = f"{place}." if place else ""
        yield from (f"`{prefix}{key}` is missing" for key in needed if key not in value)
        for key, each in value.items():
            if key in known:
                yield from known[key](each, f"{prefix}{key}")
            elif closed or not isinstance(key, str):
                yield f"`{place or 'the record'}` has the key {ascii(key)[:60]}, which there is not"

    return check


def _options(of: type) -> Check:
    """Return the check of a dataclass's options, each of the type that it is annotated with."""
    return _fields({}, {name: _annotated(hint) for name, hint in typing.get_type_hints(of).items()}, closed=True)


def _annotated(hint: Any) -> Check:
    arms = [each for each in typing.get_args(hint) if each is not type(None)]
    if typing.get_origin(hint) is Literal:
        return _one_of(*arms)
    if arms:
        return _optional(_annotated(arms[0]))
    return {str: _TEXT, int: _count}[hint]


def _inner(value: Any, place: str) -> Problems:
    """Check the arguments of a class: plain data, with classes in them."""
    if isinstance(value, dict) and "class_path" in value:
        yield from _part(value, place)
    elif isinstance(value, dict):
        yield from _mapping_of(_inner)(value, place)
    elif isinstance(value, list):
        yield from _list_of(_inner)(value, place)


def _part(value: Any, place: str) -> Problems:
    """Check a class with its arguments."""
    return _fields({"class_path": _CLASS}, {"init_args": _optional(_mapping_of(_inner))}, closed=True)(value, place)


def _part_or_text(value: Any, place: str) -> Problems:
    yield from () if isinstance(value, str) else _part(value, place)


_TEXT = _text("a text", r"(?s).*")
_NAME = _of_type("a text or a whole number", str, int)
_PRINTED = _text("a text in one line, without control characters", r"[^\0-\x1f\x7f]+", 4096)
_TRUTH = _of_type("true or false", bool)
_NUMBER = _of_type("a number", int, float)
_SHA256 = _text("a sha256, 64 hexadecimal digits", r"[0-9a-f]{64}")
# `<Name>` stands for data made in Python, which no text can name; loading a merge does not make them again
_CLASS = _text("a class's path, such as package.module.Name", r"\w+(\.\w+)*|<[\w.<>]+>", 1000)
_SOURCE = _fields({"source": _PRINTED, "sha256": _SHA256}, {"revision": _optional(_PRINTED)})

_RECORD = _fields(
    {
        "weights": _SHA256,
        "labels": _fields({"task": _list_of(_TEXT), "group": _list_of(_TEXT)}),
        "sources": _mapping_of(_SOURCE),
        "backbone": _part,
        "rule": _part,
        "transforms": _list_of(_part),
        "task_modules": _list_of(_part),
        "space": _options(SpaceOptions),
        "vectors": _options(VectorOptions),
        "left_out": _mapping_of(_TEXT),
        "classes": _mapping_of(_list_of(_NAME)),
        "widths": _fields({"features": _count, "blocks": _mapping_of(_count)}),
    },
    {
        "folds": _TRUTH,
        "finished": _TRUTH,
        "steps": _optional(_count),
        "seed": _optional(_of_type("a whole number", int)),
        "split": _optional(_TEXT),
        "init_from": _optional(_TEXT),
        "scores": _optional(_mapping_of(_mapping_of(_NUMBER))),
        "cost": _optional(_fields({}, {"learnables": _count, "seconds": _NUMBER, "peak_memory": _count})),
        "data": _optional(_part_or_text),
        "objectives": _optional(_list_of(_part_or_text)),
        "phases": _optional(_list_of(_mapping_of(lambda value, place: iter(())))),
        "versions": _optional(_mapping_of(_TEXT)),
    },
)


# --- what must agree


def _disagreements(record: Mapping[str, Any]) -> Problems:
    tasks, sources, labels = list(record["classes"]), record["sources"], record["labels"]
    experts = [who.removeprefix("expert ") for who in sources if who.startswith("expert ")]
    if "base" not in sources:
        yield "`sources` has no `base`"
    if not experts:
        yield "`sources` has no `expert TASK`"
    if len(experts) > _MOST_TASKS:
        yield f"`sources` has {len(experts):,} experts, of which there may be {_MOST_TASKS:,}"
    for kind in ("task", "group"):
        if len(set(labels[kind])) != len(labels[kind]):
            yield f"`labels.{kind}` has a name twice"
    for place, names in (("sources", experts), ("labels.task", labels["task"])):
        if set(names) != set(tasks):
            other = sorted(set(names) ^ set(tasks))
            yield f"`{place}` and `classes` are not of the same tasks: only one of them has {ascii(other[0])[:60]}"
