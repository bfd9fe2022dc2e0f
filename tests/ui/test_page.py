"""The page's calls, from upload to result, by the routes that its own scripts use."""

from __future__ import annotations

import asyncio
import html
import io
import json
import re
from contextlib import aclosing
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hand_batcher import HandBatcher
from page_client import TOKEN, Browser, Make, encoded, file_data
from ritocco.errors import TimeLimitError
from ritocco.images import data_uri
from ritocco.schema import Options, PredictionInput
from ritocco.server.database import AwayError
from ritocco.sources import Loader, decode_data_uri
from ritocco.ui import masks
from ritocco.ui.fields import fields_of
from ritocco.ui.runs import Runs

INPUTS, OPTIONS = fields_of(PredictionInput), fields_of(Options)
NOTHING: dict[str, Any] = {"background": None, "layers": [], "composite": None, "id": None}


def layer(width: int = 200, height: int = 120) -> bytes:
    mask = np.zeros((height, width), bool)
    mask[20:60, 40:100] = True
    file = io.BytesIO()
    masks.layer_of(mask).save(file, "PNG")
    return file.getvalue()


def asked(browser: Browser, photo: bytes, *, painted: bool = True, **values: Any) -> list[Any]:
    """The inputs of a run."""
    given = browser.defaults()
    given[0] = file_data(browser.upload(photo))
    given[1] = browser.paint(layer()) if painted else NOTHING
    ids = browser.function("run")["inputs"]
    for name, value in values.items():
        given[ids.index(browser.component(name.replace("_", "-")))] = value
    return given


def outputs(browser: Browser, data: list[Any]) -> dict[str, str]:
    """What was shown at last."""
    names = ("message", "pictures", "figures", "log", "mask", "python", "curl")
    shown = dict.fromkeys(names, "")
    held: list[Any] = [None] * len(names)
    assert browser.join("run", data).status_code == 200
    for message in browser.messages():
        if message["msg"] in ("process_generating", "process_completed"):
            assert message["success"], message
            for place, value in enumerate(message["output"]["data"]):
                if isinstance(value, list):  # a difference to what was shown before
                    for act, path, changed in value:
                        assert path == []
                        held[place] = changed if act == "replace" else held[place] + changed
                elif not isinstance(value, dict):
                    held[place] = value
    return shown | {name: str(value) for name, value in zip(names, held, strict=True) if value is not None}


def mask_of(client: Any, edited: dict[str, Any]) -> Any:
    """The mask that an editor's value shows."""
    (one,) = edited["layers"]
    data = client.get(one["url"].removeprefix("http://localhost")).content
    return masks.from_layers([data], loader=Loader(allow_local=True))


def test_a_picture_comes_with_its_size(make: Make, photo: bytes) -> None:
    client = make()
    browser = Browser(client)
    edited, width, height, note, _ = browser.call("picture", [file_data(browser.upload(photo))], "change")
    assert (width, height) == (192, 128)
    assert "photo.jpg has 200 x 120 pixels; it is resized to 192 x 128, which makes it 10% narrower" in note
    shown = Image.open(
        io.BytesIO(client.get(edited["background"]["url"].removeprefix("http://localhost")).content)
    )
    assert shown.size == (200, 120), "as it is, since it is not large"
    assert edited["layers"] == []
    none = browser.call("picture", [None], "change")
    assert none[:4] == [None, 512, 512, ""]
    large = encoded(np.zeros((600, 2400, 3), np.uint8))
    edited, width, height, note, _ = browser.call(
        "picture", [file_data(browser.upload(large, "a.png"))], "change"
    )
    assert (width, height) == (1024, 256)
    assert "nothing is cropped" not in note, "its proportions are kept"
    shown = Image.open(
        io.BytesIO(client.get(edited["background"]["url"].removeprefix("http://localhost")).content)
    )
    assert shown.size == (1024, 256)


def test_a_turned_picture_is_shown_upright(make: Make) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    browser = Browser(make())
    turned = encoded(np.zeros((64, 128, 3), np.uint8), "JPEG", exif=exif)
    _, width, height, note, _ = browser.call("picture", [file_data(browser.upload(turned))], "change")
    assert (width, height) == (64, 128)
    assert "64 x 128 pixels, and is painted at that size" in note


