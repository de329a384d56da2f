"""Masks over all weights: the draw, what stands outside of training, what they cost."""

import csv
import warnings
import weakref
from collections.abc import Mapping
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torch.distributions import RelaxedBernoulli
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import adamerge
from adamerge.artifact import open_merge
from adamerge.learnables import train_only
from adamerge.loops import Bilevel, Joint, PerTask
from adamerge.module import AdaMerge
from adamerge.objectives import Entropy
from adamerge.rules import Concrete, LayerWise, MergeRule, TaskWise
from adamerge.rules import concrete as concrete_rule
from adamerge.seeding import seed_of
from adamerge.task_modules import Surgery
from adamerge.types import InputError
from tests.test_engine import gradients
from tests.tiny import INPUT, TASKS, WIDTH, batches_of, data_of, merged_of, vectors_of

NAME = "stem.weight"
BY_TASK = {"a": 0.1, "b": 0.3, "c": 0.7}
RULES = {
    "fixed": partial(TaskWise, init=BY_TASK, trainable=False),
    "task-wise": partial(TaskWise, init=BY_TASK),
    "layer-wise": partial(LayerWise, init=BY_TASK),
}


def concrete(logits=None, vectors=None, **options):
    """A rule over the tiny pool's task vectors, with random logits unless they are given."""
    rule = Concrete(vectors or vectors_of(), **options)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in rule.logits.values():
            if logits is None:
                parameter.copy_(2 * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.fill_(logits)
    return rule


def naive(rule, vectors, name, mask):
    coef_T = rule.inner.coefficients()[:, vectors.space.group_of[name] if len(rule.groups) > 1 else 0]
    delta = torch.einsum("t,t...->...", coef_T, vectors.deltas(name).dense())
    return vectors.base(name) + mask / mask.mean() * delta


def merge(rule, vectors, name=NAME):
    return rule.merge(name, vectors.base(name), vectors.deltas(name), rule.begin())


# --- the draw


@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
def test_the_draw_is_torchs_relaxed_bernoulli(temperature):
    rule = concrete(temperature=temperature)
    rule.draw_(3)
    for name in vectors_of().space.shapes:
        torch.manual_seed(seed_of(3, name))  # the same uniform noise
        logits = rule.logits[name.replace(".", "/")]
        expected = RelaxedBernoulli(torch.tensor(temperature), logits=logits).rsample()
        torch.testing.assert_close(rule.mask(name), expected, rtol=1e-4, atol=1e-5)


def test_the_density_of_the_draw_is_that_of_its_logits():
    """At a small temperature P(m > 1/2) = sigmoid(logit), here over 3 * 2000 draws of 30 elements."""
    for logit in (-1.5, 0.0, 1.0):
        rule, kept = concrete(logit, temperature=1e-3), []
        for seed in range(2000):
            rule.draw_(seed)
            kept.append((rule.mask(NAME) > 0.5).float().mean())
        assert float(torch.stack(kept).mean()) == pytest.approx(float(torch.tensor(logit).sigmoid()), abs=0.01)


@pytest.mark.parametrize("logit", [-1e4, -50.0, 0.0, 50.0, 1e4])
@pytest.mark.parametrize("temperature", [1e-3, 0.5])
def test_extreme_logits_and_temperatures_are_finite(logit, temperature):
    vectors = vectors_of()
    rule = concrete(logit, temperature=temperature, density=1.0)
    for seed in (None, *range(20)):
        rule.draw_(seed)
        merged = merge(rule, vectors)
        assert merged.isfinite().all()
        (merged.square().sum() + rule.penalty()["density"]).backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in rule.parameters())


def test_noise_of_zero_is_finite(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *shape, generator, **options: torch.zeros(*shape, **options))
    rule = concrete(0.0)
    rule.draw_(0)
    assert merge(rule, vectors_of()).isfinite().all()


