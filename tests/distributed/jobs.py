"""The jobs whose losses the tests of Megatron's training loop compare, by name."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

from tests.distributed.pretraining import Run

WAITING = shlex.split(
    "--pipeweaver --pipeweaver-fallback wait --pipeweaver-search-seconds 0.02 "
    "--pipeweaver-sub-microbatch vision=2"
)
OVERLAP = ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]
STORED = shlex.split("--ckpt-format torch_dist --dist-ckpt-optim-fully-reshardable")
SAVED, LOADED = (
    [*STORED, "--save", "{directory}/pipeweaver", "--save-interval", "10"],
    [*STORED, "--load", "{directory}/pipeweaver", "--ckpt-step", "10"],
)
TEXT_SAVED, TEXT_LOADED = (
    ["--ckpt-format", "torch_dist", "--save", "{directory}/text", "--save-interval", "10"],
    ["--ckpt-format", "torch_dist", "--load", "{directory}/text", "--ckpt-step", "10"],
)
"""The distributed optimizer's usual format, which goes on in the same layout only."""
TENSOR_TWO = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]


def pipeline(size: int, *more: str) -> list[str]:
    """Flags of a job with PipeWeaver on `size` pipeline ranks that waits for its plans."""
    return ["--pipeline-model-parallel-size", str(size), *WAITING, *more]


TWO = pipeline(
    2, *OVERLAP, "--pipeweaver-deterministic", "--pipeweaver-segments", "vision=1,language=2"
)
PLAIN: Mapping[str, Run] = {
    "plain": Run(flags=()),
    "plain, text": Run(flags=(), images=0),
}
"""Megatron without PipeWeaver: one pipeline rank, four replicas, the same batches."""
IMAGES: Mapping[str, Run] = {
    "PP 2 x DP 2, overlap": Run(flags=[*TWO, *SAVED]),
    "PP 2 x TP 2, sequence parallel": Run(flags=pipeline(2, *TENSOR_TWO)),
    "PP 2 x CP 2": Run(flags=pipeline(2, *OVERLAP, "--context-parallel-size", "2")),
    "PP 4, on the host": Run(
        flags=pipeline(
            4,
            *("--pipeweaver-segments", "vision=1,language=1", "--pipeweaver-strategies", "offload"),
        )
    ),
}
EXPERTS = shlex.split(
    "--num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 48 --moe-aux-loss-coeff 0.05 "
    "--moe-layer-freq ([0]*1+[1]*3) --moe-shared-expert-intermediate-size 16 "
    "--disable-bias-linear --moe-token-dispatcher-type alltoall"
)
SHARING = [*TWO, *EXPERTS, "--expert-model-parallel-size", "2"]
EXPERTS_SAVED, EXPERTS_LOADED = (
    [*STORED, "--save", "{directory}/experts", "--save-interval", "10"],
    [*STORED, "--load", "{directory}/experts", "--ckpt-step", "10"],
)
SPARSE: Mapping[str, Run] = {
    "plain, experts": Run(flags=EXPERTS),
    "PP 2 x EP 2": Run(flags=[*SHARING, *EXPERTS_SAVED]),
    "PP 2 x TP 2, experts": Run(flags=pipeline(2, *EXPERTS, *TENSOR_TWO)),
}
"""Language models with experts; two replicas divide them in ``EP 2``, and share their plans."""
LATENT = shlex.split(
    "--multi-latent-attention --q-lora-rank 12 --kv-lora-rank 8 --qk-head-dim 8 "
    "--qk-pos-emb-head-dim 4 --v-head-dim 6 --qk-layernorm --normalization RMSNorm "
    "--rope-type rope --rotary-base 500"
)
LATENT_RUNS: Mapping[str, Run] = {
    "plain, latent": Run(flags=LATENT, iterations=4),
    "PP 2 x TP 2, latent": Run(
        flags=[
            *pipeline(2, *TENSOR_TWO, *LATENT),
            *("--pipeweaver-strategies", "keep,recompute_up_projection"),
        ],
        iterations=4,
    ),
}
TEXT: Mapping[str, Run] = {
    "PP 2 x DP 2, overlap, text": Run(flags=[*TWO, *TEXT_SAVED], images=0),
    "PP 2 x TP 2, sequence parallel, text": Run(flags=pipeline(2, *TENSOR_TWO), images=0),
    "PP 4, text": Run(flags=pipeline(4), images=0),
}
RESUMED: Mapping[str, Run] = {
    "resumed": Run(flags=[*TWO, *LOADED]),
    "resumed, EP 2": Run(flags=[*SHARING, *EXPERTS_LOADED]),
    "resumed, EP 2, other segments": Run(
        flags=[*SHARING, *EXPERTS_LOADED, "--pipeweaver-segments", "vision=1,language=1"]
    ),
    "resumed, text": Run(flags=[*TWO, *TEXT_LOADED], images=0),
    "resumed, PP 4": Run(
        flags=pipeline(4, "--use-distributed-optimizer", "--pipeweaver-balance", *LOADED)
    ),
    "resumed, plain": Run(
        flags=[
            *("--use-distributed-optimizer", *LOADED),
            *("--save", "{directory}/plain", "--save-interval", "15"),
        ]
    ),
    "resumed, and back": Run(
        flags=[
            *pipeline(2, *OVERLAP, "--pipeweaver-layers", "vision=2:0,language=3:1"),
            *(*STORED, "--load", "{directory}/plain", "--ckpt-step", "15"),
        ]
    ),
}

