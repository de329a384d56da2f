"""In what order samples come."""

import torch
from torch import Tensor

_WINDOW = 64  # batches whose samples change places among each other


def by_length(order_N: Tensor, length: Tensor, size: int, *, start: int, generator: torch.Generator) -> Tensor:
    """The samples in an order that puts those of like length into one batch.

    Whole batches are sorted window by window and then shuffled, those within a batch left as they came. What stands
    before the first whole batch and after the last stays where it is.

    Args:
        order_N: Samples as they would come, in random order.
        length: Of every sample there is, by its number.
        size: Samples in a batch.
        start: Where the first whole batch begins.
        generator: Shuffles the batches.
    """
    number = max(0, len(order_N) - start) // size
    if number == 0:
        return order_N
    inside_M = order_N[start : start + number * size]
    place_M = torch.arange(len(inside_M))
    length_M = length[inside_M]
    window_M = place_M // (_WINDOW * size)
    sorted_M = torch.argsort(window_M * (1 + length_M.max()) + length_M, stable=True)
    window = torch.arange(number) // _WINDOW
    batch = torch.argsort(window + torch.rand(number, generator=generator, dtype=torch.float64))
    place_KB = sorted_M.view(number, size)[batch].sort(1).values
    return torch.cat([order_N[:start], inside_M[place_KB.flatten()], order_N[start + number * size :]])
