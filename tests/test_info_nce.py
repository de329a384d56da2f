"""The contrastive objective: its value, its gradient, the same over ranks, and from texts to a merge."""

import math
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.autograd import gradcheck

import adamerge
from adamerge import Recipe, UnlabeledTasks
from adamerge.backbones import SentenceEncoder
from adamerge.loops import Joint
from adamerge.loops.joint import part_of
from adamerge.module import AdaMerge
from adamerge.objectives import Entropy, InfoNCE
from adamerge.recorded import revive, spec
from adamerge.rules import LayerWise
from adamerge.types import ROWS, InputError, TaskOutput
from tests.checkpoints_hf import CLASSES, Texts, write
from tests.ranks import joined, trained
from tests.test_engine import Silent, assert_same
from tests.tiny import INPUT, TASKS, WIDTH, Shift, merged_of

B, D = 5, 7
SGD = partial(torch.optim.SGD, lr=0.1)
KINDS = {
    "expert": {},
    "expert, symmetric": {"symmetric": True},
    "pair": {"positives": "pair"},
    "pair, symmetric": {"positives": "pair", "symmetric": True},
}
kinds = pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def sides(positives="expert", size=B, dtype=torch.float64):
    """Anchors [B, D], positives [B, D], and both as a task's output and batch."""
    anchor_BD, positive_BD = draw(size, D, dtype=dtype), draw(size, D, seed=1, dtype=dtype)
    if positives == "expert":
        return anchor_BD, positive_BD, answer(anchor_BD), {"expert.features": positive_BD}
    both = torch.stack([anchor_BD, positive_BD], 1).flatten(0, 1)
    return anchor_BD, positive_BD, answer(both), {ROWS: torch.arange(len(both))}


def answer(features):
    return TaskOutput("a", features, features)


def by_hand(anchors, positives, temperature):
    """From the formula, in plain numbers; added up over anchors."""

    def cosine(a, p):
        return sum(x * y for x, y in zip(a, p, strict=True)) / (math.hypot(*a) * math.hypot(*p))

    total = 0.0
    for i, anchor in enumerate(anchors):
        scores = [math.exp(cosine(anchor, positive) / temperature) for positive in positives]
        total -= math.log(scores[i] / sum(scores))
    return total


@pytest.mark.parametrize("temperature", [0.05, 0.5, 1.0])
@pytest.mark.parametrize("positives", ["expert", "pair"])
def test_the_closed_form(positives, temperature):
    anchor_BD, positive_BD, out, batch = sides(positives)
    forth = by_hand(anchor_BD.tolist(), positive_BD.tolist(), temperature)
    back = by_hand(positive_BD.tolist(), anchor_BD.tolist(), temperature)
    for symmetric, expected in ((False, forth), (True, (forth + back) / 2)):
        terms = InfoNCE(positives=positives, temperature=temperature, symmetric=symmetric)(out, batch)
        assert list(terms) == ["info_nce"]
        assert terms["info_nce"].count == B
        assert float(terms["info_nce"].sum) == pytest.approx(expected, rel=1e-12)
    cosine_BB = F.cosine_similarity(anchor_BD[:, None], positive_BD[None], dim=-1)
    by_torch = F.cross_entropy(cosine_BB / temperature, torch.arange(B), reduction="sum")
    assert float(by_torch) == pytest.approx(forth, rel=1e-12)


@kinds
def test_where_nothing_is_told_it_is_log_n_and_where_all_is_told_nothing(options):
    objective, pairs = InfoNCE(**options), options.get("positives") == "pair"

    def value(features, positives):
        both = torch.stack([features, positives], 1).flatten(0, 1) if pairs else features
        term = objective(answer(both), {"expert.features": positives, ROWS: torch.arange(len(both))})["info_nce"]
        return float(term.sum / term.count)

    alike = torch.ones(B, D)
    assert value(alike, alike) == pytest.approx(math.log(B), rel=1e-6)
    assert value(torch.eye(B), 3 * torch.eye(B)) == pytest.approx(math.log1p((B - 1) * math.exp(-20)), abs=1e-6)


