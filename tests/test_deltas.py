import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from adamerge import deltas, native
from adamerge.deltas import DenseDeltas
from tests.tiny import states, vectors_of

SHAPES = [(7,), (5, 3), (2, 3, 4), (), (0, 3)]


def coefficient_shapes(shape):
    ones = [1] * len(shape)
    yield (3,)
    yield (3, *ones)
    if shape:
        yield (3, *ones[:-1], shape[-1])  # per column
        yield (3, shape[0], *ones[1:])  # per row
        yield (3, *shape)
        yield (1, *shape)  # shared by the tasks


CASES = [(shape, coef) for shape in SHAPES for coef in coefficient_shapes(shape)]


@pytest.mark.parametrize(("shape", "coef_shape"), CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("products", ["in C", "torch's"])
def test_products_equal_the_float64_reference(shape, coef_shape, dtype, products, monkeypatch):
    monkeypatch.setattr(deltas, "CHUNK", 4)  # several chunks, the last one short
    if products == "torch's":
        monkeypatch.setattr(native, "_library", lambda: None)
    stacked, base, grad = torch.randn(3, *shape).to(dtype), torch.randn(shape), torch.randn(shape)
    coef = torch.randn(coef_shape)
    full = coef.double().view(*coef_shape, *[1] * (len(shape) + 1 - len(coef_shape)))
    found = DenseDeltas(stacked).combine(coef, base)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(
        found.double(),
        base.double() + (full * stacked.double()).sum(0)
        if full.shape[0] == 3
        else base.double() + full[0] * stacked.double().sum(0),
        rtol=1e-5,
        atol=1e-5,
    )
    products = stacked.double() * grad.double()
    expected = products.sum_to_size(full.shape).view(coef_shape)
    inner = DenseDeltas(stacked).inner(grad, torch.Size(coef_shape))
    assert inner.shape == coef_shape
    torch.testing.assert_close(inner.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("shape", "coef_shape"), CASES)
def test_products_are_each_others_gradient_to_second_order(shape, coef_shape):
    vectors = DenseDeltas(torch.randn(3, *shape, dtype=torch.float64))
    coef = torch.randn(coef_shape, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert gradcheck(vectors.combine, (coef,))
    assert gradcheck(lambda g: vectors.inner(g, torch.Size(coef_shape)), (grad,))
    assert gradgradcheck(lambda c: vectors.combine(c).square(), (coef,))


def test_coefficients_of_another_rank_are_refused():
    with pytest.raises(ValueError, match=r"\[3, 2\] do not fit 3 tasks of \[4, 2\]"):
        DenseDeltas(torch.zeros(3, 4, 2)).combine(torch.zeros(3, 2))


def test_products_are_not_touched_by_autocast():
    vectors, coef = DenseDeltas(torch.randn(3, 50)), torch.randn(3, requires_grad=True)
    plain = vectors.combine(coef)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = vectors.combine(coef)
    assert torch.equal(plain, mixed)


def test_narrow_vectors_keep_their_storage():
    vectors = vectors_of(dtype=torch.bfloat16)
    assert all(vectors.deltas(name).dtype == torch.bfloat16 for name in vectors.space.shapes)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_memory_mapped_vectors_are_equal_and_reused(dtype, tmp_path, monkeypatch):
    from adamerge.space import ParamSpace
    from adamerge.task_vectors import TaskVectors
    from tests.tiny import Net, write_pool

    monkeypatch.setenv("ADAMERGE_CACHE", str(tmp_path / "cache"))
    paths = write_pool(tmp_path)
    base = paths.pop("base")
    space = ParamSpace.of(Net(), skip=r"^head\.")
    plain = TaskVectors.load(space, base, paths, dtype=dtype)
    mapped = TaskVectors.load(space, base, paths, dtype=dtype, placement="mmap")
    folders = list((tmp_path / "cache" / "vectors").glob("*/"))
    again = TaskVectors.load(space, base, paths, dtype=dtype, placement="mmap")
    assert [folder for folder in folders if folder.is_dir()] == [
        p for p in (tmp_path / "cache" / "vectors").glob("*/") if p.is_dir()
    ]
    coef = torch.randn(3)
    for name in space.shapes:
        assert torch.equal(plain.base(name), again.base(name))
        assert torch.equal(plain.deltas(name).dense(), mapped.deltas(name).dense())
        assert torch.equal(plain.deltas(name).combine(coef), again.deltas(name).combine(coef))


def test_vectors_are_invisible_to_modules():
    vectors = vectors_of()
    assert not list(vectors.parameters())
    assert not list(vectors.buffers())
    assert not vectors.state_dict()
    before = vectors.deltas("stem.weight").dense().clone()
    vectors.half()
    vectors.to(torch.bfloat16)
    assert torch.equal(vectors.deltas("stem.weight").dense(), before)


def test_one_hot_coefficients_give_the_expert_back():
    pool, vectors = states(heads=False), vectors_of()
    for index, task in enumerate(vectors.tasks):
        one_hot = torch.eye(3)[index]
        for name in vectors.space.shapes:
            found = vectors.deltas(name).combine(one_hot, vectors.base(name))
            torch.testing.assert_close(
                found, pool[task][name], rtol=0, atol=2e-7
            )  # two fp32 roundings of numbers below 2
