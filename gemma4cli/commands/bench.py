"""`g4 bench`: how fast a model runs here, where its time goes, and what quantization cost it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from gemma4cli.benchmark.plan import make_plan, parse_sizes
from gemma4cli.commands.options import CompileOption, ContextOption, JsonOption, QuietOption, parse_count
from gemma4cli.console import Console, open_console
from gemma4cli.errors import G4Error
from gemma4cli.workspace import Workspace

if TYPE_CHECKING:
    from gemma4cli.benchmark.plan import Plan
    from gemma4cli.benchmark.run import Document, Head
    from gemma4cli.benchmark.subject import Subject

EXAMPLES = (
    ("The last exported bundle", "g4 bench"),
    ("Prompt sizes, and decoding at several depths", "g4 bench --prompt 512,2048 --gen 128 --depth 0,2k,8k"),
    ("Beside llama.cpp on the same file", "g4 bench --vs llama-bench=./llama-bench --gguf gemma.gguf"),
    ("Fail when something became slower", "g4 bench --baseline before.json --fail-below 5%"),
    ("What quantization cost", "g4 bench --quality --save-receipt"),
)

_EXIT_REGRESSION = 1
_EXIT_INTERRUPTED = 130


def bench(
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="BUNDLE|CHECKPOINT|GGUF",
            help="What to measure: by path, or by name in the workspace.",
            show_default="the last one exported",
        ),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", metavar="SIZES", help="Prompt sizes to read.", show_default="512"),
    ] = None,
    gen: Annotated[
        str | None,
        typer.Option("--gen", "-n", metavar="SIZES", help="Numbers of tokens to decode.", show_default="128"),
    ] = None,
    depth: Annotated[
        str | None,
        typer.Option(
            "--depth",
            "-d",
            metavar="SIZES",
            help="Tokens that the cache holds before.",
            show_default="those of 0,2k,8k,32k,127k that fit",
        ),
    ] = None,
    repeats: Annotated[int, typer.Option("--repeats", "-r", metavar="N", min=1, help="Timed rounds.")] = 5,
    warmup: Annotated[int, typer.Option("--warmup", metavar="N", min=0, help="Untimed rounds before.")] = 1,
    text: Annotated[
        bool, typer.Option("--text/--no-text", help="Also measure with tokenizer, sampling and detokenizer.")
    ] = True,
    threads: Annotated[
        int | None,
        typer.Option("--threads", "-t", metavar="N", min=1, help="CPU threads.", show_default="one per core"),
    ] = None,
    engine: Annotated[
        Literal["runner", "torch"] | None,
        typer.Option("--engine", help="What runs a bundle: torch hosts CUDA code in PyTorch.", show_default="runner"),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            "--device", metavar="NAME", help="Where a checkpoint computes: cpu, cuda, cuda:1.", show_default="cpu"
        ),
    ] = None,
    compile: CompileOption = False,
    ctx: ContextOption = None,
    vs: Annotated[
        str | None,
        typer.Option("--vs", metavar="llama-bench=PATH", help="Also run llama.cpp's llama-bench, in turns with g4."),
    ] = None,
    gguf: Annotated[Path | None, typer.Option("--gguf", metavar="FILE", help="What llama-bench runs.")] = None,
    baseline: Annotated[
        Path | None, typer.Option("--baseline", metavar="FILE", help="Compare with an earlier --json or --jsonl.")
    ] = None,
    fail_below: Annotated[
        str | None,
        typer.Option("--fail-below", metavar="SHARE", help="Exit 1 when slower by more than this.", show_default="5%"),
    ] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Instead: where the time of one step in PyTorch goes.")
    ] = False,
    quality: Annotated[
        bool, typer.Option("--quality", help="Instead: perplexity, KL divergence, agreement with the original.")
    ] = False,
    reference: Annotated[
        str | None,
        typer.Option("--reference", metavar="MODEL", help="The unquantized model.", show_default="the last one pulled"),
    ] = None,
    on: Annotated[
        Path | None,
        typer.Option("--on", metavar="FILE", help="Text to judge quality on.", show_default="the model's eval.txt"),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            "--tokens", metavar="N", parser=parse_count, help="Read at most this many tokens of it.", show_default="all"
        ),
    ] = None,
    save_receipt: Annotated[
        bool, typer.Option("--save-receipt", help="Store the quality in the bundle (receipt.json).")
    ] = False,
    json: JsonOption = False,
    jsonl: Annotated[bool, typer.Option("--jsonl", help="Print one JSON document per test.")] = False,
    csv: Annotated[bool, typer.Option("--csv", help="Print comma-separated values.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print tables like llama-bench's.")] = False,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw speed over depth: .png, .svg or .pdf.")
    ] = None,
    quiet: QuietOption = False,
) -> int:
    """Measure a model: speed, memory, profile, quality.

    Test names and columns are llama-bench's: pp512 reads 512 tokens of prompt, tg128 decodes 128,
    @ d2048 says what the cache holds before.
    """
    console = open_console(json=json, quiet=quiet)
    format = _choose_format(json=json, jsonl=jsonl, csv=csv, markdown=markdown)
    mode = _choose_mode(profile, quality, plain=format in ("table", "json"))
    for_speed = {"--vs": vs, "--gguf": gguf, "--baseline": baseline, "--fail-below": fail_below, "--plot": plot}
    for_quality = {"--reference": reference, "--on": on, "--tokens": tokens, "--save-receipt": save_receipt or None}
    _refuse(for_speed if mode else {}, f"{mode} does not go with")
    _refuse({} if quality else for_quality, "Only --quality takes")
    if (vs is None) != (gguf is None):
        raise _usage("--vs and --gguf belong together.", "Give --vs llama-bench=PATH --gguf FILE.")
    if fail_below is not None and baseline is None:
        raise _usage("--fail-below needs a --baseline.")
    sizes = {
        "prompts": None if prompt is None else parse_sizes(prompt),
        "gens": None if gen is None else parse_sizes(gen),
        "depths": None if depth is None else parse_sizes(depth),
    }

    from gemma4cli.benchmark.baseline import DEFAULT_LIMIT, parse_limit, read_baseline
    from gemma4cli.benchmark.llama_bench import LlamaBench, parse_rival
    from gemma4cli.benchmark.plot import check_plot
    from gemma4cli.benchmark.subject import open_subject

    limit = DEFAULT_LIMIT if fail_below is None else parse_limit(fail_below)
    before = None if baseline is None else read_baseline(baseline)
    if plot is not None:
        check_plot(plot)
    workspace = Workspace.from_environment()
    folder = _folder(workspace, target, console)
    subject = open_subject(folder, engine=engine, device=device, compile=compile, context=ctx)
    if quality:
        return _judge(console, workspace, subject, reference, on, tokens, threads, save=save_receipt)
    plan = make_plan(subject.context_length, **sizes, text=text, repeats=repeats, warmup=warmup)
    if profile:
        return _profile(console, subject, plan, threads)
    rival = None
    if vs is not None and gguf is not None:
        rival = LlamaBench(parse_rival(vs), gguf, plan.tests, subject.device, threads)
        _warn_of_another_file(console, subject, gguf)
    document = _measure(console, subject, plan, threads, rival, announced=format == "table")
    if before is not None:
        document["baseline"] = _compare(console, before, document, limit)
    if plot is not None:
        from gemma4cli.benchmark.plot import plot as draw_plot

        draw_plot(document, plot)
        console.note(f"Wrote {plot}.")
    _print(console, document, format)
    if not document["complete"]:
        return _EXIT_INTERRUPTED
    return _EXIT_REGRESSION if before is not None and document["baseline"]["regressed"] else 0


def _measure(
    console: Console, subject: Subject, plan: Plan, threads: int | None, rival: Any, *, announced: bool
) -> Document:
    from gemma4cli.benchmark.report import head_lines
    from gemma4cli.benchmark.run import run_benchmark

    def announce(head: Head) -> None:
        if announced and console.mode == "human":
            for line in head_lines(head):
                console.line(line)

    document = run_benchmark(
        subject, plan, threads=threads, rival=rival, announce=announce, progress=console.progress()
    )
    if not document["complete"]:
        console.warn("Interrupted: the numbers are of what was measured so far.")
    return document


def _print(console: Console, document: Document, format: str) -> None:
    from gemma4cli.benchmark import report
    from gemma4cli.commands.bench_views import draw_speed

    if format in ("table", "json"):
        console.result(document, lambda: draw_speed(console, document), essence=report.essence(document))
        return
    write = {"jsonl": report.jsonl, "csv": report.csv_text, "markdown": report.markdown}[format]
    console.line(write(document))


def _compare(console: Console, before: list[dict[str, Any]], document: Document, limit: float) -> Document:
    from gemma4cli.benchmark.baseline import compare

    comparison = compare(before, document["tests"], limit)
    for name, then, now in comparison.different:
        console.warn(f"The baseline has another {name}: {then}; now {now}.")
    if comparison.missing:
        console.warn(f"Of the baseline, this run has not measured {', '.join(comparison.missing)}.")
    for change in comparison.regressions:
        console.warn(
            f"{change.test} fell by {-change.change:.1%}, from {change.before:.1f} to {change.now:.1f} tokens/s; "
            f"{limit:.1%} is allowed."
        )
    return comparison.to_json()


def _profile(console: Console, subject: Subject, plan: Plan, threads: int | None) -> int:
    from gemma4cli.benchmark.profile import profile_steps
    from gemma4cli.commands.bench_views import draw_profile

    document = profile_steps(subject, plan, threads, console.progress())
    shares = ", ".join(f"{step['test']} {step['seconds'] * 1000:.2f} ms" for step in document["steps"])
    console.result(document, lambda: draw_profile(console, document), essence=shares)
    return 0


def _judge(
    console: Console,
    workspace: Workspace,
    subject: Subject,
    reference: str | None,
    on: Path | None,
    tokens: int | None,
    threads: int | None,
    *,
    save: bool,
) -> int:
    from gemma4cli.benchmark.quality import judge_quality
    from gemma4cli.benchmark.reference import find_reference, find_text
    from gemma4cli.benchmark.subject import BundleSubject
    from gemma4cli.commands.bench_views import draw_quality
    from gemma4cli.export.receipt import write_receipt

    if save and not isinstance(subject, BundleSubject):
        raise G4Error("Only a bundle keeps a receipt.", hint="Export the checkpoint, and judge the bundle.")
    original = find_reference(workspace, subject, reference, console.note)
    document = judge_quality(
        subject, original, find_text(original, on), limit=tokens, threads=threads, progress=console.progress()
    )
    if save and isinstance(subject, BundleSubject):
        document["receipt"] = str(write_receipt(subject.bundle, document))
    result = document["result"]
    line = f"KL {result['kl']['mean']:.6f}, perplexity {result['perplexity']:.4f}, top-1 {result['top1_agreement']:.2%}"
    console.result(document, lambda: draw_quality(console, document), essence=line)
    return 0


def _folder(workspace: Workspace, target: str | None, console: Console) -> Path:
    path = workspace.resolve_runnable(target, console.note)
    if path.is_file():
        from gemma4cli.quant.gguf.convert import ensure_converted

        return ensure_converted(path, workspace.folder("checkpoint"), console.progress())
    return path


def _warn_of_another_file(console: Console, subject: Subject, gguf: Path) -> None:
    source = subject.source or {}
    known = source.get("files", {}).get(gguf.name)
    if source.get("kind") != "gguf" or known is None or known["bytes"] != gguf.stat().st_size:
        console.warn(f"{subject.path} was not made from {gguf}: the two run different weights.")


def _choose_format(**flags: bool) -> str:
    chosen = [name for name, is_chosen in flags.items() if is_chosen]
    if len(chosen) > 1:
        raise _usage(f"{', '.join(f'--{name}' for name in chosen)} exclude each other.")
    return chosen[0] if chosen else "table"


def _choose_mode(profile: bool, quality: bool, *, plain: bool) -> str | None:
    """Return --profile or --quality, None for speed."""
    if profile and quality:
        raise _usage("--profile and --quality exclude each other.")
    mode = "--profile" if profile else "--quality" if quality else None
    if mode and not plain:
        raise _usage(f"{mode} gives a table or --json.")
    return mode


def _refuse(options: dict[str, Any], sentence: str) -> None:
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise _usage(f"{sentence} {', '.join(given)}.")


def _usage(message: str, hint: str | None = None) -> G4Error:
    return G4Error(message, hint=hint or "See g4 bench --help.", exit_code=2)
