"""The fetcher against hostile URLs, names, redirects and servers; a loopback server plays the other side."""

from __future__ import annotations

import http.server
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from ritocco.errors import FetchError, RequestError
from ritocco.fetch import Fetcher, redacted, without_paths

LOOPBACK = ["127.0.0.0/8"]
BODY = bytes(range(256)) * 40


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers by path; `/redirect?URL` redirects there."""

    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *args: object) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        self.server.seen.append((self.path, dict(self.headers.items())))
        path, _, query = self.path.partition("?")
        if path == "/redirect":
            self.answer(302, b"", Location=query, **{"Set-Cookie": "a=b"})
        elif path == "/loop":
            self.answer(307, b"", Location="/loop")
        elif path == "/nowhere":
            self.answer(302, b"")
        elif path == "/slow":
            self.drip(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n", b"x")
        elif path == "/slow-header":
            self.drip(b"HTTP/1.1 200 OK\r\n", b"X-A: b\r\n")
        elif path == "/informational":
            self.drip(b"", b"HTTP/1.1 103 Early Hints\r\n\r\n")
        elif path == "/endless":
            self.endless()
        elif path == "/short":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")
            self.close_connection = True
        elif path == "/garbage":
            self.wfile.write(b"SSH-2.0-OpenSSH_9.6\r\n")
            self.close_connection = True
        elif path == "/gzip":
            self.answer(200, b"\x1f\x8b" + bytes(50), **{"Content-Encoding": "gzip"})
        elif path == "/gzip-second":
            both = {"content-encoding": "identity", "Content-Encoding": "gzip"}
            self.answer(200, b"\x1f\x8b" + bytes(50), **both)
        elif path == "/missing":
            self.answer(404, b"secret error page")
        else:
            self.answer(200, BODY)

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def drip(self, start: bytes, drop: bytes) -> None:
        self.close_connection = True
        try:
            self.wfile.write(start)
            for _ in range(400):
                self.wfile.write(drop)
                time.sleep(0.02)
        except OSError:
            pass

    def endless(self) -> None:
        self.close_connection = True
        try:
            self.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            while True:
                self.wfile.write(b"10000\r\n" + bytes(0x10000) + b"\r\n")
        except OSError:
            pass


class Server(http.server.ThreadingHTTPServer):
    """Remembers what it was asked: (path, headers)."""

    daemon_threads = True
    seen: list[tuple[str, dict[str, str]]]

    def handle_error(self, *args: object) -> None:
        """Quiet: clients hang up on purpose here."""

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.server_address[1]}{path}"


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as made:
        made.seen = []
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield made
        made.shutdown()
        thread.join()


Resolver = Callable[[dict[str, list[str]]], list[str]]


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Resolver:
    """Replaces the system's resolver by a table: name -> addresses; a list of lists answers in turn."""

    def install(table: dict[str, list[str]]) -> list[str]:
        asked: list[str] = []

        def getaddrinfo(host: str, port: int, *args: Any, **kwargs: Any) -> list[Any]:
            asked.append(host)
            try:
                ipaddress.ip_address(host)
                answer = [host]
            except ValueError:
                if host not in table:
                    raise socket.gaierror(socket.EAI_NONAME, "unknown") from None
                answer = table[host]
                if len(asked) > 1 and f"{host} later" in table:
                    answer = table[f"{host} later"]
            family = {4: socket.AF_INET, 6: socket.AF_INET6}
            return [
                (family[ipaddress.ip_address(one).version], socket.SOCK_STREAM, 6, "", (one, port))
                for one in answer
            ]

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
        return asked

    return install


@pytest.fixture
def no_sockets(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Connecting fails the test's way: the addresses that somebody tried end up in the list."""
    tried: list[object] = []

    def connect(self: socket.socket, address: object) -> None:
        tried.append(address)
        raise OSError("no sockets here")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket.socket, "connect_ex", connect)
    return tried


