"""The runner as a program: its protocol, its command line, and bundles that are not what they should be."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemma4cli import __version__, native
from tests.support.mini_program import CHUNK, CONTEXT, CONTRACT, VOCAB, reference_tokens, write_mini_bundle

TIMEOUT_S = 120


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mini_bundle(tmp_path_factory.mktemp("mini"))


def run(*arguments: str | Path, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    command = [native.find_runner(), *arguments]
    return subprocess.run(
        command, input=stdin, capture_output=True, timeout=TIMEOUT_S, env=native.runner_environment(), check=False
    )


def converse(bundle: Path, *lines: str | bytes, end: bytes = b"\n") -> list[dict[str, Any]]:
    """Send all lines at once and close stdin; return the replies after `ready`."""
    sent = b"\n".join(line.encode() if isinstance(line, str) else line for line in lines) + end
    finished = run("--bundle", bundle, stdin=sent)
    assert (finished.returncode, finished.stderr) == (0, b"")
    ready, *replies = [json.loads(line) for line in finished.stdout.splitlines()]
    assert ready["event"] == "ready"
    return replies


def tokens_of(replies: list[dict[str, Any]], request_id: int) -> list[int]:
    return [reply["token"] for reply in replies if reply["event"] == "token" and reply["id"] == request_id]


def test_requests_read_before_the_end_of_input_are_answered_in_order(bundle: Path) -> None:
    replies = converse(
        bundle,
        "generate id=3 tokens=2,5,9 max_new_tokens=4 stop=",
        "",
        "generate id=4 session=b tokens=7 max_new_tokens=2 stop=",
        end=b"",
    )
    assert tokens_of(replies, 3) == reference_tokens((2, 5, 9), 4)
    assert tokens_of(replies, 4) == reference_tokens((7,), 2)
    assert [reply["id"] for reply in replies if reply["event"] == "done"] == [3, 4]


def test_the_bundles_own_stop_ids_are_the_default(bundle: Path) -> None:
    prompt = next(p for p in range(VOCAB) if set(reference_tokens((p,), 40)) & set(CONTRACT.eos_ids))
    expected = reference_tokens((prompt,), 40)
    first = min(expected.index(i) for i in CONTRACT.eos_ids if i in expected)
    replies = converse(bundle, f"generate id=1 tokens={prompt} max_new_tokens=40")
    assert tokens_of(replies, 1) == expected[:first]
    assert replies[-1]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("dance id=1", "`dance` is not a request; there are generate, cancel, close, info and quit."),
        (" generate id=1 tokens=1", "`` is not a request"),
        ("generate tokens=1", "`generate` needs id=..."),
        ("generate id=1", "`generate` needs tokens=..."),
        ("generate id=-1 tokens=1", "id must be 0 or more."),
        ("generate id=x tokens=1", "id is `x`, not a whole number."),
        ("generate id=1 id=2 tokens=1", "`id` is given twice."),
        ("generate id=1 tokens", "`tokens` is not of the form key=value."),
        ("generate id=1 tokens=1 colour=red", "`generate` knows no `colour`."),
        ("generate id=1 tokens=", "The prompt is empty."),
        ("generate id=1 tokens=1,,2", "tokens is ``, not a whole number."),
        ("generate id=1 tokens=1,", "tokens ends with a comma."),
        ("generate id=1 tokens=99999999999999999999", "tokens is `99999999999999999999`, not a whole number."),
        ("generate id=1 tokens=-1", f"Token -1 at position 0 is outside the vocabulary of {VOCAB}."),
        ("generate id=1 tokens=1 session=a/b", "`a/b` is not a session name: 1 to 64 of A-Z a-z 0-9 - _ ."),
        ("generate id=1 tokens=1 max_new_tokens=0", "max_new_tokens must be at least 1."),
        ("generate id=1 tokens=1 temperature=-1", "temperature must be 0 (greedy) or more."),
        ("generate id=1 tokens=1 temperature=nan", "temperature is `nan`, not a number."),
        ("generate id=1 tokens=1 top_k=-1", "top_k must be 0 (off) or more."),
        ("generate id=1 tokens=1 top_p=0", "top_p must be above 0 and at most 1 (off)."),
        ("generate id=1 tokens=1 min_p=1", "min_p must be from 0 (off) to below 1."),
        ("generate id=1 tokens=1 seed=-1", "seed must be from 0 to 2^63 - 1."),
        ("generate id=1 tokens=1 chunk=0", f"chunk must be from 1 to {CHUNK}."),
        (f"generate id=1 tokens=1 chunk={CHUNK + 1}", f"chunk must be from 1 to {CHUNK}."),
        ("generate id=1 tokens=1 chunk=x", "chunk is `x`, not a whole number."),
        ("generate id=1 tokens=1 logits=/nowhere/x", "/nowhere/x cannot be written: No such file or directory."),
        ("close", "`close` needs session=..."),
        ("close session=nobody", "There is no session `nobody`."),
        ("cancel", "`cancel` needs id=..."),
        (b"generate id=1 tokens=\xff\xfe", "The request holds a byte that is not printable ASCII."),
        (b"\x00\x01\x02", "The request holds a byte that is not printable ASCII."),
    ],
)
def test_a_faulty_line_gets_an_error_reply_and_the_runner_goes_on(bundle: Path, line: str, message: str) -> None:
    replies = converse(bundle, line, "generate id=9 tokens=5 max_new_tokens=1 stop=")
    assert replies[0]["event"] == "error"
    assert replies[0]["message"].startswith(message)
    assert tokens_of(replies, 9) == reference_tokens((5,), 1)


def test_an_error_carries_the_id_of_its_request(bundle: Path) -> None:
    replies = converse(bundle, "generate id=41 tokens=1 colour=red", "dance")
    assert [reply["id"] for reply in replies] == [41, None]


def test_a_prompt_that_does_not_fit_is_refused_with_both_numbers(bundle: Path) -> None:
    replies = converse(bundle, f"generate id=1 tokens={','.join(['3'] * CONTEXT)}")
    assert replies[0]["message"] == (
        f"The conversation has {CONTEXT} tokens, but the context holds {CONTEXT} including the answer."
    )
    assert "--ctx" in replies[0]["hint"]


def test_an_oversized_line_is_dropped_without_being_kept_in_memory(bundle: Path) -> None:
    replies = converse(bundle, b"generate id=1 tokens=" + b"1," * (20 << 20), "info")
    assert replies[0]["message"] == f"The request is longer than {8 << 20} bytes."
    assert replies[1]["peak_host_bytes"] < 64 << 20


def test_random_bytes_never_end_the_runner(bundle: Path) -> None:
    source = random.Random(5)
    junk = [source.randbytes(source.randrange(1, 200)).replace(b"\n", b"") for _ in range(200)]
    words = (b"generate", b"cancel", b"id=1", b"tokens=1", b"tokens=5,5,5", b"stop=", b"=", b"seed=1e9", b"id=")
    junk += [b" ".join(source.choices(words, k=source.randrange(1, 6))) + b" max_new_tokens=1" for _ in range(200)]
    replies = converse(bundle, *junk, "info")
    assert replies[-1]["event"] == "info"


def test_an_id_that_is_being_answered_cannot_be_used_again(bundle: Path) -> None:
    replies = converse(bundle, *["generate id=1 tokens=5 stop="] * 2)
    errors = [reply["message"] for reply in replies if reply["event"] == "error"]
    assert errors in (["Request 1 is still being answered."], [])  # [] when the first was faster than the reader


@pytest.mark.parametrize("chunk", [1, 2, CHUNK])
def test_chunks_of_any_size_say_the_same(bundle: Path, chunk: int) -> None:
    prompt = [3 * i % VOCAB for i in range(3 * CHUNK + 1)]
    line = f"generate id=1 tokens={','.join(map(str, prompt))} chunk={chunk} max_new_tokens=4 stop="
    replies = converse(bundle, line)
    assert tokens_of(replies, 1) == reference_tokens(prompt, 4)


def test_logits_of_every_step_are_appended_to_a_file(bundle: Path, tmp_path: Path) -> None:
    """One row per step, and each row's largest is the token that a greedy step chose."""
    file = tmp_path / "logits"
    prompt = [3 * i % VOCAB for i in range(2 * CHUNK)]
    line = f"generate id=%d tokens={','.join(map(str, prompt))} chunk=%d max_new_tokens=3 stop= logits={file}"
    replies = converse(bundle, line % (1, CHUNK), "close session=default", line % (2, 1))
    rows = np.fromfile(file, dtype=np.float32).reshape(-1, VOCAB)
    assert len(rows) == (2 + 2) + (2 * CHUNK + 2)
    first, second = rows[:4], rows[4:]
    assert first.argmax(-1).tolist()[1:] == tokens_of(replies, 1)
    assert second.argmax(-1).tolist()[-3:] == tokens_of(replies, 2)
    np.testing.assert_allclose(second[[CHUNK - 1, 2 * CHUNK - 1]], first[:2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("threads", [1, 3])
def test_the_number_of_threads_is_told(bundle: Path, threads: int) -> None:
    finished = run("--bundle", bundle, "--threads", str(threads), stdin=b"")
    assert json.loads(finished.stdout)["threads"] == threads
    alone = run(
        "--bundle", bundle, "--threads", str(threads), "--tokens", "2,5,9", "--max-new-tokens", "4", "--stop", ""
    )
    assert alone.stdout.split() == [b"%d" % token for token in reference_tokens((2, 5, 9), 4)]


def test_info_lists_the_sessions_and_close_frees_them(bundle: Path) -> None:
    replies = converse(
        bundle,
        "generate id=1 session=a tokens=2,5,9 max_new_tokens=2 stop=",
        "generate id=2 session=b tokens=4 max_new_tokens=1 stop=",
        "info",
        "close session=a",
        "info",
    )
    first, second = [reply for reply in replies if reply["event"] == "info"]
    assert (first["sessions"], first["session_tokens"]) == (["a", "b"], [4, 1])
    assert second["sessions"] == ["b"]
    assert {"event": "closed", "session": "a"} in replies


def start(bundle: Path, **pipes: Any) -> subprocess.Popen[bytes]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **pipes}
    return subprocess.Popen([native.find_runner(), "--bundle", bundle], env=native.runner_environment(), **pipes)


def test_cancel_reaches_waiting_requests_and_unknown_ids_are_ignored(bundle: Path) -> None:
    """The second request waits behind one that cannot end before the cancel has been read."""
    first = f"generate id=1 tokens={','.join(['5'] * (CONTEXT - CHUNK))} max_new_tokens=1 stop="
    replies = converse(bundle, "cancel id=77", first, "generate id=2 tokens=5 stop=", "cancel id=2")
    done = {reply["id"]: reply for reply in replies if reply["event"] == "done"}
    assert done[1]["finish_reason"] == "length"
    assert done[2]["finish_reason"] in ("cancelled", "context")
    assert all(reply["event"] != "error" for reply in replies)


def test_quit_ends_the_runner_with_status_0(bundle: Path) -> None:
    with start(bundle) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdout.readline()
        process.stdin.write(b"generate id=1 tokens=5 stop=\nquit\n")
        process.stdin.flush()
        assert process.wait(TIMEOUT_S) == 0


def test_a_closed_stdout_ends_the_runner_quietly(bundle: Path) -> None:
    reader, writer = os.pipe()
    with start(bundle, stdout=writer) as process:
        os.close(writer)
        os.close(reader)
        assert process.stdin is not None and process.stderr is not None
        process.stdin.write(b"generate id=1 tokens=5 stop=\n")
        process.stdin.close()
        assert process.wait(TIMEOUT_S) == 0
        assert process.stderr.read() == b""


def test_alone_it_prints_token_ids(bundle: Path) -> None:
    finished = run("--bundle", bundle, "--tokens", "2,5,9", "--max-new-tokens", "6", "--stop", "")
    assert finished.stdout == b" ".join(b"%d" % t for t in reference_tokens((2, 5, 9), 6)) + b"\n"
    assert (finished.returncode, finished.stderr) == (0, b"")


def test_alone_with_json_and_a_prompt_from_a_file(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt").write_text("2,5,9\n")
    sampling = ["--temperature", "0.7", "--top-k", "3", "--top-p", "0.9", "--min-p", "0.25", "--seed", "2"]
    options = ["--max-new-tokens", "6", "--stop", "", *sampling, "--json"]
    finished = run("--bundle", bundle, "--tokens-file", tmp_path / "prompt", *options)
    document = json.loads(finished.stdout)
    assert document["tokens"] == reference_tokens((2, 5, 9), 6, (0.7, 3, 0.9, 0.25, 2))
    assert document["finish_reason"] == "length" and document["prompt_tokens"] == 3
    assert run("--bundle", bundle, "--tokens-file", "-", *options, stdin=b"2,5,9\n").stdout.startswith(b'{"tokens":[')


def test_version_and_help_need_no_bundle() -> None:
    assert run("--version").stdout.decode() == f"g4-runner {__version__}\n"
    text = run("--help").stdout.decode()
    assert text.count("\n  g4-runner --bundle") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--bundle is missing."),
        (["--bundle"], "`--bundle` is not an option, or its value is missing."),
        (["--frobnicate"], "`--frobnicate` is not an option, or its value is missing."),
        (["--bundle", "x", "extra"], "`extra` is not an option."),
        (["--bundle", "x", "--threads", "0"], "--threads must be from 1 to 1024."),
        (["--bundle", "x", "--threads", "1025"], "--threads must be from 1 to 1024."),
        (["--bundle", "x", "--threads", "two"], "--threads is `two`, not a whole number."),
        (["--bundle", "x", "--tokens", "1,x"], "--tokens is `x`, not a whole number."),
        (["--bundle", "x", "--tokens-file", "/nonexistent"], "/nonexistent cannot be read."),
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str], message: str) -> None:
    finished = run(*arguments)
    assert (finished.returncode, finished.stdout) == (2, b"")
    assert finished.stderr.decode() == f"error: {message}\nhint: See g4-runner --help\n"


