"""A learned merge on disk: `merge.safetensors` holds the learnables, `merge.yaml` how to make it again."""

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from adamerge.backbones import Backbone
from adamerge.budget import budget
from adamerge.checkpoints import open_state
from adamerge.files import atomic_dir, digest
from adamerge.hub import fetch, hub_id
from adamerge.learnables import check_values, labels_of, load_state, saved_state_of, state_of
from adamerge.merged import MergedModel
from adamerge.multitask import MultiTaskModel
from adamerge.reading import check_regular, exists, read_yaml
from adamerge.recipe import Recipe, SpaceOptions, VectorOptions
from adamerge.record import check_record
from adamerge.recorded import foreign, revive
from adamerge.rules import MergeRule
from adamerge.task_modules import TaskModule
from adamerge.transforms import Transform
from adamerge.types import InputError, raise_all, some

log = logging.getLogger("adamerge")

FORMAT = 2
_FREE = {
    "init",
    "trainable",
    "penalties",
    "density",
    "temperature",
    "evaluation",
    "seed",
    "saved_as",
}  # of a rule's options
WEIGHTS, RECORD, EXPORTED = "merge.safetensors", "merge.yaml", "export.json"
_MODULES, _SPARE_MODULES = 100, 20_000  # of the networks: for each tensor of the files, and in addition
_SPARE = 2**26  # elements of a merge, in addition to eight times those of its files


def save(folder: Path, model: MergedModel, record: Mapping[str, Any]) -> None:
    """Write a merge: the folder appears whole or not at all, and replaces an older one whole.

    Args:
        folder: Where; usually `RUN/merge`.
        model: Whose learnables are saved.
        record: `Opened.record` of the model, with whatever else a reader wants to know.

    Raises:
        InputError: No space left on the disk.
    """
    with atomic_dir(folder) as new:
        save_file({name: tensor.contiguous() for name, tensor in saved_state_of(model).items()}, new / WEIGHTS)
        head = {"format": FORMAT, "weights": digest(new / WEIGHTS), "labels": labels_of(model)}
        write_record({**head, **record, "versions": versions()}, new)


def write_record(record: Mapping[str, Any], folder: Path) -> None:
    """Put a record into a folder."""
    text = yaml.safe_dump(dict(record), sort_keys=False, allow_unicode=True, width=120)
    (folder / RECORD).write_text(text, encoding="utf-8")


def round_as_saved(model: MergedModel) -> None:
    """Give the learnables the values that `save` keeps, so that what is scored is what is loaded."""
    load_state(model, saved_state_of(model), labels_of(model), "the model")


def load(path: str | Path, *, trust: bool = False, dtype: torch.dtype | None = None) -> MultiTaskModel:
    """A saved merge as one dense network for inference: model(batch, task="svhn") -> logits [B, C].

    Args:
        path: A run's directory, its `merge` folder, or the hub id of a merge that was pushed, with or without
            `@revision`.
        trust: Also build classes from outside adamerge that the record names; do so only for merges you trust as you
            would code.
        dtype: Cast the merged network; the merge itself is computed in fp32.

    Raises:
        InputError: Not a merge, a changed or missing source, untrusted code, or learnables that do not fit.
    """
    return open_merge(path, trust=trust).folded(dtype=dtype)


def open_merge(path: str | Path, *, trust: bool = False) -> MergedModel:
    """A saved merge with its rule and task vectors, as it was trained; arguments and errors as for `load`."""
    folder, record = read_record(path)
    if not trust:
        raise_all(_foreign(record), "the merge's record")
    raise_all(_elsewhere(record), "the merge's sources")
    with made_again(folder), nullcontext() if trust else _budget(record):
        recipe = _recipe(record, trust)
        opened = recipe.open(record["classes"], record["left_out"], record["widths"])
        raise_all(_changed(record, opened.base, opened.experts), "the merge's sources")
        model, state = opened.merged(opened.load_vectors()), _learnables(folder)
        check_values(model, state, str(folder))
        load_state(model, state, record["labels"], str(folder))
    return model.eval()


