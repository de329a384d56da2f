"""The network of the golden merges. Their records name it: keep its import path, its tensors and what it computes."""

import torch
from torch import Tensor, nn

INPUT, WIDTH = 5, 6


class Net(nn.Module):
    """[B, 5] -> [B, 6]: two blocks, BatchNorm, a parameter that nothing reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(INPUT, WIDTH)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(2)
        )
        self.norm = nn.BatchNorm1d(WIDTH)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.norm(x)
