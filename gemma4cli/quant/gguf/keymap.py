"""GGUF tensor names and ours. The only place that spells GGUF's."""

from __future__ import annotations

from gemma4cli.errors import G4Error
from gemma4cli.model.config import Gemma4Config
from gemma4cli.quant.gguf.reader import GGUF, GGUFTensor

ROPE_FREQS = "rope_freqs.weight"
OUTPUT = "output.weight"
_MODEL_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": OUTPUT,
}
_LAYER_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "pre_feedforward_layernorm.weight": "ffn_norm.weight",
    "post_feedforward_layernorm.weight": "post_ffw_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "layer_scalar": "layer_output_scale.weight",
}


def gguf_name(name: str) -> str:
    """Return the GGUF name of one of our parameters: model.layers.3.layer_scalar -> blk.3.layer_output_scale.weight."""
    if name in _MODEL_NAMES:
        return _MODEL_NAMES[name]
    _, _, index, rest = name.split(".", 3)
    return f"blk.{index}.{_LAYER_NAMES[rest]}"


def match_tensors(gguf: GGUF, config: Gemma4Config) -> dict[str, GGUFTensor]:
    """Return our name -> tensor for every parameter of the model, in the model's order.

    Raises: G4Error for a tensor that is missing, misshaped, or none of the model's.
    """
    left = dict(gguf.tensors)
    left.pop(ROPE_FREQS, None)  # checked by metadata.py, computed by the model
    matched = {}
    for name, shape in config.parameter_shapes().items():
        tensor = left.pop(gguf_name(name), None)
        if tensor is None:
            raise G4Error(f"{gguf.paths[0]} has no tensor {gguf_name(name)}.",
                          hint="The file is incomplete; fetch it again.")  # fmt: skip
        if tensor.shape != shape:
            raise G4Error(
                f"Tensor {tensor.name} of {tensor.file.path} has shape {list(tensor.shape)}; the metadata says "
                f"{list(shape)}.",
                hint="Tensors and metadata are of two different models; fetch the file again.",
            )
        matched[name] = tensor
    if left:
        raise G4Error(f"{gguf.paths[0]} has a tensor {next(iter(left))}, which no dense Gemma 4 text model has.",
                      hint="Only dense Gemma 4 text models are supported.")  # fmt: skip
    return matched
