"""Digits, from a minimum that fits its training data and knows little else: a test of who can leave it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from flatmin.lab.tasks import digits
from flatmin.lab.tasks.task import Settings, Splits, Task

NUM_MISLABELLED = 300  # of the pool; they are fitted with wrong labels, and used for nothing else
FITTED = 0.01  # mean loss at which the start is reached
NUM_STEPS = 4000  # at most, on the way there


def _parts() -> tuple[Splits, tuple[Tensor, Tensor]]:
    train, (x, y), test = digits.load(0)
    mislabelled, validation = (x[:NUM_MISLABELLED], y[:NUM_MISLABELLED]), (x[NUM_MISLABELLED:], y[NUM_MISLABELLED:])
    return Splits(train, validation, test), mislabelled


def load(seed: int) -> Splits:
    """200 digits, 500 to validate, 797 to test: the same for every seed, which fixes start and batches."""
    return _parts()[0]


def build_model() -> nn.Module:
    """The network of `digits` at a minimum for the training digits and for others with wrong labels."""
    model, (splits, (x, y)) = digits.build_model(), _parts()
    wrong = (y + torch.randint(1, 10, y.shape)) % 10
    x, y = torch.cat([splits.train[0], x]), torch.cat([splits.train[1], wrong])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    for step in range(NUM_STEPS):
        rows = torch.randint(len(y), (100,))
        optimizer.zero_grad()
        cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
        if step % 50 == 49 and cross_entropy(model(x).detach(), y) < FITTED:
            break
    optimizer.zero_grad()
    return model


BAD_START = Task(
    name="bad-start",
    summary="digits, begun at a minimum of the training loss that also fits 300 other digits with wrong labels",
    source=digits.DIGITS.source,
    licence=digits.DIGITS.licence,
    load=load,
    build_model=build_model,
    criterion=nn.CrossEntropyLoss(),
    batch_size=20,
    num_gradients=4000,
    settings={
        "base": Settings(lr=0.01, weight_decay=1e-5),
        "rsp": Settings(lr=0.01, weight_decay=1e-5, radius=25.6),
        "sap": Settings(lr=0.01, weight_decay=1e-5, radius=0.1),
    },
    tuning="One small learning rate for all; of 5 radii, and of 5 weight decays that hardly matter, the best by "
    "validation loss on 5 other seeds (flatmin tune); the test set was not used.",
)
