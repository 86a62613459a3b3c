"""Sparse embedding gradients: the same step as with dense ones, under an optimizer that takes them."""

import pytest
import torch
import torch.nn.functional as F
from torch.optim import SGD

import flatmin
from tests.contracts.cases import Embedded, build, each_method


def run(method, sparse, form):
    torch.manual_seed(0)
    model = Embedded(sparse)
    optimizer = build(method, SGD(model.parameters(), lr=0.1, momentum=0.9))
    x, y = torch.randn(32, 6), torch.randint(3, (32,))

    def evaluate():
        inputs, targets = optimizer.take(x, y)
        loss = optimizer.mean(F.cross_entropy(model(inputs), targets, reduction="none"))
        loss.backward()
        return loss

    def closure():
        optimizer.zero_grad()
        return evaluate()

    for _ in range(4):
        if form == "closure":
            optimizer.step(closure)
        else:
            for _ in optimizer.probes():
                evaluate()
            optimizer.step()
    return dict(model.named_parameters())


@each_method
@pytest.mark.parametrize("form", ["closure", "loop"])
def test_sparse_gradients_give_the_step_of_dense_ones(method, form):
    if method == "momentum-sam":
        pytest.skip("SGD keeps a sparse momentum: its decay does not reach the rows that a batch leaves out")
    if not flatmin.methods()[method].factory.takes_sparse:  # type: ignore[union-attr]
        with pytest.raises(ValueError, match=r"cannot take sparse gradients\. Use sparse=False in the embedding"):
            run(method, True, form)
        return
    dense, sparse = run(method, False, form), run(method, True, form)
    for name, p in dense.items():
        torch.testing.assert_close(sparse[name], p, rtol=1e-5, atol=1e-6)