@kinds
def test_its_gradient_is_the_finite_difference_and_the_expert_has_none(options):
    objective = InfoNCE(**{"temperature": 0.3, **options})
    _, positive_BD, out, batch = sides(options.get("positives", "expert"))
    out.features_BD.requires_grad_()
    positive_BD.requires_grad_()
    assert gradcheck(lambda features: objective(answer(features), batch)["info_nce"].sum, out.features_BD)
    objective(out, batch)["info_nce"].sum.backward()
    assert out.features_BD.grad.abs().min() > 0
    if "expert.features" in batch:
        assert positive_BD.grad is None


@kinds
@pytest.mark.parametrize("scale", [1e-30, 0.0, 1e15])
def test_features_of_any_size_give_finite_gradients(options, scale):
    _, _, out, batch = sides(options.get("positives", "expert"), dtype=torch.float32)
    out.features_BD = (scale * out.features_BD).requires_grad_()
    term = InfoNCE(**options)(out, batch)["info_nce"]
    term.sum.backward()
    assert term.sum.isfinite()
    assert out.features_BD.grad.isfinite().all()


def test_autocast_does_not_round_the_cosines():
    _, _, out, batch = sides(dtype=torch.float32)
    plain = InfoNCE()(out, batch)["info_nce"].sum
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(InfoNCE()(out, batch)["info_nce"].sum, plain)


def test_what_is_needed_depends_on_the_options():
    assert InfoNCE().needs == {"expert.features"}
    assert InfoNCE(positives="pair").needs == frozenset()
    again = revive(spec(InfoNCE(positives="pair", temperature=0.1)), trust=False)
    assert (again.needs, again.positives, again.temperature) == (frozenset(), "pair", 0.1)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_a_bad_temperature(temperature):
    with pytest.raises(InputError, match=r"`InfoNCE.temperature` is .*; it is a positive number"):
        InfoNCE(temperature=temperature)


@kinds
def test_one_sample_alone_has_no_negatives(options):
    _, _, out, batch = sides(options.get("positives", "expert"), size=1)
    with pytest.raises(InputError, match=r"task 'a' has one sample at a time; raise `data.batch_size`"):
        InfoNCE(**options)(out, batch)


def test_pairs_must_be_pairs():
    objective = InfoNCE(positives="pair")
    for batch, size in (({}, 4), ({ROWS: torch.arange(3)}, 3)):
        with pytest.raises(InputError, match=r"is `pair`, but the samples of task 'a' have no second text: name"):
            objective(answer(draw(size, D)), batch)


# --- in a step


class Given:
    """Experts whose features stand in every batch."""

    blocks, keys = (), {}

    def complete(self, batches, wanted):
        assert all(wanted <= set(batch) for batch in batches.values())
        return batches


def batch_of(number, options, task, start=0, step=1):
    """Samples of a draw, every `step`-th; pairs are interleaved."""
    seed = sum(map(ord, task)) + 100 * number
    inputs_BRF = draw(8, 2, INPUT, seed=seed)[start::step]
    if options.get("positives") == "pair":
        inputs = inputs_BRF.flatten(0, 1)
        return {"input": inputs, ROWS: torch.arange(len(inputs))}
    return {"input": inputs_BRF[:, 0], "expert.features": draw(8, WIDTH, seed=seed + 1)[start::step]}


def module_of(options, order="auto", kind=AdaMerge):
    model = merged_of(rule=LayerWise, modules=[Shift], dtype=torch.float64)
    objectives = [InfoNCE(**options, weight=0.5), Entropy()]
    return kind(model, loop=Joint(order=order), objectives=objectives, optimizer=SGD, teachers=Given())


