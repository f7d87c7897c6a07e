"""Streams that send their frames one by one; the server holds what each has of its window.

Runs in Triton's python backend behind its sequence batcher: one sequence is one stream, all of
its requests come to this instance, and a batch holds at most one request of each. Its state:

    the last T frames; of an online bundle, for each expert its states, and the frame they stand at

It is this process's memory: a server that restarts has lost it, and a request that fails may have
moved it, so that it is let go. The next request of such a sequence is refused, unless that begins a
new one: no window ever misses a frame, or holds one twice.

    frame uint8 [1, H, W, 3], answer bool [1, 1] (may be left out; false takes the frame alone)
    -> logits float32 [1, K], scores float32 [1, M], route int64 [1, 1]

The frames are a clip's, one a spacing. Until T of them are there, and where no answer is wanted,
the route is -1 and the rest zeros.
"""

import asyncio
import collections
import json
import time

import numpy as np
import triton_python_backend_utils as pb


class Stream:
    """What is known of one stream."""

    def __init__(self, frames):
        """Take how many frames a clip has."""
        self.ring = collections.deque(maxlen=frames)
        self.taken = 0  # frames so far
        self.held = {}  # by expert: how many frames its states have seen, and the states
        self.used_s = 0.0

    def push(self, frame):
        """Take the next frame."""
        self.ring.append(frame)
        self.taken += 1
        self.used_s = time.monotonic()

    def new(self, expert):
        """Return how many frames an expert has to run: a clip, unless its states are near."""
        behind = self.taken - self.held.get(expert, (0, None))[0]
        known = expert in self.held and behind < self.ring.maxlen
        return behind if known else self.ring.maxlen


class TritonPythonModel:
    """What the python backend loads."""

    def initialize(self, args):
        """Read from config.pbtxt which models there are."""
        config = json.loads(args["model_config"])
        said = json.loads(config["parameters"]["vmoe"]["string_value"])
        self._router, self._experts = said["router"], said["experts"]
        self._version, self._frames = said["version"], said["frames"]
        self._classes, self._states = said["classes"], said["states"]
        # the batcher ends what is silent, by its own clock: never before it
        self._keep_s = 2 * int(config["sequence_batching"]["max_sequence_idle_microseconds"]) / 1e6
        self._streams = {}

    async def execute(self, requests):
        """Take a frame of each stream; answer those whose window is whole, in one batch."""
        self._forget()
        streams = [self._stream(request) for request in requests]
        due = [
            stream
            for stream, request in zip(streams, requests, strict=True)
            if stream and len(stream.ring) == self._frames and _flag(request, "answer")
        ]
        answers = await self._answers(due) if due else {}
        responses = []
        for stream, request in zip(streams, requests, strict=True):
            key = request.correlation_id()
            response = answers.get(id(stream)) or (self._none() if stream else _unknown(key))
            responses.append(response)
            ends = request.flags() & pb.TRITONSERVER_REQUEST_FLAG_SEQUENCE_END
            if ends or response.has_error():
                self._streams.pop(key, None)
        return responses

    def _stream(self, request):
        """Return the stream of a request, with its frame; None where it is not known."""
        key = request.correlation_id()
        if request.flags() & pb.TRITONSERVER_REQUEST_FLAG_SEQUENCE_START:
            self._streams[key] = Stream(self._frames)
        stream = self._streams.get(key)
        if stream is not None:
            frame = pb.get_input_tensor_by_name(request, "frame").as_numpy()
            stream.push(frame[0].copy())  # the request's memory is the server's
        return stream

    def _forget(self):
        """Let go of streams that the batcher has given up: they end without a word."""
        oldest_s = time.monotonic() - self._keep_s
        for key in [key for key, stream in self._streams.items() if stream.used_s < oldest_s]:
            del self._streams[key]

    async def _answers(self, due):
        """Return the responses of streams whose window is whole, by id."""
        scores = np.zeros((len(due), 1), np.float32)
        if self._router is not None:
            answer = await self._ask(self._router, {"clip": _clips(due)}, ["scores"])
            if answer.has_error():
                return {id(s): pb.InferenceResponse(error=answer.error()) for s in due}
            scores = pb.get_output_tensor_by_name(answer, "scores").as_numpy()
        groups = collections.defaultdict(list)
        for row, stream in enumerate(due):
            expert = int(scores[row].argmax())
            groups[expert, stream.new(expert)].append(row)
        asked = [self._run(e, new, [due[row] for row in of]) for (e, new), of in groups.items()]
        answers = {}
        found = await asyncio.gather(*asked)
        for ((expert, _), rows), answer in zip(groups.items(), found, strict=True):
            for at, row in enumerate(rows):
                answers[id(due[row])] = self._taken(due[row], expert, answer, at, scores[row])
        return answers

    def _run(self, expert, new, streams):
        """Run an expert on the newest frames of some streams, with their states."""
        inputs = {"clip": _clips(streams, new)}
        for name, kind, shape in self._states:
            fresh = np.zeros((1, *shape), kind)
            own = [fresh if new == self._frames else s.held[expert][1][name] for s in streams]
            inputs[name] = np.concatenate(own)
        outputs = ["logits", *(f"next_{name}" for name, _, _ in self._states)]
        return self._ask(self._experts[expert], inputs, outputs)

    def _taken(self, stream, expert, answer, at, scores):
        """Keep what an expert says of a stream's next states; return the stream's response."""
        if answer.has_error():
            return pb.InferenceResponse(error=answer.error())
        if self._states:
            states = {
                name: pb.get_output_tensor_by_name(answer, f"next_{name}").as_numpy()[at : at + 1]
                for name, _, _ in self._states
            }
            stream.held[expert] = stream.taken, {name: own.copy() for name, own in states.items()}
        logits = pb.get_output_tensor_by_name(answer, "logits").as_numpy()[at]
        return _response(logits, scores, expert)

    def _none(self):
        """Return what is answered where there is no answer."""
        experts = len(self._experts)
        return _response(np.zeros(self._classes, np.float32), np.zeros(experts, np.float32), -1)

    def _ask(self, model, inputs, outputs):
        return pb.InferenceRequest(
            model_name=model,
            model_version=self._version,
            inputs=[pb.Tensor(name, value) for name, value in inputs.items()],
            requested_output_names=outputs,
            preferred_memory=pb.PreferredMemory(pb.TRITONSERVER_MEMORY_CPU),
        ).async_exec()


def _clips(streams, newest=None):
    """Return the newest frames of some streams, [N, S, H, W, 3]; by default their clips."""
    return np.stack([np.stack(list(s.ring)[-(newest or len(s.ring)) :]) for s in streams])


def _flag(request, name):
    given = pb.get_input_tensor_by_name(request, name)
    return given is None or bool(given.as_numpy().all())


def _unknown(key):
    said = f"sequence {key} is not known here; begin it with sequence_start"
    return pb.InferenceResponse(error=pb.TritonError(said, pb.TritonError.INVALID_ARG))


def _response(logits, scores, route):
    tensors = {"logits": logits, "scores": scores, "route": np.array([route], np.int64)}
    made = [pb.Tensor(name, value[None].copy()) for name, value in tensors.items()]
    return pb.InferenceResponse(output_tensors=made)
