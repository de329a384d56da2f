"""What can be known before a run: from configurations and headers in seconds, or from the values themselves."""

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table

from adamerge.audit import ValueAudit
from adamerge.checkpoints import State
from adamerge.data import UnlabeledTasks
from adamerge.data.base import MissingSplit
from adamerge.files import cache_dir
from adamerge.job import Job
from adamerge.recipe import Survey
from adamerge.report import duration, gigabytes, rendered
from adamerge.task_vectors import Placement
from adamerge.terminal import progress_console
from adamerge.types import InputError, raise_all

_PLACEMENTS: tuple[Placement, ...] = ("device", "cpu", "mmap")


@dataclass(frozen=True)
class Preflight:
    """What a check has found where it found no problem.

    Attributes:
        sources: A row for base and each expert: name, source, tensors, dtypes, bytes.
        merging: What is merged.
        placements: For each placement of the task vectors: bytes of device memory, of main memory, of disk.
        seconds: Per optimiser step, by placement; without the network's own time where its cost is not known.
        notes: What is good to know.
    """

    sources: list[tuple[str, str, int, str, int]]
    merging: str
    placements: dict[str, tuple[int, int, int]]
    seconds: dict[str, float]
    notes: list[str]

    def __str__(self) -> str:
        sources = Table("", "source", "tensors", "types", "size")
        for who, source, number, kinds, size in self.sources:
            sources.add_row(who, source, str(number), kinds, gigabytes(size))
        placements = Table("placement", "device", "memory", "disk", "time per step")
        for name, (device, memory, disk) in self.placements.items():
            placements.add_row(name, *map(gigabytes, (device, memory, disk)), f"about {duration(self.seconds[name])}")
        lines = [rendered(sources), f"Merging: {self.merging}", rendered(placements), *self.notes, "No problems found."]
        return "\n".join(lines)


def check(job: Job, *, deep: bool = False) -> Preflight:
    """Look at a job before it runs.

    Args:
        job: What would be run.
        deep: Read all values too: hashes, NaN, duplicates, and whether experts descend from the base. Of the hub's
            checkpoints, this fetches the weights.

    Raises:
        InputError: Everything that is wrong, at once.
    """
    survey = survey_of(job)
    found = Preflight(
        [_row(who, state) for who, state in [("base", survey.base), *survey.experts.items()]],
        survey.space.describe(),
        _placements(job, survey),
        _seconds(job, survey),
        list(_notes(job, survey)),
    )
    raise_all(_lack_of_room(job, found, survey), "the disk")
    if deep:
        _read_all(job, survey)
        found.notes.append("All values read: finite, no two experts alike, all of them descend from the base.")
    return found


def survey_of(job: Job) -> Survey:
    """The sources and data of a job by configurations and headers alone.

    Raises:
        InputError: Everything that is wrong with them, at once.
    """
    classes, of_data = _peek(job.data)
    survey = job.recipe.survey(classes)
    problems = [*survey.problems, *of_data]
    for task, state in survey.experts.items():
        problems += job.recipe.backbone.head_problems(task, state, survey.classes.get(task, ()))
    raise_all(problems, "the sources")
    return survey


def _peek(data: UnlabeledTasks) -> tuple[dict[str, Sequence[str]], list[str]]:
    """The class names of each task, none where they cannot be had; and what is wrong with the data."""
    classes: dict[str, Sequence[str]] = dict.fromkeys(data.tasks, ())
    problems: dict[str, None] = {}
    absent: dict[str, None] = {}  # a task without the split to score on is not scored
    for split in dict.fromkeys((data.split, data.eval_split)):
        for task, each in data.tasks.items() if split is not None else ():
            try:
                classes[task] = each.peek(str(split))
            except InputError as error:
                optional = split != data.split and isinstance(error, MissingSplit)
                (absent if optional else problems)[f"Task '{task}': {error}"] = None
    return classes, [*problems, *(absent if len(absent) == len(data.tasks) else ())]


def _row(who: str, state: State) -> tuple[str, str, int, str, int]:
    metas = [state.meta(name) for name in state]
    kinds = ", ".join(sorted({str(dtype).removeprefix("torch.") for _, dtype in metas}))
    return who, state.source, len(metas), kinds, sum(shape.numel() * dtype.itemsize for shape, dtype in metas)