@kinds
def test_every_way_gives_one_gradient(options):
    batches = {task: batch_of(0, options, task) for task in TASKS}
    found = []
    for way, order in (("leaf", "per_task"), ("leaf", "concatenated"), ("swap", "per_task"), ("swap", "concatenated")):
        model = merged_of(modules=[Shift], dtype=torch.float64, apply_mode=way)
        module = Silent(model, objectives=[InfoNCE(**options)], loop=Joint(order=order), teachers=Given())
        if order == "concatenated" and ROWS in batches["a"]:  # as a backbone of texts does
            module.model.backbone.concatenate = lambda parts: {"input": torch.cat([part["input"] for part in parts])}
        scalar = module.loop.step(module, batches)
        scalar.backward()
        found.append((scalar.detach(), {name: p.grad for name, p in model.learnables().items()}))
    for other in found[1:]:
        assert_same(other, found[0], rtol=1e-6, atol=1e-12)


def test_a_batch_that_is_seen_as_a_whole_is_not_split():
    with pytest.raises(InputError, match=r"InfoNCE looks at a batch as a whole, so `loop.micro_batch` cannot split it"):
        AdaMerge(merged_of(), objectives=[InfoNCE(positives="pair")], loop=Joint(micro_batch=2))
    batch = batch_of(0, {"positives": "pair"}, "a")
    with pytest.raises(InputError, match="several answers for a sample cannot be split"):
        part_of(batch, slice(2))


def test_without_experts_pairs_are_enough():
    AdaMerge(merged_of(), objectives=[InfoNCE(positives="pair")])
    with pytest.raises(InputError, match=r"InfoNCE needs expert.features, which nothing here provides; give AdaMerge"):
        AdaMerge(merged_of(), objectives=[InfoNCE()])


# --- W ranks take the step of one

CASES = {
    **{name: partial(module_of, options) for name, options in KINDS.items()},
    **{f"{name}, as one batch": partial(module_of, KINDS[name], "concatenated") for name in ("expert",)},
}


def train_case(case, rank, world):
    """Four steps with 8 samples of each task in each, on this rank its share of them; what they logged."""
    losses = []

    class Logged(AdaMerge):
        def report(self, values, penalties):
            losses.append(torch.stack([term for terms in values.values() for term in terms.values()]))
            return super().report(values, penalties)

    module = CASES[case](kind=Logged)
    options = KINDS[case.removesuffix(", as one batch")]
    batches = [{task: batch_of(k, options, task, rank, world) for task in TASKS} for k in range(4)]
    return {**trained(module, batches, world), "losses": torch.stack(losses)}


def train_all(rank, folder):
    with joined(rank, folder):
        torch.save({case: train_case(case, rank, 2) for case in CASES}, folder / f"{rank}.pt")
        one = sides(size=2)
        half = slice(rank, rank + 1)  # one sample on each rank: each has the other's for a negative
        term = InfoNCE()(answer(one[0][half]), {"expert.features": one[1][half]})["info_nce"]
        torch.save(term.sum, folder / f"{rank}-half.pt")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(train_all, (folder,), nprocs=2)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore")
def test_two_ranks_take_the_steps_of_one(two_ranks, case):
    start = {name: parameter.detach() for name, parameter in CASES[case]().model.learnables().items()}
    alone = train_case(case, 0, 1)
    assert all((alone[name] - value).abs().max() > 1e-5 for name, value in start.items())
    for rank in range(2):
        found = torch.load(two_ranks / f"{rank}.pt", weights_only=True)[case]
        assert found.keys() == alone.keys()
        for name, value in alone.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-11, msg=f"{name} on rank {rank}")


def test_a_sample_on_each_rank_has_the_others_for_a_negative(two_ranks):
    anchor_BD, positive_BD, *_ = sides(size=2)
    found = [torch.load(two_ranks / f"{rank}-half.pt", weights_only=True) for rank in range(2)]
    assert float(sum(found)) == pytest.approx(by_hand(anchor_BD.tolist(), positive_BD.tolist(), 0.05), rel=1e-12)


# --- from texts to a merge


