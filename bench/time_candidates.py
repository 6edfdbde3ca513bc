"""Time every candidate configuration of the kernels on the GPU at hand: what the model of occupancy is checked against.

    python tools/choose_configs.py compile --target sm_90                 # anywhere, no GPU
    python bench/time_candidates.py build/candidates/sm_90 --out occupancy.json [--seconds 85] [--kernel matvec]

Loads the machine code itself, so that what is timed is what the model saw and a bundle holds, whatever Triton the host
has. Each configuration is checked against the float32 reference first; a wrong one has no time. Times are medians of
CUDA-graph replays over copies of the weight or cache that together exceed the L2.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench"), str(ROOT / "tools")]

from choose_configs import CHUNK, KINDS, PRODUCTS, Candidate  # noqa: E402
from tune_attention import FULL, SLIDING, make_cache, pointers  # noqa: E402
from tune_matmul import FORMATS, copy_bandwidth, random_weight, relative_error  # noqa: E402

from gemma4cli.kernels.attention import reference as attention_reference  # noqa: E402
from gemma4cli.kernels.attention.cache import AttentionCache  # noqa: E402
from gemma4cli.kernels.attention.configs import COMBINE_BLOCK_D  # noqa: E402
from gemma4cli.kernels.quantized_matmul import reference  # noqa: E402
from gemma4cli.kernels.quantized_matmul.format import PackedWeight  # noqa: E402

ROTATED_BYTES = 400e6  # of weights or caches that a graph goes through, past any L2
DEPTHS = (512, 8192, 32768, 130000)
DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


class Code:
    """One candidate's machine code on the device."""

    def __init__(self, folder: Path, facts: dict, driver: ctypes.CDLL) -> None:
        self.facts, self._driver = facts, driver
        code = (folder / f"{Candidate.of(facts).name}.cubin").read_bytes()
        module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        self._check(driver.cuModuleLoadData(ctypes.byref(module), code))
        self._check(driver.cuModuleGetFunction(ctypes.byref(self._function), module, facts["function"].encode()))
        if facts["shared_bytes"] > 48 << 10:
            self._check(driver.cuFuncSetAttribute(self._function, DYNAMIC_SHARED, facts["shared_bytes"]))

    @staticmethod
    def _check(status: int) -> None:
        if status:
            raise RuntimeError(f"the driver refuses: error {status}")

    def __call__(self, grid: tuple[int, ...], *arguments: torch.Tensor | int) -> None:
        # Triton's two scratch pointers come last; these kernels use neither.
        values = [
            ctypes.c_int32(a) if isinstance(a, int) else ctypes.c_void_p(a.data_ptr()) for a in arguments
        ] + [ctypes.c_void_p(0), ctypes.c_void_p(0)]  # fmt: skip
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        x, y, z = (*grid, 1, 1)[:3]
        threads, shared = 32 * self.facts["warps"], self.facts["shared_bytes"]
        self._check(self._driver.cuLaunchKernel(self._function, x, y, z, threads, 1, 1, shared, stream, pointers, None))


