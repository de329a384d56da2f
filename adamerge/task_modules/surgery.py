import math
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adamerge.blocks import channel_axis, hooked, tokens_of, with_tokens
from adamerge.modules import Learnable
from adamerge.seeding import seed_of
from adamerge.task_modules.base import TaskModule
from adamerge.types import InputError, TaskInfo


class Surgery(TaskModule):
    """Takes a low-rank bias out of the task's features: z - up relu(down z), features [B, D] -> [B, D].

    Identity at the start, but for `normalize`: `down` [rank, D] is random, `up` [D, rank] zero.

    Args:
        task: The task, with the width of its features, the network's blocks and a seed.
        rank: Inner width of an adapter.
        deep: An adapter of its own also after every block of the network, on all tokens; the next block takes what it
            gives.
        normalize: Scale the features to length one before. For heads that do so too, as CLIP's, and for experts'
            features that are compared in the same way (`FeatureDistillation.normalize`).

    Raises:
        InputError: A rank below 1, features of unknown width, or no blocks to go deep into.

    Source: Representation Surgery, arXiv 2402.02705; `deep`: SurgeryV2, arXiv 2410.14389; `normalize`: as FusionBench
    reads the first. Deviation: hooks on the network's own blocks, whatever their number and width.
    """

    def __init__(self, task: TaskInfo, *, rank: int = 16, deep: bool = False, normalize: bool = False) -> None:
        super().__init__(task)
        if rank < 1:
            raise InputError(f"`rank` of Surgery is {rank}; it is the inner width of an adapter, at least 1.")
        if task.width is None:
            raise InputError(
                f"Surgery works on features of a known width, and that of task '{task.name}' is not known; give "
                "`TaskInfo` its `width`."
            )
        if deep and not task.blocks:
            raise InputError(
                "`deep` of Surgery needs the network's blocks, and it has no list of them; name them with "
                "`backbone.blocks`, or leave `deep` out."
            )
        self._normalize, self._blocks = normalize, tuple(task.blocks) if deep else ()
        self.down, self.up = _factors(task, "features", task.width, rank)
        self.blocks = nn.ModuleList(_Adapter(*_factors(task, name, task.blocks[name], rank)) for name in self._blocks)

    @property
    def inside(self) -> bool:
        return bool(self._blocks)

    def attach(self, net: nn.Module) -> AbstractContextManager[None]:
        hooks = {name: partial(_correct, block) for name, block in zip(self._blocks, self.blocks, strict=True)}
        return hooked(net, hooks, first=True)  # other hooks see what the next block sees

    def forward(self, features: Tensor) -> Tensor:
        return _corrected(F.normalize(features, dim=-1) if self._normalize else features, self.down, self.up)


class _Adapter(Learnable):
    """Tokens to tokens, along whichever axis holds the channels."""

    def __init__(self, down: nn.Parameter, up: nn.Parameter) -> None:
        super().__init__()
        self.down, self.up = down, up

    def forward(self, tokens: Tensor) -> Tensor:
        axis = channel_axis(tokens)
        return _corrected(tokens.movedim(axis, -1), self.down, self.up).movedim(-1, axis)


def _factors(task: TaskInfo, place: str, width: int, rank: int) -> tuple[nn.Parameter, nn.Parameter]:
    """`down` and `up`, the same whatever the other tasks and places are."""
    generator = torch.Generator().manual_seed(seed_of(task.seed, "surgery", task.name, place))
    down = nn.init.kaiming_uniform_(torch.empty(rank, width), a=math.sqrt(5), generator=generator)
    return nn.Parameter(down), nn.Parameter(torch.zeros(width, rank))


def _corrected(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """Along the last axis x - up relu(down x), computed in no less than the factors' precision, in the dtype of x."""
    with torch.autocast(x.device.type, enabled=False):
        wide = x.to(torch.promote_types(x.dtype, down.dtype))
        bias = F.linear(F.relu(F.linear(wide, down.to(wide.dtype))), up.to(wide.dtype))
        return (wide - bias).to(x.dtype)


def _correct(adapter: nn.Module, block: nn.Module, inputs: Any, output: Any) -> Any:
    return with_tokens(output, adapter(tokens_of(output)))
