"""See trt_stand_in."""

import trt_stand_in  # type: ignore[import-not-found]

globals().update(vars(trt_stand_in.library("tensorrt_rtx")))
