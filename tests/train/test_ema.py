"""The moving average against its formula."""

import pytest
import torch
from torch import nn

from train.ema import Ema, ema_decay


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.norm = nn.BatchNorm1d(2, affine=False)


def test_average_of_parameters_and_float_buffers_follows_the_formula() -> None:
    torch.manual_seed(0)
    net = Net()
    ema = Ema(net, 0.9)
    expected = {name: value.clone().double() for name, value in net.state_dict().items()}
    for step in range(7):
        with torch.no_grad():
            for value in net.state_dict().values():
                value.add_(torch.randn(value.shape).to(value.dtype) if value.ndim else 1)
        ema.update(net, step)
        for name, value in net.state_dict().items():
            if value.is_floating_point():
                expected[name] = 0.9 * expected[name] + 0.1 * value.double()
            else:
                expected[name] = value.clone()
    for name, value in ema.module.state_dict().items():
        torch.testing.assert_close(value.double(), expected[name].double(), atol=1e-6, rtol=1e-6)
    assert ema.module.norm.num_batches_tracked == net.norm.num_batches_tracked == 7


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9, 0.9999])
def test_what_does_not_move_is_its_own_average_to_the_last_bit(decay: float) -> None:
    """The latent statistics of a frozen VAE rely on it."""
    net = Net()
    net.norm.running_mean.copy_(torch.tensor([0.1, -1 / 3]))
    ema = Ema(net, decay, warmup=True)
    for step in range(50):
        ema.update(net, step)
    for name, value in net.state_dict().items():
        assert ema.module.state_dict()[name].equal(value)


def test_the_average_is_a_frozen_copy() -> None:
    net = Net()
    ema = Ema(net, 0.9)
    assert not any(p.requires_grad for p in ema.module.parameters())
    assert not ema.module.training
    assert net.training
    assert all(p.requires_grad for p in net.parameters())
    assert ema.module.linear.weight.data_ptr() != net.linear.weight.data_ptr()


def test_warm_up_rises_to_the_decay() -> None:
    assert ema_decay(0.9999, 0, warmup=False) == 0.9999
    assert ema_decay(0.9999, 0, warmup=True) == 0.1
    assert ema_decay(0.9999, 90, warmup=True) == 91 / 100
    assert ema_decay(0.9999, 10**7, warmup=True) == 0.9999
