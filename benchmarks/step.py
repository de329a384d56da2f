"""Claim: a merging step costs at most 1.15 times a plain forward and backward of one model on the same batches.

The plain step has its gradients in the weights and no optimiser; ours is the whole `Joint.step`, the backward of what
it returns, and Adam on the coefficients. Both are asserted to find the same coefficient gradient first. Memory is what
the peak of three steps adds to base, network and task vectors, in a process of its own per row.

    python benchmarks/step.py
"""

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Literal

import torch
from common import added_memory, company, median_seconds, show
from merges import Summed
from torch import Tensor, nn

from adamerge.backbones import Module
from adamerge.loops import Joint
from adamerge.merged import ApplyMode, MergedModel
from adamerge.module import AdaMerge, adam
from adamerge.opened import kept_bytes
from adamerge.rules import LayerWise
from adamerge.space import ParamSpace
from adamerge.task_modules import LinearHead
from adamerge.task_vectors import TaskVectors
from adamerge.types import TaskInfo

TASKS, SAMPLES, CLASSES = [f"task{t}" for t in range(8)], 16, 10
WIDTH, DEPTH, PATCHES, PIXELS = 384, 6, 16, 192  # 32 x 32 x 3 in patches of 8 x 8 x 3; a class token makes 17
INIT, AIM, REPEATS = 0.3, 1.15, 9


class Encoder(nn.Module):
    """Patches [B, 16, 192] -> features [B, 384]: a small vision transformer."""

    def __init__(self) -> None:
        super().__init__()
        options = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
        self.patch = nn.Linear(PIXELS, WIDTH)
        self.first, self.place = (nn.Parameter(0.02 * torch.randn(1, n, WIDTH)) for n in (1, PATCHES + 1))
        self.blocks = nn.Sequential(*(nn.TransformerEncoderLayer(WIDTH, 6, 4 * WIDTH, **options) for _ in range(DEPTH)))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, patches: Tensor) -> Tensor:
        """Features of a batch."""
        tokens = torch.cat([self.first.expand(len(patches), -1, -1), self.patch(patches)], 1)
        return self.norm(self.blocks(tokens + self.place)[:, 0])


torch.manual_seed(0)
BASE = Encoder().state_dict()
EXPERTS = {task: {name: p + 0.01 * torch.randn_like(p) for name, p in BASE.items()} for task in TASKS}
VECTORS = TaskVectors.load(ParamSpace.of(Encoder()), BASE, EXPERTS)
EXPERTS.clear()
HEADS = {task: LinearHead(TaskInfo(task, None, {"head.weight": torch.randn(CLASSES, WIDTH) / 8})) for task in TASKS}
BATCHES = {task: {"input": torch.randn(SAMPLES, PATCHES, PIXELS)} for task in TASKS}


def module(mode: ApplyMode = "leaf", order: Literal["auto", "per_task", "concatenated"] = "auto") -> AdaMerge:
    chains = {task: [head] for task, head in HEADS.items()}
    backbone, net = Module(Encoder), Encoder()
    with kept_bytes(net) as kept:  # as a run does
        backbone.features(net, BATCHES[TASKS[0]])
    model = MergedModel(backbone, net, VECTORS, LayerWise(VECTORS, init=INIT), chains, apply_mode=mode).train()
    model.activations = kept()
    return Summed(model, loop=Joint(order=order))


def ours(merge: AdaMerge) -> Callable[[], None]:
    optimizer = adam(merge.model.learnables().values())

    def step() -> None:
        total = merge.loop.step(merge, BATCHES)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()

    return step


def plain(net: nn.Module, *, concatenated: bool = False) -> Callable[[], None]:
    def task_by_task() -> None:
        net.zero_grad()
        for task, batch in BATCHES.items():
            entropy(HEADS[task](net(batch["input"]))).backward()

    def at_once() -> None:
        net.zero_grad()
        parts = net(torch.cat([batch["input"] for batch in BATCHES.values()])).split(SAMPLES)
        sum(entropy(HEADS[task](part)) for task, part in zip(TASKS, parts, strict=True)).backward()

    return at_once if concatenated else task_by_task


def entropy(logits_BC: Tensor) -> Tensor:
    log_p_BC = logits_BC.log_softmax(-1)
    return -(log_p_BC.exp() * log_p_BC).sum(-1).mean()


WAYS = {
    "plain, task by task": lambda: plain(module().model.materialize()),
    "plain, concatenated": lambda: plain(module().model.materialize(), concatenated=True),
    "adamerge, leaf": lambda: ours(module("leaf")),
    "adamerge, leaf, task by task": lambda: ours(module("leaf", "per_task")),
    "adamerge, leaf, concatenated": lambda: ours(module("leaf", "concatenated")),
    "adamerge, swap": lambda: ours(module("swap")),
}


def check(merge: AdaMerge) -> None:
    """Assert that our coefficient gradient is the plain weight gradient contracted with the task vectors."""
    net, space = merge.model.materialize(), VECTORS.space
    plain(net)()
    merge.loop.step(merge, BATCHES).backward()
    expected_TG = torch.zeros(len(TASKS), len(space.group_names), dtype=torch.float64)
    for name, parameter in net.named_parameters():
        delta_TN = VECTORS.deltas(name).dense().flatten(1).double()
        expected_TG[:, space.group_of[name]] += delta_TN @ parameter.grad.flatten().double()
    torch.testing.assert_close(merge.model.rule.raw_TG.grad.double(), expected_TG, rtol=1e-3, atol=1e-6)


def memory_of(way: str) -> int:
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back, and does not count
    command = [sys.executable, __file__, way]
    return int(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    for mode in ("leaf", "swap"):
        check(module(mode))
    seconds = median_seconds({name: make() for name, make in WAYS.items()}, repeats=REPEATS)
    best = min(time for name, time in seconds.items() if name.startswith("plain"))
    space, others, rows = VECTORS.space, company(), []
    for name, each in seconds.items():
        met = "" if name.startswith("plain") else "yes" if each <= AIM * best else "no"
        rows.append([name, f"{each:.3f}", f"{each / best:.2f}", met, f"{memory_of(name) / 1e6:.0f}"])
    show(
        "Step time of a layer-wise merge against a forward and backward of one model on the same batches",
        f"{space.num_elements / 1e6:.1f} M parameters (P = {4 * space.num_elements / 1e6:.0f} MB), {PATCHES + 1} "
        f"tokens, {len(TASKS)} tasks of {SAMPLES} samples, fp32, {len(space.group_names)} groups; "
        f"medians of {REPEATS}{others}",
        ["step", "seconds", "ratio to the best plain", f"at most {AIM}", "MB added at the peak"],
        rows,
    )


if __name__ == "__main__":
    print(added_memory(WAYS[sys.argv[1]]())) if len(sys.argv) > 1 else main()