@contextmanager
def made_again(folder: Path) -> Iterator[None]:
    """Turn every exception of a block that makes a merge from its record into one that names the record.

    Raises:
        InputError: For every exception in the block.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # options of the right type may be wrong in any way
        log.debug("The merge in %s cannot be made.", folder, exc_info=True)
        said = " ".join(str(error).split())[:300]
        raise InputError(
            f"The merge in {folder} cannot be made from its record and sources ({type(error).__name__}: {said}). Copy "
            f"both again, or mend the options in {folder / RECORD} if you have changed them."
        ) from error


def _budget(record: Mapping[str, Any]) -> AbstractContextManager[None]:
    """Return a budget of elements and modules for making a merge, in proportion to the files of its sources."""
    states = [open_state(pinned(entry)) for entry in record["sources"].values()]
    elements = sum(state.meta(name)[0].numel() for state in states for name in state)
    return budget(8 * elements + _SPARE, _MODULES * sum(map(len, states)) + _SPARE_MODULES)


def _learnables(folder: Path) -> dict[str, Tensor]:
    try:
        return load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{folder / WEIGHTS} is damaged ({error}); copy it again.") from error


def start_from(path: str | Path, model: MergedModel, record: Mapping[str, Any]) -> None:
    """Give a model the learnables of a saved merge of the same sources; what the merge does not have stays as it is.

    Args:
        path: A run's directory or its `merge` folder.
        model: Has a place for each of the merge's learnables.
        record: `Opened.record` of the model.

    Raises:
        InputError: Not a merge; other sources, transforms or space; or learnables that this model has no place for.
    """
    try:
        folder, before = read_record(path)
    except InputError as error:
        raise InputError(f"`model.init_from`: {error}") from error
    raise_all(_not_alike(folder, before, record), "`model.init_from`")
    saved, now = _learnables(folder), state_of(model)
    check_values(model, saved, f"`model.init_from` {folder}")
    strange = sorted(set(saved) - set(now))
    if strange:
        raise InputError(
            f"`model.init_from` {folder} learned {some(strange)}, which this run has no place for; it has {some(now)}. "
            "Give this run the same rule and task modules, and further ones beside them."
        )
    load_state(model, saved, before["labels"], f"`model.init_from` {folder}", whole=False)


def _not_alike(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for who, entry in now["sources"].items():
        held = before["sources"].get(who)
        if held is None or held["sha256"] != entry["sha256"]:
            yield f"{folder} was learned with another {who}: it had {held['source'] if held else 'none'}."
    for what in ("transforms", "space", "left_out"):
        if before[what] != now[what]:
            yield f"{folder} was learned with other `{what}`: {before[what]}; this run has {now[what]}."
    if _meaning(before["rule"]) != _meaning(now["rule"]):
        yield f"{folder} was learned with another `rule`: {before['rule']}; this run has {now['rule']}."
    if before["task_modules"] != now["task_modules"][: len(before["task_modules"])]:
        yield (
            f"{folder} was learned with the `task_modules` {before['task_modules']}; this run has "
            f"{now['task_modules']}. Name the same ones first, and further ones after them."
        )


def _meaning(rule: Any) -> Any:
    """A rule's class and options without those that say where it starts, how it learns and how it is evaluated."""
    if not isinstance(rule, dict):
        return rule
    return {key: _meaning(value) for key, value in rule.items() if key not in _FREE}


def read_record(path: str | Path) -> tuple[Path, dict[str, Any]]:
    """The folder of a merge and its record, checked to be whole.

    Raises:
        InputError: No merge there, of another format, or damaged.
    """
    folder = Path(path).expanduser()
    if not exists(folder) and "/" in str(path) and hub_id(str(path)):
        folder = fetch(str(path))
    folder = folder / "merge" if (folder / "merge" / RECORD).exists() else folder
    if (folder / RECORD).exists() and (folder / EXPORTED).exists() and not (folder / WEIGHTS).exists():
        raise InputError(f"'{path}' is an export, which the model's own library loads; its README.md says how.")
    try:
        record = read_yaml(folder / RECORD)
        check_regular(folder / WEIGHTS)
    except (OSError, InputError) as error:
        raise InputError(f"'{path}' holds no saved merge: it needs {RECORD} and {WEIGHTS} ({error}).") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT or isinstance(record["format"], float):
        raise InputError(f"{folder / RECORD} is not of format {FORMAT}, which this version of adamerge reads.")
    check_record(record, folder / RECORD)
    try:
        if digest(folder / WEIGHTS) != record["weights"]:
            raise InputError(f"{folder / WEIGHTS} is not the file that {RECORD} was written with; copy both again.")
        safe_open(folder / WEIGHTS, framework="pt")  # checks the header, and that the file is whole
    except (SafetensorError, OSError) as error:
        raise InputError(f"{folder / WEIGHTS} is damaged ({error}); copy it again.") from error
    return folder, record


