"""Which of a checkpoint's contents are the model's named tensors."""

from collections.abc import Iterator, Mapping
from typing import Any

from adamerge.convert.pickles import Array, Inert, Stored
from adamerge.types import InputError, some

WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
Tensors = dict[str, Stored | Array]


def named_tensors(value: Any, source: str, key: str | None = None) -> tuple[Tensors, list[str]]:
    """The model's tensors by name, and the names of what stands beside them.

    A state dict is taken as it is; of a dict around one (`state_dict`, `model_state_dict`, `model`, `module`) that
    entry; of a whole module its parameters and persistent buffers, under the names of its own state dict.

    Args:
        value: What was unpickled.
        source: What messages call it.
        key: The entry to take, where there are several with tensors; a path with dots for one further down.

    Raises:
        InputError: No such entry, no tensors, or several entries with tensors and none of them named.
    """
    left_out: list[str] = []
    for part in key.split(".") if key else ():
        fields = _fields(value)
        if part not in fields:
            raise InputError(f"{source} has no entry '{part}' (of `key` '{key}'); it has {some(map(str, fields))}.")
        left_out += [str(other) for other in fields if other != part]
        value = fields[part]
    return _found(value, source, "", left_out), left_out


def _found(value: Any, source: str, where: str, left_out: list[str]) -> Tensors:
    if _is_module(value):
        return dict(_of_module(value, where, left_out, ()))
    if isinstance(value, Inert) and value.path.startswith("__torch__."):
        return dict(_of_script(value, "", ()))
    fields = _fields(value)
    direct = {name: each for name, each in fields.items() if isinstance(each, (Stored, Array))}
    nested = [name for name, each in fields.items() if name not in direct and _holds_tensors(each, set())]
    wrapper = next((name for name in WRAPPERS if name in nested), None)
    only = nested[0] if len(nested) == 1 and not direct else None
    inside = wrapper or only
    if not all(isinstance(name, str) for name in (*direct, *nested)) or (not inside and not direct and not nested):
        raise InputError(f"{source} holds no named tensors{where and f' in {where}'}; save `model.state_dict()`.")
    if inside:
        left_out += [f"{where}{name}" for name in fields if name != inside]
        return _found(fields[inside], source, f"{where}{inside}.", left_out)
    if nested:
        raise InputError(
            f"{source} has several entries with tensors: {', '.join(map(str, [*direct, *nested][:12]))}. Name the one "
            f"to convert with key='{nested[0]}' (in a command: --key {nested[0]})."
        )
    left_out += [f"{where}{name}" for name in fields if name not in direct]
    return direct


def _fields(value: Any) -> Mapping[Any, Any]:
    return value.state if isinstance(value, Inert) else value if isinstance(value, dict) else {}


def _is_module(value: Any) -> bool:
    return isinstance(value, Inert) and {"_parameters", "_modules"} <= value.state.keys()


def _holds_tensors(value: Any, seen: set[int]) -> bool:
    if id(value) in seen:
        return False
    seen.add(id(value))
    if isinstance(value, (Stored, Array)):
        return True
    parts = value if isinstance(value, (list, tuple)) else _fields(value).values()
    return any(_holds_tensors(part, seen) for part in parts)


def _of_module(
    module: Inert, prefix: str, left_out: list[str], above: tuple[int, ...]
) -> Iterator[tuple[str, Stored | Array]]:
    """As `nn.Module.state_dict` names them; `prefix` says where the module stood, and is no part of the names."""
    yield from _of_part(module, "", left_out, above, prefix)


def _of_part(
    module: Inert, name: str, left_out: list[str], above: tuple[int, ...], where: str
) -> Iterator[tuple[str, Stored | Array]]:
    passing = module.state.get("_non_persistent_buffers_set") or ()
    buffers = {k: v for k, v in _fields(module.state.get("_buffers")).items() if k not in passing}
    for key, tensor in {**_fields(module.state["_parameters"]), **buffers}.items():
        if isinstance(tensor, (Stored, Array)):
            yield f"{name}{key}", tensor
        elif tensor is not None:
            left_out.append(f"{where}{name}{key}")
    for key, child in _fields(module.state["_modules"]).items():
        if _is_module(child) and id(child) not in above:
            yield from _of_part(child, f"{name}{key}.", left_out, (*above, id(module)), where)
        elif child is not None:
            left_out.append(f"{where}{name}{key}")


def _of_script(module: Inert, name: str, above: tuple[int, ...]) -> Iterator[tuple[str, Stored | Array]]:
    """A TorchScript module keeps parameters, buffers and submodules side by side as attributes."""
    for key, value in module.state.items():
        if isinstance(value, (Stored, Array)):
            yield f"{name}{key}", value
        elif isinstance(value, Inert) and id(value) not in above:
            yield from _of_script(value, f"{name}{key}.", (*above, id(module)))
