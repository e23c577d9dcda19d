from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

import refinedet
from refinedet import cli
from refinedet.cli.flags import fields_in
from refinedet.errors import RefineDetError
from refinedet.presets import PRESETS
from refinedet.schedule import change_preset, values_of

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The calls that reach the trainer."""
    calls: list[tuple[Any, ...]] = []
    module = types.ModuleType("refinedet.training.train")

    def train(preset: str, data: list[str], **rest: Any) -> None:
        # Fields of the configuration are given by their names; what is left are the other arguments.
        changes = values_of(PRESETS[preset], rest)
        changes = {name: rest.pop(name) for name in changes}
        calls.append((change_preset(PRESETS[preset], changes), data, rest))

    module.train = train  # type: ignore[attr-defined]
    module.resume = lambda folder, **rest: calls.append((folder, rest))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "refinedet.training.train", module)
    return calls


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str], code: int = 2) -> str:
    """The one line in which a command ends."""
    assert cli.main([str(argument) for argument in arguments]) == code
    output = capsys.readouterr()
    lines = output.err.splitlines()
    assert len(lines) == 1, output.err
    assert lines[0].startswith("error: ")
    return lines[0]


# Starting ------------------------------------------------------------------------------------------------------------


def test_help_of_every_verb_is_light() -> None:
    program = (
        "import sys\nfrom refinedet.cli import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit as error: assert not error.code\n"
        "heavy = [m for m in ('torch', 'torchvision', 'numpy', 'PIL', 'huggingface_hub') if m in sys.modules]\n"
        "assert not heavy, heavy"
    )
    for verb in cli.VERBS:
        done = subprocess.run([sys.executable, "-c", program, verb, "--help"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert f"refinedet {verb}" in done.stdout


def test_import_is_light_and_names_are_lazy() -> None:
    program = (
        "import sys, refinedet\n"
        "assert 'torch' not in sys.modules\n"
        "refinedet.PRESETS, refinedet.Detections\n"
        "assert 'torch' not in sys.modules\n"
        "assert set(refinedet.__all__) <= set(dir(refinedet))\n"
        "from refinedet import *\n"
        "assert RefineDet.__name__ == 'RefineDet'"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        refinedet.nothing  # noqa: B018


def test_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "refinedet", "predcit"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: unknown command 'predcit': did you mean 'predict'?\n"


def test_overview_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, code in ((["--help"], 0), ([], 2)):
        assert cli.main(arguments) == code
        overview = capsys.readouterr().out
        assert all(f"\n  {verb} " in overview for verb in cli.VERBS)
        assert [line for line in overview.splitlines() if len(line) > 80] == []
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"refinedet {refinedet.__version__}\n"
    assert "known: batch, " in refused(capsys, ["zzz"])


# How commands end ----------------------------------------------------------------------------------------------------


def test_interrupt_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> int:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.VERBS, "models", interrupted)
    assert refused(capsys, ["models"], 130) == "error: interrupted"


def test_a_bug_is_one_line_and_a_traceback_on_request(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def buggy() -> int:
        raise ZeroDivisionError("1 by\n0")

    monkeypatch.setitem(cli.VERBS, "models", buggy)
    with pytest.raises(ZeroDivisionError):  # all tests run with REFINEDET_DEBUG=1
        cli.main(["models"])
    monkeypatch.delenv("REFINEDET_DEBUG")
    assert "unexpected ZeroDivisionError (1 by 0); this is a fault of refinedet" in refused(capsys, ["models"], 1)


def test_full_gpu_memory_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class OutOfMemoryError(RuntimeError):
        pass

    def hungry() -> int:
        raise OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setitem(cli.VERBS, "models", hungry)
    assert "smaller --batch-size" in refused(capsys, ["models"], 1)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")
def test_closed_pipe_is_quiet() -> None:
    program = "import sys\nfrom refinedet.cli import main\nsys.exit(main(['models']))"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 141
    process.stderr.close()


def test_several_lines_of_a_message_become_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing() -> int:
        raise RefineDetError("a.json: bad\n  at line 3")

    monkeypatch.setitem(cli.VERBS, "models", failing)
    assert refused(capsys, ["models"], 1) == "error: a.json: bad at line 3"


# train ---------------------------------------------------------------------------------------------------------------


def test_train_passes_everything_on(
    trainer: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    weights = tmp_path / "w.safetensors"
    weights.touch()
    command = (
        f"train voc07-320-resnet18 --data a b --out {tmp_path}/run --iterations 100 --batch-size 8 --ema-decay None "
        f"--precision fp32 --milestones 5 6 --no-channels-last --augment.flip-probability 0 "
        f"--augment.interpolations linear area --loss.arm-positive-iou 0.6 --model.image-size 512 320 "
        f"--model.inference.nms-iou 0.5 --init-weights {weights} --class-names cat,dog --device cpu"
    )
    assert cli.main(command.split()) == 0
    ((preset, data, rest),) = trainer
    assert data == ["a", "b"]
    assert rest == {
        "out": tmp_path / "run", "init_weights": weights, "class_names": ("cat", "dog"), "device": "cpu",
        "init": None, "classes": None, "evaluate_data": [], "group_by": None, "skip_broken": False, "epochs": None,
        "minutes": None, "loggers": (),
    }  # fmt: skip
    assert (preset.train.iterations, preset.train.batch_size, preset.train.ema_decay) == (100, 8, None)
    assert (preset.train.precision, preset.train.milestones, preset.train.channels_last) == ("fp32", (5, 6), False)
    assert (preset.train.augment.flip_probability, preset.train.loss.arm_positive_iou) == (0, 0.6)
    assert preset.train.augment.interpolations == ("linear", "area")
    assert (preset.model.image_size, preset.model.inference.nms_iou) == ((512, 320), 0.5)
    # What was not said is as in the preset.
    theirs = PRESETS["voc07-320-resnet18"]
    assert (preset.train.learning_rate, preset.train.schedule) == (theirs.train.learning_rate, theirs.train.schedule)
    assert (preset.model.backbone, preset.model.tcb_channels) == ("resnet18", 128)
    assert str(tmp_path / "run") in capsys.readouterr().out


@pytest.mark.parametrize("name", PRESETS)
def test_train_defaults_are_those_of_the_preset(name: str, trainer: list[Any]) -> None:
    assert cli.main(["train", name, "--data", "a"]) == 0
    preset, _, rest = trainer[0]
    assert preset == PRESETS[name]
    assert rest["out"] == Path("runs") / name
    assert rest["init_weights"] is None
    assert rest["class_names"] is None
    assert rest["init"] is None


def test_train_needs_no_preset(trainer: list[Any]) -> None:
    command = (
        "train --data a --minutes 20 --classes cat,dog --evaluate-data b --group-by (.*)_ --skip-broken "
        "--loggers wandb mlflow"
    )
    assert cli.main(command.split()) == 0
    preset, _, rest = trainer[0]
    assert preset == PRESETS["finetune"]
    assert rest["out"] == Path("runs/finetune")
    assert (rest["minutes"], rest["classes"], rest["evaluate_data"]) == (20.0, ("cat", "dog"), ["b"])
    assert (rest["group_by"], rest["skip_broken"], rest["loggers"]) == ("(.*)_", True, ("wandb", "mlflow"))


def test_a_flag_with_the_value_of_the_preset_counts_as_given() -> None:
    arguments = [
        "--iterations",
        "300",
        "--model.image-size",
        "320",
        "320",
        "--augment.no-crop",
        "--seed=0",
        "--out",
        "runs/a",
    ]
    assert fields_in(arguments) == ("iterations", "image_size", "crop", "seed", "out")
    assert values_of(PRESETS["finetune"], fields_in(arguments)).keys() == {"iterations", "image_size", "crop", "seed"}


def test_train_from_a_detector(trainer: list[Any]) -> None:
    assert cli.main(["train", "smoke", "--data", "a", "--init", "voc07-320-resnet18"]) == 0
    assert trainer[0][2]["init"] == "voc07-320-resnet18"
    assert trainer[0][2]["init_weights"] is None


def test_train_resume(trainer: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--resume", str(tmp_path), "--device", "cpu"]) == 0
    rest = {"data": None, "workers": None, "device": "cpu", "iterations": None, "epochs": None}
    assert trainer == [(tmp_path, rest)]
    capsys.readouterr()
    assert "no such run folder" in refused(capsys, ["train", "--resume", tmp_path / "absent"])
    assert "--batch-size" in refused(capsys, ["train", f"--resume={tmp_path}", "--batch-size", "5"])
    assert len(trainer) == 1
    assert cli.main(["train", "--resume", str(tmp_path), "--iterations", "50", "--data", "b"]) == 0
    assert (trainer[1][1]["iterations"], trainer[1][1]["data"]) == (50, ("b",))


def test_only_the_first_process_talks(
    trainer: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["train", "smoke", "--data", "a"]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train", "nothing to train on"),
        ("train --out a smoke", "the preset comes first"),
        ("train voc07-320-vgg61 --data a", "unknown preset 'voc07-320-vgg61': did you mean 'voc07-320-vgg16'?"),
        ("train smoke", "nothing to train on: refinedet train smoke --data DATA"),
        ("train smoke --data a --iterationz 3", "unknown option '--iterationz': did you mean '--iterations'?"),
        ("train smoke --data a --iterations x", "--iterations"),
        (
            "train smoke --data a --ema-decay none",
            "--ema-decay must be a number or None, not 'none'; see",
        ),
        ("train smoke --data a --iterations 0", "iterations must be at least 1, not 0"),
        (
            "train smoke --data a --model.image-size 321 320",
            "image_size must be a multiple of 64, not 321 in (321, 320)",
        ),
        ("train smoke --data a --model.backbone vgg17", "'vgg16', 'resnet18'"),
        ("train smoke --data a --init-weights nope.bin", "nope.bin: no such file"),
        ("train smoke --data a --init b --init-weights random", "give one of them"),
        ("train smoke --data a --class-names cat,,dog", "different names separated by commas"),
        ("train smoke --data a --class-names cat,cat", "different names separated by commas"),
    ],
)
def test_wrong_training_calls(
    command: str, message: str, trainer: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(capsys, command.split())
    assert not trainer
