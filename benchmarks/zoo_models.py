"""The models of an offline zoo for structured channel pruning: random weights, small inputs, nothing to download."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Example = tuple[tuple[Any, ...], dict[str, Any]]
"""The positional and the named arguments of one forward."""

Row = tuple[Any, ...]
"""A name and its makers, in the order of ``Entry``."""

SEED = 0


@dataclass(frozen=True)
class Entry:
    """One model of the zoo. ``build`` and the examples seed torch: each call gives the same values again."""

    name: str
    family: str
    build: Callable[[], nn.Module]
    example: Callable[[], Example]
    """What forward takes in eval mode."""
    train_example: Callable[[], Example] | None = None
    """What forward takes in training, where that is something else."""


def entries(families: Iterable[str] | None = None) -> dict[str, Entry]:
    """The models of these families, or of all. Only what the asked families need is imported."""
    found: dict[str, Entry] = {}
    for family in FAMILIES if families is None else families:
        for name, *makers in FAMILIES[family]():
            if name in found:
                raise ValueError(f"{name}: in the zoo twice, in {found[name].family} and in {family}")
            found[name] = Entry(name, family, *(partial(_seeded, make) for make in makers))
    return found


def _seeded(make: Callable[[], Any]) -> Any:
    torch.manual_seed(SEED)
    return make()


def _images(size: int, batch: int = 1) -> Example:
    return (torch.randn(batch, 3, size, size),), {}


# ---- torchvision: classification and segmentation -------------------------------------------------------------------


def _classification() -> list[Row]:
    """Inception's auxiliary head needs 299 pixels and the transformers 224, convolutional networks take any size."""
    from torchvision import models

    rows: list[Row] = []
    for name in models.list_models(module=models):
        options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        size = 299 if name == "inception_v3" else 224 if name.startswith(("vit_", "swin_", "maxvit_")) else 64
        build = partial(models.get_model, name, weights=None, **options)
        rows.append((name, build, partial(_images, size, batch=2 if size == 64 else 1)))
    return rows


def _segmentation() -> list[Row]:
    """With the auxiliary head, which LR-ASPP does not have."""
    from torchvision import models

    rows: list[Row] = []
    for name in models.list_models(module=models.segmentation):
        options = {} if name.startswith("lraspp") else {"aux_loss": True}
        build = partial(models.get_model, name, weights=None, weights_backbone=None, **options)
        rows.append((name, build, partial(_images, 128)))
    return rows


# ---- torchvision: detection -----------------------------------------------------------------------------------------

_RESIZE = {"min_size": 160, "max_size": 160}
_DENSE = {"score_thresh": 1e-6, "topk_candidates": 100, "detections_per_img": 8}
_REGIONS = {
    **{"rpn_score_thresh": 0.0, "rpn_pre_nms_top_n_test": 100, "rpn_post_nms_top_n_test": 50},
    **{"rpn_pre_nms_top_n_train": 100, "rpn_post_nms_top_n_train": 50},
    **{"box_score_thresh": 0.0, "box_detections_per_img": 8, "box_batch_size_per_image": 16},
}
_FROZEN = {
    **dict.fromkeys(
        ("fasterrcnn_resnet50_fpn_v2", "maskrcnn_resnet50_fpn_v2", "retinanet_resnet50_fpn_v2"),
        ("body.conv1.", "body.bn1.", "body.layer1."),
    ),
    "ssd300_vgg16": ("features.0.", "features.2."),
}
"""What the pretrained detector does not train in its backbone, where that backbone has ordinary norms or none."""


def _detection() -> list[Row]:
    from torchvision import models

    return [
        (name, partial(_detector, name), _detector_example, partial(_detector_train_example, name))
        for name in models.list_models(module=models.detection)
    ]


def _detector(name: str) -> nn.Module:
    """As the pretrained one is built: the same frozen norms, the same parameters that do not train."""
    from torchvision.models import get_model

    options: dict[str, Any] = dict(_REGIONS if "rcnn" in name else _DENSE)
    if not name.startswith("ssd"):
        options |= _RESIZE
    if name == "ssd300_vgg16":
        options["image_std"] = [0.5] * 3  # its own, 1 / 255, drives the scores of random weights to exactly one
    model = get_model(name, weights=None, weights_backbone=None, **options)
    if not name.startswith("ssd") and not name.endswith("_v2"):
        model.backbone = _frozen_norm_backbone(name)
    for key, parameter in model.backbone.named_parameters():
        if key.startswith(_FROZEN.get(name, ())):
            parameter.requires_grad_(False)
    return model