RAMPED = ["--calculate-per-token-loss", "--clip-grad", "0.5"]
SAMPLES = [
    *("--train-samples", "48", "--eval-interval", "8", "--eval-global-batch-size", "4"),
    *("--step-batch-size-schedule", "0:4 512:8"),  # in tokens: 8 samples from the 17th on
]
WRITING = shlex.split(
    "--tensorboard-dir {directory}/board --log-timers-to-tensorboard --timing-log-level 1 "
    "--wandb-project project --wandb-exp-name name --wandb-save-dir {directory}/wandb "
    "--pipeweaver --pipeweaver-config {directory}/pipeweaver.json "
    "--pipeweaver-trace-dir {directory}/traces"
)
CONFIG = '{"search_seconds": 0.02, "sub_microbatch": {"vision": 2}, "segments": {"language": 2}}'
"""What stands in ``{directory}/pipeweaver.json``."""
FP16 = shlex.split(
    "--fp16 --initial-loss-scale 4096 --hysteresis 1 --loss-scale-window 2 "
    "--calculate-per-token-loss --accumulate-allreduce-grads-in-fp32"
)
"""So that what overflows does not depend on how many microbatches a replica has."""
FROZEN = ["--freeze-ViT"]
DUTIES: Mapping[str, Run] = {
    "plain, ramped": Run(flags=RAMPED, length=SAMPLES),
    "ramped": Run(
        flags=["--pipeline-model-parallel-size", "2", *OVERLAP, *RAMPED, *WRITING], length=SAMPLES
    ),
    "plain, bf16": Run(flags=["--bf16"], iterations=4),
    "bf16": Run(flags=pipeline(4, "--bf16"), iterations=4),
    "plain, fp16": Run(flags=FP16, iterations=5),
    "fp16": Run(flags=pipeline(2, *OVERLAP, *FP16), iterations=5),
    "plain, frozen": Run(flags=FROZEN, iterations=3),
    "frozen, run twice": Run(flags=pipeline(2, *OVERLAP, *FROZEN), iterations=3, suspicious=True),
    "poisoned": Run(
        flags=[
            *pipeline(2, *OVERLAP, *STORED, "--save", "{directory}/poisoned"),
            *("--save-interval", "10", "--rerun-mode", "validate_results"),
        ],
        iterations=3,
        poisoned=2,
    ),
}
UNTIED = ["--untie-embeddings-and-output-weights"]
LLAVA_LAYOUTS: Mapping[str, list[str]] = {
    "PP 2 x DP 2": pipeline(2, *OVERLAP),
    "PP 4": [*pipeline(4), "--pipeweaver-fallback", "static"],
}
LLAVA_MODELS: Mapping[str, list[str]] = {
    "": UNTIED,
    " tied": [],
    " frozen LM": [*UNTIED, "--freeze-LM"],
    " frozen ViT": [*UNTIED, "--freeze-ViT"],
}
LLAVA: Mapping[str, Run] = {
    f"llava{name}, {layout}": Run(
        flags=[*flags, *more], iterations=20 if "tied" in name else 3, script="llava_script.py"
    )
    for layout, flags in {"plain": [], **LLAVA_LAYOUTS}.items()
    for name, more in LLAVA_MODELS.items()
    if layout != "PP 4" or "frozen" not in name
}
PHOTOGRAPHS = [
    *TWO,
    *shlex.split(
        "--energon {directory}/photographs --dataloader-save {directory}/photographs-read "
        "--packing-buffer 8 --vocab-size 256 --seq-length 160 --max-position-embeddings 160 "
        "--eval-iters 0 --ckpt-format torch_dist --img-h 16 --img-w 24 --spatial-merge-size 2 "
        "--vision-rotary --dynamic-image-sizes --position-embedding-type mrope "
        "--mrope-section 1 1 2"
    ),
]
ENERGON: Mapping[str, Run] = {
    "energon": Run(
        flags=[*PHOTOGRAPHS, "--save", "{directory}/packed", "--save-interval", "3"], iterations=8
    ),
    "energon, resumed": Run(
        flags=[*PHOTOGRAPHS, "--load", "{directory}/packed", "--ckpt-step", "3"], iterations=8
    ),
}
"""On a data set that `conftest` builds of photographs."""
QWEN_SIZES = shlex.split(
    "--encoder-num-layers 3 --decoder-num-layers 3 --hidden-size 32 --ffn-hidden-size 48 "
    "--img-h 16 --img-w 24 --patch-dim 4 --spatial-merge-size 2 --seq-length 48 "
    "--dynamic-image-sizes --ckpt-format torch_dist"
)
QWEN_IMPORTED = [*QWEN_SIZES, "--hf-model", "{directory}/qwen2_vl"]
QWEN_LOADED = [*QWEN_IMPORTED, "--load", "{directory}/qwen2_vl-imported"]
"""What stands in both folders comes from `conftest`."""
QWEN_LIKE = [
    *QWEN_SIZES,
    *shlex.split("--vision-rotary --position-embedding-type mrope --mrope-section 1 1 2"),
]
QWEN_TWO = pipeline(2, *OVERLAP, "--pipeweaver-deterministic")
QWEN: Mapping[str, Run] = {
    name: Run(flags=flags, iterations=4)
    for name, flags in {
        "qwen, plain": QWEN_LOADED,
        "qwen, PP 2": [
            *(*QWEN_LOADED, *QWEN_TWO, "--save", "{directory}/qwen-trained"),
            *("--save-interval", "2"),
        ],
        "qwen, resumed": [
            *(*QWEN_IMPORTED, *QWEN_TWO, "--load", "{directory}/qwen-trained"),
            *("--ckpt-step", "2"),
        ],
        "qwen-like, plain": QWEN_LIKE,
        "qwen-like, PP 4": [*QWEN_LIKE, *pipeline(4)],
    }.items()
}
RUNS: Mapping[str, Run] = {
    **PLAIN,
    **IMAGES,
    **SPARSE,
    **LATENT_RUNS,
    **TEXT,
    **RESUMED,
    **DUTIES,
    **LLAVA,
    **ENERGON,
    **QWEN,
}
