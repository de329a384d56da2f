"""Products of task vectors in C: the same numbers as torch's, and torch's where they cannot be had."""

import logging
import math
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

from adamerge import files, native
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


def not_mapped(path):
    raise OSError(path)


@needs_compiler
@pytest.mark.usefixtures("fresh")
def test_a_library_that_was_cut_short_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setenv("ADAMERGE_CACHE", str(tmp_path))
    folder = tmp_path / "native"
    monkeypatch.setattr(native.ctypes, "CDLL", not_mapped)  # for it is cut
    native._library()
    monkeypatch.undo()
    monkeypatch.setenv("ADAMERGE_CACHE", str(tmp_path))
    (made,) = folder.glob("*/native.so")
    size = made.stat().st_size
    os.truncate(made, size // 2)
    native._library.cache_clear()
    assert native._library() is not None
    assert made.stat().st_size == size


# --- whoever can write to the folder could have his own code run


@pytest.fixture
def places(tmp_path, monkeypatch):
    """The shared cache folder, within one of its own; the user's own stands elsewhere."""
    shared, own = tmp_path / "team" / "cache", tmp_path / "own"
    shared.mkdir(parents=True)
    own.mkdir()
    for folder in (shared, shared.parent, own):
        folder.chmod(0o755)
    monkeypatch.setenv("ADAMERGE_CACHE", str(shared))
    monkeypatch.setattr(files.platformdirs, "user_cache_dir", lambda name: str(own / name))
    monkeypatch.setattr(native, "_FLAGS", ("-O0",))  # compiled in no time
    return shared, own


@pytest.fixture
def loaded(monkeypatch):
    """The paths that libraries are loaded from, in their order."""
    paths, load = [], native.ctypes.CDLL
    monkeypatch.setattr(native.ctypes, "CDLL", lambda path: paths.append(Path(path)) or load(path))
    return paths


@pytest.fixture
def owned_by_another(monkeypatch):
    """A function that gives a path to another user, or seems to where only root could."""
    seeming, lstat, plain_stat = set(), Path.lstat, Path.stat

    def seen(look):
        def stat_of(path, **options):
            found = look(path, **options)
            if (found.st_dev, found.st_ino) not in seeming:
                return found
            return os.stat_result([*found[:4], OTHER, *found[5:10]])

        return stat_of

    def give(path):
        if os.getuid() == 0:
            os.chown(path, OTHER, -1, follow_symlinks=False)
        else:
            found = lstat(path)
            seeming.add((found.st_dev, found.st_ino))

    monkeypatch.setattr(Path, "lstat", seen(lstat))
    monkeypatch.setattr(Path, "stat", seen(plain_stat))
    return give


def again():
    native._library.cache_clear()
    return native._library()


OTHER = 12345
# By a name: what makes the shared cache folder, which a library of ours lies in, one that another user can change.
OPENED = {
    "group-writable": lambda shared, give: shared.chmod(0o775),
    "world-writable": lambda shared, give: shared.chmod(0o777),
    "sticky itself": lambda shared, give: (shared / "native").chmod(0o1777),
    "parent group-writable": lambda shared, give: shared.parent.chmod(0o775),
    "parent world-writable": lambda shared, give: shared.parent.chmod(0o777),
    "foreign": lambda shared, give: give(shared),
    "foreign native": lambda shared, give: give(shared / "native"),
    "foreign parent": lambda shared, give: give(shared.parent),
    "foreign in a sticky parent": lambda shared, give: (shared.parent.chmod(0o1777), give(shared)),
    "foreign build": lambda shared, give: give(*(shared / "native").glob("*/")),
    "foreign library": lambda shared, give: give(*shared.glob("native/*/native.so")),
    "writable build": lambda shared, give: next((shared / "native").glob("*/")).chmod(0o777),
    "writable library": lambda shared, give: next(shared.glob("native/*/native.so")).chmod(0o777),
}


@needs_compiler
@pytest.mark.parametrize("how", OPENED)
@pytest.mark.usefixtures("fresh")
def test_a_folder_that_another_can_change_is_not_used(how, places, loaded, owned_by_another):
    shared, own = places
    assert native._library() is not None
    assert loaded.pop().is_relative_to(shared)
    OPENED[how](shared, owned_by_another)
    assert again() is not None
    assert again() is not None
    assert [path.is_relative_to(own) for path in loaded] == [True, True]
    assert len(list(own.rglob("native.so"))) == 1


@needs_compiler
@pytest.mark.parametrize("umask", [0o002, 0o000], ids=oct)
@pytest.mark.usefixtures("fresh")
def test_what_is_compiled_is_ours_whatever_the_umask(umask, places, loaded):
    shared, _ = places
    before = os.umask(umask)
    try:
        assert native._library() is not None
        assert again() is not None
    finally:
        os.umask(before)
    assert [path.is_relative_to(shared) for path in loaded] == [True, True]
    assert len(list(shared.rglob("native.so"))) == 1
    place = loaded[0]
    assert [path.stat().st_mode & 0o777 for path in (place, place.parent, place.parent.parent)] == [0o700] * 3


@needs_compiler
@pytest.mark.usefixtures("fresh")
def test_a_sticky_folder_above_is_safe_where_the_entry_is_ours(places, loaded):
    shared, _ = places
    shared.parent.chmod(0o1777)
    assert native._library() is not None
    assert loaded[0].is_relative_to(shared)


@needs_compiler
@pytest.mark.parametrize("link", ["cache", "parent", "native", "library"])
@pytest.mark.usefixtures("fresh")
def test_links_are_followed_to_where_they_lead(link, places, loaded, owned_by_another, tmp_path):
    shared, own = places
    assert native._library() is not None
    (made,) = shared.glob("native/*/native.so")
    moved = {"cache": shared, "parent": shared.parent, "native": shared / "native", "library": made}[link]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o755)
    moved.rename(elsewhere / moved.name)
    moved.symlink_to(elsewhere / moved.name)
    assert again() is not None  # to a place of ours
    assert loaded[-1].is_relative_to(elsewhere)
    owned_by_another(elsewhere)
    assert again() is not None
    assert loaded[-1].is_relative_to(own)


