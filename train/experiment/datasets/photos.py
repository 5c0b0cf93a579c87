"""ImageNet: a stream of photos from the files of TensorFlow Datasets.

All happens inside of TensorFlow's graph, on the hosts of the accelerators. A
training photo is a window drawn anew in every epoch, mirrored half of the
time; the JPEG is decoded in the window only. What a batch holds depends on the
seed, the epoch, the step and the number of processes alone, so that a resumed
run sees what an uninterrupted one would have seen.

TensorFlow Datasets has re-encoded ImageNet's few PNG and CMYK files since
version 3.0.0: all photos of version 5 are RGB or grey JPEGs. One that is not,
or that is damaged, ends the run with its name: an error rate is that of all
photos, or none.
"""

import contextlib
import os
from collections.abc import Callable
from collections.abc import Iterator

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from tensorflow_datasets.core.utils.version import list_all_versions

from experiment.datasets import DATASETS
from experiment.devices.one import Share
from experiment.errors import UserError
from experiment.errors import reason

NAME = "imagenet2012"
CLASSES = DATASETS[NAME].classes
SHUFFLE_BUFFER = 8192
CROP_AREA = DATASETS[NAME].crop_area
FILES_AT_ONCE = 16
PREPARE = (
    "ImageNet cannot be downloaded automatically: get "
    "ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar from "
    "https://image-net.org/download-images and prepare them with 'tfds build "
    f"{NAME} --manual_dir=FOLDER_OF_BOTH --data_dir=DATA_DIR'."
)
AGAIN = f"Delete the folder and prepare {NAME} again, as tfrecord. {PREPARE}"


def decode_window(photo: tf.Tensor, window: tf.Tensor) -> tf.Tensor:
    """Decodes a window `[y, x, height, width]` of a JPEG.

    The pixels are those of the whole photo, but for colour in the first and
    the last column where a JPEG has it at half the resolution: it is
    interpolated, and the columns beyond are not decoded.
    """
    return tf.io.decode_and_crop_jpeg(photo, window, channels=3)


