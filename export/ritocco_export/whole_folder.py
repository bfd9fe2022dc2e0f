"""A folder of graphs appears whole, in the place of an older export of ours and of nothing else."""

from __future__ import annotations

import glob
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ritocco.artefacts import MANIFEST, entries_of, is_artefacts
from ritocco.disk import sweep
from ritocco.errors import CheckpointError
from ritocco.shown import plain
from ritocco.weight_files import read_json


@contextmanager
def written_whole(out: Path, *, replace: bool = False) -> Iterator[Path]:
    """A new folder to write into, which becomes `out` at the block's end, or vanishes where it raises.

    An older export of ours in its place is replaced; of two writers one's stays, whole. Raises
    CheckpointError where `out` holds anything else. replace: whatever folder lies there, as in the cache.
    """
    out = out.resolve()  # a link's folder is written where it is
    if Path.cwd().is_relative_to(out):
        raise CheckpointError(f"{out}: is the folder that you are in, or holds it; name another one")
    if out.exists() and not replace:
        _refuse_strangers(out)
    # What a process that was killed left behind.
    for end in ("part", "old") if out.exists() else ("part",):
        sweep(out.parent, f".{glob.escape(out.name)}.{'[0-9a-f]' * 16}.{end}", days=1)
    part, old = (out.with_name(f".{out.name}.{secrets.token_hex(8)}.{end}") for end in ("part", "old"))
    part.mkdir(parents=True)
    try:
        yield part
        if out.exists() and not replace:
            try:
                _refuse_strangers(out)  # what was put there meanwhile
            except (CheckpointError, OSError):
                if out.exists():  # and not on its way, under another writer's hands
                    raise
        with suppress(FileNotFoundError):
            out.rename(old)
        try:
            part.rename(out)
        except BaseException as error:
            # Where another writer came first, its export is as good.
            if not (isinstance(error, OSError) and is_artefacts(out)):
                with suppress(OSError):
                    old.rename(out)
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
        if out.exists():
            shutil.rmtree(old, ignore_errors=True)


def _refuse_strangers(out: Path) -> None:
    """Raises CheckpointError for what is neither an empty folder nor an export of ours."""
    if out.is_dir() and not any(out.iterdir()):
        return
    if not (out / MANIFEST).is_file():
        raise CheckpointError(f"{out}: exists and is no export; name another folder")
    named = read_json(out / MANIFEST).get("files")
    known = {MANIFEST, *(named if isinstance(named, dict) else ())}
    if strangers := sorted(set(entries_of(out)) - known):
        raise CheckpointError(
            f"{out}: holds {plain(strangers[0])}, which no export wrote; name another folder"
        )
