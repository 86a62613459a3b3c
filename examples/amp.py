"""Mixed precision: bf16 autocast, and fp16 with a GradScaler. On a GPU write "cuda" for "cpu"."""

import torch
from sklearn.datasets import load_digits
from torch import nn

import flatmin

x, y = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
x = x.float() / 16
train = list(zip(x[:400].split(40), y[:400].split(40), strict=True))
device = "cpu"


def run(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    opt = flatmin.SAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), rho=0.05)
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
    for _ in range(10):
        for inputs, labels in train:
            for _probe in opt.probes(scaler):
                with torch.autocast(device, dtype):
                    loss = nn.functional.cross_entropy(model(inputs), labels)
                scaler.scale(loss).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # the direction is unscaled already
            opt.step()  # skips after an overflow in any probe, and updates the scaler
    accuracy = (model(x[400:]).argmax(1) == y[400:]).float().mean()
    print(f"{dtype}: test accuracy {accuracy:.3f}, {opt.num_skipped} steps skipped, scale {scaler.get_scale():g}")
    assert accuracy > 0.8


run(torch.bfloat16)
run(torch.float16)
