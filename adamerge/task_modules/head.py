from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adamerge.checkpoints import open_state
from adamerge.modules import parameter_sites, swapped
from adamerge.task_modules.base import TaskModule
from adamerge.types import InputError, TaskInfo, some


class LinearHead(TaskModule):
    """A linear classifier read from a checkpoint, frozen unless asked otherwise: features [B, D] -> logits [B, C].

    Args:
        task: The task; its expert's checkpoint is the default place to look.
        prefix: The head's tensors are `{prefix}weight` [C, D] and, if it has one, `{prefix}bias` [C].
        path: Another checkpoint that holds it.
        trainable: Train it along with the merge.

    Raises:
        InputError: No such tensors, or another number of classes than the task has.
    """

    def __init__(
        self, task: TaskInfo, *, prefix: str = "head.", path: str | Path | None = None, trainable: bool = False
    ) -> None:
        super().__init__(task)
        state = open_state(path) if path is not None else task.expert
        where = path or getattr(state, "source", "its expert")
        if state is None or f"{prefix}weight" not in state:
            held = some(name for name in state or () if name.endswith("weight"))
            raise InputError(
                f"Task '{task.name}' has no head '{prefix}weight' in {where}; it holds the weights {held}."
            )
        weight_CD = state[f"{prefix}weight"].float()
        if task.classes and len(task.classes) != weight_CD.shape[0]:
            raise InputError(
                f"Task '{task.name}' has {len(task.classes)} classes, its head in {where} {weight_CD.shape[0]}."
            )
        if not bool(weight_CD.isfinite().all()):
            raise InputError(
                f"The head of task '{task.name}' in {where} holds NaN or Inf; this checkpoint is broken, take another."
            )
        self.weight = nn.Parameter(weight_CD.clone(), requires_grad=trainable)
        has_bias = f"{prefix}bias" in state
        self.bias = nn.Parameter(state[f"{prefix}bias"].float().clone(), requires_grad=trainable) if has_bias else None

    @property
    def num_classes(self) -> int | None:
        return len(self.weight)

    def forward(self, features: Tensor) -> Tensor:
        return F.linear(features, self.weight, self.bias)


class ClassifierHead(LinearHead):
    """A classifier's own head: its last layer, and layers before it that stand inside the network for its task.

    Args:
        task: The task, with its expert's checkpoint and the network.
        prefix: As for `LinearHead`.
        inner: Names of the network's tensors that the task has of its own.
        trainable: Train all of it along with the merge.

    Raises:
        InputError: As for `LinearHead`, or a tensor that the expert lacks.
    """

    def __init__(self, task: TaskInfo, *, prefix: str, inner: Sequence[str] = (), trainable: bool = False) -> None:
        super().__init__(task, prefix=prefix, trainable=trainable)
        state = task.expert or {}
        missing = [name for name in inner if name not in state]
        if missing:
            where = getattr(state, "source", "its expert")
            raise InputError(f"Task '{task.name}' needs a head of its own, but {where} lacks of it {some(missing)}.")
        self._prefix, self._inner = prefix, tuple(inner)
        self.inner = nn.ParameterList(
            nn.Parameter(state[name].float().clone(), requires_grad=trainable) for name in inner
        )

    @property
    def inside(self) -> bool:
        return bool(self._inner)

    @contextmanager
    def attach(self, net: nn.Module) -> Iterator[None]:
        sites = parameter_sites(net) if self._inner else {}
        own = dict(zip(self._inner, self.inner, strict=True))
        tensors = {name: tensor.to(getattr(*sites[name][0]).dtype) for name, tensor in own.items()}
        with swapped({name: sites[name] for name in tensors}, tensors):
            yield

    def tensors(self) -> dict[str, Tensor]:
        """All of the head, by the names that it has in a checkpoint."""
        last = {self._prefix + name: getattr(self, name) for name in ("weight", "bias")}
        own = {**dict(zip(self._inner, self.inner, strict=True)), **last}
        return {name: tensor.detach() for name, tensor in own.items() if tensor is not None}


class AsIs(TaskModule):
    """Features that are logits already, or embeddings that no classes are told from: [B, D] -> [B, D].

    Args:
        task: The task.
        number: C, where they are logits.
    """

    def __init__(self, task: TaskInfo, number: int | None = None) -> None:
        super().__init__(task)
        self._number = number

    @property
    def num_classes(self) -> int | None:
        return self._number


class ZeroShotHead(TaskModule):
    """Cosine similarity with the classes' text embeddings, frozen: features [B, D] -> logits [B, C].

    Linear in the features' direction: `weight` [C, D] has the scale in it, as CLIP's heads are released.

    Args:
        task: The task.
        weight: Embeddings of the classes [C, D]; normalised here.
        scale: Factor of the cosine: CLIP's `logit_scale`, exponentiated.
        bias: Added to every logit: SigLIP's `logit_bias`.

    Source: CLIP, arXiv 2103.00020.
    """

    def __init__(self, task: TaskInfo, weight: Tensor, scale: float, bias: float = 0.0) -> None:
        super().__init__(task)
        self.weight = nn.Parameter(scale * F.normalize(weight.float(), dim=-1), requires_grad=False)
        self.bias = nn.Parameter(torch.full((len(weight),), float(bias)), requires_grad=False)

    def forward(self, features: Tensor) -> Tensor:
        return F.linear(F.normalize(features, dim=-1), self.weight, self.bias)
