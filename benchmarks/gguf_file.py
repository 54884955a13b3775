"""A Hugging Face checkpoint of Qwen3-MoE or DeepSeek-V3 as a GGUF file, for llama.cpp.

    python benchmarks/gguf_file.py FOLDER OUT.gguf Q8_0        # or Q4_0, F16, F32

Names and shapes are those that llama.cpp's own converter gives; the vocabulary is numbers only. It
runs in the peers' Python (`gguf`, `safetensors`), and imports nothing of this project.
"""

import json
import sys
from pathlib import Path

FAMILIES = {"qwen3_moe": "qwen3moe", "deepseek_v3": "deepseek2"}


def write_gguf(folder, path, form):
    """Write the checkpoint in `folder` with its matrices in `form`; norms, routers and their biases
    stay float32, as in llama.cpp's own files."""
    import gguf  # pyright: ignore[reportMissingImports]
    import numpy as np

    config = json.loads((folder / "config.json").read_text())
    family = FAMILIES.get(config["model_type"])
    if family is None:
        raise ValueError(
            f"{folder}: model_type must be one of {', '.join(FAMILIES)}, got "
            f"{config['model_type']!r}"
        )
    kind = gguf.GGMLQuantizationType[form]
    writer = gguf.GGUFWriter(path, family)
    _describe(writer, config, gguf)
    for name, tensor in _tensors(folder, config):
        matrix = tensor.ndim > 1 and "ffn_gate_inp" not in name
        values = np.ascontiguousarray(tensor, np.float32)
        if matrix and kind != gguf.GGMLQuantizationType.F32:
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _describe(writer, config, gguf):
    heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    latent = config["model_type"] == "deepseek_v3"
    rope = config.get("rope_theta") or config.get("rope_parameters", {}).get("rope_theta", 10000.0)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(layers)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_rope_freq_base(rope)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(config.get("num_experts") or config["n_routed_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    if not latent:
        writer.add_head_count_kv(config["num_key_value_heads"])
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
        return
    rank, turned = config["kv_lora_rank"], config["qk_rope_head_dim"]
    writer.add_head_count_kv(1)  # absorbed: all heads attend one latent
    writer.add_key_length(rank + turned)
    writer.add_value_length(rank)
    writer.add_key_length_mla(config["qk_nope_head_dim"] + turned)
    writer.add_value_length_mla(config["v_head_dim"])
    writer.add_q_lora_rank(config["q_lora_rank"])
    writer.add_kv_lora_rank(rank)
    writer.add_rope_dimension_count(turned)
    writer.add_leading_dense_block_count(config["first_k_dense_replace"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    writer.add_expert_weights_norm(config["norm_topk_prob"])
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_expert_group_count(config["n_group"])
    writer.add_expert_group_used_count(config["topk_group"])


_PLAIN = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_OF_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "self_attn.q_a_proj.weight": "attn_q_a.weight",
    "self_attn.q_a_layernorm.weight": "attn_q_a_norm.weight",
    "self_attn.q_b_proj.weight": "attn_q_b.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
    "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "mlp.shared_experts.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_experts.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_experts.down_proj.weight": "ffn_down_shexp.weight",
}


def _tensors(folder, config):
    """(llama.cpp's name, values) of every tensor."""
    import numpy as np
    from safetensors import safe_open

    held = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "np") as tensors:
            held |= {name: (file, name) for name in tensors.keys()}  # noqa: SIM118

    def read(name):
        file, key = held.pop(name)
        with safe_open(file, "np") as tensors:
            return tensors.get_tensor(key)

    for theirs, ours in _PLAIN.items():
        if theirs in held:
            yield ours, read(theirs)
    experts = config.get("num_experts") or config.get("n_routed_experts")
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for theirs, ours in _OF_LAYER.items():
            if prefix + theirs in held:
                yield f"blk.{layer}.{ours}", read(prefix + theirs)
        if f"{prefix}mlp.experts.0.gate_proj.weight" in held:
            for part in ("gate", "up", "down"):
                names = (f"{prefix}mlp.experts.{e}.{part}_proj.weight" for e in range(experts))
                yield f"blk.{layer}.ffn_{part}_exps.weight", np.stack([read(n) for n in names])
        if prefix + "self_attn.kv_b_proj.weight" in held:
            both = read(prefix + "self_attn.kv_b_proj.weight")
            both = both.reshape(config["num_attention_heads"], -1, config["kv_lora_rank"])
            key, value = np.split(both, [config["qk_nope_head_dim"]], axis=1)
            yield f"blk.{layer}.attn_k_b.weight", key.transpose(0, 2, 1)
            yield f"blk.{layer}.attn_v_b.weight", value
    if held:
        raise ValueError(f"{folder}: no place in a GGUF file for {', '.join(sorted(held)[:4])}")


if __name__ == "__main__":
    write_gguf(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
