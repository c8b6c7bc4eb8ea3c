"""What of a model's config.json decides its memory, read without loading anything."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from agentlab.errors import ModelError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")  # whose modules are counted one by one
PUBLISHED = Path(__file__).with_name("published")
_QWEN3_HEAD_DIM = 128  # what transformers takes where a config does not say
_OF_THE_FILE = ("architectures", "auto_map", "dtype", "quantization_config", "torch_dtype", "transformers_version")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


class ShapeError(ModelError):
    """A model's config tells no shape that can be planned; it may still be loadable."""


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a dense decoder: `layers` blocks of attention and a gated MLP between an embedding and a head."""

    name: str
    family: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool  # the head is the embedding
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    context_length: int  # tokens
    window: int | None = None  # tokens that a windowed layer keeps
    windowed_layers: int = 0
    prequantized: str | None = None  # the method with which the stored weights are quantized

    @classmethod
    def from_config(cls, config: Mapping[str, Any], name: str = "") -> Self:
        """The shape in a config.json's values.

        Families beyond FAMILIES are read as Llama-like, which `exact` tells; what their configs leave out is what
        transformers takes, which is imported for them. Raises ShapeError for what is no dense decoder or lacks a size.
        """
        given = config.get("text_config") or config
        if not isinstance(given, Mapping) or not isinstance(given.get("model_type", config.get("model_type")), str):
            raise ShapeError(
                f"{name or 'config.json'} is no model's config: its text_config or model_type is of no use"
            )
        config, known = _completed(config)
        if experts := next((key for values in (given, config) for key in _EXPERTS if values.get(key)), None):
            raise ShapeError(
                f"{name or 'config.json'} is a mixture of experts ({experts}); only dense decoders can be planned"
            )
        try:
            heads, hidden, layers = (
                int(config[k]) for k in ("num_attention_heads", "hidden_size", "num_hidden_layers")
            )
            family = str(config["model_type"])
            attention_bias = bool(config.get("attention_bias", False))
            window, windowed = _window(config, family, layers, known)
            return cls(
                name=name,
                family=family,
                layers=layers,
                hidden=hidden,
                intermediate=int(config["intermediate_size"]),
                heads=heads,
                kv_heads=int(config.get("num_key_value_heads") or heads),
                head_dim=int(config.get("head_dim") or (_QWEN3_HEAD_DIM if family == "qwen3" else hidden // heads)),
                vocab=int(config["vocab_size"]),
                tied=bool(config.get("tie_word_embeddings", False)),
                qkv_bias=family == "qwen2" or attention_bias,
                o_bias=family != "qwen2" and attention_bias,
                mlp_bias=bool(config.get("mlp_bias", False)),
                qk_norm=family == "qwen3",
                context_length=int(config.get("max_position_embeddings", 2048)),
                window=window,
                windowed_layers=windowed,
                prequantized=quantization_method(config),
            )
        except (KeyError, TypeError, ValueError) as error:
            missing = f"key {error} is missing" if isinstance(error, KeyError) else str(error)
            raise ShapeError(
                f"{name or 'config.json'} cannot be planned: {missing}; allowed: a decoder's config.json"
            ) from None

    @classmethod
    def read(cls, path: Path, name: str = "") -> Self:
        """The shape in a config.json on disk. Raises ShapeError."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ShapeError(f"{path} cannot be read: {error}") from None
        if not isinstance(values, dict):
            raise ShapeError(f"{path} holds no settings of a model")
        return cls.from_config(values, name or path.parent.name)

    @property
    def exact(self) -> bool:
        """Whether every module is counted; else the sizes are those of a Llama-like model."""
        return self.family in FAMILIES

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(in, out) features of the linear modules of one layer, by the end of their name."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden, q),
            "k_proj": (self.hidden, kv),
            "v_proj": (self.hidden, kv),
            "o_proj": (q, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }

    @property
    def embedding_parameters(self) -> int:
        """Weights of the embedding; an untied head has as many."""
        return self.vocab * self.hidden

    @property
    def linear_parameters(self) -> int:
        """Weights of all linear modules but the head, the ones that are quantized."""
        return self.layers * sum(n_in * n_out for n_in, n_out in self.linears.values())

    @property
    def small_parameters(self) -> int:
        """Weights of all norms and biases."""
        sizes = self.linears
        layer = 2 * self.hidden + (2 * self.head_dim if self.qk_norm else 0)
        biased = (["q_proj", "k_proj", "v_proj"] if self.qkv_bias else []) + (["o_proj"] if self.o_bias else [])
        biased += ["gate_proj", "up_proj", "down_proj"] if self.mlp_bias else []
        layer += sum(sizes[module][1] for module in biased)
        return self.layers * layer + self.hidden

    @property
    def parameters(self) -> int:
        """All weights; a tied head counts once."""
        heads = 1 if self.tied else 2
        return self.linear_parameters + heads * self.embedding_parameters + self.small_parameters


