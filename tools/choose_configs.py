"""Compile candidate launch configurations for a target, without a GPU, and rank them by the model of occupancy.py.

    python tools/choose_configs.py compile --target sm_86      # machine code into build/candidates
    python tools/choose_configs.py record                      # its facts into bench/results/occupancy-facts.json
    python tools/choose_configs.py rank --target sm_86         # what the model says of each table's entry

Compiling is skipped for what is there already. With `--kernel matvec` the first two do one kernel alone; recorded facts
of what was not compiled stay. `bench/time_candidates.py` times the machine code on a GPU, and

    python tools/choose_configs.py check bench/results/occupancy-h200.json

compares those times with the model's, as does tests/kernels/test_occupancy.py.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass
from operator import truediv
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from gemma4cli.kernels.attention.configs import prefill_config, wide_config  # noqa: E402
from gemma4cli.kernels.machine_code import read_profile  # noqa: E402
from gemma4cli.kernels.occupancy import Facts, Load, predict, resident_programs  # noqa: E402
from gemma4cli.kernels.quantized_matmul.configs import MATVEC_NARROW, matmul_config, matvec_config  # noqa: E402
from gemma4cli.kernels.targets import TARGETS, Target, get_target  # noqa: E402

FOLDER = ROOT / "build" / "candidates"
RECORDED = ROOT / "bench" / "results" / "occupancy-facts.json"
KERNELS = ("matvec", "matmul", "wide", "attend", "combine")
MEASURED = "sm_90"  # the target whose tables are timed, not chosen


@dataclass(frozen=True)
class Candidate:
    """One configuration of one kernel for one kind of weight or cache.

    Attributes:
        kernel: one of KERNELS.
        case: weight format ("int4_min", "int6"), kind of cache ("ring", "folded" ...).
        size: K of a product, the head's size of attention: constants of the machine code.
        config: as in configs.py; of `wide` the first number, the shares, is last.
    """

    kernel: str
    case: str
    size: int
    config: tuple[int, ...]

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Candidate:
        return cls(row["kernel"], row["case"], row["size"], tuple(row["config"]))

    @property
    def name(self) -> str:
        return "-".join(map(str, (self.kernel, self.case, self.size, *self.config)))


# (rows, warps, warps_k, registers): a limit only for two rows, where the assembler takes more than it makes use of.
MATVEC = [
    (rows, warps, warps_k, registers)
    for rows in (1, 2, 4)
    for warps in (1, 2, 4)
    for warps_k in (1, 2, 4)
    for registers in ((0, 72, 80) if rows == 2 else (0,))
    if warps * warps_k <= 4
]
# (BLOCK_N, BLOCK_M, GROUP_M, warps, stages)
MATMUL = [
    (128, 256, 2, 8, 3), (128, 128, 2, 8, 3), (128, 128, 2, 8, 2), (128, 128, 2, 8, 4), (128, 128, 2, 4, 3),
    (128, 64, 4, 8, 3), (128, 64, 4, 4, 3), (128, 64, 4, 4, 2), (128, 64, 4, 8, 2), (64, 256, 2, 4, 3),
    (64, 256, 2, 8, 3), (64, 128, 2, 4, 3), (64, 128, 2, 4, 2), (64, 128, 2, 8, 3), (64, 64, 4, 4, 3),
    (256, 128, 2, 8, 3),
]  # fmt: skip
# (warps, stages) of wide.split.
WIDE = [(1, 2), (1, 3), (1, 4), (2, 2), (2, 3), (2, 4), (4, 2), (4, 3), (8, 2), (8, 3)]
# (rows, BLOCK_S, warps, stages) of attend.
ATTEND = [
    (32, 16, 4, 1), (32, 16, 8, 1), (32, 32, 4, 1), (32, 32, 8, 1), (32, 32, 4, 2), (64, 16, 8, 1), (64, 16, 8, 2),
    (64, 32, 4, 1), (64, 32, 8, 1), (64, 32, 8, 2), (64, 64, 8, 1), (64, 64, 8, 2),
]  # fmt: skip
ATTEND_RING = [
    (32, 32, 4, 1), (64, 32, 4, 1), (64, 32, 4, 2), (64, 32, 8, 1), (64, 32, 8, 2), (64, 64, 4, 1), (64, 64, 4, 2),
    (64, 64, 8, 1), (128, 32, 8, 1), (128, 32, 8, 2), (128, 64, 8, 1), (128, 64, 8, 2),
]  # fmt: skip
KINDS = ("folded", "plain", "q8", "folded-q8", "tq4", "folded-tq4")
SPLITS = (32, 64, 128)


def candidates(measured: bool) -> list[Candidate]:
    """All of them. `measured`: also those whose facts are another's, but whose machine code a measurement needs."""
    formats = ("int4_min", "int6")
    found = [Candidate("matvec", fmt, k, config) for k in (5376, 21504, 8192) for fmt in formats for config in MATVEC]
    found += [
        Candidate("matmul", fmt, k, config)
        for k in ((5376, 21504) if measured else (5376,))
        for fmt in formats
        for config in MATMUL
    ]
    for kind in ("ring", *KINDS):
        size = 256 if kind == "ring" else 512
        for shares in SPLITS if measured else (64,):
            found += [Candidate("wide", kind, size, (*config, shares)) for config in WIDE if kind != "ring"]
        attend = ATTEND_RING if kind == "ring" else ATTEND
        found += [Candidate("attend", kind, size, (*config, 0)) for config in attend]
        if kind == "folded":
            found += [Candidate("attend", kind, size, (*config, 1)) for config in attend if config[1] >= 32]
    return found + [Candidate("combine", "float", 512, (shares,)) for shares in SPLITS]


