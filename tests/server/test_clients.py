"""The original's own clients, as they are, against `ritocco serve`: each in an environment of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import venv
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from ritocco.prediction import MODEL, VERSION
from ritocco_bench.serving import TOKEN, Served, served
from webhook_receiver import Receiver, receiving

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

PYTHON_1 = """
import json, os, sys
import replicate
from replicate.exceptions import ModelError, ReplicateError
from replicate.webhook import Webhooks, WebhookSigningSecret

MODEL, VERSION, image, mask, hook = sys.argv[1:6]
LONG = 60
small = {"width": 64, "height": 64, "num_inference_steps": 3, "seed": 7}
found = {}
def given(**more):
    return {"image": open(image, "rb"), "mask": open(mask, "rb"), **small, **more}

pictures = replicate.run(f"{MODEL}:{VERSION}", input=given(num_outputs=2))
found["by version"] = [type(one).__name__ for one in pictures]
found["read"] = pictures[0].read()[:4].hex()
found["by model"] = [type(one).__name__ for one in replicate.run(MODEL, input=given())]
pictures = replicate.run(MODEL, input=given(num_inference_steps=LONG), wait=1)
found["outlasts the wait"] = [type(one).__name__ for one in pictures]
with open(image, "rb") as one, open(mask, "rb") as two:
    asked = {"image": one, "mask": two, **small}
    as_data = replicate.run(MODEL, input=asked, file_encoding_strategy="base64")
found["data URIs"] = [type(one).__name__ for one in as_data]
made = replicate.predictions.create(version=VERSION, input=given(num_inference_steps=LONG))
made.cancel()
found["canceled"] = made.status
made.reload()
found["still canceled"] = made.status
try:
    replicate.run(MODEL, input=given(image="http://10.1.2.3/image.png"))
except ModelError as error:
    found["failed"] = (error.prediction.status, str(error))
try:
    replicate.run(MODEL, input=given(num_inference_steps=501))
except ReplicateError as error:
    found["refused"] = (error.status, error.title, error.detail)
found["list"] = [one.id for one in replicate.predictions.list().results]
last = replicate.predictions.get(found["list"][-1])
found["progress"] = (last.progress.percentage, last.progress.current, last.progress.total)
found["stream"] = [event.event.value for event in made.stream()]
found["model"] = replicate.models.get(MODEL).name
found["version"] = replicate.models.get(MODEL).versions.get(VERSION).id
upload = replicate.files.create(image, metadata={"a": 1})
found["file"] = (upload.metadata, replicate.files.get(upload.id).size == os.path.getsize(image))
replicate.files.delete(upload.id)
found["deleted"] = upload.id not in [one.id for one in replicate.files.list()]
events = {"webhook": hook, "webhook_events_filter": ["completed"]}
done = replicate.predictions.create(version=VERSION, input=given(), **events)
done.wait()
found["hooked"] = done.id
found["secret"] = replicate.webhooks.default.secret().key
try:
    replicate.Client(api_token="wrong-horse-battery-staple").predictions.list()
except ReplicateError as error:
    found["no token"] = (error.status, error.title)
print(json.dumps(found))
"""
PYTHON_1_VERIFY = """
import json, sys
from replicate.webhook import Webhooks, WebhookSigningSecret
headers, body, secret = json.load(sys.stdin)
Webhooks.validate(headers=headers, body=body, secret=WebhookSigningSecret(key=secret))
try:
    Webhooks.validate(headers=headers, body=body + " ", secret=WebhookSigningSecret(key=secret))
except Exception:
    print("true")
"""
PYTHON_2 = """
import json, sys
import replicate
from replicate import Replicate
from replicate.exceptions import ModelError

MODEL, VERSION, image, mask, hook = sys.argv[1:6]
LONG = 60
client = Replicate()
small = {"width": 64, "height": 64, "num_inference_steps": 3, "seed": 7}
found = {}
def given(**more):
    return {"image": open(image, "rb"), "mask": open(mask, "rb"), **small, **more}

pictures = client.run(f"{MODEL}:{VERSION}", input=given(num_outputs=2))
found["by version"] = [type(one).__name__ for one in pictures]
found["read"] = pictures[0].read()[:4].hex()
found["by model"] = [type(one).__name__ for one in client.run(MODEL, input=given())]
pictures = client.run(MODEL, wait=1, input=given(num_inference_steps=LONG))
found["outlasts the wait"] = [type(one).__name__ for one in pictures]
paint = replicate.use(MODEL)
found["use"] = [one.partition(",")[0] for one in paint(prompt="a cat", **given(num_outputs=2))]
made = client.predictions.create(version=VERSION, input=given(num_inference_steps=LONG))
found["canceled"] = client.predictions.cancel(prediction_id=made.id).status
found["still canceled"] = client.predictions.get(prediction_id=made.id).status
try:
    client.run(MODEL, input=given(image="http://10.1.2.3/image.png"))
