"""Which of a checkpoint's contents are the model's named tensors."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from adamerge.convert.budget import Budget
from adamerge.convert.parts import Array, Inert, Stored
from adamerge.types import InputError, some

WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
_DEEPEST = 100  # wrappers or modules inside one another
Tensors = dict[str, Stored | Array]
_Pairs = Iterator[tuple[str, Stored | Array]]


def named_tensors(value: Any, source: str, key: str | None = None) -> tuple[Tensors, list[str]]:
    """The model's tensors by name, and the names of what stands beside them.

    A state dict is taken as it is; of a dict around one (`state_dict`, `model_state_dict`, `model`, `module`) that
    entry; of a whole module its parameters and persistent buffers, under the names of its own state dict.

    Args:
        value: What was unpickled.
        source: What messages call it.
        key: The entry to take, where there are several with tensors; a path with dots for one further down.

    Raises:
        InputError: No such entry, no tensors, or several entries with tensors and none of them named; parts that are
            nested without end, or share their parts so often that their names have no end.
    """
    names = _Names(source)
    for part in key.split(".") if key else ():
        fields = _fields(value)
        if part not in fields:
            raise InputError(f"{source} has no entry '{part}' (of `key` '{key}'); it has {some(map(str, fields))}.")
        names.leave("", (other for other in fields if other != part))
        value = fields[part]
    return _found(value, names), names.left_out


class _Names:
    """The names of a checkpoint's parts; each counts against the budget, since a shared part has one for every path."""

    def __init__(self, source: str) -> None:
        self.source, self.left_out = source, list[str]()
        self.budget = Budget(source, 2**22)

    def of(self, where: str, key: Any) -> str:
        name = f"{where}{key}"
        self.budget.step()
        self.budget.copy(len(name))
        return name

    def leave(self, where: str, keys: Iterable[Any]) -> None:
        self.left_out += [self.of(where, key) for key in keys]

    def too_deep(self) -> InputError:
        return InputError(
            f"{self.source} holds parts that are nested more than {_DEEPEST} deep, or in themselves; save the model's "
            "plain `state_dict()` again."
        )


def _found(value: Any, names: _Names) -> Tensors:
    holding = _holding(value, names.budget)
    where = ""
    for _ in range(_DEEPEST):
        if _is_module(value):
            return _distinct(_of_module(value, names, "", (), where), names.source)
        if isinstance(value, Inert) and value.path.startswith("__torch__."):
            return _distinct(_of_script(value, names, "", ()), names.source)
        fields = _fields(value)
        direct = {name: each for name, each in fields.items() if isinstance(each, (Stored, Array))}
        inside = _inside(direct, [name for name in fields if id(fields[name]) in holding], where, names.source)
        if inside is None:
            names.leave(where, (name for name in fields if name not in direct))
            return direct
        names.leave(where, (name for name in fields if name != inside))
        value, where = fields[inside], names.of(where, f"{inside}.")
    raise names.too_deep()


def _inside(direct: Tensors, nested: list[Any], where: str, source: str) -> str | None:
    """The entry with the tensors; None where they stand here."""
    wrapper = next((name for name in WRAPPERS if name in nested), None)
    inside = wrapper or (nested[0] if len(nested) == 1 and not direct else None)
    if not all(isinstance(name, str) for name in (*direct, *nested)) or not (inside or direct or nested):
        raise InputError(f"{source} holds no named tensors{where and f' in {where}'}; save `model.state_dict()`.")
    if nested and not inside:
        raise InputError(
            f"{source} has several entries with tensors: {', '.join(map(str, [*direct, *nested][:12]))}. Name the one "
            f"to convert with key='{nested[0]}' (in a command: --key {nested[0]})."
        )
    return inside


def _holding(value: Any, budget: Budget) -> set[int]:
    """The ids of all containers from which a tensor can be reached; each container is looked into once."""
    around: dict[int, list[int]] = defaultdict(list)
    holding: set[int] = set()
    seen, left = {id(value)}, [value]
    while left:
        container = left.pop()
        for part in _parts(container):
            budget.step()
            if isinstance(part, (Stored, Array)):
                holding.add(id(container))
            elif isinstance(part, (list, tuple, dict, Inert)):
                around[id(part)].append(id(container))
                if id(part) not in seen:
                    seen.add(id(part))
                    left.append(part)
    reached = list(holding)
    while reached:
        new = {outer for outer in around.pop(reached.pop(), ()) if outer not in holding}
        holding |= new
        reached += new
    return holding


def _parts(container: Any) -> Iterable[Any]:
    return container if isinstance(container, (list, tuple)) else _fields(container).values()


def _fields(value: Any) -> Mapping[Any, Any]:
    return value.state if isinstance(value, Inert) else value if isinstance(value, dict) else {}


def _is_module(value: Any) -> bool:
    return isinstance(value, Inert) and {"_parameters", "_modules"} <= value.state.keys()


def _distinct(pairs: _Pairs, source: str) -> Tensors:
    tensors: Tensors = {}
    for name, tensor in pairs:
        if name in tensors:
            raise InputError(f"{source} holds two tensors that would be called '{name}'; rename one of them.")
        tensors[name] = tensor
    return tensors


def _of_module(module: Inert, names: _Names, name: str, above: tuple[int, ...], where: str) -> _Pairs:
    """Name tensors as `nn.Module.state_dict` does; `where` tells where the whole stood, and is no part of the names."""
    if len(above) > _DEEPEST:
        raise names.too_deep()
    passing = module.state.get("_non_persistent_buffers_set")
    passing = passing if isinstance(passing, (set, frozenset)) else ()
    for home, skipped in (("_parameters", ()), ("_buffers", passing)):
        for key, tensor in _fields(module.state.get(home)).items():
            if isinstance(tensor, (Stored, Array)) and key not in skipped:
                yield names.of(name, key), tensor
            elif tensor is not None and key not in skipped:
                names.leave(where + name, [key])
    for key, child in _fields(module.state["_modules"]).items():
        if _is_module(child) and id(child) not in above:
            yield from _of_module(child, names, names.of(name, f"{key}."), (*above, id(module)), where)
        elif child is not None:
            names.leave(where + name, [key])


def _of_script(module: Inert, names: _Names, name: str, above: tuple[int, ...]) -> _Pairs:
    """A TorchScript module keeps parameters, buffers and submodules side by side as attributes."""
    if len(above) > _DEEPEST:
        raise names.too_deep()
    for key, value in module.state.items():
        names.budget.step()
        if isinstance(value, (Stored, Array)):
            yield names.of(name, key), value
        elif isinstance(value, Inert) and id(value) not in above:
            yield from _of_script(value, names, names.of(name, f"{key}."), (*above, id(module)))
