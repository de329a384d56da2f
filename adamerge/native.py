"""The products of dense task vectors in C, for the CPU: compiled on first use, where there is a compiler.

Torch widens narrow vectors in a pass of their own and reads what it wrote; a single pass runs at the speed of the
memory. The library is kept where nobody else can write. Without a compiler, for other types or devices, and with
`ADAMERGE_NATIVE=0`, the caller takes torch's own. As with torch's own threads, a process that was forked after a
product must not ask for another on more than one thread.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from adamerge.files import built_once, cache_dir, only_ours, private_dirs
from adamerge.types import InputError

log = logging.getLogger("adamerge")

_SOURCE, _LIBRARY = Path(__file__).with_suffix(".c"), "native.so"
# The sum of a block may be taken in any order, but infinities and NaN stay what they are.
_FLAGS = ("-O3", "-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-ffp-contract=fast")
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_SMALL = 1 << 16  # elements of a product that further threads would not make faster


def combine(delta_TN: Tensor, coef_T: Tensor, base_N: Tensor | None) -> Tensor | None:
    """Sum over t of coef[t] * delta[t], plus the base: [N] fp32; None where this file has nothing for these tensors."""
    coef_T = coef_T.contiguous()
    library = _library_for(delta_TN, (coef_T, 0), (base_N, 1))
    if library is None:
        return None
    tasks, size = delta_TN.shape
    out_N = torch.empty(size, dtype=torch.float32)  # whatever torch's default is at the moment
    base = None if base_N is None else base_N.data_ptr()
    product = getattr(library, f"combine_{_NAMES[delta_TN.dtype]}")
    product(out_N.data_ptr(), base, coef_T.data_ptr(), delta_TN.data_ptr(), tasks, size, _parts(delta_TN))
    return out_N


def inner(delta_TN: Tensor, grad_N: Tensor) -> Tensor | None:
    """For each task the product of its vector and a gradient: [T] fp32; None as in `combine`."""
    library = _library_for(delta_TN, (grad_N, 1))
    if library is None:
        return None
    (tasks, size), parts = delta_TN.shape, _parts(delta_TN)
    sums_PT = torch.zeros(parts, tasks, dtype=torch.float64)
    product = getattr(library, f"inner_{_NAMES[delta_TN.dtype]}")
    product(sums_PT.data_ptr(), grad_N.data_ptr(), delta_TN.data_ptr(), tasks, size, parts)
    return sums_PT.sum(0).float()


def _library_for(delta_TN: Tensor, *others: tuple[Tensor | None, int]) -> ctypes.CDLL | None:
    """None unless C can read all: plain tensors on the CPU, the others as long as an axis of the vectors, in fp32."""
    beside = [(each, delta_TN.shape[axis]) for each, axis in others if each is not None]
    known = delta_TN.dtype in _NAMES and all(each.dtype == torch.float32 for each, _ in beside)
    fits = all(each.shape == (size,) for each, size in beside)
    tensors = [delta_TN, *(each for each, _ in beside)]
    here = all(each.device.type == "cpu" and type(each) is Tensor and each.is_contiguous() for each in tensors)
    return _library() if known and fits and here else None


def _parts(delta_TN: Tensor) -> int:
    return 1 if delta_TN.numel() < _SMALL else torch.get_num_threads()


@cache
def _library() -> ctypes.CDLL | None:
    """The compiled products, from the cache folder or made now; None where they cannot be had."""
    if os.environ.get("ADAMERGE_NATIVE") == "0":
        return None
    compiler = next(filter(None, map(shutil.which, [os.environ.get("CC") or "cc", "gcc", "clang"])), None)
    if compiler is None:
        log.debug("No C compiler: products of task vectors are torch's own.")
        return None
    try:
        library = _loaded(compiler)
    except (OSError, InputError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or b""
        log.info("The products of task vectors are torch's own: %s %s", error, said.decode(errors="replace").strip())
        return None
    place, number = ctypes.c_void_p, ctypes.c_size_t
    for name in _NAMES.values():
        for product, places in (("combine", 4), ("inner", 3)):
            function = getattr(library, f"{product}_{name}")
            function.argtypes, function.restype = [*[place] * places, *[number] * 3], None
    return library


def _loaded(compiler: str) -> ctypes.CDLL:
    """Return the library, from a folder that nobody else can write to: whoever could, could run code of their own."""
    made_for = [_SOURCE.read_text(), compiler, *_FLAGS, _processor()]
    name = hashlib.sha256(repr(made_for).encode()).hexdigest()[:32]
    for home in private_dirs("native"):  # nothing below can be another's between its check and its use
        try:
            made = only_ours(built_once(home / name, partial(_compile, compiler)) / _LIBRARY)
        except (OSError, InputError) as error:  # a disk may be full, a folder root's
            log.debug("%s cannot be used: %s", home, error)
            continue
        if made is not None:
            return ctypes.CDLL(str(made))
    with tempfile.TemporaryDirectory(prefix="adamerge-", ignore_cleanup_errors=True) as made_now:
        folder = only_ours(Path(made_now))
        if folder is None:
            raise InputError(
                f"Others can write to {cache_dir()} and {made_now}; set ADAMERGE_CACHE to your own folder."
            )
        log.info("Products of task vectors are compiled for this process alone: others can write to %s.", cache_dir())
        _compile(compiler, folder)
        return ctypes.CDLL(str(folder / _LIBRARY))  # stays loaded once its file is gone


def _compile(compiler: str, folder: Path) -> None:
    """Linked with no runtime for threads: that is torch's own, in this process already, so that no other competes."""
    folder.chmod(0o700)  # for the umask may let the group write
    unlinked, made = folder / "native.o", folder / _LIBRARY
    steps = (
        [*_FLAGS, "-march=native", "-fPIC", "-fopenmp", "-c", str(_SOURCE), "-o", str(unlinked)],
        ["-shared", str(unlinked), "-o", str(made)],
    )
    for arguments in steps:
        subprocess.run([compiler, *arguments], check=True, capture_output=True, timeout=60, umask=0o077)
    unlinked.unlink()


def _processor() -> str:
    """Return the features of this processor: machines that are not alike may share a cache folder."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.platform())