def test_noise_depends_on_seed_and_tensor_alone():
    rule = concrete(0.0)

    def draw(seed, name=NAME):
        torch.manual_seed(seed or 0)
        rule.draw_(seed)
        return rule.mask(name)

    first = draw(5)
    assert torch.equal(draw(5), first)
    assert not torch.equal(draw(6), first)
    assert not torch.equal(draw(5, "blocks.0.1.weight").flatten()[:30], first.flatten())
    state = torch.get_rng_state()
    rule.mask(NAME)
    assert torch.equal(torch.get_rng_state(), state)


def test_both_levels_of_a_bilevel_step_share_one_draw(monkeypatch):
    drawn, original = [], concrete_rule._logistic
    monkeypatch.setattr(concrete_rule, "_logistic", lambda like, seed: drawn.append(seed) or original(like, seed))
    model = merged_of(rule=partial(Concrete, rule=RULES["layer-wise"]))
    train_only(model, "rule.logits")
    fitted(AdaMerge(model, loop=Bilevel(), optimizer=SLOW), steps=2)
    assert len(drawn) == len(set(drawn)) == 2 * len(model.vectors.space.shapes)
    assert not model.rule._kept


def test_a_draw_is_differentiated_twice_rightly_also_where_it_is_shared():
    logits = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    draw = partial(concrete_rule._Relaxed.apply, logits, 0.5, 7)
    naive = torch.sigmoid((logits + concrete_rule._logistic(logits, 7)) / 0.5)
    for mask in (None, naive.detach()):
        torch.testing.assert_close(draw(mask), naive)
        (slope,) = torch.autograd.grad(draw(mask).square().sum(), logits, create_graph=True)
        (expected,) = torch.autograd.grad(naive.square().sum(), logits, create_graph=True, retain_graph=True)
        torch.testing.assert_close(slope, expected)
        both = [torch.autograd.grad(each.pow(3).sum(), logits, retain_graph=True)[0] for each in (slope, expected)]
        torch.testing.assert_close(*both)


def test_a_shared_draw_is_not_taken_for_other_logits():
    rule = concrete(0.0).requires_grad_(False)
    rule._drawn = 5
    first = rule.mask(NAME)
    assert torch.equal(rule.mask(NAME), first)
    rule.logits[NAME.replace(".", "/")].add_(1.0)
    assert (rule.mask(NAME) > first).all()


def test_a_step_draws_anew_each_time_and_the_same_again():
    """Two steps under a trainer see two masks; the noise is a function of seed and step."""
    seen = {}

    class Watching(AdaMerge):
        def respond(self, task, batch):
            seen.setdefault(self.noise, []).append(self.model.rule.mask(NAME).detach().clone())
            return super().respond(task, batch)

    def run(seed):
        seen.clear()
        fitted(Watching(merged_of(rule=partial(Concrete, rule=RULES["fixed"])), seed=seed, optimizer=SLOW), steps=3)
        return {noise: masks[0] for noise, masks in seen.items() if all(torch.equal(m, masks[0]) for m in masks)}

    one, again, other = run(0), run(0), run(1)
    assert len(one) == len(other) == 3
    assert one.keys() == again.keys()
    assert not one.keys() & other.keys()
    assert all(torch.equal(one[noise], again[noise]) for noise in one)
    masks = [*one.values(), *other.values()]
    assert all(not torch.equal(m, n) for i, m in enumerate(masks) for n in masks[:i])


# --- nothing is drawn elsewhere


@pytest.mark.parametrize("evaluation", ["expected", "threshold", "sampled"])
@pytest.mark.parametrize("way", ["leaf", "swap"])
def test_nothing_is_drawn_outside_of_a_step(evaluation, way):
    model = merged_of(rule=partial(concrete, None, evaluation=evaluation), apply_mode=way)
    for step in range(2):
        gradients(model, batches=batches_of(k=step))
        weights = model.weights()
        with model.applied() as net:
            for name, parameter in net.named_parameters():
                assert torch.equal(parameter, weights[name])
        for dense in (model.materialize(), model.folded().net):
            for name, parameter in dense.named_parameters():
                assert torch.equal(parameter, weights[name])
        for name, again in model.weights().items():
            assert torch.equal(again, weights[name])
    batch = batches_of()["a"]
    assert torch.equal(model(batch, task="a"), model.folded()(batch, task="a"))