@pytest.fixture(scope="module")
def berts(tmp_path_factory):
    return write(tmp_path_factory.mktemp("pool"), "bert", "AutoModel")


def train(berts, root, objective, *, more="positive", steps=2, batch_size=4, **trainer):
    """A run, and the loss of every step."""
    losses = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, *args):
            losses.append(float(outputs["loss"]))

    recipe = Recipe(
        str(berts["base"]),
        {task: str(berts[task]) for task in CLASSES},
        SentenceEncoder(),
        objectives=[objective],
        optimizer=partial(torch.optim.Adam, lr=0.02),
    )
    tasks = {task: Texts(task, more=more, labels=False) for task in CLASSES}
    data = UnlabeledTasks(tasks, batch_size=batch_size, eval_split=None, eval_batch_size=8)
    options = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False, "max_steps": steps}
    options = {**options, "callbacks": [Watch()], **trainer}
    return adamerge.train(recipe, data, trainer=options, run={"root": str(root), "baselines": False}), losses


FROM_TEXTS = {
    "expert": (InfoNCE(temperature=0.5), None),
    "pair": (InfoNCE(positives="pair", temperature=0.5), "positive"),
    "pair, symmetric": (InfoNCE(positives="pair", temperature=0.5, symmetric=True), "positive"),
}


@pytest.mark.parametrize(("objective", "more"), FROM_TEXTS.values(), ids=FROM_TEXTS)
def test_two_steps_on_texts(berts, tmp_path, objective, more):
    run, losses = train(berts, tmp_path, objective, more=more)
    assert (run.learned.rule.raw_TG.detach() != 0.3).any(1).all()
    assert all(0 < loss < 2 * math.log(4) + 2 * 4 for loss in losses)
    loaded = adamerge.load(run.dir)
    samples = Texts("a", more=more, labels=False).split("test")[:5]
    with torch.inference_mode():
        found = [merge(merge.prepare(samples, task="a"), task="a") for merge in (run.merge, loaded)]
    assert torch.equal(*found)
    assert len(found[0]) == (10 if more else 5)


@pytest.mark.parametrize(("objective", "more"), FROM_TEXTS.values(), ids=FROM_TEXTS)
def test_the_loss_falls_over_thirty_steps(berts, tmp_path, objective, more):
    """The same eight samples of each task in every step."""
    _, losses = train(berts, tmp_path, objective, more=more, steps=30, batch_size=8, overfit_batches=1)
    assert len(losses) == 30
    assert losses[-1] < losses[0] - 0.01
    assert min(losses) > 0
    assert sum(losses[20:]) < sum(losses[:10])


def test_experts_and_pairs_of_texts(berts, tmp_path):
    """With pairs in the data, each of a sample's two texts is an anchor that has the expert's features of its own."""
    _, losses = train(berts, tmp_path, InfoNCE(temperature=0.5), more="positive", steps=14)  # each sample twice
    assert len(losses) == 14


def test_data_without_pairs_are_one_clear_error(berts, tmp_path):
    with pytest.raises(InputError, match=r"have no second text: name its column as `positive`"):
        train(berts, tmp_path, InfoNCE(positives="pair"), more=None)
    with pytest.raises(InputError, match=r"raise `data.batch_size`"):
        train(berts, tmp_path, InfoNCE(positives="pair"), batch_size=1)
    train(berts, tmp_path, InfoNCE(positives="pair"), batch_size=2)


@pytest.mark.parametrize("steps", [4, 25], ids=["each time", "kept"])
def test_from_a_configuration(config, steps):
    """What experts say is asked at every step, or kept where samples are taken twice."""
    part = {"class_path": "adamerge.objectives.InfoNCE", "init_args": {"temperature": 0.1, "symmetric": True}}
    run = adamerge.train(config({"objectives": [part]}, trainer={"max_steps": steps}))
    assert (run.learned.rule.raw_TG.detach() != 0.3).any(1).all()
    assert "adamerge.objectives.InfoNCE" in (run.dir / "config.yaml").read_text()
