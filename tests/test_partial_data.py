"""Labels for some tasks, data for some tasks: what can be learned and scored is, and the rest is said."""

import json
import logging

import pytest
import torch

import adamerge
from adamerge.comparison import Comparison, Ran, Row
from adamerge.data import TensorTask, UnlabeledTasks
from adamerge.evaluation import baselines, classes_of
from adamerge.module import AdaMerge
from adamerge.objectives import Entropy, Supervised
from adamerge.report import accuracy_bars, score_table
from adamerge.rescore import rescore
from adamerge.task_modules import AsIs
from adamerge.types import InputError, TaskInfo
from tests.test_bad_input import Bare, objective
from tests.tiny import CLASSES, INPUT, TASKS, Shift, Tiny, data_of, merged_of, vectors_of


class Unlabeled(Tiny):
    """Labels of -100 in the split `test`."""

    def split(self, name):
        samples = super().split(name)
        if name == "test":
            samples._labels = torch.full_like(samples._labels, -100)
        return samples


class NoTest(TensorTask):
    """A task without the split `test`."""

    def __init__(self, task: str) -> None:
        splits = Tiny(task)._splits
        super().__init__([str(c) for c in range(CLASSES[task])], train=splits["train"])


class Nameless(Tiny):
    """Numbers for labels, and no names."""

    @property
    def classes(self):
        return ()


def as_task(cls, task="b"):
    return {"class_path": f"tests.test_partial_data.{cls}", "init_args": {"task": task}}


def tasks_with(config, **changed):
    plain = config(run={"baselines": True}, trainer={"max_steps": 2, "val_check_interval": 1})
    plain["data"]["tasks"] = {**plain["data"]["tasks"], **changed}
    return plain


# --- which tasks are scored


@pytest.mark.parametrize(
    ("cls", "said"), [(Unlabeled, "Not scored, no labels: b"), (NoTest, "Not scored, no split 'test': b")]
)
def test_tasks_that_cannot_be_scored_are_left_out(cls, said):
    data = UnlabeledTasks({**data_of().tasks, "b": cls("b")}, batch_size=4)
    assert data.scored == ("a", "c") == tuple(data.eval_loaders())
    assert data.unscored() == [said]
    assert set(data.stream()[0]) == set(TASKS)


def test_samples_without_a_label_are_looked_at():
    data = UnlabeledTasks({"a": Tiny("a"), "b": Bare("b")})
    assert data.scored == ("a",)
    prepared = data.prepared_by(
        lambda task: lambda sample: {**sample, "label": 1}
    )  # a backbone may know labels of its own
    assert prepared.scored == ("a", "b")
    assert data.scored == ("a",)


def test_a_split_that_no_task_has_is_an_error():
    with pytest.raises(InputError, match=r"(?s)3 problems with the data:.*Task 'a': There is no split 'val'"):
        _ = data_of(eval_split="val").scored
    for tasks in ({"a": Unlabeled("a")}, {"a": Bare("a")}):
        with pytest.raises(
            InputError, match=r"Task 'a' is scored on samples without labels; set `data.eval_split` to nul"
        ):
            UnlabeledTasks(tasks).eval_loaders()
    with pytest.raises(
        InputError, match=r"(?s)2 problems with the data:.*'a': There is no split.*'b' is scored on samples"
    ):
        UnlabeledTasks({"a": NoTest("a"), "b": Unlabeled("b")}).eval_loaders()
    empty = TensorTask(["x"], test=(torch.zeros(0, INPUT), torch.zeros(0, dtype=torch.int64)))
    with pytest.raises(InputError, match="Task 'b' is empty: its split 'test' has no samples"):
        UnlabeledTasks({"a": Tiny("a"), "b": empty}).eval_loaders()
    assert UnlabeledTasks({"a": Tiny("a")}, eval_split=None).scored == ()


