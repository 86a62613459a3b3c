"""Gradient accumulation in its two meanings: perturb the whole window at once, or each micro-batch by itself."""

import torch
from sklearn.datasets import load_digits
from torch import nn

import flatmin

x, y = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
x = x.float() / 16
parts = list(zip(x[:400].split(20), y[:400].split(20), strict=True))
windows = [parts[i : i + 4] for i in range(0, len(parts), 4)]


def one_perturbation(opt, model, window):
    """All micro-batches at the same points: the step of the whole batch, with the memory of a micro-batch."""
    for _probe in opt.probes():
        for inputs, labels in window:
            (nn.functional.cross_entropy(model(inputs), labels) / len(window)).backward()


def one_perturbation_each(opt, model, window):
    """Every micro-batch at points of its own: m-sharpness for SAM, as many noise draws as micro-batches for NSO."""
    for inputs, labels in window:
        for _probe in opt.probes(share=1 / len(window)):
            nn.functional.cross_entropy(model(inputs), labels).backward()


for evaluate in (one_perturbation, one_perturbation_each):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    opt = flatmin.SAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), rho=0.05)
    for window in windows * 20:
        evaluate(opt, model, window)
        opt.step()
    accuracy = (model(x[400:]).argmax(1) == y[400:]).float().mean()
    print(f"{evaluate.__name__}: test accuracy {accuracy:.3f}")
    assert accuracy > 0.8
