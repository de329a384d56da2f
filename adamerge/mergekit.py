"""A learned merge as a configuration of mergekit, where the method is task arithmetic; checked on the weights."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from adamerge.artifact import open_merge, pinned, read_record
from adamerge.checkpoints import Overlaid, Selected, State, locate
from adamerge.files import atomic_file
from adamerge.hub import hub_id
from adamerge.merged import MergedModel
from adamerge.report import shown
from adamerge.rules import LayerWise, TaskWise
from adamerge.types import InputError, some

log = logging.getLogger("adamerge")

DTYPES = ("float32", "bfloat16", "float16")
Weights = tuple[float, ...]  # one for each task
_WHY = {
    "Trim": "mergekit's ties trims each tensor by itself, Trim the whole model at once",
    "ElectSign": "mergekit elects signs after weighting the task vectors, ElectSign before",
    "Concrete": "a mask over the weights",
}
_EXACT, _STORED = 1e-5, 2.0**-7  # of the largest weight; and of the largest step, where vectors are kept in 16 bits


def mergekit(run: str | Path, out: str | Path, *, dtype: str = "float32", trust: bool = False) -> str:
    """Write a run's merge as a configuration of mergekit; what to do with it is returned as text.

    Args:
        run: A run's directory or its `merge` folder.
        out: The YAML file to write; it must not exist.
        dtype: Of the weights that mergekit writes: `float32`, `bfloat16` or `float16`. It merges in float32.
        trust: Also build classes from outside adamerge that the merge's record names.

    Raises:
        InputError: `out` exists, or what `mergekit_config` raises.
    """
    target = Path(out).expanduser().resolve()
    _refuse_existing(target)
    config = mergekit_config(run, dtype=dtype, trust=trust)
    head = (
        "# Learned by adamerge: base + sum of weight * (model - base). The first filter that a name contains counts.\n"
    )
    with atomic_file(target) as new:
        new.write_text(head + yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf-8")
        _refuse_existing(target)
    return (
        f"Written for mergekit, checked on all merged tensors: {shown(target)}\n"
        f"Merge with: mergekit-yaml {shown(target)} FOLDER"
    )


def mergekit_config(path: str | Path, *, dtype: str = "float32", trust: bool = False) -> dict[str, Any]:
    """A run's merge as mergekit's configuration, as plain data.

    The coefficients are those that the rule uses, whatever its activation. What the run did not merge (heads, skipped
    tensors) has the weight 0, so that it stays the base's.

    Args:
        path: A run's directory or its `merge` folder.
        dtype: Of the weights that mergekit writes; it merges in float32.
        trust: Also build classes from outside adamerge that the merge's record names.

    Raises:
        InputError: No merge, a source that mergekit has no name for, or a method that is not task arithmetic.
    """
    if dtype not in DTYPES:
        raise InputError(f"`dtype` is '{dtype}'; it is one of {', '.join(DTYPES)}.")
    folder, record = read_record(path)
    _check_method(record, str(folder))
    members = {who: entry for who, entry in record["sources"].items() if who == "base" or who.startswith("expert ")}
    models = {who: _reference(who, entry) for who, entry in members.items()}
    files = [who for who, path in models.items() if Path(path).exists() and not (Path(path) / "config.json").is_file()]
    if files:
        log.warning("mergekit reads hub ids and folders with a config.json, which these are not: %s.", some(files))
    model = open_merge(folder, trust=trust)
    if type(model.rule) not in (LayerWise, TaskWise):
        raise InputError(_not_expressible(str(folder), [f"the rule {type(model.rule).__name__}"]))
    states = {who: model.backbone.open(pinned(record["sources"][who])) for who in _members(model)}
    wanted = _weights_by_name(model, states)
    rows = filters(wanted)
    _check_weights(model, states, rows, str(folder))
    entries = []
    for place, task in enumerate(model.tasks):
        setting = [{**({"filter": f} if f is not None else {}), "value": weights[place]} for f, weights in rows]
        weight = setting if len(setting) > 1 else setting[0]["value"]
        entries.append({"model": models[f"expert {task}"], "parameters": {"weight": weight}})
    return {
        "merge_method": "task_arithmetic",
        "base_model": models["base"],
        "models": entries,
        "parameters": {"normalize": False, "lambda": 1.0},
        "dtype": "float32",
        **({"out_dtype": dtype} if dtype != "float32" else {}),
    }


def filters(wanted: Mapping[str, Weights]) -> list[tuple[str | None, Weights]]:
    """Filters such that the first one that a tensor's name contains has its weights; None, the last, takes all names.

    Args:
        wanted: The weights of every tensor, by its name in the checkpoint.
    """
    by_weights: dict[Weights, list[str]] = {}
    for name, weights in wanted.items():
        by_weights.setdefault(weights, []).append(name)
    rest = max(by_weights, key=lambda weights: len(by_weights[weights]))
    chosen = {part: weights for weights, names in by_weights.items() if weights != rest for part in _prefixes(names)}
    rows = _longest_first(chosen, rest)
    wrong = {name: weights for name, weights in wanted.items() if resolved(name, rows) != weights}
    rows = _longest_first({**chosen, **wrong}, rest)
    if any(resolved(name, rows) != weights for name, weights in wanted.items()):
        rows = _longest_first(wanted, rest)  # no name is contained in one that stands after it
    assert all(resolved(name, rows) == weights for name, weights in wanted.items())
    return rows


def _longest_first(chosen: Mapping[str, Weights], rest: Weights) -> list[tuple[str | None, Weights]]:
    return [*sorted(chosen.items(), key=lambda row: -len(row[0])), (None, rest)]


def resolved(name: str, rows: Sequence[tuple[str | None, Weights]]) -> Weights:
    """The weights that mergekit takes for a name: those of the first filter that the name contains."""
    return next(weights for part, weights in rows if part is None or part in name)


def _prefixes(names: Sequence[str]) -> list[str]:
    """The shortest text that names of one module have in common and end with a dot, or else the names."""
    parts = [name.split(".") for name in names]
    common = 0
    while all(len(each) > common + 1 and each[common] == parts[0][common] for each in parts):
        common += 1
    return [".".join(parts[0][:common]) + "."] if common and len(names) > 1 else list(names)


def _members(model: MergedModel) -> list[str]:
    return ["base", *(f"expert {task}" for task in model.tasks)]


def _weights_by_name(model: MergedModel, states: Mapping[str, State]) -> dict[str, Weights]:
    """The weights of all floating tensors of all checkpoints, by the names that the files give them."""
    space, num_tasks = model.vectors.space, len(model.tasks)
    with torch.no_grad():
        shared = model.rule.begin()
        rule = model.rule
        assert isinstance(rule, LayerWise)
        of_name = {name: tuple(rule.of_tensor(name, shared).tolist()) for name in space.shapes}
    if space.buffer_policy == "mean":
        of_name |= {name: (1 / num_tasks,) * num_tasks for name in space.buffers if _is_floating(name, states["base"])}
    of_name = {alias: weights for name, weights in of_name.items() for alias in space.names_of(name)}
    wanted: dict[str, Weights] = {}
    for who, state in states.items():
        names = {stored: name for name, stored in _stored_names(state).items()}
        for stored in _file_of(state):
            weights = of_name.get(names.get(stored, ""), (0.0,) * num_tasks)
            if wanted.setdefault(stored, weights) != weights:
                raise InputError(
                    f"The {who} names another tensor '{stored}' than the other checkpoints do, and mergekit goes by "
                    "names; use `adamerge export`."
                )
    return wanted


def _is_floating(name: str, base: State) -> bool:
    return name in base and base.meta(name)[1].is_floating_point


@torch.no_grad()
def _check_weights(
    model: MergedModel, states: Mapping[str, State], rows: Sequence[tuple[str | None, Weights]], source: str
) -> None:
    """What mergekit makes of the files, by its formula, against the merged weights.

    Raises:
        InputError: They differ by more than rounding.
    """
    shared = model.rule.begin()
    for name in model.vectors.space.shapes:
        merged = model.rule.merge(name, model.vectors.base(name), model.vectors.deltas(name), shared)
        base, *experts = (_read(states[who], model, name) for who in _members(model))
        steps = [
            weight * (expert.float() - base[1].float())
            for weight, (stored, expert) in zip(resolved(base[0], rows), experts, strict=True)
            if expert.shape == base[1].shape
        ]
        found = base[1].float() + sum(steps, torch.zeros(()))
        narrow = model.vectors.deltas(name).dtype.itemsize < 4
        limit = _EXACT * float(merged.abs().max()) + (
            _STORED * float(sum(s.abs().max() for s in steps)) if narrow else 0
        )
        if len(steps) < len(experts) or float((found - merged).abs().max()) > limit:
            raise InputError(_not_expressible(source, [f"the tensor '{name}', which is more than a weighted sum"]))


def _read(state: State, model: MergedModel, name: str) -> tuple[str, Tensor]:
    """A tensor as it stands in the file, with its name there."""
    names, file = _stored_names(state), _file_of(state)
    stored = next(names[alias] for alias in model.vectors.space.names_of(name) if names.get(alias) in file)
    return stored, file[stored]


def _stored_names(state: State) -> dict[str, str]:
    """The network's names to the file's."""
    if isinstance(state, Selected):
        inner = _stored_names(state._state)
        return {name: inner.get(stored, stored) for name, stored in state._names.items()}
    return _stored_names(state._state) if isinstance(state, Overlaid) else {name: name for name in state}


def _file_of(state: State) -> State:
    while isinstance(state, (Selected, Overlaid)):
        state = state._state
    return state


def _check_method(record: Mapping[str, Any], source: str) -> None:
    rule = str(record["rule"].get("class_path", "")).rpartition(".")[2]
    others = [*record["transforms"], *record["task_modules"]]
    names = [str(each["class_path"] if isinstance(each, Mapping) else each).rpartition(".")[2] for each in others]
    problems = [] if rule in ("LayerWise", "TaskWise") else [rule]
    problems += names
    if problems:
        raise InputError(_not_expressible(source, [_said(name, record) for name in problems]))


def _said(name: str, record: Mapping[str, Any]) -> str:
    modules = [str(each["class_path"]).rpartition(".")[2] for each in record["task_modules"]]
    why = _WHY.get(name) or ("a task module, which runs beside the weights" if name in modules else "")
    return f"{name} ({why})" if why else name


def _not_expressible(source: str, what: Sequence[str]) -> str:
    return (
        f"mergekit cannot express the merge in {source}: {'; '.join(what)}. For each tensor it has base + sum of "
        "weight * (model - base). Write the merged weights themselves with `adamerge export`."
    )


def _reference(who: str, entry: Mapping[str, Any]) -> str:
    """A source as mergekit names models: a folder, or a hub id with `@` and the commit."""
    source = str(entry["source"])
    if source.startswith("open_clip:"):
        raise InputError(f"The {who} is '{source}', which mergekit has no name for; use `adamerge export`.")
    known = hub_id(source)
    if known is not None:
        revision = entry.get("revision") or known.revision
        return f"{known.repo}@{revision}" if revision else known.repo
    plain = source.removeprefix("hf-hub:")
    if "+" in plain and not Path(plain).exists() and all(hub_id(part) for part in plain.split("+")):
        return plain  # model+adapter, which mergekit reads alike
    return str(locate(source).resolve())


def _refuse_existing(target: Path) -> None:
    if target.exists() or target.is_symlink():
        raise InputError(f"{target} exists already and is not overwritten: choose another name, or remove it.")
