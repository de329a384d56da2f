"""Objects that remember how they were made, so that a run can be written down and made again from text."""

import functools
import hashlib
import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from adamerge.types import InputError, raise_all

# Options that have code run which a model brings along: those of a class, and those handed through to others.
_RUNS_CODE = re.compile(r"(^|_)(remote|trust|trusted|code|unsafe)(_|$)")
_HANDED_THROUGH = re.compile(r"(trust_)?remote_code")


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
            bound = signature.bind_partial(self, *args, **kwargs)
            bound.apply_defaults()
            kept = list(bound.arguments.items())[1 + cls.given :]
        except TypeError:  # wrong arguments: the constructor says so itself
            kept = []
        flat: dict[str, Any] = {}
        for name, value in kept:
            flat.update(value if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD else {name: value})
        object.__setattr__(self, "_arguments", flat)
        return self

    @classmethod
    def foreign_code(cls, options: Mapping[str, Any]) -> list[str]:
        """The options, each with its value, that have code from outside run; `revive` asks for trust before it.

        Default: those that are called so, unless they are false. Override it for options whose values name code.
        """
        return _switched_on(options, _RUNS_CODE.search)


def spec(value: Any, *, strict: bool = True) -> Any:
    """The text form of a value.

    Plain data stay, a recorded object and a `partial` become `{class_path, init_args}`, a class or function its path.

    Args:
        value: What was configured.
        strict: Refuse what cannot be made again from text; else say its type in angle brackets.

    Raises:
        InputError: The value cannot be made again from text (a lambda, a live module, a class of `__main__`).
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Recorded):
        return {"class_path": _path(type(value), strict), "init_args": spec(value._arguments, strict=strict)}
    if is_dataclass(value) and not isinstance(value, type):
        return spec(vars(value), strict=strict)
    if isinstance(value, functools.partial):
        # the parser's own partials hold the class among their arguments
        made = next((part for part in value.args if isinstance(part, type)), value.func)
        if strict and made is value.func and value.args:
            raise InputError(f"{value} cannot be written down: give its arguments by keyword.")
        return {"class_path": _path(made, strict), "init_args": spec(value.keywords, strict=strict)}
    if isinstance(value, Mapping):
        return {str(key): spec(item, strict=strict) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [spec(item, strict=strict) for item in value]
    return _path(value, strict)


def digest_of(*parts: Any) -> str:
    """32 hexadecimal digits that name plain data."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def digest_of_tensor(tensor: Tensor) -> str:
    """Hex sha256 of the values' bytes."""
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(raw.numpy().tobytes()).hexdigest()


def revive(value: Any, *, trust: bool, partial: bool = False, kind: type | None = None) -> Any:
    """Make again what `spec` has written; unless trusted, nothing foreign is imported, nor switched on by an option.

    Args:
        value: The text form.
        trust: Allow classes and functions from outside adamerge, and options that have code run.
        partial: Give a callable that waits for its first arguments, not an object; a string is a function's path then.
        kind: What the class must be a subclass of.

    Raises:
        InputError: Foreign code without trust, a path that leads nowhere, or arguments that do not fit.
    """
    if isinstance(value, Mapping) and "class_path" in value:
        cls = _resolve(value["class_path"], trust)
        if not trust:
            raise_all(_code_options(cls, value.get("init_args") or {}), "the merge's record")
        if kind is not None and isinstance(cls, type) and not issubclass(cls, kind):
            raise InputError(f"The merge is built with '{value['class_path']}' where a {kind.__name__} must stand.")
        hints = typing.get_type_hints(getattr(cls, "__init__", cls))
        waits = {name for name, hint in hints.items() if _is_importable(hint)}
        arguments = {k: revive(v, trust=trust, partial=k in waits) for k, v in (value.get("init_args") or {}).items()}
        if not trust:
            raise_all(_of_another_kind(hints, waits & set(arguments), arguments), "the merge's record")
        try:
            return functools.partial(cls, **arguments) if partial else cls(**arguments)
        except TypeError as error:
            raise InputError(f"'{value['class_path']}' cannot be made again: {error}.") from error
    if partial and isinstance(value, str):
        return _resolve(value, trust)
    if isinstance(value, Mapping):
        if not trust:
            raise_all(map(_asks_for_code, _switched_on(value, _HANDED_THROUGH.fullmatch)), "the merge's record")
        return {key: revive(item, trust=trust) for key, item in value.items()}
    return [revive(item, trust=trust) for item in value] if isinstance(value, list) else value


