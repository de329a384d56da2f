"""A learned merge scored again, on the data that its run was configured with."""

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from adamerge.artifact import load, read_record
from adamerge.config import data_of
from adamerge.data import UnlabeledTasks
from adamerge.evaluation import Scores, classes_of, evaluate
from adamerge.exporting import device_of
from adamerge.reading import read_yaml
from adamerge.report import gain, score_table
from adamerge.terminal import progress_console
from adamerge.types import Batch, InputError, raise_all, some


def rescore(
    run: str | Path,
    *,
    split: str | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    trust: bool = False,
) -> str:
    """Score a run's merge, folded into one network; the table of scores as text.

    Args:
        run: The run's directory.
        split: Which split; by default the one that the run evaluated on, beside whose baselines it is shown.
        batch_size: Samples per forward; by default the run's.
        device: `auto`, `cpu` or `cuda`.
        trust: Also build classes from outside adamerge that the run names.

    Raises:
        InputError: No run, data that cannot be made again or have other classes than the merge, or no labelled split.
    """
    folder, record = read_record(run)
    where, config = device_of(device), folder.parent / "config.yaml"
    data = data_of(config, trust=trust)
    raise_all(_other_classes(data, record["classes"]), "the data")
    recorded, data.eval_split = data.eval_split, split or data.eval_split
    if data.eval_split is None:
        raise InputError("The run evaluated on no split; name one that has labels with --split.")
    if batch_size is not None and batch_size < 1:
        raise InputError(f"`--batch_size` is {batch_size}; it is at least 1.")
    data.eval_batch_size = batch_size or data.eval_batch_size
    now, unscored = _scored(folder, data, where, _precision(config), trust)
    same = data.eval_split == recorded
    before = {row: each for row, each in (record.get("scores") or {}).items() if row != "this merge"} if same else {}
    scores = {**before, "this merge": now}
    notes = [] if same else [f"The run's baselines were scored on '{recorded}', and are left out."]
    table = score_table(scores, title=f"Accuracy in % on {data.eval_split!r}", tasks=list(record["classes"]))
    return "\n".join([table, gain(scores), *notes, *unscored])


def _scored(
    folder: Path, data: UnlabeledTasks, device: torch.device, precision: str, trust: bool
) -> tuple[Scores, list[str]]:
    """Accuracy per task, computed in the precision that the run scored in; what is to be said of the other tasks."""
    with progress_console().status("Opening the merge …") as status:
        dtype = torch.bfloat16 if precision == "bf16-true" else None
        model = load(folder, trust=trust, dtype=dtype).to(device)
        data = data.prepared_by(model.backbone.preparer, model.backbone.collate)
        loaders = data.eval_loaders()
        status.update(f"Scoring {some(loaders)} …")

        def convert(batch: Batch) -> Batch:
            return {key: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for key, v in batch.items()}

        mixed = precision in ("bf16-mixed", "bf16")
        with torch.autocast(device.type, torch.bfloat16) if mixed else nullcontext():
            num_classes = classes_of(model, data.num_classes, data.scored)
            return evaluate(model, loaders, num_classes, device, convert), data.unscored()


def _precision(config: Path) -> str:
    read = read_yaml(config)
    trainer: Any = read.get("trainer") if isinstance(read, Mapping) else None
    return str(trainer.get("precision")) if isinstance(trainer, Mapping) else ""


def _other_classes(data: UnlabeledTasks, made_for: Mapping[str, list[str]]) -> Any:
    """Yield a problem for each task whose classes, or their order, are not those that its head was made for."""
    found = data.classes
    if not set(found) <= set(made_for):
        yield f"The data have the tasks {', '.join(found)}; the merge {', '.join(made_for)}."
    for task in set(found) & set(made_for):
        if found[task] and made_for[task] and list(found[task]) != list(made_for[task]):
            pairs = zip([*found[task], *[None] * len(made_for[task])], made_for[task], strict=False)
            now, then = next(((a, b) for a, b in pairs if a != b), (None, None))
            place = f"'{now}' stands where '{then}' was" if then is not None else "there are more now"
            yield (
                f"The classes of task '{task}' are not those that the merge's head was made for ({place}): "
                f"{some(found[task])} now, {some(made_for[task])} then. Score on the data that it was learned with."
            )