@needs_compiler
@pytest.mark.usefixtures("fresh")
def test_a_library_that_is_put_there_after_the_check_does_not_run(places, tmp_path, monkeypatch):
    """As by another user who can write to the shared folder, at the last moment."""
    shared, _ = places
    ran, load = tmp_path / "ran", native.ctypes.CDLL
    monkeypatch.setattr(native.ctypes, "CDLL", not_mapped)  # of a path that was loaded, a process reads nothing anew
    native._library()
    assert list(shared.rglob("native.so"))
    shared.chmod(0o777)
    (tmp_path / "evil.c").write_text(
        f'#include <stdio.h>\n__attribute__((constructor)) void run(void) {{ fclose(fopen("{ran}", "w")); }}'
    )
    subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "evil.so", tmp_path / "evil.c"], check=True)

    def swapped(path):
        for library in shared.rglob("native.so"):
            os.replace(shutil.copy(tmp_path / "evil.so", tmp_path / "copy.so"), library)
        return load(path)

    monkeypatch.setattr(native.ctypes, "CDLL", swapped)
    assert again() is not None
    assert not ran.exists()


@needs_compiler
@pytest.mark.usefixtures("fresh")
def test_without_a_folder_of_ours_it_is_compiled_for_this_process(places, loaded, monkeypatch, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="adamerge")
    shared, own = places
    shared.chmod(0o777)
    own.chmod(0o777)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    assert native._library() is not None
    assert loaded[0].is_relative_to(tmp_path / "tmp")
    assert list((tmp_path / "tmp").iterdir()) == []
    assert "compiled for this process alone: others can write to" in caplog.text
    assert native.combine(torch.ones(2, 3), torch.ones(2), None).tolist() == [2.0] * 3
    (tmp_path / "tmp").chmod(0o777)
    assert again() is None
    assert "Others can write to" in caplog.text
    assert "set ADAMERGE_CACHE to your own folder" in caplog.text
    assert len(loaded) == 1
    monkeypatch.setenv("ADAMERGE_CACHE", str(tmp_path / "mine"))  # as it says
    assert again() is not None
    assert len(loaded) == 2


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
