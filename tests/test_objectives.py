import math
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributions import Categorical, kl_divergence

from adamerge.loops.tally import Tally, Weighted, counts_of
from adamerge.objectives import Distillation, Diversity, Entropy, FeatureDistillation, PseudoLabel
from adamerge.ranks import sum_over_ranks
from adamerge.recorded import revive, spec
from adamerge.types import InputError, TaskOutput


def answer(logits=(), features=(), blocks=()):
    leaves = [torch.tensor(values, dtype=torch.float64, requires_grad=True) for values in (features, logits)]
    blocks = [torch.tensor(values, dtype=torch.float64, requires_grad=True) for values in blocks]
    return TaskOutput("a", *leaves, blocks)


def taught(logits=(), features=(), blocks=()):
    logits, features, *blocks = (torch.tensor(values, dtype=torch.float64) for values in (logits, features, *blocks))
    return {"expert.logits": logits, "expert.features": features, "expert.blocks": blocks}


def the_term(objective, out, batch, name):
    terms = objective(out, batch)
    assert list(terms) == [name]
    return float(terms[name].sum.detach()), int(terms[name].count)


def softmax(logits):
    weights = [math.exp(logit) for logit in logits]
    return [weight / sum(weights) for weight in weights]


# --- distillation of logits

MERGED, EXPERT = [[0.0, 1.0, -2.0], [3.0, 0.5, 0.5]], [[2.0, 0.0, -1.0], [-1.0, 0.0, 1.0]]


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
def test_kl_is_that_of_the_expert_to_the_merged_model(temperature):
    expected = 0.0
    for merged, expert in zip(MERGED, EXPERT, strict=True):
        p, q = (softmax([logit / temperature for logit in logits]) for logits in (merged, expert))
        expected += temperature**2 * sum(b * math.log(b / a) for a, b in zip(p, q, strict=True))
    found = the_term(Distillation(temperature=temperature), answer(MERGED), taught(EXPERT), "kl")
    assert found == (pytest.approx(expected, rel=1e-12), 2)
    by_torch = [Categorical(logits=torch.tensor(side).double() / temperature) for side in (EXPERT, MERGED)]
    assert found[0] == pytest.approx(float(kl_divergence(*by_torch).sum()) * temperature**2, rel=1e-12)


def test_the_squared_temperature_keeps_the_size_of_gradients():
    gradients = {}
    for temperature in (1e3, 1e4):
        out = answer([[0.3, -0.2, 0.1]])
        Distillation(temperature=temperature)(out, taught([[0.5, 0.2, -1.0]]))["kl"].sum.backward()
        gradients[temperature] = out.logits_BC.grad
    gap = torch.tensor([[-0.2, -0.4, 1.1]]).double()  # of logits; in the limit the gradient is their centred gap over C
    torch.testing.assert_close(gradients[1e4], (gap - gap.mean()) / 3, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(gradients[1e3], gradients[1e4], rtol=1e-2, atol=1e-4)


def test_mse_is_the_mean_over_classes():
    expected = (4 + 1 + 1) / 3 + (16 + 0.25 + 0.25) / 3
    assert the_term(Distillation(loss="mse"), answer(MERGED), taught(EXPERT), "mse") == (pytest.approx(expected), 2)


@pytest.mark.parametrize("loss", ["kl", "mse"])
def test_a_class_that_both_sides_mask_adds_nothing(loss):
    out = answer([[0.0, 1.0, -math.inf, -2.0]])
    term = Distillation(loss=loss)(out, taught([[2.0, 0.0, -math.inf, -1.0]]))[loss]
    term.sum.backward()
    assert out.logits_BC.grad[0, 2] == 0
    assert out.logits_BC.grad.isfinite().all()
    assert out.logits_BC.grad[0, :2].all()
    bare = Distillation(loss=loss)(answer(MERGED[:1]), taught(EXPERT[:1]))[loss]
    torch.testing.assert_close(term.sum, bare.sum * (0.75 if loss == "mse" else 1))  # a mean over four classes


def test_a_class_that_only_the_expert_masks_is_pushed_down():
    out = answer([[0.0, 0.0]])
    term = Distillation()(out, taught([[0.0, -math.inf]]))["kl"]
    term.sum.backward()
    assert float(term.sum.detach()) == pytest.approx(math.log(2))
    assert out.logits_BC.grad.tolist() == [[-0.5, 0.5]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, r"`Distillation.temperature` is 0.0; it is a positive"),
        ({"temperature": -1.0}, r"`Distillation.temperature` is -1.0"),
        ({"temperature": math.nan}, r"`Distillation.temperature` is nan"),
        ({"temperature": math.inf}, r"`Distillation.temperature` is inf"),
        ({"temperature": 2.0, "loss": "mse"}, r"`Distillation.temperature` is 2.0, but only `Distillation.loss: kl`"),
    ],
)
def test_a_bad_temperature(options, message):
    with pytest.raises(InputError, match=message):
        Distillation(**options)


