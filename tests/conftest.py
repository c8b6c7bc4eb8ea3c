"""Shared fixtures: a home of their own for all tests, the embedded model, a tiny model, a tiny suite."""

import os
from pathlib import Path

import pytest
from support import write_tiny_experiment

ORDER = ("model", "notebook", "soak")


def pytest_configure(config):
    # The person's own home, model cache and store stay untouched; the converted model is kept between test runs.
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "agentlab-tests"
    os.environ["AGENTLAB_HOME"] = str(cache)
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.pop("MLFLOW_TRACKING_URI", None)


def pytest_collection_modifyitems(items):
    """Fast tests first: unmarked, then those with the real model, then notebooks and whole runs."""

    def cost(item):
        return max((ORDER.index(mark.name) + 1 for mark in item.iter_markers() if mark.name in ORDER), default=0)

    items.sort(key=cost)


@pytest.fixture(scope="session")
def embedded():
    """The embedded SmolLM2, converted on first use."""
    from agentlab import models

    return models.prepare()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """The folder of a two-layer random Llama with a byte-level tokenizer and a chat template; loads in no time."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: i for i, token in enumerate(special + alphabet)}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<|im_end|>", bos_token="<|im_start|>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_experiment(tmp_path, tiny_model):
    """`write_tiny_experiment` in a folder of the test's own."""
    return write_tiny_experiment(tmp_path, tiny_model)