def _frozen_norm_backbone(name: str) -> nn.Module:
    """With FrozenBatchNorm2d: the weights of COCO set its epsilon to zero in all of these ResNets but FCOS's."""
    from torchvision.models.detection.backbone_utils import mobilenet_backbone, resnet_fpn_backbone
    from torchvision.ops import FrozenBatchNorm2d
    from torchvision.ops.feature_pyramid_network import LastLevelP6P7

    options: dict[str, Any] = {"weights": None, "norm_layer": FrozenBatchNorm2d, "trainable_layers": 3}
    if "mobilenet" in name:
        return mobilenet_backbone(backbone_name="mobilenet_v3_large", fpn=True, **options)
    if name.startswith(("retinanet", "fcos")):
        options |= {"returned_layers": [2, 3, 4], "extra_blocks": LastLevelP6P7(256, 256)}
    backbone = resnet_fpn_backbone(backbone_name="resnet50", **options)
    for module in backbone.modules():
        if isinstance(module, FrozenBatchNorm2d) and not name.startswith("fcos"):
            module.eps = 0.0
    return backbone


def _detector_example() -> Example:
    return ([torch.rand(3, 160, 160)],), {}


def _detector_train_example(name: str) -> Example:
    """One image and its targets: two objects, with masks and key points where the detector learns them."""
    (images,), _ = _detector_example()
    target = {"boxes": torch.tensor([[16.0, 24.0, 88.0, 120.0], [64.0, 32.0, 144.0, 96.0]])}
    target["labels"] = torch.ones(2, dtype=torch.int64)
    if name.startswith("maskrcnn"):
        target["masks"] = torch.zeros(2, 160, 160, dtype=torch.uint8)
        target["masks"][:, 32:96, 64:88] = 1
    if name.startswith("keypointrcnn"):
        places = torch.tensor([64.0, 32.0]) + torch.rand(2, 17, 2) * torch.tensor([24.0, 64.0])
        target["keypoints"] = torch.cat([places, torch.ones(2, 17, 1)], dim=2)
    return (images, [target]), {}


# ---- ultralytics ----------------------------------------------------------------------------------------------------

YOLO_NAMES = (
    *("yolov5n", "yolov5s", "yolov8n", "yolov8s", "yolov9t", "yolov10n", "yolo11n", "yolo12n"),
    *("yolov8n-seg", "yolov8n-cls"),
    *("yolo26n", "yolo26n-seg", "yolo26n-pose", "yolo26n-obb", "yolo26n-cls"),
)


def _ultralytics() -> list[Row]:
    return [(name, partial(_yolo, name), partial(_images, 128)) for name in YOLO_NAMES]


def _yolo(name: str) -> nn.Module:
    from apps.yolov5.ultralytics_adapter import tasks

    kinds = {
        **{"seg": tasks.SegmentationModel, "cls": tasks.ClassificationModel},
        **{"pose": tasks.PoseModel, "obb": tasks.OBBModel},
    }
    kind = kinds.get(name.rpartition("-")[2], tasks.DetectionModel)
    return kind(f"{name}.yaml", ch=3, nc=80, verbose=False)


# ---- transformers ---------------------------------------------------------------------------------------------------

