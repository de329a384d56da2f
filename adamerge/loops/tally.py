"""Sums and counts of one step's terms: divided only after both are added up over micro-batches and ranks."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from adamerge.ranks import sum_over_ranks, world_size
from adamerge.types import Term


class Weighted(NamedTuple):
    """A term and its factor in the loss."""

    weight: float
    term: Term


Terms = Mapping[str, Weighted]


def counts_of(terms: Terms) -> Tensor:
    """The K terms' counts on this rank, [K] fp32."""
    device = next(iter(terms.values())).term.sum.device
    counts = (weighted.term.count for weighted in terms.values())
    full = torch.ones((), dtype=torch.float32, device=device)  # a fill, not a copy from the host
    return torch.stack([(full * count).float() for count in counts])


class Tally:
    """Collects one step's terms.

    DDP averages gradients over W ranks; each rank therefore returns W times its share of the global mean, so that W
    ranks take the step that one rank takes with the same global batch, whatever each rank's filters kept.
    """

    def __init__(self) -> None:
        self._terms: dict[str, Terms] = {}
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}

    def loss(self, task: str, terms: Terms, counts: Tensor) -> Tensor:
        """This rank's share of a task's loss, [] with graph.

        Args:
            task: Whose terms these are; may be called again for each micro-batch.
            terms: The K weighted terms.
            counts: Their counts [K] over all micro-batches and ranks.
        """
        sums = torch.stack([weighted.term.sum for weighted in terms.values()])
        sums = sums.to(torch.promote_types(sums.dtype, torch.float32))
        self._terms[task], self._counts[task] = terms, counts
        self._sums[task] = self._sums[task] + sums.detach() if task in self._sums else sums.detach()
        means = (sums * world_size() / counts.clamp(min=1)).unbind()
        return torch.stack([w.weight * mean for w, mean in zip(terms.values(), means, strict=True)]).sum()

    def values(self) -> dict[str, dict[str, Tensor]]:
        """Per task and term the weighted mean over all ranks; one reduction for all of them."""
        if not self._sums:
            return {}
        sums = sum_over_ranks(torch.cat(list(self._sums.values())))
        means = sums / torch.cat(list(self._counts.values())).clamp(min=1)
        flat = iter(means.unbind())
        return {task: {name: w.weight * next(flat) for name, w in terms.items()} for task, terms in self._terms.items()}
