"""Gemma 4's parts as the CUDA backend computes them: packed weights, fused projections, caches in six formats.

Every module here holds buffers only, of shapes that follow from the signature (config, weight formats, context, KV
format): the program can be compiled before a single weight is read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gemma4cli.export.packed import PackedMatrix
from gemma4cli.kernels import attention as attention_kernels
from gemma4cli.kernels.attention import int8, reference, turboquant
from gemma4cli.kernels.attention.cache import AttentionCache
from gemma4cli.kernels.gated_gelu import gated_gelu
from gemma4cli.kernels.head_rope import head_rope
from gemma4cli.kernels.quantized_matmul import Int8Rows, matvec_pair, quantized_matmul, quantized_matvec
from gemma4cli.kernels.quantized_matmul.format import PackedWeight, WeightFormat, dequantize
from gemma4cli.kernels.ring_attention import ring_attention
from gemma4cli.model.config import Gemma4Config, LayerConfig
from gemma4cli.model.kv_cache import CacheSpec
from gemma4cli.model.layers import RMSNorm, normalize
from gemma4cli.model.rope import rotate

KV_FORMATS = ("bf16", "folded", "q8", "folded-q8", "tq4", "folded-tq4")  # from the most exact to the smallest
_ROTATION_SEED = 0x6734


class CudaMatrix(PackedMatrix):
    """A packed weight [N, K] that the GPU kernels multiply by."""

    def matmul(self, x: Tensor) -> Tensor:
        """x [T, K] times the matrix transposed: [T, N]."""
        fmt = self.format
        return quantized_matmul(x, self.codes, self.high, self.sub, self.step, fmt.bits, fmt.group_size, fmt.has_min)

    def matvec(self, rows: Int8Rows) -> Tensor:
        """``matmul`` of activations that are int8 already, in bf16."""
        fmt = self.format
        return quantized_matvec(
            *rows, self.codes, self.high, self.sub, self.step, fmt.bits, fmt.group_size, fmt.has_min, torch.bfloat16
        )

    @property
    def weight(self) -> PackedWeight:
        return PackedWeight(self.format, (self.rows, self.columns), self.codes, self.high, self.sub, self.step)

    def rows_of(self, index: Tensor) -> Tensor:
        """Return the rows `index` [T] as float32 [T, K]."""
        high = None if self.high is None else self.high[index]
        parts = (self.codes[index], high, self.sub[index], self.step[index])
        return dequantize(PackedWeight(self.format, (index.shape[0], self.columns), *parts))


class FusedLinear(nn.Module):
    """Several projections of the same input: neighbours of one format are one matrix, read by one kernel.

    Rows of a matrix do not meet in the kernels, so fusing changes no bit of the result.
    """

    def __init__(
        self, names: Sequence[str], formats: Sequence[WeightFormat], rows: Sequence[int], columns: int
    ) -> None:
        super().__init__()
        self.rows = list(rows)
        self.place: dict[str, tuple[int, int]] = {}  # name -> (matrix, first row)
        self.matrices = nn.ModuleList()
        sizes: list[int] = []
        previous: WeightFormat | None = None
        for name, fmt, count in zip(names, formats, rows, strict=True):
            if fmt != previous:
                sizes.append(0)
            self.place[name] = (len(sizes) - 1, sizes[-1])
            sizes[-1] += count
            previous = fmt
        starts = {matrix: formats[index] for index, (matrix, row) in enumerate(self.place.values()) if row == 0}
        for matrix, size in enumerate(sizes):
            self.matrices.append(CudaMatrix(starts[matrix], size, columns))

    def put(self, name: str, weight: PackedWeight) -> None:
        """Fill the projection `name`."""
        matrix, row = self.place[name]
        self.matrices[matrix].put(weight, row)

    def forward(self, x: Tensor) -> list[Tensor]:
        """x [T, K] to one [T, rows] per projection, in order."""
        return self._split([matrix.matmul(x) for matrix in self.matrices])

    def matvec(self, rows: Int8Rows) -> list[Tensor]:
        """``forward`` of activations that are int8 already."""
        if len(self.matrices) == 2 and all(matrix.format.bits < 8 for matrix in self.matrices):
            first, second = (matrix.weight for matrix in self.matrices)
            return self._split(matvec_pair(rows, first, second, torch.bfloat16))
        return self._split([matrix.matvec(rows) for matrix in self.matrices])

    def _split(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        split: list[Tensor] = []
        for (matrix, row), count in zip(self.place.values(), self.rows, strict=True):
            split.append(outputs[matrix][:, row : row + count])
        return split


class CudaCache(nn.Module):
    """One layer's keys and values in one of KV_FORMATS; sliding layers are always bf16, and only K = V is folded.

    Buffers: `k`, `v` as ``AttentionCache`` describes, with scales when they hold codes; `arrived` in a sliding layer,
    which ``ring_attention`` counts in.
    """

    def __init__(self, layer: LayerConfig, spec: CacheSpec, kv_format: str) -> None:
        super().__init__()
        self.slots = spec.slots(layer)
        self.format = kv_format if layer.kind == "full_attention" else "bf16"
        self.folded = self.format.startswith("folded") and layer.k_eq_v
        self.is_tq4, is_q8 = self.format.endswith("tq4"), self.format.endswith("q8")
        self.rotated = 2 * int(layer.partial_rotary_factor * layer.head_dim // 2)
        heads, width = layer.num_key_value_heads, self.rotated if self.folded else layer.head_dim
        self.widths = (width, layer.head_dim)
        for name, size in zip(("k", "v"), self.widths, strict=True):
            shape = (heads, self.slots, size // 2 if self.is_tq4 else size)
            dtype = torch.uint8 if self.is_tq4 else torch.int8 if is_q8 else spec.dtype
            self.register_buffer(name, torch.zeros(shape, dtype=dtype))
            scale = torch.zeros(shape[:2], dtype=torch.float16) if self.is_tq4 or is_q8 else None
            self.register_buffer(f"{name}_scale", scale)
        self.register_buffer("arrived", torch.zeros(heads, dtype=torch.int32) if layer.window else None)

    def update(self, slot: Tensor, k: Tensor, v: Tensor, quantizer: TurboQuant | None) -> None:
        """Write k [H_kv, T, width], v [H_kv, T, D] to `slot` [T]; `quantizer` for TQ4."""
        for name, x in (("k", k), ("v", v)):
            cache, scales = getattr(self, name), getattr(self, f"{name}_scale")
            if scales is None:
                cache.index_copy_(1, slot, x.to(cache.dtype))
            else:
                codes, scale = int8.encode(x) if quantizer is None else quantizer.encode(x)
                cache.index_copy_(1, slot, codes)
                scales.index_copy_(1, slot, scale)


class TurboQuant(nn.Module):
    """The constants of TQ4 caches, shared by all layers: the codebook and one rotation per vector size."""

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("table", turboquant.codebook())
        for size in sorted(set(sizes)):
            self.register_buffer(f"rotation_{size}", turboquant.random_rotation(size, _ROTATION_SEED))

    def rotation(self, size: int) -> Tensor:
        return getattr(self, f"rotation_{size}")

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return turboquant.encode(x, self.rotation(x.shape[-1]), self.table)

    def rotate(self, x: Tensor) -> Tensor:
        """Bring a query into the cache's coordinates, in its dtype."""
        return (x.to(torch.float32) @ self.rotation(x.shape[-1]).T).to(x.dtype)

    def rotate_back(self, x: Tensor) -> Tensor:
        return (x.to(torch.float32) @ self.rotation(x.shape[-1])).to(x.dtype)