def test_nothing_is_drawn_while_the_logits_stay():
    model = merged_of(rule=partial(concrete, None, rule=RULES["layer-wise"]))
    train_only(model, r"rule\.inner\.")
    still = model.weights()
    for noise in (1, 2):
        with model.step(noise=noise) as step:
            for name, place in model._skeleton.sites.items():
                assert torch.equal(place[0][0]._parameters[place[0][1]], still[name])
            step.backward(model.respond("a", batches_of()["a"]).logits_BC.sum())
        assert set(step.gradients) == {"rule.inner.raw_TG"}
    train_only(model, r"rule\.logits")
    with model.step(noise=1):
        place = model._skeleton.sites[NAME][0]
        assert not torch.equal(place[0]._parameters[place[1]], still[NAME])


# --- the merge


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("way", ["leaf", "swap"])
@pytest.mark.parametrize("evaluation", ["draw", "expected", "threshold", "sampled"])
def test_the_factored_merge_is_the_naive_one(kind, way, evaluation):
    """theta_0 + sum_t coef_t (m / mean(m) * tau_t), with its gradient by logits and coefficients, in float64."""
    double = torch.float64
    options = {} if evaluation == "draw" else {"evaluation": evaluation}
    make = partial(concrete, None, rule=RULES[kind], **options)
    model = merged_of(rule=make, apply_mode=way, dtype=double)
    vectors, rule = vectors_of(dtype=double), model.rule
    noise = 11 if evaluation == "draw" else None
    batches = batches_of(dtype=double)

    def loss():
        return sum(model.respond(task, batch).logits_BC.square().mean() for task, batch in batches.items())

    rule.draw_(noise)
    by_hand = {name: naive(rule, vectors, name, rule.mask(name)) for name in vectors.space.shapes}
    with model.placed(by_hand):
        expected = dict(zip(model.learnables(), grads(loss() + nothing(model), model), strict=True))
    with model.step(noise=noise) as step:
        for name, place in model._skeleton.sites.items():
            torch.testing.assert_close(place[0][0]._parameters[place[0][1]], by_hand[name], rtol=1e-12, atol=1e-12)
        step.backward(loss() + nothing(model))
    assert step.gradients.keys() == expected.keys()
    assert ("rule.inner.raw_TG" in expected) == (kind != "fixed")
    for name, gradient in step.gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-12)
        assert gradient.any() or (name.startswith("rule.logits") and evaluation in ("threshold", "sampled"))


def nothing(model):
    """Zero, with a graph also where a binary mask cuts the logits off."""
    return sum(0 * parameter.sum() for parameter in model.learnables().values())


def grads(loss, model):
    return torch.autograd.grad(loss, list(model.learnables().values()), materialize_grads=True)


@pytest.mark.parametrize("evaluation", ["draw", "expected", "threshold", "sampled"])
def test_the_mean_of_every_tensors_mask_is_one(evaluation):
    """With all task vectors one and coefficients adding up to 1, merged minus base is the rescaled mask."""
    vectors = vectors_of()
    rule = concrete(rule=partial(TaskWise, init=1 / 3), **{} if evaluation == "draw" else {"evaluation": evaluation})
    rule.draw_(4 if evaluation == "draw" else None)
    for name, shape in vectors.space.shapes.items():
        ones = adamerge.deltas.DenseDeltas(torch.ones(3, *shape))
        if rule.mask(name).any():
            scaled = rule.merge(name, torch.zeros(shape), ones, rule.begin()).detach()
            assert float(scaled.mean()) == pytest.approx(1, rel=1e-5)


