"""The playground in a real Chromium, as a person uses it: load, paint, run, look; a server of its own."""

from __future__ import annotations

import ast
import io
import re
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from PIL import Image

from page_client import encoded
from ritocco.images import load_inputs
from ritocco_bench.serving import TOKEN, Served, served

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

HEADERS = {"Authorization": f"Bearer {TOKEN}"}
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
SIDE = 128
RED = (200, 40, 40)
PATIENCE_MS = 120_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The server's."""
    return tmp_path_factory.mktemp("ui")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Served]:
    """`ritocco serve --ui` with the embedded model and a token."""
    with served(folder, "--dtype", "float32", "--ui") as made:
        yield made


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A browser with a profile of its own. Where there is none these tests fail, since a skip passes."""
    from playwright import sync_api as playwright

    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.fail("these tests drive a real Chromium: install the system's package `chromium`")
    with playwright.sync_playwright() as driver:
        profile = tmp_path_factory.mktemp("profile")
        made = driver.chromium.launch_persistent_context(
            profile, executable_path=path, args=FLAGS, viewport={"width": 1280, "height": 1400}
        )
        made.set_default_timeout(PATIENCE_MS)
        yield made
        made.close()


class Person:
    """Somebody at the page. elsewhere: URLs that were asked of other hosts. broken: what went wrong in it."""

    def __init__(self, chromium: Any, server: Served) -> None:
        self.page, self.server = chromium.new_page(), server
        self.elsewhere: list[str] = []
        self.broken: list[str] = []
        host = urlsplit(server.url).netloc
        self.page.on("request", lambda asked: self._note(asked.url, host))
        self.page.on("pageerror", lambda error: self.broken.append(str(error)))
        self.page.on("console", self._said)

    def _note(self, url: str, host: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("data", "blob") and parts.netloc != host:
            self.elsewhere.append(url)

    def _said(self, message: Any) -> None:
        if message.type == "error" and "Content Security Policy" in message.text:
            self.broken.append(message.text)

    def enter(self) -> None:
        """Log in where that is asked."""
        self.page.goto(f"{self.server.url}/ui/")
        if self.page.url.endswith("/login"):
            self.page.get_by_label("Token of this server").fill(TOKEN)
            self.page.get_by_role("button", name="Log in").click()
        self.page.get_by_role("button", name="Run").wait_for()

    def load(self, file: Path) -> None:
        """A picture."""
        self.page.locator("#picture input[type=file]").set_input_files(file)
        self.page.locator("#note", has_text=file.name).wait_for()
        self.page.locator("#editor canvas").first.wait_for()
        self.page.wait_for_timeout(1000)  # its canvas grows to the picture, which tells nobody

    def paint(self) -> None:
        """A stroke to and fro, in the middle of the picture."""
        box = self.page.locator("#editor .pixi-target canvas").first.bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        self.page.mouse.move(x - 60, y - 30)
        self.page.mouse.down()
        for down in range(-30, 31, 15):
            for across in (-60, 60):
                self.page.mouse.move(x + across, y + down)
        self.page.mouse.up()

    def load_mask(self, file: Path) -> None:
        """From a file."""
        with self.page.expect_file_chooser() as chosen:
            self.page.get_by_role("button", name="Load mask").click()
        chosen.value.set_files(file)
        self.wait_for("The mask has changed")

    def sees(self, mask: Any) -> None:
        """Until the editor shows a picture all of RED under this mask."""
        shown = None
        for _ in range(PATIENCE_MS // 1000):
            shown = self._shown(*mask.shape)
            if shown is not None and (shown == mask).all():
                return
            self.page.wait_for_timeout(250)  # a canvas tells nobody what it shows
        assert shown is not None, "no picture is seen"
        np.testing.assert_array_equal(shown, mask)

    def _shown(self, height: int, width: int) -> Any:
        """Where the middles of the picture's pixels are under white, as the screen has it."""
        data = self.page.locator("#editor .pixi-target canvas").first.screenshot()
        screen = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
        bare, white = (
            np.abs(screen - colour).max(axis=-1) <= 8 for colour in (RED, 0.7 * 255 + 0.3 * np.array(RED))
        )
        rows, columns = np.nonzero(bare | white)
        if rows.size == 0:
            return None
        top, left = rows.min(), columns.min()
        high, wide = rows.max() + 1 - top, columns.max() + 1 - left
        down = top + ((np.arange(height) + 0.5) * high / height).astype(int)
        across = left + ((np.arange(width) + 0.5) * wide / width).astype(int)
        return white[np.ix_(down, across)]

    def choose(self, name: str, value: str) -> None:
        """One of a list."""
        self.page.locator(f"#{name} input").click()
        self.page.get_by_role("option", name=value, exact=True).click()
        self.page.get_by_role("option").first.wait_for(state="hidden")  # or the next list's are two

    def fill(self, **values: Any) -> None:
        """Numbers and texts."""
        for name, value in values.items():
            box = self.page.locator(f"#{name.replace('_', '-')}").locator(
                "input[type=number], textarea, input"
            )
            box.first.fill(str(value))
            box.first.press("Tab")

    def asks_little(self, **values: Any) -> None:
        """Small and quick."""
        self.choose("width", str(SIDE))
        self.choose("height", str(SIDE))
        self.fill(**({"num_inference_steps": 2} | values))

    def run(self) -> None:
        """And wait for nothing."""
        self.page.get_by_role("button", name="Run").click()

    def wait_for(self, text: str) -> None:
        """Until the line above the pictures says so."""
        said = self.page.locator("#message").locator(".status, .error")
        said.filter(has_text=re.compile(text)).wait_for()

    def pictures(self) -> list[Any]:
        """What the page shows as results: pixels as the browser decodes them, and their alt texts."""
        script = """images => Promise.all(images.map(async image => {
            await image.decode();
            const canvas = document.createElement('canvas');
            canvas.width = image.naturalWidth; canvas.height = image.naturalHeight;
            canvas.getContext('2d').drawImage(image, 0, 0);
            return [canvas.toDataURL('image/png'), image.alt, image.getBoundingClientRect().top];
        }))"""
        return list(self.page.locator("#pictures .result img").evaluate_all(script))

    def api(self, path: str) -> Any:
        """What the server says."""
        return httpx.get(f"{self.server.url}{path}", headers=HEADERS, timeout=60).json()


