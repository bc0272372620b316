"""Many clients, four adapters, one base: lorasmith serve side by side with one answer after the other.

    python bench/serve_cpu.py --json serve.json                     1, 4, 16 and 64 clients, 4 requests a client
    python bench/serve_cpu.py --clients 1 16 --requests 2           a shorter look
    python bench/serve_cpu.py --dtype bfloat16                      for a CPU that multiplies it

    contender           what
    lorasmith           lorasmith serve, all requests in one batch, each with its adapter
    one-by-one          transformers.generate, PEFT's adapter switched for each request, a lock around it
    lorasmith-base      lorasmith serve, the base alone
    transformers-base   transformers serve, the base alone: it knows no adapters

Every client asks again as soon as it is answered. The adapters are random, small enough that the model still
speaks, and in float32 both adapter contenders must give the same greedy answers, or nothing is reported. In
bfloat16, where a batch rounds otherwise than one row, it is only told how many are the same.
"""

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from side_by_side.clients import Asked, Wanted, ask_all
from side_by_side.report import print_table, tell, write_report
from side_by_side.rows import read_rows

HERE = Path(__file__).parent
HANDBOOK = HERE.parent / "examples" / "handbook" / "handbook_train.json"
CONTENDERS = ("lorasmith", "one-by-one", "lorasmith-base", "transformers-base")
ADAPTERS = ("one", "two", "three", "four")
START_SECONDS = 180
BLANK = " \n\t\ufffd"


class CannotStartError(RuntimeError):
    """A contender does not come up on this machine; the text has its last words."""


def main() -> None:
    options = parse_arguments()
    questions = [row["instruction"] for row in read_rows(options.data)]
    with tempfile.TemporaryDirectory(prefix="lorasmith-bench-") as folder:
        base = resolve_base(options.base)
        adapters = make_adapters(Path(folder), base)
        results: dict[str, Any] = {}
        answers: dict[str, dict[int, list[Asked]]] = {}
        for contender in options.only:
            try:
                with start(contender, base, adapters, options, Path(folder)) as (url, models):
                    answers[contender] = {}
                    warm = [Wanted(model, "Say hello.") for model in models]
                    ask_all(url, warm, num_clients=1, max_tokens=4)
                    for clients in options.clients:
                        wanted = plan(models, questions, clients, options.requests)
                        seconds, asked = ask_all(
                            url, wanted, num_clients=clients, max_tokens=options.max_tokens
                        )
                        answers[contender][clients] = asked
                        results[f"{contender} {clients}"] = summarise(contender, clients, seconds, asked)
                        tell(f"  {contender}, {clients} clients: {results[f'{contender} {clients}']}")
            except CannotStartError as fault:
                tell(f"  {contender} is left out: {fault}")
                results[f"{contender} skipped"] = {"contender": contender, "skipped": str(fault)}
    check_equal(answers, options.dtype)
    measured = [result for result in results.values() if "clients" in result]
    print_table(
        ["contender", "clients", "tokens/s", "first token: median", "95%", "answer: median"],
        [
            [
                result["contender"],
                result["clients"],
                f"{result['tokens_per_second']:.1f}",
                f"{result['first_seconds']:.2f} s",
                f"{result['first_seconds_95']:.2f} s",
                f"{result['answer_seconds']:.2f} s",
            ]
            for result in sorted(measured, key=lambda r: (r["clients"], CONTENDERS.index(r["contender"])))
        ],
    )
    if options.json:
        write_report(options.json, {"settings": describe(options), "results": list(results.values())})


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", default="smollm2-135m", help="base model (default: the built-in one)")
    parser.add_argument("--data", type=Path, default=HANDBOOK, help="Alpaca rows whose questions are asked")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--requests", type=int, default=4, help="requests a client")
    parser.add_argument("--max-tokens", type=int, default=48, help="longest answer")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of each contender")
    parser.add_argument("--json", type=Path, help="write everything that was measured")
    return parser.parse_args()


def describe(options: argparse.Namespace) -> dict[str, Any]:
    names = ("base", "clients", "requests", "max_tokens", "dtype", "threads")
    return {**{name: getattr(options, name) for name in names}, "data": options.data.name}


def resolve_base(name: str) -> str:
    from lorasmith.model.base import resolve_base
    from lorasmith.model.settings import BaseSettings

    return str(resolve_base(BaseSettings(model=name), tell=tell).folder)


