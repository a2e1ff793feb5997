"""Text encoders as transformers itself builds and runs them, from the same files: what ours are held against."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import (
    BertConfig,
    BertModel,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)

END = 49407


def weights_of(path: Path, prefix: str = "") -> dict[str, torch.Tensor]:
    """A file's tensors below a prefix, float32."""
    return {
        key[len(prefix) :]: value.float() for key, value in load_file(path).items() if key.startswith(prefix)
    }


def of_openclip(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """OpenCLIP's tensors by transformers' names, written anew: x @ text_projection is a linear layer's x @ weight.T."""
    names = {
        "positional_embedding": "embeddings.position_embedding.weight",
        "token_embedding": "embeddings.token_embedding",
    }
    names |= {"ln_final": "final_layer_norm", "transformer.resblocks": "encoder.layers"}
    names |= {".ln_": ".layer_norm", ".attn.": ".self_attn.", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    renamed = {"text_projection.weight": weights["text_projection"].T.contiguous()}
    for key, value in weights.items():
        for theirs, ours in names.items():
            key = key.replace(theirs, ours)
        if "in_proj_" in key:
            for name, third in zip("qkv", value.chunk(3), strict=True):
                renamed["text_model." + key.replace("in_proj_", f"{name}_proj.")] = third
        elif key not in ("text_projection", "logit_scale"):
            renamed["text_model." + key] = value
    return renamed


class ClipReference:
    """CLIPTextModelWithProjection; `vectors` become rows at the end of its vocabulary."""

    def __init__(self, path: Path, prefix: str = "", vectors: torch.Tensor | None = None) -> None:
        weights = weights_of(path, prefix)
        if "ln_final.weight" in weights:
            weights = of_openclip(weights)
        weights.pop("text_model.embeddings.position_ids", None)
        key = "text_model.embeddings.token_embedding.weight"
        self.vocabulary, width = weights[key].shape
        if vectors is not None:
            weights[key] = torch.cat([weights[key], vectors])
        layers = 1 + max(int(key.split(".")[3]) for key in weights if ".layers." in key)
        weights.setdefault("text_projection.weight", torch.eye(width))
        self.model = CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=len(weights[key]),
                hidden_size=width,
                projection_dim=width,
                intermediate_size=len(weights["text_model.encoder.layers.0.mlp.fc1.weight"]),
                num_hidden_layers=layers,
                num_attention_heads=max(1, width // 64),
                max_position_embeddings=len(weights["text_model.embeddings.position_embedding.weight"]),
                hidden_act="gelu" if layers > 30 else "quick_gelu",
                eos_token_id=END,
            )
        ).eval()
        self.model.load_state_dict(weights)

    @torch.no_grad()
    def __call__(self, tokens, *, mask=None, layer=None, final_norm=True, pooled="none"):
        tokens = torch.where(tokens < 0, self.vocabulary - 1 - tokens, tokens).long()
        text = self.model.text_model(tokens, attention_mask=mask, output_hidden_states=True)
        hidden = text.last_hidden_state
        if layer is not None:
            hidden = text.hidden_states[1:][layer]
            hidden = self.model.text_model.final_layer_norm(hidden) if final_norm else hidden
        if pooled == "projected":
            return hidden, self.model(tokens, attention_mask=mask).text_embeds
        return hidden, text.pooler_output if pooled == "plain" else None


class T5Reference:
    """T5EncoderModel; the output of a block in the middle is overheard."""

    def __init__(self, path: Path, prefix: str = "", vectors: torch.Tensor | None = None) -> None:
        weights = weights_of(path, prefix)
        self.vocabulary, width = weights["shared.weight"].shape
        if vectors is not None:
            weights["shared.weight"] = torch.cat([weights["shared.weight"], vectors])
        weights["encoder.embed_tokens.weight"] = weights["shared.weight"]
        start = "encoder.block.0.layer."
        gated = f"{start}1.DenseReluDense.wi_0.weight" in weights
        inner, heads = (
            len(weights[f"{start}0.SelfAttention.q.weight"]),
            weights[f"{start}0.SelfAttention.relative_attention_bias.weight"].shape[1],
        )
        self.model = T5EncoderModel(
            T5Config(
                vocab_size=len(weights["shared.weight"]),
                d_model=width,
                d_kv=inner // heads,
                num_heads=heads,
                d_ff=weights[f"{start}1.DenseReluDense.wo.weight"].shape[1],
                num_layers=1 + max(int(key.split(".")[2]) for key in weights if ".block." in key),
                feed_forward_proj="gated-gelu" if gated else "relu",
            )
        ).eval()
        self.model.load_state_dict(weights)

    @torch.no_grad()
    def __call__(self, tokens, *, mask=None, layer=None, final_norm=True, pooled="none"):
        tokens = torch.where(tokens < 0, self.vocabulary - 1 - tokens, tokens).long()
        heard = []
        encoder = self.model.encoder
        hooks = [
            block.register_forward_hook(lambda _, given, result: heard.append(result[0]))
            for block in encoder.block
        ]
        hidden = self.model(tokens, attention_mask=mask).last_hidden_state
        for hook in hooks:
            hook.remove()
        if layer is not None:
            hidden = encoder.final_layer_norm(heard[layer]) if final_norm else heard[layer]
        return hidden, None


class BertReference:
    """BertModel. Every layer ends with its own norm, so that a final one is of no matter."""

    def __init__(self, path: Path, prefix: str = "", vectors: torch.Tensor | None = None) -> None:
        weights = {key.removeprefix("bert."): value for key, value in weights_of(path, prefix).items()}
        key = "embeddings.word_embeddings.weight"
        self.vocabulary, width = weights[key].shape
        if vectors is not None:
            weights[key] = torch.cat([weights[key], vectors])
        config = BertConfig(
            vocab_size=len(weights[key]),
            hidden_size=width,
            intermediate_size=len(weights["encoder.layer.0.intermediate.dense.weight"]),
            num_hidden_layers=1 + max(int(key.split(".")[2]) for key in weights if ".layer." in key),
            num_attention_heads=max(1, width // 64),
            max_position_embeddings=len(weights["embeddings.position_embeddings.weight"]),
        )
        self.model = BertModel(config, add_pooling_layer=False).eval()
        self.model.load_state_dict(weights)

    @torch.no_grad()
    def __call__(self, tokens, *, mask=None, layer=None, final_norm=True, pooled="none"):
        tokens = torch.where(tokens < 0, self.vocabulary - 1 - tokens, tokens).long()
        states = self.model(tokens, attention_mask=mask, output_hidden_states=True).hidden_states
        return states[1:][-1 if layer is None else layer], None