def test_another_size_is_noted(make: Make, photo: bytes) -> None:
    browser = Browser(make())
    file = file_data(browser.upload(photo))
    note, _ = browser.call("width", [file, 512, 128], "input")
    assert "resized to 512 x 128, which makes it 140% wider" in note


def test_mask_tools(make: Make, photo: bytes) -> None:
    client = make()
    browser = Browser(client)
    file, mask = file_data(browser.upload(photo)), np.zeros((120, 200), bool)
    mask[20:60, 40:100] = True
    inverted = browser.call("invert", [file, browser.paint(layer())])[0]
    np.testing.assert_array_equal(mask_of(client, inverted), ~mask)
    again = browser.call("invert", [file, inverted | {"composite": None}])[0]
    np.testing.assert_array_equal(mask_of(client, again), mask)
    grown = browser.call("grow", [file, again, 9])[0]
    np.testing.assert_array_equal(mask_of(client, grown), masks.grown(mask, 9))
    assert browser.call("clear", [file])[0]["layers"] == []
    whole = browser.call("invert", [file, NOTHING])[0]
    assert mask_of(client, whole).all(), "of no mask all is"
    half = np.zeros((60, 100), np.uint8)
    half[:, 50:] = 255
    loaded = browser.call(
        "load", [file, NOTHING, file_data(browser.upload(encoded(half), "m.png"))], "upload"
    )[0]
    found = mask_of(client, loaded)
    assert found[:, 100:].all()
    assert not found[:, :100].any()


@pytest.mark.parametrize(
    ("name", "event", "data"),
    [
        ("invert", "click", [None, NOTHING]),
        ("clear", "click", [None]),
        ("grow", "click", [None, NOTHING, 8]),
        ("load", "upload", [None, NOTHING, None]),
    ],
)
def test_tools_without_a_picture_say_so(make: Make, name: str, event: str, data: list[Any]) -> None:
    _, message = Browser(make()).call(name, data, event)
    assert 'role="alert"' in message
    assert "input.image is missing; load a picture first" in message


def test_what_is_no_picture_is_an_error_in_words(make: Make) -> None:
    browser = Browser(make())
    message = browser.call("picture", [file_data(browser.upload(b"hello", "x.png"))], "change")[-1]
    assert 'role="alert"' in message
    assert "the content of 5 bytes is none of the formats that are read" in message
    assert "/" not in message.partition("<p>")[2].partition("</p>")[0], "no path of the server's"


def test_a_run_is_a_prediction_of_the_servers(make: Make, batcher: HandBatcher, photo: bytes) -> None:
    client = make()
    browser = Browser(client)
    data = asked(browser, photo, prompt="a <b>cat</b>", num_outputs=2, seed="18446744073709551615")
    shown = outputs(browser, data)
    assert "Done" in shown["message"]
    (run,) = batcher.seen
    assert decode_data_uri(run.input["image"])[1] == photo, "as it was uploaded, to the last byte"
    mask = np.asarray(Image.open(io.BytesIO(decode_data_uri(run.input["mask"])[1])))
    assert mask.dtype == bool
    assert (mask.shape, int(mask.sum())) == ((120, 200), 40 * 60)
    values = {name: value for name, value in run.input.items() if name not in ("image", "mask")}
    defaults = PredictionInput(image="data:,", mask="data:,")
    assert values == {
        "prompt": "a <b>cat</b>",
        "negative_prompt": None,
        "width": defaults.width,
        "height": defaults.height,
        "num_outputs": 2,
        "num_inference_steps": defaults.num_inference_steps,
        "guidance_scale": defaults.guidance_scale,
        "scheduler": defaults.scheduler,
        "seed": 2**64 - 1,
        "disable_safety_checker": False,
    }
    listed = client.get("/v1/predictions").json()["results"]
    assert [one["id"] for one in listed] == [run.id]
    assert run.id in shown["figures"]
    assert listed[0]["urls"]["get"] == f"http://localhost/v1/predictions/{run.id}"
    images = re.findall(r'<img src="([^"]*)" alt="([^"]*)">', shown["pictures"])
    assert [html.unescape(alt) for _, alt in images] == [f"Result {n} of 2: a <b>cat</b>" for n in (1, 2)]
    for url, _ in images:
        assert client.get(f"/ui/{url}").content.startswith(b"\x89PNG")
    assert "<b>cat" not in shown["pictures"]
    assert "'prompt': 'a <b>cat</b>'" in shown["python"]
    assert "'seed': 7," in shown["python"], "the one that was used"
    assert "'image': 'photo.jpg'" in shown["python"]
    assert "http://localhost/v1/predictions" in shown["curl"]
    assert shown["log"].startswith("Using seed: 7\n")
    link = re.search(r'download="mask.png" href="(data:[^"]*)"', shown["mask"])
    assert link is not None
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(decode_data_uri(link[1])[1]))), mask)


