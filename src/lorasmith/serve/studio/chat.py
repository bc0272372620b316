"""The tab Chat: one question to the base and up to three adapters, the answers growing side by side."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import gradio as gr
from markupsafe import Markup

from lorasmith.data.example import Message
from lorasmith.errors import LorasmithError
from lorasmith.generation.sampling import SamplingSettings, parse_sampling
from lorasmith.serve.service import Service
from lorasmith.serve.studio.form import make_input
from lorasmith.serve.studio.pieces import fault, note

MAX_SIDE_BY_SIDE = 4
_BETWEEN_SECONDS = 0.05  # between two looks of the page at its answers
Talks = dict[str, list[Message]]  # by model


def build_chat(service: Service) -> gr.CheckboxGroup:
    """Add the tab's contents to the page that is being built; return the choice of models, to be refreshed."""
    talks = gr.State({})
    names = model_names(service)
    models = gr.CheckboxGroup(
        names,
        value=names[:2],
        label="Ask",
        info=f"The base and its adapters, at most {MAX_SIDE_BY_SIDE} at once.",
        elem_id="chat-models",
    )
    answers = gr.HTML(_show({}, []), elem_id="chat-answers")
    question = gr.Textbox(
        label="Question",
        max_lines=8,
        placeholder="Enter asks, Shift+Enter begins a line",
        elem_id="chat-question",
    )
    with gr.Row(elem_classes="buttons"):
        ask = gr.Button("Ask", variant="primary", elem_id="chat-ask")
        stop = gr.Button("Stop", elem_id="chat-stop")
        clear = gr.Button("New conversation", elem_id="chat-clear")
    with gr.Accordion("How it answers", open=False), gr.Row(elem_classes="settings"):
        inputs = [make_input(key, field) for key, field in SamplingSettings.model_fields.items()]

    under_way: dict[str | None, _Round] = {}  # by session: a page asks one question at a time

    async def answer(
        request: gr.Request, asked: str, chosen: list[str], talks: Talks, *settings: Any
    ) -> AsyncIterator[tuple[str, str, Talks]]:
        try:
            sampling = _read_sampling(settings)
            _check(asked, chosen, model_names(service))
        except LorasmithError as error:
            yield asked, fault(error), talks
            return
        others = {name: talk for name, talk in talks.items() if name not in chosen}
        talks = {name: [*talks.get(name, ()), Message("user", asked)] for name in chosen}
        now = under_way[request.session_hash] = _Round()
        try:
            async for texts, faults in _answer_all(service, talks, sampling, now):
                so_far = {**others, **_with_answers(talks, texts, faults)}
                yield "", _show(talks, chosen, texts, faults), so_far
            if now.is_forgotten:
                yield "", _show({}, chosen), {}
        finally:
            del under_way[request.session_hash]

    # Not by Gradio's ``cancels``: it shows a cancelled event as an error, and what was on its way comes after.
    async def end(request: gr.Request) -> None:
        if now := under_way.get(request.session_hash):
            now.stop()

    async def forget(request: gr.Request, chosen: list[str]) -> tuple[str, str, Talks]:
        if now := under_way.get(request.session_hash):
            now.is_forgotten = True
            now.stop()
        return "", _show({}, chosen), {}

    quietly: Any = {"show_progress": "hidden", "concurrency_limit": None, "api_visibility": "private"}
    shown = [question, answers, talks]
    gr.on([ask.click, question.submit], answer, [question, models, talks, *inputs], shown, **quietly)
    stop.click(end, **quietly)
    clear.click(forget, models, shown, **quietly)
    return models


class _Round:
    """One question on its way to the models: ``news`` is set when there is something to show."""

    def __init__(self) -> None:
        self.news = asyncio.Event()
        self.is_stopped = False
        self.is_forgotten = False

    def stop(self) -> None:
        self.is_stopped = True
        self.news.set()


def model_names(service: Service) -> list[str]:
    """Return what can be asked: the base first, then its adapters."""
    *adapters, base = [model.name for model in service.models.list()]
    return [base, *adapters]


