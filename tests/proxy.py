"""A proxy between a client and a server, which loses replies when it is told to."""

import contextlib
import socket
import threading
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Callable


class Proxy:
    """Passes bytes on; the next `cut_replies` replies are lost, and their connections with them."""

    def __init__(self, port: int) -> None:
        self._upstream = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.cut_replies = 0
        self.alter: Callable[[bytes], bytes] = lambda data: data
        self.requests: list[bytes] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._upstream))
                for task in (self._requests, self._replies):
                    threading.Thread(target=task, args=(client, server), daemon=True).start()

    def _requests(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(65_536):
                self.requests.append(data)
                server.sendall(data)
        _drop(server)

    def _replies(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := server.recv(65_536):
                if self.cut_replies:
                    self.cut_replies -= 1
                    break
                client.sendall(self.alter(data))
        _drop(client)
        _drop(server)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        _drop(self._listener)


def _drop(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()
