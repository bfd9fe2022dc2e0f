"""OpenVINO's module, imported without telling its maker.

`import openvino` reports itself over the network by the package openvino-telemetry, and keeps an identity of
the user in the home folder, unless somebody switched that off. Where that package can't be imported OpenVINO
takes a stub of its own in its place: so it can't, for as long as OpenVINO is imported.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import cast

_TELEMETRY = "openvino_telemetry"


@contextmanager
def _hidden(package: str) -> Iterator[None]:
    """Whoever imports the package gets an ImportError."""
    modules = cast("dict[str, ModuleType | None]", sys.modules)
    before = {name: held for name, held in modules.items() if name.partition(".")[0] == package}
    for name in before:
        del modules[name]
    modules[package] = None
    try:
        yield
    finally:
        del modules[package]
        modules.update(before)


with _hidden(_TELEMETRY):
    import openvino as openvino
