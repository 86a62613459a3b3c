"""Lightning and the Transformers Trainer with DDP, the real ones: two processes train the model that one does."""

import os
import tempfile
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from benchmarks.collectives import Collectives
from tests.contracts.cases import build
from tests.distributed.pool import Pool

OPTIONS = {"nso": {}, "sam": {"sync_ascent": True}}  # gradients that add up, and one after the other
STEPS, ACCUMULATE = 4, 2


@pytest.fixture(scope="module")
def pair():
    pool = Pool()
    pool(as_launched)
    yield pool
    pool.stop()


def as_launched(rank: int) -> None:
    """What a launcher tells a process; and the frameworks' own warnings, which are not ours to raise on."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="0")
    warnings.simplefilter("ignore")


def by_lightning(rank: int, method: str) -> tuple[list[Tensor], int]:
    from tests.integrations.test_lightning import Net, X, Y, trainer_of

    class Shared(Net):
        def configure_optimizers(self):
            return build(method, torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9), **OPTIONS[method])

    model = Shared(method)
    data = TensorDataset(X, Y)
    sampler = DistributedSampler(data, 2, rank, shuffle=False)  # Lightning's own shuffles
    loader = DataLoader(data, 64 // 2 // ACCUMULATE, sampler=sampler)
    options = {"strategy": "ddp", "devices": 2, "accumulate_grad_batches": ACCUMULATE}
    trainer = trainer_of(use_distributed_sampler=False, **options)
    with Collectives() as seen:
        trainer.fit(model, loader)
    assert trainer.global_step == STEPS
    return outcome(model, seen)


def by_transformers(_rank: int, method: str) -> tuple[list[Tensor], int]:
    from tests.integrations.test_transformers import DATA, InOrder, arguments, base_of, gpt

    model: Any = gpt()
    with tempfile.TemporaryDirectory() as folder, Collectives() as seen:
        options = arguments(folder, 2 * ACCUMULATE)
        options.gradient_accumulation_steps = ACCUMULATE
        trainer: Any = InOrder(
            model=model,
            args=options,
            train_dataset=DATA,
            optimizers=(build(method, base_of(model.parameters()), **OPTIONS[method]), None),  # type: ignore[arg-type]
        )
        trainer.train()
    assert trainer.state.global_step == STEPS
    return outcome(model, seen)


def outcome(model: nn.Module, seen: Collectives) -> tuple[list[Tensor], int]:
    """The weights, and how often all gradients were averaged."""
    weights = [p.detach().clone() for p in model.parameters()]
    return weights, seen.sizes["all_reduce"][sum(p.numel() for p in weights)]


def assert_trained_as_one(results: list[tuple[list[Tensor], int]], one: nn.Module, exchanges: int) -> None:
    for weights, exchanged in results:
        for p, q in zip(weights, one.parameters(), strict=True):
            torch.testing.assert_close(p, q.detach(), atol=1e-6, rtol=0)
        assert exchanged == STEPS * exchanges  # of micro-batches the last one only


@pytest.mark.slow
@pytest.mark.parametrize(("method", "exchanges"), [("nso", 1), ("sam", 2)])
def test_lightning(pair, method, exchanges):
    from tests.integrations.test_lightning import plain

    assert_trained_as_one(pair(by_lightning, method), plain(method), exchanges)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "exchanges"), [("nso", 1), ("sam", 2)])
def test_transformers(pair, method, exchanges):
    from tests.integrations.test_transformers import plain

    assert_trained_as_one(pair(by_transformers, method), plain(method), exchanges)
