"""The command as a user starts it, as processes."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

import adamerge
from adamerge.artifact import open_merge
from adamerge.cli import fit, main

ROOT = Path(__file__).parent.parent


@pytest.fixture
def write(config, tmp_path):
    """Writes a configuration file of the tiny pool and returns its path."""

    def write(**sections):
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(config(**sections)))
        return path

    return write


def command(*arguments, launcher=("-m", "adamerge.fit"), **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **options.pop("env", {})}
    return subprocess.Popen(
        [sys.executable, *launcher, *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def finish(process, status=0, timeout=120):
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == status, f"{out}\n{err}"
    return out, err


def learned(root, name="config"):
    (folder,) = sorted((root / "runs" / name).iterdir())[-1:]
    model = open_merge(folder, trust=True)
    return {name: parameter.detach() for name, parameter in model.learnables().items()}


TRAINING = {
    "model": {"task_modules": [{"class_path": "tests.tiny.Shift"}],
              "objectives": [{"class_path": "adamerge.objectives.Entropy"}, {"class_path": "tests.tiny.Kept"}]},
    "trainer": {"max_steps": 4, "accumulate_grad_batches": 2},
    "data": {"batch_size": 4},
}  # fmt: skip


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(write, tmp_path):
    """Coefficients and adapters, accumulation 2, a filter that keeps other counts on each rank; two launchers."""
    one = write(**TRAINING)
    finish(command("--config", one))
    expected = learned(tmp_path)
    ddp = ["--config", one, "--data.batch_size", 2, "--trainer.strategy", "ddp", "--trainer.devices", 2]
    out, _ = finish(command(*ddp, "--run.name", "lightning"))
    assert out.count("Tasks:") == 1
    assert out.count("Run directory:") == 1
    torchrun = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29631", "-m", "adamerge.fit")
    finish(command(*ddp, "--run.name", "torchrun", launcher=torchrun))
    for name in ("lightning", "torchrun"):
        assert len(list((tmp_path / "runs" / name).iterdir())) == 1  # one directory, not one per rank
        found = learned(tmp_path, name)
        for key, value in expected.items():
            start = 0.3 if key.startswith("rule") else 0.0
            assert (value - start).abs().max() > 1e-3
            torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-6)  # sums in another order


@pytest.mark.slow
def test_a_failing_audit_ends_every_rank_with_one_paragraph(write, pool):
    pool["b"].write_bytes(pool["b"].read_bytes()[:-10])
    process = command("--config", write(), "--trainer.strategy", "ddp", "--trainer.devices", 2)
    _, err = finish(process, status=2)
    assert "b.safetensors is not a whole safetensors file" in err
    assert "Traceback" not in err


@pytest.fixture
def here(monkeypatch, capsys):
    """Runs the command in this process, which spares the imports; returns status, output and errors."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["adamerge.fit", *map(str, arguments)])
        try:
            status = main(fit)
        except SystemExit as leave:
            status = leave.code
        return status, *capsys.readouterr()

    return run


def test_help_and_print_config(write, here):
    status, out, _ = here("--help")
    assert status == 0
    for option in ("--config", "--model.rule", "--data.batch_size", "--trainer.max_steps", "--ckpt_path", "--run.dir"):
        assert option in out
    rule = ["--model.rule", "adamerge.rules.TaskWise", "--model.rule.init_args.init", "0.2", "--trainer.max_steps=7"]
    status, out, _ = here("--config", write(), *rule, "--print_config")
    assert status == 0
    printed = yaml.safe_load(out)
    assert printed["model"]["rule"]["class_path"] == "adamerge.rules.TaskWise"
    assert printed["model"]["rule"]["init_args"]["init"] == 0.2
    assert printed["model"]["rule"]["init_args"]["activation"] == "none"  # defaults are printed too
    assert printed["trainer"]["max_steps"] == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.lr", "1"], "lr"),
        (["--trainer.max_steps", "many"], "max_steps"),
        (["--model.base", "/nowhere/at/all"], "There is no checkpoint at '/nowhere/at/all'"),
        (["--config", "/nowhere.yaml"], "nowhere.yaml"),
        (["--model.rule.init_args.init", "2", "--model.rule.init_args.activation", "clamp"], "`rule.init` is 2.0"),
        (["--trainer.precision", "16-mixed"], "Use bf16-mixed, or 32"),
    ],
)
def test_errors_are_one_paragraph(write, here, arguments, message):
    path = write(model={"rule": {"class_path": "adamerge.rules.LayerWise"}})
    status, _, err = here("--config", path, *arguments)
    assert status == 2
    assert err.startswith("adamerge: ")
    assert message in err
    assert "usage:" not in err
    assert len(err) < 1200  # one names all configurations there are


def test_nothing_given_says_what_is_missing(here):
    status, _, err = here()
    assert status == 2
    assert "--config FILE" in err


@pytest.mark.slow_unless("15-143-2")
@pytest.mark.parametrize(
    ("number", "status", "ranks"), [(signal.SIGINT, 130, 1), (signal.SIGTERM, 143, 1), (signal.SIGTERM, 143, 2)]
)
def test_a_signal_loses_nothing(write, tmp_path, number, status, ranks):
    """The step is finished, the merge and a checkpoint are there, and going on from it gives the straight run."""
    options = {"accumulate_grad_batches": 2, "log_every_n_steps": 2}
    path = write(trainer={**options, "max_steps": 100000})
    several = ["--trainer.strategy", "ddp", "--trainer.devices", ranks] if ranks > 1 else []
    process = command("--config", path, *several)
    metrics = None
    for _ in range(600):
        time.sleep(0.1)
        found = list((tmp_path / "runs" / "config").glob("*/metrics.csv"))
        if found and found[0].stat().st_size > 200:
            metrics = found[0]
            break
    assert metrics is not None
    process.send_signal(number)
    out, _ = finish(process, status=status)
    steps = int(re.search(r"Stopped at step (\d+)", out).group(1))
    assert 0 < steps < 100000
    saved = learned(tmp_path)["rule.raw_TG"]
    if ranks == 1:
        config = yaml.safe_load(path.read_text())
        straight = adamerge.train(config, **{"trainer.max_steps": steps + 3, "run.name": "straight"})
        rest = adamerge.train(config, **{"trainer.max_steps": steps + 3}, ckpt_path=str(metrics.parent))
        assert not torch.equal(saved, rest.learned.rule.raw_TG)
        assert torch.equal(rest.learned.rule.raw_TG, straight.learned.rule.raw_TG)


@pytest.mark.slow
def test_the_same_bits_under_any_hash_seed(write, tmp_path):
    transforms = [{"class_path": f"adamerge.transforms.{name}"} for name in ("Trim", "ElectSign")]
    path = write(model={"transforms": transforms})
    torch_threads = torch.get_num_threads()
    expected = adamerge.train(path, **{"run.name": "here"}).learned.rule.raw_TG
    assert torch.get_num_threads() == torch_threads
    for seed in ("1", "2"):
        finish(command("--config", path, "--run.name", f"seed{seed}", env={"PYTHONHASHSEED": seed}))
        assert torch.equal(learned(tmp_path, f"seed{seed}")["rule.raw_TG"], expected)
