"""``lorasmith serve``: runs behind OpenAI's API, many adapters on one base."""

import os
import shlex
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lorasmith.cli import answering
from lorasmith.cli.answering import note
from lorasmith.cli.console import console
from lorasmith.cli.options import refuse_ignored
from lorasmith.cli.run_file import RunFile, load_run_file
from lorasmith.errors import MissingExtraError, SettingsError
from lorasmith.model.settings import BUILT_IN
from lorasmith.serve.settings import ServeSettings

if TYPE_CHECKING:
    from fastapi import FastAPI

    from lorasmith.serve.keys import Keys
    from lorasmith.serve.service import Service


def _option(name: str, *flags: str) -> Any:
    field = ServeSettings.model_fields[name]
    default = field.get_default()
    shown = "" if default in ((), False) else f" Default: {default}."
    return typer.Option(*flags, help=f"{field.description}{shown}")


def command(
    run: Annotated[
        list[str] | None,
        typer.Option(
            help="Run or adapter folder to serve, as its own name or NAME=FOLDER. May be given several times."
        ),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Base model; default: that of the first run. Also a merged folder.")
    ] = None,
    base_name: Annotated[str | None, typer.Option(help="What the base is called in requests.")] = None,
    host: Annotated[str | None, _option("host")] = None,
    port: Annotated[int | None, _option("port")] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(help="File with API keys, one a line; LORASMITH_API_KEYS holds more, by comma."),
    ] = None,
    without_keys: Annotated[
        bool,
        typer.Option(
            "--without-keys", help="Let everybody ask who reaches another address than this machine."
        ),
    ] = False,
    adapter_folder: Annotated[list[Path] | None, _option("adapter_folders", "--adapter-folder")] = None,
    override_system: Annotated[bool, _option("override_system", "--override-system")] = False,
    max_rows: Annotated[int | None, _option("max_rows")] = None,
    max_waiting: Annotated[int | None, _option("max_waiting")] = None,
    cache_tokens: Annotated[int | None, _option("cache_tokens")] = None,
    kept_tokens: Annotated[int | None, _option("kept_tokens")] = None,
    chunk_tokens: Annotated[int | None, _option("chunk_tokens")] = None,
    max_prompt_tokens: Annotated[int | None, _option("max_prompt_tokens")] = None,
    max_answer_tokens: Annotated[int | None, _option("max_answer_tokens")] = None,
    max_choices: Annotated[int | None, _option("max_choices")] = None,
    max_request_bytes: Annotated[int | None, _option("max_request_bytes")] = None,
    max_models: Annotated[int | None, _option("max_models")] = None,
    drain_seconds: Annotated[int | None, _option("drain_seconds")] = None,
    log_contents: Annotated[bool, _option("log_contents", "--log-contents")] = False,
    engine: Annotated[
        Literal["lorasmith", "vllm"],
        typer.Option(
            help="vllm: print the command that serves the same in vLLM, after checking that it can."
        ),
    ] = "lorasmith",
    execute: Annotated[
        bool, typer.Option("--exec", help="With --engine vllm: run the command, if vllm is on the path.")
    ] = False,
    studio: Annotated[
        bool,
        typer.Option("--studio", help="Also serve a page to chat, look at data, train and compare runs."),
    ] = False,
    runs_folder: Annotated[
        Path | None, typer.Option(help="With --studio: the folder that holds the runs. Default: runs.")
    ] = None,
    uploads_folder: Annotated[
        Path | None, typer.Option(help="With --studio: the folder for uploaded data. Default: uploads.")
    ] = None,
    device: answering.Device = "auto",
    dtype: answering.Dtype = "auto",
) -> None:
    """Serve runs behind OpenAI's API: /v1/chat/completions, /v1/completions, /v1/models.

    A request's model picks the run, or the untuned base; all share one batch. Each is asked by the recipe
    that it was trained with.
    """
    settings = parse_settings(
        host=host,
        port=port,
        adapter_folders=tuple(adapter_folder or ()),
        override_system=override_system,
        max_rows=max_rows,
        max_waiting=max_waiting,
        cache_tokens=cache_tokens,
        kept_tokens=kept_tokens,
        chunk_tokens=chunk_tokens,
        max_prompt_tokens=max_prompt_tokens,
        max_answer_tokens=max_answer_tokens,
        max_choices=max_choices,
        max_request_bytes=max_request_bytes,
        max_models=max_models,
        drain_seconds=drain_seconds,
        log_contents=log_contents,
    )
    _check_studio(engine, studio=studio, folders=(runs_folder, uploads_folder))
    if engine == "vllm":
        refuse_ignored(
            "--engine vllm", api_key_file=api_key_file, without_keys=without_keys, device=device, dtype=dtype
        )
        serve_with_vllm(run or (), settings, base=base, base_name=base_name, execute=execute)
        return
    if execute:
        raise SettingsError("--exec belongs to --engine vllm; lorasmith's own server always runs.")
    _need_extra(studio=studio)
    from lorasmith.serve.app import create_app
    from lorasmith.serve.keys import KEYS_VARIABLE, read_keys
    from lorasmith.serve.log import log_to_stderr
    from lorasmith.serve.models import name_runs, open_models
    from lorasmith.serve.server import run_server
    from lorasmith.serve.service import Service

    keys = read_keys(api_key_file)
    if not settings.is_local and not keys and not without_keys:
        raise SettingsError(
            f"With --host {settings.host} other machines reach this server, and it has no API keys. "
            f"Set {KEYS_VARIABLE}, pass --api-key-file FILE, or say --without-keys if everybody there may ask."
        )
    if studio and not run and base is None:
        base = BUILT_IN  # who wants to look first has nothing to name yet
    models = open_models(
        name_runs(run or ()),
        base=base,
        base_name=base_name,
        device=device,
        dtype=dtype,
        max_models=settings.max_models,
        tell=note,
    )
    for model in models.list():
        for line in model.chat.notes:
            note(f"{model.name}: {line}")
    service = Service(models, settings)
    service.warm_up()
    log_to_stderr()
    names = ", ".join(model.name for model in models.list())
    mount_page = (
        _studio(service, keys, runs_folder or Path("runs"), uploads_folder or Path("uploads"))
        if studio
        else None
    )

    def say_ready(url: str) -> None:
        console.print(f"Serving {names} at {url}/v1", soft_wrap=True)
        if studio:
            console.print(f"Studio: [bold]{url}[/] (open it in a browser)", soft_wrap=True)

    run_server(create_app(service, keys=keys, mount_page=mount_page), settings, on_ready=say_ready)


