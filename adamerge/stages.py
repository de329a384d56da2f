"""The phases of a run: each a module of its own, under one trainer."""

import logging
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import lightning.pytorch as pl

from adamerge.evaluation import classes_of
from adamerge.job import Job
from adamerge.learnables import train_only, trained_names
from adamerge.merged import MergedModel
from adamerge.module import AdaMerge, adam
from adamerge.processes import once
from adamerge.recipe import Phase
from adamerge.teachers import EXPERT, Keeper, Teachers
from adamerge.trainers import fit
from adamerge.types import InputError

log = logging.getLogger("adamerge")


class Stage(NamedTuple):
    """A phase that is ready to be trained."""

    module: AdaMerge
    train: str | None  # what it trains, as the recipe says
    trained: tuple[str, ...]  # the learnables themselves
    start: int
    end: int  # the optimiser step that it ends at; -1 where the trainer's other limits end it


def stages_of(
    job: Job, trainer: pl.Trainer, model: MergedModel, teachers: Teachers, held: Mapping[str, Any]
) -> list[Stage]:
    """The recipe's phases, each with its module; all of them are checked before the first is trained.

    Args:
        job: What is asked for.
        trainer: How long.
        model: What is trained.
        teachers: The experts.
        held: The training checkpoint to go on from; empty for none.

    Raises:
        InputError: Parts that do not work together, too few steps for the phases, or a checkpoint of other phases.
    """
    phases = job.recipe.phases
    ends = _ends(phases, trainer)
    num_classes = classes_of(model, job.data.num_classes, job.data.scored)
    served = _served(job)
    stages = []
    for number, (phase, start, end) in enumerate(zip(phases, [0, *ends], ends, strict=False)):
        train_only(model, phase.train)
        module = AdaMerge(
            model,
            objectives=phase.objectives,
            loop=phase.loop,
            optimizer=phase.optimizer or adam,
            lr_scheduler=phase.lr_scheduler,
            num_classes=num_classes,
            seed=job.seed_everything,
            teachers=teachers,
            phase=number,
            tasks=served[number],
        )
        if job.data.batch_size < module.loop.smallest_batch:
            raise InputError(
                f"`data.batch_size` is {job.data.batch_size}; {type(module.loop).__name__} needs at least "
                f"{module.loop.smallest_batch}."
            )
        stages.append(Stage(module, phase.train, trained_names(model), start, end))
    train_only(model, None)
    if held:
        _check_phase(held["adamerge"], stages)
    return stages


def _served(job: Job) -> list[tuple[str, ...]]:
    """The tasks that each phase learns from: those with data, and with labels where nothing else says anything of them.

    Raises:
        InputError: A phase needs labels, and no task has any.
    """
    tasks, bare = tuple(job.data.tasks), None
    served = []
    for phase in job.recipe.phases:
        objectives = phase.objectives or ()
        if any("labels" in objective.needs for objective in objectives):
            bare = job.data.check_labels() if bare is None else bare
            others = [objective for objective in objectives if "labels" not in objective.needs]
            idle = {task for task in bare if not any(objective.weight_of(task) for objective in others)}
            served.append(tuple(task for task in tasks if task not in idle))
        else:
            served.append(tasks)
    if bare:
        log.warning("No labels in '%s', so nothing supervised is learned there: %s", job.data.split, ", ".join(bare))
    return served


def _ends(phases: Sequence[Phase], trainer: pl.Trainer) -> list[int]:
    """The optimiser steps at which the phases end, in proportion to their shares; each has one at least."""
    if len(phases) == 1:
        return [max(-1, trainer.max_steps)]
    steps = max(trainer.max_steps, len(phases)) if trainer.fast_dev_run else trainer.max_steps
    timed = any(isinstance(callback, pl.callbacks.Timer) for callback in trainer.callbacks)
    other = [*(["max_time"] if timed else []), *(["max_epochs"] if (trainer.max_epochs or -1) > 0 else [])]
    if steps < len(phases) or (other and not trainer.fast_dev_run):
        wrong = f"`trainer.{other[0]}` would end one of them early" if other else f"{steps} steps are too few for them"
        raise InputError(
            f"{len(phases)} `model.phases` share `trainer.max_steps` among them: give it a number, and no other limit; "
            f"{wrong}."
        )
    shares = list(accumulate(phase.share for phase in phases))
    ends = [0]
    for place, share in enumerate(shares, start=1):
        ends.append(min(max(round(steps * share / shares[-1]), ends[-1] + 1), steps - len(phases) + place))
    return ends[1:]


