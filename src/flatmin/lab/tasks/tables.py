"""Two small tables: a classification and a regression, with networks far larger than they need."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flatmin.extras import need
from flatmin.lab.tasks.task import Settings, Splits, Task, by_validation


def _splits(x: Tensor, y: Tensor, seed: int, *, num_train: int, num_pool: int) -> Splits:
    """`num_pool` rows to train and validate, the others to test; inputs in units of their deviations in the pool."""
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    x = (x - x[:num_pool].mean(0)) / x[:num_pool].std(0)
    pool = torch.randperm(num_pool, generator=torch.Generator().manual_seed(seed))
    chosen = pool[:num_train], pool[num_train:], torch.arange(num_pool, len(y))
    train, validation, test = ((x[rows], y[rows]) for rows in chosen)
    return Splits(train, validation, test)


def load_cancer(seed: int) -> Splits:
    """100 training samples drawn by `seed` from a pool of 400, the rest of it to validate; 169 to test."""
    data = need("sklearn.datasets", "lab").load_breast_cancer()
    x, y = torch.tensor(data.data, dtype=torch.float32), torch.tensor(data.target, dtype=torch.long)
    return _splits(x, y, seed, num_train=100, num_pool=400)


def load_diabetes(seed: int) -> Splits:
    """150 training samples drawn by `seed` from a pool of 300, the rest of it to validate; 142 to test."""
    data = need("sklearn.datasets", "lab").load_diabetes()
    x, y = torch.tensor(data.data, dtype=torch.float32), torch.tensor(data.target, dtype=torch.float32)
    return _splits(x, y.unsqueeze(1) / 100, seed, num_train=150, num_pool=300)


def _network(num_inputs: int, num_outputs: int) -> nn.Module:
    layers = [nn.Linear(num_inputs, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, num_outputs)]
    return nn.Sequential(*layers)


CANCER = Task(
    name="cancer",
    summary="569 breast tumours in 30 measures of their cells, 100 of them for training; a 30-64-64-2 ReLU network",
    source="scikit-learn's load_breast_cancer: UCI's Breast Cancer Wisconsin (Diagnostic) (Wolberg et al. 1995)",
    licence="CC BY 4.0",
    load=load_cancer,
    build_model=lambda: _network(30, 2),
    criterion=nn.CrossEntropyLoss(),
    batch_size=20,
    num_gradients=1000,
    settings={
        "base": Settings(lr=0.0033, weight_decay=0.01),
        "base+tail-average": Settings(lr=0.0033, weight_decay=0.03, parts={"tail-average": 0.75}),
        "sam": Settings(lr=0.0066, weight_decay=0.01, radius=0.15),
        "nso-one-point": Settings(lr=0.0033, weight_decay=0.01, radius=0.19),
        "nso": Settings(lr=0.0066, weight_decay=0.01, radius=0.19),
    },
    tuning=by_validation(20, 19),
)

DIABETES = Task(
    name="diabetes",
    summary="progression of diabetes in 442 patients, 150 of them for training; a 10-64-64-1 ReLU network",
    source="scikit-learn's load_diabetes (Efron, Hastie, Johnstone, Tibshirani 2004)",
    licence="comes with scikit-learn, BSD",
    load=load_diabetes,
    build_model=lambda: _network(10, 1),
    criterion=nn.MSELoss(),
    batch_size=20,
    num_gradients=1000,
    settings={
        "base": Settings(lr=0.01, weight_decay=0.1),
        "base+tail-average": Settings(lr=0.01, weight_decay=0.1, parts={"tail-average": 0.75}),
        "sam": Settings(lr=0.01, weight_decay=0.1, radius=0.012),
        "nso-one-point": Settings(lr=0.01, weight_decay=0.1, radius=0.0033),
        "nso": Settings(lr=0.01, weight_decay=0.1, radius=0.0033),
    },
    tuning=by_validation(20, 19),
)
