"""Time `g4 convert-gguf` beside a plain copy of the same file on the same disk, in turns (see beside_copy.py).

    python bench/convert_gguf.py model.gguf --folder /tmp --runs 3 --out bench/results/convert-gguf.json

Each conversion is a fresh `g4` process, start-up included; a conversion syncs every file.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

from beside_copy import arguments, in_turns, report, run_child, usage


def convert_here(source: Path, target: Path) -> dict[str, Any]:
    """Convert in this process."""
    from gemma4cli.cli import main as g4

    with contextlib.redirect_stdout(sys.stderr):
        code = g4(["convert-gguf", str(source), "-o", str(target), "--quiet"])
    if code:
        raise SystemExit(code)
    manifest = json.loads((target / "g4.json").read_text())
    return {
        **usage(),
        "checkpoint_bytes": manifest["totals"]["weight_bytes"],
        "types": manifest["recipe"]["types"],
        "exact_tensors": sum(not record["relative_error"] for record in manifest["tensors"].values()),
        "tensors": len(manifest["tensors"]),
    }


def main() -> None:
    options = arguments(__doc__, "file").parse_args()
    if options.child:
        print(json.dumps(convert_here(options.file, options.child)))
        return
    result = in_turns(
        options.file,
        options.folder,
        options.runs,
        lambda target: run_child(__file__, options.file, target),
        options.folder / "bench-checkpoint",
    )
    report(options.out, ("numpy", "torch", "torchao", "gguf"), result)


if __name__ == "__main__":
    main()
