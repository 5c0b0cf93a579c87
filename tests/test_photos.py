"""ImageNet's photos, on small folders in its format."""

import json
import shutil
from pathlib import Path
from typing import Any

import main  # before all that imports Keras
import numpy as np
import pytest

from experiment.errors import UserError

tf = pytest.importorskip("tensorflow")
tfds = pytest.importorskip("tensorflow_datasets")

# isort: split
import photo_folder  # noqa: E402

from experiment.datasets import photos  # noqa: E402
from experiment.datasets.photos import Photos  # noqa: E402
from experiment.devices.one import Share  # noqa: E402

pytestmark = pytest.mark.usefixtures("optimized_graphs")

SIZE = 8
TRAINING, VALIDATION = 25, 10
DAMAGED = ("train_3.JPEG", "validation_2.JPEG")
BATCH, STEPS = 8, 3


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tfds")
    photo_folder.write(folder, TRAINING, VALIDATION, 3)
    return folder


def training(
    folder: Path,
    *,
    seed: int = 0,
    first_step: int = 0,
    epochs: int = 2,
    share: Share = Share(),
) -> list[tuple[np.ndarray, ...]]:
    """The training batches that are left."""
    batches = Photos(str(folder), SIZE).training(
        share, BATCH, STEPS, seed, first_step, epochs
    )
    return list(batches.as_numpy_iterator())


