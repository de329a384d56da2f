"""What a training checkpoint holds beside Lightning's counters, and how a run goes on from it exactly."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

from torch.optim import Optimizer

from adamerge.learnables import labels_of, load_state, state_of
from adamerge.merged import MergedModel
from adamerge.recorded import spec
from adamerge.types import InputError

log = logging.getLogger("adamerge")


def training_state(model: MergedModel, optimizers: Sequence[Optimizer]) -> dict[str, Any]:
    """Learnables and the names they belong to, the sources' fingerprint, the optimiser's settings."""
    return {
        "learnables": state_of(model),
        "labels": labels_of(model),
        "rule": spec(model.rule, strict=False),
        "fingerprint": model.vectors.fingerprint(),
        "optimizer": [_settings(optimizer) for optimizer in optimizers],
    }


def restore(model: MergedModel, checkpoint: dict[str, Any]) -> None:
    """Put a checkpoint's learnables into the model.

    Raises:
        InputError: The checkpoint is of another program, or was made from other checkpoints, tasks or groups.
    """
    state = checkpoint.get("adamerge")
    if state is None:
        raise InputError("`ckpt_path` is no training checkpoint of adamerge.")
    if state["labels"] != labels_of(model):
        then, now = (
            {kind: ", ".join(names) for kind, names in labels.items()} for labels in (state["labels"], labels_of(model))
        )
        kind = "task" if then["task"] != now["task"] else "group"
        raise InputError(
            f"`ckpt_path` was trained on the {kind}s {then[kind]}; this run has {now[kind]}. "
            "Resume with the same ones in the same order."
        )
    rule = spec(model.rule, strict=False)
    if state["rule"] != rule:
        raise InputError(
            f"`ckpt_path` was trained with the rule {state['rule']}; this run has {rule}. Resume with the same rule."
        )
    if state["fingerprint"] != model.vectors.fingerprint():
        raise InputError(
            "`ckpt_path` was trained on other task vectors: a checkpoint, transform or seed has changed since. "
            "Put the old sources back, or start afresh without `--ckpt_path`."
        )
    load_state(model, state["learnables"], state["labels"], "`ckpt_path`")


def reconcile_optimizer(checkpoint: dict[str, Any], optimizer: Optimizer) -> None:
    """Let what is configured now beat what the checkpoint was trained with, and say so."""
    before, now = checkpoint["adamerge"]["optimizer"][0], _settings(optimizer)
    if before["class"] != now["class"]:
        raise InputError(
            f"`ckpt_path` was trained with {before['class']}, this run has {now['class']}; resume with the same "
            "optimiser, or start afresh."
        )
    changed = {key: value for key, value in now.items() if key in before and before[key] != value}
    for key, value in changed.items():
        log.info("Resuming with %s %s; the checkpoint was trained with %s.", key, value, before[key])
    groups = checkpoint["optimizer_states"][0]["param_groups"]
    if "lr" in changed:
        scale = _scaled(before["lr"], changed.pop("lr"))
        for group in groups:
            group.update({key: scale(group[key]) for key in ("lr", "initial_lr") if key in group})
        for schedule in checkpoint.get("lr_schedulers", []):
            schedule.update(
                {key: list(map(scale, schedule[key])) for key in ("base_lrs", "_last_lr") if key in schedule}
            )
    for group in groups:
        group.update({key: value for key, value in changed.items() if key in group})


def _scaled(before: float, now: float) -> Callable[[float], float]:
    """A scheduled rate keeps its place in the schedule; a run that stood at rate 0 starts at the new one."""
    return lambda rate: rate * (now / before) if before else now


def _settings(optimizer: Optimizer) -> dict[str, Any]:
    """The optimiser's class and hyper-parameters as plain data."""
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in optimizer.defaults.items()}
    return {"class": type(optimizer).__name__, **plain}