def _placements(job: Job, survey: Survey) -> dict[str, tuple[int, int, int]]:
    """Bytes of device memory, of main memory and of disk. On a machine without a GPU, the device is main memory."""
    dtype = job.recipe.vectors.dtype
    size = getattr(torch, dtype).itemsize if dtype else max(d.itemsize for d in _dtypes(survey))
    vectors = size * survey.space.num_elements * len(survey.experts)
    base = 4 * survey.space.num_elements
    working = (3 if job.recipe.apply_mode == "leaf" else 2) * base
    return {
        "device": (working + vectors, 0, 0),
        "cpu": (working, vectors, 0),
        "mmap": (working, 0, vectors + base),
    }


def _dtypes(survey: Survey) -> set[torch.dtype]:
    names = survey.space.checkpoint_names()
    states = (survey.base, *survey.experts.values())
    return {s.meta(key)[1] for s in states for name in survey.space.shapes for key in names[name] if key in s}


def _seconds(job: Job, survey: Survey) -> dict[str, float]:
    """One optimiser step: the merge by the bandwidth, forward and backward by the speed, measured here for a moment."""
    speed, bandwidth, transfer = _measured(on_cpu=job.trainer.get("accelerator") == "cpu")
    tasks, elements = len(job.data.tasks), survey.space.num_elements
    tokens = job.recipe.backbone.tokens_per_sample or 0
    network = 6 * elements * tokens * job.data.batch_size * tasks / speed
    vectors = 2 * _placements(job, survey)["cpu"][1]  # once to merge, once for the coefficients' gradient
    there = network + (12 * elements + vectors) / bandwidth
    elsewhere = network + 12 * elements / bandwidth + vectors / transfer
    return {"device": there, "cpu": elsewhere, "mmap": elsewhere}


def _measured(*, on_cpu: bool) -> tuple[float, float, float]:
    """Of the device that would train: fp32 operations, bytes copied, and bytes from main memory to it, per second."""
    device = torch.device("cuda" if torch.cuda.is_available() and not on_cpu else "cpu")
    one = torch.ones(512, 512, device=device)
    block, other = torch.ones(2, 8_000_000, device=device)

    def timed(work: Callable[[], object]) -> float:
        best = float("inf")
        for _ in range(3):
            start = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - start)
        return best

    speed, bandwidth = 2 * 512**3 / timed(lambda: one @ one), 2 * block.nbytes / timed(lambda: other.copy_(block))
    if device.type == "cpu":
        return speed, bandwidth, bandwidth
    host = torch.ones_like(block, device="cpu")
    return speed, bandwidth, block.nbytes / timed(lambda: other.copy_(host))


def _notes(job: Job, survey: Survey) -> Iterator[str]:
    bare = [task for task in job.recipe.experts if task not in job.data.tasks]
    if bare:
        yield f"Merged without data of their own: {', '.join(bare)}."
    if not job.recipe.backbone.tokens_per_sample:
        yield "The time is the merge's alone; what the network itself takes is not told from its configuration."
    if job.data.split == job.data.eval_split:
        yield f"The split '{job.data.split}' is adapted on and scored: scores are transductive."


def _lack_of_room(job: Job, found: Preflight, survey: Survey) -> Iterator[str]:
    from huggingface_hub import constants

    states = (survey.base, *survey.experts.values())
    fetched = {s.source: size for (*_, size), s in zip(found.sources, states, strict=True) if not s.has_values}
    vectors = found.placements[job.recipe.vectors.placement][2]
    wanted = {
        "checkpoints of the hub": (Path(constants.HF_HUB_CACHE), sum(fetched.values()), "HF_HUB_CACHE"),
        "task vectors": (cache_dir(), vectors, "ADAMERGE_CACHE"),
    }
    for what, (cache, need, variable) in wanted.items():
        free = shutil.disk_usage(_existing(cache.expanduser())).free
        if need > free:
            yield (
                f"The disk of {cache} has {gigabytes(free)} left, and {what} want {gigabytes(need)}: free some, or set "
                f"{variable} to a folder on a larger one."
            )


def _existing(folder: Path) -> Path:
    return next(parent for parent in (folder, *folder.parents) if parent.exists())


def _read_all(job: Job, survey: Survey) -> None:
    with progress_console().status("Reading all values …"):
        opened = job.recipe.open(survey.classes)
        for state in (opened.base, *opened.experts.values()):
            if state.files:
                state.sha256()
        vectors = opened.vectors()
        audit = ValueAudit(vectors.tasks, ancestry=job.recipe.vectors.ancestry)
        for name in opened.space.shapes:
            audit(name, vectors.base(name), vectors.deltas(name))
        audit.finish()