def _is_importable(hint: Any) -> bool:
    """Tell whether an argument is a class or function, which stands in text as its path."""
    if hint in (type, Callable) or typing.get_origin(hint) in (type, Callable):
        return True
    options = [each for each in typing.get_args(hint) if each is not type(None)]
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return union and str not in options and any(map(_is_importable, options))


def _switched_on(options: Mapping[str, Any], is_switch: Callable[[str], Any]) -> list[str]:
    """The switches among options that are on, each with its value."""
    return [f"{key}: {value}" for key, value in options.items() if is_switch(str(key)) and value not in (False, None)]


def _code_options(cls: type, options: Mapping[str, Any]) -> Iterator[str]:
    found = cls.foreign_code(options) if issubclass(cls, Recorded) else _switched_on(options, _RUNS_CODE.search)
    return map(_asks_for_code, found)


def _asks_for_code(option: str) -> str:
    """Return the message about an option that has code run."""
    return (
        f"The merge's record has the option `{option}`, which runs code that a model brings along; pass trust=True (in "
        "a command: --trust) if you trust it."
    )


def _of_another_kind(hints: Mapping[str, Any], waits: Iterable[str], arguments: Mapping[str, Any]) -> Iterator[str]:
    """Yield a problem for each class of another kind than its argument asks for."""
    for name in waits:
        made = arguments[name].func if isinstance(arguments[name], functools.partial) else arguments[name]
        wanted = [kind for kind in _made_by(hints[name]) if isinstance(kind, type)]
        if isinstance(made, type) and wanted and not issubclass(made, tuple(wanted)):
            yield f"The merge's record names {made.__name__} as `{name}`, which wants a {wanted[0].__name__}."


def _made_by(hint: Any) -> Iterator[Any]:
    """The classes of what an argument makes that is a class or function."""
    if typing.get_origin(hint) is Callable:
        yield typing.get_args(hint)[-1]
    elif typing.get_origin(hint) in (typing.Union, types.UnionType):
        for option in typing.get_args(hint):
            yield from _made_by(option)


def foreign(path: str) -> str:
    """Return the message about code that is not trusted."""
    return (
        f"The merge is built with '{path}', which is not part of adamerge; pass trust=True (in a command: --trust) "
        "if you trust it."
    )


def _resolve(path: Any, trust: bool) -> Any:
    module, _, name = str(path).rpartition(".")
    if not trust and not module.startswith("adamerge."):
        raise InputError(foreign(str(path)))
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"The merge is built with '{path}', which cannot be imported: {error}.") from error
    ours = (
        isinstance(found, type)
        and issubclass(found, (Recorded, nn.Module))
        and found.__module__.startswith("adamerge.")
    )
    if not trust and not ours:  # a function of ours could be talked into trusting others
        raise InputError(foreign(str(path)))
    return found


def _path(value: Any, strict: bool) -> str:
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    found: Any = None
    if module and name and module != "__main__":
        try:
            found = functools.reduce(getattr, name.split("."), import_module(module))
        except (ImportError, AttributeError):
            found = None
    if found is value and value is not None:
        return f"{module}.{name}"
    if not strict:
        return f"<{name or type(value).__name__}>"
    what = f"A {type(value).__name__} ({name or 'without a name'})"
    raise InputError(
        f"{what} cannot be written down in the merge's record, so it could not be loaded again. "
        "Give a class or function that can be imported by name, from a module of its own."
    )
