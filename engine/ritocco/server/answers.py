"""What a prediction looks like from outside: its row, what its run says meanwhile, where its pictures are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from ritocco.images import data_uri
from ritocco.prediction import Prediction, Urls
from ritocco.schema import EXTENSIONS_KEY, PredictionInput
from ritocco.server.files import StoredFile
from ritocco.server.settings import Outputs
from ritocco.server.store import ENDED, Record, Store

_KNOWN = {*PredictionInput.model_fields, EXTENSIONS_KEY}
_FORMATS: Mapping[str, Literal["png", "jpg", "webp"]] = {
    "image/png": "png",
    "image/jpeg": "jpg",
    "image/webp": "webp",
}


def answer(
    store: Store,
    record: Record,
    running: Prediction | None = None,
    *,
    base: str,
    outputs: Outputs,
    brief: bool = False,
) -> Prediction:
    """The prediction as clients get it.

    running: what its run says, where there is one. base: URL of the API, without a slash at the end. outputs:
    as of `Settings`. brief: for lists, where outputs are URLs. Raises StorageError.
    """
    here = f"{base}/predictions/{record.id}"
    made = Prediction(
        id=record.id,
        version=record.version,
        input={name: value for name, value in record.input.items() if name in _KNOWN},
        logs=record.logs,
        data_removed=record.data_removed,
        error=record.error,
        status=record.status,
        created_at=record.created_at,
        started_at=record.started_at,
        completed_at=record.completed_at,
        metrics=dict(record.metrics),
        urls=Urls(get=here, cancel=f"{here}/cancel", stream=f"{base}/stream/{record.stream}", web=here),
    )
    if record.status == "succeeded" and not record.data_removed:
        as_data = outputs == "data" or (outputs == "auto" and not base.startswith("https://"))
        pictures = store.files.outputs(record.id)
        if all(store.files.there(one) for one in pictures):
            made.output = [
                _content(store, one) if as_data and not brief else output_url(base, one) for one in pictures
            ]
        else:
            made.data_removed = True
    if running is not None and record.status not in ENDED:
        made.logs = running.logs
        if running.status == "processing":
            made.status, made.started_at = "processing", record.started_at or running.started_at
    return made


def output_url(base: str, file: StoredFile) -> str:
    """Where a picture can be had without a token: the address can't be guessed."""
    return f"{base}/outputs/{file.id}/{file.name}"


def _content(store: Store, file: StoredFile) -> str:
    # A type that is damaged is none of ours; whoever opens a picture looks at its bytes.
    return data_uri(store.files.read(file), _FORMATS.get(file.content_type, "png"))
