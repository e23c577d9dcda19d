"""Thousands of hostile inputs against the command line, each in a process of its own.

    python -m tests.fuzz.hostile --count 5000 --seed 0 --keep FOLDER

For every input it is checked that the command ends by itself with exit code 0, 1 or 2 and without a traceback, in less
than ``--seconds`` and with less than ``--memory`` MB more than an idle process, says at least one line where it fails,
and changes none of the files that it was given. A call whose output would replace a foreign file or one of its own
inputs must fail. Inputs that break a rule are kept in FOLDER with the command and its output.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import importlib
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tests.fuzz.calls import CALLS
from tests.fuzz.inputs import FILES
from tests.fuzz.material import LARGE, MODULES_FILE
from tests.fuzz.models import MODELS

BUILDERS = {**FILES, **MODELS, **CALLS}
REFUSED = ("targets",)
"""Kinds of which every input must be refused."""


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    """Exit code; below 0 the signal that ended it."""
    seconds: float
    work: float
    """Seconds of processor time."""
    megabytes: float
    """Memory at its highest."""
    errors: str
    output: str


@dataclass(frozen=True)
class Outcome:
    """What became of one input."""

    number: int
    kind: str
    fault: str
    """Empty where all is well."""
    ended: Ended


def digests(folder: Path) -> dict[str, str]:
    """Content of the regular files below a folder; what commands may write (out...) is left out."""
    found = {}
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not (Path(parent) == folder and name.startswith("out"))]
        for name in names:
            path = os.path.join(parent, name)
            status = os.lstat(path)
            if not stat.S_ISREG(status.st_mode) or name.startswith("out"):
                continue
            if status.st_size > LARGE:
                found[os.path.relpath(path, folder)] = f"{status.st_ino} {status.st_size} {status.st_mtime_ns}"
            else:
                with open(path, "rb") as stream:
                    found[os.path.relpath(path, folder)] = hashlib.sha1(stream.read()).hexdigest()
    return found


def run_isolated(arguments: list[str], folder: Path, seconds: float) -> Ended:
    """Run the command in a forked process, for so many seconds at most."""
    output, errors = folder / "out.stdout", folder / "out.stderr"
    began = time.perf_counter()
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            for stream, file in ((1, output), (2, errors)):
                os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
            sys.stderr = open(2, "w", closefd=False, errors="backslashreplace")  # noqa: SIM115
            os.chdir(folder)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            from refinedet.cli import main

            code = main(arguments)
            sys.stdout.flush()
            os._exit(code)
        except SystemExit as error:
            os._exit(error.code if isinstance(error.code, int) else 1)
        except BaseException:
            import traceback

            traceback.print_exc()
            sys.stderr.flush()
            os._exit(99)
    deadline = began + seconds
    while True:
        ended, status, usage = os.wait4(child, os.WNOHANG)
        if ended:
            break
        if time.perf_counter() > deadline:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
            _, status, usage = os.wait4(child, 0)
            break
        time.sleep(0.005)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    printed = [file.read_bytes().decode("utf-8", "replace") if file.exists() else "" for file in (errors, output)]
    return Ended(
        os.waitstatus_to_exitcode(status), time.perf_counter() - began, usage.ru_utime + usage.ru_stime,
        usage.ru_maxrss / 1024, *printed,
    )  # fmt: skip


def judge(ended: Ended, limits: tuple[float, float]) -> str:
    """What is wrong with how a command ended, or nothing."""
    printed = ended.errors + ended.output
    if ended.seconds >= limits[0]:
        return f"took {ended.seconds:.0f} s"
    if ended.code not in (0, 1, 2):
        return f"exit code {ended.code}"
    if "Traceback (most recent call last)" in ended.errors:
        return "traceback"
    if ended.megabytes > limits[1]:
        return f"{ended.megabytes:.0f} MB"
    if ended.code and not printed.strip():
        return f"exit code {ended.code} without a word"
    # Results on standard output may be long; JSON Lines are.
    if len(ended.errors) > 20_000 or any(len(line) > 2_100 for line in ended.errors.splitlines()):
        return f"{len(ended.errors)} characters of errors"
    if any(ord(letter) < 32 and letter not in "\n\t\r" for letter in printed):
        return "control characters printed"
    return ""


def try_input(
    number: int, seed: int, kinds: list[str], material: Path, keep: Path, limits: tuple[float, float]
) -> Outcome:
    """Build input ``number``, run its command, judge."""
    kind = kinds[number % len(kinds)]
    rng = np.random.default_rng([seed, number])
    folder = Path(tempfile.mkdtemp(prefix=f"hostile-{number}-"))
    try:
        arguments = BUILDERS[kind](rng, folder, material)
        before = digests(folder)
        ended = run_isolated(arguments, folder, limits[0])
        fault = judge(ended, limits)
        if kind in REFUSED and ended.code == 0:
            fault = fault or "was not refused"
        after = digests(folder)
        changed = [name for name in before if after.get(name) != before[name]]
        if changed:
            fault = fault or f"changed {changed[0]!r}"
        if fault:
            (folder / "out.command").write_text(repr(arguments) + "\n" + fault + "\n", errors="backslashreplace")
            shutil.copytree(
                folder, keep / f"{kind}-{seed}-{number}", symlinks=True, copy_function=_copy, dirs_exist_ok=True
            )
        return Outcome(number, kind, fault, ended)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _copy(source: str, target: str) -> str:
    if stat.S_ISREG(os.lstat(source).st_mode) and os.path.getsize(source) < 5_000_000:
        shutil.copy2(source, target)
    return target


def run(
    count: int,
    seed: int,
    kinds: list[str],
    keep: Path,
    limits: tuple[float, float],
    *,
    start: int = 0,
    material: Path | None = None,
) -> list[Outcome]:
    """All outcomes; faults are printed as they come."""
    keep.mkdir(parents=True, exist_ok=True)
    os.environ["REFINEDET_DEBUG"] = "1"
    with contextlib.ExitStack() as stack:
        if material is None:
            material = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hostile-material-")))
        if not (material / MODULES_FILE).exists():
            # In a process of its own: once autograd has run, a process cannot be forked and train.
            name = str(material.absolute())
            program = f"from pathlib import Path; from tests.fuzz.material import prepare; prepare(Path({name!r}))"
            subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
        import torch

        for module in (material / MODULES_FILE).read_text().splitlines():  # once, not in each of the forked processes
            with contextlib.suppress(Exception):
                importlib.import_module(module)
        torch.set_num_threads(1)
        gc.freeze()  # a collection in a forked process would copy every page
        idle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        outcomes = []
        for number in range(start, start + count):
            try:
                outcome = try_input(number, seed, kinds, material, keep, (limits[0], limits[1] + idle))
            except KeyboardInterrupt:
                break  # what there is counts
            outcomes.append(outcome)
            if outcome.fault:
                print(f"{outcome.kind}-{seed}-{number}: {outcome.fault}", flush=True)
            if (number - start) % 100 == 99:
                print(f"{number - start + 1} inputs done", file=sys.stderr, flush=True)
        return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", default=list(BUILDERS), choices=list(BUILDERS))
    parser.add_argument("--keep", type=Path, default=Path(tempfile.gettempdir()) / "hostile")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--memory", type=float, default=2000.0, help="MB above the idle process")
    parser.add_argument("--material", type=Path, help="folder of valid files; made if it is empty, used again if not")
    call = parser.parse_args()
    limits = (call.seconds, call.memory)
    outcomes = run(call.count, call.seed, call.kinds, call.keep, limits, start=call.start, material=call.material)
    for kind in call.kinds:
        own = [outcome for outcome in outcomes if outcome.kind == kind]
        if own:
            ends = [outcome.ended for outcome in own]
            codes = "/".join(str(sum(ended.code == code for ended in ends)) for code in (0, 1, 2))
            print(
                f"{kind:<8} {len(own):>5} inputs  exit 0/1/2: {codes}  "
                f"faults {sum(bool(outcome.fault) for outcome in own)}  "
                f"longest {max(ended.seconds for ended in ends):.1f} s  "
                f"most {max(ended.megabytes for ended in ends):.0f} MB  "
                f"work {sum(ended.work for ended in ends) / len(own):.2f} s"
            )
    faults = sum(bool(outcome.fault) for outcome in outcomes)
    print(f"{len(outcomes)} inputs, {faults} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
