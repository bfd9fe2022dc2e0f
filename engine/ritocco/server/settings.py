"""What the operator decides: who may ask, how much, where things are kept, and for how long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

from ritocco.errors import RequestError
from ritocco.fetch import MAX_BYTES, Fetcher

Outputs: TypeAlias = Literal["auto", "url", "data"]

MAX_WAIT_S = 60.0
_LEAST_TOKEN = 16
_LEAST_GONE_S, _MOST_GONE_S = 1.0, 3600.0
MOST_IN_A_ROW = 256 << 20
"""Bytes of a request or a file, where a database holds them: a quarter of what one of its fields may be."""
_MOST_SECONDS = 10 * 365 * 24 * 60 * 60


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """The server's settings. Raises RequestError for what makes no sense.

    tokens: any of them opens every route but health; none leaves the door open. data: folder of predictions
    and files; None takes one that is gone with the process. database: URL of PostgreSQL, in the place of
    `data`, which several servers share. gone_after_s: seconds after which one of them that was not seen is
    gone; the same for all. waiting: most predictions of this server unfinished at a time,
    beyond which creation is answered with 429. retention_s: seconds that inputs, logs, outputs and uploads
    are kept. max_work: most steps x outputs x pixels of one prediction; None leaves the fields' own bounds.
    time_limit_s: seconds that one prediction may take once it has begun. max_body_bytes: of a request with
    JSON. max_upload_bytes: of an uploaded file. body_timeout_s: seconds in which its body has to be here.
    outputs: `url`, `data` (data URIs), or `auto`: URLs where the server is reached by https, else data URIs,
    since the clients make files only of those two. public_url: the root under which clients reach the server,
    where the request does not tell. cors_origins: web pages that may call; none. fetcher: opens the URLs of
    webhooks; None makes one from the environment. grace_s: seconds that running predictions get at the end.
    """

    tokens: Sequence[str] = field(default=(), repr=False)
    data: Path | None = None
    database: str | None = field(default=None, repr=False)  # it may hold a password
    gone_after_s: float = 10.0
    waiting: int = 64
    retention_s: float = 24 * 60 * 60
    max_work: int | None = None
    time_limit_s: float | None = None
    max_body_bytes: int = 2 * MAX_BYTES
    max_upload_bytes: int = MAX_BYTES
    body_timeout_s: float = 120.0
    outputs: Outputs = "auto"
    public_url: str | None = None
    cors_origins: Sequence[str] = ()
    fetcher: Fetcher | None = None
    grace_s: float = 30.0

    def __post_init__(self) -> None:
        if isinstance(self.tokens, str):
            raise RequestError("tokens is a text; it must be a list of texts", field="tokens")
        for token in self.tokens:
            if len(token) < _LEAST_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
                raise RequestError(
                    f"tokens: one has {len(token)} characters; each must be at least {_LEAST_TOKEN} of "
                    "printable ASCII without spaces",
                    field="tokens",
                )
        self._check_database()
        positive = ("waiting", "retention_s", "max_work", "time_limit_s", "max_body_bytes")
        for name in (*positive, "max_upload_bytes", "body_timeout_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise RequestError(f"{name} is {value}; it must be above 0", field=name)
        for name in ("retention_s", "time_limit_s", "body_timeout_s", "grace_s"):
            value = getattr(self, name)
            if value is not None and value > _MOST_SECONDS:
                raise RequestError(
                    f"{name} is {value}; it must be at most {_MOST_SECONDS}, ten years", field=name
                )
        if not self.grace_s >= 0:
            raise RequestError(f"grace_s is {self.grace_s}; it must be at least 0", field="grace_s")
        if self.outputs not in ("auto", "url", "data"):
            raise RequestError(f"outputs is {self.outputs!r}; it must be auto, url or data", field="outputs")
        if self.public_url is not None and not self.public_url.startswith(("http://", "https://")):
            raise RequestError(
                f"public_url is {self.public_url!r}; it must start with http:// or https://",
                field="public_url",
            )

    def _check_database(self) -> None:
        if not _LEAST_GONE_S <= self.gone_after_s <= _MOST_GONE_S:
            rule = f"it must be {_LEAST_GONE_S:g} to {_MOST_GONE_S:g} seconds"
            raise RequestError(f"gone_after_s is {self.gone_after_s}; {rule}", field="gone_after_s")
        if self.database is None:
            return
        if self.data is not None:
            raise RequestError(
                "database and data are both given; one of them holds everything", field="database"
            )
        if not self.database.startswith(("postgresql://", "postgres://")):
            raise RequestError(
                "database is not the URL of a PostgreSQL database: it must start with postgresql://",
                field="database",
            )
        for name in ("max_body_bytes", "max_upload_bytes"):
            if getattr(self, name) > MOST_IN_A_ROW:
                rule = f"with a database it must be at most {MOST_IN_A_ROW}"
                raise RequestError(f"{name} is {getattr(self, name)}; {rule}", field=name)


def read_tokens(file: Path) -> tuple[str, ...]:
    """Tokens of a file, one a line; empty lines and those that begin with # are passed over.

    Raises RequestError where it can't be read or holds none; the message shows nothing of it.
    """
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(
            f"--token-file is {str(file)!r}, which can't be read", field="token_file"
        ) from error
    tokens = tuple(line for line in lines if line and not line.startswith("#"))
    if not tokens:
        raise RequestError(f"--token-file is {str(file)!r}, which holds no token", field="token_file")
    return tokens
