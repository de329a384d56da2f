"""Every shipped configuration is parsed and run for two steps; every comment in it says why, not what."""

from pathlib import Path

import pytest
import torch

import adamerge

CONFIGS = Path(__file__).parent.parent / "configs"
STACKED = {"digits_supervised.yaml": ["digits.yaml", "digits_supervised.yaml"]}


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.name)
def test_configuration_runs(path, tmp_path):
    files = [CONFIGS / name for name in STACKED.get(path.name, [path.name])]
    run = adamerge.train(files, **{"trainer.max_steps": 2, "run.root": str(tmp_path), "run.baselines": False})
    assert run.dir.parent.name == path.stem
    for parameter in run.learned.learnables().values():
        assert bool((parameter != 0.3).any())


def test_supervised_beats_task_arithmetic_by_five_points_over_three_seeds(tmp_path):
    """Training really learns: on the digits, from labels of the unlabeled split, scored on the test split."""
    files = [CONFIGS / "digits.yaml", CONFIGS / "digits_supervised.yaml"]
    gains = []
    for seed in range(3):
        options = {"seed_everything": seed, "data.seed": seed, "run.root": str(tmp_path), "run.baselines": seed == 0}
        run = adamerge.train(files, **options)
        if seed == 0:
            arithmetic = run.scores["task arithmetic"]
        gains.append(sum(run.scores["this merge"][task] - arithmetic[task] for task in arithmetic) / len(arithmetic))
    assert torch.tensor(gains).mean() >= 0.05, gains
