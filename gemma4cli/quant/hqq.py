"""Half-quadratic quantization (HQQ): scale and zero point that minimize the l_p error of a group, without data.

Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023. The objective is
sum |w - scale * (q - zero)|^p with p = 0.7 < 1, which forgives the few weights of a heavy tail and serves the many.
Half-quadratic splitting introduces an error variable e and alternates

    e    <- shrink(w - scale * (q - zero)),   shrink(r) = sign(r) * max(0, |r| - |r|^(p-1) / beta)
    zero <- mean(q - (w - e) / scale)

while beta grows by a factor each round. Three things differ from the paper (docs/quantization.md compares results):

- errors are measured in units of the group's scale, so that beta means the same for large and small weights (on raw
  weights of 0.02 the paper's beta = 10 shrinks every error to zero and p plays no part);
- with e fixed, the best scale is as cheap as the best zero (a line fitted through the group), so both are updated;
- each round is judged with the bfloat16 scale and zero that would be stored, and every group keeps its best round,
  min-max being the first: the objective never ends above where it began.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gemma4cli.quant.groupwise import CodeRange, Quantized, encode, in_groups, min_max_parameters, stored_scale
from gemma4cli.quant.recipe import QuantSpec

P = 0.7
_BETA = 2.0
_BETA_GROWTH = 1.1
_ROUNDS = 20
# Weights at a time: a handful of float32 buffers of this size stay in a CPU's cache, or fill a GPU.
_CHUNK = {"cpu": 1 << 19, "cuda": 1 << 25}
# Zero points are stored as multiples of this, so that subtracting 8 (another class's code range) stays exact.
_ZERO_STEP = 1 / 256


def quantize_hqq(weight: Tensor, spec: QuantSpec) -> Quantized:
    """Quantize [N, K] by HQQ, some rows at a time. Symmetric: the zero point stays and only the scale is fitted."""
    rows = max(1, _CHUNK[weight.device.type] // weight.shape[1])
    parts = [_quantize_rows(chunk, spec) for chunk in weight.split(rows)]
    return Quantized(*(torch.cat([getattr(part, name) for part in parts]) for name in ("codes", "scale", "zero_point")))


def lp_error(error: Tensor) -> Tensor:
    """Return sum |error|^p over the last dimension."""
    return _powers(error.abs())[1].sum(-1)


def _quantize_rows(weight: Tensor, spec: QuantSpec) -> Quantized:
    groups = in_groups(weight, spec)
    codes = CodeRange.of(spec)
    unit, zero = min_max_parameters(groups, spec)
    w = groups / unit[..., None]
    min_max = _Trial(w, unit, torch.ones_like(unit), zero.round(), codes)
    best = _Best(min_max.error, min_max.scale, min_max.zero)
    scale = torch.ones_like(unit)
    beta = _BETA
    for _ in range(_ROUNDS):
        trial = _Trial(w, unit, scale, zero, codes)
        best.offer(trial)
        scale, zero = _fit(trial.target(w, beta), trial.q, scale, zero, spec, codes)
        beta *= _BETA_GROWTH
    return encode(groups, best.scale, best.zero, codes)


class _Trial:
    """One round: the codes that a scale and a zero point give, and what error they leave.

    Args:
        w: [N, G, g] weights in units of `unit`, [N, G]; scale is in the same units.
    """

    def __init__(self, w: Tensor, unit: Tensor, scale: Tensor, zero: Tensor, codes: CodeRange) -> None:
        self.scale, self.zero = stored_scale(scale * unit), stored_zero(zero)
        step, zero = (self.scale / unit)[..., None], self.zero[..., None]
        self.q = (w / step).add_(zero).round_().clamp_(codes.low, codes.high)
        self.residual = w - (self.q - zero).mul_(step)
        self.size = self.residual.abs()
        self.slope, power = _powers(self.size)
        self.error = power.sum(-1)

    def target(self, w: Tensor, beta: float) -> Tensor:
        """Return w - shrink(residual), using up the trial's buffers."""
        return w - self.size.sub_(self.slope.div_(beta)).clamp_(min=0).copysign_(self.residual)


@dataclass
class _Best:
    """The best parameters met so far, per group."""

    error: Tensor
    scale: Tensor
    zero: Tensor

    def offer(self, trial: _Trial) -> None:
        better = trial.error < self.error
        self.error = torch.where(better, trial.error, self.error)
        self.scale = torch.where(better, trial.scale, self.scale)
        self.zero = torch.where(better, trial.zero, self.zero)


def stored_zero(zero: Tensor) -> Tensor:
    """Round a zero point to what the checkpoint holds, as float32."""
    return (zero / _ZERO_STEP).round().mul(_ZERO_STEP).bfloat16().float()


def _powers(size: Tensor) -> tuple[Tensor, Tensor]:
    """Return |r|^(p-1) and |r|^p; one logarithm and one exponential are five times faster than torch.pow."""
    positive = size.clamp(min=1e-12)
    slope = positive.log().mul_(P - 1).exp_()
    return slope, positive.mul_(slope)


def _fit(target: Tensor, q: Tensor, scale: Tensor, zero: Tensor, spec: QuantSpec, codes: CodeRange) -> tuple:
    """Return the least-squares scale and zero, [N, G] each, of target = scale * (q - zero)."""
    if spec.symmetric:
        centred = q - codes.centre
        return _ratio((centred * target).sum(-1), centred.square().sum(-1), scale), zero
    mean = q.mean(-1)
    centred = q - mean[..., None]
    scale = _ratio((centred * target).sum(-1), centred.square().sum(-1), scale)
    return scale, mean - target.mean(-1) / scale


def _ratio(numerator: Tensor, denominator: Tensor, otherwise: Tensor) -> Tensor:
    """Divide where that gives a usable scale: a group whose codes are all equal, or run backwards, keeps its own."""
    usable = (denominator > 0) & (numerator > 0)
    return torch.where(usable, numerator / denominator.clamp(min=1e-12), otherwise)