def _code_bits(kind: str) -> int:
    return 8 if kind.endswith("q8") else 4 if kind.endswith("tq4") else 0


def _arguments(candidate: Candidate, dependent_launch: bool) -> tuple[Any, dict[str, Any], int, int]:
    """The kernel, its arguments for ``compile_kernel``, warps and stages."""
    import triton.language as tl

    from gemma4cli.kernels.attention import decode, prefill, wide
    from gemma4cli.kernels.attention.configs import COMBINE_BLOCK_D
    from gemma4cli.kernels.quantized_matmul import matvec
    from gemma4cli.kernels.quantized_matmul import prefill as matrix_prefill

    bits, group, has_min = {"int4_min": (4, 32, True), "int6": (6, 16, False)}.get(candidate.case, (0, 0, False))
    weight = {"codes_ptr": "*i32", "high_ptr": "*i32", "sub_ptr": "*i8", "step_ptr": "*fp16", "y_ptr": "*bf16",
              "K": candidate.size, "BITS": bits, "GROUP": group, "HAS_MIN": has_min}  # fmt: skip
    folded, ring, code_bits = candidate.case.startswith("folded"), candidate.case == "ring", _code_bits(candidate.case)
    stored, width = {0: "*bf16", 8: "*i8", 4: "*u8"}[code_bits], 128 if folded else candidate.size
    cache = {
        "q_ptr": "*bf16", "r_ptr": "*bf16", "k_ptr": stored, "k_scale_ptr": "*fp16", "v_ptr": stored,
        "v_scale_ptr": "*fp16", "position_ptr": "*i64", "S": "i32", "GROUP": 2 if ring else 8, "D": candidate.size,
        "R": width, "FOLDED": folded, "CODE_BITS": code_bits, "DOT": tl.float16 if code_bits else tl.bfloat16,
        "ASM": True,
    }  # fmt: skip
    shares = {"partial_ptr": "*fp32", "top_ptr": "*fp32", "total_ptr": "*fp32"}
    if candidate.kernel == "matvec":
        rows, warps, warps_k, registers = candidate.config
        return matvec.matvec, {
            **weight, "xq_ptr": "*i32", "scale_ptr": "*fp32", "total_ptr": "*fp32", "N": "i32", "ROWS_A_WARP": rows,
            "WR": warps, "WK": warps_k, "DP4A": True, "PDL": dependent_launch, "REGISTERS": registers,
        }, warps * warps_k, 1  # fmt: skip
    if candidate.kernel == "matmul":
        n, m, group_m, warps, stages = candidate.config
        return matrix_prefill.matmul, {
            **weight, "x_ptr": "*bf16", "M": "i32", "N": "i32:16", "BLOCK_N": n, "BLOCK_M": m, "GROUP_M": group_m,
            "DOT": tl.bfloat16, "LOP3": True,
        }, warps, stages  # fmt: skip
    if candidate.kernel == "wide":
        warps, stages, splits = candidate.config
        return wide.split, {
            **cache, **shares, "SPLITS": splits, "STAGES": stages, "NW": warps, "PDL": dependent_launch,
        }, warps, 1  # fmt: skip
    if candidate.kernel == "attend":
        rows, block_s, warps, stages, ahead = candidate.config
        return prefill.attend, {
            **cache, "out_ptr": "*bf16", "T": "i32", "WINDOW": 1024 if ring else 0, "HALF": candidate.size // 2,
            "R_HALF": width // 2, "BLOCK_S": block_s, "ROWS": rows, "AHEAD": bool(ahead),
        }, warps, stages  # fmt: skip
    (splits,) = candidate.config
    return decode.combine, {
        **shares, "out_ptr": "*bf16", "D": candidate.size, "SPLITS": splits, "BLOCK_D": COMBINE_BLOCK_D,
        "PDL": dependent_launch,
    }, 4, 3  # fmt: skip


