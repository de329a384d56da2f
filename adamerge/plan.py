"""What a run is about to do, said before it does it."""

from collections.abc import Sequence
from pathlib import Path

from adamerge.job import Job
from adamerge.merged import MergedModel
from adamerge.opened import Opened
from adamerge.report import duration, gigabytes, shown


def plan(
    job: Job, opened: Opened, model: MergedModel, ends: Sequence[int], size: int, world_size: int, folder: Path
) -> str:
    """A line each: tasks, what is merged, what is learned on what, memory, time, directory."""
    space, tasks = opened.space, model.tasks
    vectors = sum(
        model.vectors.deltas(name).dtype.itemsize * shape.numel() for name, shape in space.shapes.items()
    ) * len(tasks)
    one_model = 4 * space.num_elements
    copies = 3 if model.apply_mode == "leaf" else 2
    steps, tasks_of_steps = max(0, ends[-1]), _served(job, ends, tuple(job.data.tasks))
    bare = [task for task in tasks if task not in job.data.tasks]
    lines = {
        "Tasks": f"{len(tasks)}: {', '.join(tasks)}" + (f"; merged without data: {', '.join(bare)}" if bare else ""),
        "Merging": space.describe(),
        "Learning": f"{size:,} numbers by {_parts(model)}, on split '{job.data.split}', "
        f"{job.data.batch_size} samples per task and step on {world_size} rank{'s' * (world_size > 1)}",
        "Memory": f"about {gigabytes(vectors + copies * one_model)} for base, merged weights and task vectors "
        f"(placement: {job.recipe.vectors.placement}); activations beside",
        "Time": f"about {duration(tasks_of_steps * opened.seconds * 1.2)} for {steps} steps"
        if steps
        else "as long as the trainer says",
        **({"Phases": _phases(job, ends)} if len(ends) > 1 else {}),
        **(
            {"Training": f"{job.recipe.phases[0].train} alone"} if job.recipe.phases[0].train and len(ends) == 1 else {}
        ),
        "Run": shown(folder),
    }
    return "\n".join(f"{name + ':':<10}{text}" for name, text in lines.items())


def _served(job: Job, ends: Sequence[int], tasks: Sequence[str]) -> int:
    """How many tasks' batches all optimiser steps take together."""
    starts = [0, *ends]
    loops = [phase.loop or job.recipe.loop for phase in job.recipe.phases]
    return sum(
        max(0, end - start) * len(loop.slot(start, tasks, 0)[1])
        for loop, start, end in zip(loops, starts, ends, strict=False)
    )


def _parts(model: MergedModel) -> str:
    """The rule's class, and those of the task modules that can learn."""
    trainable = set(map(id, model.trainable().values()))
    chain = model.chain(model.tasks[0])
    learning = [type(part).__name__ for part in chain if any(id(p) in trainable for p in part.parameters())]
    return " + ".join([type(model.rule).__name__, *dict.fromkeys(learning)])


def _phases(job: Job, ends: Sequence[int]) -> str:
    starts = [0, *ends]
    said = []
    for phase, start, end in zip(job.recipe.phases, starts, ends, strict=False):
        by = " + ".join(type(objective).__name__ for objective in phase.objectives or ())
        said.append(f"steps {start} to {end} train {phase.train or 'all'} by {by}")
    return "; ".join(said)
