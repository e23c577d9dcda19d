"""RefineDet: predicting, saving, loading, and what is refused."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from conftest import make_scene
from refinedet.config import InferenceConfig, ModelConfig
from refinedet.detector import RefineDet
from refinedet.errors import RefineDetError, UsageError
from refinedet.images import ImageSource
from refinedet.loading import load_detector
from refinedet.model.postprocess import postprocess
from refinedet.preprocess import preprocess
from refinedet.presets import PRESETS
from refinedet.weights.store import open_weights

CONFIG = ModelConfig(
    backbone="resnet18", num_classes=2, image_size=(64, 128), tcb_channels=8, tcb_batch_norm=True,
    inference=InferenceConfig(score_threshold=0.0),
)  # fmt: skip
"""Not square on purpose: a mix-up of height and width must show."""


@pytest.fixture(scope="module")
def model() -> RefineDet:
    torch.manual_seed(0)
    return RefineDet(CONFIG, ("cat", "dog"))


def make_images(count: int) -> list[np.ndarray]:
    return [make_scene(index, size=(90 + 10 * index, 60 + 7 * index)).image for index in range(count)]


def test_counts_of_the_papers_models() -> None:
    assert RefineDet(PRESETS["smoke"].model).num_anchors == 3 * (16**2 + 8**2 + 4**2 + 2**2)
    for name, anchors in (("voc07-320-vgg16", 6375), ("voc07-512-vgg16", 16320)):
        # The property alone: half a gigabyte of weights would be built for it.
        shell = RefineDet(CONFIG, network=torch.nn.Identity())  # type: ignore[arg-type]
        shell.config = PRESETS[name].model
        assert shell.num_anchors == anchors


def test_one_image_gives_one_result_and_a_list_gives_a_list(model: RefineDet, tmp_path: Path) -> None:
    image = make_images(1)[0]
    Image.fromarray(image).save(tmp_path / "a.png")
    single = model.predict(tmp_path / "a.png", threshold=None)
    listed = model.predict([tmp_path / "a.png"], threshold=None)
    array, pillow = model.predict(image, threshold=None), model.predict(Image.fromarray(image), threshold=None)
    assert isinstance(listed, list)
    for other in (listed[0], array, pillow):
        np.testing.assert_array_equal(single.boxes, other.boxes)
        np.testing.assert_array_equal(single.scores, other.scores)
    assert single.source == str(tmp_path / "a.png")
    assert array.source is None
    assert single.image_size == (90, 60)
    assert model.predict([]) == []
    assert all(name in ("cat", "dog") for name in single.names)


def test_boxes_are_those_of_the_network_in_pixels_of_the_image(model: RefineDet) -> None:
    image = make_images(3)[2]
    raw = postprocess(model.network(torch.from_numpy(preprocess(image, CONFIG))[None]), CONFIG)
    found = model.predict(image, threshold=None)
    count = int(raw.counts[0])
    assert len(found) == count > 0
    height, width = image.shape[:2]
    for box, expected in zip(found.boxes, raw.boxes[0, :count].tolist(), strict=True):
        x1, y1, x2, y2 = expected
        wanted = [x1 * width / 128, y1 * height / 64, x2 * width / 128, y2 * height / 64]
        wanted = [min(max(v, 0), limit) for v, limit in zip(wanted, [width, height, width, height], strict=True)]
        np.testing.assert_allclose(box, wanted, rtol=1e-5, atol=1e-4)
    assert (np.diff(found.scores) <= 0).all()


def test_a_batch_finds_what_single_images_find(model: RefineDet) -> None:
    images = make_images(5)
    together = model.predict(images, threshold=None, batch_size=3)
    for image, batched in zip(images, together, strict=True):
        alone = model.predict(image, threshold=None)
        # Convolutions of another batch size round differently: near-equal scores may swap, the scores themselves agree.
        np.testing.assert_allclose(alone.scores, batched.scores, atol=1e-4)
    streamed = list(model.stream(iter(images), threshold=None, batch_size=2))
    assert [one.image_size for one in streamed] == [one.image_size for one in together]


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_outputs_that_are_no_numbers_are_no_empty_image(number: float) -> None:
    ruined = RefineDet(PRESETS["smoke"].model)
    next(ruined.network.parameters()).data.fill_(number)
    with pytest.raises(RefineDetError, match="outputs are not finite"):
        ruined.predict(make_images(1)[0])


def test_the_threshold_filters(model: RefineDet) -> None:
    image = make_images(1)[0]
    everything = model.predict(image, threshold=None)
    cut = float(np.median(everything.scores))
    assert len(model.predict(image, threshold=cut)) == int((everything.scores >= cut).sum())


def test_predicting_leaves_the_network_as_it_was(model: RefineDet) -> None:
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    model.network.train()
    model.predict(make_images(1)[0])
    assert model.network.training
    model.network.eval()
    assert all(torch.equal(value, before[name]) for name, value in model.network.state_dict().items())


def test_threads_predict_the_same_while_the_network_is_trained() -> None:
    torch.manual_seed(1)
    own = RefineDet(CONFIG, ("cat", "dog"))
    image = make_images(1)[0]
    expected = own.predict(image, threshold=None)
    running = threading.Event()
    running.set()

    def switch() -> None:
        while running.is_set():
            own.network.train()
            own.network.eval()

    def predict(_: int) -> tuple[bool, bool]:
        found = own.predict(image, threshold=None)
        return np.array_equal(found.scores, expected.scores), np.array_equal(found.boxes, expected.boxes)

    switching = threading.Thread(target=switch)
    switching.start()
    try:
        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(predict, range(40)))
    finally:
        running.clear()
        switching.join()
    assert results == [(True, True)] * 40
    own.network.train()
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(predict, range(20))) == [(True, True)] * 20
    assert all(module.training for module in own.network.modules())


def test_frozen_stages_keep_their_own_mode() -> None:
    own = RefineDet(dataclasses.replace(CONFIG, frozen_stages=2), ("cat", "dog"))
    own.network.train()
    modes = [module.training for module in own.network.modules()]
    assert not all(modes)
    own.predict(make_images(1)[0])
    assert [module.training for module in own.network.modules()] == modes


def test_round_trip(model: RefineDet, tmp_path: Path) -> None:
    model.metrics = {"mAP": 0.5}
    model.save_pretrained(tmp_path / "a", card="# a card")
    loaded = RefineDet.from_pretrained(tmp_path / "a")
    assert (loaded.config, loaded.class_names, loaded.metrics) == (model.config, model.class_names, {"mAP": 0.5})
    assert (tmp_path / "a/README.md").read_text() == "# a card"
    image = make_images(1)[0]
    np.testing.assert_array_equal(
        model.predict(image, threshold=None).boxes, loaded.predict(image, threshold=None).boxes
    )


def test_half_kernels_are_float16_on_disk_only(model: RefineDet, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path, half=True)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored["arm.0.offsets.weight"].dtype == torch.float16
    assert stored["arm.0.offsets.bias"].dtype == torch.float32
    loaded = RefineDet.from_pretrained(tmp_path)
    assert {value.dtype for value in loaded.network.parameters()} == {torch.float32}


def test_a_run_folder_stands_for_its_best_weights(model: RefineDet, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "run/last")
    assert RefineDet.from_pretrained(tmp_path / "run").class_names == ("cat", "dog")
    other = RefineDet(CONFIG, ("best", "one"))
    other.save_pretrained(tmp_path / "run/best")
    assert RefineDet.from_pretrained(tmp_path / "run").class_names == ("best", "one")


def test_names_that_stand_for_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no model 'voc07-320-resnet19'"):
        RefineDet.from_pretrained("voc07-320-resnet19")
    with pytest.raises(UsageError, match=r"no model\.safetensors in this folder"):
        RefineDet.from_pretrained(tmp_path)
    (tmp_path / "weights.pth").write_bytes(b"x")
    with pytest.raises(UsageError, match="give the folder"):
        RefineDet.from_pretrained(tmp_path / "weights.pth")


@pytest.mark.parametrize("ending", ["", ".onnx"])
def test_paths_that_no_system_takes(model: RefineDet, ending: str) -> None:
    for name, message in (
        ("~nosuch-user/x", "no user of that name"),
        ("n" * 300, "a name of"),
        ("a/" * 2100, "a path"),
    ):
        for use in (RefineDet.from_pretrained, load_detector, model.save_pretrained, open_weights):
            with pytest.raises(UsageError, match=message):
                use(name + ending)


def test_a_hub_id_is_asked_of_the_hub(model: RefineDet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model.save_pretrained(tmp_path / "snapshot")
    asked: list[str] = []

    def snapshot_download(name: str, **_: object) -> str:
        asked.append(name)
        if name == "some/gone":
            raise OSError("no network")
        return str(tmp_path / "snapshot")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert RefineDet.from_pretrained("hf:some/model").class_names == ("cat", "dog")
    with pytest.raises(RefineDetError, match="'some/gone' could not be downloaded"):
        RefineDet.from_pretrained("hf:some/gone")
    assert asked == ["some/model", "some/gone"]


@pytest.fixture
def saved(model: RefineDet, tmp_path: Path) -> Path:
    return model.save_pretrained(tmp_path / "saved")


def refuse(folder: Path, message: str) -> None:
    with pytest.raises(RefineDetError, match=message) as caught:
        RefineDet.from_pretrained(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_cut_weights(saved: Path) -> None:
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    refuse(saved, r"model\.safetensors: not a readable safetensors file")


def test_a_pickle_under_our_name_is_not_opened(saved: Path) -> None:
    torch.save({"x": torch.zeros(1)}, saved / "model.safetensors")
    refuse(saved, r"model\.safetensors: not a readable safetensors file")


def test_weights_of_another_number_of_classes(saved: Path) -> None:
    content = json.loads((saved / "config.json").read_text())
    edit_config(saved, model={**content["model"], "num_classes": 3}, class_names=["a", "b", "c"])
    refuse(saved, r"'odm\.0\.logits\.weight' has shape \(9, .* needs \(12, .*another number of classes")


def test_a_tensor_too_few_and_one_too_many(saved: Path) -> None:
    state = load_file(saved / "model.safetensors")
    bias = state.pop("arm.0.logits.bias")
    save_file(state, saved / "model.safetensors")
    refuse(saved, r"'arm\.0\.logits\.bias' is missing \(1 missing, 0 unexpected\)")
    save_file({**state, "arm.0.logits.bias": bias, "stranger": bias.clone()}, saved / "model.safetensors")
    refuse(saved, "'stranger' is not part of this network")


def test_broken_configs(saved: Path) -> None:
    edit_config(saved, class_names=["cat"])
    refuse(saved, r"config\.json: 1 class names for a model of 2 classes")
    edit_config(saved, class_names=["cat", "dog"], surprise=1)
    refuse(saved, "unknown key 'surprise'")
    (saved / "config.json").write_text("{")
    refuse(saved, r"config\.json: not valid JSON")
    (saved / "config.json").write_text('{"model": {"backbone": "resnet19"}, "class_names": []}')
    refuse(saved, "backbone: must be one of")
    (saved / "config.json").unlink()
    refuse(saved, r"config\.json: cannot be read")


def test_a_class_list_of_another_length() -> None:
    with pytest.raises(UsageError, match="3 class names for a model of 2 classes"):
        RefineDet(CONFIG, ("a", "b", "c"))


def test_the_model_in_the_box_needs_no_network_and_finds_the_cat(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr("socket.socket.connect", no_network)
    boxed = RefineDet.from_pretrained("voc07-320-resnet18")
    assert boxed.metrics["mAP"] >= 0.5
    found = boxed.predict(Path(__file__).parents[1] / "examples/chelsea.jpg", threshold=0.3)
    assert found.names[:1] == ["cat"]
    # The cat's head fills the image from about x = 120 to 400 (of 451) and its body reaches the lower edge.
    x1, _, x2, y2 = found.boxes[0]
    assert x1 < 150
    assert x2 > 330
    assert y2 > 230


def test_saving_where_nothing_can_be_saved(model: RefineDet, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RefineDetError, match="cannot be saved"):
        model.save_pretrained(tmp_path / "file")
    shutil.rmtree(tmp_path / "gone", ignore_errors=True)
    model.save_pretrained(tmp_path / "gone/deep")
    assert (tmp_path / "gone/deep/model.safetensors").is_file()


# Every kind of source ------------------------------------------------------------------------------------------------


def test_every_kind_of_source_gives_the_same_detections(model: RefineDet, tmp_path: Path) -> None:
    image = make_images(1)[0]
    path = tmp_path / "folder" / "a.png"
    path.parent.mkdir()
    Image.fromarray(image).save(path)
    expected = model.predict(path, threshold=None)
    tensor = torch.from_numpy(image.copy())
    with path.open("rb") as file, Image.open(path) as opened:
        single: list[ImageSource] = [str(path), path.read_bytes(), io.BytesIO(path.read_bytes()), file, opened, image,
                                     tensor, tensor.permute(2, 0, 1), tensor.permute(2, 0, 1) / 255]  # fmt: skip
        found = [model.predict(source, threshold=None) for source in single]
        found.append(model(image, threshold=None))
        many: list[Any] = [path.parent, f"{tmp_path}/**/*.png", [image], (path,), iter([image]), (p for p in [path])]
        for source in many:
            listed = model.predict(source, threshold=None)
            assert isinstance(listed, list)
            assert len(listed) == 1
            found += listed
    for other in found:
        np.testing.assert_array_equal(other.boxes, expected.boxes)
        np.testing.assert_array_equal(other.scores, expected.scores)
    assert [one.source for one in model.predict([path, image, path.parent])] == [str(path), None, str(path)]


def test_a_turned_photograph_opened_by_pillow_is_turned_too(model: RefineDet, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(make_images(1)[0]).save(tmp_path / "a.jpg", exif=exif)
    with Image.open(tmp_path / "a.jpg") as opened:
        by_pillow, by_path = model.predict(opened, threshold=None), model.predict(tmp_path / "a.jpg", threshold=None)
    assert by_pillow.image_size == by_path.image_size == (60, 90)
    np.testing.assert_array_equal(by_pillow.boxes, by_path.boxes)
    assert by_pillow.draw().shape == (540, 360, 3)  # found again by its file name, and enlarged


@pytest.mark.parametrize("wrong", [None, 7.5, object(), {"a": 1}, np.zeros((2, 3)), torch.zeros(1, 3, 8, 8)])
def test_what_is_no_image_is_one_clear_error(model: RefineDet, wrong: Any) -> None:
    for source in (wrong, [wrong]):
        with pytest.raises(UsageError, match="is no image"):
            model.predict(source)


@pytest.mark.parametrize(
    "settings",
    [{"threshold": 40}, {"threshold": -1}, {"batch_size": 0}, {"batch_size": -1}, {"batch_size": 2.5},
     {"max_pixels": 0}, {"precision": "int8"}],
)  # fmt: skip
def test_wrong_settings(model: RefineDet, settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        model.predict(make_images(1), **settings)
    with pytest.raises(UsageError):
        list(model.stream(make_images(1), **settings))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_mixed_precision(model: RefineDet, precision: Any) -> None:
    image = make_images(1)[0]
    full, mixed = model.predict(image, threshold=None), model.predict(image, threshold=None, precision=precision)
    # Rounding may move a box across a threshold, on some processors and not on others.
    assert abs(len(mixed) - len(full)) <= (0 if precision == "fp32" else 2)
    count = min(len(mixed), len(full))
    np.testing.assert_allclose(mixed.scores[:count], full.scores[:count], atol=0.0 if precision == "fp32" else 0.02)


def test_half_and_what_a_model_says_of_itself() -> None:
    torch.manual_seed(0)
    own = RefineDet(CONFIG, ("cat", "dog"))
    image = make_images(1)[0]
    full = own.predict(image, threshold=None)
    assert repr(own).startswith("RefineDet(resnet18, 128x64, 2 classes: cat, dog; ")
    assert repr(own).endswith("M parameters, cpu, float32)")
    assert own.half() is own
    assert repr(own).endswith("cpu, float16)")
    np.testing.assert_allclose(own.predict(image, threshold=None).scores, full.scores, atol=0.02)


@pytest.mark.parametrize("name", ["cuda:99", "mps", "xla", "gpu", "cuda:-1", ""])
def test_devices_that_are_not_there(model: RefineDet, name: str) -> None:
    with pytest.raises(UsageError, match="device"):
        model.to(name)