def refused(url: str, **settings: Any) -> str:
    with pytest.raises(FetchError) as caught:
        Fetcher(**settings).get(url, field="input.image")
    assert caught.value.field == "input.image"
    assert str(caught.value).startswith("input.image: ")
    return str(caught.value)


def test_body_arrives_and_headers_are_plain(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9/")
    assert Fetcher(allow_networks=LOOPBACK).get(server.url("/a.png?x=1")) == BODY
    path, headers = server.seen[0]
    assert path == "/a.png?x=1"
    assert headers["Host"] == f"127.0.0.1:{server.server_address[1]}"
    assert headers["Accept-Encoding"] == "identity"
    assert {name.lower() for name in headers} == {
        "host",
        "user-agent",
        "accept",
        "accept-encoding",
        "connection",
    }


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("file:///etc/passwd", "scheme 'file'"),
        ("ftp://example.org/a", "scheme 'ftp'"),
        ("gopher://127.0.0.1:70/_x", "scheme 'gopher'"),
        ("ws://example.org/", "scheme 'ws'"),
        ("data:image/png;base64,AA", "scheme 'data'"),
        ("//example.org/a", "scheme ''"),
        ("example.org/a", "scheme ''"),
        ("", "scheme ''"),
        ("http://user:hunter2@example.org/", "user name or password"),
        ("http://user@example.org/", "user name or password"),
        ("http://example.org@127.0.0.1/", "user name or password"),
        ("http://example.org:22/", "port 22"),
        ("http://example.org:0/", "port 0"),
        ("http://example.org:6/", "port 6"),
        ("http://example.org:70000/", "port 70000"),
        ("http://example.org:99999999999/", "port 99999999999"),
        ("http://example.org:-1/", "port -1"),
        ("http:///path", "not a valid host"),
        ("http://", "not a valid host"),
        ("http://./", "not a valid host"),
        ("http://a..b/", "not a valid host"),
        ("http://exa%6dple.org/", "not a valid host"),
        ("http://127.0.0.1%00.example.org/", "not a valid host"),
        ("http://exam ple.org/", "white space"),
        (" http://example.org/", "white space"),
        ("http://example.org/\r\nX: y", "white space"),
        ("http://example.org\\@127.0.0.1/", "backslashes"),
        ("http://example.org/\x7f", "control characters"),
        ("http://example.org/" + "a" * 9000, "characters; a URL may have"),
        ("http://2130706433/", "four decimal numbers"),
        ("http://0x7f000001/", "four decimal numbers"),
        ("http://0x7f.0.0.1/", "four decimal numbers"),
        ("http://0177.0.0.1/", "not a valid URL"),
        ("http://127.1/", "four decimal numbers"),
        ("http://127.0.0.1./", "four decimal numbers"),
        ("http://1.2.3.4.5/", "four decimal numbers"),
        ("http://127.0.0.1/", "127.0.0.1, which is not a public address"),
        ("http://[::1]/", "::1, which is not a public address"),
        ("http://[::ffff:127.0.0.1]/", "not a public address"),
        ("http://[::ffff:7f00:1]/", "not a public address"),
        ("http://[fe80::1]/", "never allowed"),
        ("http://[fe80::1%25eth0]/", "zone id"),
        ("http://[::1/", "not a valid URL"),
        ("http://169.254.169.254/latest/meta-data/", "never allowed"),
        ("http://[64:ff9b::a9fe:a9fe]/", "never allowed"),
        ("http://１２７.0.0.1/", "not a valid URL"),
        ("http://①②⑦.0.0.1/", "not a valid URL"),
    ],
)
def test_urls_that_are_refused_before_any_socket(
    url: str, why: str, names: Resolver, no_sockets: list[object]
) -> None:
    asked = names({})
    assert why in refused(url)
    assert (asked, no_sockets) == ([], [])


