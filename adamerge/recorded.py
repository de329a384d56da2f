"""Objects that remember how they were made, so that a run can be written down and made again from text."""

import functools
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

from adamerge.types import InputError


class Recorded:
    """Base of everything a user configures: keeps the arguments of its construction for `spec`.

    Attributes:
        given: How many leading constructor arguments the engine supplies itself (task vectors, a task); they are not
            kept.
    """

    given: ClassVar[int] = 0
    _arguments: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        self = super().__new__(cls)
        signature = inspect.signature(cls.__init__)
        try:
            kept = list(signature.bind_partial(self, *args, **kwargs).arguments.items())[1 + cls.given :]
        except TypeError:  # wrong arguments: the constructor says so itself
            kept = []
        flat: dict[str, Any] = {}
        for name, value in kept:
            flat.update(value if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD else {name: value})
        object.__setattr__(self, "_arguments", flat)
        return self


def spec(value: Any) -> Any:
    """The text form of a value.

    Plain data stay, a recorded object becomes `{class_path, init_args}`, a function its path.

    Args:
        value: What was configured.

    Raises:
        InputError: The value cannot be made again from text (a lambda, a live module, a class of `__main__`).
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Recorded):
        return {"class_path": _path(type(value)), "init_args": spec(value._arguments)}
    if is_dataclass(value) and not isinstance(value, type):
        return spec(vars(value))
    if isinstance(value, functools.partial):
        made = next(
            (part for part in value.args if isinstance(part, type)), value.func
        )  # the parser's partials name it as argument
        return {"class_path": _path(made), "init_args": {k: spec(v) for k, v in value.keywords.items()}}
    if isinstance(value, Mapping):
        return {str(key): spec(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [spec(item) for item in value]
    return _path(value)


def _path(value: Any) -> str:
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    found: Any = None
    if module and name and module != "__main__":
        try:
            found = functools.reduce(getattr, name.split("."), import_module(module))
        except (ImportError, AttributeError):
            found = None
    if found is not value or value is None:
        raise InputError(
            f"{value!r} cannot be written down in the merge's record, so the merge could not be loaded again. "
            "Give a class or function that can be imported by name, from a module of its own."
        )
    return f"{module}.{name}"
