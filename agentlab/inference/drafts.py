"""Several tokens of one answer in one forward pass: what is likely to follow is drafted and read along.

Prompt lookup (Saxena 2023, https://github.com/apoorvumang/prompt-lookup-decoding): an answer often repeats words of its
prompt, as the arguments of a call do; under a grammar, what it demands next is known as well. The model decides on each
token as if it had been asked for it alone, so a draft changes how long an answer takes, and nothing else but rounding.
transformers has prompt lookup as well, but tries its hooks on drafts that may be refused; ours remember what they saw.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import DynamicCache

from agentlab.inference.cache import cut

MOST = 4  # drafted tokens: longer drafts are refused too often to pay on a CPU, where each is computed
LEAST_ALIKE = 2  # last tokens that have to be the same at the place from which a draft is copied
_MOST_ALIKE = 4

Hook = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # ids (1, T), scores (1, V) → scores (1, V)


def lookup(tokens: Sequence[int], most: int = MOST) -> list[int]:
    """What followed where the last tokens stood before: the place with most of them alike, of those the last."""
    found, alike = len(tokens), LEAST_ALIKE - 1
    for end in range(len(tokens) - 1, LEAST_ALIKE - 1, -1):
        if tokens[end - 1] != tokens[-1]:
            continue
        same = 1
        while same < min(_MOST_ALIKE, end) and tokens[end - 1 - same] == tokens[-1 - same]:
            same += 1
        if same > alike:
            found, alike = end, same
            if same == _MOST_ALIKE:
                break
    return list(tokens[found : found + most])


def decode(
    model: Any, cache: DynamicCache, ids: torch.Tensor, limit: int, hooks: Sequence[Hook],
    ended: Callable[[torch.Tensor], bool], path: Callable[[], Sequence[int]] = lambda: (),
    say: Callable[[torch.Tensor], None] = lambda ids: None,
) -> tuple[torch.Tensor, list[float]]:  # fmt: skip
    """Greedy decoding of one row, ids (1, T) of its prompt, until `ended`: ids, and each new token's log-probability.

    limit: most new tokens, after which it has `ended`; nothing is drafted beyond, where a model may know no position.
    cache: one that can be cut, with a beginning of the prompt or nothing in it; it ends with all but the last token.
    hooks: as transformers' logits processors; each is called once for every token of the answer, in their order, and
    never for a draft that was refused. path: what a grammar demands next, empty where it leaves that open. say: is told
    each new token, as (1, 1).
    """
    logprobs: list[float] = []
    going = True
    while going:
        tokens = ids[0].tolist()
        draft = (list(path()) or lookup(tokens))[: max(0, min(MOST, limit - len(logprobs) - 1))]
        fresh = torch.tensor([tokens[cache.get_seq_length() :] + draft], device=ids.device)
        output = model(input_ids=fresh, past_key_values=cache, use_cache=True, logits_to_keep=len(draft) + 1)
        for position, drafted in enumerate([*draft, None]):
            logits = output.logits[:, position].float()  # (1, V)
            scores = logits
            for hook in hooks:
                scores = hook(ids, scores)
            token = scores.argmax(dim=-1, keepdim=True)
            logprobs.append(float(logits.gather(1, token) - logits.logsumexp(1)))
            ids = torch.cat([ids, token], dim=1)
            say(token)
            going = not ended(ids)
            if not going or token.item() != drafted:
                break
        cut(cache, ids.shape[1] - 1)
    return ids, logprobs