@pytest.mark.parametrize("host", ["localhost", "inside.example", "MIXED.example", "mapped.example"])
def test_names_that_lead_inside_are_refused(host: str, names: Resolver, no_sockets: list[object]) -> None:
    names(
        {
            "localhost": ["127.0.0.1", "::1"],
            "inside.example": ["10.0.0.7"],
            "mixed.example": ["fd12::1", "192.168.1.1"],
            "mapped.example": ["::ffff:127.0.0.1"],
        }
    )
    assert "resolves to" in refused(f"http://{host}/a.png")
    assert no_sockets == []


def test_only_checked_addresses_of_a_mixed_name_are_tried(names: Resolver, no_sockets: list[object]) -> None:
    names({"mixed.example": ["127.0.0.1", "8.8.8.8", "169.254.169.254"]})
    refused("http://mixed.example:8080/")
    assert no_sockets == [("8.8.8.8", 8080)]


def test_unknown_name(names: Resolver) -> None:
    names({})
    assert "does not resolve" in refused("https://nowhere.example/a.png")


def test_a_name_that_answers_differently_the_second_time(
    server: Server, names: Resolver, no_sockets: list[object]
) -> None:
    asked = names({"rebind.example": ["8.8.8.8"], "rebind.example later": ["127.0.0.1"]})
    refused(server.url("/", host="rebind.example"))
    assert asked[0] == "rebind.example"
    assert no_sockets == [("8.8.8.8", server.server_address[1])]
    assert server.seen == []


def test_the_connection_is_pinned_to_what_was_checked(server: Server, names: Resolver) -> None:
    asked = names({"pictures.example": ["127.0.0.1"], "pictures.example later": ["10.9.9.9"]})
    url = server.url("/a.png", host="pictures.example")
    assert Fetcher(allow_networks=LOOPBACK).get(url) == BODY
    assert asked.count("pictures.example") == 1
    assert server.seen[0][1]["Host"] == f"pictures.example:{server.server_address[1]}"


def test_the_next_address_is_tried(server: Server, names: Resolver) -> None:
    names({"two.example": ["127.0.0.2", "127.0.0.1"]})  # nothing listens on the first
    assert Fetcher(allow_networks=LOOPBACK).get(server.url("/", host="two.example")) == BODY


def test_international_names(server: Server, names: Resolver) -> None:
    names({"xn--bcher-kva.example": ["127.0.0.1"]})
    assert Fetcher(allow_networks=LOOPBACK).get(server.url("/ä?b=ö", host="bücher.example")) == BODY
    assert server.seen[0][0] == "/%C3%A4?b=%C3%B6"


@pytest.mark.parametrize(
    ("location", "why"),
    [
        ("http://169.254.169.254/latest/", "never allowed"),
        ("http://10.0.0.1/", "not a public address"),
        ("http://[::1]:8080/", "not a public address"),
        ("http://[::ffff:10.0.0.1]/", "not a public address"),
        ("http://2130706433/", "four decimal numbers"),
        ("//192.168.0.1/x", "not a public address"),
        ("http://inside.example/", "resolves to 10.0.0.7"),
        ("file:///etc/passwd", "scheme 'file'"),
        ("gopher://127.0.0.1/", "scheme 'gopher'"),
        ("javascript:alert(1)", "scheme 'javascript'"),
        ("http://a:b@127.0.0.1/", "user name or password"),
        ("http://127.0.0.1:25/", "port 25"),
        ("http://[bad/", "not a valid host"),
    ],
)
def test_redirects_are_checked_like_the_first_url(
    location: str, why: str, server: Server, names: Resolver
) -> None:
    names({"inside.example": ["10.0.0.7"]})
    message = refused(server.url(f"/redirect?{location}"), allow_networks=LOOPBACK)
    assert "redirects to" in message
    assert why in message
    assert len(server.seen) == 1


def test_redirect_from_a_public_name_to_loopback_is_refused(server: Server, names: Resolver) -> None:
    names({"public.example": ["127.0.0.1"]})
    target = server.url("/redirect?http://127.0.0.2/", host="public.example")
    assert "127.0.0.2, which is not a public address" in refused(target, allow_networks=["127.0.0.1/32"])


