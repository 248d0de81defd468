"""ImageReward's model: BLIP encoders and a reward head, and how its published file is read.

The published file (`ImageReward.pt`) is read by key mapping, its tensors only.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from llava.errors import UsageError
from llava.images import CLIP_MEAN, CLIP_STD

MEAN, STD = 0.16717362830052426, 1.0333394966054072
LAYERS = (1024, 128, 64, 16, 1)
_BLOCK, _LAYER = r"^blip\.visual_encoder\.blocks\.(\d+)\.", r"vision.encoder.layers.\1."
_NAMES = (  # published name -> transformers' name, in this order
    (r"^blip\.visual_encoder\.cls_token$", "vision.embeddings.class_embedding"),
    (r"^blip\.visual_encoder\.pos_embed$", "vision.embeddings.position_embedding"),
    (r"^blip\.visual_encoder\.patch_embed\.proj\.", "vision.embeddings.patch_embedding."),
    (r"^blip\.visual_encoder\.norm\.", "vision.post_layernorm."),
    (_BLOCK + r"norm(\d)\.", _LAYER + r"layer_norm\2."),
    (_BLOCK + r"attn\.proj\.", _LAYER + "self_attn.projection."),
    (_BLOCK + r"attn\.", _LAYER + "self_attn."),
    (_BLOCK + r"mlp\.", _LAYER + "mlp."),
    (r"^blip\.text_encoder\.", "text."),
    (r"^mlp\.layers\.", "head."),
)


class ImageRewardModel(nn.Module):
    """BLIP encoders and the reward head; `vision` and `text` are transformers' configurations."""

    def __init__(self, vision: dict[str, Any], text: dict[str, Any]) -> None:
        super().__init__()
        self.vision = BlipVisionModel(transformers.BlipVisionConfig(**vision))
        shown = self.vision.config.hidden_size
        config = transformers.BlipTextConfig(**{**text, "encoder_hidden_size": shown})
        self.text = BlipTextModel(config, add_pooling_layer=False)
        sizes = (config.hidden_size, *LAYERS)
        layers: list[nn.Module] = []
        for i, (read, written) in enumerate(zip(sizes, sizes[1:], strict=False)):
            # Between the linear layers the published head has dropout, which counts as a layer.
            layers += [nn.Linear(read, written)] + [nn.Identity()] * (i < 3)
        self.head = nn.Sequential(*layers)

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Rewards (B,) float32 of images (B, 3, H, W) with texts `ids`, `mask` (B, L)."""
        seen = self.vision(pixel_values=pixels).last_hidden_state
        read = self.text(
            input_ids=ids,
            attention_mask=mask,
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=mask.dtype, device=mask.device),
            is_decoder=False,
        ).last_hidden_state
        return (self.head(read[:, 0])[:, 0].float() - MEAN) / STD


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The published file's tensors under the names of `ImageRewardModel`; what it lacks is left."""
    tensors = {}
    for name, tensor in state.items():
        for pattern, replacement in _NAMES:
            new, n = re.subn(pattern, replacement, name)
            if n:
                tensors[new] = tensor
                break
    return tensors


def sizes_of(state: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The configurations of vision and text that renamed tensors (`renamed`) belong to."""
    # Most sizes are shapes of tensors; heads are 64 wide in every BLIP.
    patch = state["vision.embeddings.patch_embedding.weight"]  # (D, 3, P, P)
    n_patches = state["vision.embeddings.position_embedding"].shape[1] - 1
    words = state["text.embeddings.word_embeddings.weight"]
    shared = {"layer_norm_eps": 1e-6, "num_attention_heads": max(1, patch.shape[0] // 64)}
    vision = {
        "hidden_size": patch.shape[0],
        "intermediate_size": state["vision.encoder.layers.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": _count(state, "vision.encoder.layers"),
        "patch_size": patch.shape[2],
        "image_size": patch.shape[2] * round(n_patches**0.5),
        **shared,
    }
    text = {
        "vocab_size": words.shape[0],
        "hidden_size": words.shape[1],
        "intermediate_size": state["text.encoder.layer.0.intermediate.dense.weight"].shape[0],
        "num_hidden_layers": _count(state, "text.encoder.layer"),
        "num_attention_heads": max(1, words.shape[1] // 64),
        "max_position_embeddings": state["text.embeddings.position_embeddings.weight"].shape[0],
        "layer_norm_eps": 1e-12,
        "hidden_act": "gelu",
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id"), 0),
    }
    return vision, text


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    return 1 + max(int(n[len(prefix) + 1 :].split(".")[0]) for n in state if n.startswith(prefix))


class RewardModel:
    """The published weights with tokenizer and image processor."""

    def __init__(
        self, path: Path, tokenizer: Path, dtype: torch.dtype, device: torch.device
    ) -> None:
        try:
            suffix = path.suffix == ".safetensors"
            state = load_file(path) if suffix else torch.load(path, "cpu", weights_only=True)
            state = renamed(state)
            self.model = ImageRewardModel(*sizes_of(state))
            # The published file holds tensors that scoring does not read; one too few is an error.
            names = set(self.model.state_dict())
            self.model.load_state_dict({name: state[name] for name in state if name in names})
        except (OSError, RuntimeError, KeyError, ValueError, pickle.UnpicklingError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UsageError(
                f"--image_reward {path}: not ImageReward's weights ({reason})"
            ) from None
        # Pixels and words as the published code prepares them.
        safely = {"local_files_only": True, "trust_remote_code": False}
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer, **safely)
        side = self.model.vision.config.image_size
        self.processor = transformers.CLIPImageProcessorPil(
            size={"shortest_edge": side},
            crop_size={"height": side, "width": side},
            image_mean=list(CLIP_MEAN),
            image_std=list(CLIP_STD),
        )
        self.model.to(device, dtype).eval()

    def identity(self) -> dict[str, Any]:
        """What decides numbers besides the weights, JSON-serialisable."""
        dtype = str(next(self.model.parameters()).dtype).removeprefix("torch.")
        versions = {m.__name__: m.__version__.rsplit(".", 1)[0] for m in (torch, transformers)}
        return {"kind": "image_reward", "dtype": dtype, **versions}
