"""Small real networks, pools and data for the tests; also importable from configurations (`tests.tiny.Net`)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from adamerge.backbones import Module
from adamerge.blocks import block_names, recorded_blocks
from adamerge.data import TensorTask, UnlabeledTasks
from adamerge.merged import MergedModel
from adamerge.modules import identity
from adamerge.objectives import Objective
from adamerge.rules import LayerWise
from adamerge.space import ParamSpace
from adamerge.task_modules import LinearHead, TaskModule
from adamerge.task_vectors import TaskVectors
from adamerge.types import Batch, TaskInfo, TaskOutput, Term

TASKS = ("a", "b", "c")
CLASSES = {"a": 4, "b": 3, "c": 5}
WIDTH, INPUT = 6, 5


class Net(nn.Module):
    """[B, 5] -> [B, 6]; two blocks, a dropout that must never act, optionally activation checkpointing."""

    def __init__(self, checkpointing: bool | None = None) -> None:
        super().__init__()
        self.stem = nn.Linear(INPUT, WIDTH)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Dropout(0.5)) for _ in range(2)
        )
        self.reentrant = checkpointing

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + (block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant))
        return x


class TiedNet(nn.Module):
    """One weight under two names, as an embedding and its output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(INPUT, WIDTH)
        self.inner = nn.Linear(WIDTH, WIDTH, bias=False)
        self.outer = nn.Linear(WIDTH, WIDTH)
        self.outer.weight = self.inner.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(self.first(x))))


class NormNet(nn.Module):
    """BatchNorm statistics, a frozen and an unreachable parameter, a scalar one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(INPUT, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.unused = nn.Parameter(torch.ones(3))
        self.frozen = nn.Parameter(torch.ones(WIDTH), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.stem(x)) * self.scale + self.frozen


class Shift(TaskModule):
    """A trainable toy task module: adds a vector, zero at the start."""

    def __init__(self, task: TaskInfo, *, width: int = WIDTH) -> None:
        super().__init__(task)
        self.shift = nn.Parameter(torch.zeros(width))

    def forward(self, features: Tensor) -> Tensor:
        return features + self.shift


class Counting(Shift):
    """A task module with a buffer that moves while it trains."""

    def __init__(self, task: TaskInfo) -> None:
        super().__init__(task)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, features: Tensor) -> Tensor:
        if self.training:
            self.seen += len(features)
        return super().forward(features)


class Dropped(Shift):
    """A task module that draws at random."""

    def forward(self, features: Tensor) -> Tensor:
        return F.dropout(super().forward(features), 0.5, self.training)


class Recurrent(nn.Module):
    """Keeps a second list of its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRU(INPUT, WIDTH, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x[:, None])[0][:, 0]


class Nothing(Objective):
    """No term at all."""

    def forward(self, out: TaskOutput, batch: Batch) -> Mapping[str, Term]:
        return {}


class Kept(Objective):
    """Cross-entropy with the model's own prediction, on the samples whose first input is positive."""

    filters = True

    def forward(self, out: TaskOutput, batch: Batch) -> Mapping[str, Term]:
        keep = (batch["input"][:, 0] > 0).float()
        loss = F.cross_entropy(out.logits_BC, out.logits_BC.argmax(-1), reduction="none")
        return {"kept": Term((loss * keep).sum(), keep.sum())}


class Tiny(TensorTask):
    """Random inputs with random labels; 40 samples to train on, 23 to test on."""

    def __init__(self, task: str, *, size: int = 40, shift: int = 0) -> None:
        generator = torch.Generator().manual_seed(sum(map(ord, task)))

        def draw(number: int) -> tuple[Tensor, Tensor]:
            inputs = torch.randn(number, INPUT, generator=generator)
            return inputs, torch.randint(CLASSES[task], (number,), generator=generator) + shift

        super().__init__([str(c) for c in range(CLASSES[task])], train=draw(size), test=draw(23))


def states(
    net: type[nn.Module] = Net, tasks: Sequence[str] = TASKS, *, heads: bool = True, scale: float = 0.3
) -> dict[str, Any]:
    """A base and experts as state dicts; an expert depends on its task's name alone, not on the others."""
    torch.manual_seed(0)
    base = {name: tensor.clone() for name, tensor in net().state_dict().items()}
    pool = {"base": base}
    for task in tasks:
        generator = torch.Generator().manual_seed(1000 + sum(map(ord, task)))
        moved: dict[Any, Tensor] = {}
        pool[task] = {}
        for name, tensor in net().state_dict(keep_vars=True).items():
            if tensor.is_floating_point() and identity(tensor) not in moved:
                moved[identity(tensor)] = base[name] + scale * torch.randn(
                    tensor.shape, generator=generator
                ).abs_().mul_(torch.randint(0, 2, tensor.shape, generator=generator) * 2 - 1)
            pool[task][name] = moved.get(identity(tensor), base[name]).clone()
        if heads:
            pool[task]["head.weight"] = torch.randn(CLASSES[task], WIDTH, generator=generator)
            pool[task]["head.bias"] = torch.randn(CLASSES[task], generator=generator)
    return pool


