# vmoe-run on a CPU. From the repository's root:
#   docker build -f docker/cpu.Dockerfile -t vmoe:cpu .
#   docker run --rm -p 127.0.0.1:8080:8080 vmoe:cpu
FROM python:3.12.12-slim-bookworm AS build
WORKDIR /src
COPY . .
# A folder of its own, for any Python 3.12: the image itself needs no pip.
RUN pip install --no-cache-dir --no-deps -r docker/requirements-build.txt \
    && pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels . \
    && pip install --no-cache-dir --no-deps --target /opt/vmoe -r docker/requirements.txt \
        /wheels/*.whl \
    && sed -i '1s|.*|#!/usr/bin/env python3|' /opt/vmoe/bin/vmoe*

FROM python:3.12.12-slim-bookworm
COPY --from=build /opt/vmoe /opt/vmoe
ENV PYTHONPATH=/opt/vmoe \
    PYTHONUNBUFFERED=1 \
    PATH=/opt/vmoe/bin:$PATH
RUN useradd --uid 10001 --create-home vmoe \
    && python3 -c "import vmoe.runtime, cv2, onnxruntime"
USER 10001
WORKDIR /home/vmoe
EXPOSE 8080
# Of --page or --metrics at port 8080; without either there is nothing to ask.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
    CMD ["python3", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8080/healthz', timeout=4)"]
ENTRYPOINT ["vmoe-run"]
CMD ["--source", "test", "--page", "0.0.0.0:8080"]
