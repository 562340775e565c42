"""A training script of Megatron-LM's shape, with a `LLaVAModel` in one piece; knows no PipeWeaver.

It stands for scripts that people have: providers as functions, one `pretrain` at the end.
"""

from copy import deepcopy
from functools import partial

import torch
from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.core.models.multimodal.llava_model import DEFAULT_IMAGE_TOKEN_INDEX, LLaVAModel
from megatron.core.models.multimodal.llava_spec import decoder_model_with_local_default_spec
from megatron.core.models.vision.vit_layer_specs import get_vit_layer_with_local_spec
from megatron.core.transformer.spec_utils import get_submodules
from megatron.training import get_args, pretrain
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.arguments import core_transformer_config_from_args, parse_and_validate_args

TEXT = 12


def model_provider(pre_process=True, post_process=True, config=None, pg_collection=None):
    args = get_args()
    language = core_transformer_config_from_args(args)
    language.num_layers = args.decoder_num_layers
    vision = deepcopy(language)
    vision.num_layers = args.encoder_num_layers
    vision.vision_model_type = "clip"
    layer = decoder_model_with_local_default_spec(None, False)
    model = LLaVAModel(
        language_transformer_config=language,
        language_transformer_layer_spec=layer,
        language_vocab_size=args.padded_vocab_size,
        language_max_sequence_length=64,
        vision_transformer_config=vision,
        vision_transformer_layer_spec=get_vit_layer_with_local_spec(),
        drop_vision_class_token=False,
        vision_projection_config=deepcopy(language),
        vision_projection_layer_spec=deepcopy(get_submodules(layer.submodules.mlp)),
        language_position_embedding_type=args.position_embedding_type,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        add_encoder=parallel_state.is_pipeline_first_stage(),
        img_h=args.img_h,
        img_w=args.img_w,
        patch_dim=args.patch_dim,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
    )
    model.freeze(
        freeze_language_model=args.freeze_LM,
        freeze_vision_model=args.freeze_ViT,
        freeze_vision_projection=False,
    )
    return model


def add_arguments(parser):
    parser.add_argument("--freeze-LM", action="store_true")
    parser.add_argument("--freeze-ViT", action="store_true")
    return parser


def microbatches(size):
    rank, ranks = (
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_data_parallel_world_size(),
    )
    number = rank
    while True:
        draw = torch.Generator().manual_seed(number)
        tokens = torch.randint(0, 60, (size, TEXT + 1), generator=draw)
        images = number % 3
        tokens[:, 2 : 2 + 2 * images : 2] = DEFAULT_IMAGE_TOKEN_INDEX
        yield {
            "tokens": tokens[:, :-1],
            "labels": tokens[:, 1:].clamp(min=0),
            "image": torch.randn(size * images, 3, 8, 8, generator=draw),
            "loss_mask": (tokens[:, :-1] >= 0).float(),
            "position_ids": torch.arange(TEXT).repeat(size, 1),
        }
        number += ranks


def datasets_provider(train_val_test_num_samples):
    return [microbatches(get_args().micro_batch_size) for _ in range(3)]


def loss_func(loss_mask, losses):
    mask = loss_mask.view(-1).float()
    total = torch.sum(losses.view(-1).float() * mask)
    count = mask.sum().to(torch.int)
    return total, count, {"lm loss": torch.stack([total.detach().clone(), count.float()])}


def forward_step(data_iterator, model):
    data = next(data_iterator)
    output, loss_mask = model(
        data["image"],
        data["tokens"],
        data["position_ids"],
        None,
        data["labels"],
        data["loss_mask"],
    )
    return output, partial(loss_func, loss_mask)


if __name__ == "__main__":
    datasets_provider.is_distributed = True
    args = parse_and_validate_args(
        extra_args_provider=add_arguments,
        args_defaults={"tokenizer_type": "NullTokenizer", "dataloader_type": "external"},
    )
    args.dataloader_seq_length = TEXT
    pretrain(
        pretrain_cfg_container_from_args(args),
        datasets_provider,
        ModelType.encoder_or_decoder,
        forward_step,
        model_provider,
    )