class Photos:
    """The photos of ImageNet in a folder of TensorFlow Datasets.

    Args:
        data_dir: The folder that holds `imagenet2012`, local or a bucket's;
            `None`: TFDS's own default.
        image_size: Height and width of the images to make, in pixels.
        hold_out: Whether the last hundredth of `train` (at least one photo) is
            the validation, and the split `validation` is not touched.
        one_hot: Whether labels are one-hot, instead of class numbers.
        crop_area: The least share of a photo's area that a training window
            has.

    Attributes:
        training_images, validation_images: How many there are.
        test_images: 0: the labels of ImageNet's are not public.

    Raises:
        UserError: If the folder does not hold what can be read.
    """

    def __init__(
        self,
        data_dir: str | None,
        image_size: int,
        hold_out: bool = False,
        one_hot: bool = False,
        crop_area: float = CROP_AREA,
    ) -> None:
        self._info = find(data_dir).info
        self._size = image_size
        self._one_hot = one_hot
        self._crop_area = crop_area
        self.test_images = 0
        photos = self._info.splits["train"].num_examples
        held = max(photos // 100, 1) if hold_out else 0
        self.training_images = photos - held
        self._validation = ("train", self.training_images, photos)
        if not hold_out:
            photos = self._info.splits["validation"].num_examples
            self._validation = ("validation", 0, photos)
        self.validation_images = photos - self._validation[1]

    def training(
        self,
        share: Share,
        batch_size: int,
        steps_per_epoch: int,
        seed: int,
        first_step: int,
        epochs: int,
    ) -> tf.data.Dataset:
        """The training batches of a process, from a step on.

        Each epoch reads the process's part of the files in an order of its
        own, 16 at a time, and shuffles the photos, not yet decoded, in a
        buffer of 8192: for ImageNet 0.9 GB of memory in each process. Photos
        before the first step are read in its epoch, but not decoded.

        Args as of `arrays.TrainingBatches`. Batches are those of one replica,
        ordered by step, then by replica: images, labels, weights of 1.

        Raises:
            UserError: If there are fewer photos than an epoch needs.
        """
        if not 0 < steps_per_epoch * batch_size <= self.training_images:
            raise UserError(
                f"{steps_per_epoch} steps of {batch_size} photos an epoch: "
                f"there are {self.training_images} photos to train on. Take a "
                "smaller batch."
            )
        each = batch_size // share.replicas
        here = each * share.count
        part = share.part(0, self.training_images)
        first_epoch, done = divmod(first_step, steps_per_epoch)

        def of_epoch(epoch: tf.Tensor) -> tf.data.Dataset:
            # Of the graph of this function alone; beside it the epoch is
            # shuffle's seed, which has to be a constant beside 0.
            tf.random.set_seed(seed % (2**31 - 2) + 1)
            records = self._records("train", *part, epoch)
            records = records.shuffle(
                SHUFFLE_BUFFER, epoch, reshuffle_each_iteration=False
            )

            def counted(place: tf.Tensor, record: tf.Tensor) -> tuple:
                """The photo's number among all that are ever trained on."""
                step = epoch * steps_per_epoch + place // here
                start = step * batch_size + share.first * each
                return start + place % here, record

            return (
                records.enumerate()
                .take(steps_per_epoch * here)
                .skip(done * here * tf.cast(epoch == first_epoch, tf.int64))
                .map(counted)
            )

        def pixels(number: tf.Tensor, photo: tf.Tensor) -> tf.Tensor:
            drawn = tf.stack([tf.constant(seed, tf.int64), number])
            return training_pixels(photo, drawn, self._size, self._crop_area)

        photos = (
            tf.data.Dataset.range(first_epoch, epochs)
            .flat_map(of_epoch)
            .map(self._parsed(1.0), tf.data.AUTOTUNE)
        )
        return self._batches(photos, each, pixels)

    def validation(
        self, share: Share, batch_size: int, steps: int
    ) -> tf.data.Dataset:
        """The validation batches of a process, again and again.

        In one evaluation each photo comes once in one process. Batches are
        ordered as in training, filled and weighted as those of
        `arrays.EvaluationBatches`.
        """
        each = batch_size // share.replicas
        split, *whole = self._validation
        start, stop = share.part(*whole)
        weight = steps * batch_size / self.validation_images
        black = tf.io.encode_jpeg(tf.zeros((1, 1, 3), tf.uint8))
        filling = (
            tf.data.Dataset.from_tensors((0, black, self._label(0), 0.0))
            .map(lambda number, *rest: (tf.cast(number, tf.int64), *rest))
            .repeat(steps * each * share.count - (stop - start))
        )
        photos = (
            self._records(split, start, stop)
            .enumerate()
            .map(self._parsed(weight), tf.data.AUTOTUNE)
            .concatenate(filling)
        )

        def pixels(number: tf.Tensor, photo: tf.Tensor) -> tf.Tensor:
            return evaluation_pixels(photo, self._size)

        return self._batches(photos.repeat(), each, pixels)

    def probe(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """The first n validation photos, or all, and their labels."""
        size = min(n, self.validation_images)
        steps = -(-self.validation_images // size)
        batches = self.validation(Share(), size, steps)
        images, labels, _ = next(batches.as_numpy_iterator())
        return images, labels

    def _records(
        self, split: str, start: int, stop: int, epoch: tf.Tensor | None = None
    ) -> tf.data.Dataset:
        """Serialized photos of a split, files in an epoch's order, or sorted.

        Only the files that hold these photos are opened.
        """
        files = []
        if start < stop:
            part = self._info.splits[f"{split}[{start}:{stop}]"]
            files = part.file_instructions
        order = tf.data.Dataset.from_tensor_slices(
            (
                tf.constant([str(f.filename) for f in files], tf.string),
                tf.constant([f.skip for f in files], tf.int64),
                tf.constant([f.take for f in files], tf.int64),
            )
        )
        if epoch is not None:
            order = order.shuffle(
                len(files), epoch, reshuffle_each_iteration=False
            )
        return order.interleave(
            lambda file, skip, take: (
                tf.data.TFRecordDataset(file, buffer_size=1 << 20)
                .skip(skip)
                .take(take)
            ),
            cycle_length=FILES_AT_ONCE,
            block_length=FILES_AT_ONCE,
            num_parallel_calls=tf.data.AUTOTUNE,
            deterministic=True,
        )

    def _example(self, record: tf.Tensor) -> dict[str, tf.Tensor]:
        """A serialized photo, not decoded."""
        return self._info.features.deserialize_example(
            record, decoders={"image": tfds.decode.SkipDecoding()}
        )

    def _parsed(self, weight: float) -> Callable[..., tuple]:
        """Number, JPEG, label and weight of a serialized photo."""

        def parse(number: tf.Tensor, record: tf.Tensor) -> tuple:
            photo = self._example(record)
            return number, photo["image"], self._label(photo["label"]), weight

        return parse

    def _label(self, label: tf.Tensor | int) -> tf.Tensor:
        if self._one_hot:
            return tf.one_hot(label, CLASSES)
        return tf.cast(label, tf.int64)

    def _batches(
        self,
        photos: tf.data.Dataset,
        batch_size: int,
        pixels: Callable[[tf.Tensor, tf.Tensor], tf.Tensor],
    ) -> tf.data.Dataset:
        """Photos in batches."""
        options = tf.data.Options()
        options.deterministic = True
        options.experimental_distribute.auto_shard_policy = (
            tf.data.experimental.AutoShardPolicy.OFF  # a Share is one already
        )
        return (
            photos.map(
                lambda number, photo, label, weight: (
                    pixels(number, photo),
                    label,
                    weight,
                ),
                tf.data.AUTOTUNE,
            )
            .batch(batch_size, drop_remainder=True)
            .prefetch(tf.data.AUTOTUNE)
            .with_options(options)
        )

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """A scope in which what cannot be read is an error of one line.

        Raises:
            UserError: If there is a file that cannot be read, or a photo that
                does not decode.
        """
        try:
            yield
        except tf.errors.OpError as error:
            # Between two tellings of where in the graph it came up.
            said = error.message.split("[[")[0].strip().splitlines()[-1]
            here = str(self._info.data_dir) in error.message
            if "JPEG" in said:
                what = f"these photos do not decode: {self._undecodable()}"
            elif here or isinstance(error, tf.errors.DataLossError):
                what = f"a file cannot be read ({said})"
            else:
                raise
            raise UserError(
                f"{self._info.data_dir}: {what}. Get the files again, or "
                f"prepare {NAME} again, and go on with --resume. {PREPARE}"
            ) from error

    def _undecodable(self) -> str:
        """The names of the photos that do not decode, of all there are.

        What failed tells no name, and telling one would cost each step.
        """
        print("A photo does not decode; all are looked at for their names.")
        lost: list[str] = []
        for split in ("train", "validation"):
            photos = self._records(
                split, 0, self._info.splits[split].num_examples
            ).map(self._example, tf.data.AUTOTUNE)
            decoded = photos.map(
                lambda photo: {
                    "file_name": photo["file_name"],
                    "size": tf.size(tf.io.decode_jpeg(photo["image"], 3)),
                },
                tf.data.AUTOTUNE,
            ).ignore_errors()
            names, sound = (
                {photo["file_name"].decode() for photo in some}
                for some in map(
                    tf.data.Dataset.as_numpy_iterator, (photos, decoded)
                )
            )
            lost += sorted(names - sound)
        return ", ".join(lost)


# What becomes of a photo.


def training_pixels(
    photo: tf.Tensor, seed: tf.Tensor, size: int, crop_area: float
) -> tf.Tensor:
    """A random window of a JPEG, resized, half of the time mirrored.

    The seed is the run's and the photo's number, `(2,)` int64.
    """
    even = seed * [1, 2]  # two draws, and a seed of its own for each
    window = random_window(tf.io.extract_jpeg_shape(photo), even, crop_area)
    image = resized(decode_window(photo, window), size)
    mirrored = tf.random.stateless_uniform((), even + [0, 1]) < 0.5
    return tf.cond(mirrored, lambda: tf.reverse(image, [1]), lambda: image)


def evaluation_pixels(photo: tf.Tensor, size: int) -> tf.Tensor:
    """The central square of 0.875 of a JPEG's short side, resized."""
    sides = tf.io.extract_jpeg_shape(photo)[:2]
    side = tf.maximum(7 * tf.reduce_min(sides) // 8, 1)
    window = tf.concat([(sides - side) // 2, [side, side]], 0)
    return resized(decode_window(photo, window), size)


def random_window(
    shape: tf.Tensor, seed: tf.Tensor, crop_area: float = CROP_AREA
) -> tf.Tensor:
    """A window `[y, x, height, width]` of a photo of some shape.

    It has `crop_area` to 1 of the photo's area and an aspect ratio of 3/4 to
    4/3, drawn in at most 10 attempts; else it is the centre.
    """
    begin, extent, _ = tf.image.stateless_sample_distorted_bounding_box(
        shape,
        tf.zeros((1, 0, 4)),
        seed,
        min_object_covered=0.0,
        aspect_ratio_range=(3 / 4, 4 / 3),
        area_range=(crop_area, 1.0),
        max_attempts=10,
        use_image_if_no_bounding_boxes=True,
    )
    begin, extent = begin[:2], extent[:2]
    # All of a photo, after 10 attempts, may be too long.
    seen = tf.minimum(extent, (4 * extent[::-1] + 2) // 3)
    return tf.concat([begin + (extent - seen) // 2, seen], 0)


def resized(image: tf.Tensor, size: int) -> tf.Tensor:
    """A uint8 image resized bilinearly, of known shape."""
    image = tf.round(tf.image.resize(image, (size, size)))
    return tf.ensure_shape(tf.cast(image, tf.uint8), (size, size, 3))


# Where the photos are.


def find(data_dir: str | None) -> tfds.core.DatasetBuilder:
    """Opens the newest version 5 of ImageNet in a folder.

    Args:
        data_dir: The folder that holds `imagenet2012`; `None`: TFDS's own.

    Raises:
        UserError: If there is none that has all that is needed.
    """
    if data_dir is None:
        data_dir = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    home = tfds.core.Path(data_dir).expanduser() / NAME
    versions = list_all_versions(home)  # the newest last
    fitting = [version for version in versions if version.match("5.*.*")]
    if fitting:
        return _opened(home / str(fitting[-1]))
    halves = sorted(folder.name for folder in home.glob("*.incomplete*"))
    if not home.parent.is_dir():
        found = "no such folder"
    elif halves:
        found = f"{NAME}/{halves[0]}: half prepared, and to be deleted"
    elif versions:
        found = f"holds version {', '.join(map(str, versions))}, and 5.0.0 or "
        found += "later 5 is needed"
    else:
        found = f"holds no {NAME}"
    raise UserError(
        f"--data_dir={data_dir}: {found}. Give the folder that holds {NAME} as "
        f"TensorFlow Datasets wrote it. {PREPARE}"
    )


def _opened(folder: tfds.core.Path) -> tfds.core.DatasetBuilder:
    there = {file.name for file in folder.iterdir()}
    missing = {"dataset_info.json", "features.json"} - there
    builder, found = None, ""
    try:
        if not missing:
            builder = tfds.builder_from_directory(folder)
            found = _unfit(builder.info)
    except Exception as error:  # torn or foreign JSON, in many ways
        found = f"TensorFlow Datasets cannot read what it is ({reason(error)})"
    if builder and not found:
        missing = {
            name
            for split in ("train", "validation")
            for name in builder.info.splits[split].filenames
        } - there
    if missing:
        found = f"half prepared: {len(missing)} of its files are not there, "
        found += f"such as {min(missing)}"
    if found:
        raise UserError(f"{folder}: {found}. {AGAIN}")
    return builder


def _unfit(info: tfds.core.DatasetInfo) -> str:
    """Why a data set cannot be read as ImageNet, or an empty string."""
    features = info.features
    if info.file_format != tfds.core.FileFormat.TFRECORD:
        return f"its files are {info.file_format.value}, and tfrecord is read"
    if not {"train", "validation"} <= set(info.splits):
        has = ", ".join(info.splits) or "none"
        return f"has the splits {has}, and train and validation are needed"
    if (
        {"image", "label", "file_name"} <= set(features)
        and features["image"].np_dtype == np.uint8
        and getattr(features["label"], "num_classes", 0) == CLASSES
    ):
        return ""
    return (
        f"its photos have {', '.join(features)}, and image, label (of "
        f"{CLASSES} classes) and file_name are needed"
    )
