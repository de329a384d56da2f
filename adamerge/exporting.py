"""A learned merge as a folder that the model's own library loads, checked to give the same answers."""

import copy
import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from adamerge.artifact import (
    EXPORTED,
    RECORD,
    made_again,
    open_merge,
    pinned,
    portable,
    read_record,
    versions,
    write_record,
)
from adamerge.backbones import Backbone
from adamerge.backbones.base import to_device
from adamerge.files import atomic_dir
from adamerge.merged import MergedModel
from adamerge.multitask import MultiTaskModel
from adamerge.pushing import CARD, card_of
from adamerge.recorded import revive
from adamerge.report import shown
from adamerge.task_modules import TaskModule
from adamerge.terminal import progress_console
from adamerge.types import InputError

log = logging.getLogger("adamerge")

LIMITS = {"float32": 1e-5, "bfloat16": 0.5, "float16": 0.5}  # beyond, the folder does not hold this merge
TASKS, MODULES = "tasks.json", "task_modules.safetensors"
_SAMPLES, _CLASSES = 4, 4  # of the check; one class's logit depends on no other class


_FILES = (
    f"Beside the model: `{TASKS}`, class names of each task and what else its head is made from; `{RECORD}`, how the "
    f"merge was learned; `{EXPORTED}`, how far its logits are from the live merge's; `{MODULES}`, if there is one, "
    "what does not fold into one dense model."
)


@dataclass(frozen=True)
class Exported:
    """The result of an export.

    Attributes:
        dir: The folder.
        dtype: Of the weights in it.
        difference: The largest difference between its logits and the live merge's, relative to the largest logit.
    """

    dir: Path
    dtype: str
    difference: float

    def __str__(self) -> str:
        return (
            f"Exported in {self.dtype}; its logits differ from the live merge's by at most {self.difference:.1e} of "
            f"the largest.\nFolder: {shown(self.dir)}"
        )


def export(
    run: str | Path, out: str | Path, *, dtype: str = "float32", device: str = "auto", trust: bool = False
) -> Exported:
    """Write a learned merge as one dense model in the layout of the model's own library.

    Beside the model stand `tasks.json` (class names of each task and what else its head is made from), `merge.yaml`
    (the merge's record), `export.json` (the outcome of the check), and in `task_modules.safetensors` what does not fold
    into one dense model.

    Args:
        run: A run's directory or its `merge` folder.
        out: The folder to write; it must not exist.
        dtype: Of the weights: `float32`, `bfloat16` or `float16`. The library may compute in another.
        device: Where the check runs: `auto`, `cpu` or `cuda`.
        trust: Also build classes from outside adamerge that the merge's record names.

    Raises:
        InputError: `out` exists, no merge, a backbone without such a layout, or a folder that fails the check; nothing
            is left of it then.
    """
    target, where = Path(out).expanduser().resolve(), device_of(device)
    if dtype not in LIMITS:
        raise InputError(f"`dtype` is '{dtype}'; it is one of {', '.join(LIMITS)}.")
    _refuse_existing(target)
    folder, record = read_record(run)
    with made_again(folder):
        backbone = revive(record["backbone"], trust=trust, kind=Backbone)
    if type(backbone).export is Backbone.export:
        raise InputError(
            f"The merge's backbone, {type(backbone).__name__}, has no layout of another library to export to. Use the "
            "merge in Python: adamerge.load gives one dense network."
        )
    with progress_console().status("Opening the merge …") as status:
        model = open_merge(folder, trust=trust).to(where)
        base = model.backbone.open(pinned(record["sources"]["base"]))
        status.update("Writing and checking the export …")
        with made_again(folder), atomic_dir(target) as new:
            net = model.materialize(dtype=getattr(torch, dtype)).cpu()
            last = {task: model.chain(task)[-1] for task in model.tasks}
            model.backbone.export(net, base, new, last)
            write_record(portable(record), new)
            few = {task: list(names[:_CLASSES]) for task, names in record["classes"].items()}
            heads = model.backbone.exported_heads(new, few)
            difference = _checked(model, new, heads, where, LIMITS[dtype])
            _write_tasks(model, new, record["classes"], has_heads=model.backbone.has_heads)
            told = {
                "max_relative_difference": difference,
                "limit": LIMITS[dtype],
                "dtype": dtype,
                "device": where.type,
                "run": folder.resolve().parent.name,
                "versions": versions(),
            }
            (new / EXPORTED).write_text(json.dumps(told, indent=2))
            loading, library = model.backbone.loading(model.tasks[0]), model.backbone.library
            card = card_of(record, target.name, files=_FILES, load=loading.format(folder=target.name), library=library)
            (new / CARD).write_text(card)
            _refuse_existing(target)
    return Exported(target, dtype, difference)


