"""The embedded task: handwritten digits, few of them for training, so that generalisation is at stake."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn

from flatmin.extras import need
from flatmin.lab.tasks.task import Settings, Splits, Task, by_validation

NUM_TRAIN = 200
NUM_POOL = 1000  # training and validation samples come from here; the other 797 are the test set


@lru_cache(maxsize=1)
def _images() -> tuple[Tensor, Tensor]:
    digits = need("sklearn.datasets", "lab").load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(digits.data, dtype=torch.float32) / 16.0
    return images[order], torch.tensor(digits.target, dtype=torch.long)[order]


def load(seed: int) -> Splits:
    """200 training digits drawn by `seed` from a pool of 1,000, the rest of it to validate; 797 to test."""
    images, labels = _images()
    pool = torch.randperm(NUM_POOL, generator=torch.Generator().manual_seed(seed))
    chosen = pool[:NUM_TRAIN], pool[NUM_TRAIN:], torch.arange(NUM_POOL, len(labels))
    train, validation, test = ((images[rows], labels[rows]) for rows in chosen)
    return Splits(train, validation, test)


def build_model() -> nn.Module:
    """A ReLU network 64-128-128-10 (26,122 parameters)."""
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))


DIGITS = Task(
    name="digits",
    summary="1,797 handwritten digits of 8 x 8 pixels, 200 of them for training; a 64-128-128-10 ReLU network",
    source="scikit-learn's load_digits: the test part of UCI's Optical Recognition of Handwritten Digits "
    "(Alpaydin, Kaynak 1998)",
    licence="CC BY 4.0",
    load=load,
    build_model=build_model,
    criterion=nn.CrossEntropyLoss(),
    batch_size=20,
    num_gradients=2000,
    settings={
        "base": Settings(lr=0.14, weight_decay=1e-3),
        "sam": Settings(lr=0.14, weight_decay=3e-3, radius=0.13),
        "nso-one-point": Settings(lr=0.14, weight_decay=3e-3, radius=0.037),
        "nso": Settings(lr=0.14, weight_decay=3e-3, radius=0.013),
        "base+tail-average": Settings(lr=0.14, weight_decay=1e-3, parts={"tail-average": 0.75}),
        "nso-split": Settings(lr=0.2, weight_decay=1e-3, radius=0.02),
    },
    tuning=f"{by_validation(20, 19)} nso-split: on 5 seeds, 16 settings.",
)
