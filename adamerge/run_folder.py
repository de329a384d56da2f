"""A run's directory: fresh, on a disk with room, described by its configuration."""

import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from adamerge.files import atomic_file
from adamerge.job import Job
from adamerge.recorded import spec
from adamerge.report import gigabytes
from adamerge.types import InputError


def make_folder(job: Job, need: int) -> Path:
    """A fresh run directory on a disk with room for `need` bytes, and a little more.

    Raises:
        InputError: It exists, cannot be made, or has no room.
    """
    try:
        return _made(job, need)
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise InputError(
            f"The run's directory cannot be made: {error}. Choose another `run.root` or `run.dir`."
        ) from error


def _made(job: Job, need: int) -> Path:
    if job.run.dir is not None:
        folder = Path(job.run.dir).expanduser()
        if folder.exists():
            raise InputError(
                f"`run.dir` {folder} exists already and is not overwritten: choose another, or leave it out."
            )
        folder.mkdir(parents=True)
    else:
        stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
        home = Path(job.run.root).expanduser() / job.run.name
        home.mkdir(parents=True, exist_ok=True)
        for number in range(1, 1000):
            folder = home / (stamp if number == 1 else f"{stamp}-{number}")
            try:
                folder.mkdir()
                break
            except FileExistsError:
                continue
    free = shutil.disk_usage(folder).free
    if free < need + 10_000_000:
        folder.rmdir()
        raise InputError(
            f"The disk of {folder.parent} has {gigabytes(free)} left; the run's merge and checkpoints want "
            f"{gigabytes(need + 10_000_000)}. Free some, or choose another `run.root`."
        )
    with atomic_file(folder / "config.yaml") as new:
        new.write_text(_with_lasting_paths(job.config, job) if job.config else _described(job))
    return folder.resolve()


def _with_lasting_paths(config: str, job: Job) -> str:
    """The resolved configuration, whose data are found again from any working directory."""
    read, data = yaml.safe_load(config), spec(job.data, strict=False)["init_args"]
    return config if "<" in yaml.safe_dump(data) else yaml.safe_dump({**read, "data": data}, sort_keys=False)


def _described(job: Job) -> str:
    """The configuration of a job that was made from objects; what has no text form stands in angle brackets."""
    parts = {"model": job.recipe, "data": job.data}
    text = {key: spec(part, strict=False)["init_args"] for key, part in parts.items()}
    plain = {"trainer": job.trainer, "run": job.run, "seed_everything": job.seed_everything, "ckpt_path": job.ckpt_path}
    return yaml.safe_dump({**text, **spec(plain, strict=False)}, sort_keys=False)


def about(job: Job) -> dict[str, Any]:
    """What a reader of the merge's record wants to know of how it was learned; not needed to load it."""
    phases = job.recipe.phases
    return {
        "seed": job.seed_everything,
        "split": job.data.split,
        "data": spec(job.data, strict=False),
        "objectives": [each for phase in phases for each in spec(phase.objectives, strict=False)],
        "phases": [spec(phase, strict=False) for phase in phases],
        "init_from": job.recipe.init_from,
    }
