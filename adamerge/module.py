"""The training step, nothing else: Lightning's view of a merge."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer

from adamerge.backbones.base import batch_size, num_answers
from adamerge.blocks import recorded_blocks
from adamerge.evaluation import confusion, score
from adamerge.finite import FiniteWatch
from adamerge.learnables import trained_names
from adamerge.loops import Joint, Loop
from adamerge.loops.tally import Terms, Weighted
from adamerge.merged import MergedModel
from adamerge.objectives import Entropy, Objective
from adamerge.resume import reconcile_optimizer, restore, training_state
from adamerge.seeding import seed_of
from adamerge.step import Step
from adamerge.teachers import BLOCKS, EXPERT, Teachers
from adamerge.types import KEPT, Batch, InputError, TaskOutput, raise_all

log = logging.getLogger("adamerge")


def adam(parameters: Any, *, guided: bool = False, fused: bool | None = None) -> Optimizer:
    """The default optimiser: Adam at 1e-3, or at 1e-2 where experts or labels say where to go.

    Args:
        parameters: What is trained.
        guided: Every objective needs something of experts or labels.
        fused: In one pass over each learnable, as a run has it but where it clips gradients: Lightning refuses both
            together under mixed precision. None: as torch has it.

    Source: AdaMerging, arXiv 2310.02575, for 1e-3 with the entropy. Deviation: 1e-2 under guidance, with which
    distillation gets as far in a tenth of the steps (benchmarks/optimizers.py); at 2e-2, adapters inside the network
    lose again. Entropy does not bear it: layer by layer, accuracy falls sooner.
    """
    return torch.optim.Adam(parameters, lr=1e-2 if guided else 1e-3, fused=fused)


class AdaMerge(pl.LightningModule):
    """Trains the learnables of a merged model.

    Args:
        model: What is trained.
        objectives: Added up, each with its weight, over all tasks.
        loop: How one step goes through the tasks.
        optimizer: Makes the optimiser from the learnables; by default Adam, at a rate that is the objectives'.
        lr_scheduler: Makes a schedule from the optimiser; it advances every optimiser step.
        num_classes: C per task, for the accuracy of tasks with labels; none are needed to train.
        seed: Seeds, with the step and the rank, whatever the model draws at random; what the rule draws, with the step
            alone.
        teachers: The experts, for objectives that need them; asked where a batch does not hold what they say.
        phase: The number of the run's phase, for its checkpoints.
        tasks: Those that are learned from; by default all.

    Raises:
        InputError: Nothing to learn, or parts that do not work together.
    """

    def __init__(
        self,
        model: MergedModel,
        *,
        objectives: Sequence[Objective] | None = None,
        loop: Loop | None = None,
        optimizer: Callable[[Any], Optimizer] = adam,
        lr_scheduler: Callable[[Optimizer], Any] | None = None,
        num_classes: Mapping[str, int] | None = None,
        seed: int = 0,
        teachers: Teachers | None = None,
        phase: int = 0,
        tasks: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.strict_loading = (
            False  # a checkpoint holds learnables only; `resume.restore` checks that they are all there
        )
        self.model, self.loop = model, loop or Joint()
        self.served_tasks = model.tasks if tasks is None else tuple(tasks)
        self._objectives = torch.nn.ModuleList([Entropy()] if objectives is None else objectives)
        self._make_optimizer, self._make_scheduler = optimizer, lr_scheduler
        self.metrics = torch.nn.ModuleList(confusion(c) for c in (num_classes or {}).values())
        self._metric_tasks = tuple(num_classes or {})
        self._stack, self._seed, self._teachers, self._phase = ExitStack(), seed, teachers, phase
        self._fixed, self._served = ExitStack(), set[str]()  # merged once; tasks since the last optimiser step
        self.noise = seed
        self._latest: dict[str, Tensor] = {}  # what was last said of each task
        self.block_names: Sequence[str] = teachers.blocks if teachers is not None and BLOCKS in self.needs else ()
        self.finite = FiniteWatch(model.tasks, model.device, self._bounded())
        raise_all(self._problems(), "the training set-up")

    def _bounded(self) -> list[str]:
        begins = tuple(f"rule.{prefix}" for prefix in self.model.rule.bounded)
        return [name for name in self.model.learnables() if begins and name.startswith(begins)]

    def _problems(self) -> Iterator[str]:
        if not self.model.learnables():
            yield "There is nothing to learn: neither the rule nor a task module has a trainable parameter."
        if not self.objectives:
            yield "There is no objective; name at least one under `model.objectives`."
        provided = {"labels"} | (EXPERT if self._teachers is not None else frozenset())
        for objective in self.objectives:
            lacking = sorted(objective.needs - provided)
            if lacking:
                advice = "; give AdaMerge the experts as `teachers`" if EXPERT & set(lacking) else ""
                yield f"{type(objective).__name__} needs {', '.join(lacking)}, which nothing here provides{advice}."
            unknown = sorted(set(objective.task_weights) - set(self.model.tasks))
            if unknown:
                tasks = ", ".join(self.model.tasks)
                yield f"`task_weights` of {type(objective).__name__} names {', '.join(unknown)}; the tasks are {tasks}."
        if BLOCKS in self.needs and not self.block_names and self._teachers is not None:
            yield "An objective is on the network's blocks, but none are known; name them by `backbone.blocks`."
        yield from self.loop.problems(self)

    @property
    def objectives(self) -> list[Objective]:
        """The objectives, in order."""
        return list(self._objectives)  # type: ignore[arg-type]

    @property
    def needs(self) -> frozenset[str]:
        """Everything that some objective needs."""
        return frozenset().union(*(objective.needs for objective in self.objectives))

    def configure_optimizers(self) -> Any:
        make = self._make_optimizer
        if make is adam:
            clipped = self._trainer is not None and bool(self.trainer.gradient_clip_val)
            make = partial(
                adam, guided=all(objective.needs for objective in self.objectives), fused=None if clipped else True
            )
        optimizer = make(list(self.model.learnables().values()))
        if self._make_scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self._make_scheduler(optimizer), "interval": "step"},
        }

    # --- one step

    def on_fit_start(self) -> None:
        self._stack.close()
        self._fixed.close()
        self.finite = FiniteWatch(self.model.tasks, self.device, self._bounded())

    def training_step(self, batch: Mapping[str, Batch], batch_idx: int) -> Tensor:
        k = self.trainer.fit_loop.epoch_loop.batch_progress.total.processed
        # a resumed run draws what the straight run draws; each rank its own, but for the rule
        self._seed_generators(seed_of(self._seed, "step", k, self.trainer.global_rank))
        self.noise = seed_of(self._seed, "rule", k)
        self._served |= set(batch)
        if self._teachers is not None:
            batch = self._teachers.complete(batch, self.needs & EXPERT)
        try:
            return self.loop.step(self, batch)
        except StopIteration as error:  # which Lightning would take for the end of the data
            raise RuntimeError("A StopIteration left the training step.") from error

    def _seed_generators(self, seed: int) -> None:
        """Of the CPU and of this device; `torch.manual_seed` keeps a note for every kind of device at every call."""
        torch.default_generator.manual_seed(seed)
        if self.device.type != "cpu":
            torch.get_device_module(self.device).manual_seed(seed)

    def step(self, batches: Mapping[str, Batch], **options: Any) -> AbstractContextManager[Step]:
        """`MergedModel.step` with this step's noise; the weights are not put in place where no batch needs them."""
        needed = not all(KEPT in batch for batch in batches.values())
        if needed and self.model.is_fixed and not self.model.is_held:
            self._fixed.enter_context(self.model.hold())
        return self.model.step(noise=self.noise, weights=needed, **options)

    def respond(self, task: str, batch: Batch) -> TaskOutput:
        """The model's output on a task's batch, with the blocks' where an objective asks for them."""
        network, names = self.model.network, self.block_names
        with recorded_blocks(network, names, batch_size(batch), learned=True) as found:
            out = self.model.respond(task, batch)
        out.blocks = tuple(found)
        return out

    def respond_to_all(self, batches: Mapping[str, Batch]) -> Iterator[TaskOutput]:
        """The model's output on every task's batch, from one forward for all of them."""
        if all(KEPT in batch for batch in batches.values()):
            parts: Sequence[Tensor] = [batch[KEPT] for batch in batches.values()]
        else:
            whole = self.model.features(self.model.backbone.concatenate(list(batches.values())))
            parts = whole.split([num_answers(batch) for batch in batches.values()])
        for task, features_BD in zip(batches, parts, strict=True):
            with self.model.attached(task):
                out = self.model.answer(task, features_BD)
            yield out

    def terms(self, out: TaskOutput, batch: Batch) -> Terms:
        """All objectives' weighted terms on one task's output, by name; a name used twice is numbered."""
        terms: dict[str, Weighted] = {}
        for objective in self.objectives:
            for name, term in objective(out, batch).items():
                key, number = name, 1
                while key in terms:
                    key, number = f"{name}_{number + 1}", number + 1
                terms[key] = Weighted(objective.weight_of(out.task), term)
        if not terms:
            raise InputError(f"The objectives give no term for task '{out.task}'; there is nothing to minimise.")
        return terms

    def penalize(self, step: Step) -> Mapping[str, Tensor]:
        """The rule's penalties, sent backward."""
        penalties = self.model.rule.penalty()
        for penalty in penalties.values():
            if penalty.requires_grad:
                step.backward(penalty)
        return {name: penalty.detach() for name, penalty in penalties.items()}

    def note(self, name: str, value: Tensor) -> None:
        """A number beside the loss, logged with it when the step is reported."""
        self._latest[name] = value

    def report(self, values: Mapping[str, Mapping[str, Tensor]], penalties: Mapping[str, Tensor]) -> Tensor:
        """Log every term where the loggers write; return the total loss. Nothing here waits for the device."""
        per_task = {task: torch.stack(list(terms.values())).sum() for task, terms in values.items()}
        total = torch.stack([*per_task.values(), *penalties.values()]).sum()
        self.finite.losses(per_task, self.trainer.global_step)
        named = {f"train/{task}/{name}": value for task, terms in values.items() for name, value in terms.items()}
        self._latest |= {**named, **{f"train/penalty/{k}": v for k, v in penalties.items()}, "train/loss": total}
        if self.trainer._logger_connector.should_update_logs or self.trainer.fast_dev_run:
            self.log_dict(self._latest, batch_size=1)  # of tasks that other steps served too
        return total

    # --- a step that is not finite changes nothing, and ends the run at the next logging interval

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        step = self.trainer.global_step
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.finite.updated(self.model.learnables(), step)
        with torch.no_grad():
            self.model.rule.project_()
        optimizer.zero_grad()  # Lightning does so too, but only after the next forwards
        self._served.clear()

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        for task in set(self.model.tasks) - self._served:  # momentum must not move what this step says nothing of
            for part in self.model.chain(task):
                for parameter in part.parameters():
                    parameter.grad = None
        self.finite.gradients(self.model.learnables(), self.trainer.global_step)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.trainer.should_stop:  # asked for just now: the loggers write once more
            self.log_dict(self._latest, batch_size=1)
        if self.trainer.fit_loop.epoch_loop.batch_progress.total.ready % max(1, self.trainer.log_every_n_steps) == 0:
            self.finite.raise_if_marked()

    def on_train_end(self) -> None:
        self.finite.raise_if_marked()

    def teardown(self, stage: str) -> None:
        self._fixed.close()

    # --- evaluation: the weights are merged once for all batches

    def on_validation_start(self) -> None:
        self._stack.enter_context(self.model.applied())

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        logits_BC = self.model(batch, task=self._metric_tasks[dataloader_idx])
        self.metrics[dataloader_idx].update(logits_BC, batch["label"])  # type: ignore[operator]

    def on_validation_epoch_end(self) -> None:
        scores = {}
        for task, metric in zip(self._metric_tasks, self.metrics, strict=True):
            scores[task], collapse = score(task, metric.compute())  # type: ignore[operator]
            metric.reset()  # type: ignore[operator]
            if collapse is not None:
                log.warning(
                    "Task '%s' is collapsing: %.0f %% of its predictions are one class; its largest holds %.0f %%.",
                    *(task, 100 * collapse.predicted, 100 * collapse.true),
                )
        self.log_dict({f"val/{task}/accuracy": value for task, value in scores.items()})
        self.log("val/accuracy", sum(scores.values()) / max(1, len(scores)), prog_bar=True)

    def on_validation_end(self) -> None:
        self._stack.close()

    # --- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = {}
        state = training_state(self.model, self.trainer.optimizers)
        teachers = self._teachers.keys if self._teachers is not None else {}
        run = {"phase": self._phase, "trained": list(trained_names(self.model)), "teachers": dict(teachers)}
        checkpoint["adamerge"] = {**state, **run}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        restore(self.model, checkpoint)
        if self._teachers is not None:
            self._teachers.check(checkpoint["adamerge"]["teachers"])
        optimizer = self.configure_optimizers()
        reconcile_optimizer(checkpoint, optimizer["optimizer"] if isinstance(optimizer, dict) else optimizer)