def _read_sampling(values: Sequence[Any]) -> SamplingSettings:
    given = dict(zip(SamplingSettings.model_fields, values, strict=True))
    given["stop"] = tuple(line for line in str(given["stop"] or "").split("\n") if line)
    given["seed"] = given["seed"] or None  # a text field: nothing in it means none
    return parse_sampling(**given)


def _check(asked: str, chosen: Sequence[str], names: Sequence[str]) -> None:
    gone = [name for name in chosen if name not in names]
    if gone:
        raise LorasmithError(f"{', '.join(gone)}: not served any more. There are: {', '.join(names)}.")
    if not 1 <= len(chosen) <= MAX_SIDE_BY_SIDE:
        raise LorasmithError(f"{len(chosen)} models are chosen. Choose one to {MAX_SIDE_BY_SIDE} above.")
    if not asked.strip():
        raise LorasmithError("The question is empty. Ask something.")


async def _answer_all(
    service: Service, talks: Talks, sampling: SamplingSettings, now: _Round
) -> AsyncIterator[tuple[dict[str, str], dict[str, str]]]:
    """Ask every model at once; yield (texts so far, faults) by model, several pieces at a time where they come fast."""
    texts, faults = dict.fromkeys(talks, ""), {}

    async def follow(name: str) -> None:
        try:
            async for piece in _stream(service, name, talks[name], sampling):
                texts[name] += piece
                now.news.set()
        except LorasmithError as error:
            faults[name] = str(error)

    tasks = [asyncio.create_task(follow(name)) for name in talks]
    for task in tasks:
        task.add_done_callback(lambda _: now.news.set())
    try:
        while not now.is_stopped and not all(task.done() for task in tasks):
            await now.news.wait()
            now.news.clear()
            yield dict(texts), dict(faults)
            await asyncio.sleep(_BETWEEN_SECONDS)
        for task in tasks:
            if task.done():
                task.result()  # a fault that is ours and no LorasmithError
        yield dict(texts), dict(faults)
    finally:  # also when the page was closed
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _stream(
    service: Service, name: str, messages: Sequence[Message], sampling: SamplingSettings
) -> AsyncIterator[str]:
    """Yield the answer's text piece by piece; closed early, the answer is given up."""
    model = service.find_model(name)
    longest = min(sampling.max_tokens, service.settings.max_answer_tokens)
    prompt = service.encode_messages(model, messages)
    answering = await service.ask(model, [prompt], sampling.model_copy(update={"max_tokens": longest}))
    try:
        async for _, delta in answering:
            yield delta.text
    finally:
        service.cancel(answering)


def _with_answers(talks: Talks, texts: dict[str, str], faults: dict[str, str]) -> Talks:
    """Return the conversations with what was answered so far; a question without an answer is taken back."""
    return {
        name: [*talk, Message("assistant", texts[name])] if texts[name] and name not in faults else talk[:-1]
        for name, talk in talks.items()
    }


def _show(
    talks: Talks,
    chosen: Sequence[str],
    texts: dict[str, str] | None = None,
    faults: dict[str, str] | None = None,
) -> str:
    if not talks:
        return note("Choose whom to ask, and ask. Each keeps a conversation of its own.")
    columns = []
    for name in chosen:
        turns = [
            Markup('<p class="turn {}">{}</p>').format(turn.role, turn.content.strip())
            for turn in talks[name]
        ]
        if faults and name in faults:
            turns.append(Markup('<p class="fault" role="alert">{}</p>').format(faults[name]))
        elif texts is not None:
            turns.append(Markup('<p class="turn assistant">{}</p>').format(texts[name].strip() or "…"))
        columns.append(
            Markup('<section class="talk" aria-label="{}"><h3>{}</h3>{}</section>').format(
                name, name, Markup("").join(turns)
            )
        )
    return Markup('<div class="talks" aria-live="polite">{}</div>').format(Markup("").join(columns))
