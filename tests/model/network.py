"""The small Llama in plain torch: its shape, its forward pass, its weights on disk.

It runs in the trainer and in the tests. Parameter names and the rotary convention (halves, not pairs) are those of
`LlamaForCausalLM` in Hugging Face transformers, so that any engine that serves a Llama reads the same file. It trusts
the files beside it: they are part of the repository, not input.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of the network; `vocab` equals the number of tokens of the tokenizer, so every id has text."""

    vocab: int
    hidden: int = 192
    inner: int = 512
    layers: int = 3
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 32
    context: int = 2048
    rope_theta: float = 10000.0
    rms_eps: float = 1e-5

    @classmethod
    def of(cls, directory: Path) -> "Shape":
        """Read the shape back from `config.json` of a model directory."""
        config = json.loads((directory / "config.json").read_text())
        return cls(
            vocab=config["vocab_size"],
            hidden=config["hidden_size"],
            inner=config["intermediate_size"],
            layers=config["num_hidden_layers"],
            heads=config["num_attention_heads"],
            kv_heads=config["num_key_value_heads"],
            head_dim=config["head_dim"],
            context=config["max_position_embeddings"],
            rope_theta=config["rope_theta"],
            rms_eps=config["rms_norm_eps"],
        )

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every parameter's name in the file, and its shape (rows are outputs)."""
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab, self.hidden)}
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        for layer in range(self.layers):
            at = f"model.layers.{layer}."
            shapes[at + "input_layernorm.weight"] = (self.hidden,)
            shapes[at + "self_attn.q_proj.weight"] = (query, self.hidden)
            shapes[at + "self_attn.k_proj.weight"] = (key, self.hidden)
            shapes[at + "self_attn.v_proj.weight"] = (key, self.hidden)
            shapes[at + "self_attn.o_proj.weight"] = (self.hidden, query)
            shapes[at + "post_attention_layernorm.weight"] = (self.hidden,)
            shapes[at + "mlp.gate_proj.weight"] = (self.inner, self.hidden)
            shapes[at + "mlp.up_proj.weight"] = (self.inner, self.hidden)
            shapes[at + "mlp.down_proj.weight"] = (self.hidden, self.inner)
        shapes["model.norm.weight"] = (self.hidden,)
        shapes["lm_head.weight"] = (self.vocab, self.hidden)
        return shapes

    def config(self, *, end: int, pad: int) -> dict[str, object]:
        """`config.json` as transformers and vLLM read it; `end` and `pad` are token ids."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": None,
            "dtype": "bfloat16",
            "eos_token_id": end,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "initializer_range": 0.02,
            "intermediate_size": self.inner,
            "max_position_embeddings": self.context,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "pad_token_id": pad,
            "rms_norm_eps": self.rms_eps,
            "rope_parameters": {"rope_theta": self.rope_theta, "rope_type": "default"},
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": False,
            "use_cache": True,
            "vocab_size": self.vocab,
        }


class Llama(nn.Module):
    """The network; parameters live in one dictionary under the names they have in the file."""

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: Shape, weights: dict[str, Tensor]) -> None:
        """Take `weights` as float32 parameters; a missing, further or misshapen tensor is a `ValueError`."""
        super().__init__()
        found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        if found != shape.tensors():
            raise ValueError(
                f"weights do not fit the shape: {sorted(set(found.items()) ^ set(shape.tensors().items()))}"
            )
        self.shape = shape
        # ParameterDict refuses dots in names.
        self.weights = nn.ParameterDict({n.replace(".", "/"): nn.Parameter(t.float()) for n, t in weights.items()})
        frequency = shape.rope_theta ** (-torch.arange(0, shape.head_dim, 2, dtype=torch.float64) / shape.head_dim)
        angle = torch.outer(torch.arange(shape.context, dtype=torch.float64), frequency).repeat(1, 2)
        self.register_buffer("cos", angle.cos().float())
        self.register_buffer("sin", angle.sin().float())

    @classmethod
    def seeded(cls, shape: Shape, seed: int) -> "Llama":
        """Fresh weights from one generator, drawn in file order."""
        generator = torch.Generator().manual_seed(seed)
        deep = (2 * shape.layers) ** -0.5
        weights: dict[str, Tensor] = {}
        for name, size in shape.tensors().items():
            if len(size) == 1:
                weights[name] = torch.ones(size)
            else:
                scale = deep if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
                spread = 0.02 if name == "lm_head.weight" else 1.0 if "embed" in name else size[1] ** -0.5
                weights[name] = torch.randn(size, generator=generator) * spread * scale
        return cls(shape, weights)

    @classmethod
    def load(cls, directory: Path) -> "Llama":
        """The committed weights, widened from bfloat16 to float32: what an engine with `--dtype float32` computes."""
        return cls(Shape.of(directory), load_file(directory / "model.safetensors"))

    def named(self) -> dict[str, Tensor]:
        """The parameters under their names in the file."""
        return {name.replace("/", "."): tensor.detach() for name, tensor in self.weights.items()}

    def _weight(self, name: str) -> Tensor:
        weight: Tensor = self.weights[name.replace(".", "/") + "/weight"]
        return weight

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return functional.rms_norm(x, (self.shape.hidden,), self._weight(name), self.shape.rms_eps)

    def _heads(self, x: Tensor, name: str) -> Tensor:
        """Project to [batch, heads, time, head_dim]."""
        return functional.linear(x, self._weight(name)).reshape(*x.shape[:2], -1, self.shape.head_dim).transpose(1, 2)

    def _turn(self, x: Tensor) -> Tensor:
        """Rotary embedding by halves: dimension i turns with dimension i + head_dim / 2."""
        first, second = x.chunk(2, dim=-1)
        time = x.shape[-2]
        return x * self.cos[:time] + torch.cat((-second, first), dim=-1) * self.sin[:time]

    def forward(self, ids: Tensor) -> Tensor:
        """Hidden states [batch, time, hidden] of token ids [batch, time], after the last norm.

        Attention is causal, so padding on the right changes nothing to its left.
        """
        x = functional.embedding(ids, self._weight("model.embed_tokens"))
        group = self.shape.heads // self.shape.kv_heads
        for layer in range(self.shape.layers):
            at = f"model.layers.{layer}."
            y = self._norm(x, at + "input_layernorm")
            query = self._turn(self._heads(y, at + "self_attn.q_proj"))
            key = self._turn(self._heads(y, at + "self_attn.k_proj")).repeat_interleave(group, dim=1)
            value = self._heads(y, at + "self_attn.v_proj").repeat_interleave(group, dim=1)
            mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
            x = x + functional.linear(mixed.transpose(1, 2).flatten(2), self._weight(at + "self_attn.o_proj"))
            y = self._norm(x, at + "post_attention_layernorm")
            gate = functional.silu(functional.linear(y, self._weight(at + "mlp.gate_proj")))
            inner = gate * functional.linear(y, self._weight(at + "mlp.up_proj"))
            x = x + functional.linear(inner, self._weight(at + "mlp.down_proj"))
        return self._norm(x, "model.norm")

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores [..., vocab] of hidden states [..., hidden]."""
        return functional.linear(hidden, self._weight("lm_head"))
