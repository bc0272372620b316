"""The studio's page, and its place beside the API: at /studio, with / leading there."""

import asyncio
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI
from fastapi.responses import PlainTextResponse, RedirectResponse, Response
from pydantic import BaseModel
from starlette.datastructures import Headers
from starlette.routing import Mount
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lorasmith.errors import SettingsError
from lorasmith.serve.keys import Keys
from lorasmith.serve.service import Service
from lorasmith.serve.studio.chat import build_chat, model_names
from lorasmith.serve.studio.data import build_data
from lorasmith.serve.studio.form import ReadSettings
from lorasmith.serve.studio.places import Places
from lorasmith.serve.studio.runs import build_runs
from lorasmith.serve.studio.train import build_train

PATH = "/studio"
_FONTS = ("system-ui", "sans-serif")
_MONO_FONTS = ("ui-monospace", "monospace")
_MAX_UPLOAD = "512mb"
_KEPT_SECONDS = 24 * 3600  # of what Gradio copies for a download or an upload
# The browser itself refuses whatever would leave this server: a picture in an answer, a font, a script.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; media-src 'self' blob:; worker-src 'self' blob:; "
    "frame-src 'self'; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)


def mount_studio(
    app: FastAPI,
    places: Places,
    service: Service,
    *,
    bases: Sequence[str],
    run_file: type[BaseModel],
    read_settings: ReadSettings,
    keys: Keys | None = None,
) -> None:
    """Add the studio to ``app``. Its routes are all below /studio, so that the API's answers stay as they are.

    ``run_file`` is the class of run files and ``read_settings`` what makes one of ``section.key=value`` words.
    With ``keys`` the page asks for one of them first.

    Raises:
        SettingsError: other machines reach the server and there are no keys: the page starts processes.
    """
    if not service.settings.is_local and not keys:
        raise SettingsError(
            f"With --host {service.settings.host} other machines reach the studio, which starts processes on this one. "
            "Give the server API keys (--api-key-file FILE), or leave --studio out."
        )
    # Read by Gradio when a part is made: what it copies lies with the uploads and not where all of /tmp is.
    os.environ["GRADIO_TEMP_DIR"] = str(places.uploads.resolve() / ".gradio")

    async def mount() -> None:
        blocks = build_page(places, service, bases=bases, run_file=run_file, read_settings=read_settings)
        _mount(app, blocks, keys)

    # In a loop, because outside of one Gradio makes some of its own and closes none; the caller may be in one.
    with ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, mount()).result()
    app.add_middleware(_StayHere)


def _mount(app: FastAPI, blocks: gr.Blocks, keys: Keys | None) -> None:
    @app.get("/", include_in_schema=False)
    def lead_to_studio() -> RedirectResponse:
        return RedirectResponse(f"{PATH}/")

    @app.get("/favicon.ico", include_in_schema=False)
    def have_no_icon() -> Response:  # browsers ask for one whatever the page says
        return Response(status_code=204)

    gr.mount_gradio_app(
        app,
        blocks,
        path=PATH,
        footer_links=[],
        run_history=False,
        auth=(lambda name, key: keys.admit(f"Bearer {key}")) if keys else None,
        auth_message="Any name, and an API key of this server as the password.",
        show_error=False,
        max_file_size=_MAX_UPLOAD,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        theme=_theme(),
        css_paths=Path(__file__).with_name("style.css"),
    )
    [studio] = [route.app for route in app.routes if isinstance(route, Mount) and route.path == PATH]
    app.state.before_stop.append(studio.stop_event.set)  # type: ignore[attr-defined]  # or an open page holds the server


def build_page(
    places: Places,
    service: Service,
    *,
    bases: Sequence[str],
    run_file: type[BaseModel],
    read_settings: ReadSettings,
) -> gr.Blocks:
    """Return the page with its four tabs."""
    with gr.Blocks(title="lorasmith", analytics_enabled=False, delete_cache=(3600, _KEPT_SECONDS)) as page:
        gr.Markdown("# lorasmith")
        with gr.Tabs():
            with gr.Tab("Chat", id="chat") as chat_tab:
                models = build_chat(service)
            with gr.Tab("Data", id="data"):
                file = build_data(places, bases, run_file, read_settings)
            with gr.Tab("Train", id="train") as train_tab:
                train_parts, refresh_train = build_train(places, bases, run_file, read_settings)
            with gr.Tab("Runs", id="runs") as runs_tab:
                runs_parts, refresh_runs = build_runs(places, service)

        def refresh_models(chosen: list[str]) -> Any:
            names = model_names(service)
            kept = [name for name in chosen or () if name in names]
            return gr.CheckboxGroup(names, value=kept or names[:2])

        gr.on([page.load, chat_tab.select], refresh_models, models, models, api_visibility="private")
        page.load(lambda: gr.Dropdown(places.list_uploads()), None, file, api_visibility="private")
        gr.on([page.load, train_tab.select], refresh_train, None, train_parts, api_visibility="private")
        gr.on([page.load, runs_tab.select], refresh_runs, None, runs_parts, api_visibility="private")
    return page


def _theme() -> gr.themes.Base:
    """Return Gradio's theme in fonts that every system has, and with small print dark enough to be read."""
    theme = gr.themes.Default(primary_hue="blue", font=_FONTS, font_mono=_MONO_FONTS)
    quiet = {"light": "*neutral_600", "dark": "*neutral_300"}
    return theme.set(
        body_text_color_subdued=quiet["light"],
        body_text_color_subdued_dark=quiet["dark"],
        block_info_text_color=quiet["light"],
        block_info_text_color_dark=quiet["dark"],
        input_placeholder_color=quiet["light"],
        input_placeholder_color_dark=quiet["dark"],
    )


class _StayHere:
    """Below /studio: send the policy that keeps the browser here, and refuse what another site's page sends.

    Without the latter any page in this machine's browser could start a training.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {
                    **message,
                    "headers": [*message["headers"], (b"content-security-policy", _POLICY.encode())],
                }
            await send(message)

        if scope["type"] != "http" or not scope["path"].startswith(PATH):
            await self._app(scope, receive, send)
        elif _is_foreign(Headers(scope=scope)):
            refusal = PlainTextResponse("Only the studio's own page may send this.", status_code=403)
            await refusal(scope, receive, send)
        else:
            await self._app(scope, receive, send_with_policy)


def _is_foreign(headers: Headers) -> bool:
    """Say whether a browser names another origin than this server; programs name none."""
    origin = headers.get("origin")
    return origin is not None and origin.partition("://")[2] != headers.get("host")
