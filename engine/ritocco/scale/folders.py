"""A folder painted on a Ray cluster: Ray Data carries pictures to engines, this machine keeps the manifest.

The folders have to be the same on every machine, as on a network's file system. Pictures travel as names.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray

from ritocco.batcher import Batcher
from ritocco.folders.manifest import Manifest, is_done
from ritocco.folders.pairs import Bad, Pair
from ritocco.folders.run import THREADS, Counts, FolderRun, failed_line
from ritocco.loading import load as load_engine

Block = dict[str, Any]

BLOCKS_EACH = 4
"""Of an engine, where there are few pictures: what the slowest has left is small when the others are done."""


class _Slip:
    """Stands for the manifest over there: what it said before, and what is to be entered."""

    def __init__(self, out: Path, known: Mapping[str, Any]) -> None:
        self.lines: list[dict[str, Any]] = []
        self._out, self._known = out, known

    def done(self, name: str, key: str) -> bool:
        if not is_done(self._out, self._known.get(name), key):
            return False
        self.lines.append({"name": name, "status": "skipped"})
        return True

    def append(self, line: dict[str, Any]) -> None:
        self.lines.append(line)


class FolderPainter:
    """One engine on one of the cluster's devices. Ray Data makes it, and gives it pictures."""

    def __init__(self, load_options: Mapping[str, Any], out: Path, options: Mapping[str, Any]) -> None:
        self._batcher = Batcher(load_engine(**load_options))
        self._out, self._options = out, dict(options)

    def __call__(self, block: Block) -> Block:
        """A column `line` of JSON: what is to be entered, of each picture of the column `task`."""
        tasks = [json.loads(task) for task in block["task"]]
        pairs = [_pair(task["pair"]) for task in tasks]
        slip = _Slip(self._out, {task["pair"]["name"]: task["known"] for task in tasks})
        FolderRun(self._batcher, self._out, slip, options=self._options).run(pairs)
        return {"line": np.array([json.dumps(line) for line in slip.lines], dtype=object)}


def run(
    address: str,
    pairs: Sequence[Pair],
    bad: Sequence[Bad],
    *,
    load: Mapping[str, Any],
    out: Path,
    manifest: Manifest,
    options: Mapping[str, Any],
    told: Callable[[Counts], None],
) -> Counts:
    """Paint them with an engine on each GPU of a cluster, or on each machine where it has none.

    address: of the cluster, as `ray.init` takes it; `local` starts one here. The other arguments are as of
    `FolderRun`. A machine that is lost costs the block that it had, sixteen pictures at most, which others
    paint.
    Raises OSError where the manifest can't be written, and what Ray raises.
    """
    ray.init(address=address, ignore_reinit_error=True, log_to_driver=False)
    counts = Counts()
    for one in bad:
        manifest.append(failed_line(one))
        counts.bad.append(one)
        told(counts)
    if not pairs:
        return counts
    by_name = {pair.name: pair for pair in pairs}
    tasks = [{"task": json.dumps(_task(pair, manifest))} for pair in pairs]
    model = load.get("model")
    elsewhere = {**load, "model": None if model is None else Path(model).resolve()}
    asks, engines = _places()
    engines = min(engines, len(tasks))
    lines = (
        ray.data.from_items(tasks, override_num_blocks=block_count(len(tasks), engines))
        .map_batches(
            FolderPainter,
            fn_constructor_args=(elsewhere, out.resolve(), dict(options)),
            batch_size=None,  # a block as it is: Ray would put small ones together
            batch_format="numpy",
            # One block at a time: the engine that is ready first would take what others are to have.
            compute=ray.data.ActorPoolStrategy(size=engines, max_tasks_in_flight_per_actor=1),
            **asks,
        )
        .iter_rows()
    )
    for row in lines:
        line = json.loads(row["line"])
        _enter(line, manifest, counts, by_name)
        told(counts)
    return counts


def block_count(pictures: int, engines: int) -> int:
    """Into how many blocks Ray Data divides so many pictures, over 0: BLOCKS_EACH for each engine, or more,
    so that none has over THREADS pictures, which is what an engine has in hand; and none has no picture.
    """
    return min(pictures, max(BLOCKS_EACH * engines, -(-pictures // THREADS)))


def _enter(line: dict[str, Any], manifest: Manifest, counts: Counts, pairs: Mapping[str, Pair]) -> None:
    if line["status"] == "skipped":
        counts.skipped += 1
        return
    manifest.append(line)
    if line["status"] == "succeeded":
        counts.painted += 1
    else:
        counts.bad.append(Bad.of(pairs[line["name"]], line["error"]))


def _places() -> tuple[dict[str, Any], int]:
    """What each engine asks of the cluster, and how many there are."""
    found = ray.cluster_resources()
    if gpus := int(found.get("GPU", 0)):
        return {"num_gpus": 1}, gpus
    nodes = [node for node in ray.nodes() if node["Alive"]]
    cpus = max(1, int(min(node["Resources"].get("CPU", 1) for node in nodes)) - 1)
    return {"num_cpus": cpus}, len(nodes)


def _task(pair: Pair, manifest: Manifest) -> dict[str, Any]:
    sent = replace(pair, image=pair.image.resolve(), mask=pair.mask.resolve())
    return {"pair": _json(asdict(sent)), "known": manifest.line(pair.name)}


def _pair(told: Mapping[str, Any]) -> Pair:
    return Pair(
        name=told["name"], image=Path(told["image"]), mask=Path(told["mask"]), given=dict(told["given"])
    )


def _json(told: Mapping[str, Any]) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in told.items()}
