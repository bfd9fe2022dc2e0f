"""Stable Diffusion inpainting on your own hardware. `predict(input)` repaints the white part of a mask."""

from ritocco.engine import Engine
from ritocco.errors import (
    BackendError,
    CheckpointError,
    FetchError,
    NonFiniteError,
    RequestError,
    RitoccoError,
)
from ritocco.fetch import Fetcher
from ritocco.loading import from_diffusers, load, predict
from ritocco.prediction import Prediction
from ritocco.schema import PredictionInput

__all__ = [
    "BackendError",
    "CheckpointError",
    "Engine",
    "FetchError",
    "Fetcher",
    "NonFiniteError",
    "Prediction",
    "PredictionInput",
    "RequestError",
    "RitoccoError",
    "from_diffusers",
    "load",
    "predict",
]