Edit = Callable[[Any], None]


def plan(program: Any, name: str) -> Any:
    return next(plan for plan in program.execution_plan if plan.name == name)


def remove_method(name: str) -> Edit:
    return lambda program: program.execution_plan.remove(plan(program, name))


def set_constant(name: str, value: int) -> Edit:
    def edit(program: Any) -> None:
        plan(program, name).values[plan(program, name).outputs[0]].val.int_val = value

    return edit


def resize_input(method: str, index: int, sizes: list[int]) -> Edit:
    def edit(program: Any) -> None:
        plan(program, method).values[plan(program, method).inputs[index]].val.sizes = sizes

    return edit


def drop_input(program: Any) -> None:
    plan(program, "decode").inputs.pop()


def drop_output(program: Any) -> None:
    plan(program, "prefill").outputs.pop()


def swap_outputs(program: Any) -> None:
    plan(program, "decode").outputs.reverse()


def change_input_type(program: Any) -> None:
    tensor = plan(program, "decode").values[plan(program, "decode").inputs[3]].val
    tensor.scalar_type = plan(program, "decode").values[plan(program, "decode").inputs[2]].val.scalar_type


def rename_operator(program: Any) -> None:
    for operator in plan(program, "decode").operators:
        operator.name = operator.name.replace("g4::cpu_attention", "g4::cpu_attention_of_tomorrow")