def test_redirects_are_followed_without_cookies(server: Server) -> None:
    fetcher = Fetcher(allow_networks=LOOPBACK)
    assert fetcher.get(server.url(f"/redirect?{server.url('/redirect?/a.png')}")) == BODY
    assert len(server.seen) == 3
    assert all("Cookie" not in headers and "Referer" not in headers for _, headers in server.seen)


def test_redirect_loops_and_dead_ends(server: Server) -> None:
    message = refused(server.url("/loop"), allow_networks=LOOPBACK, max_redirects=3)
    assert "redirects more than 3 times" in message
    assert len(server.seen) == 4
    assert "without saying where" in refused(server.url("/nowhere"), allow_networks=LOOPBACK)
    assert "more than 0 times" in refused(server.url("/loop"), allow_networks=LOOPBACK, max_redirects=0)


@pytest.mark.parametrize("path", ["/slow", "/slow-header", "/informational"])
def test_one_wall_clock_for_servers_that_trickle(path: str, server: Server) -> None:
    assert "within 0.3 seconds" in refused(server.url(path), allow_networks=LOOPBACK, timeout_s=0.3)


def test_the_clock_runs_on_over_redirects(server: Server) -> None:
    url = server.url(f"/redirect?{server.url('/slow')}")
    assert "within 0.3 seconds" in refused(url, allow_networks=LOOPBACK, timeout_s=0.3)


def test_a_name_server_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: release.wait(5) and [])
    try:
        assert "within 0.1 seconds" in refused("http://slow.example/", timeout_s=0.1)
    finally:
        release.set()


def test_a_server_that_never_speaks() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        assert "within 0.2 seconds" in refused(url, allow_networks=LOOPBACK, timeout_s=0.2)


def test_bodies_are_capped(server: Server) -> None:
    announced = refused(server.url("/a.png"), allow_networks=LOOPBACK, max_bytes=len(BODY) - 1)
    assert f"holds {len(BODY)} bytes" in announced
    assert "more than 1000000 bytes" in refused(
        server.url("/endless"), allow_networks=LOOPBACK, max_bytes=1_000_000
    )
    assert Fetcher(allow_networks=LOOPBACK, max_bytes=len(BODY)).get(server.url("/a.png")) == BODY


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("/missing", "HTTP status 404"),
        ("/gzip", "compressed"),
        ("/gzip-second", "compressed"),
        ("/short", "could not be fetched"),
        ("/garbage", "could not be fetched"),
    ],
)
def test_answers_that_are_no_picture(path: str, why: str, server: Server) -> None:
    message = refused(server.url(path), allow_networks=LOOPBACK)
    assert why in message
    assert "secret error page" not in message


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    assert "could not be fetched" in refused(f"http://127.0.0.1:{port}/", allow_networks=LOOPBACK)


def test_messages_keep_secrets(server: Server) -> None:
    url = server.url("/missing?X-Amz-Signature=topsecret#fragment")
    message = refused(url, allow_networks=LOOPBACK)
    assert "/missing" in message
    assert "topsecret" not in message
    assert "fragment" not in message
    redirect = server.url("/redirect?http://10.0.0.1/b?token=topsecret")
    assert "topsecret" not in refused(redirect, allow_networks=LOOPBACK)
    assert "hunter2" not in refused("http://user:hunter2@example.org/a?b=c")
    assert "hunter2" not in refused("ftp://user:hunter2@example.org/a?b=c")
    assert "hunter2" not in refused("user:hunter2@example.org")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://u:p@h.example/a/b.png?c=d#e", "https://h.example/a/b.png"),
        ("u:p@h.example/a?b", "h.example/a"),
        ("http://h/" + "a" * 200, "http://h/" + "a" * 88 + "..."),
        ("http://h/\x1b[31m", "http://h/\\x1b[31m"),
        ("http://h/a b", "http://h/a%20b"),
    ],
)
def test_redacted(url: str, shown: str) -> None:
    assert redacted(url) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (
            "image: https://h.example:8000/secret/b.png: answered 404",
            "image: https://h.example:8000/...: answered 404",
        ),
        (
            "redirects to https://a/secret, which redirects to http://b/secret",
            "redirects to https://a/..., which redirects to http://b/...",
        ),
        ("image: 'ftp://h/secret' has a scheme", "image: 'ftp://h/...' has a scheme"),
        ("https://h/secret", "https://h/..."),
        (redacted("http://h\\secret/x"), "http://h/..."),
        ("https://h is not there; 3/4 and a: b", "https://h is not there; 3/4 and a: b"),
    ],
)
def test_without_paths(text: str, shown: str) -> None:
    assert without_paths(text) == shown