def _compile(job: tuple[Candidate, str]) -> str:
    """Write <name>.cubin and <name>.json for one candidate; the latter holds an error where there is no code."""
    candidate, target_name = job
    from gemma4cli.kernels.compile import compile_kernel
    from gemma4cli.kernels.targets import get_target

    target = get_target(target_name)
    kernel, arguments, warps, stages = _arguments(candidate, target.dependent_launch)
    stem = FOLDER / target_name / candidate.name
    row: dict[str, Any] = {"kernel": candidate.kernel, "case": candidate.case, "size": candidate.size,
                           "config": candidate.config, "warps": warps}  # fmt: skip
    try:
        code = compile_kernel(kernel, arguments, target, num_warps=warps, num_stages=stages)
        row |= {"function": code.name, "registers": code.registers, "local_bytes": code.local_bytes,
                "shared_bytes": code.shared_bytes}  # fmt: skip
        stem.with_suffix(".cubin").write_bytes(code.cubin)
    except Exception as failure:  # what the compiler refuses is no candidate
        row["failure"] = repr(failure)[:200]
    stem.with_suffix(".json").write_text(json.dumps(row))
    return f"{candidate.name}: {row.get('registers', row.get('failure'))}"


def compile_all(target: str, jobs: int, kernel: str | None) -> None:
    folder = FOLDER / target
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["TRITON_CACHE_DIR"] = str(FOLDER / "triton")
    missing = [
        (candidate, target)
        for candidate in candidates(measured=target == MEASURED)
        if kernel in (None, candidate.kernel) and not (folder / f"{candidate.name}.json").exists()
    ]
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        for done, line in enumerate(pool.imap_unordered(_compile, missing), 1):
            print(f"{done}/{len(missing)} {line}", file=sys.stderr, flush=True)


# Gemma 4 31B: (N, K) of a layer's products.
PRODUCTS = {"gate_up": (43008, 5376), "down": (5376, 21504), "qkv": (16384, 5376), "o": (5376, 8192),
            "qk_full": (18432, 5376), "lm_head": (262144, 5376)}  # fmt: skip
BYTES_PER_WEIGHT = {"int4_min": 0.5 + 2 / 32 + 4 / 256, "int6": 0.75 + 1 / 16 + 2 / 256}
WINDOW, CHUNK = 1024, 2048
KV_HEADS = {256: 16, 512: 4}
HEADS = 32


def cache_bytes(case: str, size: int) -> float:
    """Of one position of one KV head: keys and values."""
    values = size + (128 if case.startswith("folded") else size)
    return {0: values * 2, 8: values + 4, 4: values / 2 + 4}[_code_bits(case)]


