"""What an adapter would still get wrong of some items: there its next steps teach most (hard example mining)."""

import copy
from collections.abc import Callable, Sequence

import numpy as np
import torch
from transformers import DynamicCache

from agentlab.adapters import Lora
from agentlab.errors import EvolutionStopped
from agentlab.inference.cache import growing_cache, rows_can_share
from agentlab.inference.decoding import common_prefix
from agentlab.inference.transformers_engine import TransformersEngine
from agentlab.learning.dataset import Example
from agentlab.learning.trainer import projects_plainly

_SLOT = "doubted"  # the adapter that is asked; no id of a trained one looks like it
_ROWS = 32
_TOKENS = 4_096  # read at once
_LOGITS = 1 << 25  # held at once: 128 MiB in fp32, less than a training step needs


def doubts(
    engine: TransformersEngine, lora: Lora, examples: Sequence[Example], should_stop: Callable[[], bool] = lambda: False
) -> np.ndarray:
    """How likely the model with `lora` says something else than each example's completion: float64 (n,) in [0, 1].

    1 - p(completion | prompt), of the whole completion, as greedy answers are right or wrong as a whole. Costs one
    forward pass, in which what all prompts begin with is read once. Raises EvolutionStopped when `should_stop()` turns
    true, AdapterError where the weights do not fit, and the device's error where memory runs out.
    """
    found = np.ones(len(examples))
    config = engine.base.config.get_text_config()
    plain = projects_plainly(config)
    answer = max((sum(example.completion_mask) for example in examples), default=0)
    order = sorted(range(len(examples)), key=lambda i: (-len(examples[i].input_ids), i))
    engine.make_room()
    engine.add_adapter(_SLOT, lora)
    try:
        with engine.using(_SLOT), torch.inference_mode():
            shared, beginning = _beginning(engine, examples)
            while order:
                longest = len(examples[order[0]].input_ids) - shared
                projected = (answer if plain else longest) * config.vocab_size
                rows = max(1, min(_ROWS, _TOKENS // longest, _LOGITS // projected))
                batch, order = order[:rows], order[rows:]
                if should_stop():
                    raise EvolutionStopped("stopped while looking for items to learn")
                likelihoods = _log_likelihoods(engine, [examples[i] for i in batch], shared, beginning, plain)
                found[batch] = -np.expm1(likelihoods)
    finally:
        engine.unload_adapter(_SLOT)
        engine.make_room()
    return np.clip(found, 0.0, 1.0)


def _beginning(engine: TransformersEngine, examples: Sequence[Example]) -> tuple[int, DynamicCache | None]:
    """How many tokens all prompts begin with, and those read; (0, None) where rows cannot share them."""
    cache = growing_cache(engine.base.config)
    if len(examples) < 2 or not rows_can_share(cache):
        return 0, None
    prompts = [one.input_ids[: one.completion_mask.index(1)] for one in examples]
    shared = common_prefix(prompts)  # a prompt's last token is never among them: it tells of the completion's first
    if not shared:
        return 0, None
    ids = torch.tensor([prompts[0][:shared]], device=engine.base.device)
    engine.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return shared, cache


def _log_likelihoods(
    engine: TransformersEngine, batch: Sequence[Example], shared: int, beginning: DynamicCache | None, plain: bool
) -> np.ndarray:  # fmt: skip
    """float64 (len(batch),): the log-probability of each completion after its prompt.

    shared, beginning: the tokens that all prompts begin with are in this cache, and are not read again. plain: only
    completions are projected onto the vocabulary, where a model does nothing else to its logits.
    """
    width = max(len(example.input_ids) for example in batch) - shared
    ids = torch.zeros((len(batch), width), dtype=torch.long)
    mask = torch.zeros((len(batch), shared + width), dtype=torch.long)
    counted = torch.zeros((len(batch), width), dtype=torch.bool)
    for row, example in enumerate(batch):  # padded on the right, where causal attention does not look
        size = len(example.input_ids) - shared
        ids[row, :size] = torch.tensor(example.input_ids[shared:])
        mask[row, : shared + size] = 1
        counted[row, :size] = torch.tensor(example.completion_mask[shared:], dtype=torch.bool)
    cache = copy.deepcopy(beginning)
    if cache is not None:
        cache.batch_repeat_interleave(len(batch))
    device = engine.base.device
    ids, counted = ids.to(device), counted[:, 1:].to(device)  # a token is told by the position before it
    inputs = {"input_ids": ids, "attention_mask": mask.to(device), "past_key_values": cache}
    model = getattr(engine.model, "get_base_model", lambda: engine.model)()
    if plain:
        hidden = model.base_model(**inputs, use_cache=cache is not None).last_hidden_state[:, :-1]  # (B, T - 1, D)
        logits = model.get_output_embeddings()(hidden[counted]).float()  # (tokens that count, V)
    else:
        logits = model(**inputs, use_cache=cache is not None).logits[:, :-1][counted].float()
    targets = ids[:, 1:][counted]
    of_tokens = (logits.gather(-1, targets[:, None])[:, 0] - logits.logsumexp(dim=-1)).double()
    rows = counted.nonzero()[:, 0]
    return np.asarray(torch.zeros(len(batch), dtype=torch.float64, device=device).index_add_(0, rows, of_tokens).cpu())
