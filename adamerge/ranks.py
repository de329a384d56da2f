"""How the ranks of a run add up what each of them holds a share of."""

import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """W, the number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The tensor added up over all ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor
