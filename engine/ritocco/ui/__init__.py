"""The playground: a page of the server's, to paint a mask on and watch. Needs the extra `ritocco[ui]`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ritocco.errors import BackendError

if TYPE_CHECKING:
    from ritocco.server.app import App

__all__ = ["mount"]


def mount(app: App, *, hosts: Sequence[str] = ()) -> None:
    """The page, under `/ui/` of an app of `ritocco.server.create_app`, before its first request.

    hosts: names under which it answers besides addresses, `localhost` and that of the public URL, where the
    app has no tokens. Raises BackendError without the extra's packages.
    """
    try:
        from ritocco.ui.playground import mount as mounted
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("ritocco"):
            raise
        raise BackendError(f'the page needs {error.name}; pip install "ritocco[ui]"') from error
    mounted(app, hosts=hosts)
