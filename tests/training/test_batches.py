"""What image number n of a training is depends on the seed and n alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from refinedet.config import AugmentConfig, ModelConfig, TrainConfig
from refinedet.data import open_dataset
from refinedet.data.records import DetectionDataset
from refinedet.preprocess import normalize, resize
from refinedet.training.batches import Batch, training_batches

FolderFactory = Callable[..., Path]
SIZE = (64, 64)
MODEL = ModelConfig(backbone="resnet18", num_classes=2, image_size=SIZE)
PLAIN = AugmentConfig(
    photometric=False, expand_probability=0.0, crop=False, flip_probability=0.0, interpolations=("linear",)
)


@pytest.fixture
def dataset(voc_folder: FolderFactory) -> DetectionDataset:
    return open_dataset(voc_folder(images=5), "trainval")


def batches_of(dataset: DetectionDataset, config: TrainConfig, **settings: int) -> list[Batch]:
    return list(training_batches(dataset, MODEL, config, **settings))


def assert_equal(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.names == b.names
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.targets.boxes, b.targets.boxes)
        assert torch.equal(a.targets.labels, b.targets.labels)


def test_neither_workers_nor_a_stop_change_the_images(dataset: DetectionDataset) -> None:
    config = TrainConfig(iterations=5, batch_size=3, workers=0, seed=4, size_schedule=((2, 128),))
    alone = batches_of(dataset, config)
    assert [tuple(batch.images.shape) for batch in alone] == [(3, 3, 64, 64)] * 2 + [(3, 3, 128, 128)] * 3
    assert_equal(batches_of(dataset, dataclasses.replace(config, workers=2)), alone)
    assert_equal(batches_of(dataset, config, start=3), alone[3:])
    other = batches_of(dataset, dataclasses.replace(config, seed=5))
    assert not torch.equal(other[0].images, alone[0].images)


def test_ranks_see_the_halves_of_the_whole_batch(dataset: DetectionDataset) -> None:
    config = TrainConfig(iterations=2, batch_size=4, workers=0)
    whole = batches_of(dataset, config)
    halves = [batches_of(dataset, config, rank=rank, world=2) for rank in range(2)]
    for iteration in range(2):
        joined = torch.cat([halves[0][iteration].images, halves[1][iteration].images])
        assert torch.equal(joined, whole[iteration].images)
        assert halves[0][iteration].names + halves[1][iteration].names == whole[iteration].names


def test_without_augmentation_a_batch_is_the_data(dataset: DetectionDataset) -> None:
    config = TrainConfig(iterations=5, batch_size=1, workers=0, augment=PLAIN)
    seen = set()
    for batch in batches_of(dataset, config):
        index = next(i for i, record in enumerate(dataset.records) if str(record.image_path) == batch.names[0])
        seen.add(index)
        record = dataset[index]
        image = dataset.load_image(index)
        # Pillow's plain bilinear truncates, so it may lie one level lower.
        expected = normalize(resize(image, *SIZE), MODEL)
        assert np.abs(batch.images[0].numpy() - expected).max() < 1.5 / 57
        factor = np.array([64 / record.width, 64 / record.height] * 2, dtype=np.float32)
        np.testing.assert_allclose(batch.targets.boxes[0].numpy(), record.boxes * factor, atol=1e-4)
        assert batch.targets.labels[0].tolist() == record.labels.tolist()
        assert batch.targets.valid.all()
    assert seen == set(range(5))


def test_a_mosaic_is_four_images_side_by_side(voc_folder: FolderFactory) -> None:
    """Of one image without other augmentation: each group of boxes says where its tile is."""
    data = open_dataset(voc_folder(images=1, splits={"trainval": [0]}), "trainval")
    record, image = data[0], data.load_image(0)
    objects = len(record.boxes)
    assert objects
    augment = dataclasses.replace(PLAIN, mosaic_probability=1.0)
    config = TrainConfig(iterations=6, batch_size=1, workers=0, augment=augment, size_schedule=((0, 128),))
    meetings = set()
    for batch in batches_of(data, config):
        assert batch.targets.labels[0].tolist() == record.labels.tolist() * 4
        area, corners = 0, set()
        for boxes in batch.targets.boxes[0].double().numpy().reshape(4, objects, 4):
            scale = (boxes[0, 2:] - boxes[0, :2]) / (record.boxes[0, 2:] - record.boxes[0, :2])
            start = np.rint(boxes[0, :2] - record.boxes[0, :2] * scale).astype(int)
            width, height = np.rint(scale * [record.width, record.height]).astype(int)
            factor = np.array([width / record.width, height / record.height] * 2)
            np.testing.assert_allclose(boxes, record.boxes * factor + np.tile(start, 2), atol=1e-3)
            tile = batch.images[0, :, start[1] : start[1] + height, start[0] : start[0] + width].numpy()
            # Pillow's plain bilinear truncates, so it may lie one level lower.
            assert np.abs(tile - normalize(resize(image, height, width), MODEL)).max() < 1.5 / 57
            area += width * height
            corners |= {(int(start[0]), int(start[1])), (int(start[0] + width), int(start[1] + height))}
        x, y = next(corner for corner in corners if 0 < corner[0] < 128 and 0 < corner[1] < 128)
        assert area == 128 * 128
        assert min(x, y) >= 0.3 * 128 - 1
        assert max(x, y) <= 0.7 * 128 + 1
        assert {(0, 0), (x, y), (128, 128)} <= corners
        meetings.add((x, y))
    assert len(meetings) > 3


def test_mixup_shows_two_images_and_keeps_the_targets_of_both(voc_folder: FolderFactory) -> None:
    """The share of the first, found by least squares, explains every pixel; the targets say which the second is."""
    data = open_dataset(voc_folder(images=5, splits={"trainval": list(range(5))}), "trainval")
    config = TrainConfig(
        iterations=60, batch_size=1, workers=0, augment=dataclasses.replace(PLAIN, mixup_probability=1.0)
    )
    whole = [normalize(resize(data.load_image(i), *SIZE), MODEL).astype(np.float64) for i in range(5)]
    boxes = [one.boxes * np.array([64 / one.width, 64 / one.height] * 2, dtype=np.float32) for one in data.records]
    shares, seconds = [], set()
    for batch in batches_of(data, config):
        found = batch.targets.boxes[0].numpy()
        first = next(i for i, record in enumerate(data.records) if str(record.image_path) == batch.names[0])
        rest = found[len(boxes[first]) :]
        np.testing.assert_allclose(found[: len(boxes[first])], boxes[first], atol=1e-4)
        second = next(i for i in range(5) if boxes[i].shape == rest.shape and np.allclose(boxes[i], rest, atol=1e-4))
        assert batch.targets.labels[0].tolist() == [*data[first].labels, *data[second].labels]
        seconds.add(second)
        if first == second:
            continue
        difference = whole[first] - whole[second]
        mixed = batch.images[0].numpy().astype(np.float64) - whole[second]
        share = float((difference * mixed).sum() / (difference**2).sum())
        assert np.abs(mixed - share * difference).max() < 2.5 / 57, "each rounding may cost a level"
        shares.append(share)
    assert seconds == set(range(5))
    assert 0.1 < min(shares) < 0.4, "Beta(8, 8): half with a standard deviation of 0.12"
    assert 0.6 < max(shares) < 0.9
    assert abs(np.mean(shares) - 0.5) < 0.06
    assert abs(np.std(shares) - 0.121) < 0.04


def test_mosaics_mix_images_and_survive_a_stop(dataset: DetectionDataset) -> None:
    augment = AugmentConfig(mosaic_probability=0.5, mixup_probability=0.5)
    config = TrainConfig(iterations=8, batch_size=2, workers=0, augment=augment, seed=1)
    alone = batches_of(dataset, config)
    assert_equal(batches_of(dataset, dataclasses.replace(config, workers=1), start=3), alone[3:])
    never = batches_of(dataset, dataclasses.replace(config, augment=AugmentConfig()))
    assert [batch.names for batch in never] == [batch.names for batch in alone]


def test_mosaics_and_mixup_end_where_the_settings_say(dataset: DetectionDataset) -> None:
    augment = AugmentConfig(mosaic_probability=1.0, mixup_probability=0.5)
    config = TrainConfig(iterations=8, batch_size=2, workers=0, augment=augment, seed=1)
    mixed = batches_of(dataset, config)
    half = batches_of(dataset, dataclasses.replace(config, mosaic_until=0.5))
    assert_equal(half[:4], mixed[:4])
    alone = dataclasses.replace(augment, mosaic_probability=0.0, mixup_probability=0.0)
    single = batches_of(dataset, dataclasses.replace(config, augment=alone))
    # A single image draws no number to decide whether it is a mosaic; so it is the one of a training without mosaics.
    assert_equal(half[4:], single[4:])


def test_rare_classes_are_drawn_more_often(dataset: DetectionDataset) -> None:
    config = TrainConfig(iterations=8, batch_size=2, workers=0, seed=1)
    names = [batch.names for batch in batches_of(dataset, config)]
    # Each class is in more than a thousandth of these images, so nothing changes; below 1 a threshold of 1 changes all.
    assert [b.names for b in batches_of(dataset, dataclasses.replace(config, repeat_threshold=0.001))] == names
    assert [b.names for b in batches_of(dataset, dataclasses.replace(config, repeat_threshold=1.0))] != names


def test_kept_images_are_read_once_and_stay_what_they_are(
    dataset: DetectionDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig(iterations=8, batch_size=3, workers=0, augment=AugmentConfig(mosaic_probability=0.5), seed=1)
    read_each_time = batches_of(dataset, config)
    read: list[int] = []
    load = DetectionDataset.load_image

    def counted(self: DetectionDataset, index: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        read.append(index)
        return load(self, index)

    monkeypatch.setattr(DetectionDataset, "load_image", counted)
    assert_equal(batches_of(dataset, dataclasses.replace(config, keep_images=True)), read_each_time)
    assert sorted(read) == list(range(5))


def test_difficult_boxes_are_used_and_crowds_are_not(dataset: DetectionDataset, coco_folder: FolderFactory) -> None:
    assert any(record.difficult.any() for record in dataset.records)
    crowded = open_dataset(coco_folder(images=6), "train")
    assert any(record.crowd.any() for record in crowded.records)
    for data in (dataset, crowded):
        config = TrainConfig(iterations=len(data), batch_size=1, workers=0, augment=PLAIN)
        records = {str(record.image_path): record for record in data.records}
        for batch in batches_of(data, config):
            record = records[batch.names[0]]
            assert batch.targets.labels[0].tolist() == record.labels[~record.crowd].tolist()


def test_filling_is_the_mean_colour(dataset: DetectionDataset) -> None:
    """After normalisation the surroundings of an expanded image are nearly 0, whatever the channel order."""
    augment = dataclasses.replace(PLAIN, expand_probability=1.0)
    config = TrainConfig(iterations=4, batch_size=4, workers=0, augment=augment)
    for model in (MODEL, dataclasses.replace(MODEL, channel_order="bgr", mean=(10.0, 100.0, 200.0), std=(1.0,) * 3)):
        images = torch.cat([batch.images for batch in training_batches(dataset, model, config)])
        filled = (images.abs() < 0.51 / min(model.std)).all(dim=1)
        assert filled.float().mean() > 0.3


def test_images_differ_from_pass_to_pass(dataset: DetectionDataset) -> None:
    config = TrainConfig(iterations=10, batch_size=1, workers=0)
    batches = batches_of(dataset, config)
    same = [(a, b) for a in batches[:5] for b in batches[5:] if a.names == b.names]
    assert len(same) == 5
    assert not any(torch.equal(a.images, b.images) for a, b in same)
