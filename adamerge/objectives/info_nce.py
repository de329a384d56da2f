import math
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from adamerge.objectives.base import Objective
from adamerge.ranks import world_size
from adamerge.types import ROWS, Batch, InputError, TaskOutput, Term


class InfoNCE(Objective):
    """How well each anchor tells its positive from those of all other samples, in nats per anchor.

    -log(exp(cos(a_i, p_i) / temperature) / sum_j exp(cos(a_i, p_j) / temperature)), j over the samples of all ranks;
    log N where nothing is told. Samples that say the same are negatives of each other all the same.

    Args:
        positives: `expert`: anchors are the merged features of the samples, positives the expert's of the same ones;
            `pair`: each sample has two rows of features, the anchor's and its positive's, one after the other, as a
            `SentenceEncoder` gives for samples with a text under `positive`.
        temperature: Divides the cosines.
        symmetric: The mean of both directions: positives also tell their anchors from the others.
        weight: Factor of the term.
        task_weights: Further factors per task.

    Raises:
        InputError: `temperature` not positive; in training, no negatives or no pairs.

    Source: CPC, arXiv 1807.03748; cosine and temperature are SimCSE's, arXiv 2104.08821, `symmetric` is CLIP's, arXiv
    2103.00020. Every rank computes the loss of all anchors: the sum's value is its share of that, the gradient that of
    all by its own rows, so that the ranks' averaged gradient is that of one rank with all samples; ranks must hold
    equally many.
    """

    couples_batch: ClassVar[bool] = True

    def __init__(
        self,
        *,
        positives: Literal["expert", "pair"] = "expert",
        temperature: float = 0.05,
        symmetric: bool = False,
        weight: float = 1.0,
        task_weights: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(weight=weight, task_weights=task_weights)
        if not 0 < temperature < math.inf:
            raise InputError(f"`InfoNCE.temperature` is {temperature}; it is a positive number.")
        self.positives, self.temperature, self.symmetric = positives, temperature, symmetric
        self.needs = frozenset({"expert.features"} if positives == "expert" else ())

    def forward(self, out: TaskOutput, batch: Batch) -> Mapping[str, Term]:
        anchor_BD, positive_BD = self._sides(out, batch)
        if len(anchor_BD) * world_size() == 1:
            raise InputError(
                f"InfoNCE tells a sample from the others of its batch, but task '{out.task}' has one sample at a time; "
                "raise `data.batch_size`."
            )
        with torch.autocast(anchor_BD.device.type, enabled=False):  # a small temperature leaves no digits to spare
            anchor_ND, positive_ND = (F.normalize(_of_all_ranks(side), dim=-1) for side in (anchor_BD, positive_BD))
            logits_NN = anchor_ND @ positive_ND.T / self.temperature
        total = _cross_entropy(logits_NN)
        if self.symmetric:
            total = (total + _cross_entropy(logits_NN.T)) / 2
        total = total + (total / world_size() - total).detach()
        return {"info_nce": Term(total, len(anchor_BD))}

    def _sides(self, out: TaskOutput, batch: Batch) -> tuple[Tensor, Tensor]:
        """Anchors and positives of this rank, [B, D] each."""
        features = out.features_BD
        if self.positives == "expert":
            return features, batch["expert.features"].detach().to(features.dtype)
        if ROWS not in batch or len(features) % 2:
            raise InputError(
                f"`InfoNCE.positives` is `pair`, but the samples of task '{out.task}' have no second text: name its "
                "column as `positive` in the data's `columns`, for a `SentenceEncoder`, or set "
                "`InfoNCE.positives: expert`."
            )
        return features[::2], features[1::2]


def _cross_entropy(logits_NN: Tensor) -> Tensor:
    """Of telling sample i by row i, added up over samples, [] nats."""
    return (logits_NN.logsumexp(-1) - logits_NN.diagonal()).sum()


def _of_all_ranks(rows_BD: Tensor) -> Tensor:
    """The rows of all ranks, [W · B, D]; those of other ranks have no gradient."""
    if world_size() == 1:
        return rows_BD
    parts = [torch.empty_like(rows_BD) for _ in range(world_size())]
    dist.all_gather(parts, rows_BD.detach().contiguous())
    parts[dist.get_rank()] = rows_BD
    return torch.cat(parts)
