"""Products of task vectors in C: the same numbers as torch's, and torch's where they cannot be had."""

import logging
import math
import os
import shutil
import subprocess

import pytest
import torch

from adamerge import native
from adamerge.deltas import DenseDeltas

needs_compiler = pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler here")
LARGE = 70_001  # more than one thread's share, and no multiple of a block


@pytest.fixture
def fresh():
    native._library.cache_clear()
    yield
    native._library.cache_clear()


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tasks", "size"), [(1, 1), (3, 2048), (4, 2049), (9, 5000), (5, LARGE)])
@pytest.mark.usefixtures("two_threads")
def test_products_are_those_of_float64(dtype, tasks, size):
    delta_TN, coef_T = torch.randn(tasks, size).to(dtype), torch.randn(tasks)
    base_N, grad_N = torch.randn(size), torch.randn(size)
    wide_TN = delta_TN.double()
    bare, whole = native.combine(delta_TN, coef_T, None), native.combine(delta_TN, coef_T, base_N)
    torch.testing.assert_close(bare.double(), coef_T.double() @ wide_TN, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(whole.double(), base_N.double() + coef_T.double() @ wide_TN, rtol=1e-5, atol=1e-5)
    found, exact = native.inner(delta_TN, grad_N).double(), wide_TN @ grad_N.double()
    size_T = wide_TN.abs() @ grad_N.double().abs()  # rounding is relative to what is added up, not to the sum
    assert ((found - exact).abs() <= 1e-6 * size_T).all()


@needs_compiler
def test_torchs_default_type_makes_no_difference():
    """Lightning's `bf16-true` changes it for the length of a step."""
    delta_TN = torch.ones(2, 8)
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = native.combine(delta_TN, torch.ones(2, dtype=torch.float32), None)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32
    assert found.tolist() == [2.0] * 8


@needs_compiler
def test_what_does_not_fit_is_not_read():
    delta_TN = torch.ones(2, 8)
    assert native.combine(delta_TN, torch.ones(3), None) is None
    assert native.combine(delta_TN, torch.ones(2), torch.ones(7)) is None
    assert native.inner(delta_TN, torch.ones(9)) is None


@needs_compiler
@pytest.mark.usefixtures("two_threads")
def test_the_same_bits_every_time():
    delta_TN, coef_T, grad_N = torch.randn(5, LARGE), torch.randn(5), torch.randn(LARGE)
    for _ in range(3):
        assert torch.equal(native.combine(delta_TN, coef_T, grad_N), native.combine(delta_TN, coef_T, grad_N))
        assert torch.equal(native.inner(delta_TN, grad_N), native.inner(delta_TN, grad_N))


@needs_compiler
def test_what_is_not_finite_stays_so():
    delta_TN = torch.zeros(2, 8)
    delta_TN[0, 1], delta_TN[1, 2] = math.nan, math.inf
    found = native.combine(delta_TN, torch.ones(2), torch.zeros(8))
    assert found[:3].isfinite().tolist() == [True, False, False]
    assert found[1].isnan()
    assert found[2] == math.inf
    assert native.inner(delta_TN, torch.ones(8)).isfinite().tolist() == [False, False]


@pytest.mark.parametrize(
    "delta_TN",
    [
        torch.randn(2, 8).double(),
        torch.randn(2, 8).half(),
        torch.randn(8, 2).T,
        torch.randn(2, 8, device="meta"),
        torch.nn.Parameter(torch.randn(2, 8)),
    ],
    ids=["fp64", "fp16", "strided", "meta", "subclass"],
)
def test_other_tensors_are_left_to_torch(delta_TN):
    assert native.combine(delta_TN, torch.ones(2), None) is None
    assert native.inner(delta_TN, torch.ones(8)) is None


@needs_compiler
@pytest.mark.usefixtures("fresh")
def test_it_is_compiled_once_for_all_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("ADAMERGE_CACHE", str(tmp_path))
    assert native._library() is not None
    (made,) = (tmp_path / "native").glob("*/native.so")
    before = made.stat().st_mtime_ns
    native._library.cache_clear()
    assert native._library() is not None
    assert made.stat().st_mtime_ns == before


@needs_compiler
@pytest.mark.usefixtures("fresh")
def test_a_library_that_was_cut_short_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setenv("ADAMERGE_CACHE", str(tmp_path))
    folder = tmp_path / "native"
    monkeypatch.setattr(native.ctypes, "CDLL", lambda path: (_ for _ in ()).throw(OSError))  # not mapped: it is cut
    native._library()
    monkeypatch.undo()
    monkeypatch.setenv("ADAMERGE_CACHE", str(tmp_path))
    (made,) = folder.glob("*/native.so")
    size = made.stat().st_size
    os.truncate(made, size // 2)
    native._library.cache_clear()
    assert native._library() is not None
    assert made.stat().st_size == size


@needs_compiler
@pytest.mark.usefixtures("fresh")
def test_a_library_of_another_user_is_not_run(tmp_path, monkeypatch):
    monkeypatch.setenv("ADAMERGE_CACHE", str(tmp_path))
    assert native._library() is not None
    native._library.cache_clear()
    if os.getuid() == 0:
        (made,) = (tmp_path / "native").glob("*/native.so")
        os.chown(made, 12345, -1)
    else:
        monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert native._library() is None


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_over_a_narrow_base_and_of_a_narrow_gradient_are_in_c(dtype, monkeypatch):
    made = {"combine": [], "inner": []}
    for name, found in made.items():
        product = getattr(native, name)
        monkeypatch.setattr(
            native, name, lambda *a, found=found, product=product: found.append(product(*a)) or found[-1]
        )
    deltas = DenseDeltas(torch.randn(3, 4, 5).to(dtype))
    coef_T, narrow = torch.rand(3, requires_grad=True), torch.randn(4, 5).bfloat16()
    out = deltas.combine(coef_T, narrow)
    torch.testing.assert_close(out, narrow.float() + torch.einsum("t,tij->ij", coef_T, deltas.stacked.float()))
    torch.testing.assert_close(deltas.inner(narrow), torch.einsum("ij,tij->t", narrow.float(), deltas.stacked.float()))
    assert all(torch.is_tensor(each) for found in made.values() for each in found)
    assert all(made.values())


def fails(*args, **options):
    raise subprocess.CalledProcessError(1, "cc", stderr=b"no such flag: \xff")


@pytest.mark.parametrize("why", ["switched off", "no compiler", "it fails", "a damaged file"])
@pytest.mark.usefixtures("fresh")
def test_without_it_products_are_torchs(why, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="adamerge")
    monkeypatch.setenv("ADAMERGE_CACHE", str(tmp_path))
    if why == "switched off":
        monkeypatch.setenv("ADAMERGE_NATIVE", "0")
    if why == "no compiler":
        monkeypatch.setattr(shutil, "which", lambda name: None)
    if why == "it fails":
        monkeypatch.setattr(subprocess, "run", fails)
    if why == "a damaged file":
        monkeypatch.setattr(native, "_compile", lambda compiler, folder: (folder / "native.so").write_text("no"))
    assert native._library() is None
    assert (why != "it fails") or "no such flag: \ufffd" in caplog.text
    found = DenseDeltas(torch.ones(2, 3)).combine(torch.tensor([1.0, 2.0]), torch.ones(3))
    assert found.tolist() == [4.0] * 3
