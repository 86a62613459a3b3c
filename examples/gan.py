"""Two networks, two losses, two optimizers: a GAN whose generator and discriminator each seek flat minima."""

import math

import torch
from torch import nn

import flatmin

torch.manual_seed(0)
generator = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))
discriminator = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 1))
g_opt = flatmin.NSO(torch.optim.Adam(generator.parameters(), lr=4e-3, betas=(0.5, 0.9)), sigma=0.005)
d_opt = flatmin.NSO(torch.optim.Adam(discriminator.parameters(), lr=4e-3, betas=(0.5, 0.9)), sigma=0.005)
loss_fn = nn.BCEWithLogitsLoss()
real_label, fake_label = torch.ones(128, 1), torch.zeros(128, 1)


def circle(n):
    angle = 2 * math.pi * torch.rand(n)
    return torch.stack([angle.cos(), angle.sin()], 1)


for _step in range(300):
    real, noise = circle(128), torch.randn(128, 4)  # drawn before the loop: the probes of a step share them
    fake = generator(noise).detach()
    for _probe in d_opt.probes():
        (loss_fn(discriminator(real), real_label) + loss_fn(discriminator(fake), fake_label)).backward()
    d_opt.step()
    for _probe in g_opt.probes():  # what it leaves in the discriminator's gradients, the next d_opt.probes() clears
        loss_fn(discriminator(generator(noise)), real_label).backward()
    g_opt.step()

radius = generator(torch.randn(1000, 4)).norm(dim=1)
print(f"generated points at radius {radius.mean():.2f} ± {radius.std():.2f} (real: 1.00)")
assert abs(radius.mean() - 1) < 0.3
