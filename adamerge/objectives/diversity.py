from collections.abc import Mapping
from typing import ClassVar

import torch

from adamerge.objectives.base import Objective
from adamerge.ranks import sum_over_ranks, world_size
from adamerge.types import Batch, TaskOutput, Term


class Diversity(Objective):
    """Minus the entropy of the mean prediction over the batches of all ranks, in nats, in [-log C, 0].

    Minimised beside another objective, it keeps predictions from collapsing on a few classes. It favours equal classes:
    batches with few samples per class, or data with rare classes, ask for a small weight.

    Args:
        weight: Factor of the term.
        task_weights: Further factors per task.

    Source: SHOT, arXiv 2002.08546. The mean's value is that of all ranks and its gradient this rank's share, so that
    the ranks' averaged gradient is that of one rank with all samples; ranks must hold equally many.
    """

    couples_batch: ClassVar[bool] = True

    def forward(self, out: TaskOutput, batch: Batch) -> Mapping[str, Term]:
        p_C = out.class_logits_BC.softmax(-1).mean(0)
        p_C = p_C + (sum_over_ranks(p_C.detach().clone()) / world_size() - p_C).detach()
        log_p_C = p_C.clamp(min=torch.finfo(p_C.dtype).tiny).log()  # a class that nothing predicts adds 0
        size = len(out.logits_BC)
        return {"diversity": Term((p_C * log_p_C).sum() * size, size)}
