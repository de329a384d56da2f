import math
from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from adamerge.objectives.base import Objective
from adamerge.types import Batch, InputError, TaskOutput, Term


class Distillation(Objective):
    """Distance of the merged model's logits from the expert's, per sample.

    Args:
        loss: `kl`, the divergence KL(expert || merged) in nats; `mse`, the mean over classes of the squared difference
            of logits.
        temperature: Divides both sides' logits under `kl`, which is then multiplied by its square, so that gradients
            keep their size.
        weight: Factor of the term.
        task_weights: Further factors per task.

    Raises:
        InputError: `temperature` not positive, or given with `mse`.

    Source: Hinton et al., arXiv 1503.02531; `kl` at temperature 2 is the objective of DAM (Arcee). A class that both
    sides mask with -inf adds 0.
    """

    needs = frozenset({"expert.logits"})

    def __init__(
        self,
        *,
        loss: Literal["kl", "mse"] = "kl",
        temperature: float = 1.0,
        weight: float = 1.0,
        task_weights: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(weight=weight, task_weights=task_weights)
        if not 0 < temperature < math.inf:
            raise InputError(f"`Distillation.temperature` is {temperature}; it is a positive number.")
        if loss != "kl" and temperature != 1:
            raise InputError(
                f"`Distillation.temperature` is {temperature}, but only `Distillation.loss: kl` has a temperature; "
                f"leave it out with `{loss}`."
            )
        self.loss, self.temperature = loss, temperature

    def forward(self, out: TaskOutput, batch: Batch) -> Mapping[str, Term]:
        student_BC = out.class_logits_BC if self.loss == "kl" else out.logits_BC
        teacher_BC = batch["expert.logits"].detach().to(student_BC.dtype)
        if self.loss == "kl":
            loss_B = self.temperature**2 * _kl(student_BC / self.temperature, teacher_BC / self.temperature)
        else:
            loss_B = (student_BC - teacher_BC).masked_fill(student_BC == teacher_BC, 0).square().mean(-1)
        return {self.loss: Term(loss_B.sum(), len(loss_B))}


class FeatureDistillation(Objective):
    """Distance of the merged model's features from the expert's, per sample.

    Args:
        loss: `l1`, the mean over features of the absolute difference; `l2`, of the squared one; `cosine`, one minus the
            cosine, in [0, 2].
        on: `features`, what enters the head; `blocks`, what each block of the network puts out, means over tokens, with
            the losses of the blocks added up.
        normalize: Divide both sides by their L2 norm first.
        weight: Factor of the term.
        task_weights: Further factors per task.

    Source: `l1` on features is Representation Surgery, arXiv 2402.02705; SurgeryV2, arXiv 2410.14389, adds one on
    blocks, where its code too compares means over tokens. `normalize` follows FusionBench. Deviation: there the merged
    features are normalised before the adapter alone, here also after it.
    """

    def __init__(
        self,
        *,
        loss: Literal["l1", "l2", "cosine"] = "l1",
        on: Literal["features", "blocks"] = "features",
        normalize: bool = False,
        weight: float = 1.0,
        task_weights: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(weight=weight, task_weights=task_weights)
        self.loss, self.on, self.normalize = loss, on, normalize
        self.needs = frozenset({f"expert.{on}"})

    def forward(self, out: TaskOutput, batch: Batch) -> Mapping[str, Term]:
        teachers = batch[f"expert.{self.on}"]
        pairs = zip(out.blocks, teachers, strict=True) if self.on == "blocks" else [(out.features_BD, teachers)]
        loss_B = torch.stack([self._loss(student_BD, teacher_BD) for student_BD, teacher_BD in pairs]).sum(0)
        return {self.on: Term(loss_B.sum(), len(loss_B))}

    def _loss(self, student_BD: Tensor, teacher_BD: Tensor) -> Tensor:
        teacher_BD = teacher_BD.detach().to(student_BD.dtype)
        if self.normalize:
            student_BD, teacher_BD = F.normalize(student_BD, dim=-1), F.normalize(teacher_BD, dim=-1)
        if self.loss == "cosine":
            return 1 - F.cosine_similarity(student_BD, teacher_BD, dim=-1)
        gap_BD = student_BD - teacher_BD
        return (gap_BD.abs() if self.loss == "l1" else gap_BD.square()).mean(-1)


def _kl(student_BC: Tensor, teacher_BC: Tensor) -> Tensor:
    """KL(teacher || student) of logits, [B] nats; a class to which the teacher gives no probability adds 0."""
    log_p_BC, log_q_BC = student_BC.log_softmax(-1), teacher_BC.log_softmax(-1)
    q_BC = log_q_BC.exp()
    return (q_BC * (log_q_BC - log_p_BC).masked_fill(q_BC == 0, 0)).sum(-1)