def load_of(candidate: Candidate, shape: str, facts: Facts) -> Load:
    """What a launch is given at `shape`: a name of PRODUCTS, "@depth" of wide, "tokens@depth" of attend."""
    kernel, case, size, config, profile = *astuple(candidate), facts.profile
    if kernel == "matvec":
        n, k = PRODUCTS[shape]
        rows, warps, warps_k = config[:3]
        dots = math.ceil(k / 64 / (16 * warps_k)) * 8 * rows  # of a warp; a step is 16 blocks a warp, in 32 threads
        passes = (dots - profile.once.dots) / profile.loop.dots if profile.loop else 0
        return Load(math.ceil(n / (rows * warps)), passes, n * k * BYTES_PER_WEIGHT[case])
    if kernel == "matmul":
        n, k = PRODUCTS[shape]
        block_n, block_m = config[:2]
        moved = n * k * BYTES_PER_WEIGHT[case] + 2 * CHUNK * (k + n)
        return Load(math.ceil(n / block_n) * math.ceil(CHUNK / block_m), k / 128, moved)
    heads = KV_HEADS[size]
    if kernel == "combine":
        return Load(HEADS * size // 64, 0, 4 * HEADS * size * config[-1])
    tokens, depth = (int(part or 0) for part in shape.split("@"))
    if kernel == "wide":
        block_s, shares = 16 * config[0], config[-1]
        steps = math.ceil(math.ceil(depth / shares) / block_s)
        return Load(math.ceil(depth / (steps * block_s)) * heads, steps, depth * heads * cache_bytes(case, size))
    rows, block_s = config[:2]
    each = rows * heads // HEADS  # tokens of a program
    mean = depth + (tokens + each) / 2
    seen = min(mean, WINDOW + each) if case == "ring" else mean
    return Load(math.ceil(tokens / each) * heads, seen / block_s, heads * (depth + tokens) * cache_bytes(case, size))


@dataclass(frozen=True)
class Entry:
    """One line of a table in configs.py: what it is chosen for.

    Attributes:
        places: (case, size, shape) of every launch that it serves.
        present: what the table says for a target, as a candidate's config.
    """

    name: str
    kernel: str
    places: list[tuple[str, int, str]]
    present: Callable[[Target], tuple[int, ...]]


def entries() -> list[Entry]:
    """Those that the model is asked about; ``ring_attention`` is not among them."""
    found = []
    for name, narrow in (("matvec", False), ("matvec narrow", True)):
        shapes = [shape for shape in PRODUCTS if _is_narrow(shape) == narrow]
        places = [(case, PRODUCTS[shape][1], shape) for case in BYTES_PER_WEIGHT for shape in shapes]
        present = lambda target, n_k=PRODUCTS[shapes[0]]: astuple(matvec_config(target, *n_k))  # noqa: E731
        found.append(Entry(name, "matvec", places, present))
    for case, bits in (("int4_min", 4), ("int6", 6)):
        places = [(case, PRODUCTS[shape][1], shape) for shape in ("gate_up", "down", "qkv")]
        present = lambda target, b=bits: astuple(matmul_config(target, b))  # noqa: E731
        found.append(Entry(f"matmul {bits}", "matmul", places, present))
    for kind in KINDS:
        places = [(kind, 512, f"@{depth}") for depth in (512, 8192, 32768, 130000)]
        found.append(Entry(f"decode {kind}", "wide", places, lambda target, k=kind: _decode(target, k)))
    for kind in (*KINDS, "ring"):
        size, tokens = (256, 2048) if kind == "ring" else (512, 1024)
        places = [(kind, size, f"{tokens}@{depth}") for depth in (0, 30720)]
        present = lambda target, k=kind, s=size: astuple(prefill_config(target, s, k))  # noqa: E731
        found.append(Entry(f"prefill {kind}", "attend", places, present))
    return found


def _is_narrow(shape: str) -> bool:
    """Whether MATVEC_NARROW serves it, of targets that are there: the others' one entry has to do for it, too."""
    return matvec_config(get_target(MEASURED), *PRODUCTS[shape]) is MATVEC_NARROW[MEASURED]


def _decode(target: Target, kind: str) -> tuple[int, ...]:
    splits, *rest = astuple(wide_config(target, kind))
    return (*rest, splits)


def mean_slowness(entry: Entry, seconds: Callable[[Candidate, str], float | None]) -> dict[tuple[int, ...], float]:
    """Of each configuration that has a time everywhere: its time over the best one's, the mean of an entry's places."""
    first = (entry.kernel, *entry.places[0][:2])
    configs = {one.config for one in candidates(measured=True) if (one.kernel, one.case, one.size) == first}
    times = {
        config: [seconds(Candidate(entry.kernel, case, size, config), shape) for case, size, shape in entry.places]
        for config in configs
    }
    times = {config: each for config, each in times.items() if None not in each}
    best = [min(column) for column in zip(*times.values(), strict=True)]
    return {config: sum(map(truediv, each, best)) / len(best) for config, each in times.items()}


class Model:
    """The model's times of a target's recorded candidates."""

    def __init__(self, target: str) -> None:
        self.target = get_target(target)
        rows = json.loads(RECORDED.read_text())[target]
        self.facts = {Candidate.of(row): Facts.from_json(row) for row in rows}

    def find(self, candidate: Candidate) -> Facts | None:
        """Facts of a candidate; of `wide` with another number of shares, of matmul with another K, if need be."""
        kernel, case, size, config = astuple(candidate)
        if kernel == "wide":
            config = (*config[:-1], 64)
        return self.facts.get(Candidate(kernel, case, 5376 if kernel == "matmul" else size, config))

    def seconds(self, candidate: Candidate, shape: str) -> float | None:
        """Of `wide` with the combining kernel after it; None where there is no machine code, or it does not fit."""
        facts = self.find(candidate)
        if facts is None or not resident_programs(facts, self.target):
            return None
        time = predict(facts, load_of(candidate, shape, facts), self.target)
        if candidate.kernel == "wide":
            after = Candidate("combine", "float", candidate.size, candidate.config[-1:])
            time += predict(self.facts[after], load_of(after, "", self.facts[after]), self.target)
        return time


def _read(path: Path) -> dict[str, Any] | None:
    row = json.loads(path.read_text())
    # What spills is never chosen: only the model's check needs it.
    if "failure" in row or (row["local_bytes"] and path.parent.name != MEASURED):
        return None
    profile = read_profile(path.with_suffix(".cubin").read_bytes())
    row["once"], row["loop"] = (
        None if work is None else [round(value, 2) for value in astuple(work)] for work in (profile.once, profile.loop)
    )
    del row["function"]
    return row


def record(kernel: str | None) -> None:
    """Write the facts of what has been compiled, of one kernel or all, to the file that the tables and the test go by.

    Those of MEASURED must be of the machine code that was timed: compile, time and record it together, or leave it.
    """
    possible = {one.name for one in candidates(measured=False)}
    needed = {name for name in possible if kernel in (None, name.split("-")[0])}
    document = json.loads(RECORDED.read_text())
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        for name in TARGETS:
            paths = [path for path in sorted((FOLDER / name).glob("*.json")) if path.stem in needed]
            if paths:
                names = {path.stem for path in paths}
                others = [row for row in document[name] if Candidate.of(row).name in possible - names]
                rows = others + [row for row in pool.imap(_read, paths, chunksize=8) if row]
                document[name] = sorted(rows, key=lambda row: Candidate.of(row).name)
    lines = ",\n".join(
        f"{json.dumps(name)}: [\n" + ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows) + "\n]"
        for name, rows in document.items()
    )
    RECORDED.write_text("{\n" + lines + "\n}\n")


