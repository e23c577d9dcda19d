"""Kills the workers and the command of a batch prediction at random moments, and compares the rows at the end.

    python -m tests.fuzz.batch_kills --engine local --images 2000 --worker-kills 10 --command-kills 5 --seed 0

The images are links to the photos in ``examples/``, the model is a small one with random weights. With the engine
"local" one start also finds a full disk (the size of files is limited). At the end every path must have exactly one
row, the rows must equal those of a run that nothing disturbed, and no other file may be in the folder.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from refinedet import RefineDet
from refinedet.config import ModelConfig

PHOTOS = sorted((Path(__file__).parents[2] / "examples").glob("*.jpg"))
WORKERS = {"local": "refinedet.bulk.worker", "ray": "ray::_Actor"}
"""What the command line of a worker holds."""
SMALL = 4_000
"""Bytes of the largest file on the full disk; a part of 20 rows or more is larger."""


def prepare(folder: Path, images: int) -> None:
    """A model, and links to a few photos under many names."""
    torch.manual_seed(0)
    config = ModelConfig(backbone="resnet18", num_classes=2, image_size=(64, 64), tcb_channels=8, tcb_batch_norm=True)
    RefineDet(config, ("cat", "dog")).save_pretrained(folder / "model")
    (folder / "photos").mkdir()
    for index in range(images):
        (folder / "photos" / f"{index:05d}.jpg").symlink_to(PHOTOS[index % len(PHOTOS)])


def start(folder: Path, out: Path, engine: str, workers: int, *, small: bool = False) -> subprocess.Popen[str]:
    """The command in a process of its own."""
    call = [
        sys.executable, "-m", "refinedet", "batch", str(folder / "model"), str(folder / "photos"), "--out", str(out),
        "--engine", engine, "--workers", str(workers), "--threshold", "0.2", "--batch-size", "4", "--rows-per-part",
        "100", "--device", "cpu",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80", "RAY_USAGE_STATS_ENABLED": "0"}

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL, SMALL))

    return subprocess.Popen(
        call, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment,
        preexec_fn=limit if small else None,
    )  # fmt: skip


def rows_of(out: Path) -> Any:
    """All rows by path."""
    return pa.concat_tables([pq.read_table(part) for part in sorted(out.glob("part-*.parquet"))]).sort_by("path")


def workers_of(engine: str, command: subprocess.Popen[str]) -> list[int]:
    """The workers that are there."""
    parent = ["-P", str(command.pid)] if engine == "local" else []
    listed = subprocess.run(
        ["pgrep", *parent, "-f", WORKERS[engine]], capture_output=True, text=True, check=False
    ).stdout
    return [int(line) for line in listed.split()]


def disturb(
    folder: Path, out: Path, engine: str, workers: int, moments: list[str], pause: float, rng: random.Random
) -> dict[str, int]:
    """Start the command until all images are done; counts of what was killed.

    Args:
        folder: what ``prepare`` filled.
        out: for the parts.
        engine: "local" or "ray".
        workers: number of workers.
        moments: "worker" for each kill of a worker, "command" for each of the command.
        pause: longest time between two kills in seconds.
        rng: decides on the order and the times.
    """
    rng.shuffle(moments)
    counts = {"starts": 0, "worker": 0, "command": 0}
    while True:
        counts["starts"] += 1
        command = start(folder, out, engine, workers)
        while command.poll() is None and moments:
            time.sleep(rng.uniform(0.05, pause))
            if moments[0] == "worker" and (there := workers_of(engine, command)):
                os.kill(rng.choice(there), signal.SIGKILL)
                counts[moments.pop(0)] += 1
            elif moments[0] == "command" and (out / "_manifest.json").exists() and rng.random() < 0.3:
                command.kill()
                counts[moments.pop(0)] += 1
        error = command.communicate()[1]
        if command.returncode == 0:
            return counts
        if command.returncode != -signal.SIGKILL:
            raise AssertionError(f"exit code {command.returncode}: {error[-2000:]}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what was killed and what was wrong at the end; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=list(WORKERS), default="local")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--worker-kills", type=int, default=10)
    parser.add_argument("--command-kills", type=int, default=5)
    parser.add_argument("--pause", type=float, default=10.0, help="longest time between two kills in seconds")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args(arguments)
    folder, began, faults = Path(tempfile.mkdtemp(prefix="batch-kills-")), time.monotonic(), []
    try:
        prepare(folder, chosen.images)
        calm = start(folder, folder / "calm", "local", chosen.workers)
        error = calm.communicate()[1]
        assert calm.returncode == 0, error
        out = folder / "disturbed"
        full = ""
        if chosen.engine == "local":
            command = start(folder, out, chosen.engine, chosen.workers, small=True)
            error = command.communicate()[1].strip()
            full = ", one full disk"
            if command.returncode != 1 or "disk full" not in error[-300:]:
                faults.append(f"full disk: exit code {command.returncode}, {error[-300:]}")
        counts = disturb(
            folder, out, chosen.engine, chosen.workers,
            ["worker"] * chosen.worker_kills + ["command"] * chosen.command_kills, chosen.pause,
            random.Random(chosen.seed),
        )  # fmt: skip
        if not rows_of(out).equals(rows_of(folder / "calm")):
            faults.append("the rows differ from those of an undisturbed run")
        if len(set(rows_of(out)["path"].to_pylist())) != chosen.images or len(rows_of(out)) != chosen.images:
            faults.append(f"{len(rows_of(out))} rows for {chosen.images} images")
        left = [path.name for path in out.iterdir() if path.suffix != ".parquet" and path.name != "_manifest.json"]
        if left:
            faults.append(f"files left behind: {left[:5]}")
        manifest = json.loads((out / "_manifest.json").read_text())
        if (manifest["images"], manifest["failed"], manifest["complete"]) != (chosen.images, 0, True):
            faults.append(f"the manifest counts {manifest['images']} images, {manifest['failed']} failed")
        for fault in faults:
            print(fault)
        print(
            f"{chosen.engine}: {chosen.images} images, {counts['worker']} workers and {counts['command']} commands "
            f"killed{full}, {counts['starts']} starts: {len(faults)} things wrong, {time.monotonic() - began:.0f} s"
        )
        return 1 if faults else 0
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
