"""A small WebDataset of real photographs with captions, as Energon reads it."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import skimage.data
from megatron.energon.flavors.webdataset import BaseWebdatasetFactory
from PIL import Image
from sklearn.datasets import load_sample_images

CAPTIONS = {
    "astronaut": "An astronaut in front of a flag.",
    "chelsea": "A cat looks up.",
    "coffee": "A cup of coffee on a table.",
    "rocket": "A rocket is launched.",
    "hubble_deep_field": "Galaxies, far away.",
    "camera": "A photographer with a camera on a meadow.",
    "coins": "Old coins in rows.",
    "moon": "The surface of the moon.",
    "page": "A page of a book.",
}
"""Those of scikit-image's pictures that come with the package, as colours or as greys."""

_DATASET = "__module__: megatron.energon\n__class__: CrudeWebdataset\n"


def photographs() -> list[tuple[str, Image.Image]]:
    """Captions and pictures, whose sizes all differ."""
    made = [
        (caption, Image.fromarray(getattr(skimage.data, name)()))
        for name, caption in CAPTIONS.items()
    ]
    for caption, pixels in zip(
        ("A Chinese temple.", "A dahlia."), load_sample_images().images, strict=True
    ):
        made.append((caption, Image.fromarray(pixels)))
    for number, (_, picture) in enumerate(made):
        picture.thumbnail((60 + 5 * number, 90 - 5 * number))
    return made


def make_dataset(folder: Path, *, samples: int = 24, shards: int = 4) -> Path:
    """The data set's folder; sample i shows i modulo 4 photographs, one of each four only text.

    The last shards are those of validation.
    """
    folder.mkdir(parents=True)
    pictures = photographs()
    for shard in range(shards):
        with tarfile.open(folder / f"shard-{shard}.tar", "w") as tar:
            for number in range(shard, samples, shards):
                for name, data in _sample(number, pictures):
                    entry = tarfile.TarInfo(f"{number:06d}.{name}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
    BaseWebdatasetFactory.prepare_dataset(
        folder,
        [f"shard-{shard}.tar" for shard in range(shards)],
        split_parts_patterns=[
            ("train", f"shard-[0-{shards - 2}].tar"),
            ("val", f"shard-{shards - 1}.tar"),
        ],
        workers=1,
    )
    (folder / ".nv-meta" / "dataset.yaml").write_text(_DATASET)
    return folder


def _sample(number: int, pictures: list[tuple[str, Image.Image]]) -> Iterator[tuple[str, bytes]]:
    """The files of a sample: a caption behind each of its photographs, or words alone."""
    parts: list[dict[str, str]] = [{"text": f"Sample {number}."}]
    for place in range(number // 4 % 4):
        caption, picture = pictures[(number + place) % len(pictures)]
        suffix, kind = ("jpg", "JPEG") if place % 2 else ("png", "PNG")
        encoded = io.BytesIO()
        picture.save(encoded, kind)
        yield f"{place}.{suffix}", encoded.getvalue()
        parts += [{"image": f"{place}.{suffix}"}, {"text": caption}]
    yield "json", json.dumps(parts).encode()
