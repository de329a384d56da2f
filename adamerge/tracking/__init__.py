from adamerge.tracking.wandb_report import WandbReport
from adamerge.tracking.wandb_run import tracked

__all__ = ["WandbReport", "tracked"]