def rename_backend(name: str) -> Edit:
    def edit(program: Any) -> None:
        for delegate in plan(program, "prefill").delegates:
            delegate.id = name

    return edit


NOT_AS_AGREED = "model.pte does not follow method contract 1: "


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (set_constant("g4_contract_version", 2), NOT_AS_AGREED + "its version is 2."),
        (remove_method("g4_contract_version"), NOT_AS_AGREED + "it has no method `g4_contract_version`."),
        (remove_method("get_window"), NOT_AS_AGREED + "it has no method `get_window`."),
        (remove_method("get_eos_ids"), NOT_AS_AGREED + "it has no method `get_eos_ids`."),
        (remove_method("decode"), NOT_AS_AGREED + "it has no method `decode`."),
        (set_constant("get_max_prefill_chunk", 1),
         NOT_AS_AGREED + "`get_max_prefill_chunk` is 1, outside 2 ... 2147483647."),
        (set_constant("get_ring_slots", 8),
         NOT_AS_AGREED + "`get_ring_slots` is 8, too few for a window of 8 and chunks of 6."),
        (set_constant("get_vocab_size", 5), NOT_AS_AGREED + "`get_eos_ids` holds 6."),
        (set_constant("get_vocab_size", 65),
         NOT_AS_AGREED + "output 1 of `prefill` (logits) is f32 [1, 64] where f32 [1, 65] belongs."),
        (set_constant("get_max_prefill_chunk", 5),
         NOT_AS_AGREED + "input 0 of `prefill` (tokens) is i64 [1, 6] where i64 [1, 5] belongs."),
        (resize_input("decode", 2, [2]),
         NOT_AS_AGREED + "input 2 of `decode` (temperature) is f32 [2] where f32 [1] belongs."),
        (change_input_type, NOT_AS_AGREED + "input 3 of `decode` (top_k) is f32 [1] where i64 [1] belongs."),
        (drop_input, NOT_AS_AGREED + "`decode` has 6 inputs where 7 belong."),
        (drop_output, NOT_AS_AGREED + "`prefill` has 1 outputs where 2 belong."),
        (swap_outputs, NOT_AS_AGREED + "output 0 of `decode` (token) is f32 [1, 64] where i64 [1] belongs."),
        (rename_operator, "`decode` of model.pte cannot be loaded (OperatorMissing: "),
        (rename_backend("TeapotBackend"), "model.pte needs the backend TeapotBackend, which g4-runner does not know."),
        (rename_backend("CudaBackend"), "model.pte needs CudaBackend, whose library cannot be loaded: "),
    ],
)  # fmt: skip
def test_a_program_that_breaks_the_contract_is_refused_by_name(tmp_path: Path, edit: Edit, message: str) -> None:
    finished = run("--bundle", write_mini_bundle(tmp_path / "broken", edit))
    reply = json.loads(finished.stdout)
    assert finished.returncode == 1
    assert (reply["event"], reply["id"]) == ("error", None)
    assert reply["message"].startswith(message)
    assert reply["hint"]


