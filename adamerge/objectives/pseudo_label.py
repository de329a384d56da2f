from collections.abc import Mapping

import torch.nn.functional as F

from adamerge.objectives.base import Objective
from adamerge.types import UNLABELED, Batch, TaskOutput, Term


class PseudoLabel(Objective):
    """Cross-entropy with the expert's most likely class, in nats per kept sample.

    Args:
        confident: Keep a sample only where the merged model and the expert predict the same class, or the expert's
            largest probability is at least the merged model's.
        weight: Factor of the term.
        task_weights: Further factors per task.

    Source: Model Tinting, later SyMerge, arXiv 2412.19098; `confident` is its Tinting++. Deviation: a batch that keeps
    no sample adds nothing, where the reference's mean is NaN.
    """

    needs = frozenset({"expert.logits"})

    def __init__(
        self, *, confident: bool = False, weight: float = 1.0, task_weights: Mapping[str, float] | None = None
    ) -> None:
        super().__init__(weight=weight, task_weights=task_weights)
        self.confident = self.filters = confident

    def forward(self, out: TaskOutput, batch: Batch) -> Mapping[str, Term]:
        merged_BC = out.class_logits_BC.detach()
        expert_BC = batch["expert.logits"].detach().to(merged_BC.dtype)
        label_B = expert_BC.argmax(-1)
        if self.confident:
            surer_B = expert_BC.softmax(-1).amax(-1) >= merged_BC.softmax(-1).amax(-1)
            label_B = label_B.where((merged_BC.argmax(-1) == label_B) | surer_B, UNLABELED)
        total = F.cross_entropy(out.logits_BC, label_B, reduction="sum", ignore_index=UNLABELED)
        return {"pseudo_label": Term(total, (label_B != UNLABELED).sum())}
