"""Arms of a comparison, each in a process of its own that notes times and memory and leaves them in a file.

Reads nothing of adamerge until it makes the peer's environment: the peer imports it too.
"""

import gc
import hashlib
import json
import os
import subprocess
import sys
import sysconfig
import time
import venv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import forget_peak, resident
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from vit import Inputs

PEER = "fusion-bench==0.2.33"
WORKER = Path(__file__).with_name("fusion_bench_worker.py")


class Clock:
    """Notes when each step begins, what memory stood before the first, and the first step's gradient.

    Args:
        warm: Steps that are run first and not counted.
        steps: Those that are.
    """

    def __init__(self, warm: int, steps: int) -> None:
        self.steps, self._warm = warm + steps, warm
        self._marks: list[float] = []
        self._before = 0
        self._gradients: dict[str, Tensor] = {}

    def ready(self) -> None:
        """All that is held between steps is there: memory counts from here; by default from the first `mark`."""
        gc.collect()
        self._before = resident("VmRSS")
        forget_peak()

    def mark(self) -> None:
        """A step begins."""
        if not self._before:
            self.ready()
        self._marks.append(time.perf_counter())

    @property
    def is_first(self) -> bool:
        """The first step has begun, and the second has not."""
        return len(self._marks) == 1

    def first_gradient(self, parameters: Mapping[str, nn.Parameter], *, reduced: bool = False) -> None:
        """Keep the parameters' gradients of the first step; `reduced`: a norm of each, and up to 300 of its numbers."""
        for name, parameter in parameters.items():

            def keep(parameter: Tensor, name: str = name) -> None:
                if self.is_first:
                    assert parameter.grad is not None
                    gradient = parameter.grad
                    if reduced:
                        some = gradient.flatten()[:: -(-gradient.numel() // 300)]
                        gradient = torch.cat([gradient.norm()[None], some * (gradient.numel() / len(some)) ** 0.5])
                    self._gradients[name] = gradient.clone()

            parameter.register_post_accumulate_grad_hook(keep)

    @staticmethod
    def run(arms: Mapping[str, Callable[[Inputs, "Clock"], None]], arguments: Sequence[str]) -> None:
        """One arm on a folder's inputs, as `measured` asks for it; what was noted is left in the folder."""
        name, folder, warm, steps = arguments
        clock = Clock(int(warm), int(steps))
        arms[name](Inputs(Path(folder)), clock)
        marks = [*clock._marks, time.perf_counter()]
        seconds = [end - start for start, end in pairwise(marks)][clock._warm :]
        noted = {"seconds": seconds, "before": clock._before, "peak": resident("VmHWM")}
        Path(folder, f"{name}.json").write_text(json.dumps(noted))
        save_file(clock._gradients, Path(folder, f"{name}.safetensors"))


@dataclass(frozen=True)
class Measured:
    """One arm: seconds of each step, bytes before the first step and at the peak of all, first gradients by name."""

    seconds: list[float]
    before: int
    peak: int
    gradients: Mapping[str, Tensor]

    @property
    def step(self) -> float:
        """Its median."""
        return median(self.seconds)

    def memory(self) -> list[str]:
        """The cells under `MEMORY`."""
        return [f"{size / 1e6:,.0f}" for size in (self.before, self.peak, self.peak - self.before)]


MEMORY = ["MB before the first step", "MB at the peak", "MB added"]


def compared(script: str | Path, arm: str, folder: Path, steps: int, *, peer: bool = False) -> tuple[Measured, int]:
    """Time over some steps after one that warms up; memory in a thrifty run of its own, of two steps.

    Also the peak of the first run in bytes, where what is freed may stay with the process.
    """
    timed = measured(script, arm, folder, warm=1, steps=steps, peer=peer)
    held = measured(script, arm, folder, warm=0, steps=2, peer=peer, thrifty=True)
    return replace(held, seconds=timed.seconds), timed.peak


def measured(
    script: str | Path,
    arm: str,
    folder: Path,
    *,
    warm: int,
    steps: int,
    peer: bool = False,
    thrifty: bool = False,
    limit: int | None = None,
) -> Measured:
    """Run `script ARM FOLDER WARM STEPS` in a process of its own and read what it leaves in the folder.

    Args:
        script: What hands its arguments to `Clock.run`.
        arm: Which.
        folder: The inputs'.
        warm: Steps before those that count.
        steps: Those.
        peer: Run it in the peer's environment.
        thrifty: What is freed goes back to the machine, which takes time.
        limit: End the process when it holds more bytes.

    Raises:
        TooLarge: It was ended.
        RuntimeError: It failed.
    """
    python = str(peer_python() if peer else sys.executable)
    command = [python, str(Path(script).resolve()), arm, str(folder), str(warm), str(steps)]
    log, environment = folder / f"{arm}.log", {**os.environ, "HF_HUB_OFFLINE": "1"}
    if thrifty:
        environment["MALLOC_MMAP_THRESHOLD_"] = "65536"
    with open(log, "w") as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, cwd=folder, env=environment)
        try:
            while process.poll() is None:
                if limit is not None and resident("VmRSS", process.pid) > limit:
                    raise TooLarge
                time.sleep(0.05)
        finally:
            process.kill()
            process.wait()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{log.read_text()[-3000:]}")
    noted: dict[str, Any] = json.loads((folder / f"{arm}.json").read_text())
    return Measured(**noted, gradients=load_file(folder / f"{arm}.safetensors"))


class TooLarge(Exception):
    """A process held more memory than it was granted."""


def peer_python() -> Path:
    """The interpreter of FusionBench's environment, made on first use and kept.

    It sees this environment's packages, and has of its own what FusionBench needs beside them; nothing of it is seen
    from here.
    """
    from adamerge.files import built_once, cache_dir

    def build(folder: Path) -> None:
        venv.create(folder, with_pip=True)
        python = str(folder / "bin" / "python")
        where = [python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"]
        site = Path(subprocess.run(where, capture_output=True, text=True, check=True).stdout.strip())
        (site / "shared.pth").write_text(sysconfig.get_paths()["purelib"])
        subprocess.run([python, "-m", "pip", "install", "--quiet", PEER], check=True)

    shared = hashlib.sha256(f"{sysconfig.get_paths()['purelib']} {torch.__version__}".encode()).hexdigest()[:8]
    return built_once(cache_dir() / "bench" / f"{PEER.replace('==', '-')}-{shared}", build) / "bin" / "python"


def assert_same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], tolerance: float) -> float:
    """Assert that two sets of gradients are one, and return how far apart they are.

    Far is ||ours - theirs|| / ||theirs||, over all tensors together: some gradients are zero but for rounding.
    """
    assert set(ours) == set(theirs), "the arms learn tensors of other names"
    a, b = (torch.cat([each[name].double().flatten() for name in sorted(ours)]) for each in (ours, theirs))
    apart = float((a - b).norm() / b.norm())
    assert apart <= tolerance, f"the arms' first gradients differ by {apart:.1e} of their norm"
    return apart