def _recipe(record: Mapping[str, Any], trust: bool) -> Recipe:
    sources = {who: pinned(entry) for who, entry in record["sources"].items()}
    backbone = deepcopy(record["backbone"])
    options = backbone.get("init_args") or {}
    if options.get("model") == record["sources"]["base"]["source"]:
        options["model"] = sources["base"]
    made = revive(backbone, trust=trust, kind=Backbone)
    if made.foreign_code(options):
        raise_all(_unpinned({**sources, "backbone's model": options.get("model")}), "the merge's sources")
    return Recipe(
        sources["base"],
        {who.removeprefix("expert "): source for who, source in sources.items() if who.startswith("expert ")},
        made,
        rule=revive(record["rule"], trust=trust, partial=True, kind=MergeRule),
        transforms=[revive(each, trust=trust, kind=Transform) for each in record["transforms"]],
        task_modules=[revive(module, trust=trust, partial=True, kind=TaskModule) for module in record["task_modules"]],
        space=SpaceOptions(**record["space"]),
        vectors=VectorOptions(**record["vectors"]),
    )


def pinned(entry: Mapping[str, Any]) -> str:
    """A record's source as it was: of the hub, the commit that was merged, whatever its branch has become."""
    source, revision = str(entry["source"]), entry.get("revision")
    return f"{source.partition('@')[0]}@{revision}" if revision else source


def _unpinned(sources: Mapping[str, Any]) -> Iterator[str]:
    """Yield a problem for each source whose code would run although no commit is named: a branch can change."""
    for who, source in sources.items():
        hub = hub_id(str(source or ""))
        if hub is not None and not hub.is_pinned:
            yield (
                f"The {who} of this merge, '{source}', brings code along and names no commit, so that nobody can tell "
                "what would run: write `revision: COMMIT`, 40 hexadecimal digits, or `@COMMIT` behind the model, into "
                f"its {RECORD}."
            )


def portable(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record for others to read: paths of this machine are named by their last part, after `local-dir:`.

    Who has these files opens the merge where they lie in the working directory.
    """
    names: dict[str, str] = {}
    for who, entry in record["sources"].items():
        if is_local(entry["source"]):
            path = str(entry["source"]).removeprefix("local-dir:")
            last = _last(path)
            names.setdefault(path, last if last not in names.values() else f"{who}/{last}")

    def shared(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: each if key in ("classes", "labels") else shared(each) for key, each in value.items()}
        if isinstance(value, (list, tuple)):
            return [shared(each) for each in value]
        if not isinstance(value, str) or not is_local(value):
            return value
        path = value.removeprefix("local-dir:")
        return f"local-dir:{names.get(path) or _last(path)}"

    return {key: shared(value) if key not in ("classes", "labels") else value for key, value in record.items()}


def is_local(source: str) -> bool:
    """Tell whether a text of a record is a path of the machine that wrote it; such paths are absolute."""
    path = source.removeprefix("local-dir:")
    absolute = path.startswith(("/", "~")) or re.match(r"[A-Za-z]:[\\/]", path)
    return bool(absolute) and not re.search(r"[{}\n]", path) and bool(_last(path))


def _last(path: str) -> str:
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1]


def _elsewhere(record: Mapping[str, Any]) -> Iterator[str]:
    """The sources that stood on the machine of whoever pushed or exported the merge, and are not here."""
    for who, entry in record["sources"].items():
        name = str(entry["source"]).removeprefix("local-dir:")
        if name != entry["source"] and not is_local(name) and not exists(Path(name)):
            yield (
                f"The {who} of this merge, '{name}', stands on the machine that it was made on: put it into the "
                f"working directory ({Path.cwd()}) under this name, or use an export of the merge."
            )


def _foreign(record: Mapping[str, Any]) -> Iterator[str]:
    """All classes from outside this package that the record names, before `revive` refuses the first."""
    values: list[Any] = [record[key] for key in ("backbone", "rule", "transforms", "task_modules")]
    while values:
        value = values.pop(0)
        path = str(value.get("class_path", "adamerge.")) if isinstance(value, dict) else "adamerge."
        if not path.startswith("adamerge."):
            yield foreign(path)
        values += value.values() if isinstance(value, dict) else value if isinstance(value, list) else []


def _changed(record: Mapping[str, Any], base: Any, experts: Mapping[str, Any]) -> Iterator[str]:
    states = {"base": base, **{f"expert {task}": state for task, state in experts.items()}}
    for who, entry in record["sources"].items():
        now = (states[who] if who in states else open_state(pinned(entry))).sha256()
        if now != entry["sha256"]:
            yield (
                f"The {who} ({entry['source']}) has changed since the merge was learned: its sha256 is {now[:12]}…, "
                f"recorded is {entry['sha256'][:12]}…. Put the old file back, or learn the merge again."
            )


def versions() -> dict[str, str]:
    """Return the versions of adamerge and of the libraries that its numbers come from."""
    found = {}
    for name in ("adamerge", "torch", "lightning", "transformers", "open_clip_torch", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from a source tree that is not installed
            found[name] = "not installed"
    return found
