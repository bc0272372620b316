"""Clients of an OpenAI-compatible server: they ask again as soon as they are answered, and keep the time."""

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass

import httpx2


@dataclass(frozen=True)
class Asked:
    """What one request got: ``first`` and ``last`` are seconds from sending it to its first and last text."""

    text: str
    tokens: int
    first: float
    last: float


@dataclass(frozen=True)
class Wanted:
    """One request: the question and who is asked."""

    model: str
    question: str


async def ask(client: httpx2.AsyncClient, url: str, wanted: Wanted, max_tokens: int) -> Asked:
    """Send one streamed, greedy request and read its answer to the end."""
    body = {
        "model": wanted.model,
        "messages": [{"role": "user", "content": wanted.question}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    start = time.perf_counter()
    first, text, tokens = None, "", 0
    async with client.stream("POST", f"{url}/chat/completions", json=body) as reply:
        if reply.status_code != 200:
            raise RuntimeError(f"{reply.status_code}: {(await reply.aread()).decode()[:300]}")
        async for line in reply.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                raise RuntimeError(str(chunk["error"]))
            for choice in chunk.get("choices", ()):
                piece = (choice.get("delta") or {}).get("content")
                if piece:
                    first = first if first is not None else time.perf_counter() - start
                    text += piece
            tokens = (chunk.get("usage") or {}).get("completion_tokens") or tokens
    last = time.perf_counter() - start
    return Asked(text, tokens, last if first is None else first, last)


def ask_all(
    url: str, wanted: Sequence[Wanted], *, num_clients: int, max_tokens: int
) -> tuple[float, list[Asked]]:
    """Return the wall seconds, and what every request got, in the order given; ``num_clients`` ask at once."""

    async def run() -> tuple[float, list[Asked]]:
        results: dict[int, Asked] = {}
        places = iter(range(len(wanted)))
        limits = httpx2.Limits(max_connections=num_clients)
        async with httpx2.AsyncClient(timeout=1800, limits=limits) as client:

            async def be_a_client() -> None:
                for place in places:
                    results[place] = await ask(client, url, wanted[place], max_tokens)

            start = time.perf_counter()
            await asyncio.gather(*(be_a_client() for _ in range(num_clients)))
            seconds = time.perf_counter() - start
        return seconds, [results[place] for place in range(len(wanted))]

    return asyncio.run(run())
