"""Quantize an ONNX model to int8 with NNCF and write OpenVINO IR; ``measure_int8.py`` runs it in NNCF's environment.

python tools/nncf_quantize.py MODEL.onnx SAMPLES.npz TARGET.xml

SAMPLES holds one array per input, the samples stacked along a leading axis.
"""

from __future__ import annotations

import sys

import nncf
import numpy as np
import openvino


def main(source: str, samples: str, target: str) -> None:
    """Quantize as NNCF recommends for transformers."""
    arrays = np.load(samples)
    count = len(arrays[arrays.files[0]])
    batches = [{name: arrays[name][index] for name in arrays.files} for index in range(count)]
    model = openvino.Core().read_model(source)
    quantized = nncf.quantize(
        model, nncf.Dataset(batches), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(batches)
    )
    openvino.save_model(quantized, target, compress_to_fp16=False)


if __name__ == "__main__":
    main(*sys.argv[1:4])