def test_the_advice_about_the_temperature_helps():
    assert Distillation(loss="mse").temperature == 1


# --- distillation of features

STUDENT, TEACHER = [[3.0, 4.0], [1.0, 0.0]], [[4.0, 3.0], [0.0, -2.0]]
OF_FEATURES = {  # over both samples, by hand
    ("l1", False): (1 + 1) / 2 + (1 + 2) / 2,
    ("l2", False): (1 + 1) / 2 + (1 + 4) / 2,
    ("cosine", False): (1 - 24 / 25) + 1,
    ("l1", True): (0.2 + 0.2) / 2 + (1 + 1) / 2,
    ("l2", True): (0.04 + 0.04) / 2 + (1 + 1) / 2,
    ("cosine", True): (1 - 24 / 25) + 1,
}


@pytest.mark.parametrize(("loss", "normalize"), OF_FEATURES)
def test_distance_of_features_and_blocks(loss, normalize):
    expected = OF_FEATURES[loss, normalize]
    of_features = FeatureDistillation(loss=loss, normalize=normalize)
    found = the_term(of_features, answer(features=STUDENT), taught(features=TEACHER), "features")
    assert found == (pytest.approx(expected), 2)

    of_blocks = FeatureDistillation(loss=loss, normalize=normalize, on="blocks")
    wide = [[[*row, *row] for row in side] for side in (STUDENT, TEACHER)]  # another width, each entry twice
    half = 0.5 if normalize and loss == "l2" else 0.5**0.5 if normalize and loss == "l1" else 1
    batch = taught(blocks=[TEACHER, wide[1], TEACHER])
    found = the_term(of_blocks, answer(blocks=[STUDENT, wide[0], STUDENT]), batch, "blocks")
    assert found == (pytest.approx((2 + half) * expected), 2)


def test_what_is_needed_depends_on_the_options():
    assert FeatureDistillation().needs == {"expert.features"}
    assert FeatureDistillation(on="blocks").needs == {"expert.blocks"}
    assert not PseudoLabel().filters
    assert PseudoLabel(confident=True).filters
    again = revive(spec(FeatureDistillation(on="blocks")), trust=False)
    assert again.needs == {"expert.blocks"}


def test_blocks_must_be_as_many_as_the_experts():
    with pytest.raises(ValueError, match="zip"):
        FeatureDistillation(on="blocks")(answer(blocks=[STUDENT]), taught(blocks=[TEACHER, TEACHER]))


# --- pseudo-labels

HAND = {  # log-probabilities of the merged model and the expert, then whether the sample is kept
    "same class, the expert unsure": ([0.1, 0.9], [0.4, 0.6], True),
    "same class, the expert sure": ([0.4, 0.6], [0.1, 0.9], True),
    "other class, the expert surer": ([0.3, 0.7], [0.8, 0.2], True),
    "other class, as sure": ([0.25, 0.75], [0.75, 0.25], True),
    "other class, the expert less sure": ([0.2, 0.8], [0.7, 0.3], False),
}


