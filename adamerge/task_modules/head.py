from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adamerge.checkpoints import open_state
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
        if task.classes is not None and len(task.classes) != weight_CD.shape[0]:
            raise InputError(
                f"Task '{task.name}' has {len(task.classes)} classes, its head in {where} {weight_CD.shape[0]}."
            )
        self.weight = nn.Parameter(weight_CD.clone(), requires_grad=trainable)
        has_bias = f"{prefix}bias" in state
        self.bias = nn.Parameter(state[f"{prefix}bias"].float().clone(), requires_grad=trainable) if has_bias else None

    def forward(self, features: Tensor) -> Tensor:
        return F.linear(features, self.weight, self.bias)


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
