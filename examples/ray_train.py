"""Train on several machines with Ray Train; a worker or a machine that dies costs the iterations since the last save.

    ray start --head                                  # and on the others: ray start --address=HEAD:6379
    python examples/ray_train.py --data /shared/photos --out /shared/runs/a --workers 4

The data and the run folder lie on a file system that all machines see. Ray starts the workers again after a failure,
and the same call to ``train`` then goes on from the last checkpoint, as it does under torchrun and Slurm.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer


def work(settings: dict[str, Any]) -> None:
    """What each worker does: one process of a training."""
    from refinedet import train

    train(settings["preset"], settings["data"], out=settings["out"], **settings["options"])


def main(arguments: list[str] | None = None, options: dict[str, Any] | None = None) -> None:
    """Train with as many workers as asked for.

    Args:
        arguments: of the command line.
        options: further arguments of ``train``.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="finetune")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="the run folder")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gpu", action="store_true", help="one GPU for each worker")
    parser.add_argument("--failures", type=int, default=3, help="how often the workers are started again")
    chosen = parser.parse_args(arguments)
    paths = {"data": str(chosen.data.resolve()), "out": str(chosen.out.resolve())}
    trainer = TorchTrainer(
        work,
        train_loop_config={"preset": chosen.preset, **paths, "options": options or {}},
        scaling_config=ScalingConfig(num_workers=chosen.workers, use_gpu=chosen.gpu),
        run_config=RunConfig(
            name=chosen.out.name,
            storage_path=str(chosen.out.resolve().parent / "ray"),
            failure_config=FailureConfig(max_failures=chosen.failures),
        ),
    )
    trainer.fit()


if __name__ == "__main__":
    ray.init(address=os.environ.get("RAY_ADDRESS"))
    main()