@pytest.fixture
def person(chromium: Any, server: Served) -> Iterator[Person]:
    made = Person(chromium, server)
    made.enter()
    yield made
    made.page.close()
    assert made.elsewhere == []
    assert made.broken == []


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """128 x 128 pixels of noise in colours, so that every pixel that changes is seen."""
    file = tmp_path / "noise of mine.png"
    file.write_bytes(encoded(np.random.default_rng(8).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)))
    return file


def pixels(uri: str) -> Any:
    import base64

    data = base64.b64decode(uri.partition(",")[2])
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def test_a_person_paints_and_sees_the_hole_changed_and_nothing_else(person: Person, picture: Path) -> None:
    person.load(picture)
    person.paint()
    person.asks_little(prompt="a red heart", seed=5, num_outputs=2)
    person.run()
    person.wait_for("^Done")
    shown = person.pictures()
    assert [alt for _, alt, _ in shown] == [f"Result {n} of 2: a red heart" for n in (1, 2)]
    assert shown[0][2] == shown[1][2], "side by side"
    link = person.page.get_by_role("link", name="Save the mask as mask.png").get_attribute("href")
    mask = pixels(link)[..., 0] > 127
    assert 0.02 < mask.mean() < 0.9
    before = np.asarray(Image.open(picture))
    repaint = load_inputs(picture, Image.fromarray(mask), width=SIDE, height=SIDE, allow_local=True).mask
    for uri, _, _ in shown:
        after = pixels(uri)
        np.testing.assert_array_equal(after[~repaint], before[~repaint])
        assert (after[repaint] != before[repaint]).any(axis=-1).mean() > 0.9
    assert (pixels(shown[0][0])[repaint] != pixels(shown[1][0])[repaint]).any(), "two seeds"
    figures = person.page.locator("#figures").inner_text()
    id = re.search(r"Prediction\s+(\S+)", figures)
    assert id is not None
    held = person.api(f"/v1/predictions/{id[1]}")
    assert held["status"] == "succeeded"
    assert held["input"]["seed"] == 5
    assert "Seed\t5" in figures
    python = person.page.locator("#python .cm-content").inner_text()
    call: Any = ast.parse(python).body[1]
    given = ast.literal_eval(call.value.args[0])
    assert given["image"] == picture.name
    assert (given["seed"], given["width"], given["num_outputs"]) == (5, SIDE, 2)
    assert f"{person.server.url}/v1/predictions" in person.page.locator("#shell .cm-content").inner_text()


