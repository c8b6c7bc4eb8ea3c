"""What an adapter would still get wrong of some items: there its next steps teach most (hard example mining)."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from agentlab.adapters import Lora
from agentlab.errors import EvolutionStopped
from agentlab.inference.transformers_engine import TransformersEngine
from agentlab.learning.dataset import Example

_SLOT = "doubted"  # the adapter that is asked; no id of a trained one looks like it
_ROWS = 32
_TOKENS = 4_096  # read at once
_LOGITS = 1 << 24  # held at once: 64 MiB in fp32, less than a training step needs


def doubts(
    engine: TransformersEngine, lora: Lora, examples: Sequence[Example], should_stop: Callable[[], bool] = lambda: False
) -> np.ndarray:
    """How likely the model with `lora` says something else than each example's completion: float64 (n,) in [0, 1].

    1 - p(completion | prompt), of the whole completion, as greedy answers are right or wrong as a whole. Costs one
    forward pass. Raises EvolutionStopped when `should_stop()` turns true, AdapterError where the weights do not fit,
    and the device's error where memory runs out.
    """
    found = np.ones(len(examples))
    vocabulary = int(engine.base.config.get_text_config().vocab_size)
    order = sorted(range(len(examples)), key=lambda i: (-len(examples[i].input_ids), i))
    engine.make_room()
    engine.add_adapter(_SLOT, lora)
    try:
        with engine.using(_SLOT), torch.inference_mode():
            while order:
                longest = len(examples[order[0]].input_ids)
                rows = max(1, min(_ROWS, _TOKENS // longest, _LOGITS // (longest * vocabulary)))
                batch, order = order[:rows], order[rows:]
                if should_stop():
                    raise EvolutionStopped("stopped while looking for items to learn")
                found[batch] = -np.expm1(_log_likelihoods(engine, [examples[i] for i in batch]))
    finally:
        engine.unload_adapter(_SLOT)
        engine.make_room()
    return np.clip(found, 0.0, 1.0)


def _log_likelihoods(engine: TransformersEngine, batch: Sequence[Example]) -> np.ndarray:
    """float64 (len(batch),): the log-probability of each completion after its prompt."""
    width = max(len(example.input_ids) for example in batch)
    ids = torch.zeros((len(batch), width), dtype=torch.long)
    mask = torch.zeros((len(batch), width), dtype=torch.long)
    counted = torch.zeros((len(batch), width), dtype=torch.bool)
    for row, example in enumerate(batch):  # padded on the right, where causal attention does not look
        size = len(example.input_ids)
        ids[row, :size] = torch.tensor(example.input_ids)
        mask[row, :size] = 1
        counted[row, :size] = torch.tensor(example.completion_mask, dtype=torch.bool)
    first = max(1, int(counted.any(dim=0).to(torch.int8).argmax()))  # the earliest token that any of them answers with
    kept = width - first + 1  # a position's logits are of the next token
    device = engine.base.device
    logits = engine.model(input_ids=ids.to(device), attention_mask=mask.to(device), logits_to_keep=kept).logits
    logits = logits[:, -kept:-1].float()
    targets = ids[:, first:].to(device)
    likelihoods = logits.gather(-1, targets[..., None])[..., 0] - logits.logsumexp(dim=-1)
    return np.asarray((likelihoods * counted[:, first:].to(device)).sum(dim=-1).double().cpu())
