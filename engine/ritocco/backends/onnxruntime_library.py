"""ONNX Runtime's module, imported without telling its maker.

It sends what it is used for, and keeps an identity of the user in the home folder (seen with 1.32), unless
this variable of its own says no; whoever sets it to something else is asked.
"""

from __future__ import annotations

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime as onnxruntime