def test_memory_is_not_kept_for_what_is_not_scored():
    data = UnlabeledTasks({"a": Tiny("a"), "b": Unlabeled("b")}, cache_limit=1).prepared_by(
        lambda task: lambda sample: {**sample}
    )
    assert data.scored == ("a",)
    assert data._cached == 23 * (4 * INPUT + 8)


def test_samples_adapted_on_and_scored_on_are_recognised():
    train = Tiny("a")._splits["train"]
    tasks = {"a": TensorTask([str(c) for c in range(4)], train=train, test=train), "b": Tiny("b")}
    assert UnlabeledTasks(tasks).transductive() == ["a"]
    assert UnlabeledTasks(tasks, split="test").transductive() == ["a", "b"]
    assert UnlabeledTasks(tasks, eval_split=None).transductive() == []


# --- a run


@pytest.mark.parametrize("cls", ["Unlabeled", "NoTest"])
def test_a_run_scores_what_it_can(config, caplog, cls):
    plain = tasks_with(config, b=as_task(cls))
    with caplog.at_level(logging.INFO, "adamerge"):
        run = adamerge.train(plain)
    why = "no labels" if cls == "Unlabeled" else "no split 'test'"
    assert caplog.messages.count(f"Not scored, {why}: b") == 1
    assert {row: set(each) for row, each in run.scores.items()} == {
        **{row: {"a", "c"} for row in ("base", "average", "task arithmetic", "TIES", "this merge")},
        "expert a": {"a"},
        "expert c": {"c"},
    }
    last = next(line for line in str(run).splitlines() if "│ this merge" in line)
    assert last.count("–") == 1
    mean = 50 * sum(run.scores["this merge"].values())
    assert last.rstrip(" │").endswith(f"{mean:.1f}")
    header = (run.dir / "metrics.csv").read_text().splitlines()[0]
    assert "val/a/accuracy" in header
    assert "val/c/accuracy" in header
    assert "val/b/accuracy" not in header
    assert (run.dir / "plots" / "accuracy.png").exists()
    told = rescore(run.dir, device="cpu", trust=True)
    assert f"Not scored, {why}: b" in told
    assert all(f"{100 * score:.1f}" in told for score in run.scores["this merge"].values())


def test_the_samples_of_a_task_are_scored_under_its_name(config):
    """Validation counts each task's samples for that task, though one before it is not scored."""
    run = adamerge.train(tasks_with(config, a=as_task("Unlabeled", "a")))
    last = (run.dir / "metrics.csv").read_text().splitlines()
    column = last[0].split(",").index("val/c/accuracy")
    found = [float(line.split(",")[column]) for line in last[1:] if line.split(",")[column]]
    assert found[-1] == pytest.approx(run.scores["this merge"]["c"])


def test_class_names_need_not_be_known(config):
    plain = tasks_with(config, b=as_task("Nameless"))
    assert set(adamerge.train(plain).scores["this merge"]) == set(TASKS)


def test_the_number_of_classes_is_the_heads():
    model = merged_of()
    assert classes_of(model, {}, ("a", "c")) == {"a": 4, "c": 5}
    model.task_modules[0].append(Shift(TaskInfo("a")))  # the last, which says nothing of classes
    assert classes_of(model, {"a": 7}, ("a",)) == {"a": 7}
    with pytest.raises(InputError, match=r"How many classes 1 \(a\) have is not known: list them in the `classes` of"):
        classes_of(model, {}, ("a", "c"))
    model.task_modules[0].append(AsIs(TaskInfo("a")))  # embeddings
    with pytest.raises(InputError, match=r"How many classes 1 \(a\) have is not known: .*`data.eval_split` null"):
        classes_of(model, {"a": 7}, ("a", "c"))
    model.task_modules[0].append(AsIs(TaskInfo("a"), 9))  # logits
    assert classes_of(model, {"a": 7}, ("a",)) == {"a": 9}


# --- labels to learn from


