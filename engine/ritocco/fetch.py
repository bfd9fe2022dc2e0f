"""The one hardened fetcher: nobody else in ritocco opens a URL.

A picture's URL, or a webhook's, comes from whoever sends the request, so it may point anywhere: at this
machine, at the network behind it, at a cloud's metadata service. The rules, in the order in which they apply
to every hop:

1. http and https only, no user name or password, plain host spelling, port 80, 443 or 1024 and above;
2. the host stands in `allow_hosts`, where that is given;
3. the name is resolved here, and only globally reachable addresses (and those in `allow_networks`) are kept;
   an IPv6 address that wraps an IPv4 one is judged by the inner address too (`addresses.py`);
4. the connection goes to an address that was judged, whatever the name resolves to a moment later; TLS still
   verifies the certificate for the name;
5. one wall clock covers resolving, connecting, every redirect and every byte; the body is counted on arrival;
6. a redirect is a new URL: back to rule 1.

Proxies, cookies, netrc and compression play no part. httpx and httpcore are imported at the first fetch.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from ritocco.addresses import Address, Network, parse_network, refusal
from ritocco.errors import FetchError, RequestError
from ritocco.shown import shown

if TYPE_CHECKING:
    import ssl

    import httpcore
    import httpx

ALLOW_NETWORKS_VARIABLE = "RITOCCO_ALLOW_NETWORKS"
MAX_BYTES = 32 * 1024 * 1024
TIMEOUT_S = 30.0
MAX_REDIRECTS = 5
MAX_URL_CHARS = 8192
CONNECT_TIMEOUT_S = 5.0


_HOST = re.compile(r"(?=.{1,254}\Z)[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*\.?\Z")
_PATH = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://[^/\\\s]*)[/\\]\S*?(?=[:,']?(?:\s|\Z))")
_NUMERIC_LABEL = re.compile(r"(0x[0-9a-f]*|[0-9]+)\Z")


def redacted(url: str) -> str:
    """The URL without user name, password, query and fragment, cut to 100 characters: fit for logs."""
    head = re.split(r"[?#]", url, maxsplit=1)[0]
    scheme, separator, rest = head.partition("://")
    if not separator:
        scheme, rest = "", head
    authority, slash, path = rest.partition("/")
    shown = ascii(scheme + separator + authority.rpartition("@")[2] + slash + path)[1:-1].replace(" ", "%20")
    return shown if len(shown) <= 100 else shown[:97] + "..."


def without_paths(text: str) -> str:
    """A text that shows URLs as `redacted` does, with scheme and host of each: a path may open something."""
    return _PATH.sub(r"\1/...", text)


def _strings(name: str, given: object) -> tuple[str, ...]:
    listed = tuple(given) if isinstance(given, Iterable) and not isinstance(given, str) else (None,)
    if not all(isinstance(text, str) for text in listed):
        raise RequestError(f"{name} is {shown(given)}; it must be a list of strings")
    return cast("tuple[str, ...]", listed)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Target:
    """One hop, checked: what to ask for and which addresses may be asked."""

    url: httpx.URL
    addresses: tuple[str, ...]
    port: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Fetcher:
    """Fetches what a request's URL points at, under the rules at the top of this file.

    allow_networks: CIDR texts of networks that are not public and yet allowed, as in `["10.0.0.0/8"]`.
    allow_hosts: None, or the only host names allowed; `*.example.org` stands for every name below it.
        A listed host must still resolve to an allowed address.
    max_bytes: most bytes of a body. timeout_s: seconds for the whole fetch, redirects included.
    max_redirects: most redirects followed. ssl_context: own certificates; by default those of
        SSL_CERT_FILE, else certifi's.
    Raises RequestError where a list is none of strings, a network not valid CIDR or a cap not
        positive. Threads may share one.
    """

    allow_networks: Iterable[str] = ()
    allow_hosts: Iterable[str] | None = None
    max_bytes: int = MAX_BYTES
    timeout_s: float = TIMEOUT_S
    max_redirects: int = MAX_REDIRECTS
    ssl_context: ssl.SSLContext | None = field(default=None, repr=False, compare=False)
    _opened: tuple[Network, ...] = field(default=(), init=False, repr=False)

    def __post_init__(self) -> None:
        networks = _strings("allow_networks", self.allow_networks)
        object.__setattr__(self, "allow_networks", networks)
        object.__setattr__(self, "_opened", tuple(parse_network(text) for text in networks))
        if self.allow_hosts is not None:
            listed = _strings("allow_hosts", self.allow_hosts)
            hosts = tuple(host.strip().lower().rstrip(".") for host in listed)
            object.__setattr__(self, "allow_hosts", hosts)
        if not (self.max_bytes > 0 and self.timeout_s > 0 and self.max_redirects >= 0):
            raise RequestError("max_bytes and timeout_s must be above 0 and max_redirects at least 0")

    @classmethod
    def from_environment(cls, **settings: Any) -> Fetcher:
        """A Fetcher whose `allow_networks` gains those of RITOCCO_ALLOW_NETWORKS (comma-separated CIDR)."""
        listed = os.environ.get(ALLOW_NETWORKS_VARIABLE, "").split(",")
        networks = (*settings.pop("allow_networks", ()), *(text.strip() for text in listed if text.strip()))
        return cls(allow_networks=networks, **settings)

    def get(self, url: str, *, field: str = "") -> bytes:
        """The body behind an http(s) URL.

        field: the request's field that held the URL, for the error. Raises FetchError where a rule refuses
        it, the server does not answer with status 200, or a cap is passed.
        """
        deadline = time.monotonic() + self.timeout_s
        shown = redacted(url)
        try:
            with _network_errors(deadline, self.timeout_s):
                return self._follow(url, deadline)
        except _Refused as why:
            raise FetchError(f"{field or 'url'}: {shown}: {why}", field=field) from why.__cause__

    def post(self, url: str, body: bytes, headers: Mapping[str, str], *, field: str = "") -> int:
        """Send a body to an http(s) URL; returns the status of the answer, of which nothing more is read.

        headers: in ASCII, beside Host and such. A redirect is not followed: its status is returned.
        field: as of `get`. Raises FetchError where a rule refuses the URL or no answer comes in time.
        """
        deadline = time.monotonic() + self.timeout_s
        shown = redacted(url)
        try:
            with _network_errors(deadline, self.timeout_s):
                target = self._check(url, deadline)
                added = [(name.encode("ascii"), value.encode("ascii")) for name, value in headers.items()]
                added.append((b"Content-Length", str(len(body)).encode("ascii")))
                with self._asked("POST", target, deadline, added, body) as response:
                    return response.status
        except _Refused as why:
            raise FetchError(f"{field or 'url'}: {shown}: {why}", field=field) from why.__cause__

    def _follow(self, url: str, deadline: float) -> bytes:
        target = self._check(url, deadline)
        for _ in range(self.max_redirects + 1):
            with self._asked("GET", target, deadline) as response:
                if response.status not in (301, 302, 303, 307, 308):
                    return self._body(response)
                location = _header(response, b"location").decode("utf-8", errors="replace")
            target = self._redirect(target, location, deadline)
        raise _Refused(f"redirects more than {self.max_redirects} times")

    @contextmanager
    def _asked(
        self,
        method: str,
        target: _Target,
        deadline: float,
        added: Iterable[tuple[bytes, bytes]] = (),
        body: bytes | None = None,
    ) -> Iterator[httpcore.Response]:
        """The answer to one request, its body unread."""
        import httpcore

        is_tls = target.url.scheme == "https"
        with httpcore.ConnectionPool(
            ssl_context=self._tls() if is_tls else None,
            http2=False,
            retries=0,
            network_backend=cast("httpcore.NetworkBackend", _PinnedBackend(target, deadline)),
        ) as pool:
            request = httpcore.URL(
                scheme=target.url.raw_scheme,
                host=target.url.raw_host.lower().rstrip(b"."),  # certificates spell it without the dot
                port=target.port,
                target=target.url.raw_path,
            )
            headers = [*_headers(target), *added]
            with pool.stream(method, request, headers=headers, content=body) as response:
                yield response

    def _redirect(self, target: _Target, location: str, deadline: float) -> _Target:
        if not location:
            raise _Refused("redirects without saying where to")
        try:
            following = str(target.url.join(_only_visible(location)))
        except _Refused:
            raise
        except Exception as error:  # httpx and idna raise unrelated classes for a URL they can't parse
            raise _Refused(f"redirects to {redacted(location)}, which is not a valid URL") from error
        if target.url.scheme == "https" and following.lower().startswith("http:"):
            raise _Refused(f"redirects from https to http, {redacted(following)}")
        try:
            return self._check(following, deadline)
        except _Refused as why:
            raise _Refused(f"redirects to {redacted(following)}, which {why}") from why.__cause__

    def _check(self, text: str, deadline: float) -> _Target:
        """Rules 1 to 3 for one hop."""
        import httpx

        try:
            url = httpx.URL(_only_visible(text))
            host = url.raw_host.decode("ascii").lower()
        except _Refused:
            raise
        except Exception as error:  # httpx and idna raise unrelated classes for a URL they can't parse
            raise _Refused("is not a valid URL") from error
        if url.scheme not in ("http", "https"):
            raise _Refused(f"has the scheme {url.scheme[:20]!r}; only http and https URLs are fetched")
        if url.userinfo:
            raise _Refused("holds a user name or password; URLs with credentials are not fetched")
        port = url.port if url.port is not None else (443 if url.scheme == "https" else 80)
        if port not in (80, 443) and not 1024 <= port <= 65535:
            raise _Refused(f"names port {port}; allowed are 80, 443 and 1024 to 65535")
        literal = _literal_address(host)
        if self.allow_hosts is not None and not _listed(host.rstrip("."), self.allow_hosts):
            raise _Refused(f"names the host {host}, which is not in the operator's list of hosts")
        found = (literal,) if literal is not None else _resolve(host, port, deadline)
        reasons = {address: refusal(address, self._opened) for address in found}
        allowed = tuple(str(address) for address, why in reasons.items() if not why)
        if not allowed:
            address, why = next(iter(reasons.items()))
            name = "" if literal is not None else f"{host} resolves to "
            raise _Refused(f"is not fetched: {name}{address}, which {why}")
        return _Target(url=url, addresses=allowed[:4], port=port)

    def _body(self, response: httpcore.Response) -> bytes:
        if response.status != 200:
            raise _Refused(f"was answered with HTTP status {response.status}, not 200")
        encodings = [value for name, value in response.headers if name.lower() == b"content-encoding"]
        if any(value.strip().lower() not in (b"", b"identity") for value in encodings):
            raise _Refused("was answered compressed although only identity was asked for")
        length = _header(response, b"content-length")
        if length.isdigit() and int(length[:20]) > self.max_bytes:
            raise _Refused(f"holds {int(length[:20])} bytes; at most {self.max_bytes} are fetched")
        body = bytearray()
        for chunk in response.iter_stream():
            body += chunk
            if len(body) > self.max_bytes:
                raise _Refused(f"holds more than {self.max_bytes} bytes, the most that are fetched")
        return bytes(body)

    def _tls(self) -> ssl.SSLContext:
        if self.ssl_context is not None:
            return self.ssl_context
        import httpx

        return httpx.create_ssl_context()


class _Refused(Exception):  # noqa: N818 - a step on the way to FetchError, which adds field and URL
    """Why a fetch ends; `Fetcher.get` turns it into FetchError."""


def _only_visible(text: str) -> str:
    """The text itself; refuses what parsers disagree about: white space, control characters, backslashes."""
    if len(text) > MAX_URL_CHARS:
        raise _Refused(f"has {len(text)} characters; a URL may have {MAX_URL_CHARS}")
    if any(ord(letter) <= 0x20 or letter in "\\\x7f" or 0x80 <= ord(letter) < 0xA1 for letter in text):
        raise _Refused("holds white space, control characters or backslashes; escape them")
    return text


def _literal_address(host: str) -> Address | None:
    """The address where the host is one, None for a name; refuses octal, hexadecimal and short IPv4."""
    if ":" in host:
        try:
            return ipaddress.IPv6Address(host)
        except ValueError as error:
            raise _Refused(f"names the host {host[:60]!r}, which is not a valid IPv6 address") from error
    if not _HOST.match(host):
        raise _Refused(f"names the host {host[:60]!r}, which is not a valid host name")
    if not _NUMERIC_LABEL.match(host.rstrip(".").rpartition(".")[2]):
        return None
    try:
        return ipaddress.IPv4Address(host)
    except ValueError as error:
        raise _Refused(f"names the host {host[:60]!r}; IPv4 is written as four decimal numbers") from error


def _listed(host: str, allowed: Iterable[str]) -> bool:
    return any(host.endswith(one[1:]) if one.startswith("*.") else host == one for one in allowed)


def _resolve(host: str, port: int, deadline: float) -> tuple[Address, ...]:
    """All addresses of a name, in the resolver's order, without duplicates."""
    answers: list[Any] = []

    def ask() -> None:
        try:
            answers.append(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except Exception as error:  # resolvers can be replaced, and then raise anything
            answers.append(error)

    # getaddrinfo takes no time limit; in a thread, a slow name server can't hold its caller beyond ours.
    asking = threading.Thread(target=ask, name="ritocco-resolve", daemon=True)
    asking.start()
    asking.join(max(0.0, deadline - time.monotonic()))
    if not answers:
        raise TimeoutError
    if isinstance(answers[0], Exception):
        raise _Refused(f"names the host {host}, which does not resolve") from answers[0]
    found = dict.fromkeys(ipaddress.ip_address(entry[4][0]) for entry in answers[0])
    if not found:
        raise _Refused(f"names the host {host}, which does not resolve")
    return tuple(found)


def _header(response: httpcore.Response, wanted: bytes) -> bytes:
    return next((value for name, value in response.headers if name.lower() == wanted), b"")


def _headers(target: _Target) -> list[tuple[bytes, bytes]]:
    return [
        (b"Host", target.url.netloc),
        (b"User-Agent", b"ritocco"),
        (b"Accept", b"image/*, */*;q=0.1"),
        (b"Accept-Encoding", b"identity"),
        (b"Connection", b"close"),
    ]


@contextmanager
def _network_errors(deadline: float, timeout_s: float) -> Iterator[None]:
    import httpcore

    try:
        yield
    except (httpcore.TimeoutException, TimeoutError) as error:
        within = f"within {timeout_s:g} seconds" if time.monotonic() >= deadline else "in time"
        raise _Refused(f"was not answered in full {within}") from error
    except (httpcore.NetworkError, httpcore.ProtocolError, OSError) as error:
        raise _Refused(f"could not be fetched: {str(error) or 'no answer'!a}") from error


class _PinnedBackend:
    """httpcore's network backend, for one hop: connects to checked addresses only, and keeps the deadline."""

    def __init__(self, target: _Target, deadline: float) -> None:
        self._target = target
        self._deadline = deadline

    def connect_tcp(self, host: str, port: int, **options: Any) -> Any:
        """A stream to the first checked address that answers; `host` is not resolved again."""
        import httpcore

        last: Exception = httpcore.ConnectError("no address to connect to")
        for address in self._target.addresses:
            options["timeout"] = _remaining(self._deadline, CONNECT_TIMEOUT_S)
            try:
                stream = httpcore.SyncBackend().connect_tcp(address, self._target.port, **options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                last = error
            else:
                return _DeadlineStream(stream, self._deadline)
        raise last


class _DeadlineStream:
    """A network stream whose every wait ends at the deadline, however slowly the bytes trickle."""

    def __init__(self, stream: httpcore.NetworkStream, deadline: float) -> None:
        self._stream = stream
        self._deadline = deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """At most max_bytes bytes; empty at the end."""
        return self._stream.read(max_bytes, timeout=_remaining(self._deadline, timeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Sends all of the buffer."""
        self._stream.write(buffer, timeout=_remaining(self._deadline, timeout))

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> _DeadlineStream:
        """The same stream inside TLS, the certificate verified for server_hostname."""
        limit = _remaining(self._deadline, timeout)
        inside = self._stream.start_tls(ssl_context, server_hostname=server_hostname, timeout=limit)
        return _DeadlineStream(inside, self._deadline)

    def get_extra_info(self, info: str) -> Any:
        """What the stream below knows under this name."""
        return self._stream.get_extra_info(info)

    def close(self) -> None:
        """Closes the socket."""
        self._stream.close()


def _remaining(deadline: float, limit: float | None) -> float:
    import httpcore

    left = deadline - time.monotonic()
    if left <= 0:
        raise httpcore.ReadTimeout
    return left if limit is None else min(left, limit)
