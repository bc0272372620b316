"""The routes: OpenAI's, vLLM's for adapters, /health and /metrics. A page may be mounted at /; see create_app."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from pydantic_core import from_json
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect

from lorasmith.errors import LorasmithError
from lorasmith.serve.faults import RequestError, error_body, read_fault
from lorasmith.serve.keys import Keys
from lorasmith.serve.log import write_line
from lorasmith.serve.models import find_allowed
from lorasmith.serve.replies import ChatReply, CompletionReply, Reply
from lorasmith.serve.scheduler import BusyError
from lorasmith.serve.schema import (
    ChatRequest,
    CompletionRequest,
    LoadAdapterRequest,
    UnloadAdapterRequest,
    list_models,
    model_card,
    read_request,
)
from lorasmith.serve.service import Answering, Service
from lorasmith.serve.settings import LOCAL_HOSTS

CLIENT_LEFT = 499  # nginx's number


def create_app(
    service: Service, *, keys: Keys | None = None, mount_page: Callable[[FastAPI], None] | None = None
) -> FastAPI:
    """Return the app over ``service``; when it shuts down, the service is closed.

    ``mount_page`` is called with the app once every route is there: what it mounts at / is reached by whatever
    is not /health, /metrics or below /v1. The service is ``app.state.service``. A page that keeps a stream open puts
    what ends it into ``app.state.before_stop``: the server waits for streams when it stops.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.close)

    # No pages of FastAPI's own: they load scripts from the network.
    app = FastAPI(
        title="lorasmith",
        lifespan=lifespan,
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
    )
    app.state.service = service
    app.state.before_stop = []
    if service.settings.is_local:
        # A page in this machine's browser must not reach us through a name of its own (DNS rebinding).
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*LOCAL_HOSTS, "[::1]"])
    app.add_exception_handler(LorasmithError, _answer_fault)
    app.add_exception_handler(HTTPException, _answer_http_fault)
    app.add_exception_handler(ClientDisconnect, _note_gone)
    app.add_exception_handler(Exception, _answer_defect)
    app.include_router(_open_routes(service))
    app.include_router(_routes(service), prefix="/v1", dependencies=[Depends(_key_check(keys or Keys()))])
    if mount_page is not None:
        mount_page(app)
    return app


def _open_routes(service: Service) -> APIRouter:
    routes = APIRouter()

    @routes.get("/health")
    async def health() -> Response:
        if not service.scheduler.is_alive:
            return JSONResponse({"status": "stopped"}, status_code=503)
        return JSONResponse({"status": "ok"})

    @routes.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(service.metrics.page(), media_type="text/plain; version=0.0.4")

    return routes


