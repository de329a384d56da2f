"""adamerge learns how to merge models: `python -m adamerge.fit`, or `adamerge.train(...)` and `adamerge.load(...)`.

The names are imported on first use, so that `import adamerge` stays instant.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "AdaMerge": "adamerge.module",
    "InputError": "adamerge.types",
    "MergeRule": "adamerge.rules",
    "Phase": "adamerge.recipe",
    "TaskModule": "adamerge.task_modules",
    "compare": "adamerge.comparing",
    "MergedModel": "adamerge.merged",
    "Objective": "adamerge.objectives",
    "Recipe": "adamerge.recipe",
    "Run": "adamerge.training",
    "RunOptions": "adamerge.job",
    "TaskVectors": "adamerge.task_vectors",
    "Transform": "adamerge.transforms",
    "UnlabeledTasks": "adamerge.data",
    "export": "adamerge.exporting",
    "load": "adamerge.artifact",
    "push_to_hub": "adamerge.pushing",
    "open_state": "adamerge.checkpoints",
    "train": "adamerge.training",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'adamerge' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
