"""`g4::sample_cuda`: `model.sampling.sample` for one row of logits, in four launches.

On a CPU it is `sample` itself, so that exported graphs run without a GPU.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from torch.library import triton_op, wrap_triton

from gemma4cli.kernels.sampling import passes
from gemma4cli.kernels.sampling.configs import SampleConfig, sample_config
from gemma4cli.kernels.targets import current_target
from gemma4cli.model.sampling import sample as _reference

_WARP = 32


@triton_op("g4::sample_cuda", mutates_args={})
def sample_cuda(
    logits: Tensor, position: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seed: Tensor
) -> Tensor:
    """Draw one token: arguments and result of `model.sampling.sample` with B = 1."""
    config = sample_config(current_target())
    return launch(config, logits, position, temperature, top_k, top_p, min_p, seed)


def launch(
    config: SampleConfig,
    logits: Tensor,
    position: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
) -> Tensor:
    """Run the four passes of ``passes`` as `config` says."""
    assert logits.shape[0] == 1, "one row of logits at a time"
    vocab_size = logits.shape[1]
    blocks = triton.cdiv(vocab_size, config.block)
    edges = 1 << config.tally_bits
    shared = {"BLOCKS": blocks, "PADDED": triton.next_power_of_2(blocks)}

    def scratch(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    peak, peak_token = scratch(torch.float32, blocks), scratch(torch.int32, blocks)
    count, mass = scratch(torch.int32, blocks, edges), scratch(torch.float32, blocks, edges)
    total = scratch(torch.float32, blocks)
    listed_score, listed_token = scratch(torch.float32, vocab_size), scratch(torch.int32, vocab_size)
    drawn, drawn_token = scratch(torch.float32, blocks), scratch(torch.int32, blocks)
    listed, above_count, bound = scratch(torch.int32, 1), scratch(torch.int32, 1), scratch(torch.float32, 4)
    out = scratch(torch.int64, 1)

    wrap_triton(passes.peak)[(blocks,)](
        logits, peak, peak_token, vocab_size, BLOCK=config.block, num_warps=config.num_warps
    )
    wrap_triton(passes.tally)[(blocks,)](
        logits, temperature, top_k, top_p, peak, count, mass, total, vocab_size,
        BLOCK=config.block, EDGES=edges, LANES=_WARP * config.num_warps, **shared, num_warps=config.num_warps,
    )  # fmt: skip
    wrap_triton(passes.gather)[(blocks,)](
        logits, position, temperature, top_k, top_p, min_p, seed, peak, count, mass, total,
        listed_score, listed_token, drawn, drawn_token, listed, above_count, bound, vocab_size,
        BLOCK=config.block, EDGES=edges, **shared, num_warps=config.num_warps,
    )  # fmt: skip
    wrap_triton(passes.finish)[(1,)](
        position, temperature, top_k, top_p, min_p, seed, peak, peak_token,
        listed_score, listed_token, drawn, drawn_token, listed, above_count, bound, out, vocab_size,
        BITS=config.search_bits, LANES=_WARP * config.finish_warps, **shared, num_warps=config.finish_warps,
    )  # fmt: skip
    return out


sample_cuda.register_kernel("cpu")(_reference)