def device_of(name: str) -> torch.device:
    """The device for `auto`, `cpu` or `cuda`; `auto` takes a GPU where there is one.

    Raises:
        InputError: There is no GPU, or no such name.
    """
    there = torch.cuda.is_available()
    if name not in ("auto", "cpu", "cuda") or (name == "cuda" and not there):
        reason = "torch finds no GPU here" if name == "cuda" else "it is one of auto, cpu, cuda"
        raise InputError(f"`device` is '{name}', but {reason}.")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and there) else "cpu")


def _refuse_existing(target: Path) -> None:
    if target.exists() or target.is_symlink():
        raise InputError(f"{target} exists already and is not overwritten: choose another folder, or remove it.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{target} cannot be made: {error}. Choose another folder.") from error


@torch.inference_mode()
def _checked(
    model: MergedModel, folder: Path, heads: Mapping[str, TaskModule], device: torch.device, limit: float
) -> float:
    """The largest relative difference between the folder's logits, loaded by its own library, and the live merge's.

    Random input is enough: equal weights give equal answers on anything. Heads that the library makes by itself are
    compared on the first few classes of each task.

    Raises:
        InputError: It is above the limit, or not a number.
    """
    live, backbone = model.folded(), model.backbone
    batch = to_device(backbone.example(live.bare_net(), _SAMPLES), device)
    chains = {task: live.chain(task) for task in live.tasks}
    theirs = MultiTaskModel(backbone, backbone.exported(folder), chains).to(device).eval()
    own_chains = {
        task: [*copy.deepcopy(live.chain(task)[:-1]), head]
        for task, head in heads.items()
        if not any(part.changes_head for part in live.chain(task))
    }
    own = MultiTaskModel(backbone, theirs.bare_net(), own_chains).to(device).eval()
    heads_only = MultiTaskModel(backbone, live.bare_net(), {t: [live.chain(t)[-1]] for t in live.tasks})
    worst = 0.0
    for task in live.tasks:
        expected = live(batch, task=task)
        pairs = [(theirs(batch, task=task), expected)]
        if task in own.tasks:
            found = own(batch, task=task)
            pairs.append((found, expected[:, : found.shape[1]]))
        for alone in backbone.answers(folder, [task]).values():  # without what stands beside the folder's own model
            pairs.append((alone(batch).to(device), heads_only(batch, task=task)))
        differences = [_difference(*pair) for pair in pairs]
        if not all(difference <= limit for difference in differences):  # NaN is not
            raise InputError(
                f"The export fails its check and was removed: on task '{task}' its logits differ from the live "
                f"merge's by {max(differences):.1e} of the largest (the limit is {limit:.0e}). Use adamerge.load, or "
                "another dtype."
            )
        worst = max(worst, *differences)
    return worst


def _difference(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape:
        return math.inf
    scale = expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny)
    return float((found - expected).abs().max() / scale)


def _write_tasks(model: MergedModel, folder: Path, classes: Mapping[str, list[str]], *, has_heads: bool) -> None:
    """Class names and prompts of each task; beside them the modules that stand outside of the dense network."""
    tasks: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for task in model.tasks:
        beside = model.chain(task)[: -1 if has_heads else None]
        tasks[task] = {"classes": list(classes[task]), **model.backbone.about(task)}
        if beside:
            tasks[task]["task_modules"] = [type(module).__name__ for module in beside]
        for place, module in enumerate(beside):
            tensors |= {f"{task}.{place}.{name}": t.cpu().contiguous() for name, t in module.state_dict().items()}
    (folder / TASKS).write_text(json.dumps(tasks, indent=2, ensure_ascii=False), encoding="utf-8")
    kinds = dict.fromkeys(kind for each in tasks.values() for kind in each.get("task_modules", ()))
    if kinds:
        log.warning(
            "Task modules do not fold into one dense model: %s goes beside it, into %s, and its own library answers "
            "without them.",
            *(", ".join(kinds), MODULES),
        )
        save_file(tensors, folder / MODULES)
