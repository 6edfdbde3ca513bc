"""Four passes that find what `model.sampling.sample` finds in 48 dependent reductions: peak, tally, gather, finish.

The thresholds of top-k and top-p are leaves of a tree: 24 halvings of [-26, 0]. Its first levels cut the range into
EDGES bins. ``tally`` counts and weighs the tokens above every bin's lower edge, which names the bin that holds the
top-k threshold and bounds the bins that may hold the top-p threshold. Tokens above those bins are kept and tokens below
are dropped, whatever the thresholds are; ``gather`` draws among the former and lists the ones between, usually some
hundred and never more than the vocabulary. ``finish`` walks the tree on that list alone, in one program, with the same
float32 thresholds and comparisons as the bisection, and draws.

Tokens more than 26 below the best are not listed: they cannot win the draw (model/sampling.py), only their mass counts.

No atomics and no order that depends on timing: partial results lie in scratch memory by program, the list is ordered by
token, so equal inputs give equal bits. Nothing is read on the host; a pass that the settings make needless returns.

Where the address of a store depends on a pointer's contents, the load stands in the kernel itself, not in a helper:
PyTorch's analysis of what a kernel writes follows addresses into calls, and would copy an input that it finds there.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Of model/sampling.py: the thresholds' range, its halvings, what stands for "nothing" (the lowest float32).
_RANGE = tl.constexpr(26.0)
_HALVINGS = tl.constexpr(24)
_NEVER = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def _mix(x):
    """Scramble 32 bits (uint32)."""
    x = x ^ (x >> 16)
    x = x * 0x21F0AAAD
    x = x ^ (x >> 15)
    x = x * 0x735A2D97
    return x ^ (x >> 15)


@triton.jit
def _noise(seed_ptr, position_ptr, token):
    """Gumbel noise float32 of the given tokens: model.sampling's, in 32-bit arithmetic."""
    seed = tl.load(seed_ptr)
    key = _mix(seed.to(tl.uint32) + 0x9E3779B9)
    key = _mix((key ^ (seed >> 32).to(tl.uint32)) + 0x85EBCA6B)
    key = _mix((key ^ tl.load(position_ptr).to(tl.uint32)) + 0xC2B2AE35)
    hashed = _mix(_mix(token.to(tl.uint32) ^ key) + _mix(key + 0x27D4EB2F))
    uniform = (hashed.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    w = tl.minimum(uniform, 1.0 - 5.9604644775390625e-08)
    # -log1p(-w): the logarithm of the rounded 1 - w, corrected for what rounding changed (Kahan).
    rest = 1.0 - w
    lost = tl.where(rest == 1.0, 1.0, 1.0 - rest)
    exponential = tl.where(rest == 1.0, w, tl.log(rest) * (w / lost) * -1.0)
    return -tl.log(exponential)


@triton.jit
def _clamp(x):
    return tl.minimum(tl.maximum(x, -1e38), 1e38)


@triton.jit
def _score(logit, highest, temperature):
    """Log-probability relative to the best token, by the same rounded steps as model.sampling."""
    return tl.div_rn(_clamp(logit) - highest, tl.zeros_like(logit) + tl.maximum(temperature, 1e-30))


@triton.jit
def _at(values, index, SIZE: tl.constexpr):
    """values[index] of a tensor [SIZE]; 0 past its end."""
    return tl.sum(tl.where(tl.arange(0, SIZE) == index, values, 0), axis=0)


@triton.jit
def _first_highest(value, token, V):
    """The lowest token among those of the highest value, int32; V where the value is padding."""
    return tl.min(tl.where(value == tl.max(value, axis=0), token, V), axis=0)


@triton.jit
def peak(logits_ptr, peak_ptr, peak_token_ptr, V, BLOCK: tl.constexpr):
    """Write the highest logit of BLOCK tokens and the lowest token that has it: peak, peak_token [BLOCKS]."""
    block = tl.program_id(0)
    token = block * BLOCK + tl.arange(0, BLOCK)
    logit = tl.load(logits_ptr + token, mask=token < V, other=float("-inf"))
    tl.store(peak_ptr + block, tl.max(logit, axis=0))
    tl.store(peak_token_ptr + block, _first_highest(logit, token, V))


@triton.jit
def tally(
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    peak_ptr,
    count_ptr,
    mass_ptr,
    total_ptr,
    V,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    PADDED: tl.constexpr,
    EDGES: tl.constexpr,
    LANES: tl.constexpr,
):
    """Count and weigh BLOCK tokens at or above each edge: count, mass [BLOCKS, EDGES]; total [BLOCKS] is all mass."""
    temperature = tl.load(temperature_ptr)
    top_k = tl.load(top_k_ptr)
    filters = ((top_k > 0) & (top_k < V)) | (tl.load(top_p_ptr) < 1.0)
    if (temperature > 0.0) & filters:
        block = tl.program_id(0)
        padded = tl.arange(0, PADDED)
        highest = _clamp(tl.max(tl.load(peak_ptr + padded, mask=padded < BLOCKS, other=float("-inf")), axis=0))
        edge = tl.arange(0, EDGES)
        threshold = edge.to(tl.float32) * (_RANGE / EDGES) - _RANGE  # exact: few bits
        # Edges are the first axis: one thread holds a token and all edges, so that its score is computed once.
        count = tl.zeros([EDGES, LANES], tl.int32)
        mass = tl.zeros([EDGES, LANES], tl.float32)
        total = tl.zeros([LANES], tl.float32)
        for start in range(0, BLOCK, LANES):
            token = block * BLOCK + start + tl.arange(0, LANES)
            inside = token < V
            score = _score(tl.load(logits_ptr + token, mask=inside, other=float("-inf")), highest, temperature)
            weight = tl.where(inside, tl.exp(score), 0.0)
            above = inside[None, :] & (score[None, :] >= threshold[:, None])
            count += above.to(tl.int32)
            mass += tl.where(above, weight[None, :], 0.0)
            total += weight
        tl.store(count_ptr + block * EDGES + edge, tl.sum(count, axis=1))
        tl.store(mass_ptr + block * EDGES + edge, tl.sum(mass, axis=1))
        tl.store(total_ptr + block, tl.sum(total, axis=0))


@triton.jit
def gather(
    logits_ptr,
    position_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seed_ptr,
    peak_ptr,
    count_ptr,
    mass_ptr,
    total_ptr,
    listed_score_ptr,
    listed_token_ptr,
    drawn_ptr,
    drawn_token_ptr,
    listed_ptr,
    above_count_ptr,
    bound_ptr,
    V,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    PADDED: tl.constexpr,
    EDGES: tl.constexpr,
):
    """Draw among the tokens that are kept for sure, list those in doubt.

    Writes drawn, drawn_token [BLOCKS]: the best noisy score and its token; listed_score, listed_token [V]: the first
    `listed` [1] entries, by token. The first program writes what ``finish`` needs besides: above_count [1], the number
    of tokens above the list, and bound [4]: the listed scores' lower and upper bound, the mass above, and all mass.
    """
    temperature = tl.load(temperature_ptr)
    if temperature > 0.0:
        pid = tl.program_id(0)
        token = pid * BLOCK + tl.arange(0, BLOCK)
        inside = token < V
        logit = tl.load(logits_ptr + token, mask=inside, other=float("-inf"))
        block = tl.arange(0, PADDED)
        highest = _clamp(tl.max(tl.load(peak_ptr + block, mask=block < BLOCKS, other=float("-inf")), axis=0))
        score = _score(logit, highest, temperature)
        sure = inside
        top_k = tl.load(top_k_ptr)
        top_p = tl.load(top_p_ptr)
        limits_k = (top_k > 0) & (top_k < V)
        limits_p = top_p < 1.0
        if limits_k | limits_p:
            edge = tl.arange(0, EDGES)
            tile = block[:, None] * EDGES + edge[None, :]
            in_tile = (block < BLOCKS)[:, None]
            counts = tl.sum(tl.load(count_ptr + tile, mask=in_tile, other=0), axis=0)
            masses = tl.sum(tl.load(mass_ptr + tile, mask=in_tile, other=0.0), axis=0)
            total = tl.sum(tl.load(total_ptr + block, mask=block < BLOCKS, other=0.0), axis=0)
            top_k_bin = tl.max(tl.where(counts >= top_k, edge, 0), axis=0)
            # The least mass that top-k may leave gives the highest bin of top-p; without top-k it is the only one.
            left = tl.where(limits_k, _at(masses, top_k_bin + 1, EDGES), total)
            top_p_bin = tl.max(tl.where(masses >= top_p * left, edge, 0), axis=0)
            first = tl.where(limits_k, top_k_bin, top_p_bin)
            end = tl.where(limits_p, tl.maximum(first, top_p_bin), first) + 1
            bottom = first.to(tl.float32) * (_RANGE / EDGES) - _RANGE
            top = tl.where(end < EDGES, end.to(tl.float32) * (_RANGE / EDGES) - _RANGE, float("inf"))

            sure = inside & (score >= top)
            doubtful = inside & (score >= bottom) & (score < top)
            earlier = block < pid
            before = tl.sum(tl.load(count_ptr + block * EDGES + first, mask=earlier, other=0), axis=0)
            before -= tl.sum(tl.load(count_ptr + block * EDGES + end, mask=earlier & (end < EDGES), other=0), axis=0)
            rank = before + tl.cumsum(doubtful.to(tl.int32), axis=0) - 1
            tl.store(listed_score_ptr + rank, score, mask=doubtful)
            tl.store(listed_token_ptr + rank, token, mask=doubtful)
            if pid == 0:
                above = _at(counts, end, EDGES)
                tl.store(listed_ptr, _at(counts, first, EDGES) - above)
                tl.store(above_count_ptr, above)
                tl.store(bound_ptr, bottom)
                tl.store(bound_ptr + 1, top)
                tl.store(bound_ptr + 2, _at(masses, end, EDGES))
                tl.store(bound_ptr + 3, total)
        else:
            if pid == 0:
                tl.store(listed_ptr, 0)

        drawn = _NEVER
        drawn_token = 0
        if tl.max(sure.to(tl.int32), axis=0) > 0:
            kept = sure & (tl.exp(score) >= tl.load(min_p_ptr))
            value = tl.where(kept, score + _noise(seed_ptr, position_ptr, token), _NEVER)
            drawn = tl.max(value, axis=0)
            drawn_token = _first_highest(value, token, V)
        tl.store(drawn_ptr + pid, drawn)
        tl.store(drawn_token_ptr + pid, drawn_token)


@triton.jit
def _threshold(
    score_ptr, count, bound_ptr, above, target, MASS: tl.constexpr, BITS: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """Walk the tree, BITS halvings a round: the largest threshold whose tokens number (or weigh) at least `target`.

    above: number or mass of the tokens above the list. A threshold below the list's lower bound is known to be reached
    and one above its upper bound not to be, however sums were rounded.
    """
    FAN: tl.constexpr = 1 << BITS
    bottom = tl.load(bound_ptr)
    top = tl.load(bound_ptr + 1)
    branch = tl.arange(0, FAN)
    low = -_RANGE
    step = _RANGE * 1.0
    for _ in range(_HALVINGS // BITS):
        # What the bisection's lower end would be after each sequence of outcomes, rounded the same way. Every threshold
        # it could try is one of them: that of the sequence whose last success is the trial.
        threshold = tl.zeros([FAN], tl.float32) + low
        for bit in tl.static_range(BITS):
            step = step * 0.5
            threshold = tl.where((branch >> (BITS - 1 - bit)) & 1 == 1, threshold + step, threshold)
        if MASS:
            sums = tl.zeros([FAN, LANES], tl.float32)
        else:
            sums = tl.zeros([FAN, LANES], tl.int32)
        for start in range(0, count, LANES):
            entry = start + tl.arange(0, LANES)
            score = tl.load(score_ptr + entry, mask=entry < count, other=float("-inf"))
            counts = score[None, :] >= threshold[:, None]
            if MASS:
                sums += tl.where(counts, tl.exp(score)[None, :], 0.0)
            else:
                sums += counts.to(tl.int32)
        reached = (above + tl.sum(sums, axis=1) >= target) & (threshold <= top) | (threshold <= bottom)
        low = tl.maximum(low, tl.max(tl.where(reached, threshold, low), axis=0))
    return tl.where(low > -_RANGE, low, _NEVER)


@triton.jit
def _mass_from(score_ptr, count, least, LANES: tl.constexpr):
    """Mass of the listed scores at or above `least`."""
    mass = tl.zeros([LANES], tl.float32)
    for start in range(0, count, LANES):
        entry = start + tl.arange(0, LANES)
        score = tl.load(score_ptr + entry, mask=entry < count, other=float("-inf"))
        mass += tl.where(score >= least, tl.exp(score), 0.0)
    return tl.sum(mass, axis=0)


@triton.jit
def finish(
    position_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seed_ptr,
    peak_ptr,
    peak_token_ptr,
    listed_score_ptr,
    listed_token_ptr,
    drawn_ptr,
    drawn_token_ptr,
    listed_ptr,
    above_count_ptr,
    bound_ptr,
    out_ptr,
    V,
    BLOCKS: tl.constexpr,
    PADDED: tl.constexpr,
    BITS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Find the thresholds within the list, draw among what it keeps and against the others' best: out [1] int64."""
    block = tl.arange(0, PADDED)
    if tl.load(temperature_ptr) > 0.0:
        best = tl.load(drawn_ptr + block, mask=block < BLOCKS, other=float("-inf"))
        best_token = _first_highest(best, tl.load(drawn_token_ptr + block, mask=block < BLOCKS, other=V), V)
        highest = tl.max(best, axis=0)
        count = tl.load(listed_ptr)
        if count > 0:
            least = _NEVER
            left = tl.load(bound_ptr + 3)
            above = tl.load(bound_ptr + 2)
            top_k = tl.load(top_k_ptr)
            if (top_k > 0) & (top_k < V):
                above_count = tl.load(above_count_ptr)
                least = _threshold(listed_score_ptr, count, bound_ptr, above_count, top_k, False, BITS, LANES)
                if least > _NEVER:
                    left = above + _mass_from(listed_score_ptr, count, least, LANES)
            top_p = tl.load(top_p_ptr)
            if top_p < 1.0:
                # Below top-k's threshold the sums count dropped tokens too: there the kept ones alone reach the target.
                target = top_p * left
                lowest = _threshold(listed_score_ptr, count, bound_ptr, above, target, True, BITS, LANES)
                least = tl.maximum(least, lowest)
            min_p = tl.load(min_p_ptr)
            lane_best = tl.full([LANES], _NEVER, tl.float32)
            lane_token = tl.zeros([LANES], tl.int32)
            for start in range(0, count, LANES):
                entry = start + tl.arange(0, LANES)
                inside = entry < count
                score = tl.load(listed_score_ptr + entry, mask=inside, other=float("-inf"))
                token = tl.load(listed_token_ptr + entry, mask=inside, other=0)
                kept = inside & (score >= least) & (tl.exp(score) >= min_p)
                value = tl.where(kept, score + _noise(seed_ptr, position_ptr, token), _NEVER)
                better = value > lane_best
                lane_best = tl.where(better, value, lane_best)
                lane_token = tl.where(better, token, lane_token)
            list_best = tl.max(lane_best, axis=0)
            list_token = _first_highest(lane_best, lane_token, V)
            wins = (list_best > highest) | ((list_best == highest) & (list_token < best_token))
            best_token = tl.where(wins, list_token, best_token)
        tl.store(out_ptr, best_token.to(tl.int64))
    else:
        best = tl.load(peak_ptr + block, mask=block < BLOCKS, other=float("-inf"))
        token = tl.load(peak_token_ptr + block, mask=block < BLOCKS, other=V)
        tl.store(out_ptr, _first_highest(best, token, V).to(tl.int64))
