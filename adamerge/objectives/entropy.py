import math
from collections.abc import Mapping

from adamerge.objectives.base import Objective
from adamerge.types import Batch, TaskOutput, Term


class Entropy(Objective):
    """Shannon entropy of the predictions, in nats: -sum_c p_c log p_c per sample.

    Args:
        divide_by_log_classes: Divide by log C, so that tasks with many classes do not outweigh the others; then in [0,
            1].
        weight: Factor of the term.
        task_weights: Further factors per task.

    Source: AdaMerging, arXiv 2310.02575. Computed as -softmax · log_softmax, exact for any logits; no epsilon.
    """

    def __init__(
        self,
        *,
        divide_by_log_classes: bool = False,
        weight: float = 1.0,
        task_weights: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(weight=weight, task_weights=task_weights)
        self.divide_by_log_classes = divide_by_log_classes

    def forward(self, out: TaskOutput, batch: Batch) -> Mapping[str, Term]:
        log_p_BC = out.class_logits_BC.log_softmax(-1)
        entropy_B = -(log_p_BC.exp() * log_p_BC.masked_fill(log_p_BC == -math.inf, 0)).sum(-1)  # a masked class adds 0
        scale = math.log(log_p_BC.shape[-1]) if self.divide_by_log_classes else 1.0
        return {"entropy": Term(entropy_B.sum() / scale, len(entropy_B))}
