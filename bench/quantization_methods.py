"""Compare 4-bit methods on weights of three shapes: python -m bench.quantization_methods

Prints a Markdown table of relative error and l_0.7 error for min-max, torchao's HQQ and ours, groups of 32, asymmetric,
scales and zero points rounded to bfloat16.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchao.quantization.quant_primitives import _choose_qparams_and_quantize_affine_hqq

from gemma4cli.quant.groupwise import Quantized, quantize
from gemma4cli.quant.hqq import lp_error
from gemma4cli.quant.recipe import QuantSpec

_SHAPE = (256, 2048)


def torchao_hqq(weight: Tensor) -> Quantized:
    """torchao's implementation of the paper, with the parameters rounded as they would be stored."""
    codes, scale, zero, _ = _choose_qparams_and_quantize_affine_hqq(
        weight, nbits=4, group_size=32, axis=1, compute_dtype=torch.float32, device="cpu", raw_output=True
    )
    return Quantized(codes, scale.bfloat16(), zero.bfloat16())


def main() -> None:
    torch.manual_seed(0)
    weights = {
        "Gaussian": torch.randn(_SHAPE),
        "Laplace": torch.distributions.Laplace(0.0, 1.0).sample(_SHAPE),
        "Student t, 3 degrees of freedom": torch.distributions.StudentT(3.0).sample(_SHAPE),
    }
    print("| weights | min-max | HQQ of torchao | HQQ of g4 |\n|---|---|---|---|")
    for name, weight in weights.items():
        weight = (weight * 0.02).bfloat16().float()
        cells = [name]
        for quantized in (
            quantize(weight, QuantSpec(4, 32, False, "min-max")),
            torchao_hqq(weight),
            quantize(weight, QuantSpec(4, 32, False, "hqq")),
        ):
            error = quantized.dequantize() - weight
            cells.append(f"{(error.norm() / weight.norm()).item():.4f} / {lp_error(error).sum().item():.0f}")
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
