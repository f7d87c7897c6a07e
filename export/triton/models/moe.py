"""The whole mixture as one model: route, run each expert once on its clips, scatter the logits.

Runs in Triton's python backend, and needs nothing there but numpy. The router and the experts are
models of the same server; a batch that the server made of several requests is routed as one.

    clip uint8 [N, T, H, W, 3], force_route int64 [N, 1] (may be left out; below 0 routes freely)
    -> logits float32 [N, K], scores float32 [N, M], route int64 [N, 1]
"""

import asyncio
import json

import numpy as np
import triton_python_backend_utils as pb


class TritonPythonModel:
    """What the python backend loads."""

    def initialize(self, args):
        """Read from config.pbtxt which models there are."""
        given = json.loads(args["model_config"])["parameters"]
        said = json.loads(given["vmoe"]["string_value"])
        self._router, self._experts = said["router"], said["experts"]
        self._version = said["version"]

    async def execute(self, requests):
        """Answer requests; what is wrong with one fails that one alone."""
        clips = [pb.get_input_tensor_by_name(one, "clip").as_numpy() for one in requests]
        forced = [_forced(one, len(its)) for one, its in zip(requests, clips, strict=True)]
        errors = [self._refusal(route) for route in forced]
        good = [i for i, error in enumerate(errors) if error is None]
        if not good:
            return [pb.InferenceResponse(error=error) for error in errors]
        batch = np.concatenate([clips[i] for i in good])
        found = await self._routed(batch, np.concatenate([forced[i] for i in good]))
        ends = np.cumsum([len(clips[i]) for i in good])
        rows = {i: slice(end - len(clips[i]), end) for i, end in zip(good, ends, strict=True)}
        return [
            pb.InferenceResponse(error=error) if error else found.response(rows[i])
            for i, error in enumerate(errors)
        ]

    def _refusal(self, route):
        if (route < len(self._experts)).all():
            return None
        last = len(self._experts) - 1
        said = f"force_route is {route.max()}; this model has experts 0 to {last}."
        return pb.TritonError(said, pb.TritonError.INVALID_ARG)

    async def _routed(self, clips, forced):
        """Run the router on all clips, and beside one another each expert on its own."""
        scores = np.zeros((len(clips), 1), np.float32)
        if self._router is not None:
            answer = await self._ask(self._router, clips, "scores")
            if answer.has_error():
                return Found(scores, forced, {-1: answer.error()})
            scores = pb.get_output_tensor_by_name(answer, "scores").as_numpy()
        found = Found(scores, np.where(forced >= 0, forced, scores.argmax(axis=1)), {})
        rows = {expert: np.flatnonzero(found.route == expert) for expert in np.unique(found.route)}
        asked = [self._ask(self._experts[one], clips[of], "logits") for one, of in rows.items()]
        for (expert, of), answer in zip(rows.items(), await asyncio.gather(*asked), strict=True):
            found.take(expert, of, answer)
        return found

    def _ask(self, model, clips, output):
        return pb.InferenceRequest(
            model_name=model,
            model_version=self._version,
            inputs=[pb.Tensor("clip", clips)],
            requested_output_names=[output],
            preferred_memory=pb.PreferredMemory(pb.TRITONSERVER_MEMORY_CPU),
        ).async_exec()


def _forced(request, n):
    """Return the routes that a request wants, int64 [N]; -1 where it wants none."""
    given = pb.get_input_tensor_by_name(request, "force_route")
    return np.full(n, -1, np.int64) if given is None else given.as_numpy().reshape(n)


class Found:
    """What became of a batch."""

    def __init__(self, scores, route, errors):
        """Take scores [N, M], routes [N], and what failed, by expert; -1 is the router."""
        self.scores, self.route, self.errors = scores, route, errors
        self._logits = None

    def take(self, expert, rows, answer):
        """Put an expert's logits where its clips stand."""
        if answer.has_error():
            self.errors[expert] = answer.error()
            return
        logits = pb.get_output_tensor_by_name(answer, "logits").as_numpy()
        if self._logits is None:
            self._logits = np.zeros((len(self.route), logits.shape[1]), np.float32)
        self._logits[rows] = logits

    def response(self, rows):
        """Return the answer of one request, whose clips are these rows."""
        for expert, error in self.errors.items():
            if expert < 0 or (self.route[rows] == expert).any():
                return pb.InferenceResponse(error=error)
        tensors = {
            "logits": self._logits[rows],
            "scores": self.scores[rows],
            "route": self.route[rows, None],
        }
        made = [pb.Tensor(name, np.ascontiguousarray(value)) for name, value in tensors.items()]
        return pb.InferenceResponse(output_tensors=made)
