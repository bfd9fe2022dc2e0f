"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Prompt = Annotated[str | None, typer.Option(help="What to paint.")]
NegativePrompt = Annotated[str | None, typer.Option(help="What not to paint.")]
Width = Annotated[int | None, typer.Option(help="Pixels, a multiple of 64 up to 1024. Default: 512.")]
Height = Annotated[int | None, typer.Option(help="Pixels, a multiple of 64 up to 1024. Default: 512.")]
NumOutputs = Annotated[int | None, typer.Option(help="Pictures, 1 to 4. Default: 1.")]
Steps = Annotated[int | None, typer.Option(help="Steps, 1 to 500. Default: 50.")]
GuidanceScale = Annotated[float | None, typer.Option(help="1 to 20. Default: 7.5.")]
Scheduler = Annotated[
    str | None, typer.Option(help="One of the six names; see the README. Default: DPMSolverMultistep.")
]
DisableSafetyChecker = Annotated[
    bool, typer.Option("--disable-safety-checker", help="Return every picture, whatever it shows.")
]
OutputFormat = Annotated[str | None, typer.Option(help="png, jpg or webp. Default: png.")]
MaskFeather = Annotated[float | None, typer.Option(help="Soft seam inside the mask, pixels.")]
PasteBack = Annotated[bool, typer.Option(help="Put the kept pixels back, bit for bit.")]
Strength = Annotated[float | None, typer.Option(help="Part of the schedule that is run, over 0 to 1.")]

Model = Annotated[
    str | None,
    typer.Option(
        help="Diffusers folder, .safetensors file or exported graphs. Default: RITOCCO_MODEL, else embedded."
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")]
Backend = Annotated[str, typer.Option(help="auto, torch, onnxruntime, openvino, tensorrt or tensorrt-rtx.")]
BackendOptions = Annotated[
    str | None, typer.Option(metavar="JSON", help="Of TensorRT; see docs/export.md: '{\"level\": 5}'.")
]
Variant = Annotated[str | None, typer.Option(help="fp16 and such, where a folder holds several.")]
MemoryBudget = Annotated[
    str | None, typer.Option(help="Of torch's memory, as 8GiB or 500MB. Default: see docs/memory.md.")
]
TokenizerFolder = Annotated[
    Path | None, typer.Option(help="Folder of vocab.json and merges.txt, for a single file.")
]
Devices = Annotated[str, typer.Option(help="auto, cpu or cuda:N; several with commas.")]
