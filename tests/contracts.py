"""Every subclass of a family, found by walking the package: a new one is tested without writing a test."""

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from typing import Any

import adamerge
from adamerge.objectives import Objective
from adamerge.rules import LayerWise, MergeRule
from adamerge.rules.coefficients import _ACTIVATIONS
from adamerge.task_modules import TaskModule
from adamerge.transforms import Transform

for module in pkgutil.walk_packages(adamerge.__path__, "adamerge."):
    if not module.name.endswith(".fit"):
        importlib.import_module(module.name)


def _family(base: type) -> list[type]:
    found = {base}
    for cls in list(found):
        stack = list(cls.__subclasses__())
        while stack:
            each = stack.pop()
            found.add(each)
            stack += each.__subclasses__()
    ours = [
        cls
        for cls in found
        if cls.__module__.startswith("adamerge.") and not inspect.isabstract(cls) and cls is not base
    ]
    return sorted(ours, key=lambda cls: cls.__qualname__)


def _variants(classes: list[type], option: str | None = None, values: Any = ()) -> dict[str, Callable[..., Any]]:
    from functools import partial

    made: dict[str, Callable[..., Any]] = {}
    for cls in classes:
        made[cls.__name__] = cls
        if option and option in inspect.signature(cls).parameters:
            made.update(
                {f"{cls.__name__}-{value}": partial(cls, **{option: value}) for value in values if value != "none"}
            )
    return made


RULES = _variants(_family(MergeRule), "activation", _ACTIVATIONS)
TRANSFORMS = _variants(_family(Transform))
OBJECTIVES = _variants(_family(Objective))
TASK_MODULES = _variants(_family(TaskModule))

assert LayerWise in _family(MergeRule)