def test_host_list(server: Server, names: Resolver) -> None:
    names({"cdn.example.org": ["127.0.0.1"], "example.org": ["127.0.0.1"], "evilexample.org": ["127.0.0.1"]})
    settings: dict[str, Any] = {"allow_networks": LOOPBACK, "allow_hosts": ["*.Example.org", "one.test"]}
    assert Fetcher(**settings).get(server.url("/", host="CDN.example.org")) == BODY
    for host in ("example.org", "evilexample.org", "127.0.0.1"):
        assert "operator's list" in refused(server.url("/", host=host), **settings)
    assert "operator's list" in refused(
        server.url("/redirect?http://example.org/", host="cdn.example.org"), **settings
    )


def test_a_listed_host_must_still_be_public(names: Resolver) -> None:
    names({"one.test": ["10.0.0.1"]})
    assert "resolves to 10.0.0.1" in refused("http://one.test/", allow_hosts=["one.test"])


def test_networks_from_the_environment(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RITOCCO_ALLOW_NETWORKS", raising=False)
    closed = Fetcher.from_environment()
    monkeypatch.setenv("RITOCCO_ALLOW_NETWORKS", " 10.0.0.0/8, 127.0.0.0/8 ,")
    opened = Fetcher.from_environment(allow_networks=["192.168.0.0/16"], max_bytes=len(BODY))
    assert opened.allow_networks == ("192.168.0.0/16", "10.0.0.0/8", "127.0.0.0/8")
    assert opened.get(server.url("/")) == BODY
    for fetcher in (closed, Fetcher()):
        with pytest.raises(FetchError, match="not a public address"):
            fetcher.get(server.url("/"))


@pytest.mark.parametrize(
    "settings",
    [
        {"max_bytes": 0},
        {"timeout_s": 0},
        {"timeout_s": float("nan")},
        {"max_redirects": -1},
        {"allow_hosts": "a.b"},
        {"allow_hosts": [5]},
        {"allow_networks": [5]},
        {"allow_networks": None},
        {"allow_networks": "10.0.0.0/8"},
    ],
)
def test_settings_are_checked(settings: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        Fetcher(**settings)


class Recorder(ssl.SSLContext):
    """Notes for which name a handshake would verify, and ends it."""

    asked: str | None = None

    def wrap_socket(self, *args: Any, **kwargs: Any) -> ssl.SSLSocket:
        self.asked = kwargs["server_hostname"]
        raise ssl.SSLError("recorded")


def test_tls_is_verified_for_the_name_not_the_address(server: Server, names: Resolver) -> None:
    names({"pictures.example.": ["127.0.0.1"]})
    context = Recorder(ssl.PROTOCOL_TLS_CLIENT)
    url = server.url("/", host="pictures.example.").replace("http:", "https:")
    assert "recorded" in refused(url, allow_networks=LOOPBACK, ssl_context=context)
    assert context.asked == "pictures.example"
    default = Fetcher()._tls()
    assert default.check_hostname
    assert default.verify_mode is ssl.CERT_REQUIRED


def test_a_server_without_tls_is_refused(server: Server) -> None:
    url = server.url("/").replace("http:", "https:")
    assert "could not be fetched" in refused(url, allow_networks=LOOPBACK)