def _check_studio(engine: str, *, studio: bool, folders: Sequence[Path | None]) -> None:
    """Refuse what would be silently left out."""
    if studio and engine == "vllm":
        raise SettingsError(
            "--studio is a page of lorasmith's own server; vLLM has none. Leave one of --studio and --engine vllm out."
        )
    if not studio and any(folders):
        raise SettingsError(
            "--runs-folder and --uploads-folder belong to --studio. Add it, or leave them out."
        )


def serve_with_vllm(
    runs: Sequence[str], settings: ServeSettings, *, base: str | None, base_name: str | None, execute: bool
) -> None:
    """Print the vLLM command on stdout, notes beside it; or become it."""
    from lorasmith.serve.models import name_runs
    from lorasmith.serve.vllm import plan_vllm

    server = plan_vllm(name_runs(runs), settings, base=base, base_name=base_name, tell=note)
    for line in server.notes:
        note(line)
    if execute and shutil.which("vllm") is None:
        raise SettingsError(
            "There is no vllm on the path. Install it into an environment of its own (pip install vllm), activate "
            "that, and call this one's lorasmith by its path; or leave --exec out and copy the command."
        )
    print(shlex.join(server.words), flush=True)
    if execute:
        os.execvp("vllm", server.words)


def parse_settings(**values: object) -> ServeSettings:
    """Return the settings, or raise SettingsError that names every wrong value; None keeps the default."""
    from pydantic import ValidationError

    try:
        return ServeSettings.model_validate(
            {name: value for name, value in values.items() if value is not None}
        )
    except ValidationError as error:
        faults = [
            f"--{str(fault['loc'][0]).replace('_', '-')} {fault['input']}: {fault['msg']}"
            for fault in error.errors(include_url=False)
        ]
        raise SettingsError("The server's settings are wrong:\n  " + "\n  ".join(faults)) from error


def _studio(
    service: "Service", keys: "Keys", runs_folder: Path, uploads_folder: Path
) -> "Callable[[FastAPI], None]":
    """Return what mounts the studio; it trains from the built-in base and the one that is served."""
    from lorasmith.serve.studio.page import mount_studio
    from lorasmith.serve.studio.places import Places

    return lambda app: mount_studio(
        app,
        Places(runs_folder.resolve(), uploads_folder.resolve()),
        service,
        bases=list(dict.fromkeys([service.models.base.root, BUILT_IN])),
        run_file=RunFile,
        read_settings=lambda words: load_run_file(None, words),
        keys=keys,
    )


def _need_extra(*, studio: bool) -> None:
    import importlib.util

    for package in ("fastapi", "uvicorn", "prometheus_client"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError("lorasmith serve", package, "serve")
    if studio and importlib.util.find_spec("gradio") is None:
        raise MissingExtraError("lorasmith serve --studio", "gradio", "studio")