def test_pseudo_label_is_the_cross_entropy_with_the_experts_class():
    expected = -sum(math.log(softmax(m)[e.index(max(e))]) for m, e in zip(MERGED, EXPERT, strict=True))
    found = the_term(PseudoLabel(), answer(MERGED), taught(EXPERT), "pseudo_label")
    assert found == (pytest.approx(expected, rel=1e-12), 2)


@pytest.mark.parametrize(("merged", "expert", "kept"), HAND.values(), ids=HAND)
def test_confident_pseudo_labels(merged, expert, kept):
    loss = -math.log(merged[expert.index(max(expert))])
    logs = [[[math.log(p) for p in side]] for side in (merged, expert)]
    for confident in (False, True):
        found = the_term(PseudoLabel(confident=confident), answer(logs[0]), taught(logs[1]), "pseudo_label")
        assert found == ((pytest.approx(loss), 1) if kept or not confident else (0, 0))


def test_confident_pseudo_labels_of_a_batch_add_up():
    merged, expert, kept = zip(*HAND.values(), strict=True)
    logs = [[[math.log(p) for p in row] for row in side] for side in (merged, expert)]
    losses = [-math.log(m[e.index(max(e))]) for m, e, k in HAND.values() if k]
    found = the_term(PseudoLabel(confident=True), answer(logs[0]), taught(logs[1]), "pseudo_label")
    assert found == (pytest.approx(sum(losses)), sum(kept))


def test_a_batch_of_which_nothing_is_kept_changes_nothing():
    merged, expert, _ = HAND["other class, the expert less sure"]
    out = answer([[math.log(p) for p in merged]] * 3)
    terms = PseudoLabel(confident=True)(out, taught([[math.log(p) for p in expert]] * 3))
    assert float(terms["pseudo_label"].sum.detach()) == int(terms["pseudo_label"].count) == 0
    weighted = {name: Weighted(1.0, term) for name, term in terms.items()}
    loss = Tally().loss("a", weighted, counts_of(weighted))
    loss.backward()
    assert float(loss.detach()) == 0
    assert out.logits_BC.grad.tolist() == [[0.0, 0.0]] * 3


@pytest.mark.parametrize("make", [Distillation, partial(Distillation, loss="mse"), PseudoLabel, FeatureDistillation])
def test_the_expert_gets_no_gradient(make):
    batch = {key: value.requires_grad_() for key, value in taught(EXPERT, TEACHER).items() if "blocks" not in key}
    out = answer(MERGED, STUDENT)
    next(iter(make()(out, batch).values())).sum.backward()
    assert all(value.grad is None for value in batch.values())


# --- diversity


def test_diversity_is_minus_the_entropy_of_the_mean_prediction():
    rows = [softmax(row) for row in MERGED]
    mean = [sum(column) / 2 for column in zip(*rows, strict=True)]
    expected = 2 * sum(p * math.log(p) for p in mean)
    assert the_term(Diversity(), answer(MERGED), {}, "diversity") == (pytest.approx(expected, rel=1e-12), 2)
    assert float(-2 * Categorical(torch.tensor(mean)).entropy()) == pytest.approx(expected, rel=1e-6)


def test_diversity_is_lowest_where_all_classes_are_predicted_alike():
    sure = torch.eye(3) * 50
    assert the_term(Diversity(), answer(sure.tolist()), {}, "diversity")[0] == pytest.approx(-3 * math.log(3))
    assert the_term(Diversity(), answer([[50.0, 0.0, 0.0]] * 3), {}, "diversity")[0] == pytest.approx(0)