def test_an_empty_mask_gives_the_base_and_a_full_one_task_arithmetic():
    vectors, base = vectors_of(), vectors_of().base(NAME)
    for evaluation in ("expected", "threshold", "sampled"):
        empty = merge(concrete(-1e4, evaluation=evaluation), vectors)
        assert torch.equal(empty, base)
        full = merge(concrete(1e4, evaluation=evaluation), vectors)
        torch.testing.assert_close(full, base + 0.3 * vectors.deltas(NAME).dense().sum(0))
    for evaluation in ("expected", "threshold"):  # logits of 0: all or nothing is kept alike
        start = merge(concrete(0.0, evaluation=evaluation), vectors)
        torch.testing.assert_close(start, merge(TaskWise(vectors), vectors))


def test_masks_of_the_evaluation():
    expected, threshold = concrete(evaluation="expected"), concrete(evaluation="threshold")
    logits = expected.logits[NAME.replace(".", "/")]
    torch.testing.assert_close(expected.mask(NAME), logits.sigmoid())
    assert torch.equal(threshold.mask(NAME), (logits >= 0).float())
    vectors = vectors_of()
    one, again, other = (concrete(vectors=vectors, evaluation="sampled", seed=seed).mask(NAME) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert set(one.unique().tolist()) == {0.0, 1.0}
    many = [concrete(vectors=vectors, evaluation="sampled", seed=seed).mask(NAME) for seed in range(1000)]
    torch.testing.assert_close(torch.stack(many).mean(0), logits.sigmoid(), rtol=0, atol=0.08)


# --- penalties


def test_penalties_in_closed_form():
    rule = concrete(rule=partial(LayerWise, init=BY_TASK, penalties={"l1": 2.0, "l2": 3.0, "distance": 5.0}), density=7)
    with torch.no_grad():
        rule.inner.raw_TG += torch.linspace(-1, 1, rule.inner.raw_TG.numel()).view_as(rule.inner.raw_TG)
    coef_TG, start_TG = rule.coefficients(), torch.tensor(list(BY_TASK.values()))[:, None]
    logits = torch.cat([each.flatten() for each in rule.logits.values()])
    expected = {
        "l1": 2 * coef_TG.abs().mean(),
        "l2": 3 * coef_TG.square().mean(),
        "distance": 5 * (coef_TG - start_TG).square().mean(),
        "density": 7 * logits.sigmoid().mean(),
    }
    found = rule.penalty()
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name])
    assert Concrete(vectors_of()).penalty() == {}
    assert LayerWise(vectors_of()).penalty() == {}


@pytest.mark.parametrize("way", ["leaf", "swap"])
def test_penalties_add_to_the_gradient(way):
    inner = partial(LayerWise, init=BY_TASK, penalties={"l2": 3.0})
    plain = gradients(merged_of(rule=partial(concrete, None, rule=RULES["layer-wise"]), apply_mode=way))[1]
    model = merged_of(rule=partial(concrete, None, rule=inner, density=7.0), apply_mode=way)
    more = gradients(model)[1]
    coef_TG = model.rule.coefficients()
    torch.testing.assert_close(
        more["rule.inner.raw_TG"] - plain["rule.inner.raw_TG"], 6 * coef_TG / coef_TG.numel(), rtol=1e-4, atol=1e-6
    )
    total = sum(logits.numel() for logits in model.rule.logits.values())
    for name, logits in model.rule.logits.items():
        kept = logits.sigmoid()
        slope = more[f"rule.logits.{name}"] - plain[f"rule.logits.{name}"]
        torch.testing.assert_close(slope, 7 * kept * (1 - kept) / total, rtol=1e-3, atol=1e-6)


