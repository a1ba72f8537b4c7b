"""SmoothQuant: move outliers from the inputs of a matrix into its weights, before both are rounded to 8 bits.

    y = W x = (W s)(x / s)        s_j = (max over tokens |x_j|)^alpha / (max over rows |W_j|)^(1 - alpha)

A few channels of a transformer's activations are up to 100 times as large as the others, for all tokens.
Since a token has one scale, they leave only a few codes to its other channels. Weights have no such channels,
and a scale for each row. With alpha = 1/2 the largest input and the largest weight of a channel become equal.

    largest_inputs (in,), weight (.., out, in)  ->  s (in,)      a stack has one s for all its matrices

A layer stores the codes of W s, and multiplies its input by a = 1 / s (modules/quantized/layers.py).

Paper: Xiao et al., arXiv 2211.10438. As in torchao, `EPSILON` is added to both maxima.
Trap: a channel that was always zero in calibration would get s near 0, and 1 / s would make any later input
an outlier. Here it keeps s = 1; in torchao it does not.
"""

import torch

EPSILON = torch.finfo(torch.float32).eps


def smooth_scales(largest_inputs, weight, alpha: float = 0.5):
    """Return s (in,) for max |x| of each input (in,) and a weight (.., out, in)."""
    largest_weights = weight.abs().flatten(0, -2).amax(dim=0)
    scales = (largest_inputs + EPSILON).pow(alpha) / (largest_weights + EPSILON).pow(1 - alpha)
    return torch.where(largest_inputs > 0, scales, 1.0)


def lesson():
    """Follow an outlier channel from x to W, and print the error of the output in 8 bits."""
    from modules.quantized.layers import QuantLinear
    from modules.quantized.stored import StoredIntegers

    torch.manual_seed(0)
    x, weight = torch.randn(256, 128), torch.randn(64, 128)
    x[:, 3] *= 60
    true = x @ weight.T
    print("alpha    max|x| of channels 2, 3, 4    max|W s| of them    error of the output, W8A8")
    for alpha in (None, 0.25, 0.5, 0.75, 1.0):
        s = torch.ones(128) if alpha is None else smooth_scales(x.abs().amax(dim=0), weight, alpha)
        store = StoredIntegers(weight.shape, 8).round(weight * s)
        layer = QuantLinear(store, scaled=True, activations=True)
        layer.input_scale = 1 / s
        largest = [part.abs().amax(dim=0)[2:5].tolist() for part in (x / s, weight * s)]
        texts = ["  ".join(f"{one:6.1f}" for one in part) for part in largest]
        error = (layer(x) - true).norm() / true.norm()
        print(f"{'none' if alpha is None else alpha:<8} {texts[0]:>25} {texts[1]:>28} {error:12.2%}")


if __name__ == "__main__":
    lesson()
