# vmoe-run with TensorRT on a Jetson; build it on the Jetson, from the repository's root.
#   JetPack 6 (TensorRT 10.3, CUDA 12.6, Python 3.10):
#     docker build -f docker/jetson.Dockerfile -t vmoe:jetson .
#   JetPack 7 (the server's images, for ARM; CUDA 13.0, Python 3.12):
#     docker build -f docker/jetson.Dockerfile -t vmoe:jetson --build-arg PYTHON=3.12.12 \
#       --build-arg CUDA=13.0.3 --build-arg BASE=nvcr.io/nvidia/tensorrt:25.08-py3 .
# Plans are built here, of a bundle's ONNX parts; then watch ($PWD/runs: writable for user 10001):
#   docker run --rm --runtime nvidia -v "$PWD/runs:/runs" --entrypoint vmoe-export vmoe:jetson \
#       /runs/export/mine-split --trt --from-onnx --workspace 1024 --out /runs/plans
#   docker run --rm --runtime nvidia --device /dev/video0 -v "$PWD/runs:/runs:ro" \
#       -p 127.0.0.1:8080:8080 vmoe:jetson /runs/plans --backend tensorrt --trust --camera 0 \
#       --page 0.0.0.0:8080
ARG PYTHON=3.10.19
ARG BASE=nvcr.io/nvidia/l4t-tensorrt:r10.3.0-devel

FROM python:${PYTHON}-slim-bookworm AS build
ARG CUDA=12.9.4
WORKDIR /src
COPY . .
# A folder of its own, for the base image's Python: it needs no pip.
RUN pip install --no-cache-dir --no-deps -r docker/requirements-build.txt \
    && pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels . \
    && pip install --no-cache-dir --no-deps --target /opt/vmoe -r docker/requirements.txt \
        -r docker/requirements-tensorrt.txt "cuda-bindings==${CUDA}" /wheels/*.whl \
    && sed -i '1s|.*|#!/usr/bin/env python3|' /opt/vmoe/bin/vmoe*

FROM ${BASE}
COPY --from=build /opt/vmoe /opt/vmoe
ENV PYTHONPATH=/opt/vmoe \
    PYTHONUNBUFFERED=1 \
    PATH=/opt/vmoe/bin:$PATH
# A base image whose Python or bindings are others fails here, not in the field. TensorRT itself is
# not imported: some of its libraries are the host's, and are there when the image runs. A Jetson's
# GPU and cameras belong to group video.
RUN useradd --uid 10001 --create-home --groups video vmoe \
    && python3 -c "import vmoe.runtime, cv2, onnx, cuda.bindings; from importlib.util import find_spec as f; assert f('tensorrt')"
USER 10001
WORKDIR /home/vmoe
EXPOSE 8080
# Of --page or --metrics at port 8080; without either there is nothing to ask.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python3", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8080/healthz', timeout=4)"]
ENTRYPOINT ["vmoe-run"]
CMD ["--source", "test", "--page", "0.0.0.0:8080"]