@pytest.mark.slow_unless("l1")
@pytest.mark.parametrize(
    ("penalties", "moved"),
    [({"l1": 1.0}, -1), ({"l2": 1.0}, -1), ({"distance": 1.0}, 0)],
    ids=["l1", "l2", "distance"],
)
def test_penalties_are_logged_and_move_coefficients(config, penalties, moved):
    """Beside an objective of weight zero: towards zero, or from where they start nowhere."""
    rule = {"class_path": "adamerge.rules.LayerWise", "init_args": {"init": 0.4, "penalties": penalties}}
    objectives = [{"class_path": "adamerge.objectives.Entropy", "init_args": {"weight": 0.0}}]
    model = {"rule": rule, "objectives": objectives}
    run = adamerge.train(config(model, trainer={"log_every_n_steps": 1}, run={"name": "penalty"}))
    steps = run.learned.rule.raw_TG.detach() - 0.4
    torch.testing.assert_close(steps, torch.full_like(steps, moved * 4e-3), rtol=1e-2, atol=1e-7)
    rows = [row for row in csv.DictReader((run.dir / "metrics.csv").open()) if row["train/loss"]]
    (name,) = penalties
    logged = [float(row[f"train/penalty/{name}"]) for row in rows]
    assert logged[0] == pytest.approx({"l1": 0.4, "l2": 0.16, "distance": 0.0}[name])
    assert logged == pytest.approx([float(row["train/loss"]) for row in rows])


@pytest.mark.slow
def test_the_density_penalty_is_logged_and_thins_the_mask(config):
    def run(density):
        rule = {"class_path": "adamerge.rules.Concrete", "init_args": {"density": density}}
        optimizer = {"class_path": "torch.optim.SGD", "init_args": {"lr": 10.0}}
        return adamerge.train(config({"rule": rule, "optimizer": optimizer}, trainer={"log_every_n_steps": 1}))

    thick, thin = run(0.0), run(3.0)
    rows = [row for row in csv.DictReader((thin.dir / "metrics.csv").open()) if row["train/loss"]]
    assert float(rows[0]["train/penalty/density"]) == pytest.approx(1.5)
    assert "train/penalty/density" not in next(csv.DictReader((thick.dir / "metrics.csv").open()))

    def kept(run):
        return torch.cat([logits.sigmoid().flatten() for logits in run.learned.rule.logits.values()]).mean()

    assert kept(thin) < kept(thick) - 1e-3


# --- what is saved


@pytest.mark.parametrize("saved_as", ["float32", "bfloat16"])
def test_what_is_loaded_is_what_was_scored(config, saved_as):
    """Also where saving rounds the logits, to half their size; the coefficients stay as they are."""
    inner = {"class_path": "adamerge.rules.LayerWise"}
    rule = {"class_path": "adamerge.rules.Concrete", "init_args": {"rule": inner, "saved_as": saved_as}}
    optimizer = {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.05}}
    run = adamerge.train(config({"rule": rule, "optimizer": optimizer}))
    loaded, held = adamerge.load(run.dir, trust=True), open_merge(run.dir, trust=True)
    for task, batch in batches_of().items():
        assert torch.equal(loaded(batch, task=task), run.merge(batch, task=task))
        assert torch.equal(held(batch, task=task), run.learned(batch, task=task))
    file = load_file(run.dir / "merge" / "merge.safetensors")
    size = sum(tensor.nbytes for name, tensor in file.items() if name.startswith("rule.logits"))
    total = sum(logits.numel() for logits in held.rule.logits.values())
    assert size == total * (2 if saved_as == "bfloat16" else 4)
    for name, logits in held.rule.logits.items():
        assert logits.dtype == torch.float32
        assert torch.equal(logits, run.learned.rule.logits[name])
        rounded = logits.to(torch.bfloat16).float()
        assert torch.equal(rounded, logits) == (saved_as == "bfloat16")
    assert torch.equal(held.rule.inner.raw_TG, run.learned.rule.inner.raw_TG)
    assert not torch.equal(run.learned.rule.inner.raw_TG.bfloat16().float(), run.learned.rule.inner.raw_TG)


