"""A folder of pictures: what is paired, what is done again, and what an interruption leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ritocco import Batcher, RequestError, cli, load
from ritocco.folders.manifest import NAME, Manifest
from ritocco.folders.pairs import SUFFIXES, Bad, Pair, pairs, read_table
from ritocco.folders.run import Counts, FolderRun
from ritocco.folders.sizes import own_size

QUICK = {"width": 64, "height": 64, "num_inference_steps": 1, "guidance_scale": 1.0}
QUICK_ARGUMENTS = [f"--{name.replace('_', '-')}={value}" for name, value in QUICK.items()]

Made = tuple[Path, Path]


def picture(file: Path, size: tuple[int, int] = (64, 64), shade: int = 90) -> Path:
    file.parent.mkdir(exist_ok=True)
    Image.new("RGB", size, (shade, 120, 90)).save(file)
    return file


@pytest.fixture
def folders(tmp_path: Path) -> Callable[..., Made]:
    """Makes pictures and masks of these stems."""

    def make(*stems: str) -> Made:
        for shade, stem in enumerate(stems):
            picture(tmp_path / "images" / f"{stem}.png", shade=shade)
            picture(tmp_path / "masks" / f"{stem}.png", shade=255)
        return tmp_path / "images", tmp_path / "masks"

    return make


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / NAME).read_text(encoding="utf-8").splitlines()]


def test_pictures_and_masks_meet_by_stem(folders: Callable[..., Made]) -> None:
    images, masks = folders("b10", "b2", "a", "alone", "twice")
    (masks / "alone.png").unlink()
    picture(images / "twice.jpg")
    picture(masks / "stray.png")
    picture(images / ".hidden.png")
    (images / "notes.txt").write_text("no picture")
    (images / "gone.png").symlink_to("nowhere.png")
    made, bad, warnings = pairs(images, masks, {"seed": 3}, None)
    assert [one.name for one in made] == ["a", "b2", "b10"], "2 before 10"
    assert made[0] == Pair(name="a", image=images / "a.png", mask=masks / "a.png", given={"seed": 3})
    assert {one.name: one.error for one in bad} == {
        "alone": f"no mask: {str(masks)!r} has no file of the stem 'alone'",
        "gone": f"no mask: {str(masks)!r} has no file of the stem 'gone'",
        "twice": "'twice.jpg' and 'twice.png' have one stem, and so one output; rename one",
    }
    assert warnings == ["1 masks have no picture: 'stray'"]


def test_one_mask_for_all(folders: Callable[..., Made], tmp_path: Path) -> None:
    images, _ = folders("a", "b")
    mask = picture(tmp_path / "mask.png")
    made, bad, warnings = pairs(images, mask, {}, None)
    assert ([one.mask for one in made], bad, warnings) == ([mask, mask], [], [])


def test_a_table_goes_before_what_is_for_all(folders: Callable[..., Made], tmp_path: Path) -> None:
    images, masks = folders("a", "b", "c")
    table = tmp_path / "prompts.csv"
    table.write_text(
        '\ufeffname, prompt ,seed,disable_safety_checker\na.png,"a cat, 3",7,TRUE\nb,a dog,,\nz,,1,\n',
        "utf-8",
    )
    made, bad, warnings = pairs(images, masks, {"seed": 3}, read_table(table))
    assert [one.given for one in made] == [
        {"seed": 7, "prompt": "a cat, 3", "disable_safety_checker": True},
        {"seed": 3, "prompt": "a dog"},
    ]
    assert bad == [
        Bad(name="c", image=images / "c.png", error="the table has no row for it, and there is no --prompt")
    ]
    assert warnings == ["1 rows of the table have no picture: 'z'"]
    table.write_text("name,prompt,seed\nb,a cat," + "[" * 20_000 + "\n", "utf-8")
    (nested,) = (one for one in pairs(images, masks, {}, read_table(table))[0] if one.name == "b")
    assert nested.given["seed"] == "[" * 20_000, "for the schema to refuse"
    assert len(pairs(images, masks, {"prompt": "a fox"}, read_table(table))[0]) == 3


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("prompt\na cat\n", r"\(no name\)"),
        ("name,colour\na,red\n", r"\(unknown: 'colour'\)"),
        ("name,seed,seed\na,1,2\n", r"\(twice: 'seed'\)"),
        ("name,prompt\na,a cat, red\n", "line 2: more cells than columns"),
        ("name,prompt\na,x\na,y\n", "line 3: the name 'a' comes twice"),
        ("name,prompt\n,x\n", "line 2: no name"),
        ('name,prompt\na,"x\n', "can't be read as CSV"),
        ("", r"\(no name\)"),
    ],
)
def test_tables_that_say_nothing_clear(tmp_path: Path, text: str, why: str) -> None:
    table = tmp_path / "t.csv"
    table.write_text(text, encoding="utf-8")
    with pytest.raises(RequestError, match=f"--prompts is .*{why}"):
        read_table(table)


def test_a_table_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"name,prompt\na,\xff\n")
    with pytest.raises(RequestError, match="can't be read as CSV in UTF-8"):
        read_table(tmp_path / "t.csv")
    with pytest.raises(RequestError, match="No such file"):
        read_table(tmp_path / "none.csv")


def test_folders_without_pictures(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"--images is .*, which is no folder that can be read"):
        pairs(tmp_path / "nowhere", tmp_path, {}, None)
    with pytest.raises(RequestError, match=r"--images is .*, which holds no picture"):
        pairs(tmp_path, tmp_path, {}, None)


@pytest.mark.parametrize(
    ("size", "own"),
    [
        ((640, 480), (640, 512)),
        ((4000, 3000), (1024, 768)),
        ((20, 700), (64, 704)),
        ((5000, 10), (1024, 64)),
        ((96, 95), (128, 64)),
    ],
)
def test_a_pictures_own_size(tmp_path: Path, size: tuple[int, int], own: tuple[int, int]) -> None:
    assert own_size(picture(tmp_path / "p.png", size)) == own


def test_the_size_of_a_picture_on_its_side(tmp_path: Path) -> None:
    made = Image.new("RGB", (256, 128))
    exif = made.getexif()
    exif[0x0112] = 6
    made.save(tmp_path / "p.jpg", exif=exif)
    assert own_size(tmp_path / "p.jpg") == (128, 256)
    (tmp_path / "x.png").write_bytes(b"nothing")
    with pytest.raises(RequestError, match="has no size that can be read"):
        own_size(tmp_path / "x.png")


def test_a_manifest_that_was_cut_off(tmp_path: Path) -> None:
    line = {"name": "a", "key": "k", "status": "succeeded", "outputs": ["a.png"]}
    with Manifest(tmp_path) as manifest:
        manifest.append(line)
        assert not manifest.done("a", "k"), "its file is gone"
        (tmp_path / "a.png").touch()
        assert manifest.done("a", "k")
        assert not manifest.done("a", "other inputs")
    with (tmp_path / NAME).open("a") as stream:
        stream.write('{"name": "b", "key"')
    with Manifest(tmp_path) as manifest:
        assert manifest.done("a", "k")
        manifest.append({**line, "name": "c"})
        manifest.append({**line, "name": "lat\udce9n"})  # a file's name in Latin-1, as Python has it
    assert [one["name"] for one in lines(tmp_path)] == ["a", "c", "lat\udce9n"], "in UTF-8"
    with Manifest(tmp_path) as manifest:
        assert manifest.line("lat\udce9n") is not None
    (tmp_path / NAME).write_text('[1]\n{"name": "a"}\n')
    with pytest.raises(RequestError, match=r"line 1 of .* is no JSON of this program's"):
        Manifest(tmp_path)


def test_a_folder_is_painted_and_not_again(
    folders: Callable[..., Made], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, masks = folders("a", "b", "c")
    (images / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    out = tmp_path / "out"
    asked = ["--images", images, "--masks", masks, "--out", out, "--prompt", "a cat", *QUICK_ARGUMENTS]

    def run(*more: object) -> tuple[int, str, str]:
        sys.argv = ["ritocco", "batch", *map(str, (*asked, *more))]
        with pytest.raises(SystemExit) as left:
            cli.main()
        said = capsys.readouterr()
        return int(left.value.code or 0), said.out, said.err

    status, said, err = run()
    assert (status, said) == (1, f"2 painted, 0 done before, 1 failed; see {out / NAME}\n")
    assert "failed: b.png: input.image: " in err
    found = {one["name"]: one for one in lines(out)}
    assert [found[name]["status"] for name in "abc"] == ["succeeded", "failed", "succeeded"]
    assert found["a"]["outputs"] == ["a.png"]
    assert found["a"]["input"]["seed"] != found["c"]["input"]["seed"], "random, and told"
    painted = (out / "a.png").read_bytes()
    with load(backend="torch") as engine:
        again = engine.predict({"image": images / "a.png", "mask": masks / "a.png", **found["a"]["input"]})
    again.images[0].save(tmp_path / "again.png")
    assert Image.open(tmp_path / "again.png").tobytes() == Image.open(out / "a.png").tobytes()
    picture(images / "b.png")
    (out / "c.png").unlink()
    status, said, _ = run()
    assert (status, said) == (0, f"2 painted, 1 done before, 0 failed; see {out / NAME}\n")
    assert (out / "a.png").read_bytes() == painted
    assert run("--num-outputs", 2)[0] == 0
    assert sorted(path.name for path in out.glob("c*.png")) == ["c-0.png", "c-1.png", "c.png"]


@pytest.mark.parametrize("own_sizes", [False, True])
def test_every_suffix_is_painted_or_named(
    own_sizes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As pictures and as masks, written by Pillow in the format of that suffix, and in capitals too."""
    images, masks, out = (tmp_path / name for name in ("images", "masks", "out"))
    for suffix in SUFFIXES:
        picture(images / f"{suffix[1:]}{suffix}")
        picture(masks / f"{suffix[1:]}{suffix}", shade=255)
    (images / "png.png").rename(images / "png.PNG")
    size = ["--own-sizes"] if own_sizes else ["--width=64", "--height=64"]
    quick = [*size, "--num-inference-steps=1", "--guidance-scale=1", "--prompt=a cat"]
    words = ["--images", images, "--masks", masks, "--out", out, *quick]
    monkeypatch.setattr("sys.argv", ["ritocco", "batch", *map(str, words)])
    with pytest.raises(SystemExit):
        cli.main()
    said = capsys.readouterr()
    assert said.out == f"6 painted, 0 done before, 2 failed; see {out / NAME}\n"
    named = {one["name"]: one["error"] for one in lines(out) if one["status"] == "failed"}
    assert named.keys() == {"tif", "tiff"}
    assert all("the formats that are read: PNG, JPEG, WebP, GIF, BMP" in error for error in named.values())
    for suffix in SUFFIXES - {".tif", ".tiff"}:
        with Image.open(out / f"{suffix[1:]}.png") as painted:
            assert painted.size == (64, 64)
    docs = (Path(__file__).parents[2] / "docs" / "folders.md").read_text(encoding="utf-8")
    assert all(f"`{suffix}`" in docs for suffix in SUFFIXES)


