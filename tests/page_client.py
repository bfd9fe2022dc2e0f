"""What the tests of the page share: a token, pictures' files, calls as the page's own code makes them."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image
from starlette.testclient import TestClient

TOKEN = "correct-horse-battery-staple"
Make = Callable[..., TestClient]
"""Makes a client of an app with the page and these settings; `by_itself` as of HandBatcher."""


def encoded(pixels: Any, kind: str = "PNG", **options: Any) -> bytes:
    """A picture's file."""
    file = io.BytesIO()
    Image.fromarray(np.asarray(pixels)).save(file, kind, **options)
    return file.getvalue()


class Browser:
    """Calls the page's functions by the routes that its scripts use."""

    def __init__(self, client: TestClient, session: str = "abc123") -> None:
        self.client, self.session = client, session
        self.config = client.get("/ui/config").json()

    def upload(self, data: bytes, name: str = "photo.jpg") -> str:
        """The path under which a file lies on the server."""
        got = self.client.post("/ui/gradio_api/upload", files={"files": (name, data)})
        assert got.status_code == 200, got.text
        (path,) = got.json()
        return str(path)

    def paint(self, *layers: bytes) -> dict[str, Any]:
        """The editor's value with these layers on it."""
        sent = [file_data(self.upload(layer, f"layer_{place}.png")) for place, layer in enumerate(layers)]
        return {"background": None, "layers": sent, "composite": None, "id": None}

    def component(self, name: str) -> int:
        """The number of the control of an element's id."""
        return next(
            int(one["id"]) for one in self.config["components"] if one["props"].get("elem_id") == name
        )

    def function(self, name: str, event: str = "click") -> dict[str, Any]:
        """What an event of a control calls."""
        target = [self.component(name), event]
        return next(one for one in self.config["dependencies"] if target in one["targets"])

    def join(self, name: str, values: Any, event: str = "click", **changes: Any) -> Any:
        """Begin a call. changes: of what is sent."""
        body = {
            "data": values,
            "fn_index": self.function(name, event)["id"],
            "session_hash": self.session,
            "trigger_id": self.component(name),
            "event_data": None,
        }
        return self.client.post("/ui/gradio_api/queue/join", json=body | changes)

    def messages(self) -> Iterator[dict[str, Any]]:
        """What the queue says, until the last call has ended."""
        url = f"/ui/gradio_api/queue/data?session_hash={self.session}"
        with self.client.stream("GET", url) as got:
            for line in got.iter_lines():
                if line.startswith("data:"):
                    message = json.loads(line[5:])
                    if message["msg"] == "close_stream":
                        return
                    yield message

    def call(self, name: str, data: list[Any], event: str = "click") -> list[Any]:
        """The outputs of a call that is no generator."""
        got = self.join(name, data, event)
        assert got.status_code == 200, got.text
        last = [one for one in self.messages() if one["msg"] == "process_completed"][-1]
        assert last["success"], last
        data_out: list[Any] = last["output"]["data"]
        return data_out

    def defaults(self, name: str = "run") -> list[Any]:
        """The values of a call's inputs as they are at first."""
        held = {one["id"]: one["props"].get("value") for one in self.config["components"]}
        return [held[id] for id in self.function(name)["inputs"]]


def file_data(path: str, **changes: Any) -> dict[str, Any]:
    """A file as Gradio's scripts write it."""
    return {"path": path, "orig_name": "photo.jpg", "meta": {"_type": "gradio.FileData"}} | changes
