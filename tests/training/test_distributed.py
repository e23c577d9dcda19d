"""Two processes under torchrun: restarts after kills, and one line when something is wrong."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from conftest import FolderFactory
from refinedet.errors import UsageError
from refinedet.training.distributed import launch_command, share_of

SOURCE = Path(__file__).parents[2] / "src"


def torchrun(
    data: Path, out: Path, *arguments: str, restarts: int = 0, program: Sequence[str] = ("-m", "refinedet")
) -> subprocess.Popen[str]:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts",
        str(restarts), *program, "train", "smoke", "--data", str(data), "--out", str(out), "--train-split",
        "train", "--evaluate-split", "none", "--init-weights", "random", "--device", "cpu", "--batch-size", "5",
        "--iterations", "12", "--save-every", "2", "--log-every", "1", "--workers", "0", *arguments,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SOURCE)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def ranks(launcher: subprocess.Popen[str]) -> list[int]:
    listed = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(launcher.pid)], capture_output=True, text=True, check=False
    )
    return [int(line) for line in listed.stdout.split()]


@pytest.mark.slow  # seven starts of torch
@pytest.mark.timeout(1200)
def test_a_rank_that_is_killed_three_times_changes_nothing(voc_folder: FolderFactory, tmp_path: Path) -> None:
    data = voc_folder(images=12)
    text = torchrun(data, tmp_path / "whole").communicate(timeout=600)[0]
    assert "trained:" in text, text[-3000:]
    launcher = torchrun(data, tmp_path / "killed", restarts=3)
    for number in range(3):
        checkpoint = tmp_path / "killed/last.ckpt"
        before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        while launcher.poll() is None and not (checkpoint.exists() and checkpoint.stat().st_mtime_ns > before):
            time.sleep(0.02)
        os.kill(ranks(launcher)[number % 2], signal.SIGKILL)
    text = launcher.communicate(timeout=600)[0]
    assert launcher.returncode == 0, text[-3000:]
    one, other = (torch.load(tmp_path / name / "last.ckpt", weights_only=True) for name in ("whole", "killed"))
    assert one["iteration"] == other["iteration"] == 12
    assert all(torch.equal(value, other["network"][name]) for name, value in one["network"].items())


@pytest.mark.slow  # starts torch twice
def test_one_line_for_all_processes(voc_folder: FolderFactory, tmp_path: Path) -> None:
    data = voc_folder(images=12)
    launcher = torchrun(data, tmp_path / "run", "--batch-size", "1")
    text = launcher.communicate(timeout=300)[0]
    assert launcher.returncode != 0
    assert len(re.findall(r"^error: .*cannot be shared by 2 processes; raise --batch-size$", text, re.MULTILINE)) == 1
    assert "site-packages/refinedet" not in text


@pytest.mark.slow  # starts torch twice, twice
def test_one_process_reads_the_annotations(voc_folder: FolderFactory, tmp_path: Path) -> None:
    data = voc_folder(images=12)
    program = tmp_path / "told.py"
    program.write_text(
        "import os, sys\n"
        "from pathlib import Path\n"
        f"told = Path({str(tmp_path)!r}) / ('opened-by-' + os.environ['RANK'])\n"
        "def hook(event, arguments):\n"
        "    if event == 'open' and str(arguments[0]).endswith(('.xml', '.txt')) and 'voc' in str(arguments[0]):\n"
        "        os.write(file, os.fsencode(arguments[0]) + b'\\n')\n"
        "file = os.open(told, os.O_CREAT | os.O_WRONLY)\n"
        "sys.addaudithook(hook)\n"
        "from refinedet.cli import main\n"
        "sys.exit(main())\n"
    )
    text = torchrun(data, tmp_path / "run", "--iterations", "2", program=[str(program)]).communicate(timeout=300)[0]
    assert "trained:" in text, text[-3000:]
    opened = [(tmp_path / f"opened-by-{rank}").read_text().splitlines() for rank in range(2)]
    assert len({line for line in opened[0] if line.endswith(".xml")}) == 12  # of all splits, for their class names
    assert opened[1] == []

    (data / "Annotations/000002.xml").write_text("<annotation")
    text = torchrun(data, tmp_path / "faulty", program=[str(program)]).communicate(timeout=300)[0]
    assert len(re.findall(r"^error: .*000002\.xml: ", text, re.MULTILINE)) == 1, text[-3000:]


def test_shares_differ_by_one_at_most() -> None:
    assert [list(share_of(5, rank, 2)) for rank in range(2)] == [[0, 1], [2, 3, 4]]
    with pytest.raises(UsageError, match="a pass of 1 images cannot be shared by 2 processes"):
        share_of(1, 0, 2)


def test_what_to_type_names_torchrun_where_it_was_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert launch_command("train --resume a") == "refinedet train --resume a"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert launch_command("train --resume a") == "torchrun --nproc-per-node 4 -m refinedet train --resume a"
