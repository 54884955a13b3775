"""GLM-4.5's checkpoints against the model's equations in float64 NumPy, which reads the same
tensors by the names that transformers gives them."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from cmjax.mesh import RankMesh
from cmjax.models import moe
from cmjax.models.moe.checkpoint.safetensor_file import TensorSpec, list_tensors, write_tensors

SIZES = {
    "model_type": "glm4_moe", "vocab_size": 60, "hidden_size": 24, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "intermediate_size": 20,
    "moe_intermediate_size": 8, "n_routed_experts": 8, "n_shared_experts": 1,
    "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "norm_topk_prob": True,
    "routed_scaling_factor": 2.5, "first_k_dense_replace": 1, "num_nextn_predict_layers": 1,
    "attention_bias": True, "use_qk_norm": True, "partial_rotary_factor": 0.5, "rope_theta": 1e4,
    "rms_norm_eps": 1e-5, "max_position_embeddings": 64, "eos_token_id": 59,
}  # fmt: skip
CASES = {
    "GLM-4.7": {},
    "GLM-4.5-Air": {"use_qk_norm": False, "routed_scaling_factor": 1.0, "n_group": 1},
    "a third of a head, no bias": {"partial_rotary_factor": 1 / 3, "attention_bias": False},
    "weights that are not normalised": {"norm_topk_prob": False, "n_shared_experts": 2},
}
COPIES = ("model.layers.3.embed_tokens.weight", "model.layers.3.shared_head.head.weight")
"""What a published draft module holds of the main model."""
TOKENS = np.random.default_rng(0).integers(0, 60, (2, 11))


def _shapes(raw):
    """Every tensor of a published checkpoint."""
    hidden, dim = raw["hidden_size"], raw["head_dim"]
    heads, kv = raw["num_attention_heads"], raw["num_key_value_heads"]
    vocab = (raw["vocab_size"], hidden)
    shapes = {"model.embed_tokens": vocab, "lm_head": vocab, "model.norm": (hidden,)}

    def swiglu(name, width):
        shapes.update({f"{name}.{part}_proj": (width, hidden) for part in ("gate", "up")})
        shapes[f"{name}.down_proj"] = (hidden, width)

    for number in range(raw["num_hidden_layers"] + 1):
        layer = f"model.layers.{number}"
        shapes |= {f"{layer}.{n}_layernorm": (hidden,) for n in ("input", "post_attention")}
        for part, count in (("q", heads), ("k", kv), ("v", kv)):
            shapes[f"{layer}.self_attn.{part}_proj"] = (count * dim, hidden)
        shapes[f"{layer}.self_attn.o_proj"] = (hidden, heads * dim)
        if raw["use_qk_norm"]:
            shapes |= {f"{layer}.self_attn.{part}_norm": (dim,) for part in ("q", "k")}
        if number < raw["first_k_dense_replace"]:
            swiglu(f"{layer}.mlp", raw["intermediate_size"])
            continue
        shapes[f"{layer}.mlp.gate"] = (raw["n_routed_experts"], hidden)
        for expert in range(raw["n_routed_experts"]):
            swiglu(f"{layer}.mlp.experts.{expert}", raw["moe_intermediate_size"])
        shared = raw["n_shared_experts"] * raw["moe_intermediate_size"]
        swiglu(f"{layer}.mlp.shared_experts", shared)
    draft = f"model.layers.{raw['num_hidden_layers']}"
    shapes |= {f"{draft}.{name}": (hidden,) for name in ("enorm", "hnorm", "shared_head.norm")}
    shapes[f"{draft}.eh_proj"] = (hidden, 2 * hidden)
    shapes = {f"{name}.weight": shape for name, shape in shapes.items()}
    for name, shape in list(shapes.items()):
        if name.endswith("mlp.gate.weight"):
            shapes[name.replace("weight", "e_score_correction_bias")] = shape[:1]
        if raw["attention_bias"] and name.endswith(
            ("q_proj.weight", "k_proj.weight", "v_proj.weight")
        ):
            shapes[name.replace("weight", "bias")] = shape[:1]
    return shapes | dict.fromkeys(COPIES, vocab)


def _write(folder, **changes):
    """A checkpoint of random values; gives its keys and tensors."""
    raw, rng = SIZES | changes, np.random.default_rng(1)
    tensors = {
        name: (
            rng.normal(size=shape) * (0.4 if len(shape) == 2 else 0.2) + ("norm" in name)
        ).astype(np.float32)
        for name, shape in _shapes(raw).items()
    }
    specs = {name: TensorSpec(np.float32, tensor.shape) for name, tensor in tensors.items()}
    write_tensors(folder / "model.safetensors", specs, tensors.items())
    (folder / "config.json").write_text(json.dumps(raw))
    return raw, tensors


class Equations:
    """`Glm4MoeForCausalLM`, token by token."""

    def __init__(self, raw, tensors):
        self.raw = raw
        self.tensors = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}

    def logits(self, tokens):
        x = self.tensors["model.embed_tokens.weight"][tokens]
        for number in range(self.raw["num_hidden_layers"]):
            layer = f"model.layers.{number}"
            x = x + self.attention(f"{layer}.self_attn", self.norm(f"{layer}.input_layernorm", x))
            h = self.norm(f"{layer}.post_attention_layernorm", x)
            dense = number < self.raw["first_k_dense_replace"]
            block = self.swiglu if dense else self.experts
            x = x + np.stack([block(f"{layer}.mlp", row) for row in h])
        return self.linear("lm_head", self.norm("model.norm", x))

    def linear(self, name, x):
        return x @ self.tensors[f"{name}.weight"].T + self.tensors.get(f"{name}.bias", 0.0)

    def norm(self, name, x):
        mean = np.mean(x**2, axis=-1, keepdims=True)
        return self.tensors[f"{name}.weight"] * x / np.sqrt(mean + self.raw["rms_norm_eps"])

    def swiglu(self, name, x):
        gate = self.linear(f"{name}.gate_proj", x)
        return self.linear(
            f"{name}.down_proj", gate / (1 + np.exp(-gate)) * self.linear(f"{name}.up_proj", x)
        )

    def attention(self, name, x):
        dim, count = self.raw["head_dim"], len(x)
        q, k, v = (self.linear(f"{name}.{p}_proj", x).reshape(count, -1, dim) for p in "qkv")
        if self.raw["use_qk_norm"]:
            q, k = self.norm(f"{name}.q_norm", q), self.norm(f"{name}.k_norm", k)
        q, k = self.rotated(q), self.rotated(k)
        serves = q.shape[1] // k.shape[1]
        out = np.zeros_like(q)
        for head in range(q.shape[1]):
            for t in range(count):
                weight = np.exp(k[: t + 1, head // serves] @ q[t, head] / np.sqrt(dim))
                out[t, head] = weight @ v[: t + 1, head // serves] / weight.sum()
        return self.linear(f"{name}.o_proj", out.reshape(count, -1))

    def rotated(self, x):
        """`x cos + rotate_half(x) sin` of the first dimensions; the others as they are."""
        width = int(x.shape[-1] * self.raw["partial_rotary_factor"])
        turn = np.arange(len(x))[:, None] / self.raw["rope_theta"] ** (
            np.arange(0, width, 2) / width
        )
        turn = np.concatenate([turn, turn], axis=-1)[:, None]
        part, rest = x[..., :width], x[..., width:]
        half = np.concatenate([-part[..., width // 2 :], part[..., : width // 2]], axis=-1)
        return np.concatenate([part * np.cos(turn) + half * np.sin(turn), rest], axis=-1)

    def experts(self, name, x):
        """Of one token: the best `num_experts_per_tok` by score and bias, weighed by score."""
        raw, bias = self.raw, self.tensors[f"{name}.gate.e_score_correction_bias"]
        score = 1 / (1 + np.exp(-self.linear(f"{name}.gate", x)))
        groups = np.array_split(np.arange(len(score)), raw["n_group"])
        strength = [np.sort((score + bias)[group])[-2:].sum() for group in groups]
        allowed = np.concatenate([groups[g] for g in np.argsort(strength)[-raw["topk_group"] :]])
        chosen = sorted(allowed, key=lambda e: -(score + bias)[e])[: raw["num_experts_per_tok"]]
        weight = score[chosen] / (score[chosen].sum() if raw["norm_topk_prob"] else 1)
        found = sum(
            w * self.swiglu(f"{name}.experts.{e}", x) for w, e in zip(weight, chosen, strict=True)
        )
        return raw["routed_scaling_factor"] * found + self.swiglu(f"{name}.shared_experts", x)


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_equations(tmp_path, case):
    raw, tensors = _write(tmp_path, **CASES[case])
    want = np.stack([Equations(raw, tensors).logits(tokens) for tokens in TOKENS])
    model = moe.load(tmp_path)
    assert model.mtp is not None
    assert np.abs(want).max() > 1  # a model whose logits say something
    got = model(jnp.asarray(TOKENS, jnp.int32))
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


def test_a_checkpoint_is_written_back_value_for_value(tmp_path):
    raw, want = _write(tmp_path)
    moe.save(moe.load(tmp_path), tmp_path / "again")
    got = list_tensors(tmp_path / "again" / "model.safetensors")
    assert set(got) == set(want) - set(COPIES)
    for name in got:
        np.testing.assert_array_equal(got[name].read(), want[name])
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert written["architectures"] == ["Glm4MoeForCausalLM"]
    rope = {"rope_theta": raw["rope_theta"], "rope_type": "default"}
    assert written["rope_parameters"] == rope
    assert {key: written[key] for key in raw if key != "rope_theta"} == {
        key: value for key, value in raw.items() if key != "rope_theta"
    }


@pytest.mark.parametrize("drafts", [0, 1])
def test_greedy_tokens_are_those_of_the_equations_with_and_without_drafts(tmp_path, drafts):
    raw, tensors = _write(tmp_path, eos_token_id=None)
    model, tokens = Equations(raw, tensors), TOKENS[0, :4].tolist()
    for _ in range(6):
        tokens.append(int(np.argmax(model.logits(np.array(tokens))[-1])))
    options = moe.GeneratorOptions(drafts=drafts)
    generator = moe.open_generator(tmp_path, RankMesh(1, 2), options)
    (found,) = generator.generate([tokens[:4]], 6).completions
    assert found.tokens == tokens[4:]
