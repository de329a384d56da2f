"""Zero-shot heads: made from class names and prompts by a text tower, and kept in the cache folder."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.progress import track
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from adamerge.backbones.base import Backbone
from adamerge.files import atomic_file, cache_dir
from adamerge.task_modules import TaskModule, ZeroShotHead
from adamerge.terminal import progress_console
from adamerge.types import InputError, TaskInfo, some

Templates = Sequence[str] | Mapping[str, Sequence[str]]
Embed = Callable[[Sequence[str], Sequence[str]], dict[str, Tensor]]  # class names, prompts -> a head's tensors


class ZeroShot(Backbone):
    """What backbones have in common whose heads are made of class names and prompts."""

    has_heads = True
    _templates: Templates

    def templates(self, task: str) -> Sequence[str]:
        """The prompts of a task."""
        return prompts_of(self._templates, task)

    def head(self, task: TaskInfo) -> TaskModule:
        return self.heads([task])[task.name]

    def about(self, task: str) -> Mapping[str, Any]:
        return {"templates": list(self.templates(task))}


def check_prompts(templates: Templates) -> None:
    """Every prompt has a place for the class name.

    Raises:
        InputError: One has none, or a list is empty.
    """
    every = list(templates.values()) if isinstance(templates, Mapping) else [templates]
    wrong = [prompt for prompts in every for prompt in prompts if "{}" not in prompt]
    if wrong or not all(every):
        raise InputError(f"`backbone.templates` need {{}} for the class name; {wrong or 'an empty list'} has none.")


def prompts_of(templates: Templates, task: str) -> Sequence[str]:
    """The prompts of a task.

    Raises:
        InputError: There are none.
    """
    if not isinstance(templates, Mapping):
        return templates
    if task not in templates:
        raise InputError(f"`backbone.templates` has none for task '{task}'; it has {', '.join(templates)}.")
    return templates[task]


def kept_heads(
    tasks: Sequence[TaskInfo], templates: Templates, made_of: Sequence[Any], embedder: Callable[[], Embed]
) -> dict[str, TaskModule]:
    """The heads of tasks, made once by whatever `embedder` loads.

    Args:
        tasks: With their class names.
        templates: The prompts.
        made_of: What heads depend on beside class names and prompts, as plain data.
        embedder: Loads the text tower.

    Raises:
        InputError: Class names that are missing or repeat.
    """
    kept = {task.name: _kept(task, prompts_of(templates, task.name), made_of) for task in tasks}
    missing = [task for task in tasks if not _is_whole(kept[task.name])]
    embed = embedder() if missing else None
    for task in track(missing, "Zero-shot heads", console=progress_console(), transient=True):
        assert embed is not None
        head = embed(list(task.classes or ()), prompts_of(templates, task.name))
        with atomic_file(kept[task.name]) as new:
            save_file(head, new)
    return {task.name: head_of(task, load_file(kept[task.name])) for task in tasks}


def head_of(task: TaskInfo, made: Mapping[str, Tensor]) -> ZeroShotHead:
    """A head of its tensors: embeddings [C, D], scale [], bias []."""
    return ZeroShotHead(task, made["weight"], float(made["scale"]), float(made["bias"]))


def _kept(task: TaskInfo, prompts: Sequence[str], made_of: Sequence[Any]) -> Path:
    """Where a task's head is kept: a name made of everything it depends on."""
    classes = list(task.classes or ())
    repeated = sorted({name for name in classes if classes.count(name) > 1})
    if repeated or not classes:
        fault = f"has the class names {some(repeated)} more than once" if repeated else "has no class names"
        raise InputError(
            f"Task '{task.name}' {fault}; its zero-shot head is made from one name for each class: list them in "
            "`classes` of its data."
        )
    parts = json.dumps([*made_of, classes, list(prompts)])
    return cache_dir() / "heads" / (hashlib.sha256(parts.encode()).hexdigest()[:32] + ".safetensors")


def _is_whole(head: Path) -> bool:
    try:
        return set(load_file(head)) == {"weight", "scale", "bias"}
    except (OSError, SafetensorError):
        return False