def graph_time_us(body: Callable[[int], None], copies: int, least: int, rounds: int = 5) -> float:
    """Median time of one body(i), replayed from a graph of at least `least` of them over `copies` inputs."""
    graph, count = torch.cuda.CUDAGraph(), max(copies, least)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):  # torch.cuda.graph would collect garbage every time
        graph.capture_begin()
        for i in range(count):
            body(i % copies)
        graph.capture_end()
    graph.replay()
    samples = []
    for _ in range(rounds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        samples.append(start.elapsed_time(end) / count * 1e3)
    return sorted(samples)[len(samples) // 2]


def matvec(codes: list[Code], case: str, shape: str) -> Iterator[dict]:
    n, k = PRODUCTS[shape]
    fmt = FORMATS[case]
    first = random_weight(fmt, n, k)
    copies = max(2, int(ROTATED_BYTES // first.nbytes) + 1)
    weights = [first] + [random_weight(fmt, n, k) for _ in range(copies - 1)]
    x = torch.randn(1, k, device="cuda", dtype=torch.bfloat16)
    xq, scale, total = reference.quantize_activations(x)
    expected = reference.matmul_int8(x.float(), last_rows(first, 256))
    y = torch.empty((1, n), device="cuda", dtype=torch.bfloat16)
    for code in codes:
        rows = math.prod(code.facts["config"][:2])  # a warp's times the warps side by side

        def body(i: int) -> None:
            w = weights[i]
            high = w.codes if w.high is None else w.high
            code((-(-n // rows), 1), w.codes, high, w.sub, w.step, xq, scale, total, y, n)  # noqa: B023

        yield from measured(code, shape, body, y, lambda: relative_error(y[:, -256:], expected), 1e-2, copies, 8)


def matmul(codes: list[Code], case: str, shape: str) -> Iterator[dict]:
    n, k = PRODUCTS[shape]
    tokens = CHUNK
    w = random_weight(FORMATS[case], n, k)
    high = w.codes if w.high is None else w.high
    x = torch.randn(tokens, k, device="cuda", dtype=torch.bfloat16)
    expected = reference.matmul(x.float(), last_rows(w, 64))
    y = torch.empty((tokens, n), device="cuda", dtype=torch.bfloat16)
    for code in codes:
        block_n, block_m = code.facts["config"][:2]

        def body(i: int) -> None:
            code((-(-n // block_n) * -(-tokens // block_m),), w.codes, high, w.sub, w.step, x, y, tokens, n)  # noqa: B023

        yield from measured(code, shape, body, y, lambda: relative_error(y[:, -64:], expected), 1e-2, 1, 3, 3)


def last_rows(w: PackedWeight, count: int) -> PackedWeight:
    high = None if w.high is None else w.high[-count:]
    return PackedWeight(w.format, (count, w.shape[1]), w.codes[-count:], high, w.sub[-count:], w.step[-count:])


def cache_bytes(cache: AttentionCache) -> int:
    return sum(t.numel() * t.element_size() for t in (cache.k, cache.v))


def decode(codes: list[Code], kind: str, depth: int, combines: dict[int, Code]) -> Iterator[dict]:
    """Split and combine together."""
    first = make_cache(kind, FULL, depth)
    copies = min(160, int(ROTATED_BYTES // cache_bytes(first)) + 1)
    caches = [first] + [make_cache(kind, FULL, depth) for _ in range(copies - 1)]
    heads, kv_heads, width = FULL["heads"], FULL["kv_heads"], FULL["head_dim"]
    q = torch.randn(heads, 1, width, device="cuda", dtype=torch.bfloat16) * 0.05
    r = torch.randn(heads, 1, 128 if first.folded else width, device="cuda", dtype=torch.bfloat16) * 0.05
    position = torch.tensor([depth - 1], device="cuda")
    expected = attention_reference.attention(q.float(), r.float() if first.folded else None, first, position, 0)
    out = torch.empty_like(q)
    partial = torch.empty(heads, 128, width, device="cuda")
    top, total = torch.empty(heads, 128, device="cuda"), torch.empty(heads, 128, device="cuda")
    for code in codes:
        splits = code.facts["config"][-1]
        combine = combines[splits]

        def body(i: int) -> None:
            cache = caches[i]
            code((kv_heads, splits), *pointers(cache, q, r), position, partial, top, total, cache.v.shape[1])  # noqa: B023
            combine((heads, width // COMBINE_BLOCK_D), partial, top, total, out)  # noqa: B023

        yield from measured(code, f"@{depth}", body, out, lambda: relative_error(out, expected), 2e-2, copies, 12)


def prefill(codes: list[Code], case: str, tokens: int, depth: int) -> Iterator[dict]:
    shape, slots = (SLIDING, 1023 + tokens) if case == "ring" else (FULL, depth + tokens)
    cache = make_cache("plain" if case == "ring" else case, shape, slots)
    heads, width = shape["heads"], shape["head_dim"]
    group = heads // shape["kv_heads"]
    q = torch.randn(heads, tokens, width, device="cuda", dtype=torch.bfloat16) * 0.05
    r = torch.randn(heads, tokens, 128 if cache.folded else width, device="cuda", dtype=torch.bfloat16) * 0.05
    position = torch.arange(depth, depth + tokens, device="cuda")
    last = slice(tokens - 64, tokens)
    expected = attention_reference.attention(
        q[:, last].float(), r[:, last].float() if cache.folded else None, cache, position[last], shape["window"]
    )
    out = torch.empty_like(q)
    for code in codes:
        rows = code.facts["config"][0]

        def body(i: int) -> None:
            grid = (-(-tokens // (rows // group)), shape["kv_heads"])  # noqa: B023
            code(grid, *pointers(cache, q, r), position, out, tokens, cache.v.shape[1])  # noqa: B023

        label, least = f"{tokens}@{depth}", 1 if depth > 10000 and case != "ring" else 5
        yield from measured(code, label, body, out, lambda: relative_error(out[:, last], expected), 2e-2, 1, least, 3)


def measured(
    code: Code, shape: str, body: Callable[[int], None], out: torch.Tensor, error: Callable[[], float], most: float,
    copies: int, least: int, rounds: int = 5,
) -> Iterator[dict]:  # fmt: skip
    """Check, then time one configuration."""
    if time.time() > DEADLINE:
        return
    row = {key: code.facts[key] for key in ("kernel", "case", "size", "config")} | {"shape": shape}
    try:
        out.fill_(torch.nan)
        body(0)
        row["error"] = float(f"{error():.2g}")
        if row["error"] < most and torch.isfinite(out).all():
            row["us"] = round(graph_time_us(body, copies, least, rounds), 2)
    except RuntimeError as failure:
        row["failure"] = repr(failure)[:100]
    yield row


def runs(
    codes: dict[tuple[str, str, int], list[Code]], combines: dict[int, Code]
) -> Iterator[tuple[str, Iterator[dict]]]:
    """All there is to time, and of which kernel."""
    for shape, (_, k) in PRODUCTS.items():
        for case in ("int4_min", "int6"):
            yield "matvec", matvec(codes["matvec", case, k], case, shape)
    for case in KINDS:
        for depth in DEPTHS:
            yield "wide", decode(codes["wide", case, 512], case, depth, combines)
    for shape in ("gate_up", "down", "qkv"):
        for case in ("int4_min", "int6"):
            yield "matmul", matmul(codes["matmul", case, PRODUCTS[shape][1]], case, shape)
    for depth in (30720, 0):
        yield "attend", prefill(codes["attend", "ring", 256], "ring", 2048, depth)
        for case in KINDS:
            yield "attend", prefill(codes["attend", case, 512], case, 1024, depth)


def gpu_state(fields: str) -> str:
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]


DEADLINE = 0.0


def main() -> None:
    global DEADLINE
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=85)
    parser.add_argument("--kernel", choices=["matvec", "wide", "matmul", "attend"], help="only this one")
    arguments = parser.parse_args()
    began = time.time()
    DEADLINE = began + arguments.seconds
    torch.manual_seed(0)
    torch.zeros(1, device="cuda")  # makes the context
    driver = ctypes.CDLL("libcuda.so.1")
    codes: dict[tuple[str, str, int], list[Code]] = defaultdict(list)
    limit = torch.cuda.get_device_properties(0).shared_memory_per_block_optin
    for path in sorted(arguments.folder.glob("*.json")):
        facts = json.loads(path.read_text())
        if "failure" not in facts and facts["shared_bytes"] <= limit:
            codes[facts["kernel"], facts["case"], facts["size"]].append(Code(arguments.folder, facts, driver))
    combines = {
        code.facts["config"][0]: code
        for (kernel, _, _), found in codes.items()
        for code in found
        if kernel == "combine"
    }
    document: dict = {
        "gpu": gpu_state("name,driver_version"),
        "torch": torch.__version__,
        "copy_gb_s": round(copy_bandwidth() / 1e9),
        "rows": [],
    }
    print(f"{document['gpu']}, copy {document['copy_gb_s']} GB/s, {sum(map(len, codes.values()))} kernels loaded "
          f"after {time.time() - began:.1f} s", flush=True)  # fmt: skip

    def record(rows: Iterator[dict]) -> None:
        found = list(rows)
        document["rows"] += found
        timed = sorted((row for row in found if "us" in row), key=lambda row: row["us"])
        if timed:
            best = timed[0]
            print(f"{time.time() - began:5.1f} s {best['kernel']:7} {best['case']:10} {best['shape']:11} {len(timed):3} of "
                  f"{len(found):3} best {best['us']:8.1f} us {best['config']}", flush=True)  # fmt: skip
        for row in found:
            if "us" not in row:
                print("   no time:", row)
        torch.cuda.empty_cache()
        arguments.out.write_text(json.dumps(document))

    for kernel, rows in runs(codes, combines):
        if arguments.kernel in (None, kernel):
            record(rows)
            if kernel == "matmul":
                document["sm_clock_after_matmul"] = gpu_state("clocks.sm,power.draw,temperature.gpu")
    document["seconds"] = round(time.time() - began, 1)
    arguments.out.write_text(json.dumps(document))


if __name__ == "__main__":
    main()
