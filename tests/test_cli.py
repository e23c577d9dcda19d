from __future__ import annotations

import json
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import refinedet
from conftest import FullDisk
from refinedet import cli
from refinedet.config import ModelConfig
from refinedet.detections import Detections
from refinedet.errors import RefineDetError
from refinedet.presets import PRESETS

VERBS = ("train", "evaluate", "predict", "inspect", "ablate", "benchmark", "convert", "models")
EXAMPLES = Path(__file__).parents[1] / "examples"


class StubDetector:
    """Finds a dog in the left half of every image."""

    class_names = ("cat", "dog")
    config = ModelConfig(num_classes=2)
    batches: list[int]

    def __init__(self) -> None:
        self.batches = []

    def predict_arrays(self, images: list[Any], *, threshold: float | None = None) -> list[Detections]:
        self.batches.append(len(images))
        found = []
        for image in images:
            height, width = image.shape[:2]
            one = Detections([[0, 0, width / 2, height]], [0.75], [1], self.class_names, (width, height))  # type: ignore[arg-type]
            found.append(one.filter(threshold=threshold))
        return found


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> StubDetector:
    """The command line gets this detector for the name "stub" and refuses every other."""
    detector = StubDetector()

    class RefineDet:
        @classmethod
        def from_pretrained(cls, name: str, *, device: object) -> StubDetector:
            if name != "stub":
                raise RefineDetError(f"{name}: corrupt")
            return detector

    module = types.ModuleType("refinedet.detector")
    module.RefineDet = RefineDet  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "refinedet.detector", module)
    return detector


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The calls that reach the trainer."""
    calls: list[tuple[Any, ...]] = []
    module = types.ModuleType("refinedet.training.train")
    module.train = lambda preset, data, **rest: calls.append((preset, data, rest))  # type: ignore[attr-defined]
    module.resume = lambda folder, **rest: calls.append((folder, rest))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "refinedet.training.train", module)
    return calls


@pytest.fixture
def photo(tmp_path: Path) -> Callable[..., Path]:
    """Writes a small picture and returns its path."""

    def make(name: str, size: tuple[int, int] = (40, 30)) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (200, 100, 50)).save(path)
        return path

    return make


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
    for verb in VERBS:
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
        assert all(f"\n  {verb} " in overview for verb in VERBS)
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"refinedet {refinedet.__version__}\n"
    assert "known: train" in refused(capsys, ["zzz"])


# How commands end ----------------------------------------------------------------------------------------------------


def test_interrupt_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(arguments: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli._VERBS, "models", interrupted)
    assert refused(capsys, ["models"], 130) == "error: interrupted"


def test_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def buggy(arguments: list[str]) -> int:
        raise ZeroDivisionError

    monkeypatch.setitem(cli._VERBS, "models", buggy)
    with pytest.raises(ZeroDivisionError):
        cli.main(["models"])


def test_full_gpu_memory_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class OutOfMemoryError(RuntimeError):
        pass

    def hungry(arguments: list[str]) -> int:
        raise OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setitem(cli._VERBS, "models", hungry)
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
    def failing(arguments: list[str]) -> int:
        raise RefineDetError("a.json: bad\n  at line 3")

    monkeypatch.setitem(cli._VERBS, "models", failing)
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
        "out": tmp_path / "run", "backbone_weights": weights, "class_names": ("cat", "dog"), "device": "cpu",
        "init": None,
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
    assert rest["backbone_weights"] == "torchvision"
    assert rest["class_names"] is None
    assert rest["init"] is None


def test_train_from_a_detector(trainer: list[Any]) -> None:
    assert cli.main(["train", "smoke", "--data", "a", "--init", "voc07-320-resnet18"]) == 0
    assert trainer[0][2]["init"] == "voc07-320-resnet18"
    assert trainer[0][2]["backbone_weights"] is None


def test_train_resume(trainer: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--resume", str(tmp_path), "--device", "cpu"]) == 0
    assert trainer == [(tmp_path, {"device": "cpu"})]
    capsys.readouterr()
    assert "no such run folder" in refused(capsys, ["train", "--resume", tmp_path / "absent"])
    assert "--iterations" in refused(capsys, ["train", f"--resume={tmp_path}", "--iterations", "5"])
    assert len(trainer) == 1


def test_only_the_first_process_talks(
    trainer: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["train", "smoke", "--data", "a"]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train", "the preset comes first"),
        ("train --out a smoke", "the preset comes first"),
        ("train voc07-320-vgg61 --data a", "unknown preset 'voc07-320-vgg61': did you mean 'voc07-320-vgg16'?"),
        ("train smoke", "nothing to train on: refinedet train smoke --data DATA"),
        ("train smoke --data a --iterationz 3", "--iterationz, 3 (did you mean --iterations?)"),
        ("train smoke --data a --iterations x", "--iterations"),
        ("train smoke --data a --ema-decay none", "--ema-decay wants FLOAT or None, not 'none'; see refinedet train"),
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


# predict -------------------------------------------------------------------------------------------------------------


def test_predict_table_copies_and_json(
    stub: StubDetector, photo: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [photo("one/a.jpg"), photo("two/a.jpg", (60, 20)), photo("two/b.png")]
    before = [path.read_bytes() for path in paths]
    out, result = tmp_path / "out", tmp_path / "deep" / "r.json"
    arguments = ["predict", "stub", paths[0], tmp_path / "two", "--save", out, "--json", result, "--batch-size", "2"]
    for _ in range(2):  # again: the copies are replaced, not multiplied
        assert cli.main([str(a) for a in arguments]) == 0
    assert sorted(file.name for file in out.iterdir()) == ["a-2.jpg", "a.jpg", "b.png"]
    assert stub.batches == [2, 1] * 2
    assert [path.read_bytes() for path in paths] == before
    assert np.asarray(Image.open(out / "a-2.jpg")).shape == (20, 60, 3)
    values = json.loads(result.read_text())
    assert [image["source"] for image in values["images"]] == [str(path) for path in paths]
    assert values["images"][0]["detections"] == [
        {"label": 1, "name": "dog", "score": 0.75, "box": [0.0, 0.0, 20.0, 30.0]}
    ]
    assert (values["model"], values["threshold"], values["failed"]) == ("stub", 0.4, [])
    output = capsys.readouterr()
    assert output.err == ""
    assert f"{paths[0]}  40x30  1 object\n" in output.out
    assert "dog" in output.out
    assert f"drawn: 3 images in {out}" in output.out


def test_predict_threshold(stub: StubDetector, photo: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["predict", "stub", str(photo("a.jpg")), "--threshold", "0.8"]) == 0
    assert "0 objects" in capsys.readouterr().out


def test_predict_never_touches_originals_or_other_files(
    stub: StubDetector, photo: Callable[..., Path], tmp_path: Path
) -> None:
    original, other = photo("photos/a.jpg"), photo("photos/b.jpg")
    elsewhere = photo("more/b.jpg")
    before = original.read_bytes(), other.read_bytes()
    assert cli.main(["predict", "stub", str(original), str(elsewhere), "--save", str(tmp_path / "photos")]) == 0
    assert (original.read_bytes(), other.read_bytes()) == before
    names = sorted(file.name for file in (tmp_path / "photos").iterdir())
    assert names == ["a-2.jpg", "a.jpg", "b-2.jpg", "b.jpg"]


def test_predict_goes_on_after_a_broken_image(
    stub: StubDetector, photo: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, cut, text = photo("a.jpg"), photo("b.jpg", (200, 200)), tmp_path / "c.jpg"
    cut.write_bytes(cut.read_bytes()[:400])
    text.write_text("not a picture")
    also_good = photo("d.jpg")
    files = [str(path) for path in (good, cut, text, also_good)]
    assert cli.main(["predict", "stub", *files, "--json", str(tmp_path / "r.json")]) == 1
    output = capsys.readouterr()
    assert [line.split(": ")[:2] for line in output.err.splitlines()] == [["error", str(cut)], ["error", str(text)]]
    assert output.out.count("1 object\n") == 2
    values = json.loads((tmp_path / "r.json").read_text())
    assert [image["source"] for image in values["images"]] == [str(good), str(also_good)]
    assert [failure["source"] for failure in values["failed"]] == [str(cut), str(text)]


def test_predict_coco_ids(stub: StubDetector, photo: Callable[..., Path], tmp_path: Path) -> None:
    result = tmp_path / "r.json"
    files = [str(photo("000000000139.jpg")), str(photo("285.jpg"))]
    assert cli.main(["predict", "stub", *files, "--json", str(result), "--json-format", "coco"]) == 0
    assert json.loads(result.read_text())[0] == {
        "image_id": 139, "category_id": 1, "bbox": [0.0, 0.0, 20.0, 30.0], "score": 0.75, "file_name": files[0]
    }  # fmt: skip
    assert [one["image_id"] for one in json.loads(result.read_text())] == [139, 285]
    files.append(str(photo("holiday.jpg")))
    assert cli.main(["predict", "stub", *files, "--json", str(result), "--json-format", "coco"]) == 0
    assert [one["image_id"] for one in json.loads(result.read_text())] == [1, 2, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "WEIGHTS"),
        (["stub"], "no images given"),
        (["stub", "nope.jpg"], "nope.jpg: no such file"),
        (["stub", "PHOTO", "--threshold", "2"], "--threshold must be between 0 and 1, not 2.0"),
        (["stub", "PHOTO", "--threshold", "nan"], "--threshold must be between 0 and 1, not nan"),
        (["stub", "PHOTO", "--batch-size", "0"], "--batch-size must be at least 1, not 0"),
        (["stub", "PHOTO", "--device", "gpu"], "unknown device 'gpu'"),
        (["stub", "PHOTO", "--theshold", "1"], "(did you mean --threshold?)"),
        (["stub", "PHOTO", "--json-format", "xml"], "'refinedet', 'coco'"),
        (["stub", "PHOTO", "--json", "FOLDER"], "is a folder"),
    ],
)
def test_wrong_prediction_calls(
    arguments: list[str], message: str, stub: StubDetector, photo: Callable[..., Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    given = {"PHOTO": str(photo("a.jpg")), "FOLDER": str(tmp_path)}
    assert message in refused(capsys, ["predict", *(given.get(argument, argument) for argument in arguments)])
    assert not stub.batches


def test_predict_failures_of_the_work(
    stub: StubDetector, photo: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = photo("a.jpg")
    assert "other: corrupt" in refused(capsys, ["predict", "other", path], 1)
    message = refused(capsys, ["predict", "stub", path, "--save", path / "x"], 1)
    assert "the folder cannot be made" in message
    assert "there is a file of that name" in refused(capsys, ["predict", "stub", path, "--save", path], 1)


def test_full_disk_keeps_the_previous_json(
    stub: StubDetector, photo: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    full_disk: FullDisk,
) -> None:  # fmt: skip
    result = tmp_path / "r.json"
    picture = photo("a.jpg")
    command = ["predict", "stub", str(picture), "--json", str(result)]
    assert cli.main(command) == 0
    earlier = result.read_text()
    with full_disk(20):
        assert cli.main(command) == 1
    reason = "cannot be saved (disk full, or the file is larger than allowed); the previous file is untouched"
    assert f"error: {result}: {reason}\n" == capsys.readouterr().err
    assert result.read_text() == earlier


@pytest.mark.parametrize(
    "command",
    ["predict stub PHOTO --json PHOTO", "predict stub PHOTO --json NOTES", "predict stub --json PHOTO OTHER",
     "inspect DATA --mosaic PHOTO", "evaluate stub DATA --submission NOTES.zip", "evaluate stub DATA --report REPORT",
     "convert NOTES.zip --preset smoke --out REPORT"],
)  # fmt: skip
def test_nothing_of_the_user_is_replaced(
    command: str, stub: StubDetector, photo: Callable[..., Path], voc_folder: Callable[..., Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    names = {"PHOTO": photo("a.jpg"), "OTHER": photo("b.jpg"), "DATA": voc_folder(), "NOTES.zip": tmp_path / "n.zip",
             "NOTES": tmp_path / "notes.json", "REPORT": tmp_path / "report"}  # fmt: skip
    names["REPORT"].mkdir()
    for path in (names["NOTES"], names["NOTES.zip"], names["REPORT"] / "report.json", names["REPORT"] / "config.json"):
        path.write_text('{"mine": true}')
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    message = refused(capsys, [str(names.get(word, word)) for word in command.split()])
    assert "is an input of this command" in message or "was not written by this command" in message
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_training_replaces_nothing_of_the_user(
    voc_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from refinedet.detector import RefineDet

    data, model = voc_folder(), RefineDet(PRESETS["smoke"].model, ("a",) * 20).save_pretrained(tmp_path / "model")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    command = ["train", "smoke", "--data", data, "--out"]
    assert "is an input" in refused(capsys, [*command, data, "--init-weights", "random"])
    assert "is an input" in refused(capsys, [*command, model, "--init", model])
    assert "config.json: exists" in refused(capsys, [*command, model, "--init-weights", "random"])
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_home_is_expanded_in_every_output(
    stub: StubDetector, photo: Callable[..., Path], voc_folder: Callable[..., Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["predict", "stub", str(photo("a.jpg")), "--save", "~/drawn", "--json", "~/r.json"]) == 0
    assert cli.main(["evaluate", "stub", str(voc_folder()), "--report", "~/report"]) == 0
    assert cli.main(["inspect", str(tmp_path / "voc"), "--mosaic", "~/m.png"]) == 0
    assert sorted(path.name for path in home.iterdir()) == ["drawn", "m.png", "r.json", "report"]
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize(
    "framed",
    [
        """
        ╭─ Unrecognized options ──────────────────────────╮
        │ Unrecognized options: --iterationz, and         │
        │ --x--y                                          │
        │ ─────────────────────────────────────────────── │
        │ Perhaps you meant:                              │
        │     --iterations INT                            │
        ╰─────────────────────────────────────────────────╯
        """,
        """
         Unrecognized options
         -----------------------------------------------
          Unrecognized options: --iterationz, and
          --x--y
          ----------------------------------------------
          Perhaps you meant:
              --iterations INT
        """,
    ],
)
def test_framed_refusals_become_one_line(framed: str) -> None:
    assert cli._unframed(framed) == "Unrecognized options: --iterationz, and --x--y (did you mean --iterations?)"


# evaluate, inspect, models -------------------------------------------------------------------------------------------


def test_evaluate_prints_table_and_figure(
    stub: StubDetector, voc_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = voc_folder()
    command = ["evaluate", "stub", str(data), "--report", str(tmp_path / "report"), "--limit", "2", "--metric", "voc"]
    assert cli.main(command) == 0
    output = capsys.readouterr()
    assert "cat" in output.out
    assert "\nmAP " in output.out
    assert f"report: {tmp_path / 'report'}" in output.out
    saved = json.loads((tmp_path / "report" / "report.json").read_text())
    assert (saved["split"], saved["images"], saved["metric"]) == ("test", 2, "voc")
    page = (tmp_path / "report" / "index.html").read_text()
    assert f"{100 * saved['figures']['mAP']:.1f}" in page
    assert "over iterations" not in page


@pytest.mark.parametrize("weights", ["run", "run/best", "run/last/"])
def test_the_page_of_a_run_folder_has_its_learning_curves(
    weights: str, stub: StubDetector, voc_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["refinedet.detector"].RefineDet, "from_pretrained", lambda name, device: stub)
    for name in ("best", "last"):
        (tmp_path / "run" / name).mkdir(parents=True)
    (tmp_path / "run" / "metrics.csv").write_text("iteration,total\n1,2\n2,1\n")
    report = tmp_path / "report"
    assert cli.main(["evaluate", f"{tmp_path}/{weights}", str(voc_folder()), "--report", str(report)]) == 0
    assert "Loss over iterations" in (report / "index.html").read_text()


def test_evaluate_takes_everything_of_undivided_data(
    stub: StubDetector, voc_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["evaluate", "stub", str(voc_folder(splits={}))]) == 0
    assert "6 images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stub"], "DATA"),
        (["stub", "nowhere"], "nowhere"),
        (["stub", "DATA", "--split", "tset"], "no split 'tset'"),
        (["stub", "DATA", "--metric", "map"], "'voc07', 'voc', 'coco'"),
        (["stub", "DATA", "--shared-classes", "--submission", "a.zip"], "--submission takes neither --shared-classes"),
        (["stub", "DATA", "--limit", "0"], "--limit must be at least 1, not 0"),
        (["stub", "DATA", "--batch-size", "-1"], "--batch-size must be at least 1, not -1"),
    ],
)
def test_wrong_evaluation_calls(
    arguments: list[str], message: str, stub: StubDetector, voc_folder: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    data = str(voc_folder())
    assert message in refused(capsys, ["evaluate", *(data if a == "DATA" else a for a in arguments)])


def test_inspect(voc_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = voc_folder()
    assert cli.main(["inspect", str(data), "--mosaic", str(tmp_path / "sheets" / "m.png")]) == 0
    assert "cat" in capsys.readouterr().out
    assert Image.open(tmp_path / "sheets" / "m.png").width > 100
    picture = data / "JPEGImages" / "000001.jpg"
    picture.write_bytes(picture.read_bytes()[:300])
    assert cli.main(["inspect", str(data)]) == 1
    output = capsys.readouterr()
    assert "000001.jpg" in output.out
    assert output.err == ""
    assert "nowhere" in refused(capsys, ["inspect", "nowhere"])


def test_models(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, metrics in (("good", {"mAP": 0.3712, "data": "VOC 2007", "split": "val"}), ("bare", {})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").touch()
        (tmp_path / name / "config.json").write_text(json.dumps({"metrics": metrics}))
    monkeypatch.setattr(refinedet.weights, "_HERE", tmp_path)
    assert cli.main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split(maxsplit=1) == ["good", "mAP 37.1 on VOC 2007 val"] for line in lines)
    assert any(line.split(maxsplit=1) == ["bare", "accuracy not measured"] for line in lines)
    for name, preset in PRESETS.items():
        assert any(line.strip().startswith(name) and line.endswith(preset.summary) for line in lines)


def test_a_real_model_finds_its_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from refinedet.detector import RefineDet

    model = RefineDet(PRESETS["smoke"].model)
    model.save_pretrained(tmp_path / "model")
    command = ["predict", str(tmp_path / "model"), str(EXAMPLES), "--threshold", "0", "--save", str(tmp_path / "out")]
    assert cli.main(command) == 0
    assert len(list((tmp_path / "out").iterdir())) == 3
    assert "chelsea.jpg  451x300  " in capsys.readouterr().out
