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

import torch
from torch import Tensor

from gemma4cli.quant.groupwise import CodeRange, Quantized, encode, in_groups, min_max_parameters, stored_scale
from gemma4cli.quant.recipe import QuantSpec

P = 0.7
_BETA = 2.0
_BETA_GROWTH = 1.1
_ROUNDS = 20
# Weights at a time: a handful of float32 buffers of this size stay in a CPU's cache, or fill a GPU.
_CHUNK = {"cpu": 1 << 17, "cuda": 1 << 25}
_TINY = 1e-12
# Zero points are stored as multiples of this, so that subtracting 8 (another class's code range) stays exact.
_ZERO_STEP = 1 / 256


def quantize_hqq(weight: Tensor, spec: QuantSpec) -> Quantized:
    """Quantize [N, K] by HQQ, some rows at a time. Symmetric: the zero point stays and only the scale is fitted."""
    rows = max(1, _CHUNK[weight.device.type] // weight.shape[1])
    parts = [_quantize_rows(chunk, spec) for chunk in weight.split(rows)]
    return Quantized(*(torch.cat([getattr(part, name) for part in parts]) for name in ("codes", "scale", "zero_point")))


def lp_error(error: Tensor) -> Tensor:
    """Return sum |error|^p over the last dimension."""
    return error.abs().pow(P).sum(-1)


def _quantize_rows(weight: Tensor, spec: QuantSpec) -> Quantized:
    groups = in_groups(weight, spec)
    codes = CodeRange.of(spec)
    unit, zero = min_max_parameters(groups, spec)
    scale = torch.ones_like(unit)
    solver = _Solver(groups, unit, spec)
    solver.attempt(scale, zero.round())  # exactly min-max
    beta = _BETA
    for _ in range(_ROUNDS):
        solver.attempt(scale, zero)
        scale, zero = solver.refit(scale, zero, beta)
        beta *= _BETA_GROWTH
    return encode(groups, solver.best_scale, solver.best_zero, codes)


class _Solver:
    """The two half steps on one chunk, and the best parameters met so far per group.

    All matrices are [N, G, g] in units of `unit`, [N, G]. Buffers are reused: allocating them each round takes longer
    than the arithmetic.
    """

    def __init__(self, groups: Tensor, unit: Tensor, spec: QuantSpec) -> None:
        self._unit, self._spec, self._codes = unit, spec, CodeRange.of(spec)
        self._w = groups / unit[..., None]
        self._q, self._residual, self._weighting, self._product = (torch.empty_like(self._w) for _ in range(4))
        self._error = torch.full_like(unit, torch.inf)
        self.best_scale, self.best_zero = torch.empty_like(unit), torch.empty_like(unit)

    def attempt(self, scale: Tensor, zero: Tensor) -> None:
        """Quantize with what would be stored of a scale and zero point, and remember them where they are the best."""
        stored, zero = stored_scale(scale * self._unit), stored_zero(zero)
        step, shift = (stored / self._unit)[..., None], zero[..., None]
        torch.div(self._w, step, out=self._q).add_(shift).round_().clamp_(self._codes.low, self._codes.high)
        torch.sub(self._q, shift, out=self._residual).mul_(step)
        torch.sub(self._w, self._residual, out=self._residual)
        # |r|^(p-2): one logarithm and one exponential are five times faster than torch.pow.
        torch.abs(self._residual, out=self._weighting)
        self._weighting.clamp_(min=_TINY).log_().mul_(P - 2).exp_()
        error = torch.mul(self._residual, self._residual, out=self._product).mul_(self._weighting).sum(-1)
        better = error < self._error
        self._error = torch.where(better, error, self._error)
        self.best_scale = torch.where(better, stored, self.best_scale)
        self.best_zero = torch.where(better, zero, self.best_zero)

    def refit(self, scale: Tensor, zero: Tensor, beta: float) -> tuple[Tensor, Tensor]:
        """Return the scale and zero point that are best once the shrunken errors are taken out of the weights."""
        # shrink(r) = r * max(0, 1 - |r|^(p-2) / beta)
        shrunk = self._residual.mul_(self._weighting.div_(-beta).add_(1).clamp_(min=0))
        target = torch.sub(self._w, shrunk, out=shrunk)
        if self._spec.symmetric:
            centred = self._q.sub_(self._codes.centre)
            return self._slope(centred, target, scale), zero
        mean = self._q.mean(-1)
        centred = self._q.sub_(mean[..., None])
        scale = self._slope(centred, target, scale)
        return scale, mean - target.mean(-1) / scale

    def _slope(self, x: Tensor, y: Tensor, otherwise: Tensor) -> Tensor:
        """Return sum(xy) / sum(xx); a group whose codes are all equal, or run backwards, keeps its scale."""
        xy = torch.mul(x, y, out=self._product).sum(-1)
        xx = torch.mul(x, x, out=self._product).sum(-1)
        return torch.where((xx > 0) & (xy > 0), xy / xx.clamp(min=_TINY), otherwise)


def stored_zero(zero: Tensor) -> Tensor:
    """Round a zero point to what the checkpoint holds, as float32."""
    return (zero / _ZERO_STEP).round_().mul_(_ZERO_STEP).bfloat16().float()
