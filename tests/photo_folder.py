"""A small folder of photos in the format of TFDS's imagenet2012 5.1.0."""

import json
from collections.abc import Collection
from pathlib import Path

import numpy as np
import tensorflow as tf

FEATURES = "tensorflow_datasets.core.features."


def name_of(split: str, index: int) -> str:
    """The file name of a photo."""
    return f"{split}_{index}.JPEG"


def label_of(split: str, index: int) -> int:
    """The label of a photo: no two photos have the same."""
    return (500 if split == "validation" else 0) + index


def jpeg(seed: int) -> bytes:
    """A smooth coloured image, about 40 by 60 or 60 by 40 pixels."""
    rng = np.random.default_rng(seed)
    sides = [40, 60] + rng.integers(0, 9, 2)
    y, x = np.meshgrid(
        *map(np.arange, sides[:: 1 - 2 * (seed % 2)]), indexing="ij"
    )
    waves = [
        np.sin(a * y + b * x + c) for a, b, c in rng.uniform(0, 0.2, (3, 3))
    ]
    pixels = (127.5 * (1 + np.stack(waves, -1))).astype(np.uint8)
    return tf.io.encode_jpeg(pixels).numpy()


def write(
    data_dir: Path,
    training: int,
    validation: int,
    shards: int = 1,
    damaged: Collection[str] = (),
    version: str = "5.1.0",
) -> Path:
    """Writes the folder.

    Args:
        data_dir: Where; TFDS takes it as its `data_dir`.
        training: Photos in `train`.
        validation: Photos in `validation`.
        shards: Files of a split.
        damaged: The names of the photos that are not to decode.
        version: Of the data set.

    Returns:
        The folder of the version.
    """
    folder = data_dir / "imagenet2012" / version
    folder.mkdir(parents=True)
    splits = []
    for split, count in {"train": training, "validation": validation}.items():
        parts = np.array_split(np.arange(count), shards)
        for shard, part in enumerate(parts):
            file = f"imagenet2012-{split}.tfrecord-{shard:05}-of-{shards:05}"
            with tf.io.TFRecordWriter(str(folder / file)) as writer:
                for i in part:
                    writer.write(_example(split, int(i), damaged))
        splits.append(
            {
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-"
                "{SHARD_X_OF_Y}",
                "name": split,
                "numBytes": "1",
                "shardLengths": [str(len(part)) for part in parts],
            }
        )
    info = {
        "fileFormat": "tfrecord",
        "moduleName": "tensorflow_datasets.datasets.imagenet2012."
        "imagenet2012_dataset_builder",
        "name": "imagenet2012",
        "splits": splits,
        "version": version,
    }
    features = {
        "file_name": {
            "pythonClassName": f"{FEATURES}text_feature.Text",
            "text": {},
        },
        "image": {
            "pythonClassName": f"{FEATURES}image_feature.Image",
            "image": {
                "dtype": "uint8",
                "encodingFormat": "jpeg",
                "shape": {"dimensions": ["-1", "-1", "3"]},
            },
        },
        "label": {
            "pythonClassName": f"{FEATURES}class_label_feature.ClassLabel",
            "classLabel": {"numClasses": "1000"},
        },
    }
    root = {
        "pythonClassName": f"{FEATURES}features_dict.FeaturesDict",
        "featuresDict": {"features": features},
    }
    (folder / "dataset_info.json").write_text(json.dumps(info))
    (folder / "features.json").write_text(json.dumps(root))
    (folder / "label.labels.txt").write_text(
        "\n".join(f"n{i:08}" for i in range(1000)) + "\n"
    )
    return folder


def _example(split: str, index: int, damaged: Collection[str]) -> bytes:
    name, label = name_of(split, index), label_of(split, index)
    image = b"no photo" if name in damaged else jpeg(label)

    def feature(*values: bytes) -> tf.train.Feature:
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=values))

    return tf.train.Example(
        features=tf.train.Features(
            feature={
                "image": feature(image),
                "file_name": feature(name.encode()),
                "label": tf.train.Feature(
                    int64_list=tf.train.Int64List(value=[label])
                ),
            }
        )
    ).SerializeToString()
