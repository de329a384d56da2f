import pytest
import torch

from adamerge.rules import LayerWise
from adamerge.transforms import ElectSign, Trim
from adamerge.types import InputError
from tests.tiny import TASKS, vectors_of


def flat(vectors):
    return torch.cat([vectors.deltas(name).dense().reshape(len(vectors.tasks), -1) for name in vectors.space.shapes], 1)


@pytest.mark.parametrize("keep", [0.01, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float64])
def test_trim_keeps_the_largest_of_the_whole_model(keep, dtype):
    vectors = vectors_of(dtype=dtype)
    before, after = flat(vectors), flat(vectors.transformed([Trim(keep=keep)]))
    number = max(1, round(keep * before.shape[1]))
    for row, trimmed in zip(before, after, strict=True):
        threshold = row.abs().float().sort(descending=True).values[number - 1]
        kept = row.abs().float() >= threshold
        assert torch.equal(trimmed, torch.where(kept, row, 0))
        if dtype != torch.bfloat16:  # coarse numbers tie
            assert int(kept.sum()) == number


def test_elect_sign_keeps_what_agrees_with_the_summed_mass():
    vectors = vectors_of()
    before, after = flat(vectors), flat(vectors.transformed([ElectSign()]))
    elected = before.sum(0).sign()
    assert torch.equal(after, torch.where(before.sign() == elected, before, 0))
    assert 0 < int((after == 0).sum()) < after.numel()


def test_elect_sign_settles_a_tie_by_the_whole_models_majority():
    vectors = vectors_of(tasks=TASKS[:2])
    for name in vectors.space.shapes:
        vectors.deltas(name).stacked.fill_(-1)
    tie = vectors.deltas("stem.bias").stacked
    tie[0], tie[1] = 2, -2
    after = vectors.transformed([ElectSign()]).deltas("stem.bias").dense()
    assert torch.equal(after, torch.stack([torch.zeros(6), torch.full((6,), -2.0)]))


def test_trim_then_elect_sign_is_adamerging_plus_plus():
    """Against a direct transcription over the flattened model: the sign is elected among trimmed vectors."""
    vectors = vectors_of()
    raw = flat(vectors)
    number = round(0.2 * raw.shape[1])
    trimmed = torch.stack([torch.where(row.abs() >= row.abs().topk(number).values[-1], row, 0) for row in raw])
    sign = trimmed.sum(0).sign()
    sign[sign == 0] = sign.sum().sign()
    expected = torch.where(torch.where(sign > 0, trimmed > 0, trimmed < 0), trimmed, 0)
    composed = vectors.transformed([Trim(keep=0.2), ElectSign()])
    assert torch.equal(flat(composed), expected)
    stored = composed.stored()
    rule = LayerWise(stored)
    merged = torch.cat(
        [rule.merge(n, stored.base(n), stored.deltas(n), rule.begin()).reshape(-1) for n in stored.space.shapes]
    )
    base = torch.cat([stored.base(n).reshape(-1) for n in stored.space.shapes])
    torch.testing.assert_close(merged, base + 0.3 * expected.sum(0))


@pytest.mark.parametrize("keep", [0, -1, 1.5])
def test_trim_refuses_a_fraction_outside_its_range(keep):
    with pytest.raises(InputError, match=r"`Trim.keep` is .*\(0, 1\]"):
        Trim(keep=keep)