def _routes(service: Service) -> APIRouter:
    routes = APIRouter()

    @routes.get("/models")
    async def models() -> Response:
        return JSONResponse(list_models(service.models.list()))

    @routes.get("/models/{name:path}")
    async def model(name: str) -> Response:
        return JSONResponse(model_card(service.find_model(name)))

    @routes.post("/chat/completions")
    async def chat_completions(request: Request) -> Response:
        asked = read_request(ChatRequest, await _read_body(request, service))
        model = service.find_model(asked.model)
        messages = [message.to_message() for message in asked.messages]
        prompt = service.encode_messages(model, messages, override_system=asked.override_system)
        return await _answer(request, service, ChatReply(model, asked), [prompt])

    @routes.post("/completions")
    async def completions(request: Request) -> Response:
        asked = read_request(CompletionRequest, await _read_body(request, service))
        model = service.find_model(asked.model)
        prompts = service.encode_prompts(model, asked)
        return await _answer(request, service, CompletionReply(model, asked), prompts)

    @routes.post("/load_lora_adapter")
    async def load_lora_adapter(request: Request) -> Response:
        asked = read_request(LoadAdapterRequest, await _read_body(request, service))
        folder = find_allowed(Path(asked.lora_path), service.settings.adapter_folders)
        await asyncio.to_thread(service.load, asked.lora_name, folder, replaces=asked.load_inplace)
        write_line("adapter loaded", model=asked.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' added successfully.")

    @routes.post("/unload_lora_adapter")
    async def unload_lora_adapter(request: Request) -> Response:
        asked = read_request(UnloadAdapterRequest, await _read_body(request, service))
        service.unload(asked.lora_name)
        write_line("adapter unloaded", model=asked.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' removed successfully.")

    return routes


def _key_check(keys: Keys) -> Callable[[Request], None]:
    def check(request: Request) -> None:
        if not keys.admit(request.headers.get("Authorization")):
            raise RequestError(
                "The API key is missing or wrong. Send it as: Authorization: Bearer KEY",
                status=401,
                type="authentication_error",
                code="invalid_api_key",
            )

    return check


async def _read_body(request: Request, service: Service) -> Any:
    """Return the JSON of the body, which is read no further than its largest size.

    Only application/json is taken: a page in a browser cannot send that to another origin unasked.
    """
    kind = request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestError(f"The Content-Type is {kind!r:.60}; send application/json.", status=415)
    limit = service.settings.max_request_bytes
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise RequestError(
                f"The request is larger than {limit:,} bytes.", status=413, code="request_too_large"
            )
    try:
        # Refuses halves of characters too: no tokenizer takes them.
        return from_json(body, allow_inf_nan=False)
    except ValueError as fault:
        raise RequestError(f"The request is no JSON: {fault}") from None


async def _answer(request: Request, service: Service, reply: Reply, prompts: list[list[int]]) -> Response:
    """Ask, and answer as one JSON object or as a stream; what a client that left had asked is cancelled."""
    asked, settings = reply.asked, service.settings
    if asked.n > settings.max_choices or asked.n * len(prompts) > settings.max_waiting:
        raise RequestError(
            f"{asked.n} answers to each of {len(prompts)} prompts; this server gives at most {settings.max_choices} "
            f"to a prompt and {settings.max_waiting} to a request.",
            param="n",
        )
    answering = await service.ask(
        reply.model,
        prompts,
        asked.sampling(max_answer_tokens=settings.max_answer_tokens),
        num_choices=asked.n,
        num_top=asked.num_top,
        schema=asked.response_format.schema_of_answer(),
    )
    done = _Record(request, service, reply, answering)
    if asked.stream:
        return StreamingResponse(_stream(reply, answering, done), media_type="text/event-stream")
    with done:
        try:
            is_there = await _collect(request, reply, answering)
        except LorasmithError as fault:
            told = read_fault(fault)
            done.status = told.status
            return JSONResponse(error_body(told), status_code=told.status)
        if not is_there:
            done.status = CLIENT_LEFT
            return Response(status_code=CLIENT_LEFT)
        return JSONResponse(reply.whole(answering))


async def _collect(request: Request, reply: Reply, answering: Answering) -> bool:
    """Take all parts; False if the client left first."""

    async def take_all() -> None:
        async for index, delta in answering:
            reply.add(index, delta)

    async def wait_until_gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.create_task(take_all()), asyncio.create_task(wait_until_gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            tasks[0].result()
        return tasks[0].done()
    finally:
        for task in tasks:
            task.cancel()


async def _stream(reply: Reply, answering: Answering, done: "_Record") -> AsyncIterator[str]:
    """Yield server-sent events. A fault after the first one can only be told as an event of its own."""
    with done:
        try:
            for chunk in reply.opening():
                yield _event(chunk)
            async for index, delta in answering:
                reply.add(index, delta)
                yield _event(reply.part(index, delta))
            if reply.asked.includes_usage:
                yield _event(reply.closing(answering))
        except LorasmithError as fault:
            told = read_fault(fault)
            done.status = told.status
            yield _event(error_body(told))
        yield "data: [DONE]\n\n"


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


class _Record:
    """Around one request: cancels what is unfinished at its end, counts it, and writes its line into the log."""

    def __init__(self, request: Request, service: Service, reply: Reply, answering: Answering) -> None:
        self._request, self._service, self._reply, self._answering = request, service, reply, answering
        self.status = 200

    def __enter__(self) -> "_Record":
        return self

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, trace: object) -> None:
        service, reply, answering = self._service, self._reply, self._answering
        service.cancel(answering)
        if isinstance(fault, Exception):  # a defect of ours: that a client left is told by no Exception
            self.status = 500
            self._request.state.is_counted = True
        elif fault is not None:
            self.status = CLIENT_LEFT
        seconds = time.monotonic() - answering.started
        first = answering.first_part and answering.first_part - answering.started
        service.metrics.note_request(reply.model.name, self.status)
        service.metrics.note_times(first, seconds)
        write_line(
            "request",
            id=reply.id,
            model=reply.model.name,
            status=self.status,
            prompt_tokens=answering.prompt_tokens,
            cached_tokens=answering.cached_tokens,
            completion_tokens=answering.completion_tokens,
            first_seconds=first and round(first, 3),
            seconds=round(seconds, 3),
            **(reply.contents() if service.settings.log_contents else {}),
        )


async def _answer_fault(request: Request, fault: Exception) -> Response:
    assert isinstance(fault, LorasmithError)
    told = read_fault(fault)
    headers = {"Retry-After": str(fault.retry_seconds)} if isinstance(fault, BusyError) else {}
    if told.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    service: Service = request.app.state.service
    service.metrics.note_request("", told.status)
    write_line("refused", path=request.url.path, status=told.status, code=told.code)
    return JSONResponse(error_body(told), status_code=told.status, headers=headers)


async def _answer_http_fault(request: Request, fault: Exception) -> Response:
    assert isinstance(fault, HTTPException)
    told = RequestError(
        f"{request.method} {request.url.path}: {fault.detail}",
        status=fault.status_code,
        code="unknown_url" if fault.status_code == 404 else None,
    )
    return JSONResponse(error_body(told), status_code=told.status, headers=fault.headers)


async def _note_gone(request: Request, fault: Exception) -> Response:
    """Count a client that left before its request was read; nobody hears the answer."""
    service: Service = request.app.state.service
    service.metrics.note_request("", CLIENT_LEFT)
    return Response(status_code=CLIENT_LEFT)


async def _answer_defect(request: Request, fault: Exception) -> Response:
    """Answer for a defect of ours; uvicorn logs where it happened."""
    told = RequestError(
        "The server failed on this request; its log says where.", status=500, type="server_error"
    )
    if not getattr(request.state, "is_counted", False):  # by _Record, which knows the model
        service: Service = request.app.state.service
        service.metrics.note_request("", told.status)
    return JSONResponse(error_body(told), status_code=told.status)
