# Halfling in NVIDIA's PyTorch image. NOT BUILT YET: written without a Docker daemon, and checked by reading only.
#   docker build -t halfling .
#   docker run --gpus all --ipc=host --ulimit memlock=-1 -v $PWD:/work halfling halfling launch pretrain --help
# 26.05 holds torch 2.12 (a pre-release), CUDA 13.2 and NCCL.
ARG BASE=nvcr.io/nvidia/pytorch:26.05-py3
FROM ${BASE}

# pdsh and ssh for `deepspeed --hostfile`. The image brings its own MPI.
RUN apt-get update \
    && apt-get install -y --no-install-recommends pdsh openssh-client \
    && rm -rf /var/lib/apt/lists/*

COPY . /opt/halfling
# The image's torch stays: it is built for its CUDA and NCCL. Its own constraints would keep back other packages.
RUN python -c "import torch; print(f'torch=={torch.__version__}')" > /opt/torch.txt \
    && PIP_CONSTRAINT=/opt/torch.txt pip install --no-cache-dir '/opt/halfling' mpi4py \
    && halfling --help > /dev/null

WORKDIR /work