def quantization_method(config: Mapping[str, Any]) -> str | None:
    """The method with which a model's stored weights are quantized, as awq or gptq; None where they are not."""
    values = config.get("quantization_config")
    if not isinstance(values, Mapping):
        return None
    old = any(values.get(key) for key in ("load_in_4bit", "load_in_8bit"))  # files from before methods had names
    return values.get("quant_method") or ("bitsandbytes" if old else None)


def _completed(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], bool]:
    """(a config with what it leaves out, whether its family is known).

    Of a model that also sees or hears it is the part that writes, with what is said of the whole.
    """
    nested = config.get("text_config")
    if not nested and config.get("model_type") in FAMILIES:
        return config, True  # whose defaults are known here: transformers takes seconds to import
    completed = _with_defaults(config)
    part = completed or nested or config
    said = ("quantization_config",) if completed else ("quantization_config", "tie_word_embeddings")
    known = completed is not None or part.get("model_type") in FAMILIES
    return {**part, **{key: config[key] for key in said if key in config}}, known


def _with_defaults(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The values that transformers' class for the family takes; None where it has none, or does not take these."""
    from transformers import CONFIG_MAPPING

    values = {key: value for key, value in config.items() if key not in _OF_THE_FILE}
    family = values.pop("model_type", None)
    if family not in CONFIG_MAPPING:
        return None
    try:
        whole = CONFIG_MAPPING[family](**values)
        text = whole.get_text_config()
        if text is not whole and not config.get("text_config"):
            text = whole = type(text)(**values)  # a GGUF file calls the part that writes by the name of the whole
    except Exception:  # each class checks its values in its own way
        return None
    tied = getattr(whole, "tie_word_embeddings", None)
    return {**text.to_dict(), **({} if tied is None else {"tie_word_embeddings": tied})}


def _window(config: Mapping[str, Any], family: str, layers: int, known: bool) -> tuple[int | None, int]:
    """(tokens, layers) of sliding-window attention; (None, 0) without, or where nobody knows how it is used."""
    window = config.get("sliding_window")
    if window is None or (family.startswith("qwen") and not config.get("use_sliding_window", False)):
        return None, 0
    if kinds := config.get("layer_types"):
        return int(window), sum(kind == "sliding_attention" for kind in kinds)
    if family.startswith("qwen"):
        return int(window), max(0, layers - int(config.get("max_window_layers", layers)))
    return (int(window), layers) if known else (None, 0)


def published(name: str) -> ModelShape | None:
    """The shape of a well-known model from the config that its makers published; None for others.

    `name` is a hub id or its last part; a word that names a variant of the same architecture does not matter.
    """
    wanted = name.rsplit("/", 1)[-1].lower().replace("-instruct", "")
    for ending in ("-base", "-it", "-chat"):
        wanted = wanted.removesuffix(ending)
    for path in sorted(PUBLISHED.glob("*.json")):
        if path.stem.lower() == wanted:
            return ModelShape.read(path, name)
    return None


def published_names() -> list[str]:
    """The names that `published` knows."""
    return sorted(path.stem for path in PUBLISHED.glob("*.json"))
