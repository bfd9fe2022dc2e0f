"""How much of pictures is in memory at a time, whatever the number of threads that open them."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

from ritocco import sources
from ritocco.errors import RequestError
from ritocco.pixel_budget import PixelBudget
from ritocco.sources import Loader

PATIENCE = 60.0
GREEN = (0, 128, 0)


def test_who_does_not_fit_waits_and_who_comes_later_too() -> None:
    budget, order = PixelBudget(100), list[str]()
    started, leave = threading.Event(), threading.Event()

    def first() -> None:
        with budget.hold(60):
            started.set()
            leave.wait(PATIENCE)
            order.append("first")

    def second() -> None:
        with budget.hold(60):
            order.append("second")

    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    threads[0].start()
    assert started.wait(PATIENCE)
    with budget.hold(40):  # which fits
        threads[1].start()
        assert order == []
    leave.set()
    for one in threads:
        one.join(PATIENCE)
    assert order == ["first", "second"]


def test_more_than_all_of_it_is_opened_alone() -> None:
    budget = PixelBudget(100)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), budget.hold(1000):
            raise ZeroDivisionError


class Counted(PixelBudget):
    """Says how many pixels are open."""

    def __init__(self) -> None:
        super().__init__(10**6)
        self.held = 0

    @contextmanager
    def hold(self, pixels: int) -> Iterator[None]:
        """See PixelBudget."""
        with super().hold(pixels):
            self.held += pixels
            try:
                yield
            finally:
                self.held -= pixels


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    made = Counted()
    monkeypatch.setattr(sources, "_OPEN", made)
    return made


def saved(picture: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_a_picture_counts_while_it_is_open(kind: str, counted: Counted) -> None:
    content = saved(Image.new("RGB", (60, 50)), kind)
    loader = Loader(allow_local=True)
    with loader.flat(content, field="input.image", ground=GREEN):
        assert counted.held == 3000
    assert counted.held == 0
    with (
        pytest.raises(RequestError),
        loader.flat(content[: len(content) // 2], field="input.image", ground=GREEN),
    ):
        pass
    assert counted.held == 0


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("given", ["RGBA", "LA", "P", "L", "RGB", "CMYK", "1", "I;16"])
def test_strips_make_the_same_picture(given: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = Image.merge("RGBA", [Image.effect_noise((70, 50), 90) for _ in range(4)])
    picture = noise.convert(given) if given != "I;16" else noise.convert("L").convert("I;16")
    if given in ("P", "L", "RGB"):
        picture.info["transparency"] = {"P": bytes(range(256)), "L": 120, "RGB": (120, 120, 120)}[given]
    made = []
    for pixels in (10**6, 300, 1):
        monkeypatch.setattr("ritocco.strips.STRIP_PIXELS", pixels)
        with Loader(allow_local=True).flat(picture, field="input.image", ground=GREEN, mode=mode) as flat:
            assert (flat.mode, flat.size) == (mode, (70, 50))
            made.append(flat.tobytes())
    assert made[0] == made[1] == made[2]


PEAK = """
import re, sys, threading
from PIL import Image
from ritocco import sources
from ritocco.images import load_inputs
from ritocco.pixel_budget import PixelBudget

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) >> 10

sources._OPEN = PixelBudget(1 << 24)
file, before = sys.argv[1], peak()
work = lambda: load_inputs(file, file, width=64, height=64, allow_local=True)
threads = [threading.Thread(target=work) for _ in range(6)]
for one in threads:
    one.start()
for one in threads:
    one.join()
print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's count is Linux's")
def test_many_threads_take_no_more_than_one(tmp_path: Path) -> None:
    Image.new("RGBA", (4096, 4096)).save(tmp_path / "large.png")
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path / "large.png")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=True,
    )
    assert 64 < int(done.stdout) < 250, "in MiB: 8 bytes a pixel are 128; each by itself would take that"