def evaluation(
    folder: Path, batch_size: int, share: Share = Share(), times: int = 1
) -> list[tuple[np.ndarray, ...]]:
    """The batches of an evaluation."""
    ours = Photos(str(folder), SIZE)
    steps = -(-ours.validation_images // batch_size)
    batches = ours.validation(share, batch_size, steps)
    batches = batches.take(steps * share.count * times)
    return list(batches.as_numpy_iterator())


def same(ours: list, others: list) -> bool:
    return len(ours) == len(others) and all(
        np.array_equal(a, b)
        for one, other in zip(ours, others)
        for a, b in zip(one, other, strict=True)
    )


def joined(batches: list[tuple[np.ndarray, ...]]) -> tuple[np.ndarray, ...]:
    return tuple(np.concatenate(parts) for parts in zip(*batches))


def whole(label: int) -> np.ndarray:
    """A photo's pixels."""
    return tf.io.decode_jpeg(photo_folder.jpeg(label), channels=3).numpy()


# Training.


def test_shapes_are_known(data_dir: Path) -> None:
    for one_hot, shape, dtype in (
        (False, (), "int64"),
        (True, (1000,), "float32"),
    ):
        ours = Photos(str(data_dir), SIZE, one_hot=one_hot)
        share = Share(2, 0, 2)
        for batches in (
            ours.training(share, BATCH, STEPS, 0, 0, 1),
            ours.validation(share, BATCH, 2),
        ):
            assert batches.element_spec == (
                tf.TensorSpec((4, SIZE, SIZE, 3), tf.uint8),
                tf.TensorSpec((4, *shape), dtype),
                tf.TensorSpec((4,), tf.float32),
            )
    _, one_hot, _ = next(batches.as_numpy_iterator())
    assert one_hot.argmax(-1).tolist() == [500, 501, 502, 503]
    assert np.all(one_hot.sum(-1) == 1)


@pytest.mark.parametrize("seed", [0, 5])
def test_batches_depend_on_the_seed_and_the_epoch(
    tmp_path: Path, seed: int
) -> None:
    photo_folder.write(tmp_path, TRAINING, 1)  # one file: in no order of files
    tf.random.set_seed(1)
    first = training(tmp_path, seed=seed)
    drawn = tf.random.uniform(())
    tf.random.set_seed(1)
    assert tf.random.uniform(()) == drawn  # nobody else's state is touched
    tf.random.set_seed(2)
    assert same(training(tmp_path, seed=seed), first)
    others = training(tmp_path, seed=seed + 1)
    assert len(first) == len(others) == 2 * STEPS
    orders = []
    for epoch in (first[:STEPS], first[STEPS:], others[:STEPS]):
        labels = joined(epoch)[1]
        assert len(set(labels)) == STEPS * BATCH
        assert set(labels) <= set(range(TRAINING))
        orders.append(labels.tolist())
        assert orders[-1] not in (sorted(orders[-1]), *orders[:-1])
    shown = [
        dict(zip(y, x))
        for x, y, _ in map(joined, (first[:STEPS], first[STEPS:]))
    ]
    again = set(shown[0]) & set(shown[1])
    moved = [not np.array_equal(*(s[label] for s in shown)) for label in again]
    assert sum(moved) > len(moved) / 2  # other windows in another epoch


def test_files_are_read_in_another_order_in_each_epoch(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(photos, "SHUFFLE_BUFFER", 1)
    firsts = [
        [y[0] for _, y, _ in training(data_dir, seed=seed, epochs=5)[::STEPS]]
        for seed in (0, 1)
    ]
    assert firsts[0] != firsts[1]
    assert {len(set(first)) for first in firsts} <= {2, 3}
    assert set(firsts[0] + firsts[1]) == {0, 9, 17}  # the first of each file


@pytest.mark.parametrize("step", [1, 3, 4])
def test_the_rest_from_a_step_on(data_dir: Path, step: int) -> None:
    rest = training(data_dir, first_step=step)
    assert same(rest, training(data_dir)[step:])


def test_replicas_of_a_process_share_the_global_batch(data_dir: Path) -> None:
    halves = training(data_dir, share=Share(2, 0, 2))
    pairs = [joined(halves[i : i + 2]) for i in range(0, len(halves), 2)]
    assert same(pairs, training(data_dir))


def test_processes_train_on_different_photos(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def number(photo, seed, size, crop_area):
        return tf.fill((size, size, 3), tf.cast(seed[1], tf.uint8))

    monkeypatch.setattr(photos, "training_pixels", number)
    seen, numbers = [], []
    for share in (Share(4, 0, 3), Share(4, 3, 1)):
        x, y, _ = joined(training(data_dir, share=share))
        assert len(y) == 2 * STEPS * BATCH // 4 * share.count
        seen.append(set(y))
        numbers += x[:, 0, 0, 0].tolist()
    assert not seen[0] & seen[1]
    # Of each photo in the whole training: what its window is drawn from.
    assert sorted(numbers) == list(range(2 * STEPS * BATCH))


def test_a_process_reads_its_part_of_the_files(
    data_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(data_dir, tmp_path, dirs_exist_ok=True)
    ours = Photos(str(tmp_path), SIZE)
    for file in tmp_path.rglob("*train*-00002-*"):
        file.unlink()
    batches = ours.training(Share(2, 0, 1), BATCH, STEPS, 0, 0, 1)
    assert len(list(batches)) == STEPS


def test_only_the_window_is_decoded_and_it_is_the_same() -> None:
    for i in range(20):
        jpeg, pixels = photo_folder.jpeg(i), whole(i)
        window = photos.random_window(pixels.shape, (7, i))
        y, x, height, width = window.numpy()
        ours = photos.decode_window(jpeg, window).numpy().astype(int)
        wanted = pixels[y : y + height, x : x + width].astype(int)
        assert np.array_equal(ours[:, 1:-1], wanted[:, 1:-1])
        # Their colour is interpolated, and what is beyond is not decoded.
        assert np.abs(ours - wanted).max() < 25


def test_labels_and_mirrors(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def all_of_it(photo, window):
        return tf.io.decode_jpeg(photo, channels=3)

    monkeypatch.setattr(photos, "decode_window", all_of_it)
    mirrored = []
    for x, label in zip(*joined(training(data_dir))[:2]):
        image = photos.resized(whole(label), SIZE).numpy()
        mirrored.append(np.array_equal(x, image[:, ::-1]))
        assert mirrored[-1] or np.array_equal(x, image)
    assert 0.25 < np.mean(mirrored) < 0.75


def test_windows() -> None:
    shares = []
    for i in range(100):
        y, x, height, width = photos.random_window((90, 120, 3), (7, i)).numpy()
        assert 0 <= y <= y + height <= 90
        assert 0 <= x <= x + width <= 120
        assert 0.7 < width / height < 1.43  # of whole pixels
        shares.append(height * width / (90 * 120))
    assert 0.07 < min(shares) < 0.2
    assert 0.8 < max(shares) <= 1
    for i in range(100):
        large = photos.random_window((90, 120, 3), (7, i), 0.7).numpy()
        assert large[2] * large[3] > 0.65 * 90 * 120
    # No window of these has 0.08 of the area and is no longer than 4 to 3.
    assert photos.random_window((10, 400, 3), (7, 0)).numpy().tolist() == [
        0, 193, 10, 14,
    ]  # fmt: skip
    assert photos.random_window((400, 10, 3), (7, 0)).numpy().tolist() == [
        193, 0, 14, 10,
    ]  # fmt: skip


def test_resizing_rounds() -> None:
    image = tf.constant([[[0] * 3, [3] * 3]], tf.uint8)
    assert photos.resized(image, 4)[0, :, 0].numpy().tolist() == [0, 1, 2, 3]


# Evaluation.


@pytest.mark.parametrize(
    ("batch_size", "shares"),
    [
        (4, [Share()]),
        (4, [Share(2, 0, 2)]),
        (4, [Share(2, 0, 1), Share(2, 1, 1)]),
        (3, [Share(3, 0, 2), Share(3, 2, 1)]),
        (32, [Share(16, 0, 1), Share(16, 1, 8), Share(16, 9, 7)]),
    ],
)  # fmt: skip
def test_each_photo_is_evaluated_once(
    data_dir: Path, batch_size: int, shares: list[Share]
) -> None:
    x, y, w = joined(
        [b for s in shares for b in evaluation(data_dir, batch_size, s)]
    )
    steps = -(-VALIDATION // batch_size)
    assert len(w) == steps * batch_size
    assert sorted(y[w > 0]) == list(range(500, 500 + VALIDATION))
    assert not x[w == 0].any()
    assert not y[w == 0].any()
    assert np.all(w[w > 0] == np.float32(len(w) / VALIDATION))
    assert np.sum(w) == pytest.approx(len(w))
    for image, label in zip(x[w > 0], y[w > 0]):
        pixels = whole(label)
        side = 7 * min(pixels.shape[:2]) // 8
        top, left = ((n - side) // 2 for n in pixels.shape[:2])
        centre = pixels[top : top + side, left : left + side]
        assert np.array_equal(image, photos.resized(centre, SIZE))


def test_evaluations_repeat(data_dir: Path) -> None:
    once, again = evaluation(data_dir, 4), evaluation(data_dir, 4, times=2)
    assert same(once + once, again)


def test_probe(data_dir: Path) -> None:
    ours = Photos(str(data_dir), SIZE)
    x, y = ours.probe(4)
    assert y.tolist() == [500, 501, 502, 503]
    by_label = {b: a for a, b in zip(*joined(evaluation(data_dir, 5))[:2])}
    assert all(np.array_equal(a, by_label[b]) for a, b in zip(x, y))
    assert len(ours.probe(99)[0]) == VALIDATION


def test_hold_out(data_dir: Path) -> None:
    ours = Photos(str(data_dir), SIZE, hold_out=True)
    assert (ours.training_images, ours.validation_images) == (TRAINING - 1, 1)
    assert ours.probe(9)[1].tolist() == [TRAINING - 1]
    labels = [y for _, y, _ in ours.training(Share(), BATCH, STEPS, 0, 0, 1)]
    assert sorted(np.concatenate(labels)) == list(range(TRAINING - 1))


# Photos that do not decode.


def test_damaged_photos_end_the_run_with_their_names(
    tmp_path: Path, capfd: Any
) -> None:
    photo_folder.write(tmp_path, TRAINING, VALIDATION, 3, DAMAGED)
    ours = Photos(str(tmp_path), SIZE)
    for batches in (
        ours.training(Share(), BATCH, STEPS, 0, 0, 1),
        ours.validation(Share(), 5, 2).take(2),
    ):
        with pytest.raises(UserError) as wrong, ours.reading():
            list(batches)
        message = str(wrong.value)
        assert message.startswith(str(ours._info.data_dir))
        assert f"do not decode: {', '.join(DAMAGED)}. " in message
        assert "\n" not in message


@pytest.mark.parametrize(
    ("torn", "says"),
    [(False, "do not decode: train_3.JPEG, valid"), (True, "truncated record")],
)
def test_inside_a_run(
    torn: bool, says: str, tmp_path: Path, capfd: Any
) -> None:
    damaged = () if torn else DAMAGED
    photo_folder.write(tmp_path, TRAINING, VALIDATION, damaged=damaged)
    if torn:
        records = next(tmp_path.rglob("*-train.tfrecord*"))
        records.write_bytes(records.read_bytes()[:-100])
    arguments = "--dataset=imagenet2012 --model=imagenet_1 --image_size=32"
    arguments += f" --batch_size=5 --epochs=1 --data_dir={tmp_path}"
    arguments += f" --runs_dir={tmp_path / 'runs'}"
    assert main.run(["main.py", *arguments.split()]) == 1
    *of_libjpeg, line = capfd.readouterr().err.splitlines()
    assert len(of_libjpeg) <= 1
    assert line.startswith(f"main.py: {tmp_path}")
    assert says in line
    assert "go on with --resume" in line


# Folders that do not do.


def move(folder: Path, to: str) -> None:
    folder.rename(folder.with_name(to))


def edit(folder: Path, file: str, old: str, new: str) -> None:
    text = (folder / file).read_text()
    assert old in text
    (folder / file).write_text(text.replace(old, new))


def without(folder: Path, pattern: str) -> None:
    for file in folder.glob(pattern):
        file.unlink()


def torn(folder: Path) -> None:
    (folder / "dataset_info.json").write_text('{"name": "imag')


def one_split(folder: Path) -> None:
    info = json.loads((folder / "dataset_info.json").read_text())
    info["splits"].pop()
    (folder / "dataset_info.json").write_text(json.dumps(info))


def another_format(folder: Path) -> None:
    edit(folder, "dataset_info.json", '"tfrecord"', '"array_record"')


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda f: shutil.rmtree(f.parents[1]), "no such folder"),
        (lambda f: shutil.rmtree(f.parent), "holds no imagenet2012"),
        (lambda f: move(f, "5.1.0.incompleteA1"), "5.1.0.incompleteA1: half"),
        (lambda f: move(f, "2.0.1"), "holds version 2.0.1, and 5.0.0 or"),
        (lambda f: without(f, "dataset_info.json"), "as dataset_info.json"),
        (lambda f: without(f, "features.json"), "as features.json"),
        (lambda f: without(f, "*.tfrecord*"), "6 of its files are not there"),
        (torn, "cannot read what it is"),
        (one_split, "has the splits train, and"),
        (another_format, "are array_record, and tfrecord is read"),
        (lambda f: edit(f, "features.json", '"label"', '"class"'), "image, la"),
        (lambda f: edit(f, "features.json", '"1000"', '"10"'), "1000 classes"),
    ],
)  # fmt: skip
def test_a_folder_that_does_not_do(
    tmp_path: Path, spoil: Any, said: str
) -> None:
    data_dir = tmp_path / "data"
    spoil(photo_folder.write(data_dir, 2, 1, shards=3))
    with pytest.raises(UserError, match=said) as wrong:
        Photos(str(data_dir), SIZE)
    message = str(wrong.value)
    assert "\n" not in message
    assert str(data_dir) in message
    assert "tfds build imagenet2012" in message


def test_the_newest_version_5_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for photos_in_it, version in enumerate(
        ["5.1.0", "5.9.0", "5.10.0", "6.0.0"]
    ):
        photo_folder.write(tmp_path, photos_in_it + 1, 1, version=version)
    assert Photos(str(tmp_path), SIZE).training_images == 3
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert Photos(None, SIZE).training_images == 3


def test_torn_file(tmp_path: Path) -> None:
    photo_folder.write(tmp_path, 9, 1)
    records = next(tmp_path.rglob("*-train.tfrecord*"))
    records.write_bytes(records.read_bytes()[:-100])
    ours = Photos(str(tmp_path), SIZE)
    with pytest.raises(UserError, match="cannot be read"), ours.reading():
        list(ours.training(Share(), 3, 3, 0, 0, 1))


def test_more_photos_in_an_epoch_than_there_are(data_dir: Path) -> None:
    for batch_size, steps in ((TRAINING + 1, 1), (9, 3), (TRAINING + 1, 0)):
        with pytest.raises(UserError, match="25 photos to train on"):
            Photos(str(data_dir), SIZE).training(
                Share(), batch_size, steps, 0, 0, 1
            )


def test_tfds_opens_the_folder_itself(data_dir: Path) -> None:
    builder = tfds.builder("imagenet2012", data_dir=data_dir)
    assert builder.is_prepared()
    photo = next(iter(builder.as_dataset("validation")))
    assert photo["file_name"] == b"validation_0.JPEG"
    assert np.array_equal(photo["image"], whole(500))
