"""Quantization of an ONNX file to int8: static, with ranges calibrated on training images."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor

from distill.export.metadata import to_strings
from distill.export.onnx_file import EXTRA
from distill.extras import import_extra
from distill.types import DistillError

LAYERS = ("Conv", "Gemm")
"""Operators that are quantized. Boxes, scores and NMS stay in float32: eight bits would move a box by pixels."""


def quantize(source: Path, path: Path, images: Iterable[Tensor], facts: dict[str, Any]) -> None:
    """Quantize the convolutions and linear layers of an ONNX file to int8, weights per channel.

    Args:
        source: a full ONNX file.
        path: the file to write.
        images: calibration images (3, H, W) uint8.
        facts: metadata of the new file.

    Raises:
        DistillError: there are no calibration images, or onnxruntime is not installed.
    """
    onnx = import_extra("onnx", EXTRA, "--int8")
    quantization = import_extra("onnxruntime.quantization", EXTRA, "--int8")
    rows = iter(images)
    first = next(rows, None)
    if first is None:
        raise DistillError("--int8: expected training images to calibrate with, but the split train has none")

    given = chain([first], rows)

    def next_input(_: Any) -> dict[str, Any] | None:
        image = next(given, None)
        return None if image is None else {"image": image.permute(1, 2, 0).contiguous().numpy()}

    reader = type("Reader", (quantization.CalibrationDataReader,), {"get_next": next_input})()
    logger, level = logging.getLogger(), logging.getLogger().level
    logger.setLevel(logging.ERROR)  # onnxruntime recommends a preparation that the exporter has already done
    try:
        quantization.quantize_static(
            str(source),
            str(path),
            reader,
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=list(LAYERS),
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            calibrate_method=quantization.CalibrationMethod.MinMax,
        )
    finally:
        logger.setLevel(level)
    model = onnx.load(str(path))
    onnx.helper.set_model_props(model, to_strings(facts))
    onnx.save(model, str(path))