def write_pool(folder: Path, net: type[nn.Module] = Net, tasks: Sequence[str] = TASKS) -> dict[str, Path]:
    """The pool as safetensors files; returns the paths by name."""
    paths = {}
    for name, state in states(net, tasks).items():
        paths[name] = folder / f"{name}.safetensors"
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, paths[name])
    return paths


def config_of(paths: Mapping[str, Path], **model: Any) -> dict[str, Any]:
    """A configuration of a merge of a written pool, as plain data."""
    tasks = [name for name in paths if name != "base"]
    return {
        "model": {
            "base": str(paths["base"]),
            "experts": {task: str(paths[task]) for task in tasks},
            "backbone": {"class_path": "adamerge.backbones.Module", "init_args": {"build": "tests.tiny.Net"}},
            "space": {"skip": r"^head\."},
            **model,
        },
        "data": {
            "tasks": {task: {"class_path": "tests.tiny.Tiny", "init_args": {"task": task}} for task in tasks},
            "batch_size": 4,
        },
        "trainer": {"max_steps": 4, "accelerator": "cpu", "devices": 1},
        "run": {"baselines": False},
    }


def vectors_of(
    net: type[nn.Module] = Net, tasks: Sequence[str] = TASKS, *, group: str = "tensor", dtype: Any = None
) -> TaskVectors:
    """Task vectors of the pool, in memory."""
    pool = states(net, tasks, heads=False)
    torch.manual_seed(0)
    space = ParamSpace.of(net(), group=group)
    if dtype is not None:
        pool = {
            key: {n: t.to(dtype) if t.is_floating_point() else t for n, t in state.items()}
            for key, state in pool.items()
        }
    experts = {task: pool[task] for task in tasks}
    return TaskVectors.load(space, pool["base"], experts, ancestry="warn")  # wide networks begin with small values


def widths_of(net: nn.Module) -> dict[str, int]:
    """The network's blocks in order, with their D."""
    names = block_names(net)
    with torch.no_grad(), recorded_blocks(net.eval(), names, 2) as found:
        net(torch.zeros(2, INPUT))
    return {name: mean_BD.shape[1] for name, mean_BD in zip(names, found, strict=True)}


def merged_of(
    net: type[nn.Module] = Net,
    tasks: Sequence[str] = TASKS,
    *,
    build: Any = None,
    rule: Any = LayerWise,
    modules: Sequence[Any] = (),
    group: str = "tensor",
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> MergedModel:
    """A merged model of the pool, in memory; float64 throughout if asked for."""
    pool = states(net, tasks)
    backbone = Module(build or net)
    blocks = widths_of(net())
    torch.manual_seed(0)
    built = backbone.build()
    built.load_state_dict(pool["base"])
    vectors = vectors_of(net, tasks, group=group, dtype=dtype)
    chains = {}
    for task in tasks:
        info = TaskInfo(task, [str(c) for c in range(CLASSES[task])], pool[task], pool["base"])
        info = replace(info, head=LinearHead(info), net=built, width=WIDTH, blocks=blocks)
        chains[task] = [*(make(info) for make in modules), info.head]
    model = MergedModel(backbone, built.to(dtype), vectors, rule(vectors), chains, **options)
    for parameter in [p for part in (model.rule, model.task_modules) for p in part.parameters()]:
        parameter.data = parameter.data.to(dtype)
    return model.eval()


def data_of(tasks: Sequence[str] = TASKS, **options: Any) -> UnlabeledTasks:
    """The tiny tasks' data."""
    return UnlabeledTasks({task: Tiny(task) for task in tasks}, **{"batch_size": 4, **options})


def batches_of(tasks: Sequence[str] = TASKS, *, dtype: torch.dtype = torch.float32, k: int = 0) -> dict[str, Batch]:
    """Step k's batches with labels."""
    data = data_of(tasks)
    data.labels = True
    return {
        task: {key: v.to(dtype) if v.is_floating_point() else v for key, v in b.items()}
        for task, b in data.stream()[k].items()
    }
