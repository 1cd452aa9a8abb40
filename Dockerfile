# remix-bids, for processors:
#
#     docker build -t remix-bids .
#
# with CUDA (the index of the wheels for your driver, as PyTorch's installation page names it):
#
#     docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu126 \
#         --build-arg TAG=remix-bids:cuda -t remix-bids:cuda .
#
# without a connection to TemplateFlow, with the templates of another machine:
#
#     docker build --build-context templates=$HOME/.cache/templateflow -t remix-bids .
#
# PIP_ARGS goes to every call of pip (an index or a folder of wheels of your own).

ARG BASE=python:3.11-slim-bookworm

# --- the environment: everything but remix-bids itself, so that its code can change alone ----------
FROM ${BASE} AS environment
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG PIP_ARGS=
COPY requirements.txt /build/
# Below "Checks and tests" stands what only developers need. torch goes first and alone, so that its
# index serves nothing else.
RUN sed '/^# Checks and tests/,$d' /build/requirements.txt > /build/runtime.txt \
    && python -m venv --without-pip /app/venv \
    && pip="python -m pip --python /app/venv/bin/python install --no-cache-dir ${PIP_ARGS}" \
    && $pip ${TORCH_INDEX:+--index-url ${TORCH_INDEX}} "$(grep '^torch==' /build/runtime.txt)" \
    && $pip -r /build/runtime.txt

# --- the templates: given as a build context of this name, or downloaded ---------------------------
# (Some file, because an empty stage cannot be mounted everywhere.)
FROM scratch AS templates
COPY LICENSE /

FROM environment AS template-home
ARG TEMPLATES=templateflow
COPY docker/templates.py /build/
RUN --mount=type=bind,from=templates,target=/given \
    /app/venv/bin/python /build/templates.py /given /app/templateflow "${TEMPLATES}"

# --- remix-bids itself: its wheel, unpacked as it will lie in the environment ----------------------
FROM environment AS package
ARG PIP_ARGS=
COPY . /build/source
RUN python -m pip wheel --no-cache-dir --no-deps ${PIP_ARGS} --wheel-dir /build/wheel /build/source \
    && python -m pip --python /app/venv/bin/python install --no-cache-dir --no-deps --no-index \
       --prefix /package /build/wheel/*.whl

# --- what is shipped ------------------------------------------------------------------------------
FROM ${BASE} AS runtime
COPY --from=environment /app/venv /app/venv
COPY --from=template-home /app/templateflow /app/templateflow
COPY --from=package /package /app/venv

# HOME is a place where any user may write, also where nothing but /tmp can be written to. The
# thread counts are those of the app's own settings: it starts as many processes as it may.
ENV HOME=/tmp
ENV PATH=/app/venv/bin:$PATH \
    MPLCONFIGDIR=$HOME/matplotlib \
    TEMPLATEFLOW_HOME=/app/templateflow \
    TEMPLATEFLOW_AUTOUPDATE=off \
    OMP_NUM_THREADS=1 \
    OPENBLAS_NUM_THREADS=1 \
    MKL_NUM_THREADS=1 \
    ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS=1 \
    NO_ET=1 \
    NIPYPE_NO_ET=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONNOUSERSITE=1 \
    LANG=C.UTF-8
WORKDIR /tmp

# Last, because they change most often and cost nothing.
ARG TEMPLATES=templateflow
ARG VERSION=0.1.0
ARG REVISION=unknown
ARG TAG=remix-bids:${VERSION}
ENV REMIX_BIDS_CONTAINER=docker:${TAG}
LABEL org.opencontainers.image.title="remix-bids" \
      org.opencontainers.image.description="BIDS App that super-resolves clinical T1w brain MRI with a mixture of seven 3D U-Net experts" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      templates="${TEMPLATES}"
ENTRYPOINT ["remix-bids"]