def test_methods_that_do_not_share_a_cache_are_refused(tmp_path: Path) -> None:
    """Without share_mutable_buffers both methods would run, each on a cache of its own, and every token be wrong."""

    def unshare(program: Any) -> None:
        plan(program, "prefill").non_const_buffer_sizes[2] += 64

    finished = run("--bundle", write_mini_bundle(tmp_path / "unshared", unshare), "--tokens", "1")
    assert finished.returncode == 1
    assert b"`prefill` and `decode` do not share a KV cache" in finished.stderr


def test_folders_that_are_no_bundles_are_refused(tmp_path: Path) -> None:
    for folder, message in (
        (tmp_path / "absent", "is not a folder."),
        (tmp_path, "is not a bundle: it has no model.pte."),
    ):
        finished = run("--bundle", folder, "--tokens", "1")
        assert (finished.returncode, finished.stdout) == (1, b"")
        assert re.fullmatch(rf"error: {folder} {re.escape(message)}\nhint: .+\n", finished.stderr.decode())


def damaged(bundle: Path, folder: Path, damage: Callable[[bytes], bytes]) -> subprocess.CompletedProcess[bytes]:
    folder.mkdir()
    (folder / "model.pte").write_bytes(damage((bundle / "model.pte").read_bytes()))
    return run("--bundle", folder, "--tokens", "1", "--max-new-tokens", "1")


@pytest.mark.parametrize("kept", [0, 1, 63, 64, 1000, 0.5, 0.99])
def test_a_truncated_program_is_refused_and_never_crashes(bundle: Path, tmp_path: Path, kept: float) -> None:
    finished = damaged(bundle, tmp_path / "cut", lambda data: data[: int(kept * len(data)) if kept < 1 else int(kept)])
    assert finished.returncode == 1
    assert finished.stderr.startswith(b"error: ")


def test_random_bytes_are_no_program(bundle: Path, tmp_path: Path) -> None:
    finished = damaged(bundle, tmp_path / "junk", lambda data: random.Random(1).randbytes(len(data)))
    assert finished.returncode == 1
    assert b"model.pte is not a valid ExecuTorch program" in finished.stderr


def test_a_damaged_weight_file_is_refused_by_name(bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(bundle, tmp_path / "weights")
    (tmp_path / "weights" / "model.ptd").write_bytes(b"not weights at all" * 10)
    finished = run("--bundle", tmp_path / "weights", "--tokens", "1")
    assert finished.returncode == 1
    assert b"model.ptd is not a valid weight file" in finished.stderr