except ModelError as error:
    found["failed"] = (error.prediction.status, str(error.prediction.error))
try:
    client.run(MODEL, input=given(num_inference_steps=501))
except replicate.UnprocessableEntityError as error:
    found["refused"] = (error.status_code, error.body["title"], error.body["detail"])
found["list"] = [one.id for one in client.predictions.list()]
found["model"] = client.models.get(model_owner=MODEL.split("/")[0], model_name=MODEL.split("/")[1]).name
found["secret"] = client.webhooks.default.secret.get().key
try:
    Replicate(bearer_token="wrong-horse-battery-staple").predictions.list()
except replicate.AuthenticationError as error:
    found["no token"] = (error.status_code, error.body["title"])
print(json.dumps(found))
"""
JAVASCRIPT = """
const Replicate = require("replicate");
const fs = require("fs");
const LONG = 60;
const [MODEL, VERSION, image, mask, hook, url] = process.argv.slice(2);
const replicate = new Replicate({ auth: process.env.REPLICATE_API_TOKEN, baseUrl: `${url}/v1` });
const small = { width: 64, height: 64, num_inference_steps: 3, seed: 7 };
const given = (more) => ({ image: fs.readFileSync(image), mask: fs.readFileSync(mask), ...small, ...more });
const kinds = (output) => output.map((one) => one.constructor.name);
async function main() {
  const found = {}, long = { num_inference_steps: LONG };
  const pictures = await replicate.run(`${MODEL}:${VERSION}`, { input: given({ num_outputs: 2 }) });
  found["by version"] = kinds(pictures);
  found["read"] = Buffer.from(await (await pictures[0].blob()).arrayBuffer()).subarray(0, 4).toString("hex");
  found["by model"] = kinds(await replicate.run(MODEL, { input: given() }));
  found["outlasts the wait"] = kinds(
    await replicate.run(MODEL, { input: given(long), wait: { mode: "block", timeout: 1 } }));
  const seen = [];
  const poll = { mode: "poll", interval: 20 };
  await replicate.run(MODEL, { input: given(), wait: poll }, (one) => seen.push(one.status));
  found["polled"] = [seen[0], seen[seen.length - 1]];
  const made = await replicate.predictions.create({ version: VERSION, input: given(long) });
  found["canceled"] = (await replicate.predictions.cancel(made.id)).status;
  found["still canceled"] = (await replicate.predictions.get(made.id)).status;
  try {
    await replicate.run(MODEL, { input: given({ image: "http://10.1.2.3/image.png" }) });
  } catch (error) { found["failed"] = error.message; }
  try {
    await replicate.run(MODEL, { input: given({ num_inference_steps: 501 }) });
  } catch (error) { found["refused"] = [error.response.status, error.message]; }
  found["list"] = (await replicate.predictions.list()).results.map((one) => one.id);
  found["pages"] = 0;
  for await (const page of replicate.paginate(replicate.predictions.list)) found["pages"] += page.length;
  found["model"] = (await replicate.models.get(...MODEL.split("/"))).name;
  found["version"] = (await replicate.models.versions.get(...MODEL.split("/"), VERSION)).id;
  const upload = await replicate.files.create(fs.readFileSync(image), { a: 1 });
  const uploads = (await replicate.files.list()).results;
  found["file"] = [upload.metadata, uploads.some((one) => one.id === upload.id)];
  found["deleted"] = await replicate.files.delete(upload.id);
  found["stream"] = [];
  for await (const event of replicate.stream(MODEL, { input: given() })) found["stream"].push(event.event);
  let done = await replicate.predictions.create(
    { version: VERSION, input: given(), webhook: hook, webhook_events_filter: ["completed"] });
  done = await replicate.wait(done);
  found["hooked"] = done.id;
  found["secret"] = (await replicate.webhooks.default.secret.get()).key;
  const stranger = new Replicate({ auth: "wrong-horse-battery-staple", baseUrl: `${url}/v1` });
  try { await stranger.predictions.list(); } catch (error) { found["no token"] = error.response.status; }
  console.log(JSON.stringify(found));
}
main();
"""
JAVASCRIPT_VERIFY = """
const { validateWebhook } = require("replicate");
const [headers, body, secret] = JSON.parse(require("fs").readFileSync(0, "utf8"));
(async () => {
  const right = await validateWebhook({ headers, body }, secret);
  const wrong = await validateWebhook({ headers, body: body + " " }, secret);
  console.log(JSON.stringify(right && !wrong));
})();
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Webhooks may go to this machine, and to nothing else of its networks."""
    with served(tmp_path_factory.mktemp("server"), "--allow-network", "127.0.0.0/8") as made:
        yield made


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as made:
        yield made


def python_with(home: Path, package: str) -> str:
    venv.create(home, with_pip=True)
    python = str(home / "bin" / "python")
    subprocess.run((python, "-m", "pip", "install", "-q", "--disable-pip-version-check", package), check=True)
    return python


def run(command: list[str], server: Served, receiver: Receiver, base: str, cwd: Path) -> dict[str, Any]:
    """What a client's script found."""
    assets = files("ritocco") / "assets"
    arguments = [MODEL, VERSION, str(assets / "coffee.jpg"), str(assets / "coffee-mask.png"), receiver.url]
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env |= {"REPLICATE_API_TOKEN": TOKEN, "REPLICATE_BASE_URL": base}
    done = subprocess.run(
        [*command, *arguments, server.url],
        env=env,
        cwd=cwd,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:] + "".join(server.log[-20:])
    return dict(json.loads(done.stdout))


