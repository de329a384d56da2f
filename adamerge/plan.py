"""What a run is about to do, said before it does it."""

from pathlib import Path

from adamerge.job import Job
from adamerge.merged import MergedModel
from adamerge.recipe import Opened
from adamerge.report import duration, gigabytes, shown


def plan(job: Job, opened: Opened, model: MergedModel, max_steps: int, world_size: int, folder: Path) -> str:
    """A line each: tasks, what is merged, what is learned on what, memory, time, directory."""
    space, tasks = opened.space, model.tasks
    size = sum(parameter.numel() for parameter in model.learnables().values())
    vectors = sum(
        model.vectors.deltas(name).dtype.itemsize * shape.numel() for name, shape in space.shapes.items()
    ) * len(tasks)
    one_model = 4 * space.num_elements
    copies = 3 if model.apply_mode == "leaf" else 2
    steps = max(0, max_steps)
    lines = {
        "Tasks": f"{len(tasks)}: {', '.join(tasks)}",
        "Merging": space.describe(),
        "Learning": f"{size:,} numbers by {type(model.rule).__name__}, on split '{job.data.split}', "
        f"{job.data.batch_size} samples per task and step on {world_size} rank{'s' * (world_size > 1)}",
        "Memory": f"about {gigabytes(vectors + copies * one_model)} for base, merged weights and task vectors "
        f"(placement: {job.recipe.vectors.placement}); activations beside",
        "Time": f"about {duration(steps * len(tasks) * opened.seconds * 1.2)} for {steps} steps"
        if steps
        else "as long as the trainer says",
        "Run": shown(folder),
    }
    return "\n".join(f"{name + ':':<10}{text}" for name, text in lines.items())