def test_what_is_ours_goes_where_it_belongs(make: Make, batcher: HandBatcher, photo: bytes) -> None:
    browser = Browser(make())
    shown = outputs(browser, asked(browser, photo, strength=0.5, output_format="webp"))
    assert batcher.seen[0].input["ritocco"] == {"output_format": "webp", "strength": 0.5}
    assert "strength=0.5," in shown["python"]
    assert '"ritocco": {' in shown["curl"]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_inference_steps": 0}, "- input.num_inference_steps: Must be greater than or equal to 1"),
        ({"guidance_scale": 21}, "- input.guidance_scale: Must be less than or equal to 20"),
        ({"seed": "x"}, "input.seed is 'x'; it must be a whole number, or empty"),
        ({"seed": str(2**64)}, "- input.seed: Must be less than or equal to"),
        ({"strength": 0}, "Must be greater than 0"),
        ({"painted": False}, "input.mask is empty; paint over what is to change"),
    ],
)
def test_what_the_schema_refuses_is_an_error_in_its_words(
    make: Make, batcher: HandBatcher, photo: bytes, values: dict[str, Any], words: str
) -> None:
    browser = Browser(make())
    shown = outputs(browser, asked(browser, photo, **values))
    assert 'role="alert"' in shown["message"]
    assert words in html.unescape(shown["message"])
    assert not batcher.seen


ODD: list[Any] = [
    "abc",
    "",
    "9" * 5000,
    "\x00",
    "<b>",
    [1],
    [[[]]],
    {"a": 1},
    -1,
    0.5,
    1e308,
    10**30,
    10**400,
]


VALID = [("seed", ""), ("seed", -1), ("mask_feather", 0.5), ("strength", 0.5)]


@pytest.mark.parametrize("name", [field.name for field in (*INPUTS, *OPTIONS) if field.kind != "text"])
def test_odd_values_of_a_control_meet_its_rule(
    make: Make, batcher: HandBatcher, photo: bytes, name: str
) -> None:
    browser = Browser(make())
    data = asked(browser, photo)
    place = browser.function("run")["inputs"].index(browser.component(name.replace("_", "-")))
    for odd in ODD:
        data[place] = odd
        seen = len(batcher.seen)
        message = outputs(browser, data)["message"]
        if len(batcher.seen) > seen:
            assert (name, odd) in VALID
            continue
        text = html.unescape(message)
        assert "Input validation failed" in text, (odd, text)
        assert f".{name}" in text, (odd, text)