def rank(target: str) -> None:
    """Print what the model says of each table's entry: the present one and the best."""
    model = Model(target)
    for entry in entries():
        slowness = mean_slowness(entry, model.seconds)
        present = entry.present(model.target)
        if present not in slowness:
            print(f"{entry.name}: {present} is not among the {len(slowness)} candidates that fit")
        best = sorted(slowness, key=slowness.__getitem__)[:5]
        for config in dict.fromkeys(one for one in (*best, present) if one in slowness):
            launches = [(Candidate(entry.kernel, *place, config), shape) for *place, shape in entry.places]
            facts = model.find(launches[0][0])
            together = resident_programs(facts, model.target)
            times = " ".join(f"{1e6 * (model.seconds(*launch) or 0):.0f}" for launch in launches)
            print(f"{entry.name:18} {slowness[config]:5.3f} {config} {together} programs, {facts.registers} registers, "
                  f"us {times}{' (present)' * (config == present)}")  # fmt: skip


def spearman(a: list[float], b: list[float]) -> float:
    """Rank correlation (no ties to speak of)."""
    ranks = [[sorted(values).index(value) for value in values] for values in (a, b)]
    mean = (len(a) - 1) / 2
    top = sum((x - mean) * (y - mean) for x, y in zip(*ranks, strict=True))
    return top / math.sqrt(math.prod(sum((x - mean) ** 2 for x in values) for values in ranks) or 1)


