"""How a step goes through the tasks: in turn, in two levels, along no task's ascent; and the same over ranks."""

import csv
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
import torch.multiprocessing as mp

import adamerge
from adamerge.learnables import train_only
from adamerge.loops import Bilevel, Joint, PerTask
from adamerge.loops.min_norm import gram, min_norm_weights
from adamerge.module import AdaMerge
from adamerge.objectives import Diversity, Entropy
from adamerge.rules import Concrete, LayerWise, TaskWise
from adamerge.task_modules import Surgery
from adamerge.types import InputError
from tests.ranks import joined, trained
from tests.test_concrete import fitted
from tests.test_engine import gradients
from tests.test_training import SHIFT, assert_equal, learned
from tests.tiny import TASKS, Kept, Shift, batches_of, data_of, merged_of

SGD = partial(torch.optim.SGD, lr=0.1)
MASK = {
    "class_path": "adamerge.rules.Concrete",
    "init_args": {"rule": {"class_path": "adamerge.rules.LayerWise"}},
}


def loop(name, **options):
    return {"class_path": f"adamerge.loops.{name}", "init_args": options}


class Seen(AdaMerge):
    """Keeps what every step was about and what it left."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.given = {task: each["input"].clone() for task, each in batch.items()}
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, *args):
        super().on_train_batch_end(*args)
        state = self.trainer.optimizers[0].state
        moments = {
            name: {key: torch.as_tensor(value).clone() for key, value in state[parameter].items()}
            for name, parameter in self.model.learnables().items()
            if parameter in state
        }
        values = {name: parameter.detach().clone() for name, parameter in self.model.learnables().items()}
        self.seen.append((self.given, values, moments))


# --- one task after the other


def test_the_loss_is_the_served_tasks_and_the_others_keep_their_last(config):
    """Each task's last value stays in the log, so that logging every T-th step shows more than one task."""
    run = adamerge.train(config({"loop": loop("PerTask")}, trainer={"max_steps": 6, "log_every_n_steps": 1}))
    rows = [row for row in csv.DictReader((run.dir / "metrics.csv").open()) if row["train/loss"]]
    last = dict.fromkeys(TASKS, "")
    for step, row in enumerate(rows):
        found, served = {task: row[f"train/{task}/entropy"] for task in TASKS}, TASKS[step % 3]
        assert found[served] == row["train/loss"] != last[served]
        last[served] = found[served]
        assert found == last
    assert len(rows) == 6


def test_a_step_moves_the_rule_and_the_served_tasks_module_alone():
    """From the second round on the others have momentum, which must not move them either."""
    module = Seen(merged_of(modules=[Shift]), loop=PerTask())
    start = {name: parameter.detach().clone() for name, parameter in module.model.learnables().items()}
    fitted(module, steps=9)
    before, moments_before = start, {}
    for step, (given, values, moments) in enumerate(module.seen):
        served = f"task_modules.{step % 3}.0.shift"
        assert set(given) == {TASKS[step % 3]}
        for name, value in values.items():
            moves = name in ("rule.raw_TG", served)
            assert torch.equal(value, before[name]) != moves
            if name in moments_before:
                same = all(torch.equal(tensor, moments_before[name][key]) for key, tensor in moments[name].items())
                assert same != moves
        before, moments_before = values, moments
    assert all(float(moments_before[f"task_modules.{task}.0.shift"]["step"]) == 3 for task in range(3))


@pytest.mark.parametrize("accumulate", [2, 3])
def test_accumulation_moves_all_that_were_served(config, accumulate):
    trainer = {"accumulate_grad_batches": accumulate, "max_steps": 1}
    run = adamerge.train(config({"loop": loop("PerTask"), "task_modules": SHIFT}, trainer=trainer))
    for number, (name, value) in enumerate((n, v) for n, v in learned(run).items() if "shift" in n):
        assert bool(value.any()) == (number < accumulate), name


