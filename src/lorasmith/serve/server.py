"""Run the app on a port until it is told to stop. The only importer of uvicorn."""

import socket
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI

from lorasmith.errors import SettingsError
from lorasmith.serve.settings import ServeSettings


def run_server(app: FastAPI, settings: ServeSettings, *, on_ready: Callable[[str], None]) -> None:
    """Serve ``app``; ``on_ready`` gets the URL. SIGTERM and Ctrl-C let answers under way finish.

    Raises:
        SettingsError: the address cannot be listened on.
    """
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="on",
        timeout_graceful_shutdown=settings.drain_seconds,
        server_header=False,
    )
    with _listen(settings.host, settings.port) as listening:
        host, port = listening.getsockname()[:2]
        on_ready(f"http://{f'[{host}]' if ':' in host else host}:{port}")
        Server(config).run(sockets=[listening])


class Server(uvicorn.Server):
    """Uvicorn's, which before it waits for open answers calls what is in ``app.state.before_stop``."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for end in self.config.app.state.before_stop:  # type: ignore[union-attr]
            end()
        await super().shutdown(sockets)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as fault:
        raise SettingsError(
            f"Cannot listen on {host} port {port}: {fault.strerror or fault}. "
            "Choose another with --port; 0 takes any free one."
        ) from fault
