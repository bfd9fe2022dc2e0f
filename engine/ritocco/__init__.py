"""Stable Diffusion inpainting on your own hardware. `predict(input)` repaints the white part of a mask."""

from ritocco.batcher import Batcher
from ritocco.engine import Engine
from ritocco.errors import (
    BackendError,
    BusyError,
    CheckpointError,
    DeviceLostError,
    FetchError,
    NonFiniteError,
    RequestError,
    RitoccoError,
    TimeLimitError,
)
from ritocco.fetch import Fetcher
from ritocco.loading import from_diffusers, load, predict
from ritocco.prediction import Prediction
from ritocco.schema import PredictionInput
from ritocco.tickets import Ticket

__all__ = [
    "BackendError",
    "Batcher",
    "BusyError",
    "CheckpointError",
    "DeviceLostError",
    "Engine",
    "FetchError",
    "Fetcher",
    "NonFiniteError",
    "Prediction",
    "PredictionInput",
    "RequestError",
    "RitoccoError",
    "Ticket",
    "TimeLimitError",
    "from_diffusers",
    "load",
    "predict",
]
