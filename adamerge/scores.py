"""Scores of the merges that need no training, kept for later runs on the same sources and samples."""

import json
import logging
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from adamerge.data import UnlabeledTasks, samples_key
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

    None where it is not known: for sources without files, samples without a fingerprint, networks of the user's own,
    whose code may change under the same name.

    Args:
        opened: The sources.
        model: Lends backbone and heads, before any training.
        raw: The untransformed vectors.
        data: What is scored on.
        settings: Whatever else the scores depend on, as plain data.
    """
    backbone, samples = model.backbone, data.scored_samples()
    own = backbone.library != "pytorch" and type(backbone).__module__.startswith("adamerge.")
    known = all(data.tasks[task].repeatable and getattr(samples[task], "fingerprint", None) for task in samples)
    if not (own and known and raw.fingerprint()):
        return None
    heads = {task: model.chain(task)[-1].state_dict() for task in model.tasks}
    return digest_of(
        [(name, version(name)) for name in ("torch", "transformers", "open_clip_torch")],
        _code(),
        [raw.fingerprint(), opened.recipe.vectors.dtype, opened.excluded],
        [spec(backbone), opened.space.skip, opened.space.buffer_policy],
        {task: [(name, digest_of_tensor(tensor)) for name, tensor in head.items()] for task, head in heads.items()},
        {task: samples_key(each) for task, each in samples.items()},
        [data.eval_batch_size, data.bucket_by_length],
        settings,
    )


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
        return {name: {task: float(score) for task, score in scores.items()} for name, scores in found.items()}
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
