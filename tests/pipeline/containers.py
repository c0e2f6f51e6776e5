"""The same labelled images in every container that there is a source for, written in the order of class and name."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


class Labelled(NamedTuple):
    class_name: str
    name: str
    data: bytes


def photographs(n_classes: int, n_per_class: int, seed: int = 0) -> list[Labelled]:
    """Smooth random pictures of varied shapes, as JPEG, PNG and WebP."""
    rng = np.random.default_rng(seed)
    made = []
    for label in range(n_classes):
        for number in range(n_per_class):
            coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
            width, height = (int(side) for side in rng.integers(40, 160, 2))
            suffix = ("JPEG", "PNG", "WEBP")[number % 3]
            buffer = io.BytesIO()
            coarse.resize((width, height), Image.Resampling.BICUBIC).save(buffer, suffix)
            made.append(Labelled(f"n{label:08d}", f"n{label:08d}_{number}.{suffix}", buffer.getvalue()))
    return sorted(made)


def classes(samples: Sequence[Labelled]) -> list[str]:
    return sorted({sample.class_name for sample in samples})


def label_of(sample: Labelled, samples: Sequence[Labelled]) -> int:
    return classes(samples).index(sample.class_name)


def add_to_tar(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def tar_bytes(members: Sequence[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in members:
            add_to_tar(archive, name, data)
    return buffer.getvalue()


def class_tar(name: str, samples: Sequence[Labelled]) -> bytes:
    # ImageNet's tars are in no order either
    return tar_bytes([(sample.name, sample.data) for sample in reversed(samples) if sample.class_name == name])


def write_image_folder(root: Path, samples: Sequence[Labelled]) -> str:
    for sample in samples:
        path = root / sample.class_name / sample.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(sample.data)
    return str(root)


def write_tar_of_tars(root: Path, samples: Sequence[Labelled]) -> str:
    root.mkdir()
    path = root / "ILSVRC2012_img_train.tar"
    path.write_bytes(tar_bytes([(f"{name}.tar", class_tar(name, samples)) for name in reversed(classes(samples))]))
    return str(path)


def write_class_tars(root: Path, samples: Sequence[Labelled]) -> str:
    root.mkdir()
    for name in classes(samples):
        (root / f"{name}.tar").write_bytes(class_tar(name, samples))
    return str(root)


def parquet_table(samples: Sequence[Labelled], names: Sequence[str]) -> pa.Table:
    """As `datasets` writes it, class names in the schema's metadata."""
    features = {"image": {"_type": "Image"}, "label": {"names": list(names), "_type": "ClassLabel"}}
    image_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {
        "image": pa.array([{"bytes": sample.data, "path": sample.name} for sample in samples], image_type),
        "label": pa.array([list(names).index(sample.class_name) for sample in samples], pa.int64()),
    }
    return pa.table(columns).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def write_parquet(root: Path, samples: Sequence[Labelled], *, n_files: int = 2, group_rows: int = 7) -> str:
    root.mkdir()
    for number, rows in enumerate(np.array_split(np.arange(len(samples)), n_files)):
        table = parquet_table([samples[row] for row in rows], classes(samples))
        pq.write_table(table, root / f"train-{number:05d}-of-{n_files:05d}.parquet", row_group_size=group_rows)
    return str(root)


def write_webdataset(root: Path, samples: Sequence[Labelled], *, n_shards: int = 3) -> str:
    root.mkdir()
    for number, rows in enumerate(np.array_split(np.arange(len(samples)), n_shards)):
        members = []
        for sample in (samples[row] for row in rows):
            stem, _, suffix = sample.name.partition(".")
            label = label_of(sample, samples)
            members.append((f"{stem}.{suffix.lower()}", sample.data))
            members.append((f"{stem}.cls", str(label).encode()))
            members.append((f"{stem}.json", json.dumps({"label": label, "class_name": sample.class_name}).encode()))
        (root / f"imagenet-{number:04d}.tar").write_bytes(tar_bytes(members))
    return str(root)


def write_hdf5(root: Path, samples: Sequence[Labelled]) -> str:
    root.mkdir()
    with h5py.File(root / "train.h5", "w") as file:
        images = file.create_dataset("images", (len(samples),), h5py.vlen_dtype(np.uint8))
        for row, sample in enumerate(samples):
            images[row] = np.frombuffer(sample.data, np.uint8)
        file["labels"] = [label_of(sample, samples) for sample in samples]
        file["classes"] = classes(samples)
    return str(root / "train.h5")


def write_zip(root: Path, samples: Sequence[Labelled]) -> str:
    root.mkdir()
    with zipfile.ZipFile(root / "images.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for sample in samples:
            archive.writestr(f"train/{sample.class_name}/{sample.name}", sample.data)
    return str(root / "images.zip")


def write_edm_zip(root: Path, samples: Sequence[Labelled]) -> str:
    root.mkdir()
    named = [(f"{row // 10:05d}/img{row:08d}.png", sample) for row, sample in enumerate(samples)]
    with zipfile.ZipFile(root / "edm.zip", "w", zipfile.ZIP_STORED) as archive:
        for name, sample in named:
            archive.writestr(name, sample.data)
        labels = [[name, label_of(sample, samples)] for name, sample in named]
        archive.writestr("dataset.json", json.dumps({"labels": labels}))
    (root / "classes.txt").write_text("\n".join(classes(samples)))
    return str(root / "edm.zip")


def write_labels_file(root: Path, samples: Sequence[Labelled]) -> str:
    root.mkdir()
    lines = ["file,label"]
    for sample in samples:
        (root / sample.name).write_bytes(sample.data)
        lines.append(f"{sample.name},{sample.class_name}")
    (root / "labels.csv").write_text("\n".join(lines))
    return str(root)


WRITERS: dict[str, tuple[str, Callable[..., str]]] = {  # name → kind, writer
    "image-folder": ("image-folder", write_image_folder),
    "tar-of-tars": ("tar-of-tars", write_tar_of_tars),
    "class-tars": ("class-tars", write_class_tars),
    "parquet": ("parquet", write_parquet),
    "webdataset": ("webdataset", write_webdataset),
    "hdf5": ("hdf5", write_hdf5),
    "zip": ("zip", write_zip),
    "edm-zip": ("zip", write_edm_zip),
    "labels-file": ("labels-file", write_labels_file),
}