def test_mask_tools_do_what_they_say(person: Person, picture: Path, tmp_path: Path) -> None:
    def painted() -> Any:
        """What a run takes as its mask."""
        person.run()
        person.wait_for("^(Done|Canceled)")
        link = person.page.get_by_role("link", name="Save the mask").get_attribute("href")
        return pixels(link)[..., 0] > 127

    def use(name: str) -> None:
        person.page.get_by_role("button", name=name).click()
        person.wait_for("The mask has changed")
        person.page.wait_for_timeout(1000)

    person.load(picture)
    half = np.zeros((SIDE, SIDE), np.uint8)
    half[:, : SIDE // 2] = 255
    file = tmp_path / "half.png"
    file.write_bytes(encoded(half))
    person.load_mask(file)
    person.page.wait_for_timeout(1000)
    person.asks_little(num_inference_steps=1)
    loaded = painted()
    np.testing.assert_array_equal(loaded, half > 0)
    use("Invert mask")
    np.testing.assert_array_equal(painted(), half == 0)
    person.fill(grow_px=4)
    use("Grow mask")
    grown = painted()
    assert grown[:, SIDE // 2 - 4 :].all()
    assert not grown[:, : SIDE // 2 - 4].any()
    use("Clear mask")
    person.run()
    person.wait_for("input.mask is empty")
    assert person.page.locator("#message").get_by_role("alert").count() == 1


@pytest.mark.parametrize("before", [None, (1000, 600)])
def test_a_mask_of_the_servers_is_seen_and_painted_on(
    person: Person, tmp_path: Path, before: tuple[int, int] | None
) -> None:
    """Whatever size the editor's canvas was before."""

    def red(name: str, width: int, height: int) -> Path:
        file = tmp_path / name
        file.write_bytes(encoded(np.full((height, width, 3), RED, np.uint8)))
        return file

    if before is not None:
        person.load(red("before.png", *before))
        person.page.locator("#picture button[aria-label]").first.click()
    person.load(red("small.png", SIDE, SIDE))
    half = np.zeros((SIDE, SIDE), bool)
    half[:, : SIDE // 2] = True
    file = tmp_path / "half.png"
    file.write_bytes(encoded(half))
    person.load_mask(file)
    person.sees(half)
    person.page.get_by_role("button", name="Invert mask").click()
    person.sees(~half)
    person.fill(grow_px=4)
    person.page.get_by_role("button", name="Grow mask").click()
    grown = ~half
    grown[:, SIDE // 2 - 4 :] = True
    person.sees(grown)
    person.paint()
    person.asks_little(num_inference_steps=1)
    person.run()
    person.wait_for("^Done")
    link = person.page.get_by_role("link", name="Save the mask").get_attribute("href")
    both = pixels(link)[..., 0] > 127
    assert both[grown].all(), "a stroke leaves what was there"
    assert both[~grown].any()


def test_a_picture_that_is_gone_is_missed_in_words(person: Person, picture: Path, folder: Path) -> None:
    """As where a balancer sends somebody to another server."""
    person.load(picture)
    for file in (folder / "data" / "ui").rglob("*.png"):
        file.unlink()
    person.run()
    words = person.page.get_by_text("The file is not at this server any more, or never was")
    words.wait_for()
    assert words.is_visible()


def test_errors_are_shown_as_errors(person: Person, picture: Path, tmp_path: Path) -> None:
    person.run()
    person.wait_for("input.image is missing; load a picture")
    alert = person.page.locator("#message").get_by_role("alert")
    assert alert.is_visible()
    person.load(picture)
    person.paint()
    person.asks_little(seed="seven")
    person.run()
    person.wait_for("input.seed is 'seven'; it must be a whole number, or empty")
    assert alert.is_visible()
    person.fill(seed="7")
    person.run()
    person.wait_for("^Done")
    assert alert.count() == 0
    broken = tmp_path / "broken.png"
    broken.write_bytes(picture.read_bytes()[:200])
    person.page.locator("#picture button[aria-label]").first.click()
    person.page.locator("#picture input[type=file]").set_input_files(broken)
    person.wait_for("is a damaged or truncated PNG file")


def a_long_run(person: Person, picture: Path) -> str:
    """Begins one, and waits until it goes on with previews: its id."""
    person.load(picture)
    person.paint()
    person.asks_little(num_inference_steps=500)
    person.run()
    person.wait_for("Step [0-9]+ of 500")
    preview = person.page.locator("#pictures .preview img").first
    preview.wait_for()
    assert preview.get_attribute("alt") == "Preview of picture 1 of 1"
    assert preview.evaluate("image => [image.naturalWidth, image.naturalHeight]") == [SIDE // 8, SIDE // 8]
    return str(person.api("/v1/predictions")["results"][0]["id"])


def ended(person: Person, id: str) -> Any:
    """Once it has: its stream ends with it."""
    held = person.api(f"/v1/predictions/{id}")
    httpx.get(held["urls"]["stream"], timeout=300)
    return person.api(f"/v1/predictions/{id}")


def test_cancel_ends_the_run_on_the_server(person: Person, picture: Path) -> None:
    id = a_long_run(person, picture)
    person.page.get_by_role("button", name="Cancel").click()
    person.wait_for("^Canceled")
    assert ended(person, id)["status"] == "canceled"


def test_a_closed_tab_ends_its_run(chromium: Any, server: Served, picture: Path) -> None:
    person = Person(chromium, server)
    person.enter()
    id = a_long_run(person, picture)
    person.page.close()
    assert ended(person, id)["status"] == "canceled"


def test_the_page_needs_a_token_and_lets_go_of_it(chromium: Any, server: Served) -> None:
    person = Person(chromium, server)
    chromium.clear_cookies()
    person.page.goto(f"{server.url}/ui/")
    assert person.page.url == f"{server.url}/ui/login"
    person.page.get_by_label("Token of this server").fill("x" * 30)
    person.page.get_by_role("button", name="Log in").click()
    person.page.get_by_role("alert").get_by_text("That is no token of this server.").wait_for()
    person.enter()
    (cookie,) = chromium.cookies()
    assert (cookie["httpOnly"], cookie["sameSite"], cookie["path"]) == (True, "Strict", "/ui")
    assert TOKEN not in cookie["value"]
    assert person.page.evaluate("fetch('/v1/predictions').then(answer => answer.status)") == 401
    person.page.get_by_role("button", name="Log out").click()
    person.page.get_by_label("Token of this server").wait_for()
    assert person.page.goto(f"{server.url}/ui/config").status == 401
    assert chromium.cookies() == []
    person.page.close()


def test_everything_is_named_and_reached_by_keyboard(person: Person, picture: Path) -> None:
    page = person.page
    assert page.locator("html").get_attribute("lang") == "en"
    assert page.title() == "ritocco"
    for label in ("Prompt", "Negative prompt", "Width", "Height", "Seed", "Disable safety checker"):
        assert page.get_by_label(label, exact=False).count() >= 1, label
    person.load(picture)
    reached: set[str] = set()
    page.locator("body").press("Home")
    for _ in range(80):
        page.keyboard.press("Tab")
        name = page.evaluate(
            "(e => e.getAttribute('aria-label') || e.innerText || '')(document.activeElement)"
        )
        reached |= {str(name).split("\n")[0].strip()}
    assert {
        "Invert mask",
        "Clear mask",
        "Grow mask",
        "Load mask",
        "Run",
        "Cancel",
        "Brush",
        "Erase",
    } <= reached


def test_the_rules_of_accessibility_hold(person: Person, picture: Path) -> None:
    """Axe's, before a run and after it."""
    from axe_playwright_python.sync_playwright import Axe

    def broken() -> list[tuple[str, list[str]]]:
        found = Axe().run(person.page).response
        assert len(found["passes"]) > 20
        return [(one["id"], [node["html"][:200] for node in one["nodes"]]) for one in found["violations"]]

    assert broken() == []
    person.load(picture)
    person.paint()
    person.asks_little()
    person.run()
    person.wait_for("^Done")
    assert broken() == []


def test_it_ends_at_sigterm_with_a_page_open(chromium: Any, tmp_path: Path) -> None:
    with ExitStack() as stack:
        server = stack.enter_context(served(tmp_path / "one", "--dtype", "float32", "--ui", "--grace", "0"))
        person = Person(chromium, server)
        person.enter()
        begun = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) in (0, 143, -signal.SIGTERM)
        assert time.monotonic() - begun < 60
        server.close()
        assert not any(TOKEN in line for line in server.log)
        person.page.close()
