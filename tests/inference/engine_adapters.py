"""Adapters that visibly change a model, made from the shapes in its folder: no model has to be loaded."""

import torch

from agentlab import adapters
from agentlab.inference.vllm_settings import tensor_shapes


def random_lora(folder, seed, rank=4, scale=0.3):
    """An adapter on q and v. With dropout: an engine that leaves it on answers differently every time."""
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for name, shape in sorted(tensor_shapes(folder).items()):
        if name.endswith(("q_proj.weight", "v_proj.weight")):
            a = torch.randn(rank, shape[1], generator=generator) * scale
            b = torch.randn(shape[0], rank, generator=generator) * scale
            modules[name.removesuffix(".weight")] = (a, b)
    return adapters.Lora(modules, rank, 2.0 * rank, 0.5, ["q_proj", "v_proj"], "")


def two_adapters(model_folder, folder, scale):
    """Two of them as PEFT folders: id → folder."""
    found = {}
    for index in range(2):
        adapter = f"g000-c{index:02d}"
        adapters.save(random_lora(model_folder, index, scale=scale), folder / adapter)
        found[adapter] = folder / adapter
    return found
