#!/bin/sh
# Fine-tune on several machines without a scheduler. On each of them, with its own number (0, 1, …):
#   MASTER_ADDR=node0 NNODES=2 sh train-node.sh NUMBER train.yaml [section.key=value …]
set -eu

number=$1
shift
exec torchrun --nnodes="${NNODES:?how many machines}" --node_rank="$number" --nproc_per_node="${NPROC_PER_NODE:-8}" \
    --master_addr="${MASTER_ADDR:?name of machine 0}" --master_port="${MASTER_PORT:-29500}" \
    -m mm_finetune train "$@"
