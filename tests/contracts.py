"""Every subclass of a family, found by walking the package: a new one is tested without writing a test."""

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Container
from functools import partial
from typing import Any, Literal, get_args, get_origin, get_type_hints

import adamerge
from adamerge.objectives import Objective
from adamerge.rules import LayerWise, MergeRule
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


def _choices(cls: type) -> dict[str, tuple[str, Any]]:
    """By name, option and value: every value but the default of each option that is a switch or one of a few words."""
    hints, found = get_type_hints(cls.__init__), {}
    for option, parameter in inspect.signature(cls).parameters.items():
        if hints.get(option) is bool:
            found[option] = (option, not parameter.default)
        elif get_origin(hints.get(option)) is Literal:
            found |= {value: (option, value) for value in get_args(hints[option]) if value != parameter.default}
    return found


def _variants(classes: list[type], options: Container[str] = ()) -> dict[str, Callable[..., Any]]:
    made: dict[str, Callable[..., Any]] = {}
    for cls in classes:
        made[cls.__name__] = cls
        for name, (option, value) in _choices(cls).items():
            if option in options:
                made[f"{cls.__name__}-{name}"] = partial(cls, **{option: value})
    return made


RULES = _variants(_family(MergeRule), {"activation"})
TRANSFORMS = _variants(_family(Transform))
OBJECTIVES = _variants(
    _family(Objective), {"loss", "on", "normalize", "confident", "divide_by_log_classes", "symmetric"}
)
TASK_MODULES = _variants(_family(TaskModule))

assert LayerWise in _family(MergeRule)
assert {"LayerWise-softmax", "FeatureDistillation-blocks", "PseudoLabel-confident"} <= RULES.keys() | OBJECTIVES.keys()