@pytest.mark.parametrize("odd", [*ODD, None], ids=lambda odd: repr(odd)[:20])
def test_odd_values_of_the_tools_meet_their_rules(make: Make, photo: bytes, odd: Any) -> None:
    browser = Browser(make())
    file = file_data(browser.upload(photo))
    for name in ("width", "height"):
        sides = {"width": 128, "height": 128} | {name: odd}
        *_, message = browser.call(name, [file, *sides.values()], "input")
        if odd is not None:  # which is the default
            assert f"- input.{name}: " in html.unescape(str(message)), message
    message = browser.call("grow", [file, browser.paint(layer()), odd])[-1]
    if odd != 0.5:
        assert re.search(r"grow is .*; it must be 0 to 128 pixels", html.unescape(str(message))), message
    for name, event, data, label in (
        ("picture", "change", [odd], "Picture"),
        ("clear", "click", [odd], "Picture"),
        ("invert", "click", [file, odd], "Mask: white is repainted"),
        ("load", "upload", [file, NOTHING, odd], "Load mask"),
    ):
        got = browser.join(name, data, event)
        if odd is None or (name, odd) == ("invert", {"a": 1}):
            assert got.status_code == 200
        else:
            assert got.status_code == 400
            assert got.json()["detail"].startswith(f"{label} is ")
            assert got.json()["detail"].endswith("; it must be what was uploaded to this page")


def test_more_layers_than_an_editor_has_are_refused(make: Make, photo: bytes) -> None:
    browser = Browser(make())
    file = file_data(browser.upload(photo))
    message = browser.call("invert", [file, browser.paint(*[layer()] * 5)])[-1]
    assert "input.mask has 5 layers; at most 4 are read" in message


