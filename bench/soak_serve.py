"""Random clients that come, go and change their minds, for as long as you like: is a request lost, does memory grow?

    python bench/soak_serve.py --minutes 30 --json soak.json
    python bench/soak_serve.py --minutes 1

Against a lorasmith serve of its own with four random adapters. Each client, again and again: a question of random
length to a random model, greedy or sampled, streamed or whole; a tenth ask for JSON of a schema; a fifth leave in the
middle; adapters are unloaded and loaded meanwhile; the queue is short, so that some are told to come again (429).
Every request must end as one of: answered, left by its client, told to come again, or its adapter just unloaded
(404). Anything else is lost, and the program ends with 1. Memory is what the server holds for itself, every
second: its resident set less the pages of files, which the system takes back when it needs them.
"""

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from statistics import mean

import httpx2
import psutil

from serve_cpu import HANDBOOK, free_port, make_adapters, resolve_base, wait_until_listening
from side_by_side.report import gib, print_table, tell, write_report
from side_by_side.rows import read_rows

SCHEMA = {
    "type": "object",
    "properties": {"sure": {"type": "boolean"}, "kind": {"enum": ["fact", "guess"]}},
    "required": ["sure", "kind"],
    "additionalProperties": False,
}
GROWTH = 0.05  # share by which the last third's memory may lie above the middle third's
FILLED_MINUTES = 10  # until then the kept beginnings still fill up: growth is told and not judged


def main() -> None:
    options = parse_arguments()
    questions = [row["instruction"] for row in read_rows(HANDBOOK)]
    with tempfile.TemporaryDirectory(prefix="lorasmith-soak-") as folder:
        base = resolve_base(options.base)
        adapters = make_adapters(Path(folder), base)
        port, log = free_port(), Path(folder) / "serve.log"
        command = [sys.executable, "-c", "from lorasmith.cli.main import main; main()", "serve"]
        command += ["--base", base, "--base-name", "base", "--port", str(port), "--max-waiting", "8"]
        command += ["--adapter-folder", folder, "--dtype", "float32", "--device", "cpu"]
        command += [word for name, path in adapters.items() for word in ("--run", f"{name}={path}")]
        with log.open("w") as output:
            server = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            wait_until_listening(server, port, log)
            url = f"http://127.0.0.1:{port}"
            soak = Soak(url, adapters, questions, options)
            memory = asyncio.run(soak.run(psutil.Process(server.pid)))
            gauges = httpx2.get(f"{url}/metrics").text
        finally:
            server.terminate()
            server.wait()
    report(options, soak, memory, gauges)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