def test_requests_that_make_no_sense(
    folders: Callable[..., Made], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, masks = folders("a", "a-0")
    asked = {"--images": images, "--masks": masks, "--out": tmp_path / "out"}

    def run(*more: object, **changed: Path) -> tuple[int, str]:
        given = asked | {f"--{name}": path for name, path in changed.items()}
        words = [word for pair in given.items() for word in pair]
        sys.argv = ["ritocco", "batch", *map(str, (*words, *more))]
        with pytest.raises(SystemExit) as left:
            cli.main()
        return int(left.value.code or 0), capsys.readouterr().err

    assert run(out=images)[1].startswith("error: --out is ")
    assert "results would lie among the pictures" in run(out=images)[1]
    assert "leave one out" in run("--own-sizes", "--width", 64)[1]
    assert "output_format" in run("--output-format", "tiff")[1]
    status, err = run("--num-outputs", 9)
    assert (status, err) == (2, "error: input.num_outputs is 9. Must be less than or equal to 4\n")
    assert not (tmp_path / "out").exists()
    table = tmp_path / "t.csv"
    table.write_text("name,prompt,num_outputs\na,x,2\na-0,x,1\n")
    assert (
        "failed: a-0.png: its output would have the name of one of 'a.png'"
        in run("--prompts", table, *QUICK_ARGUMENTS)[1]
    )
    (tmp_path / "file").touch()
    status, err = run(out=tmp_path / "file")
    assert (status, "nothing can be written there" in err) == (1, True)


def test_a_disk_that_is_full_ends_it(
    folders: Callable[..., Made], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, _, _ = pairs(*folders("a", "b"), QUICK, None)

    def refuse(file: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device", str(file))

    monkeypatch.setattr("ritocco.folders.run.write_whole", refuse)
    with load(backend="torch") as engine, Batcher(engine) as batcher, Manifest(tmp_path) as manifest:
        run = FolderRun(batcher, tmp_path, manifest, options={})
        with pytest.raises(OSError, match="No space left"):
            run.run(made)
    assert lines(tmp_path) == []


def test_a_stop_leaves_the_rest_for_the_next_time(folders: Callable[..., Made], tmp_path: Path) -> None:
    stems = [f"p{number}" for number in range(16)]
    made, _, _ = pairs(*folders(*stems), QUICK, None)
    runs: list[FolderRun] = []

    def told(counts: Counts) -> None:
        if counts.ended == 3:
            runs[0].stop()

    with load(backend="torch") as engine, Batcher(engine) as batcher, Manifest(tmp_path) as manifest:
        runs.append(FolderRun(batcher, tmp_path, manifest, options={}, told=told))
        first = runs[0].run(made)
        assert 3 <= first.painted < 16
        second = FolderRun(batcher, tmp_path, manifest, options={}).run(made)
    assert (second.painted, second.skipped, second.bad) == (16 - first.painted, first.painted, [])
    assert sorted(one["name"] for one in lines(tmp_path)) == sorted(stems), "each once"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_in_the_middle_of_two_hundred(folders: Callable[..., Made], tmp_path: Path) -> None:
    stems = [f"p{number}" for number in range(200)]
    images, masks = folders(*stems)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "ritocco", "batch", "--images", images, "--masks", masks]
    command += ["--out", out, "--prompt", "a cat", *QUICK_ARGUMENTS]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    for number, until in ((signal.SIGKILL, 40), (signal.SIGTERM, 80), (signal.SIGINT, 120)):
        process = subprocess.Popen(
            list(map(str, command)),
            env=env,
            stderr=subprocess.PIPE,
            text=True,
            # Where this run is a shell's background job it ignores interrupts, as its children would.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        while not (out / NAME).exists() or len((out / NAME).read_bytes().splitlines()) < until:
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.05)
        second = subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True, check=False)
        assert "which another process is using" in second.stderr
        process.send_signal(number)
        _, said = process.communicate(timeout=120)
        assert process.returncode == {"SIGKILL": -9, "SIGTERM": 143, "SIGINT": 130}[number.name]
        assert "Traceback" not in said
    done = subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, "0 failed" in done.stdout) == (0, True), done.stderr
    names = [one["name"] for one in lines(out) if one["status"] == "succeeded"]
    assert sorted(names) == sorted(stems), "each once"
    for stem in stems:
        with Image.open(out / f"{stem}.png") as painted:
            painted.load()
    assert {path.name for path in out.iterdir()} <= {f"{s}.png" for s in stems} | {NAME, ".in-use.sqlite"}
