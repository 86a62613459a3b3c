"""Segmentation: a small U-Net with instance norm, batches that are dicts, SAM on the norm layers only (SAM-ON)."""

import torch
from sklearn.datasets import load_digits
from torch import nn

import flatmin

torch.manual_seed(0)
images = torch.as_tensor(load_digits(return_X_y=True)[0][:240]).float().view(-1, 1, 8, 8) / 16
masks = (images > 0.5).float()
noisy = images + 0.3 * torch.randn_like(images)
*train, test = [{"image": a, "mask": b} for a, b in zip(noisy.split(40), masks.split(40), strict=True)]


def block(c_in, c_out):
    return nn.Sequential(nn.Conv2d(c_in, c_out, 3, padding=1), nn.InstanceNorm2d(c_out, affine=True), nn.ReLU())


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter, self.down, self.up = block(1, 8), block(8, 16), block(16, 8)
        self.leave = nn.Conv2d(16, 1, 1)

    def forward(self, x):
        fine = self.enter(x)
        coarse = self.up(self.down(nn.functional.max_pool2d(fine, 2)))
        return self.leave(torch.cat([fine, nn.functional.interpolate(coarse, scale_factor=2)], 1))


model, loss_fn = UNet(), nn.BCEWithLogitsLoss()
base = torch.optim.AdamW(model.parameters(), lr=1e-2)
opt = flatmin.SAM(base, rho=0.5, perturb=flatmin.norm_parameters(model))  # all are trained, the norms are moved
for _epoch in range(10):
    for batch in train:
        for _probe in opt.probes():
            loss_fn(model(batch["image"]), batch["mask"]).backward()
        opt.step()
found, truth = model(test["image"]) > 0, test["mask"] > 0
dice = 2 * (found & truth).sum() / (found.sum() + truth.sum())
print(f"Dice on images that it has not seen: {dice:.3f}")
assert dice > 0.8
