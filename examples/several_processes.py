"""Two processes: NSO with replicas (DDP), then SAM on shards (FSDP2), measured. Starts itself under torchrun."""

import os
import subprocess
import sys

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import flatmin


def train(model: nn.Module, opt: flatmin.FlatOptimizer) -> float:
    rank, loss = distributed.get_rank(), torch.zeros(())
    generator = torch.Generator().manual_seed(rank)  # each process has data of its own
    for _ in range(20):
        x = torch.randn(32, 10, generator=generator)
        for _ in opt.probes():
            loss = nn.functional.cross_entropy(model(x), (x.sum(1) > 0).long())
            loss.backward()
        opt.step()
    return loss.item()


def main() -> None:
    distributed.init_process_group("gloo")
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 2)))
    base = torch.optim.AdamW(model.parameters(), lr=1e-2)
    replicas = train(model, flatmin.NSO(base, sigma=0.01, noise_per_rank=True))  # one all-reduce a step

    model = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 2))
    fully_shard(model, mesh=init_device_mesh("cpu", (distributed.get_world_size(),)))
    shards = train(model, flatmin.SAM(torch.optim.AdamW(model.parameters(), lr=1e-2), rho=0.05))
    data = [(x, (x.sum(1) > 0).long()) for x in torch.randn(4, 32, 10)]  # could be other data on each process
    largest = flatmin.top_eigenvalues(flatmin.Objective(model, nn.CrossEntropyLoss(), data), tol=0.01)
    if distributed.get_rank() == 0:
        print(f"replicas {replicas:.3f}, shards {shards:.3f} (largest Hessian eigenvalue {largest})")
    distributed.destroy_process_group()


if __name__ == "__main__":
    if "RANK" in os.environ:
        main()
    else:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
        subprocess.run(launch, check=True)