class Soak:
    """The clients and what became of their requests."""

    def __init__(
        self, url: str, adapters: dict[str, Path], questions: list[str], options: argparse.Namespace
    ) -> None:
        self.url, self.adapters, self.questions, self.options = url, adapters, questions, options
        self.became: Counter[str] = Counter()
        self.faults: list[str] = []

    async def run(self, server: psutil.Process) -> list[tuple[float, int]]:
        """Return the server's memory over time, once the last request has ended."""
        end = time.monotonic() + 60 * self.options.minutes
        memory: list[tuple[float, int]] = []
        clients = [
            asyncio.create_task(self._be_a_client(random.Random(f"{self.options.seed} {number}"), end))
            for number in range(self.options.clients)
        ]
        changer = asyncio.create_task(self._change_adapters(random.Random(self.options.seed), end))
        start = time.monotonic()
        while time.monotonic() < end:
            held = server.memory_info()
            memory.append((round(time.monotonic() - start, 1), held.rss - held.shared))
            await asyncio.sleep(1)
        await asyncio.gather(*clients, changer)
        await asyncio.sleep(2)  # cancelled rows leave before the next token
        return memory

    async def _be_a_client(self, dice: random.Random, end: float) -> None:
        async with httpx2.AsyncClient(timeout=600) as client:
            while time.monotonic() < end:
                became = await self._ask(client, dice)
                self.became[became] += 1
                await asyncio.sleep(1 if became == "told to come again" else dice.expovariate(2))

    async def _ask(self, client: httpx2.AsyncClient, dice: random.Random) -> str:
        wants_json, leaves, streams = dice.random() < 0.1, dice.random() < 0.2, dice.random() < 0.7
        body = {
            "model": dice.choice([*self.adapters, "base"]),
            "messages": [
                {
                    "role": "user",
                    "content": " ".join(dice.choices(self.questions, k=dice.choice([1, 1, 1, 8]))),
                }
            ],
            "max_tokens": dice.choice([4, 16, 48]),
            "temperature": dice.choice([0, 0.8]),
            "stream": streams,
        }
        if wants_json:
            body["response_format"] = {"type": "json_schema", "json_schema": {"name": "v", "schema": SCHEMA}}
            body["max_tokens"] = 48
        timeout = dice.uniform(0.2, 6) if leaves else 600
        try:
            async with asyncio.timeout(timeout):
                async with client.stream("POST", f"{self.url}/v1/chat/completions", json=body) as reply:
                    text = (await reply.aread()).decode()
        except TimeoutError:
            return "left by its client"
        except httpx2.HTTPError as fault:
            return self._lose(f"{type(fault).__name__}: {fault}")
        if reply.status_code == 429:
            int(reply.headers["Retry-After"])
            return "told to come again"
        if reply.status_code == 404 and body["model"] != "base":
            return "its adapter was unloaded"
        if reply.status_code != 200:
            return self._lose(f"{reply.status_code}: {text[:200]}")
        return self._judge(text, streams, wants_json)

    def _judge(self, text: str, streams: bool, wants_json: bool) -> str:
        if streams:
            events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
            if not events or events[-1] != "[DONE]":
                return self._lose(f"a stream without its end: {text[-200:]}")
            choices = [choice for event in events[:-1] for choice in json.loads(event).get("choices", ())]
            answer = "".join(choice["delta"].get("content") or "" for choice in choices)
            reason = choices[-1]["finish_reason"] if choices else None
        else:
            choice = json.loads(text)["choices"][0]
            answer, reason = choice["message"]["content"], choice["finish_reason"]
        if reason not in ("stop", "length"):
            return self._lose(f"an answer without a reason to end: {text[-200:]}")
        if wants_json and (reason != "stop" or json.loads(answer).keys() != {"sure", "kind"}):
            return self._lose(f"an answer that is not of its schema: {answer}")
        return "answered, of a schema" if wants_json else "answered"

    def _lose(self, why: str) -> str:
        self.faults.append(why)
        return "lost"

    async def _change_adapters(self, dice: random.Random, end: float) -> None:
        async with httpx2.AsyncClient(timeout=60) as client:
            while time.monotonic() < end:
                await asyncio.sleep(dice.uniform(2, 6))
                name = dice.choice(list(self.adapters))
                for what, values in (
                    ("unload", {"lora_name": name}),
                    ("load", {"lora_name": name, "lora_path": str(self.adapters[name])}),
                ):
                    try:
                        reply = await client.post(f"{self.url}/v1/{what}_lora_adapter", json=values)
                    except httpx2.HTTPError as fault:
                        self._lose(f"{what}: {type(fault).__name__}: {fault}")
                        continue
                    if reply.status_code != 200:
                        self._lose(f"{what}: {reply.status_code} {reply.text[:200]}")
                    self.became[f"adapter: {what}"] += 1


def report(options: argparse.Namespace, soak: Soak, memory: list[tuple[float, int]], gauges: str) -> None:
    thirds = [memory[len(memory) * i // 3 : len(memory) * (i + 1) // 3] for i in range(3)]
    means = [mean(size for _, size in third) for third in thirds]
    growth = means[2] / means[1] - 1
    running = [line for line in gauges.splitlines() if line.startswith("lorasmith_rows_")]
    print_table(["what became of it", "requests"], sorted(soak.became.items()))
    print(
        f"memory, by thirds of the time: {', '.join(gib(size) for size in means)}; {growth:+.1%} from second to third"
    )
    print(f"afterwards: {'; '.join(running)}")
    for fault in soak.faults[:10]:
        tell(f"  lost: {fault}")
    if options.json:
        content = {
            "settings": {"minutes": options.minutes, "clients": options.clients, "seed": options.seed},
            "became": dict(soak.became),
            "lost": soak.faults,
            "memory": memory,
            "growth": growth,
            "afterwards": running,
        }
        write_report(options.json, content)
    is_idle = all(line.endswith(" 0.0") for line in running)
    grew = growth > GROWTH and options.minutes >= FILLED_MINUTES
    if soak.faults or grew or not is_idle:
        sys.exit("Not passed: a request was lost, memory grew, or rows were left over.")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