_VOCABULARY = {"vocab_size": 1000}
_BLOCKS = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
_TEXT = {**_BLOCKS, **_VOCABULARY}
_PATCHES = {**_BLOCKS, "image_size": 64, "patch_size": 16}
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_TWO_STACKS = {
    **{"d_model": 128, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 256},
    **{"decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 256},
    **{**_VOCABULARY, **_SPECIAL, "decoder_start_token_id": 1},
}
_DEBERTA = {"relative_attention": True, "position_buckets": 16, "pos_att_type": ["p2c", "c2p"], "share_att_key": True}
_SPEECH = {
    **{"conv_dim": (64,) * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4},
    **{"apply_spec_augment": False, "layerdrop": 0.0},
}
_STAGES = {"depths": [1, 1, 2, 1], "hidden_sizes": [32, 64, 128, 256]}
_BACKBONE = {**_STAGES, "embedding_size": 32}
_ENCODER_DECODER = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_layers": 2}
_QUERIES = {**_ENCODER_DECODER, "d_model": 64, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "num_queries": 20}


def _named(use_cache: bool | None = None, **shapes: tuple[int, ...]) -> Example:
    """Numbers of tokens for ids, noise for the rest; plain tuples of tensors come back."""
    options = {"return_dict": False} if use_cache is None else {"return_dict": False, "use_cache": use_cache}
    ids = {name: torch.randint(3, 1000, shape) for name, shape in shapes.items() if name.endswith("_ids")}
    return (), {**ids, **{name: torch.randn(shape) for name, shape in shapes.items() if name not in ids}, **options}


_text_example = partial(_named, input_ids=(2, 16))
_causal_example = partial(_text_example, use_cache=False)
_text_to_text_example = partial(_causal_example, decoder_input_ids=(2, 8))
_pixel_example = partial(_named, pixel_values=(2, 3, 64, 64))
_wave_example = partial(_named, input_values=(2, 4000))
_spectrum_example = partial(_named, use_cache=False, input_features=(2, 80, 200), decoder_input_ids=(2, 8))

TRANSFORMERS: dict[str, tuple[dict[str, Any], Callable[[], Example]]] = {
    "BertModel": (_TEXT, _text_example),
    "BertForSequenceClassification": (_TEXT, _text_example),
    "DistilBertModel": ({"dim": 128, "n_layers": 2, "n_heads": 4, "hidden_dim": 256, **_VOCABULARY}, _text_example),
    "RobertaModel": (_TEXT, _text_example),
    "AlbertModel": ({**_TEXT, "embedding_size": 64}, _text_example),
    "ElectraModel": ({**_TEXT, "embedding_size": 64}, _text_example),
    "DebertaV2Model": ({**_TEXT, **_DEBERTA}, _text_example),
    "GPT2LMHeadModel": ({"n_embd": 128, "n_layer": 2, "n_head": 4, **_VOCABULARY, **_SPECIAL}, _causal_example),
    "LlamaForCausalLM": ({**_TEXT, "num_key_value_heads": 2}, _causal_example),
    "Qwen2ForCausalLM": ({**_TEXT, "num_key_value_heads": 2}, _causal_example),
    "Qwen3ForCausalLM": ({**_TEXT, "num_key_value_heads": 2, "head_dim": 32}, _causal_example),
    "Gemma3ForCausalLM": ({**_TEXT, "num_key_value_heads": 2, "head_dim": 32}, _causal_example),
    "ModernBertModel": ({**_TEXT, **_SPECIAL, "cls_token_id": 1, "sep_token_id": 2}, _text_example),
    "MixtralForCausalLM": ({**_TEXT, "num_key_value_heads": 2, "num_local_experts": 4}, _causal_example),
    "OPTForCausalLM": ({**_TEXT, "ffn_dim": 256, "word_embed_proj_dim": 128}, _causal_example),
    "T5ForConditionalGeneration": (
        {"d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 2, "num_heads": 4, **_VOCABULARY},
        _text_to_text_example,
    ),
    "BartModel": (_TWO_STACKS, _text_to_text_example),
    "ViTForImageClassification": (_PATCHES, _pixel_example),
    "DeiTModel": (_PATCHES, _pixel_example),
    "SwinForImageClassification": (
        {"image_size": 64, "embed_dim": 32, "depths": [2, 2, 2], "num_heads": [2, 4, 8], "window_size": 4},
        _pixel_example,
    ),
    "ConvNextForImageClassification": (_STAGES, _pixel_example),
    "SegformerModel": ({"hidden_sizes": [32, 64, 128, 256]}, _pixel_example),
    "ResNetForImageClassification": (_STAGES, _pixel_example),
    "CLIPVisionModel": (_PATCHES, _pixel_example),
    "Dinov2Model": (_PATCHES, _pixel_example),
    "SiglipVisionModel": (_PATCHES, _pixel_example),
    "DetrForObjectDetection": (
        {
            **{**_QUERIES, "encoder_layers": 2, "dropout": 0.0, "use_timm_backbone": False, "backbone": None},
            **{"use_pretrained_backbone": False},
            "backbone_config": {"model_type": "resnet", **_BACKBONE, "out_features": ["stage4"]},
        },
        _pixel_example,
    ),
    "RTDetrForObjectDetection": (
        {
            **{**_QUERIES, "encoder_hidden_dim": 64, "encoder_in_channels": [64, 128, 256], "num_denoising": 0},
            **{"decoder_in_channels": [64, 64, 64], "feat_strides": [8, 16, 32]},
            "backbone_config": {
                **{"model_type": "rt_detr_resnet", **_BACKBONE, "layer_type": "basic"},
                "out_features": ["stage2", "stage3", "stage4"],
            },
        },
        _pixel_example,
    ),
    "Wav2Vec2Model": ({**_BLOCKS, **_SPEECH}, _wave_example),
    "WhisperModel": ({**_TWO_STACKS, "num_mel_bins": 80, "max_source_positions": 100}, _spectrum_example),
}


def _transformers() -> list[Row]:
    return [(name, partial(_transformer, name), example) for name, (_, example) in TRANSFORMERS.items()]


def _transformer(name: str) -> nn.Module:
    import transformers

    kind = getattr(transformers, name)
    model: nn.Module = kind(kind.config_class(**TRANSFORMERS[name][0]))
    return model.requires_grad_(True)  # the backbone of a DETR is frozen, and frozen weights stay


# ---- hand-written nets ----------------------------------------------------------------------------------------------


def _nets() -> list[Row]:
    nets = importlib.import_module("tests.support.nets").NETS
    return [(name, build, partial(_net_example, inputs)) for name, (build, inputs) in nets.items()]


def _handwritten() -> list[Row]:
    nets = importlib.import_module("tests.support.nets.handwritten").HANDWRITTEN
    real = {name: each for name, each in nets.items() if name != "FourierOperator"}  # the zoo's dtypes are real
    return [(name, build, partial(_net_example, inputs)) for name, (build, inputs, _) in real.items()]


def _net_example(inputs: Callable[[], Any]) -> Example:
    given = inputs()
    return (given if isinstance(given, tuple) else (given,)), {}


FAMILIES: dict[str, Callable[[], list[Row]]] = {
    "classification": _classification,
    "segmentation": _segmentation,
    "detection": _detection,
    "ultralytics": _ultralytics,
    "transformers": _transformers,
    "nets": _nets,
    "handwritten": _handwritten,
}


# ---- random values that leave no part of a model without effect -----------------------------------------------------


@torch.no_grad()
def randomise_(model: nn.Module, example: Example | None = None) -> None:
    """Moves a fresh model away from the values that hide errors; the same model gets the same values.

    Constant parameters (the scale and the shift of norms, layer scales, biases, tables of zeros) are spread out and
    filled with small noise, weights that start so narrow that the signal fades are widened, and the statistics of
    norms become random. With an ``example`` those statistics have the scale of what reaches the norm. Without it the
    signal grows by up to ten orders of magnitude in a deep network, or fades until only the biases are left, and the
    detectors with region proposals find nothing.
    """
    generator = torch.Generator().manual_seed(SEED)
    for parameter in model.parameters():
        _spread_(parameter, generator)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
            _widen_(module)
    norms = [module for module in model.modules() if isinstance(getattr(module, "running_var", None), Tensor)]
    for norm in norms:
        _set_statistics(norm, 1.0, generator)
        for key, values in norm.named_buffers(recurse=False):
            if key in ("weight", "bias"):  # frozen
                _spread_(values, generator)
    if example is not None:
        _measure_statistics(model, norms, example, generator)


def _factors(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.empty(like.shape).uniform_(0.5, 1.5, generator=generator).to(like)


def _noise(like: Tensor, generator: torch.Generator, scale: float = 0.05) -> Tensor:
    return torch.empty(like.shape).normal_(0.0, scale, generator=generator).to(like)


def _spread_(values: Tensor, generator: torch.Generator) -> None:
    """Fills a constant tensor with values around its own; one that already varies stays as it is."""
    if values.is_floating_point() and values.numel() and values.min() == values.max():
        values.mul_(_factors(values, generator)).add_(_noise(values, generator))


def _widen_(layer: nn.Linear | nn.modules.conv._ConvNd) -> None:
    """A weight drawn far below the scale that keeps the signal's size is brought up to it."""
    wanted = layer.weight.shape[1:].numel() ** -0.5
    spread = layer.weight.std(correction=0).item()
    if 0.0 < spread < 0.5 * wanted:
        layer.weight.mul_(wanted / spread)


def _set_statistics(norm: Any, power: float, generator: torch.Generator) -> None:
    """As of an input whose mean square is ``power``, somewhat different in each channel."""
    norm.running_mean.copy_(_noise(norm.running_mean, generator, scale=0.1 * power**0.5))
    norm.running_var.copy_(power * _factors(norm.running_var, generator))


def _measure_statistics(model: nn.Module, norms: list[nn.Module], example: Example, generator: torch.Generator) -> None:
    """One power for all channels of a norm: so few values would make each channel's own statistics chaotic."""

    def measure(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        _set_statistics(norm, inputs[0].square().mean().item() + 1e-6, generator)

    modes = {module: module.training for module in model.modules()}
    hooks = [norm.register_forward_pre_hook(measure) for norm in norms]
    try:
        model.eval()(*example[0], **example[1])
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
