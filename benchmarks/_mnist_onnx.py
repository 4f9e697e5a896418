"""MNIST networks as ONNX files: the dense one in eight bits, and run times of dense and compact beside PyTorch's."""

from __future__ import annotations

import copy
import logging
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from onnxruntime.quantization import CalibrationDataReader, quantize_static
from torch import Tensor, nn

from benchmarks._mnist import Rows, load_mnist
from pyrobc.archive import quiet
from pyrobc.compare import measure_latency, time_calls
from pyrobc.export import convert

__all__ = ["compare_latency", "measure_int8"]


def measure_int8(file: Path, build: Any, data: Path, shape: tuple[int, ...], test: Rows) -> dict[str, Any]:
    """The dense network as static int8 ONNX, calibrated on training rows."""
    net = build()
    net.load_state_dict(torch.load(file, weights_only=True))
    rows = load_mnist(data, shape).train[0][:1000].numpy()
    with tempfile.TemporaryDirectory() as folder:
        plain, small = Path(folder) / "plain.onnx", Path(folder) / "int8.onnx"
        example = (torch.zeros(2, *shape),)
        with quiet():
            program = torch.onnx.export(
                net.eval(), example, dynamo=True, verbose=False, dynamic_shapes=({0: torch.export.Dim("batch")},)
            )
        model = program.model_proto
        del model.graph.value_info[:]  # stale shapes stop the quantiser
        plain.write_bytes(model.SerializeToString())
        logging.getLogger().setLevel(logging.ERROR)
        quantize_static(str(plain), str(small), Calibration(model.graph.input[0].name, rows))
        session = onnxruntime.InferenceSession(str(small))
        name = session.get_inputs()[0].name
        wrong = 0
        for x, y in zip(test[0].split(1000), test[1].split(1000), strict=True):
            wrong += int((session.run(None, {name: x.numpy()})[0].argmax(1) != y.numpy()).sum())
        return {"bytes": small.stat().st_size, "test_error": 100 * wrong / len(test[1])}


class Calibration(CalibrationDataReader):
    """Feeds training rows to the quantiser, a hundred at a time."""

    def __init__(self, name: str, rows: Any) -> None:
        self.batches = iter([{name: rows[i : i + 100]} for i in range(0, len(rows), 100)])

    def get_next(self) -> Any:
        """The next batch, None at the end."""
        return next(self.batches, None)


def compare_latency(dense: nn.Module, compact: nn.Module, rows: Tensor, repeats: int = 5) -> dict[str, list[float]]:
    """Median milliseconds of dense and compact, by what runs them."""
    pair = {"dense": dense, "compact": compact}
    last = {"memory_format": torch.channels_last}
    runners = {
        "PyTorch": measure_latency(pair, rows, repeats),
        "PyTorch, channels last": measure_latency(
            {name: copy.deepcopy(net).to(**last) for name, net in pair.items()}, rows.contiguous(**last), repeats
        ),
        "ONNX Runtime": time_calls({name: open_session(net, rows) for name, net in pair.items()}, repeats),
    }
    return {runner: [times["dense"], times["compact"]] for runner, times in runners.items()}


def open_session(net: nn.Module, rows: Tensor) -> Callable[[], object]:
    """What runs the network's exported model.onnx on the rows, in one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    with tempfile.TemporaryDirectory() as folder:
        file = convert(net, folder, example_inputs=rows, onnx=True)["model.onnx"]
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return partial(session.run, None, {session.get_inputs()[0].name: rows.numpy()})
