"""What the parity tests share: the tiny pool in float64, bare training runs of adamerge on it, and the comparison."""

import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import cache
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from adamerge.learnables import state_of
from adamerge.merged import MergedModel
from adamerge.module import AdaMerge
from adamerge.teachers import Teachers
from adamerge.trainers import terse_lightning
from tests import tiny

START = torch.tensor(0.3).item()  # learnables are made in fp32
Weights = dict[str, Tensor]


@cache
def pool_of(net: type[nn.Module] = tiny.Net) -> tuple[nn.Module, Weights, dict[str, Weights], dict[str, list[Tensor]]]:
    """The network, the base, and per task the expert and its head [weight, bias], in float64; not to be changed."""
    states = {name: {key: tensor.double() for key, tensor in state.items()} for name, state in tiny.states(net).items()}
    heads = {task: [states[task].pop(f"head.{part}") for part in ("weight", "bias")] for task in tiny.TASKS}
    return net().double().eval(), states.pop("base"), states, heads


def steps_of(number: int = 5, *, slot: Any = None, **options: Any) -> list[dict[str, dict[str, Tensor]]]:
    """The first steps' batches of the tiny data, in float64; `slot` is a loop's, as the data asks it."""
    data = tiny.data_of(**options)
    data.slot = slot
    stream = data.stream()
    return [{task: {"input": batch["input"].double()} for task, batch in stream[k].items()} for k in range(number)]


def inputs_of(steps: Sequence[Mapping[str, Mapping[str, Tensor]]]) -> list[dict[str, Tensor]]:
    """The same without the names that adamerge gives what is in a batch."""
    return [{task: batch["input"] for task, batch in step.items()} for step in steps]


def teachers_of(model: MergedModel, net: type[nn.Module] = tiny.Net) -> Teachers:
    """The experts of the tiny pool, in float64."""
    opened: Any = SimpleNamespace(
        space=model.vectors.space,
        experts=pool_of(net)[2],
        blocks=tiny.widths_of(net()),
        buffers_of=lambda task: nullcontext(),
    )
    return Teachers(opened, model)


def trained(model: MergedModel, steps: Sequence[Any], *, lr: float | None = None, **options: Any) -> Weights:
    """The learnables after one optimiser step on each of the batches; Adam's if only its rate is given."""
    if lr is not None:
        options["optimizer"] = lambda parameters: torch.optim.Adam(parameters, lr=lr)
    trainer = pl.Trainer(
        max_steps=len(steps),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with terse_lightning(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        trainer.fit(AdaMerge(model, **options), DataLoader(list(steps), batch_size=None))
    return state_of(model)


def assert_same(found: Tensor, expected: Tensor, start: Tensor | float, *, moved: float) -> None:
    """Equal to 1e-10 in float64, and away from the start."""
    assert found.dtype == expected.dtype == torch.float64
    assert (found - start).abs().max() > moved
    torch.testing.assert_close(found, expected.detach(), rtol=1e-10, atol=1e-10)
