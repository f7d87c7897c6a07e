# vmoe-run with TensorRT, for servers with an NVIDIA GPU. From the repository's root:
#   docker build -f docker/tensorrt.Dockerfile -t vmoe:tensorrt .
# A plan is for one version of TensorRT and one kind of GPU: it is built where it runs, of a bundle's
# ONNX parts, by this image ($PWD/runs must be writable for user 10001):
#   docker run --rm --gpus all -v "$PWD/runs:/runs" --entrypoint vmoe-export vmoe:tensorrt \
#       /runs/export/mine-split --trt --from-onnx --out /runs/plans
#   docker run --rm --gpus all -v "$PWD/runs:/runs:ro" -p 127.0.0.1:8080:8080 vmoe:tensorrt \
#       /runs/plans --backend tensorrt --trust --source test --page 0.0.0.0:8080
# Here: TensorRT 10.9, CUDA 12.8, Python 3.12, as in tritonserver:25.03-py3.
FROM python:3.12.12-slim-bookworm AS build
WORKDIR /src
COPY . .
# A folder of its own, for any Python 3.12: the image itself needs no pip.
RUN pip install --no-cache-dir --no-deps -r docker/requirements-build.txt \
    && pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels . \
    && pip install --no-cache-dir --no-deps --target /opt/vmoe -r docker/requirements.txt \
        -r docker/requirements-tensorrt.txt cuda-bindings==12.9.4 /wheels/*.whl \
    && sed -i '1s|.*|#!/usr/bin/env python3|' /opt/vmoe/bin/vmoe*

FROM nvcr.io/nvidia/tensorrt:25.03-py3
COPY --from=build /opt/vmoe /opt/vmoe
ENV PYTHONPATH=/opt/vmoe \
    PYTHONUNBUFFERED=1 \
    PATH=/opt/vmoe/bin:$PATH
# A base image whose Python or bindings are others fails here, not in the field.
RUN useradd --uid 10001 --create-home vmoe \
    && python3 -c "import vmoe.runtime, cv2, onnx, cuda.bindings; from importlib.util import find_spec as f; assert f('tensorrt')"
USER 10001
WORKDIR /home/vmoe
EXPOSE 8080
# Of --page or --metrics at port 8080; without either there is nothing to ask.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python3", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8080/healthz', timeout=4)"]
ENTRYPOINT ["vmoe-run"]
CMD ["--source", "test", "--page", "0.0.0.0:8080"]
