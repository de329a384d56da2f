"""Two ranks on this machine, for tests of what one rank and two must have alike."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import lightning.pytorch as pl
import torch
import torch.distributed as dist


@contextmanager
def joined(rank, folder) -> Iterator[None]:
    """One of two ranks, as an elastic launcher starts them."""
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0, "TORCHELASTIC_RUN_ID": "test"}
    os.environ |= {name: str(value) for name, value in {**place, **meeting}.items()}
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    try:
        yield
    finally:
        dist.destroy_process_group()


def trained(module, batches, world):
    """The module after a step with each batch, on `world` ranks; returns copies of what it has learned."""
    ddp = {"strategy": "ddp", "devices": world} if world > 1 else {"devices": 1}
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=len(batches), logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0, use_distributed_sampler=False, **ddp,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    return {name: parameter.detach().clone() for name, parameter in module.model.learnables().items()}
