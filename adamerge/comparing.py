"""Recipes compared: the same sources, data and seeds, one table."""

import hashlib
import json
import logging
import os
import re
import shlex
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from adamerge.attempts import Candidate, Planned, finish
from adamerge.checkpoints import absolute
from adamerge.comparison import BASELINES, EXPERTS, Comparison, Ran, Row
from adamerge.config import find_config, job_from_arguments
from adamerge.files import digest
from adamerge.job import Job
from adamerge.recorded import spec
from adamerge.report import shown
from adamerge.types import InputError, raise_all, some

log = logging.getLogger("adamerge")

_OPTION = re.compile(r"((?:model|data|trainer|run)\.[\w.]+)\+?=")
_OWN = {"data.seed", "run.root", "run.name", "run.dir", "run.baselines", "trainer.enable_progress_bar"}


def compare(
    recipes: Sequence[str | Path],
    *,
    on: Sequence[str | Path] = (),
    seeds: Sequence[int] = (0, 1, 2),
    root: str | Path = "runs/compare",
    jobs: int = 1,
    options: Sequence[str] = (),
    title: str = "Accuracy in %, means over the seeds",
) -> Comparison:
    """Run recipes on the same sources and seeds and write one table; runs that are finished are not run again.

    Args:
        recipes: Configurations, yours or shipped ones; a row for each.
        on: Configurations that all of them stand on, stacked first.
        seeds: A run of every recipe for each.
        root: Folder of the runs and of `compare.csv` and `compare.md`.
        jobs: Runs at a time; they share the machine and its devices.
        options: On top of every recipe, `KEY=VALUE` each: `trainer.max_steps=10`.
        title: Over the table at a terminal.

    Raises:
        InputError: Arguments that do not fit, recipes that cannot be read or differ in tasks, sources or data, before
            anything runs; or runs that failed, after all others are finished and the table is written.
    """
    raise_all(_misfits(recipes, seeds, jobs, options), "the comparison")
    home = Path(root).expanduser()
    candidates = _candidates([str(each) for each in recipes], on, options, home)
    tasks = _common_tasks([(each.name, _job(each)) for each in candidates])
    planned = [Planned(candidate, seed) for candidate in candidates for seed in seeds]
    with _alone(home):
        done = {run: ran for run in planned if (ran := run.done()) is not None}
        failed = finish(planned, done, jobs)
        raise_all(_changed_sources(done), "the finished runs")
        rows = [*_baseline_rows(done), *(_row(each, done, seeds) for each in candidates)]
        line = ["adamerge", "compare", *map(str, recipes), *(f"--config={each}" for each in on), "--seeds"]
        line += [*map(str, seeds), f"--root={root}", *(f"--set={each}" for each in options)]
        about = f"`{shlex.join(line)}`; seeds {', '.join(map(str, seeds))}; {_versions(done.values())}."
        comparison = Comparison(rows, tasks, home, title, about)
        if done:
            comparison.write()
    if failed:
        if done:
            log.info("%s", comparison)
        raise InputError(
            f"{len(failed)} of {len(planned)} runs failed; what is finished is kept, and the same command runs only "
            "what is missing:\n" + "\n".join(f"  - {run}: {why}" for run, why in failed.items())
        )
    return comparison


# --- before anything runs


def _misfits(recipes: Sequence[str | Path], seeds: Sequence[int], jobs: int, options: Sequence[str]) -> Iterator[str]:
    if not recipes:
        yield "There is nothing to compare; name at least one recipe."
    if not seeds:
        yield "`--seeds` is empty; give at least one, say 0."
    if any(seed < 0 for seed in seeds):
        yield f"`--seeds` has {min(seeds)}; a seed is at least 0."
    twice = [str(seed) for seed, count in Counter(seeds).items() if count > 1]
    if twice:
        yield f"`--seeds` names {', '.join(twice)} more than once; a seed counts once."
    if jobs < 1:
        yield f"`--jobs` is {jobs}; it is at least 1."
    for option in options:
        found = _OPTION.match(option)
        if found is None:
            yield f"`--set {option}` is no option of a run; write it as trainer.max_steps=10, or model.…, data.…, run.…"
        elif found[1] in _OWN:
            yield f"`--set {found[1]}` is what the comparison itself decides; leave it out."


def _candidates(
    recipes: Sequence[str], on: Sequence[str | Path], options: Sequence[str], home: Path
) -> list[Candidate]:
    """The recipes under names that differ, each with a folder of its own."""
    below, made = [find_config(name) for name in on], dict[Path, Candidate]()
    stems = Counter(Path(name).stem for name in recipes)
    for given in recipes:
        configs, stem = [*below, find_config(given)], Path(given).stem
        texts = json.dumps([*map(digest, configs), *options])
        folder = home / f"{stem}-{hashlib.sha256(texts.encode()).hexdigest()[:8]}"
        if folder in made:
            raise InputError(f"The recipes '{made[folder].given}' and '{given}' are the same; name each once.")
        plain = stems[stem] == 1 and stem not in (*BASELINES, EXPERTS)
        stacked = (*(f"--config={path}" for path in configs), *(f"--{option}" for option in options))
        made[folder] = Candidate(stem if plain else given, given, stacked, folder)
    return list(made.values())