def test_a_task_without_labels_adds_nothing(config, caplog):
    model = {"objectives": [objective("Supervised")]}
    whole = config(model, trainer={"max_steps": 3})
    whole["data"]["tasks"]["b"] = {"class_path": "tests.test_bad_input.Bare", "init_args": {"task": "b"}}
    with caplog.at_level(logging.INFO, "adamerge"):
        one = adamerge.train(whole)
    assert caplog.messages.count("No labels in 'train', so nothing supervised is learned there: b") == 1
    weightless = config({"objectives": [objective("Supervised", task_weights={"b": 0.0})]}, trainer={"max_steps": 3})
    other = adamerge.train(weightless)
    torch.testing.assert_close(one.learned.rule.raw_TG, other.learned.rule.raw_TG)


def test_another_objective_serves_tasks_without_labels(config):
    model = {"objectives": [objective("Supervised"), objective("Entropy", weight=0.1)]}
    plain = config(model, trainer={"max_steps": 2, "log_every_n_steps": 1})
    plain["data"]["tasks"]["b"] = {"class_path": "tests.test_bad_input.Bare", "init_args": {"task": "b"}}
    run = adamerge.train(plain)
    header, first, *_ = (line.split(",") for line in (run.dir / "metrics.csv").read_text().splitlines())
    named = dict(zip(header, first, strict=True))
    assert float(named["train/b/cross_entropy"]) == 0
    assert float(named["train/a/cross_entropy"]) > 0
    assert float(named["train/b/entropy"]) > 0


@pytest.mark.parametrize("loop", ["PerTask", "Joint"])
def test_steps_are_not_spent_on_tasks_that_nothing_is_said_of(config, loop):
    options = {"combine": "min_norm"} if loop == "Joint" else {}
    model = {"objectives": [objective("Supervised")]}
    model["loop"] = {"class_path": f"adamerge.loops.{loop}", "init_args": options}
    plain = config(model, trainer={"max_steps": 4, "log_every_n_steps": 1})
    plain["data"]["tasks"]["b"] = {"class_path": "tests.test_bad_input.Bare", "init_args": {"task": "b"}}
    run = adamerge.train(plain)
    assert "train/b/" not in (run.dir / "metrics.csv").read_text()
    assert not torch.equal(run.learned.rule.raw_TG, torch.full_like(run.learned.rule.raw_TG, 0.3))


def test_the_stream_says_that_there_are_no_labels():
    data = UnlabeledTasks({"a": Tiny("a"), "b": Bare("b")}, batch_size=4)
    data.labels = True
    batches = data.stream()[0]
    assert batches["b"]["label"].tolist() == [-100] * 4
    assert batches["b"]["label"].dtype == batches["a"]["label"].dtype
    assert data.check_labels() == ["b"]
    model = merged_of()
    with model.applied():
        term = Supervised()(model.respond("b", batches["b"]), batches["b"])["cross_entropy"]
    assert (term.sum.item(), int(term.count)) == (0, 0)
    data.labels = False
    assert "label" not in data.stream()[0]["b"]


# --- experts without data


@pytest.fixture
def subset(config):
    def make(model=(), **options):
        plain = config(model, **options)
        del plain["data"]["tasks"]["b"]
        return plain

    return make


@pytest.mark.parametrize("apply_mode", ["leaf", "swap"])
def test_an_expert_without_data_is_merged(subset, caplog, apply_mode):
    with caplog.at_level(logging.INFO, "adamerge"):
        run = adamerge.train(subset({"apply_mode": apply_mode}, run={"baselines": True}))
    assert "3: a, b, c; merged without data: b" in caplog.text
    assert run.merge.tasks == TASKS
    assert set(run.scores["this merge"]) == {"a", "c"}
    assert "expert b" not in run.scores
    assert "–" in str(run)
    learned = run.learned.rule.raw_TG
    assert (learned != 0.3).any(1).all()  # its coefficients are learned too, from the others' data
    assert adamerge.load(run.dir, trust=True).tasks == TASKS
    assert "this merge" in rescore(run.dir, device="cpu", trust=True)


