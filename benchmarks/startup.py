"""Claim: `import adamerge` takes at most 1 s, a run of the demo at most 4 s to its first step beyond the imports.

The imports are those of torch, lightning and open_clip, in a process of their own. The command is `python -m
adamerge.fit --config configs/demo.yaml` and ends when its first optimiser step is done: the configuration is read, all
sources are checked, the vectors made and the baselines scored before it. Fresh processes that take turns; the first
round, not counted, makes what the cache folder keeps: the zoo, its heads, what the experts say of the pictures, and the
baselines' scores, which are taken out again before every start of a run that is to score them itself.

    python benchmarks/startup.py
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from common import CONFIGS, company, median_seconds, show

from adamerge.files import cache_dir

REPEATS = 5
IMPORT_AIM, START_AIM = 1.0, 4.0
LIBRARIES = "import torch, lightning.pytorch, open_clip"
END = "import os; os._exit(0)"  # as the command ends: nothing is torn down


class EndAfterFirstStep(pl.Callback):
    """Ends the process on the spot; the command's own processes find it by `startup.EndAfterFirstStep`."""

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        os._exit(0 if trainer.global_step == 1 else 1)


def ran(*arguments: str, cache: Path | None = None) -> Callable[[], Any]:
    """A process; with a cache folder of its own, no scores are in it."""
    path = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    if cache is not None:
        environment["ADAMERGE_CACHE"] = str(cache)

    def run() -> None:
        if cache is not None:
            shutil.rmtree(cache / "scores", ignore_errors=True)
        subprocess.run([sys.executable, *arguments], env=environment, check=True, capture_output=True)

    return run


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "cache"
        cache.mkdir()
        for kept in ("demo", "heads", "experts", "native", "sha256"):
            (cache_dir() / kept).mkdir(parents=True, exist_ok=True)
            (cache / kept).symlink_to(cache_dir() / kept)
        fit = ["-m", "adamerge.fit", "--config", str(CONFIGS / "demo.yaml"), "--run.root", folder]
        fit += ["--trainer.callbacks+=startup.EndAfterFirstStep"]
        seconds = median_seconds(
            {
                "import adamerge": ran("-c", f"import adamerge; {END}"),
                "imports of torch, lightning and open_clip": ran("-c", f"{LIBRARIES}; {END}"),
                "the same and of datasets": ran("-c", f"{LIBRARIES}, datasets; {END}"),
                "the command to its first step": ran(*fit),
                "the command where baselines are to be scored": ran(*fit, cache=cache),
                "the command without baselines": ran(*fit, "--run.baselines", "false"),
            },
            repeats=REPEATS,
        )
    imports, rows = seconds["imports of torch, lightning and open_clip"], []
    for name, each in seconds.items():
        beyond = f"{each - imports:.2f}" if each > imports else ""
        met = each <= IMPORT_AIM if name == "import adamerge" else each - imports <= START_AIM
        rows.append([name, f"{each:.2f}", beyond, "" if "imports" in name or "same" in name else ("no", "yes")[met]])
    show(
        "From a command to its first step",
        f"configs/demo.yaml, 8 tasks, zoo and caches present; aims: {IMPORT_AIM:g} s for `import adamerge`, "
        f"{START_AIM:g} s beyond the imports; fresh processes, medians of {REPEATS}{company()}",
        ["what", "seconds", "beyond the imports", "aim met"],
        rows,
    )


if __name__ == "__main__":
    main()