class CudaAttention(nn.Module):
    """``model.layers.Attention`` on packed weights, with its cache in a KV format."""

    def __init__(
        self,
        config: Gemma4Config,
        layer: LayerConfig,
        formats: dict[str, WeightFormat],
        cache: CacheSpec,
        kv_format: str,
        quantizer: TurboQuant | None,
    ) -> None:
        super().__init__()
        self.head_dim, self.window, self.eps = layer.head_dim, layer.window, config.rms_norm_eps
        q_rows = config.num_attention_heads * layer.head_dim
        kv_rows = layer.num_key_value_heads * layer.head_dim
        names = ["q_proj", "k_proj"] + ([] if layer.k_eq_v else ["v_proj"])
        rows = [q_rows] + [kv_rows] * (len(names) - 1)
        self.qkv_proj = FusedLinear(names, [formats[name] for name in names], rows, config.hidden_size)
        self.o_proj = CudaMatrix(formats["o_proj"], config.hidden_size, q_rows)
        self.q_norm = RMSNorm(layer.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(layer.head_dim, config.rms_norm_eps)
        self.kv_cache = CudaCache(layer, cache, kv_format)
        self.quantizer = [quantizer if self.kv_cache.is_tq4 else None]  # in a list: not a submodule of every layer

    def forward(self, x: Tensor, input_pos: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [T, hidden] to [T, hidden]."""
        return self.o_proj.matmul(self._mix(self.qkv_proj(x), input_pos, cos, sin))

    def decode(self, rows: Int8Rows, input_pos: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """``forward`` of one token that is int8 already: [1, hidden]."""
        projected, cache = self.qkv_proj.matvec(rows), self.kv_cache
        if cache.is_tq4:
            return self.o_proj.matmul(self._mix(projected, input_pos, cos, sin))
        token = (projected[0], projected[1], projected[-1], self.q_norm.weight, self.k_norm.weight, cos, sin, input_pos)
        if cache.arrived is not None:
            mixed = ring_attention(*token, cache.k, cache.v, cache.arrived, self.eps, self.window)
            return self.o_proj.matvec(Int8Rows(*mixed))
        stored = (cache.k, cache.v, cache.k_scale, cache.v_scale)
        q, r = head_rope(*token, *stored, self.eps)
        mixed = attention_kernels.decode_attention_int8(
            q, r if cache.folded else None, *stored, input_pos, self.window, cache.folded
        )
        return self.o_proj.matvec(Int8Rows(*mixed))

    def _mix(self, projected: Sequence[Tensor], input_pos: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Write the tokens' keys and values and attend: [T, H * D]."""
        tokens = input_pos.shape[0]
        heads = [part.view(1, tokens, -1, self.head_dim) for part in projected]
        raw_q, raw_k, raw_v = heads if len(heads) == 3 else (*heads, heads[1])
        q = rotate(self.q_norm(raw_q), cos, sin)[0].transpose(0, 1).contiguous()  # [H, T, D]
        k = rotate(self.k_norm(raw_k), cos, sin)[0].transpose(0, 1)
        v = normalize(raw_v.to(torch.float32), self.eps).to(raw_v.dtype)[0].transpose(0, 1)
        cache, quantizer = self.kv_cache, self.quantizer[0]
        r = None
        if cache.folded:
            k = reference.rotated_part(k, cache.rotated)
            r = reference.rotated_part(q, cache.rotated).contiguous()
            q = reference.fold_query(q, self.k_norm.weight, cache.rotated)
        if quantizer is not None:
            q, r = quantizer.rotate(q), None if r is None else quantizer.rotate(r)
        cache.update(torch.remainder(input_pos, cache.slots), k, v, quantizer)
        stored = AttentionCache(cache.k, cache.v, cache.k_scale, cache.v_scale, cache.folded)
        mixed = attention_kernels.attend(q, r, stored, input_pos, self.window)
        if quantizer is not None:
            mixed = quantizer.rotate_back(mixed)
        return mixed.transpose(0, 1).reshape(tokens, -1)


class CudaMLP(nn.Module):
    """``model.layers.MLP`` with gate and up as one matrix where their formats agree."""

    def __init__(self, config: Gemma4Config, formats: dict[str, WeightFormat]) -> None:
        super().__init__()
        names, width = ["gate_proj", "up_proj"], config.intermediate_size
        self.gate_up_proj = FusedLinear(names, [formats[name] for name in names], [width, width], config.hidden_size)
        self.down_proj = CudaMatrix(formats["down_proj"], config.hidden_size, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x)
        return self.down_proj.matmul(F.gelu(gate, approximate="tanh") * up)

    def decode(self, rows: Int8Rows) -> Tensor:
        """``forward`` of one token that is int8 already: [1, hidden]."""
        return self.down_proj.matvec(gated_gelu(*self.gate_up_proj.matvec(rows)))
