"""The products of dense task vectors in C, for the CPU: compiled on first use, where there is a compiler.

Torch widens narrow vectors in a pass of their own and reads what it wrote; a single pass runs at the speed of the
memory. Without a compiler, for other types or devices, and with `ADAMERGE_NATIVE=0`, the caller takes torch's own.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from adamerge.files import cache_dir

log = logging.getLogger("adamerge")

_SOURCE = Path(__file__).with_suffix(".c")
# The sum of a block may be taken in any order, but infinities and NaN stay what they are.
_FLAGS = ("-O3", "-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-ffp-contract=fast")
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_SMALL = 1 << 16  # elements of a product that another thread would not make faster


def combine(delta_TN: Tensor, coef_T: Tensor, base_N: Tensor | None) -> Tensor | None:
    """Sum over t of coef[t] * delta[t], plus the base: [N] fp32; None where this file has nothing for these tensors."""
    library = _library_for(delta_TN, coef_T, base_N)
    if library is None:
        return None
    tasks, size = delta_TN.shape
    coef_T, out_N = coef_T.contiguous(), torch.empty(size)
    product = getattr(library, f"combine_{_NAMES[delta_TN.dtype]}")
    base = None if base_N is None else base_N.data_ptr()
    pointers = (out_N.data_ptr(), base, coef_T.data_ptr(), delta_TN.data_ptr())
    _in_parts(lambda part, start, stop: product(*pointers, tasks, size, start, stop), delta_TN)
    return out_N


def inner(delta_TN: Tensor, grad_N: Tensor) -> Tensor | None:
    """For each task the product of its vector and a gradient: [T] fp32; None as in `combine`."""
    library = _library_for(delta_TN, grad_N)
    if library is None:
        return None
    tasks, size = delta_TN.shape
    sums_PT = torch.zeros(torch.get_num_threads(), tasks, dtype=torch.float64)
    product = getattr(library, f"inner_{_NAMES[delta_TN.dtype]}")
    places, pointers = [row.data_ptr() for row in sums_PT], (grad_N.data_ptr(), delta_TN.data_ptr())
    _in_parts(lambda part, start, stop: product(places[part], *pointers, tasks, size, start, stop), delta_TN)
    return sums_PT.sum(0).float()


def _library_for(delta_TN: Tensor, *others: Tensor | None) -> ctypes.CDLL | None:
    known = delta_TN.dtype in _NAMES and all(each is None or each.dtype == torch.float32 for each in others)
    tensors = [delta_TN, *(each for each in others if each is not None)]
    here = all(each.device.type == "cpu" and type(each) is Tensor and each.is_contiguous() for each in tensors)
    return _library() if known and here else None


def _in_parts(work: Callable[[int, int, int], None], delta_TN: Tensor) -> None:
    """The work on as many ranges of elements as torch has threads, at once: `work(part, start, stop)`."""
    size, parts = delta_TN.shape[1], torch.get_num_threads()
    if delta_TN.numel() < _SMALL or parts == 1:
        return work(0, 0, size)
    places = [size * part // parts for part in range(parts + 1)]
    waiting = [_pool(os.getpid(), parts).submit(work, p, places[p], places[p + 1]) for p in range(1, parts)]
    work(0, 0, places[1])
    for each in waiting:
        each.result()
    return None


@cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Threads of this process: a forked one has lost its parent's."""
    return ThreadPoolExecutor(threads - 1, thread_name_prefix="adamerge")


@cache
def _library() -> ctypes.CDLL | None:
    """The compiled products, from the cache folder or made now; None where they cannot be had."""
    if os.environ.get("ADAMERGE_NATIVE") == "0":
        return None
    compiler = next(filter(None, map(shutil.which, [os.environ.get("CC") or "cc", "gcc", "clang"])), None)
    if compiler is None:
        log.debug("No C compiler: products of task vectors are torch's own.")
        return None
    made_for = [_SOURCE.read_text(), compiler, *_FLAGS, _processor()]
    path = cache_dir() / "native" / f"{hashlib.sha256(repr(made_for).encode()).hexdigest()[:32]}.so"
    try:
        if not path.is_file():
            _compile(compiler, path)
        library = ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        log.debug("Products of task vectors are torch's own: %s", error)
        return None
    place, number = ctypes.c_void_p, ctypes.c_size_t
    for name in _NAMES.values():
        for product, arguments in (("combine", [place] * 4), ("inner", [place] * 3)):
            function = getattr(library, f"{product}_{name}")
            function.argtypes, function.restype = [*arguments, *[number] * 4], None
    return library


def _compile(compiler: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        command = [compiler, *_FLAGS, "-march=native", "-shared", "-fPIC", str(_SOURCE), "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
        made.replace(path)  # whole or absent, also where several processes make it at once


def _processor() -> str:
    """What this processor can do: a cache folder may be shared by machines that are not alike."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.platform())
