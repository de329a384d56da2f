"""Linear heads of the demo's experts, fitted on features that stay as they are."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def fit_head(head: nn.Linear, feat_ND: Tensor, label_N: Tensor, decay: float) -> None:
    """Fit a head on all samples at once.

    Args:
        head: The head, [C, D]; changed in place.
        feat_ND: Features of N samples.
        label_N: Their classes.
        decay: Weight of the squared weights in the loss.
    """
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=50, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(head(feat_ND), label_N) + decay * head.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
