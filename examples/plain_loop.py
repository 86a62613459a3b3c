"""NSO in a plain training loop, with accumulation, clipping, a scheduler and a checkpoint; then how flat it is."""

import torch
from sklearn.datasets import load_digits
from torch import nn

import flatmin

x, y = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
x = x.float() / 16
train = list(zip(x[:400].split(40), y[:400].split(40), strict=True))
loss_fn = nn.CrossEntropyLoss()


def run(make_optimizer):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10))
    opt = make_optimizer(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 30 * len(train))
    for _ in range(30):
        for inputs, labels in train:
            for _probe in opt.probes():
                for part, target in zip(inputs.split(20), labels.split(20), strict=True):  # accumulation
                    (loss_fn(model(part), target) / 2).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            opt.step()
            scheduler.step()
    checkpoint = {"model": model.state_dict(), "optimizer": opt.state_dict()}
    assert set(checkpoint["optimizer"]) == {"state", "param_groups"}  # torch's layout
    accuracy = (model.eval()(x[400:]).argmax(1) == y[400:]).float().mean()
    return accuracy, flatmin.measure(model, loss_fn, train)


for name, sigma in [("SGD", 0.0), ("NSO", 0.05)]:  # sigma = 0 is the base optimizer, bit for bit
    accuracy, report = run(lambda base, sigma=sigma: flatmin.NSO(base, sigma=sigma))
    print(f"{name}: test accuracy {accuracy:.3f}\n{report}\n")
