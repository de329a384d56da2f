"""Scores of the merges that need no training, kept for later runs on the same sources and samples."""

import json
import logging
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

from adamerge.data import UnlabeledTasks, is_known, samples_key
from adamerge.evaluation import Scores
from adamerge.files import atomic_file, cache_dir, digest
from adamerge.merged import MergedModel
from adamerge.opened import Opened
from adamerge.recorded import digest_of, digest_of_tensor, spec
from adamerge.task_vectors import TaskVectors
from adamerge.types import InputError

log = logging.getLogger("adamerge")


def key_of(opened: Opened, model: MergedModel, raw: TaskVectors, data: UnlabeledTasks, settings: Any) -> str | None:
    """All that the baselines' scores depend on, as one digest.

    None where it is not known: for sources without files, samples without a fingerprint, networks of the user's own
    and remote code, which may change under the same name.

    Args:
        opened: The sources.
        model: Lends backbone and heads, before any training.
        raw: The untransformed vectors.
        data: What is scored on.
        settings: Whatever else the scores depend on, as plain data.
    """
    backbone, samples = model.backbone, data.scored_samples()
    made_of = backbone.made_of() if type(backbone).__module__.startswith("adamerge.") else None
    if made_of is None or raw.fingerprint() is None:
        return None
    if not all(data.tasks[task].repeatable and is_known(each) for task, each in samples.items()):
        return None
    heads = {task: model.chain(task)[-1] for task in model.tasks}
    return digest_of(
        [(name, version(name)) for name in ("torch", "transformers", "open_clip_torch")],
        _code(),
        [raw.fingerprint(), opened.recipe.vectors.dtype, opened.excluded],
        [spec(backbone), made_of, opened.space.skip, opened.space.buffer_policy],
        {task: [type(head).__name__, head.num_classes, head.classes, _values(head)] for task, head in heads.items()},
        _values(model.network),  # what is not merged: it may be the seed's, where the base lacks it
        {task: samples_key(each) for task, each in samples.items()},
        [data.eval_batch_size, data.bucket_by_length],
        settings,
    )


def _values(module: nn.Module) -> dict[str, str]:
    """The digests of a module's parameters and buffers, those that are not saved as well."""
    return {name: digest_of_tensor(each) for name, each in (*module.named_parameters(), *module.named_buffers())}


@cache
def _code() -> str:
    """This package's own code: a version may stay the same where what makes the scores does not."""
    folder = Path(__file__).parent
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".c"))
    return digest_of([(str(path.relative_to(folder)), digest(path)) for path in files])


def find(key: str) -> dict[str, Scores] | None:
    """What was kept under a key."""
    try:
        found = json.loads(_file(key).read_text())
        whole = {name: {task: float(score) for task, score in scores.items()} for name, scores in found.items()}
        return whole if whole and all(whole.values()) else None
    except (OSError, ValueError, AttributeError, TypeError):  # none, or one that we cannot read
        return None


def keep(key: str, scores: Mapping[str, Scores]) -> None:
    """Write them where `find` looks."""
    try:
        with atomic_file(_file(key)) as new:
            new.write_text(json.dumps(scores))
    except (OSError, InputError) as error:  # a read-only or full cache costs time, not the run
        log.debug("The baselines' scores are not kept: %s", error)


def _file(key: str) -> Path:
    return cache_dir() / "scores" / f"{key}.json"


__all__ = ["find", "keep", "key_of"]