def _check_phase(state: Mapping[str, Any], stages: Sequence[Stage]) -> None:
    number = state["phase"]
    if number >= len(stages):
        raise InputError(
            f"`ckpt_path` was made in phase {number + 1}; this run has {len(stages)} in all. Resume with the same "
            "`model.phases`."
        )
    before, now = set(state["trained"]), set(stages[number].trained)
    if before != now:
        raise InputError(
            f"`ckpt_path` was training {', '.join(sorted(before - now)[:3]) or 'less'} where this run trains "
            f"{', '.join(sorted(now - before)[:3]) or 'less'}. Resume with the same `model.train` and `model.phases`."
        )


def run_stages(
    job: Job,
    trainer: pl.Trainer,
    model: MergedModel,
    stages: Sequence[Stage],
    teachers: Teachers,
    checkpoint: str | None,
    held: Mapping[str, Any],
    save: Callable[[], None],
) -> None:
    """One phase after the other, from the one that the checkpoint was made in; the merge is saved between them."""
    first = held["adamerge"]["phase"] if held else 0
    if trainer.fast_dev_run:
        trainer.fit_loop.max_epochs = -1  # its one epoch would end with the first phase
    plugin, device = trainer.precision_plugin, trainer.strategy.root_device
    token = once(trainer, lambda: uuid.uuid4().hex)
    keeper = Keeper(job.data, device, token, str(trainer.precision), plugin.forward_context, plugin.convert_input)
    try:
        for number, stage in enumerate(stages[first:], start=first):
            if stage.end >= 0:
                trainer.fit_loop.epoch_loop.max_steps = stage.end
            train_only(model.to(device), stage.train)
            _prepare(job, stage, keeper, teachers, trainer.world_size * (trainer.accumulate_grad_batches or 1))
            fit(trainer, stage.module, job.data, checkpoint if number == first else None)
            if trainer.global_step < stage.end:
                log.warning("Phase %d has ended at step %d, before %d.", number + 1, trainer.global_step, stage.end)
            if stage is not stages[-1]:
                once(trainer, save)
    finally:
        keeper.close()


def _prepare(job: Job, stage: Stage, keeper: Keeper, teachers: Teachers, batches_per_step: int) -> None:
    """Set the training stream up for a phase: its tasks' order, its labels, and what is known of the samples."""
    data, module, model = job.data, stage.module, stage.module.model
    data.labels = "labels" in module.needs
    tasks = module.served_tasks
    data.slot = partial(module.loop.slot, tasks=tasks, seed=job.seed_everything)
    data.tables = {}
    # objectives of others may look at the samples, which every batch is said to hold
    data.inputs = any(not type(objective).__module__.startswith("adamerge.") for objective in module.objectives)
    wanted, served = module.needs & EXPERT, len(data.slot(stage.start)[1])
    rounds = (stage.end - stage.start) * served / len(tasks) if stage.end >= 0 else float("inf")
    keeper.draws = rounds * data.batch_size * batches_per_step
    known: dict[str, dict[str, Any]] = keeper.experts(teachers, wanted) if wanted else {}
    inside = any(part.inside for task in tasks for part in model.chain(task))
    whole = all(wanted <= set(known.get(task, {})) for task in tasks)
    if model.is_fixed and not inside and not module.block_names and whole:
        for task, merged in keeper.merged(teachers).items():
            known.setdefault(task, {}).update(merged)
    data.tables = known