@dataclass(frozen=True)
class Skill:
    """How the model's order compares with the measured one.

    Attributes:
        correlation: of the ranks.
        regret: by which part what the model chooses is slower than the fastest.
        ratio: predicted over measured, median; of an entry, of slownesses.
    """

    name: str
    correlation: float
    regret: float
    ratio: float
    chosen: tuple[int, ...]
    best: tuple[int, ...]

    @classmethod
    def between(cls, name: str, predicted: Mapping[Any, float], measured: Mapping[Any, float]) -> Skill:
        both = [config for config in measured if config in predicted]
        chosen, best = min(both, key=predicted.__getitem__), min(both, key=measured.__getitem__)
        ratios = sorted(predicted[config] / measured[config] for config in both)
        correlation = spearman([predicted[config] for config in both], [measured[config] for config in both])
        return cls(name, correlation, measured[chosen] / measured[best] - 1, ratios[len(ratios) // 2], chosen, best)


def check(path: Path) -> tuple[dict[str, list[Skill]], list[Skill]]:
    """Compare the model with measured times: each shape of a kernel, and each entry of the tables as a whole."""
    model = Model(MEASURED)
    measured = {(Candidate.of(row), row["shape"]): row["us"] / 1e6 for row in json.loads(path.read_text())["rows"]
                if "us" in row}  # fmt: skip
    groups: dict[tuple[str, str, str], tuple[dict, dict]] = defaultdict(lambda: ({}, {}))
    for (candidate, shape), seconds in measured.items():
        predicted, times = groups[candidate.kernel, candidate.case, shape]
        ours = model.seconds(candidate, shape)
        if ours is not None:
            times[candidate.config], predicted[candidate.config] = seconds, ours
    shapes: dict[str, list[Skill]] = defaultdict(list)
    for key, (predicted, times) in groups.items():
        shapes[key[0]].append(Skill.between(" ".join(key), predicted, times))
    both = (model.seconds, lambda candidate, shape: measured.get((candidate, shape)))
    wholes = [Skill.between(entry.name, *(mean_slowness(entry, one) for one in both)) for entry in entries()]
    return shapes, wholes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("compile")
    build.add_argument("--target", required=True)
    build.add_argument("--jobs", type=int, default=2)
    build.add_argument("--kernel", choices=KERNELS)
    commands.add_parser("record").add_argument("--kernel", choices=KERNELS)
    commands.add_parser("rank").add_argument("--target", required=True)
    commands.add_parser("check").add_argument("measured", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "compile":
        compile_all(arguments.target, arguments.jobs, arguments.kernel)
    elif arguments.command == "record":
        record(arguments.kernel)
    elif arguments.command == "rank":
        rank(arguments.target)
    else:
        shapes, wholes = check(arguments.measured)
        for one in [skill for skills in shapes.values() for skill in skills] + wholes:
            print(f"{one.name:30} rank {one.correlation:5.2f} regret {100 * one.regret:5.1f} % predicted/measured "
                  f"{one.ratio:4.2f} chosen {one.chosen} best {one.best}")  # fmt: skip


if __name__ == "__main__":
    main()