def test_rounds_take_each_task_once():
    fixed, shuffled = PerTask(), PerTask(task_order="shuffled")
    assert [fixed.slot(k, TASKS, 0) for k in range(7)] == [(k // 3, (TASKS[k % 3],)) for k in range(7)]

    def rounds(seed):
        slots = [shuffled.slot(k, TASKS, seed) for k in range(90)]
        assert [number for number, _ in slots] == [k // 3 for k in range(90)]
        return [tuple(task for _, (task,) in slots[start : start + 3]) for start in range(0, 90, 3)]

    assert all(sorted(order) == list(TASKS) for order in rounds(0))
    assert len(set(rounds(0))) == 6
    assert rounds(0) == rounds(0)
    assert rounds(0) != rounds(1)


def test_steps_on_one_batch():
    module = Seen(merged_of(), loop=PerTask(steps_per_batch=2))
    fitted(module, steps=9)
    given = [given for given, _, _ in module.seen]
    stream = data_of(batch_size=2).stream()
    for step, batch in enumerate(given):
        number, place = divmod(step // 2, 3)
        assert torch.equal(batch[TASKS[place]], stream[number][TASKS[place]]["input"])
        assert set(batch) == {TASKS[place]}
    values = [values["rule.raw_TG"] for _, values, _ in module.seen]
    assert not torch.equal(values[0], values[1])


@pytest.mark.parametrize("steps", [3, 4])
def test_one_task_in_turn_is_the_joint_step(config, pool, steps):
    def run(loop):
        model = merged_of(tasks=("a",), modules=[Shift])
        data = [data_of(("a",)).stream()[k] for k in range(steps)]
        return fitted(AdaMerge(model, loop=loop), steps=steps, batches=data).state_dict()

    assert_equal(run(PerTask()), run(Joint()))
    assert_equal(run(PerTask(micro_batch=3)), run(Joint(micro_batch=3)))


@pytest.mark.slow_unless("2-shuffled")
@pytest.mark.parametrize("options", [{}, {"task_order": "shuffled", "steps_per_batch": 2}], ids=["fixed", "shuffled"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_tasks_in_turn_resume_as_the_straight_run(config, options, accumulate):
    model, run = {"loop": loop("PerTask", **options), "task_modules": SHIFT}, {"checkpoint_every": 1}
    trainer = {"accumulate_grad_batches": accumulate}
    straight = adamerge.train(config(model, trainer={**trainer, "max_steps": 9}, run=run))
    part = adamerge.train(config(model, trainer={**trainer, "max_steps": 4}, run=run))
    rest = adamerge.train(config(model, trainer={**trainer, "max_steps": 9}, run=run), ckpt_path=str(part.dir))
    assert not torch.equal(learned(part)["rule.raw_TG"], learned(straight)["rule.raw_TG"])
    assert_equal(learned(straight), learned(rest))
    assert straight.scores == rest.scores


# --- the shortest vector in the hull of the tasks' gradients


def shortest(g_TN):
    weight_T = min_norm_weights(gram([[g] for g in g_TN]))
    assert weight_T.min() >= 0
    torch.testing.assert_close(weight_T.sum(), torch.ones((), dtype=g_TN.dtype))
    return weight_T @ g_TN


def draw(count, size=20, seed=0):
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def two(g, h):
    """The closed form for two: a projection, cut off at the ends."""
    weight = ((h - g) @ h / (g - h).square().sum()).clamp(0, 1)
    return weight * g + (1 - weight) * h


@pytest.mark.parametrize("seed", range(5))
def test_two_gradients_in_closed_form(seed):
    g, h = draw(2, seed=seed)
    torch.testing.assert_close(shortest(torch.stack([g, h])), two(g, h))
    torch.testing.assert_close(shortest(torch.stack([g, 3 * g + 0.1 * h])), g)  # the near end
    torch.testing.assert_close(shortest(torch.stack([g, -2 * g])), torch.zeros_like(g), rtol=0, atol=1e-12)


@pytest.mark.parametrize("count", [2, 3, 8, 20])
@pytest.mark.parametrize("seed", range(5))
def test_the_shortest_vector_descends_for_every_task(count, seed):
    g_TN = draw(count, seed=seed) + 0.3
    g_N = shortest(g_TN)
    scale = g_TN.square().sum(1).max()
    assert (g_TN @ g_N).min() >= g_N @ g_N - 1e-4 * scale
    assert g_N.norm() <= g_TN.norm(dim=1).min() + 1e-9


def test_no_convex_combination_is_shorter():
    g_TN = draw(4) + 0.3
    others_KT = torch.distributions.Dirichlet(torch.full((4,), 0.5, dtype=torch.float64)).sample((20000,))
    assert shortest(g_TN).norm() <= (others_KT @ g_TN).norm(dim=1).min() * (1 + 1e-6)


def test_alike_and_absent_gradients():
    g = draw(1)[0]
    torch.testing.assert_close(shortest(g.expand(5, -1)), g)
    assert not shortest(torch.zeros(3, 4, dtype=torch.float64)).any()
    assert not shortest(torch.stack([g, torch.zeros_like(g)])).any()
    tiny = shortest(1e-12 * draw(3).float())
    assert tiny.isfinite().all()


@pytest.mark.parametrize("rule", [LayerWise, partial(Concrete, rule=LayerWise)], ids=["layer-wise", "concrete"])
def test_the_rules_gradient_is_the_shortest_and_the_modules_are_added(rule):
    batches = batches_of(("a", "b"), dtype=torch.float64)

    def found(tasks, combine):
        model = merged_of(tasks=("a", "b"), rule=rule, modules=[Shift], dtype=torch.float64)
        used = {task: batches[task] for task in tasks}
        return gradients(model, loop=Joint(combine=combine), batches=used)[1]

    def flat(gradient):
        return torch.cat([value.flatten() for name, value in gradient.items() if name.startswith("rule.")])

    combined, total = found("ab", "min_norm"), found("ab", "sum")
    expected = two(flat(found("a", "sum")), flat(found("b", "sum")))
    torch.testing.assert_close(flat(combined), expected, rtol=1e-9, atol=1e-12)
    assert (expected - flat(total)).norm() > 0.1 * expected.norm()
    for name in (name for name in total if "shift" in name):
        assert total[name].any()
        torch.testing.assert_close(combined[name], total[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rule", [LayerWise, partial(TaskWise, penalties={"l2": 1.0})], ids=["plain", "penalised"])
def test_one_task_needs_no_combining_and_penalties_are_added(rule):
    batches = batches_of(("a",), dtype=torch.float64)

    def found(combine):
        model = merged_of(tasks=("a",), rule=rule, modules=[Shift], dtype=torch.float64)
        return gradients(model, loop=Joint(combine=combine), batches=batches)[1]

    one, other = found("min_norm"), found("sum")
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    ("model", "order", "message"),
    [
        ({"apply_mode": "swap"}, "auto", "`loop.combine: min_norm` needs each task's own gradient: use"),
        ({"apply_mode": "swap"}, "per_task", "`loop.combine: min_norm` needs each task's own gradient: use"),
        ({}, "concatenated", "`loop.combine: min_norm` needs each task's own gradient: use"),
        (
            {"rule": partial(LayerWise, trainable=False), "modules": [Shift]},
            "auto",
            "`loop.combine: min_norm` combines gradients of the rule, but no learnable of the rule is trained",
        ),
    ],
    ids=["swap", "swap by task", "concatenated", "fixed"],
)
def test_where_there_is_nothing_to_combine(model, order, message):
    with pytest.raises(InputError, match=message):
        AdaMerge(merged_of(**model), loop=Joint(order=order, combine="min_norm"))


def test_the_advice_about_combining_helps():
    module = AdaMerge(merged_of(apply_mode="leaf"), loop=Joint(order="per_task", combine="min_norm"))
    assert list(module.loop.problems(module)) == []


# --- two levels


def two_levels(*, train=r"rule\.logits", **options):
    model = merged_of(rule=partial(Concrete, rule=LayerWise), **options)
    train_only(model, train)
    return model


@pytest.mark.parametrize("second_order", [False, True])
def test_the_inner_learnables_stay(second_order):
    optimizer = SGD if second_order else None
    bilevel = Bilevel(inner_optimizer=optimizer, second_order=second_order)
    module = Seen(two_levels(), loop=bilevel)
    model = fitted(module, steps=3, batch_size=4)
    assert bool((model.rule.inner.raw_TG == 0.3).all())
    assert model.rule.inner.raw_TG.grad is None
    assert all(logits.any() for logits in model.rule.logits.values())
    assert all(set(values) == {n for n in values if n.startswith("rule.logits")} for _, values, _ in module.seen)
    assert not model.rule.inner.raw_TG.requires_grad


@pytest.mark.parametrize("size", [4, 5])
@pytest.mark.parametrize("way", ["leaf", "swap"])
def test_the_halves_and_their_masks(size, way):
    """The inner step is taken on the first half at the coefficients as they stand, the outer one on the others."""
    calls = []

    class Watching(AdaMerge):
        def respond(self, task, batch):
            self.keep(task, batch["input"])
            return super().respond(task, batch)

        def respond_to_all(self, batches):
            for task, batch in batches.items():
                self.keep(task, batch["input"])
            return super().respond_to_all(batches)

        def keep(self, task, inputs):
            calls.append((task, inputs, self.model.rule.mask("stem.weight").detach(), self.inner().detach().clone()))

        def inner(self):
            return self.model.rule.inner.raw_TG

        def penalize(self, step):
            self.stood = self.inner().detach().clone()
            return super().penalize(step)

    module = Watching(two_levels(apply_mode=way), loop=Bilevel(inner_optimizer=SGD))
    batches = [data_of(batch_size=size).stream()[0]]
    fitted(module, steps=1, batches=batches)
    assert [task for task, *_ in calls] == [*TASKS, *TASKS]
    half = size // 2
    for number, (task, inputs, mask, inner) in enumerate(calls):
        whole = batches[0][task]["input"]
        assert torch.equal(inputs, whole[:half] if number < 3 else whole[half:])
        assert torch.equal(mask, calls[0][2])
        assert bool((inner == 0.3).all()) == (number < 3)
        assert torch.equal(inner, module.stood) == (number >= 3)


def test_the_inner_step_is_the_optimisers_own():
    """With SGD: the outer gradient is the plain one at coefficients that took a plain step on the first half."""
    batches = batches_of(dtype=torch.float64)
    first, second = ({t: {k: v[part] for k, v in b.items()} for t, b in batches.items()} for part in HALVES)

    def start(train):
        return two_levels(train=train, dtype=torch.float64)

    class Quiet(AdaMerge):
        def log(self, *args, **options):
            pass

        def report(self, values, penalties):
            return torch.zeros(())

    def found(model, loop, batches):
        module = Quiet(model, loop=loop)
        module.loop.step(module, batches).backward()
        return {name: p.grad for name, p in model.learnables().items()}

    bilevel = found(start(r"rule\.logits"), Bilevel(inner_optimizer=SGD), batches)
    both = start(None)
    slope = found(both, Joint(), first)["rule.inner.raw_TG"]
    after = start(r"rule\.logits")
    after.rule.inner.raw_TG.data -= 0.1 * slope
    expected = found(after, Joint(), second)
    assert slope.abs().max() > 1e-3
    for name, gradient in expected.items():
        torch.testing.assert_close(bilevel[name], gradient, rtol=1e-9, atol=1e-12)


HALVES = (slice(None, 2), slice(2, None))


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_batch_must_have_two_halves(config, batch_size):
    phases = [{"train": r"rule\.logits", "loop": loop("Bilevel")}]
    plain = config({"rule": MASK, "phases": phases}, {"batch_size": batch_size})
    if batch_size == 2:
        adamerge.train(plain)
    else:
        with pytest.raises(InputError, match=r"`data.batch_size` is 1; Bilevel needs at least 2"):
            adamerge.train(plain)


@pytest.mark.parametrize(
    ("train", "options", "message"),
    [
        (None, {}, r"`loop.inner` matches rule.inner.raw_TG, which the optimiser trains as well; leave"),
        (r"rule\.logits", {"inner": "rule.none"}, r"`loop.inner` is 'rule.none', which matches no learnable; there"),
        (r"rule\.logits", {"second_order": True}, r"differentiates the inner step, which is Adam; set"),
        (
            r"rule\.logits",
            {"second_order": True, "inner_optimizer": SGD, "order": "concatenated"},
            "`loop.second_order` goes task by task: set `loop.order` to per_task",
        ),
        (r"task\.", {}, r"`loop.inner` matches rule.inner.raw_TG, but no other learnable of the rule is trained"),
    ],
    ids=["both", "unknown", "second order", "concatenated", "fixed"],
)
def test_what_does_not_fit_two_levels(train, options, message):
    with pytest.raises(InputError, match=message):
        AdaMerge(two_levels(train=train, modules=[Shift]), loop=Bilevel(**options))


def test_the_advice_about_two_levels_helps():
    AdaMerge(two_levels(), loop=Bilevel(inner_optimizer=SGD, second_order=True, order="per_task"))
    AdaMerge(two_levels(train=r"rule\.inner", modules=[Shift]), loop=Bilevel(inner=r"task\..*shift"))
    with pytest.raises(InputError, match=r"`loop.inner` is no regular expression: '\('"):
        Bilevel(inner="(")


@pytest.mark.slow_unless("False-between", "True-in the coefficients'")
@pytest.mark.parametrize("stop", [2, 6, 8], ids=["in the mask's phase", "between", "in the coefficients'"])
@pytest.mark.parametrize("second_order", [False, True])
def test_phases_resume_as_the_straight_run(config, stop, second_order):
    """Six steps for the mask, three for the coefficients; a kill at any step changes no bit."""
    sgd = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}
    bilevel = loop("Bilevel", second_order=True, inner_optimizer=sgd) if second_order else loop("Bilevel")
    phases = [{"train": r"rule\.logits", "share": 2.0, "loop": bilevel}, {"train": r"rule\.inner"}]
    plain = config({"rule": MASK, "phases": phases}, trainer={"max_steps": 9}, run={"checkpoint_every": 1})
    straight = adamerge.train(plain)
    killer = {"class_path": "tests.test_loops.Killer", "init_args": {"step": stop}}
    with pytest.raises(Killed):
        adamerge.train(plain, **{"trainer.callbacks": [killer], "run.name": "stopped"})
    (stopped,) = (straight.dir.parent.parent / "stopped").iterdir()
    rest = adamerge.train(plain, ckpt_path=str(stopped))
    found = learned(straight)
    assert (found["rule.inner.raw_TG"] - 0.3).abs().max() > 1e-3
    assert all(value.any() for value in found.values())
    assert_equal(found, learned(rest))
    assert straight.scores == rest.scores


class Killed(Exception):
    """In the middle of a run."""


class Killer(pl.Callback):
    """Ends the run at the beginning of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == self.step:
            raise Killed


# --- W ranks take the step of one


def joint(**options):
    rule = partial(Concrete, rule=partial(LayerWise, penalties={"l2": 0.1}), density=0.1)
    model = merged_of(rule=rule, modules=[partial(Surgery, rank=2)], dtype=torch.float64)
    return AdaMerge(model, loop=Joint(**options), objectives=[Entropy(), Kept()], optimizer=SGD)


def in_turn():
    model = merged_of(rule=LayerWise, modules=[Shift], dtype=torch.float64)
    return AdaMerge(model, loop=PerTask(task_order="shuffled"), objectives=[Entropy(), Kept()])


def bilevel(**options):
    return AdaMerge(two_levels(dtype=torch.float64), loop=Bilevel(inner_optimizer=SGD, **options), optimizer=SGD)


def diverse(order="auto", make=Joint):
    model = merged_of(rule=LayerWise, modules=[Shift], dtype=torch.float64)
    return AdaMerge(model, loop=make(order=order), objectives=[Entropy(), Diversity(weight=0.5)], optimizer=SGD)


CASES = {
    "mask and surgery": joint,
    "micro-batches": partial(joint, micro_batch=1),
    "all as one batch": partial(joint, order="concatenated"),
    "in turn": in_turn,
    "min norm": partial(joint, combine="min_norm"),
    "two levels": bilevel,
    "two levels, second order": partial(bilevel, second_order=True),
    "two levels, as one batch": partial(bilevel, order="concatenated"),
    "diversity": diverse,
    "diversity, as one batch": partial(diverse, order="concatenated"),
}


def double(sample):
    return {**sample, "input": sample["input"].double()}


def train_case(case, rank, world):
    """Four steps with 8 samples of each task in each, on this rank its share of them."""
    module = CASES[case]()
    data = data_of(batch_size=8 // world)
    data.preparer = lambda task: double
    data.slot = partial(module.loop.slot, tasks=TASKS, seed=0)
    batches = [data.stream(rank, world)[k] for k in range(4)]
    return trained(module, batches, world)


def train_all(rank, folder):
    with joined(rank, folder):
        torch.save({case: train_case(case, rank, 2) for case in CASES}, folder / f"{rank}.pt")
        twice = partial(bilevel, second_order=True)
        try:
            AdaMerge(two_levels(), loop=twice().loop, objectives=[Diversity()])
        except InputError as error:
            (folder / f"{rank}.txt").write_text(str(error))


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """Every case on two ranks, in one start of two processes."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(train_all, (folder,), nprocs=2)
    return folder


@pytest.mark.slow_unless("two levels", "micro-batches")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore")
def test_two_ranks_take_the_steps_of_one(two_ranks, case):
    """In float64; both ranks' halves of a batch of 4 are together the half of 8, since samples are dealt in turn."""
    start = {name: parameter.detach() for name, parameter in CASES[case]().model.learnables().items()}
    alone = train_case(case, 0, 1)
    for rank in range(2):
        found = torch.load(two_ranks / f"{rank}.pt", weights_only=True)[case]
        assert found.keys() == alone.keys()
        for name, value in alone.items():
            assert (value - start[name]).abs().max() > 1e-5, name
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-11)


def test_a_batch_seen_as_a_whole_cannot_be_differentiated_twice_over_ranks(two_ranks):
    for rank in range(2):
        message = (two_ranks / f"{rank}.txt").read_text()
        assert message.startswith("`loop.second_order` cannot differentiate Diversity twice over several ranks")
    AdaMerge(two_levels(), loop=bilevel(second_order=True).loop, objectives=[Diversity()])
