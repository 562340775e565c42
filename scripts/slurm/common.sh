# shellcheck shell=bash disable=SC2034
# What the job scripts of this folder share: environment, dry run, training. Source it; nothing
# runs by itself.
#
# A job script says what to reserve (#SBATCH), what the model is (MODEL), how it is split (PARALLEL)
# and which script trains it if not pretrain_vlm.py (SCRIPT), and calls `run_job "$@"`. What stands
# behind its name on the command line comes last, so it wins over all of that.
#
#   PIPEWEAVER_PYTHON   the Python with PipeWeaver and Megatron in it, on every node  [python3]
#   GPUS_PER_NODE       processes per node                         [what SLURM reserved, else 8]
#   NETWORK_INTERFACE   interface of NCCL's and gloo's set-up, `ip -br addr` shows them     [any]
#   MASTER_PORT         port of the rendezvous on the first node              [by the job's number]

ROOT=${PIPEWEAVER_ROOT:-${SLURM_SUBMIT_DIR:?submit with sbatch, from the root of the checkout}}
PIPEWEAVER_PYTHON=${PIPEWEAVER_PYTHON:-python3}
GPUS_PER_NODE=${GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-8}}
SCRIPT=pretrain_vlm.py

# Settings of Megatron and NCCL. `export VARIABLE=...` in front of sbatch wins.
set_environment() {
    # One queue of kernels: Megatron starts a collective right before the compute that hides it, and
    # with several queues the GPU may turn the two around. Tensor parallelism needs it up to Hopper.
    export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
    # The ranks of a node share its cores; more threads than that get in each other's way. The
    # search has threads of its own (--pipeweaver-search-threads).
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    # Sub-microbatches differ in size, and fixed segments of memory fragment under that.
    export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
    # A collective that fails ends the job instead of hanging it.
    export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}
    # Say what NCCL dislikes, and nothing else. INFO shows which networks it found.
    export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
    # Buffers that NVLS keeps per communicator; a pipeline has one for each pair of neighbours.
    export NCCL_NVLS_ENABLE=${NCCL_NVLS_ENABLE:-0}
    # Where nodes have several networks, NCCL and gloo may choose one that does not connect them.
    # InfiniBand and RoCE are found by NCCL itself (NCCL_IB_HCA and NCCL_IB_GID_INDEX if not).
    if [ -n "${NETWORK_INTERFACE:-}" ]; then
        export NCCL_SOCKET_IFNAME=$NETWORK_INTERFACE GLOO_SOCKET_IFNAME=$NETWORK_INTERFACE
    fi
}

# dry_run ARGUMENTS...: one process on one node plans two batches of the job and prints what they
# take. Arguments that do not fit, or a model that does not, end the job here, not on all nodes.
dry_run() {
    WORLD_SIZE=$((SLURM_JOB_NUM_NODES * GPUS_PER_NODE)) \
        srun --nodes 1 --ntasks 1 --ntasks-per-node 1 \
        "$PIPEWEAVER_PYTHON" "$ROOT/scripts/$SCRIPT" "$@" --pipeweaver-dry-run 2
}

# train ARGUMENTS...: one torchrun per node, which starts a process per GPU.
train() {
    local first port
    read -r first < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    # Two jobs that share a node have different numbers.
    port=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
    srun --nodes "$SLURM_JOB_NUM_NODES" --ntasks "$SLURM_JOB_NUM_NODES" --ntasks-per-node 1 \
        --kill-on-bad-exit 1 \
        "$PIPEWEAVER_PYTHON" -m torch.distributed.run \
        --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$GPUS_PER_NODE" \
        --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$first:$port" \
        "$ROOT/scripts/$SCRIPT" "$@"
}

# run_job ARGUMENTS...: the dry run, and if it ends well, training.
run_job() {
    local arguments=("${MODEL[@]}" "${PARALLEL[@]}" "${TRAINING[@]}" "$@")
    set_environment
    dry_run "${arguments[@]}" || return
    train "${arguments[@]}"
}

# Flags that all jobs train with.
TRAINING=(
    --pipeweaver --pipeweaver-search-threads 4 --pipeweaver-trace-dir "traces/${SLURM_JOB_ID:-0}"
    --bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
    --micro-batch-size 1 --global-batch-size 64 --train-iters 1000 --eval-interval 1000
    --eval-iters 1 --lr 1e-4 --min-lr 1e-5 --lr-decay-style cosine --lr-warmup-iters 50
    --clip-grad 1.0 --weight-decay 0.1 --attention-dropout 0 --hidden-dropout 0
    --log-interval 1 --ckpt-format torch_dist --mock-data
)

# Modules that several of the paper's models share (its section 7). Images have 728 x 728 pixels:
# 52 x 52 patches in the ViT, folded 4 x 4 into 169 tokens of the language model.
VIT_5B=(
    --encoder-num-layers 63 --vision-hidden-size 1792 --vision-ffn-hidden-size 15360
    --vision-num-attention-heads 16
)
VIT_22B=(
    --encoder-num-layers 48 --vision-hidden-size 6144 --vision-ffn-hidden-size 24576
    --vision-num-attention-heads 48
)
IMAGES=(--img-h 728 --img-w 728 --patch-dim 14 --spatial-merge-size 4 --max-images 48)
SEQUENCE=(
    --seq-length 8192 --max-position-embeddings 8192 --position-embedding-type rope
    --normalization RMSNorm --swiglu --group-query-attention --num-query-groups 8
    --disable-bias-linear --untie-embeddings-and-output-weights
)
LLAMA3_8B=(
    --decoder-num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32
    --rotary-base 500000 --vocab-size 128255
)
QWEN2_32B=(
    --decoder-num-layers 64 --hidden-size 5120 --ffn-hidden-size 27648 --num-attention-heads 40
    --rotary-base 1000000 --vocab-size 152063 --add-qkv-bias
)
QWEN2_72B=(
    --decoder-num-layers 80 --hidden-size 8192 --ffn-hidden-size 29568 --num-attention-heads 64
    --rotary-base 1000000 --vocab-size 152063 --add-qkv-bias
)

# The paper's text-to-video models. Clips have 16 s in all at 16 frames a second and 128 x 256
# pixels: 64 x 16 x 32 latents (4 x 8 x 8 to one), 8192 patches of 2 x 2.
CLIPS=(
    --img-h 16 --img-w 32 --patch-dim 2 --latent-channels 16 --seq-length 8192 --max-clips 8
    --prompt-length 256 --max-position-embeddings 8192 --position-embedding-type rope
    --normalization RMSNorm --swiglu --disable-bias-linear --qk-layernorm --modulation table
)
LLAMA3_8B_TEXT=(
    --encoder-num-layers 32 --text-hidden-size 4096 --text-ffn-hidden-size 14336
    --text-num-attention-heads 32 --text-num-query-groups 8 --rotary-base 500000
    --vocab-size 128255
)
QWEN2_32B_TEXT=(
    --encoder-num-layers 64 --text-hidden-size 5120 --text-ffn-hidden-size 27648
    --text-num-attention-heads 40 --text-num-query-groups 8 --rotary-base 1000000
    --vocab-size 152063 --add-qkv-bias
)
DIT_5B=(
    --decoder-num-layers 28 --hidden-size 3584 --ffn-hidden-size 10240 --num-attention-heads 28
)
DIT_30B=(
    --decoder-num-layers 48 --hidden-size 6144 --ffn-hidden-size 24576 --num-attention-heads 48
)
