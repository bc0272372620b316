"""Run the app on a port until it is told to stop. The only importer of uvicorn."""

import asyncio
import socket
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI

from lorasmith.errors import SettingsError
from lorasmith.serve.settings import ServeSettings

KEEP_ALIVE_SECONDS = 75  # longer than clients keep an idle connection: who asks last must not meet its end
TELLING_SECONDS = 5  # for clients to be told that their answers will not be finished


def run_server(app: FastAPI, settings: ServeSettings, *, on_ready: Callable[[str], None]) -> None:
    """Serve ``app``; ``on_ready`` gets the URL. SIGTERM and Ctrl-C let answers under way finish.

    Raises:
        SettingsError: the address cannot be listened on.
    """
    with listen(settings.host, settings.port) as listening:
        host, port = listening.getsockname()[:2]
        on_ready(f"http://{f'[{host}]' if ':' in host else host}:{port}")
        Server(app, settings).run(sockets=[listening])


class Server(uvicorn.Server):
    """Told to stop, it lets answers under way finish for ``drain_seconds``, then tells their clients that they end.

    First it calls what is in ``app.state.before_stop``.
    """

    def __init__(self, app: FastAPI, settings: ServeSettings) -> None:
        self._state, self._drain_seconds = app.state, settings.drain_seconds
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="on",
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=settings.drain_seconds + TELLING_SECONDS,
            server_header=False,
        )
        super().__init__(config)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for end in self._state.before_stop:
            end()
        late = asyncio.get_running_loop().call_later(self._drain_seconds, self._state.service.stop)
        await super().shutdown(sockets)
        late.cancel()


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens; port 0: any free one.

    Raises:
        SettingsError: the address cannot be listened on.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as fault:
        raise SettingsError(
            f"Cannot listen on {host} port {port}: {fault.strerror or fault}. "
            "Choose another with --port; 0 takes any free one."
        ) from fault