def check(found: dict[str, Any], output: str) -> None:
    """What all clients have to find."""
    assert found["by version"] == [output] * 2
    assert found["read"] == b"\x89PNG".hex()
    assert found["by model"] == found["outlasts the wait"] == [output]
    assert (found["canceled"], found["still canceled"]) == ("canceled", "canceled")
    assert "10.1.2.3, which is not a public address" in str(found["failed"])
    assert "Must be less than or equal to 500" in str(found["refused"])
    assert "422" in str(found["refused"])
    assert len(found["list"]) >= 5
    assert found["model"] == MODEL.split("/")[1]
    assert "401" in str(found["no token"])


def verified(command: list[str], receiver: Receiver, found: dict[str, Any], cwd: Path) -> None:
    """The client's own check of a webhook that it asked for."""
    headers, body = receiver.got.get(timeout=60)
    held = json.loads(body)
    assert (held["id"], held["status"]) == (found["hooked"], "succeeded")
    given = json.dumps([headers, body.decode("utf-8"), found["secret"]])
    done = subprocess.run(command, input=given, cwd=cwd, capture_output=True, encoding="utf-8", check=False)
    assert done.stdout.strip() == "true", done.stderr[-4000:]


@pytest.fixture(scope="module")
def python_1(tmp_path_factory: pytest.TempPathFactory) -> str:
    return python_with(tmp_path_factory.mktemp("python-1"), "replicate==1.0.7")


@pytest.mark.parametrize("prefix", ["", "/replicate"])
def test_python_1(server: Served, receiver: Receiver, tmp_path: Path, python_1: str, prefix: str) -> None:
    found = run([python_1, "-c", PYTHON_1], server, receiver, f"{server.url}{prefix}", tmp_path)
    check(found, "FileOutput")
    assert found["data URIs"] == ["FileOutput"]
    assert found["progress"] == [1.0, 3, 3] or found["progress"][1] == found["progress"][2]
    assert found["stream"] == ["logs", "done"] or found["stream"] == ["done"]
    assert (found["version"], found["file"], found["deleted"]) == (VERSION, [{"a": 1}, True], True)
    verified([python_1, "-c", PYTHON_1_VERIFY], receiver, found, tmp_path)


def test_python_2(server: Served, receiver: Receiver, tmp_path: Path) -> None:
    python = python_with(tmp_path / "env", "replicate==2.0.0b4")
    found = run([python, "-c", PYTHON_2], server, receiver, f"{server.url}/v1", tmp_path)
    check(found, "FileOutput")
    assert found["use"] == ["data:image/png;base64"] * 2


@pytest.mark.skipif(shutil.which("npm") is None, reason="needs Node")
def test_javascript(server: Served, receiver: Receiver, tmp_path: Path) -> None:
    install = ("npm", "install", "--silent", "--no-audit", "--no-fund", "replicate@1.4.0")
    subprocess.run(install, cwd=tmp_path, check=True, capture_output=True)
    script, verify = tmp_path / "main.cjs", tmp_path / "verify.cjs"
    script.write_text(JAVASCRIPT, encoding="utf-8")
    verify.write_text(JAVASCRIPT_VERIFY, encoding="utf-8")
    found = run(["node", str(script)], server, receiver, "", tmp_path)
    check(found, "FileOutput")
    assert found["polled"] == ["starting", "succeeded"]
    assert found["pages"] == len(found["list"])
    assert (found["version"], found["file"], found["deleted"]) == (VERSION, [{"a": 1}, True], True)
    assert found["stream"][-2:] == ["output", "done"]
    assert set(found["stream"]) == {"logs", "output", "done"}
    verified(["node", str(verify)], receiver, found, tmp_path)
