"""A server that sends again what a real kube-apiserver sent (api_recording.json, made by tests/kubernetes/record.py).

The recording goes through steps. A list gets the body of the step that the replay is at; a watch gets the events since
its resource version, and those to come as the replay goes on. Only the ports of the pods are replaced.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

RECORDING = json.loads((Path(__file__).parent / "api_recording.json").read_text())
STEPS: list[str] = RECORDING["steps"]
ROLES = ("prefill", "decode")


@dataclass
class Call:
    """One request that came in."""

    path: str
    role: str
    version: str | None  # of a watch; None of a list
    fields: dict[str, str]


class ApiReplay:
    """Listens from `start` on, on a port that it keeps over `stop` and another `start`."""

    def __init__(self, ports: Mapping[str, int]) -> None:
        self._ports = {str(RECORDING["ports"][name]): str(port) for name, port in ports.items()}
        self._at = dict.fromkeys(ROLES, 0)
        self._changed = threading.Condition()
        self._server: ThreadingHTTPServer | None = None
        self._watching: list[Handler] = []
        self.port = 0
        self.calls: list[Call] = []
        self.answers: deque[tuple[int, str]] = deque()  # status and body of the next calls, in place of what they want
        self.gone_before = 0  # watches from an older version than this get what a compacted history answers
        self.pause = 0.0  # s between two pieces of an event
        self.ends_at_once = False  # every watch ends as soon as it began
        self.is_mute = False  # watches get nothing, not even their end

    def start(self) -> None:
        replay = self

        class Bound(Handler):
            api = replay

        self._server = Server(("127.0.0.1", self.port), Bound)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """As a machine that is switched off: open watches break."""
        assert self._server is not None
        self._server.shutdown()
        self._server.server_close()
        self.cut_watches()

    def go_to(self, step: str, roles: tuple[str, ...] = ROLES) -> None:
        with self._changed:
            self._at |= dict.fromkeys(roles, STEPS.index(step))
            self._changed.notify_all()

    def say(self, line: str) -> None:
        """Sends a line of its own on every open watch."""
        for handler in self._open_watches():
            handler.send_line(line)

    def cut_watches(self, sending: str = "") -> None:
        """Breaks every open watch off, the last piece of an event half sent."""
        for handler in self._open_watches():
            handler.cut(sending)

    def num_watching(self) -> int:
        return len(self._watching)

    def _open_watches(self) -> list[Handler]:
        with self._changed:
            return self._watching.copy()

    def body(self, role: str) -> str:
        return self._with_ports(RECORDING["lists"][role][self._at[role]])

    def lines(self, role: str, version: int, num_sent: int) -> list[str]:
        """Events up to where the replay is, newer than `version`, without those that were sent on this watch."""
        steps = RECORDING["events"][role][: self._at[role] + 1]
        lines = [line for step in steps for line in step if version_of(line) > version]
        return [self._with_ports(line) for line in lines[num_sent:]]

    def _with_ports(self, text: str) -> str:
        for recorded, real in self._ports.items():
            text = text.replace(recorded, real)
        return text


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = (
        128  # where connections wait on a busy machine; a SYN that finds none free is lost for a second
    )


class Handler(BaseHTTPRequestHandler):
    api: ApiReplay
    protocol_version = "HTTP/1.1"
    is_over = False

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        fields = {name: values[0] for name, values in parse_qs(parts.query).items()}
        role = fields["labelSelector"].partition("role=")[2]
        is_watch = fields.get("watch", "").lower() == "true"
        self.api.calls.append(Call(parts.path, role, fields.get("resourceVersion") if is_watch else None, fields))
        if self.api.answers:
            self._answer(*self.api.answers.popleft())
        elif not is_watch:
            self._answer(200, self.api.body(role))
        elif int(fields["resourceVersion"]) < self.api.gone_before:
            self._answer(**RECORDING["gone"])
        else:
            self._watch(role, int(fields["resourceVersion"]), float(fields["timeoutSeconds"]))

    def _answer(self, status: int, body: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body.encode())))
        self.end_headers()
        self.wfile.write(body.encode())

    def _watch(self, role: str, version: int, seconds: float) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        deadline, num_sent = time.monotonic() + seconds, 0
        with self.api._changed:
            self.api._watching.append(self)
        while not self._is_over() and not self.api.ends_at_once and time.monotonic() < deadline:
            with self.api._changed:
                lines = self.api.lines(role, version, num_sent)
                if not lines:
                    self.api._changed.wait(0.05)
            while self.api.is_mute and not self._is_over():
                time.sleep(0.05)
            for line in lines:
                self.send_line(line)
            num_sent += len(lines)
        with self.api._changed:
            if self in self.api._watching:
                self.api._watching.remove(self)
        if not self._is_over():
            self.wfile.write(b"0\r\n\r\n")

    def _is_over(self) -> bool:
        """Whether the watch was cut, or the client has gone."""
        if not self.is_over:
            with contextlib.suppress(BlockingIOError):
                self.is_over = not self.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        return self.is_over

    def send_line(self, line: str) -> None:
        raw = line.encode() + b"\n"
        size = len(raw) if not self.api.pause else 200
        for begin in range(0, len(raw), size):
            piece = raw[begin : begin + size]
            self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
            time.sleep(self.api.pause)

    def cut(self, sending: str) -> None:
        raw = sending.encode()[: len(sending) // 2]
        if raw:
            self.wfile.write(b"%x\r\n%b\r\n" % (len(raw), raw))
        self.is_over = self.close_connection = True  # from here on the handler's own thread may close the connection
        with contextlib.suppress(OSError):  # the client was faster
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def version_of(line: str) -> int:
    return int(json.loads(line)["object"]["metadata"]["resourceVersion"])