@pytest.mark.parametrize(
    "model",
    [
        {"loop": {"class_path": "adamerge.loops.PerTask", "init_args": {"task_order": "shuffled"}}},
        {"objectives": [objective("Distillation")]},
        {
            "task_modules": [{"class_path": "adamerge.task_modules.Surgery", "init_args": {"rank": 2}}],
            "objectives": [objective("FeatureDistillation")],
            "train": "task",
        },
    ],
    ids=["per task", "distilled", "surgery"],
)
def test_every_way_to_learn_goes_without(subset, model):
    run = adamerge.train(subset(model, data={"eval_split": None}, trainer={"max_steps": 40, "log_every_n_steps": 1}))
    text = (run.dir / "metrics.csv").read_text()
    assert "train/a/" in text
    assert "train/b/" not in text
    if model.get("train") == "task":
        surgeon = run.learned.chain("b")[0]
        assert all(torch.equal(p, q) for p, q in zip(surgeon.parameters(), untouched(run, "b"), strict=True))


def untouched(run, task):
    """The task's parameters as a run of no steps has them: those that start at zero."""
    return [torch.zeros_like(p) if not p.any() else p for p in run.learned.chain(task)[0].parameters()]


def test_a_loss_that_depends_on_nothing_is_still_said(subset):
    with pytest.raises(InputError, match="No loss depends on what is trained"):
        adamerge.train(subset({"objectives": [{"class_path": "tests.test_partial_data.Constant"}]}))


class Constant(Entropy):
    """Says nothing of the model."""

    def forward(self, out, batch):
        return {name: type(term)(term.sum.detach(), term.count) for name, term in super().forward(out, batch).items()}


def test_baselines_of_the_scored_alone():
    model, vectors = merged_of(), vectors_of()
    found = {name: tasks for name, _, tasks in baselines(model, vectors, ("c",))}
    assert found == {**dict.fromkeys(("base", "average", "task arithmetic", "TIES"), ("c",)), "expert c": ("c",)}
    everything = {name: tasks for name, _, tasks in baselines(model, vectors)}
    assert everything["average"] == TASKS
    assert "expert b" in everything
    average = next(merge for name, merge, _ in baselines(model, vectors, ("c",)) if name == "average")
    assert torch.allclose(average.rule.raw_TG, torch.tensor(1 / 3))


def test_a_module_counts_the_scored_alone():
    module = AdaMerge(merged_of(), num_classes={"c": 5}, tasks=("a", "c"))
    assert len(module.metrics) == 1
    assert module.served_tasks == ("a", "c")
    assert AdaMerge(merged_of()).served_tasks == TASKS


# --- what shows scores


def test_tables_and_plots_show_what_is_missing(tmp_path):
    scores = {"average": {"a": 0.5, "c": 0.7}, "expert a": {"a": 0.9}, "this merge": {"a": 0.6, "c": 0.8}}
    table = score_table(scores, tasks=TASKS)
    head, last = table.splitlines()[2], next(line for line in table.splitlines() if "this merge" in line)
    assert [head.index(task) for task in ("a ", "b ", "c ")] == sorted(head.index(task) for task in ("a ", "b ", "c "))
    assert last.count("–") == 1
    assert "70.0" in last
    assert "b" not in score_table({"x": {"a": 0.5}}).splitlines()[2].split()
    accuracy_bars(scores)
    ran = Ran("run", scores["this merge"], None, 1, 1.0, 1, 1, True, {}, {})
    rows = [Row("average", [scores["average"]]), Row("LayerWise", [ran.scores], [ran], 1)]
    comparison = Comparison(rows, TASKS, tmp_path, "Accuracy in %", "")
    figures = comparison.figures(rows[1])
    assert (figures["accuracy/a"], figures["accuracy/b"]) == (pytest.approx(60), None)
    assert figures["gain"] == pytest.approx(10)
    assert "–" in str(comparison)
    comparison.write()
    assert (tmp_path / "compare.csv").exists()
    assert json.dumps(figures)
