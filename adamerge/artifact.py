"""A learned merge on disk: `merge.safetensors` holds the learnables, `merge.yaml` how to make it again."""

import re
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from adamerge.files import atomic_dir, sha256
from adamerge.learnables import labels_of, load_state, state_of
from adamerge.merged import MergedModel, MultiTaskModel
from adamerge.recipe import Recipe
from adamerge.types import InputError, raise_all

FORMAT = 1
WEIGHTS, RECORD = "merge.safetensors", "merge.yaml"
_MADE = ("backbone", "rule", "transforms", "task_modules")  # the parts of a record that name code
_NEEDED = ("weights", "labels", "sources", "space", "vectors", "left_out", "num_classes")
_IMPORTABLE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
_FILE = re.compile(r".*\.(safetensors|pt|pth|bin|ckpt)")


def save(folder: Path, model: MergedModel, record: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Write a merge: the folder appears whole or not at all, and replaces an older one whole.

    Args:
        folder: Where; usually `RUN/merge`.
        model: Whose learnables are saved.
        record: `Opened.record` of the model.
        about: What else a reader wants to know: data, objectives, scores.

    Raises:
        InputError: No space left on the disk.
    """
    with atomic_dir(folder) as new:
        save_file({name: tensor.contiguous() for name, tensor in state_of(model).items()}, new / WEIGHTS)
        text = {
            "format": FORMAT,
            "weights": sha256(new / WEIGHTS),
            "labels": labels_of(model),
            **record,
            **about,
            "versions": _versions(),
        }
        (new / RECORD).write_text(yaml.safe_dump(text, sort_keys=False, allow_unicode=True, width=120))


def load(path: str | Path, *, trust: bool = False, dtype: torch.dtype | None = None) -> MultiTaskModel:
    """A saved merge as one dense network for inference: model(batch, task="svhn") -> logits [B, C].

    Args:
        path: A run's directory or its `merge` folder.
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
        raise_all(_untrusted(record), "the merge's record")
    recipe = _recipe(record, folder)
    opened = recipe.open(record["num_classes"], record["left_out"])
    raise_all(_changed(record, opened.base, opened.experts), "the merge's sources")
    model = opened.merged(opened.load_vectors())
    load_state(model, load_file(folder / WEIGHTS), record["labels"], str(folder))
    return model.eval()


def read_record(path: str | Path) -> tuple[Path, dict[str, Any]]:
    """The folder of a merge and its record, checked to be whole.

    Raises:
        InputError: No merge there, of another format, or damaged.
    """
    folder = Path(path).expanduser()
    folder = folder / "merge" if (folder / "merge" / RECORD).exists() else folder
    try:
        record = yaml.safe_load((folder / RECORD).read_text())
        weights = sha256(folder / WEIGHTS)
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"'{path}' holds no saved merge: it needs {RECORD} and {WEIGHTS} ({error}).") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise InputError(f"{folder / RECORD} is not of format {FORMAT}, which this version of adamerge reads.")
    missing = [key for key in (*_MADE, *_NEEDED) if key not in record]
    if missing:
        raise InputError(
            f"{folder / RECORD} lacks {len(missing)} entries ({', '.join(missing[:3])}, …); it was cut short or edited."
        )
    if weights != record["weights"]:
        raise InputError(f"{folder / WEIGHTS} is not the file that {RECORD} was written with; copy both again.")
    try:
        load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise InputError(f"{folder / WEIGHTS} is damaged ({error}); copy it again.") from error
    return folder, record


def _recipe(record: Mapping[str, Any], folder: Path) -> Recipe:
    from jsonargparse import ArgumentError, ArgumentParser

    sources = {who: entry["source"] for who, entry in record["sources"].items()}
    experts = {who.removeprefix("expert "): source for who, source in sources.items() if who != "base"}
    made = {key: record[key] for key in (*_MADE, "space", "vectors")}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Recipe, "model")
    try:
        config = parser.parse_object({"model": {"base": sources["base"], "experts": experts, **made}})
        return parser.instantiate(config).model
    except ArgumentError as error:
        raise InputError(f"{folder / RECORD} cannot be read: {error}") from error


def _untrusted(record: Mapping[str, Any]) -> Iterator[str]:
    """Refuse whatever could make the parser import code from outside this package."""

    def strings(value: Any) -> Iterator[str]:
        if isinstance(value, Mapping):
            for key, item in value.items():
                yield from (f"!{item}",) if key == "class_path" else strings(item)
        elif isinstance(value, list):
            for item in value:
                yield from strings(item)
        elif isinstance(value, str):
            yield value

    for text in sorted(set(strings({key: record.get(key) for key in _MADE}))):
        path = text.removeprefix("!")
        imports = text.startswith("!") or (_IMPORTABLE.fullmatch(path) and not _FILE.fullmatch(path))
        if imports and not path.startswith("adamerge."):
            yield f"The merge is built with '{path}', which is not part of adamerge; pass trust=True if you trust it."


def _changed(record: Mapping[str, Any], base: Any, experts: Mapping[str, Any]) -> Iterator[str]:
    states = {"base": base, **{f"expert {task}": state for task, state in experts.items()}}
    for who, entry in record["sources"].items():
        now = states[who].sha256()
        if now != entry["sha256"]:
            yield (
                f"The {who} ({entry['source']}) has changed since the merge was learned: its sha256 is {now[:12]}…, "
                f"recorded is {entry['sha256'][:12]}…. Put the old file back, or learn the merge again."
            )


def _versions() -> dict[str, str]:
    found = {}
    for name in ("adamerge", "torch", "lightning", "transformers", "open_clip_torch", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from a source tree that is not installed
            found[name] = "not installed"
    return found