def mean_gradient_and_value(rank, world, folder):
    """Averaged by DDP, as in a run; the value as the terms give it, and as the tally does in fp32."""
    torch.manual_seed(0)
    x, net = 2 * torch.randn(8, 5, dtype=torch.float64), nn.Linear(5, 4, dtype=torch.float64)
    x = x * torch.arange(1, 9, dtype=torch.float64)[:, None]  # so that the ranks' parts differ
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    model = nn.parallel.DistributedDataParallel(net) if world > 1 else net
    logits = model(x.chunk(world)[rank])
    weighted = {name: Weighted(1.0, term) for name, term in Diversity()(TaskOutput("a", x, logits), {}).items()}
    counts, tally = sum_over_ranks(counts_of(weighted)), Tally()
    tally.loss("a", weighted, counts).backward()
    value = sum_over_ranks(weighted["diversity"].term.sum.detach().clone()) / counts[0]
    found = {"weight": net.weight.grad, "bias": net.bias.grad, "value": value, **tally.values()["a"]}
    torch.save(found, folder / f"{world}-{rank}.pt")
    if world > 1:
        dist.destroy_process_group()


@pytest.mark.slow
def test_diversity_of_two_ranks_is_that_of_one_with_all_samples(tmp_path):
    mean_gradient_and_value(0, 1, tmp_path)
    mp.spawn(mean_gradient_and_value, (2, tmp_path), nprocs=2)
    alone, *pair = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1"))
    assert alone["weight"].abs().max() > 1e-2
    for each in pair:
        for name in ("weight", "bias", "value"):
            torch.testing.assert_close(each[name], alone[name], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(float(each["diversity"]), float(alone["value"]), rtol=1e-6, atol=0)


# --- logits that leave no room

EXTREME = [[1e4, -1e4, 0.0], [-1e4, -1e4, 1e4], [1e4, 1e4, -1e4], [0.0, 0.0, -1e4]]
ALL = {
    "kl": Distillation,
    "kl at 2": partial(Distillation, temperature=2.0),
    "mse": partial(Distillation, loss="mse"),
    "l2": partial(FeatureDistillation, loss="l2"),
    "cosine": partial(FeatureDistillation, loss="cosine"),
    "blocks": partial(FeatureDistillation, on="blocks", normalize=True),
    "pseudo-label": PseudoLabel,
    "confident": partial(PseudoLabel, confident=True),
    "diversity": Diversity,
    "entropy": Entropy,
}


@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
@pytest.mark.parametrize("expert", [EXTREME, EXTREME[::-1]], ids=["alike", "unlike"])
def test_extreme_answers_are_finite(make, expert):
    out = TaskOutput("a", *(torch.tensor(EXTREME, requires_grad=True) for _ in range(2)))
    out.blocks = [out.features_BD, torch.zeros(4, 2, requires_grad=True)]
    batch = taught(expert, expert, [expert, [[0.0, 0.0]] * 4])
    for term in make()(out, batch).values():
        term.sum.backward()
        assert term.sum.isfinite()
    for leaf in (out.features_BD, out.logits_BC, *out.blocks):
        assert leaf.grad is None or leaf.grad.isfinite().all()


def test_diversity_of_a_masked_class_is_finite():
    out = answer([[0.0, 1.0, -math.inf], [2.0, 0.0, -math.inf]])
    term = Diversity()(out, {})["diversity"]
    term.sum.backward()
    bare = Diversity()(answer([[0.0, 1.0], [2.0, 0.0]]), {})["diversity"]
    torch.testing.assert_close(term.sum, bare.sum)
    assert out.logits_BC.grad.isfinite().all()


@pytest.mark.parametrize(
    "objective", [Entropy(), Diversity(), PseudoLabel(), Distillation()], ids=lambda o: str(type(o))
)
def test_one_output_has_no_probabilities(objective):
    with pytest.raises(InputError, match=r"Task 'a' has one output, a regression.*`loss: mse`"):
        objective(answer([[0.3], [2.0]]), taught([[0.1], [1.0]]))
    assert the_term(Distillation(loss="mse"), answer([[0.3]]), taught([[0.1]]), "mse") == (pytest.approx(0.04), 1)