def test_pictures_are_read_beside_the_event_loop(
    make: Make, photo: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Megabytes of them would hold up whoever else asks."""
    on_loop: list[bool] = []

    def noted(call: Any) -> Any:
        def called(*values: Any, **named: Any) -> Any:
            on_loop.append(asyncio._get_running_loop() is not None)
            return call(*values, **named)

        return called

    monkeypatch.setattr("ritocco.ui.actions.data_uri", noted(data_uri))
    monkeypatch.setattr(masks, "from_layers", noted(masks.from_layers))
    monkeypatch.setattr(masks, "png_of", noted(masks.png_of))
    browser = Browser(make())
    assert "Done" in outputs(browser, asked(browser, photo))["message"]
    assert on_loop == [False] * 4, "layers, mask, and two inputs"


def test_a_run_outlives_an_outage_of_the_database(
    make: Make, batcher: HandBatcher, photo: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = make(by_itself=False)
    app: Any = client.app
    kind = type(app.state.shared.store)
    asked_for: list[str] = []
    there = kind.get

    def away(store: Any, id: str, *, brief: bool = False) -> Any:
        if brief and len(asked_for) < 3:
            asked_for.append(id)
            if len(asked_for) == 3:
                run.succeed()
            raise AwayError("the connection was lost")
        return there(store, id, brief=brief)

    monkeypatch.setattr("ritocco.ui.runs.BEAT_S", 0.01)
    browser = Browser(client)
    assert browser.join("run", asked(browser, photo)).status_code == 200
    run = batcher.next()
    run.step(1, 4)
    monkeypatch.setattr(kind, "get", away)
    texts = json.dumps(list(browser.messages()))
    assert asked_for == [run.id] * 3
    assert "Done" in texts
    assert not run.canceled
    assert "Database away" not in texts
    assert client.get(f"/v1/predictions/{run.id}").json()["status"] == "succeeded"


def test_without_a_picture_nothing_runs(make: Make, batcher: HandBatcher) -> None:
    browser = Browser(make())
    shown = outputs(browser, browser.defaults())
    assert "input.image is missing; load a picture" in shown["message"]
    assert not batcher.seen


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("NSFW content detected", "NSFW content detected"),
        (
            TimeLimitError("not done within the time limit of 5 seconds"),
            "not done within the time limit of 5",
        ),
        (RuntimeError("/secret/path <script>"), "Internal error; the server's log has more"),
    ],
)
def test_a_failed_prediction_is_shown_as_one(
    make: Make, batcher: HandBatcher, photo: bytes, error: Any, words: str
) -> None:
    browser = Browser(make(by_itself=False))
    data = asked(browser, photo)
    assert browser.join("run", data).status_code == 200
    run = batcher.next()
    run.step(1, 2)
    run.fail(error)
    last = [one for one in browser.messages() if one["msg"] == "process_completed"][-1]
    text = html.unescape(json.dumps(last["output"]["data"]))
    if words not in text:  # the last message may say that nothing has changed since
        listed = browser.client.get("/v1/predictions").json()["results"][0]
        text = f"{listed['error']}"
    assert words in text
    assert "/secret" not in text


def test_a_full_queue_is_told(make: Make, batcher: HandBatcher, photo: bytes) -> None:
    client = make(by_itself=False, waiting=1)
    browser, second = Browser(client, "first"), Browser(client, "second")
    assert browser.join("run", asked(browser, photo)).status_code == 200
    run = batcher.next()
    shown = outputs(second, asked(second, photo))
    assert "Too many requests" in shown["message"]
    run.succeed()
    assert len(batcher.seen) == 1


def test_limits_are_the_apis(make: Make, batcher: HandBatcher, photo: bytes) -> None:
    browser = Browser(make(max_work=1000))
    assert (
        "it must be less than or equal to 1000 on this server"
        in outputs(browser, asked(browser, photo))["message"]
    )
    assert not batcher.seen


def test_cancel_ends_the_prediction_of_its_page(make: Make, batcher: HandBatcher, photo: bytes) -> None:
    client = make(by_itself=False)
    browser, other = Browser(client, "first"), Browser(client, "second")
    assert browser.join("run", asked(browser, photo)).status_code == 200
    run = batcher.next()
    run.step(1, 4)
    other.call("cancel", [])
    assert not run.canceled, "it is another page's"
    texts = ""
    for message in browser.messages():
        texts += json.dumps(message)
        if "Step 1 of 4" in texts and "Canceled" not in texts:
            assert browser.join("cancel", []).status_code == 200
    assert "Canceled" in texts
    assert run.canceled
    assert client.get(f"/v1/predictions/{run.id}").json()["status"] == "canceled"


def test_whoever_stops_watching_cancels(make: Make, batcher: HandBatcher) -> None:
    """As Gradio does where a page is closed: the generator is."""
    client = make(by_itself=False)
    app: Any = client.app
    runs = Runs(app.state.shared)
    picture = "data:image/png;base64,eA=="

    async def leave() -> str:
        async with aclosing(
            runs.follow({"image": picture, "mask": picture}, base="http://x/v1", page="p")
        ) as course:  # type: ignore[type-var]
            return (await anext(course)).id

    id = asyncio.run(leave())
    assert client.get(f"/v1/predictions/{id}").json()["status"] == "canceled"
    assert not runs._of_page


def test_a_stopping_server_says_so(make: Make, batcher: HandBatcher, photo: bytes) -> None:
    client = make(by_itself=False)
    browser = Browser(client)
    data = asked(browser, photo)
    assert browser.join("run", data).status_code == 200
    batcher.next()
    app: Any = client.app
    app.begin_stop()
    assert "It runs this prediction after its next start" in json.dumps(list(browser.messages()))
    assert client.get("/v1/predictions").json()["results"][0]["status"] == "starting"
    assert "Stopping" in outputs(browser, asked(browser, photo))["message"]


def test_previews_are_shown_as_they_come(make: Make, batcher: HandBatcher, photo: bytes) -> None:
    browser = Browser(make(by_itself=False))
    assert browser.join("run", asked(browser, photo)).status_code == 200
    run = batcher.next()
    seen = np.full((1, 4, 6, 3), 200, np.uint8)
    run.preview = SimpleNamespace(pictures=lambda: seen)
    run.step(1, 2)
    for message in browser.messages():
        text = json.dumps(message)
        if "Preview of picture 1 of 1" in text and not run.done():
            run.succeed()
    assert run.done()


def test_behind_a_token_the_command_has_one(make: Make, photo: bytes) -> None:
    client = make(tokens=[TOKEN], public_url="https://paint.example/tools")
    client.headers["Authorization"] = f"Bearer {TOKEN}"
    browser = Browser(client)
    shown = outputs(browser, asked(browser, photo))
    assert "Authorization: Bearer $RITOCCO_TOKEN" in shown["curl"]
    assert "https://paint.example/tools/v1/predictions" in shown["curl"]
    assert TOKEN not in json.dumps(shown)
    page = client.get("/ui/").text
    assert "Log out" in page
    assert '"root":"https://paint.example/tools/ui"' in page
