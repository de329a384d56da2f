from collections.abc import Mapping

import torch.nn.functional as F

from adamerge.objectives.base import Objective
from adamerge.types import UNLABELED, Batch, TaskOutput, Term


class Supervised(Objective):
    """Cross-entropy with the true labels, in nats per labelled sample; samples labelled -100 do not count.

    Args:
        weight: Factor of the term.
        task_weights: Further factors per task.

    Source: the supervised objective of SUPERMERGE, arXiv 2412.10416.
    """

    needs = frozenset({"labels"})
    filters = True

    def forward(self, out: TaskOutput, batch: Batch) -> Mapping[str, Term]:
        label_B = batch["label"]
        total = F.cross_entropy(out.logits_BC, label_B, reduction="sum", ignore_index=UNLABELED)
        return {"cross_entropy": Term(total, (label_B != UNLABELED).sum())}
