"""SmoothQuant's scales against torchao's."""

import pytest
import torch

from modules.quantized.smoothquant import smooth_scales


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
def test_the_scales_are_those_of_torchao(alpha):
    """Bit for bit; in a channel that is always zero ours is 1."""
    core = pytest.importorskip("torchao.prototype.smoothquant.core")
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(7, 33, generator=generator), torch.randn(2, 5, 33, generator=generator)
    x[..., 4], x[..., 6], weight[:, 9] = x[..., 4] * 80, 0, 0
    observer = core.SmoothQuantObserver(weight, alpha)
    observer(x)
    theirs = observer.calculate_qparams()[0]
    mine = smooth_scales(x.abs().flatten(0, 1).amax(dim=0), weight, alpha)
    silent = torch.arange(33) == 6
    assert torch.equal(mine[~silent], theirs[~silent]) and mine[6] == 1 and mine.isfinite().all()


def test_a_stack_has_one_scale():
    """That of all its rows together; and with alpha = 1/2 both maxima become their geometric mean."""
    generator = torch.Generator().manual_seed(1)
    weight, largest = torch.randn(3, 4, 8, generator=generator), torch.rand(8, generator=generator) + 0.1
    scales = smooth_scales(largest, weight)
    assert torch.equal(scales, smooth_scales(largest, weight.view(12, 8)))
    assert torch.allclose((weight * scales).abs().amax(dim=(0, 1)), largest / scales, rtol=1e-5)
