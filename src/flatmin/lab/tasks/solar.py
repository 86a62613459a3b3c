"""Photos of solar cells, sound or defective: the end of a network that ImageNet has trained is fine-tuned on a few."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from flatmin.extras import need
from flatmin.files import replacing
from flatmin.lab.packages import ELPV, LITE0, cache
from flatmin.lab.tasks.lite0 import HEAD, trained
from flatmin.lab.tasks.task import Settings, Splits, Task, by_validation

SIZE, BATCH = 96, 64
NUM_TRAIN, NUM_POOL = 300, 1000
FEATURES = f"solar-cells-lite0-{SIZE}.safetensors"


@lru_cache(maxsize=1)
def features() -> tuple[Tensor, Tensor]:
    """What the trunk makes of the photos, (2624, 192, 3, 3), and the labels; kept in the cache.

    The first time it takes a minute.

    Raises:
        ValueError: if photos or weights were not fetched.
    """
    safetensors = need("safetensors.torch", "lab")
    path = cache() / FEATURES
    if not path.exists():
        ELPV.open().close()  # whatever is missing is said before a minute has passed
        found = _computed()
        with replacing(path) as temporary:
            safetensors.save_file(found, temporary)
    found = safetensors.load_file(path)
    return found["features"], found["labels"]


@torch.no_grad()
def _computed() -> dict[str, Tensor]:
    trunk, _ = trained()
    images, labels = _photos()
    parts = [trunk(part.expand(-1, 3, -1, -1)) for part in images.split(BATCH)]
    return {"features": torch.cat(parts), "labels": labels}


def _photos() -> tuple[Tensor, Tensor]:
    """Grey photos (2624, 1, SIZE, SIZE) in -1 .. 1, and whether they are held to be defective with more than 1/2."""
    pil = need("PIL.Image", "lab")
    with ELPV.open() as archive:
        lines = archive.read("elpv_dataset/data/labels.csv").decode().split("\n")
        rows = [line.split() for line in lines if line.strip()]
        photos = []
        for name, _, _ in rows:
            with archive.open(f"elpv_dataset/data/{name}") as file, pil.open(file) as photo:
                photos.append(np.asarray(photo.convert("L").resize((SIZE, SIZE), pil.Resampling.BILINEAR)))
    images = (torch.from_numpy(np.stack(photos)).float().unsqueeze(1) - 127) / 128
    return images, torch.tensor([int(float(probability) > 0.5) for _, probability, _ in rows])


def load(seed: int) -> Splits:
    """300 training photos drawn by `seed` from a pool of 1,000, the rest of it to validate; 1,624 to test."""
    x, y = features()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    pool = torch.randperm(NUM_POOL, generator=torch.Generator().manual_seed(seed))
    chosen = order[pool[:NUM_TRAIN]], order[pool[NUM_TRAIN:]], order[NUM_POOL:]
    return Splits(*((x[rows], y[rows]) for rows in chosen))


def build_model() -> nn.Module:
    """The end of the network as ImageNet has trained it, with a new linear layer for two classes."""
    _, end = trained()
    end._fc = nn.Linear(HEAD, 2)
    return end.train()


SOLAR = Task(
    name="solar-cells",
    summary="2,624 photos of solar cells, sound or defective, 300 of them for training: the end of an EfficientNet-"
    "Lite0 that ImageNet has trained is fine-tuned (its last block, last convolution and a new linear layer)",
    source=f"{ELPV.what}; {LITE0.what}; to be fetched with flatmin data",
    licence=f"{ELPV.licence}; weights {LITE0.licence}",
    load=load,
    build_model=build_model,
    criterion=nn.CrossEntropyLoss(),
    batch_size=20,
    num_gradients=400,
    settings={
        "base": Settings(lr=0.0014, weight_decay=0.03),
        "sam": Settings(lr=0.0029, weight_decay=0.03, radius=0.06),
        "nso": Settings(lr=0.0029, weight_decay=0.03, radius=0.0085),
    },
    tuning=by_validation(3, 19),
)
