"""The HTTP face: Replicate's API on your own machine. Needs the extra `ritocco[server]`.

`create_app` makes an ASGI app that runs by itself or under a prefix of another one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ritocco.errors import BackendError

if TYPE_CHECKING:
    from ritocco.server.app import create_app
    from ritocco.server.settings import Settings

__all__ = ["Settings", "create_app"]


def __getattr__(name: str) -> Any:
    """Imported when asked for: the store below needs no web framework."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from ritocco.server import app, settings
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("ritocco"):
            raise
        raise BackendError(f'the server needs {error.name}; pip install "ritocco[server]"') from error
    return {"create_app": app.create_app, "Settings": settings.Settings}[name]
