"""Batch norm over the batches of all processes, on any device.

PyTorch's SyncBatchNorm runs on GPUs only; this one is made of tensor operations and one
all-reduce, so that gloo on a CPU does what NCCL does on GPUs.
"""

import torch
from torch import Tensor, nn

from model.latent_norm import latent_statistics


class SyncedBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` whose training statistics are those of all processes' maps [B, C, H, W].

    State, eps and momentum are the plain one's; alone in a single process it normalises alike.
    Gradients flow through the statistics across processes.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalised x [B, C, H, W], in its dtype; running statistics move in training mode."""
        if not self.training:
            return super().forward(x)
        statistics = latent_statistics(x)
        with torch.no_grad():
            assert self.running_mean is not None
            assert self.running_var is not None
            assert self.num_batches_tracked is not None
            assert self.momentum is not None
            count = statistics.num_values
            # As PyTorch does: running statistics take the unbiased variance.
            variance = statistics.variance * (count / (count - 1).clamp(min=1))
            self.running_mean.lerp_(statistics.mean, self.momentum)
            self.running_var.lerp_(variance.to(statistics.variance.dtype), self.momentum)
            self.num_batches_tracked.add_(1)
        scale = torch.rsqrt(statistics.variance + self.eps) * self.weight
        shift = self.bias - statistics.mean * scale
        return (x.float() * scale[:, None, None] + shift[:, None, None]).to(x.dtype)


def synchronise_norms(network: nn.Module) -> None:
    """Replace every `nn.BatchNorm2d` below the network by a synchronised one with its state."""
    for module in list(network.modules()):
        for name, child in module.named_children():
            # The exact type: those that are synchronised already are of a subclass.
            if type(child) is nn.BatchNorm2d:
                synced = SyncedBatchNorm2d(child.num_features, child.eps, child.momentum)
                synced.load_state_dict(child.state_dict())
                setattr(module, name, synced)