def _job(candidate: Candidate) -> Job:
    """What a candidate's runs will do; modules are found in the working directory, as its processes find them."""
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        return job_from_arguments(list(candidate.options))
    except InputError as error:
        raise InputError(f"The recipe '{candidate.given}' cannot be run: {error}") from error
    finally:
        sys.path.remove(here)


def _common_tasks(jobs: Sequence[tuple[str, Job]]) -> tuple[str, ...]:
    """The tasks of all recipes, whose sources and data must be the first one's."""
    (first, job), *others = jobs
    if job.data.eval_split is None:
        raise InputError(f"The recipe '{first}' evaluates on no split; set `data.eval_split` to one that has labels.")
    found = _subject(job)
    seeded = [name for name, each in jobs if each.data.seed is not None]
    if seeded:
        raise InputError(f"The recipe '{seeded[0]}' sets `data.seed`, so that seeds would see one order; leave it out.")
    raise_all((each for name, other in others for each in _differences(first, found, name, _subject(other))), "recipes")
    return tuple(job.data.tasks)


def _subject(job: Job) -> dict[str, Any]:
    """What recipes must share for their numbers to be comparable."""
    return {
        "model.base": absolute(job.recipe.base),
        "model.experts": {task: absolute(source) for task, source in job.recipe.experts.items()},
        "data.tasks": spec(job.data.tasks, strict=False),
        "data.split": job.data.split,
        "data.eval_split": job.data.eval_split,
        "model.backbone": spec(job.recipe.backbone, strict=False),
        "trainer.limit_val_batches": str(job.trainer.get("limit_val_batches")),
    }


def _differences(first: str, theirs: Mapping[str, Any], name: str, mine: Mapping[str, Any]) -> Iterator[str]:
    for key, value in theirs.items():
        how = f"is {mine[key]!r}, not {value!r}"
        if isinstance(value, Mapping):
            how = f"differs in {some(t for t in {**value, **mine[key]} if value.get(t) != mine[key].get(t))}"
        if value != mine[key]:
            yield (
                f"The recipe '{name}' cannot be compared with '{first}': its `{key}` {how}. Give all recipes the same "
                "tasks, sources and splits, best in a configuration that all stand on (--config)."
            )


@contextmanager
def _alone(home: Path) -> Iterator[None]:
    """One comparison at a time in a folder."""
    try:
        home.mkdir(parents=True, exist_ok=True)
        with FileLock(home / ".compare.lock", timeout=0):
            yield
    except Timeout as error:
        raise InputError(f"Another comparison is at work in {home}; wait for it, or choose another --root.") from error
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise InputError(f"The folder {home} cannot be used: {error}. Choose another --root.") from error


# --- the table


def _changed_sources(done: Mapping[Planned, Ran]) -> Iterator[str]:
    """Runs of an earlier day may have seen other files under the same names."""
    runs = list(done.items())
    for run, ran in runs[1:]:
        first, before = runs[0]
        who = [who for who in ran.sources if ran.sources[who] != before.sources.get(who, ran.sources[who])]
        if who:
            yield (
                f"{run} and {first} were learned from different files under the same names: {some(who)}. Remove "
                f"{shown(run.marker)}, or the other's, to run it again; or choose another --root."
            )


def _baseline_rows(done: Mapping[Planned, Ran]) -> Iterator[Row]:
    scores = next((ran.baselines for ran in done.values() if ran.baselines is not None), {})
    for name in BASELINES:
        if name in scores:
            yield Row(name, [scores[name]])
    experts = {
        task: value for name, each in scores.items() if name.startswith("expert ") for task, value in each.items()
    }
    if experts:
        yield Row(EXPERTS, [experts])


def _row(candidate: Candidate, done: Mapping[Planned, Ran], seeds: Sequence[int]) -> Row:
    runs = [done[run] for seed in seeds if (run := Planned(candidate, seed)) in done]
    return Row(candidate.name, [ran.scores for ran in runs], runs, len(seeds))


def _versions(runs: Iterable[Ran]) -> str:
    """Of all libraries; of those that changed between runs, all versions."""
    found: dict[str, dict[str, None]] = {}
    for ran in runs:
        for name, version in ran.versions.items():
            found.setdefault(name, {})[version] = None
    return ", ".join(f"{name} {' and '.join(versions)}" for name, versions in found.items())
