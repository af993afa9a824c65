# Everything of histogen in one image.
#
#   docker build -t histogen .                                          with CUDA (the wheels bring it; hosts need a driver)
#   docker build -t histogen:cpu --build-arg TORCH_INDEX=URL .          without: URL is PyTorch's own index of CPU builds
#   docker run --gpus all --user "$(id -u):$(id -g)" -v /data:/data histogen pipeline scan /data/slides --dataset /data/dataset
#
# The first word after the image is the room: pipeline, train or evaluate.
FROM python:3.11-slim-bookworm

ARG TORCH_INDEX=""
SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# torch.compile builds kernels at run time and needs a C compiler for it.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc=4:12.* libc6-dev=2.36-* \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/histogen
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY common common
COPY pipeline pipeline
COPY model model
COPY train train
COPY evaluate evaluate

# CPU builds bear a version suffix of their own, and no CUDA packages: both come from the index given.
RUN grep -Ev '^(torch|torchvision)==' constraints.txt > /tmp/constraints.txt \
    && if [ -n "$TORCH_INDEX" ]; then \
         pip install --no-cache-dir --index-url "$TORCH_INDEX" \
           "$(grep -E '^torch==' constraints.txt)" "$(grep -E '^torchvision==' constraints.txt)"; \
       else cp constraints.txt /tmp/constraints.txt; fi \
    && pip install --no-cache-dir --constraint /tmp/constraints.txt --editable '.[slurm,diffusers,onnx,h5]'

# A stray train.py in the working folder must not run in place of ours; caches go where any user may write.
ENV PYTHONSAFEPATH=1 \
    OMP_WAIT_POLICY=PASSIVE \
    HOME=/tmp \
    TORCHINDUCTOR_CACHE_DIR=/tmp/inductor
WORKDIR /data
ENTRYPOINT ["python", "-m"]
CMD ["pipeline", "--help"]
