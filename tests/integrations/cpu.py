"""What Accelerate has for accelerators only."""

from typing import Any

from torch.amp.grad_scaler import GradScaler


def fp16_on_cpu(accelerator: Any) -> None:
    """Accelerate has a scaler for accelerators only; everything but the device is the real thing."""
    accelerator.scaler = GradScaler("cpu", init_scale=65536.0, growth_interval=1000)
    accelerator.native_amp = True
    accelerator.state._mixed_precision = "fp16"
