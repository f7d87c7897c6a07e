# vmoe-run with TensorRT, for servers with an NVIDIA GPU. From the repository's root:
#   docker build -f docker/tensorrt.Dockerfile -t vmoe:tensorrt .
#   docker run --rm --gpus all -p 127.0.0.1:8080:8080 -v "$PWD/runs/mine-trt:/bundle:ro" \
#       vmoe:tensorrt /bundle --backend tensorrt --trust --source test --page 0.0.0.0:8080
# A plan is for one version of TensorRT: build it in the image that runs it, whose target `export` has
# what vmoe-export needs (docker build --target export). Here: TensorRT 10.9, CUDA 12.8, Python 3.12,
# as in tritonserver:25.03-py3.
FROM python:3.12.12-slim-bookworm AS build
WORKDIR /src
COPY . .
# A folder of its own, for any Python 3.12: the image itself needs no pip.
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels . \
    && pip install --no-cache-dir --no-deps --target /opt/vmoe -r docker/requirements.txt \
        cuda-bindings==12.9.4 cuda-pathfinder==1.9.1 /wheels/*.whl \
    && sed -i '1s|.*|#!/usr/bin/env python3|' /opt/vmoe/bin/vmoe*

FROM nvcr.io/nvidia/tensorrt:25.03-py3 AS run
COPY --from=build /opt/vmoe /opt/vmoe
ENV PYTHONPATH=/opt/vmoe \
    PYTHONUNBUFFERED=1 \
    PATH=/opt/vmoe/bin:$PATH
# A base image whose Python or bindings are others fails here, not in the field.
RUN useradd --uid 10001 --create-home vmoe \
    && python3 -c "import vmoe.runtime, cv2, cuda.bindings; from importlib.util import find_spec as f; assert f('tensorrt')"
USER 10001
WORKDIR /home/vmoe
EXPOSE 8080
# Of --page or --metrics at port 8080; without either there is nothing to ask.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python3", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8080/healthz', timeout=4)"]
ENTRYPOINT ["vmoe-run"]
CMD ["--source", "test", "--page", "0.0.0.0:8080"]

FROM build AS train
RUN pip install --no-cache-dir --target /opt/train \
    --extra-index-url https://download.pytorch.org/whl/cpu \
    torch==2.9.1+cpu onnx==1.19.1 onnxscript==0.5.6 safetensors==0.7.0

FROM run AS export
COPY --from=train /opt/train /opt/train
ENV PYTHONPATH=/opt/vmoe:/opt/train
HEALTHCHECK NONE
ENTRYPOINT ["vmoe-export"]
CMD ["--trt", "--fp16"]

# What `docker build` makes where no target is named.
FROM run