# --- what does not fit


class Odd(MergeRule):
    """The base, whatever the task vectors."""

    def merge(self, name, base, deltas, shared):
        return base


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(Concrete, temperature=0.0), r"`rule.temperature` is 0.0; it is a number above 0"),
        (partial(Concrete, temperature=-1.0), r"`rule.temperature` is -1.0; it is a number above 0"),
        (partial(Concrete, rule=Odd), r"`rule.rule` makes a Odd; a mask stands over LayerWise or TaskWise"),
        (partial(Concrete, rule=Concrete), r"`rule.rule` makes a Concrete; a mask stands over LayerWise or TaskWise"),
        (partial(LayerWise, penalties={"l3": 1.0}), r"`rule.penalties` names \['l3'\]; there are l1, l2, distance"),
    ],
)
def test_bad_options(make, message):
    with pytest.raises(InputError, match=message):
        make(vectors_of())


# --- what a step costs


class Wide(nn.Module):
    """[B, 5] -> [B, 6]; two large layers, so that weights outweigh activations."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(512, 512), nn.Linear(512, 512)

    def forward(self, x):
        return self.two(torch.tanh(self.one(F.pad(x, (0, 512 - INPUT)))))[:, :WIDTH]


class Watch(TorchDispatchMode):
    """Counts the bytes of all storages that are alive, and the reads that wait for a device."""

    def __init__(self, alive):
        super().__init__()
        self.now = self.peak = self.waits = 0
        self.sizes = {}
        for tensor in alive:
            self.hold(tensor)

    def hold(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.sizes:
            self.sizes[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.drop, storage._cdata)

    def drop(self, key):
        self.now -= self.sizes.pop(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.waits += func is torch.ops.aten._local_scalar_dense.default
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.hold(tensor)
        return out


SLOW = partial(torch.optim.SGD, lr=1e-3)


def fitted(module, *, steps, batch_size=2, mode=None, batches=None):
    """Train under a real trainer, with batches made beforehand unless they come from the stream."""
    data = data_of(batch_size=batch_size)
    data.labels = True
    data.slot = partial(module.loop.slot, tasks=TASKS, seed=0)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "limit_val_batches": 0}
    trainer = pl.Trainer(
        max_steps=steps, accelerator="cpu", log_every_n_steps=1000, enable_model_summary=False, **options
    )
    loader = [data.stream()[k] for k in range(steps)] if batches is None else batches
    loader = torch.utils.data.DataLoader(loader, batch_size=None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if mode is None:
            trainer.fit(module, loader)
        else:
            iter(loader).__next__()
            with mode:
                trainer.fit(module, loader)
    return module.model


LOOPS = {
    "joint": Joint,
    "per task": PerTask,
    "bilevel": Bilevel,
    "micro-batches": partial(Joint, micro_batch=1),
}


@pytest.mark.parametrize("kind", LOOPS)
@pytest.mark.parametrize("foreach", [False, True])
def test_a_step_never_holds_more_than_twelve_models(kind, foreach):
    """Base and T = 3 vectors: 4 P; logits, two moments, mask, delta, merged, their gradients: within 8 P more.

    Counted over forwards, pull-back, gradients and Adam. The transient 1 P of two tensors is 2 / 150 P in a real model.
    """
    model = merged_of(Wide, rule=partial(Concrete, rule=LayerWise))
    if kind == "bilevel":
        train_only(model, r"rule\.logits")
    names = model.vectors.space.shapes
    size = 4 * sum(shape.numel() for shape in names.values())
    module = AdaMerge(model, loop=LOOPS[kind](), optimizer=partial(torch.optim.Adam, foreach=foreach))
    frozen = [t for n in names for t in (model.vectors.base(n), model.vectors.deltas(n).dense())]
    watch = Watch([*frozen, *model.parameters()])
    assert watch.now == pytest.approx(5 * size, rel=1e-3)
    fitted(module, steps=3, mode=watch)
    assert watch.peak < (len(TASKS) + 1 + 8 + 0.01) * size
    assert watch.now < (len(TASKS) + 1 + 3 + 0.01) * size  # no gradient and no copy outlives the step


def test_gradients_of_all_tasks_cost_one_model_each():
    size = 4 * sum(shape.numel() for shape in vectors_of(Wide).space.shapes.values())
    peaks = []
    for combine in ("sum", "min_norm"):
        model = merged_of(Wide, rule=partial(Concrete, rule=LayerWise))
        watch = Watch([*model.parameters()])
        fitted(AdaMerge(model, loop=Joint(combine=combine), optimizer=SLOW), steps=2, mode=watch)
        peaks.append(watch.peak / size)
    assert peaks[1] < peaks[0] + len(TASKS) + 0.01


def surgery(**options):
    model = merged_of(modules=[partial(Surgery, rank=2, **options)])
    train_only(model, "task")
    return model


STEPS: Mapping[str, object] = {
    "concrete": lambda: AdaMerge(merged_of(rule=partial(Concrete, density=1.0)), optimizer=SLOW),
    "min norm": lambda: AdaMerge(merged_of(rule=Concrete), loop=Joint(combine="min_norm"), optimizer=SLOW),
    "surgery": lambda: AdaMerge(surgery(), optimizer=SLOW),
    "deep surgery": lambda: AdaMerge(surgery(deep=True), optimizer=SLOW, loop=PerTask()),
    "bilevel": lambda: AdaMerge(half(merged_of(rule=Concrete)), loop=Bilevel(inner_optimizer=SLOW), optimizer=SLOW),
}


def half(model):
    train_only(model, r"rule\.logits")
    return model


@pytest.mark.parametrize("kind", STEPS)
def test_a_step_waits_for_no_device(kind):
    """No `.item()` between logging intervals; the loader's own seed is read once before."""
    waits = []
    for steps in (2, 6):
        watch = Watch([])
        fitted(STEPS[kind](), steps=steps, mode=watch)
        waits.append(watch.waits)
    assert waits[0] == waits[1]


