"""Accelerate: accumulation, clipping, one process or several (`accelerate launch`, `torchrun`)."""

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import flatmin
from flatmin.integrations.accelerate import probes, windows

x, y = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
x = x.float() / 16
loss_fn = nn.CrossEntropyLoss()

on_cpu = not torch.accelerator.is_available()  # without it Accelerate does not join processes on CPUs
accelerator = Accelerator(gradient_accumulation_steps=4, cpu=on_cpu)  # precision: accelerate launch --mixed_precision
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
opt = flatmin.SAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), rho=0.05)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 1000)
loader = DataLoader(TensorDataset(x[:480], y[:480]), batch_size=16, shuffle=True)
model, opt, loader, scheduler = accelerator.prepare(model, opt, loader, scheduler)

for _epoch in range(20):
    for window in windows(accelerator, model, loader):
        for _probe in probes(accelerator, opt):
            for inputs, labels in window:
                accelerator.backward(loss_fn(model(inputs), labels))
        accelerator.clip_grad_norm_(model.parameters(), 5.0)
        opt.step()
        scheduler.step()

accuracy = (model(x[480:]).argmax(1) == y[480:]).float().mean()
accelerator.print(f"test accuracy {accuracy:.3f} after {opt.optimizer.num_steps} steps")
assert accuracy > 0.8
