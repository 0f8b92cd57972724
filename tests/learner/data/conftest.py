"A web server on this machine that can cut connections, ignore ranges, change files and stay silent."

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


@dataclass
class Page:
    "What is served at a path, and how badly; `cuts` and `statuses` are used up one a request."

    body: bytes = b""
    headers: dict[str, str] = field(default_factory=lambda: {"ETag": '"one"'})
    ranges: bool = True
    checks_version: bool = True  # honours If-Range
    sized: bool = True  # sends Content-Length
    chunked: bool = False
    cuts: list[int] = field(default_factory=list)  # close the connection after so many bytes
    statuses: list[int] = field(default_factory=list)
    hangs: bool = False  # keeps silent instead of closing the connection
    requests: list[dict[str, str]] = field(default_factory=list)
    sent: int = 0


class WebServer:
    "Serves `pages` by path; `url(path)` is a page's address."

    def __init__(self) -> None:
        self.pages: dict[str, Page] = {}
        self.stopping = threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))
        self.thread.start()

    def put(self, path: str, body: bytes, **traits: object) -> Page:
        self.pages[path] = Page(body, **traits)  # type: ignore[arg-type]
        return self.pages[path]

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server.server_port}{path}"

    def stop(self) -> None:
        self.stopping.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        web = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: object) -> None:
                pass

            def do_GET(self) -> None:
                self.close_connection = True
                page = web.pages.get(self.path)
                if page is None:
                    self.answer(404, {}, b"")
                    return
                page.requests.append(dict(self.headers))
                if page.statuses:
                    self.answer(page.statuses.pop(0), page.headers, b"")
                else:
                    self.serve(page)

            def serve(self, page: Page) -> None:
                start, status, headers = 0, 200, dict(page.headers)
                versions = (None, page.headers.get("ETag"), page.headers.get("Last-Modified"))
                same = not page.checks_version or self.headers["If-Range"] in versions
                if page.ranges and same and (asked := self.headers["Range"]):
                    start, status = int(asked.removeprefix("bytes=").removesuffix("-")), 206
                    if start >= len(page.body):
                        self.answer(416, {"Content-Range": f"bytes */{len(page.body)}"}, b"")
                        return
                    headers["Content-Range"] = f"bytes {start}-{len(page.body) - 1}/{len(page.body)}"
                body = page.body[start:]
                if page.sized:
                    headers["Content-Length"] = str(len(body))
                if page.chunked:
                    headers["Transfer-Encoding"] = "chunked"
                    body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
                if page.cuts:
                    body = body[: page.cuts.pop(0)]
                page.sent += len(body)
                self.answer(status, headers, body)
                if page.hangs:
                    web.stopping.wait(20)

            def answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)
                self.wfile.flush()

        return Handler


@pytest.fixture(autouse=True)
def direct(monkeypatch: pytest.MonkeyPatch) -> None:
    "No proxy between a test and this machine."
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def web() -> Iterator[WebServer]:
    "A web server of its own for each test."
    server = WebServer()
    yield server
    server.stop()