def test_the_count_of_waits_would_see_one():
    class Waiting(Entropy):
        def forward(self, out, batch):
            return {name: term for name, term in super().forward(out, batch).items() if term.sum.item() > 0}

    watch = Watch([])
    fitted(AdaMerge(merged_of(), objectives=[Waiting()], optimizer=SLOW), steps=2, mode=watch)
    assert watch.waits >= 2 * len(TASKS)


def test_mask_coefficients_and_adapters_learn_in_one_run(config):
    rule = {"class_path": "adamerge.rules.LayerWise"}
    surgery = {"class_path": "adamerge.task_modules.Surgery", "init_args": {"rank": 2}}
    model = {
        "rule": {"class_path": "adamerge.rules.Concrete", "init_args": {"rule": rule}},
        "task_modules": [surgery],
        "objectives": [
            {"class_path": "adamerge.objectives.Entropy"},
            {"class_path": "adamerge.objectives.FeatureDistillation"},
        ],
    }
    run = adamerge.train(config(model))
    still = open_merge(adamerge.train(config(model, trainer={"max_steps": 0})).dir, trust=True).state_dict()
    learned = open_merge(run.dir, trust=True).state_dict()
    for kind in ("rule.inner.raw_TG", "rule.logits.stem/weight", "task_modules.0.0.up", "task_modules.2.0.up"):
        assert (learned[kind] - still[kind]).abs().max() > 1e-3
    batch = batches_of()["a"]
    torch.testing.assert_close(adamerge.load(run.dir, trust=True)(batch, task="a"), run.merge(batch, task="a"))
