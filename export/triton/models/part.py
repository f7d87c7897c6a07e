"""A part in the server's own Python: for servers without Triton's onnxruntime backend.

Runs in Triton's python backend, and needs numpy and onnxruntime there. The part lies beside this
file, in model.onnx/.
"""

import json
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb


class TritonPythonModel:
    """What the python backend loads."""

    def initialize(self, args):
        """Load the part; fail here, so that the server says why it is not ready."""
        import onnxruntime

        config = json.loads(args["model_config"])
        folder = Path(args["model_repository"]) / args["model_version"] / "model.onnx"
        options = onnxruntime.SessionOptions()
        threads = config["parameters"]["intra_op_thread_count"]["string_value"]
        options.intra_op_num_threads = int(threads)
        options.add_session_config_entry("session.force_spinning_stop", "1")
        chosen = ["CPUExecutionProvider"]
        if args["model_instance_kind"] == "GPU":
            cuda = {"device_id": args["model_instance_device_id"]}
            chosen.insert(0, ("CUDAExecutionProvider", cuda))
        path = str(folder / "model.onnx")
        self._session = onnxruntime.InferenceSession(path, options, providers=chosen)
        self._inputs = [port["name"] for port in config["input"]]
        self._outputs = [port["name"] for port in config["output"]]

    def execute(self, requests):
        """Answer the requests of one batch in one run: the server gives them one shape."""
        given = {
            name: [pb.get_input_tensor_by_name(one, name).as_numpy() for one in requests]
            for name in self._inputs
        }
        inputs = {name: np.concatenate(values) for name, values in given.items()}
        found = dict(zip(self._outputs, self._session.run(self._outputs, inputs), strict=True))
        ends = np.cumsum([len(clips) for clips in given["clip"]])
        starts = [0, *ends[:-1]]
        return [
            pb.InferenceResponse(
                [pb.Tensor(name, value[start:end].copy()) for name, value in found.items()]
            )
            for start, end in zip(starts, ends, strict=True)
        ]