def make_adapters(folder: Path, base: str) -> dict[str, Path]:
    """Write four random rank-16 adapters on every linear layer."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    made = {}
    for seed, name in enumerate(ADAPTERS):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        adapted = get_peft_model(
            model, LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
        )
        with torch.no_grad():
            for key, parameter in adapted.named_parameters():
                if "lora_B" in key:
                    parameter.normal_(0, 0.004)
        adapted.save_pretrained(folder / name)
        made[name] = folder / name
    return made


def plan(models: Sequence[str], questions: Sequence[str], clients: int, requests: int) -> list[Wanted]:
    """Return the requests, neighbours with different models and questions; more clients ask other questions."""
    return [
        Wanted(models[i % len(models)], questions[(clients + i) % len(questions)])
        for i in range(clients * requests)
    ]


@contextmanager
def start(
    contender: str, base: str, adapters: dict[str, Path], options: argparse.Namespace, folder: Path
) -> Iterator[tuple[str, list[str]]]:
    """Run a contender as a process of its own; give its URL and the models to ask.

    Raises:
        CannotStartError: it does not listen within three minutes, or ends.
    """
    port, dtype = free_port(), options.dtype
    named = [f"{name}={path}" for name, path in adapters.items()]
    runs = [word for name in named for word in ("--run", name)]
    common = ["--base", base, "--base-name", "base", "--port", str(port), "--dtype", dtype, "--device", "cpu"]
    serve = [sys.executable, "-c", "from lorasmith.cli.main import main; main()", "serve", *common]
    command = {
        "lorasmith": [*serve, *runs],
        "lorasmith-base": serve,
        "one-by-one": [
            sys.executable,
            str(HERE / "contenders" / "serve_one_by_one.py"),
            *(str(port), base, dtype, str(options.threads), *named),
        ],
        "transformers-base": [
            *(sys.executable, "-m", "transformers.cli.transformers", "serve", base, "--port", str(port)),
            *("--host", "127.0.0.1", "--dtype", dtype, "--device", "cpu"),
        ],
    }[contender]
    models = list(adapters) if contender in ("lorasmith", "one-by-one") else ["base"]
    if contender == "transformers-base":
        models = [base]
    log = folder / f"{contender}.log"
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    try:
        wait_until_listening(process, port, log)
        yield f"http://127.0.0.1:{port}/v1", models
    finally:
        process.terminate()
        process.wait()


def wait_until_listening(process: subprocess.Popen, port: int, log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            raise CannotStartError(lines[-1][:300] if lines else "it printed nothing")
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
            return
        except urllib.error.HTTPError:
            return  # it listens, and has no /health
        except OSError:
            time.sleep(0.2)
    raise CannotStartError(f"it does not listen after {START_SECONDS} s")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


def summarise(contender: str, clients: int, seconds: float, asked: Sequence[Asked]) -> dict[str, Any]:
    firsts = [one.first for one in asked]
    tokens = sum(one.tokens for one in asked)
    return {
        "contender": contender,
        "clients": clients,
        "requests": len(asked),
        "tokens": tokens,
        "seconds": round(seconds, 3),
        "tokens_per_second": round(tokens / seconds, 2),
        "first_seconds": round(median(firsts), 3),
        "first_seconds_95": round(quantiles(firsts, n=20)[-1] if len(firsts) > 1 else firsts[0], 3),
        "answer_seconds": round(median(one.last for one in asked), 3),
    }


def check_equal(answers: dict[str, dict[int, list[Asked]]], dtype: str) -> None:
    """Tell how many answers the adapter contenders share, white space and half characters at the ends left out.

    In float32 stop unless it is all of them.
    """
    ours, theirs = answers.get("lorasmith"), answers.get("one-by-one")
    if not ours or not theirs:
        return
    pairs = [
        (one.text.strip(BLANK), other.text.strip(BLANK))
        for clients in ours
        for one, other in zip(ours[clients], theirs[clients], strict=True)
    ]
    parted = [pair for pair in pairs if pair[0] != pair[1]]
    tell(f"  {len(pairs) - len(parted)} of {len(pairs)} answers are the same")
    # Two likeliest tokens can lie closer than float32 rounds; more than a few such are no accident.
    if dtype == "float32" and len(parted) > max(1, len(pairs) // 50):
        sys.exit(f"Nothing is reported: {len(parted)} of {len(pairs)} answers differ, such as {parted[0]}")


if __name__ == "__main__":
    main()
