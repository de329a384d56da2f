"""Claim: a merging step costs at most 1.3 times a plain forward and backward of one model on the same batches.

Both see T = 8 tasks with 16 samples each, in fp32, and are asserted to find the same coefficient gradient first. The
memory columns are read in a process of its own per row: what stood before its first step (base, weights, task vectors)
and how far three steps went above it.

    python benchmarks/step.py
"""

import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from common import median_seconds, show
from torch import Tensor, nn

from adamerge.backbones import Module
from adamerge.merged import ApplyMode, MergedModel
from adamerge.module import AdaMerge, adam
from adamerge.rules import LayerWise
from adamerge.space import ParamSpace
from adamerge.task_modules import LinearHead
from adamerge.task_vectors import TaskVectors
from adamerge.types import TaskInfo

TASKS, SAMPLES, CLASSES = [f"task{t}" for t in range(8)], 16, 10
WIDTH, DEPTH, PATCHES, PIXELS = 384, 6, 16, 192  # 32 x 32 x 3 in patches of 8 x 8 x 3; a class token makes 17
INIT, AIM = 0.3, 1.3


class Encoder(nn.Module):
    """Patches [B, 16, 192] -> features [B, 384]: a small vision transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Linear(PIXELS, WIDTH)
        self.first = nn.Parameter(0.02 * torch.randn(1, 1, WIDTH))
        self.place = nn.Parameter(0.02 * torch.randn(1, PATCHES + 1, WIDTH))
        self.blocks = nn.Sequential(*(_block() for _ in range(DEPTH)))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, image: Tensor) -> Tensor:
        """Features of a batch of patched images."""
        tokens = torch.cat([self.first.expand(len(image), -1, -1), self.patch(image)], 1)
        return self.norm(self.blocks(tokens + self.place)[:, 0])


def _block() -> nn.Module:
    return nn.TransformerEncoderLayer(
        WIDTH, 6, 4 * WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )


class Summed(AdaMerge):
    """Without a trainer; left out are logging and the watch for non-finite values, T + 1 comparisons of scalars."""

    def report(self, values, penalties):
        return torch.stack([value for terms in values.values() for value in terms.values()]).sum()


class Setting:
    """One pool of random experts, and the four ways to step on it; all start at the merge with coefficients 0.3."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        net = Encoder()
        base = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        experts = {task: {name: p + 0.01 * torch.randn_like(p) for name, p in base.items()} for task in TASKS}
        heads = {task: {"head.weight": torch.randn(CLASSES, WIDTH) / 8} for task in TASKS}
        self.vectors = TaskVectors.load(ParamSpace.of(net), base, experts)
        self.chains = {task: [LinearHead(TaskInfo(task, CLASSES, heads[task]))] for task in TASKS}
        self.heads = {task: chain[0].requires_grad_(False) for task, chain in self.chains.items()}
        self.batches = {task: {"input": torch.randn(SAMPLES, PATCHES, PIXELS)} for task in TASKS}

    def module(self, mode: ApplyMode) -> AdaMerge:
        rule = LayerWise(self.vectors, init=INIT)
        return Summed(MergedModel(Module(Encoder), Encoder(), self.vectors, rule, self.chains, apply_mode=mode).train())

    def ours(self, mode: ApplyMode) -> Callable[[], None]:
        module = self.module(mode)
        optimizer = adam(module.model.learnables().values())

        def step() -> None:
            total = module.loop.step(module, self.batches)
            optimizer.zero_grad()
            total.backward()
            optimizer.step()

        return step

    def plain(self, concatenated: bool, net: nn.Module | None = None) -> Callable[[], None]:
        net = net or self.module("leaf").model.materialize()

        def step() -> None:
            net.zero_grad()
            if concatenated:
                parts = net(torch.cat([batch["input"] for batch in self.batches.values()])).split(SAMPLES)
                sum(entropy(self.heads[task](part)) for task, part in zip(TASKS, parts, strict=True)).backward()
            else:
                for task, batch in self.batches.items():
                    entropy(self.heads[task](net(batch["input"]))).backward()

        return step

    def ways(self) -> dict[str, Callable[[], Callable[[], None]]]:
        return {
            "plain, task by task": lambda: self.plain(False),
            "plain, concatenated": lambda: self.plain(True),
            "adamerge, leaf": lambda: self.ours("leaf"),
            "adamerge, swap": lambda: self.ours("swap"),
        }

    def check(self) -> int:
        """Assert that ours and plain find one coefficient gradient; returns the model's size."""
        module = self.module("leaf")
        net, rule, space = module.model.materialize(), module.model.rule, self.vectors.space
        module.loop.step(module, self.batches).backward()
        self.plain(False, net)()
        expected_TG = torch.zeros(len(TASKS), len(space.group_names), dtype=torch.float64)
        for name, parameter in net.named_parameters():
            delta_TN = self.vectors.deltas(name).dense().flatten(1).double()
            expected_TG[:, space.group_of[name]] += delta_TN @ parameter.grad.flatten().double()
        torch.testing.assert_close(rule.raw_TG.grad.double(), expected_TG, rtol=1e-3, atol=1e-6)
        return space.num_elements


def entropy(logits_BC: Tensor) -> Tensor:
    log_p_BC = logits_BC.log_softmax(-1)
    return -(log_p_BC.exp() * log_p_BC).sum(-1).mean()


def resident(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def memory(way: str) -> None:
    """In a process of its own: print the bytes before three steps, and what their peak added."""
    step = Setting().ways()[way]()
    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    for _ in range(3):
        step()
    print(before, resident("VmHWM") - before)


def memory_of(way: str) -> list[int]:
    environment = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "65536",
    }  # what is freed goes back, so that it is not counted
    command = [sys.executable, __file__, "--memory", way]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return [int(number) for number in found.stdout.split()]


def main() -> None:
    setting = Setting()
    size = setting.check()
    seconds = median_seconds({name: make() for name, make in setting.ways().items()}, repeats=9)
    best = min(time for name, time in seconds.items() if name.startswith("plain"))
    rows = []
    for name, time in seconds.items():
        met = "" if name.startswith("plain") else "yes" if time / best <= AIM else "no"
        before, added = (f"{number / 1e6:.0f}" for number in memory_of(name))
        rows.append([name, f"{time:.3f}", f"{time / best:.2f}", met, before, added])
    show(
        "Step time of a layer-wise merge against a forward and backward of one model on the same batches",
        f"{size / 1e6:.1f} M parameters ({4 * size / 1e6:.0f} MB), {PATCHES + 1} tokens, T = {len(TASKS)}, {SAMPLES} "
        f"samples per task, fp32, {len(setting.vectors.space.group_names)} groups; medians of 9 after a warm-up",
        ["step", "seconds", "ratio to the best plain", f"at most {AIM}", "MB before", "MB added at the peak"],
        rows,
    )


if __name__ == "__main__":
    memory(sys.argv[2]) if sys.argv[1:2] == ["--memory"] else main()
