"""TRL's SFT trainer, with a loss that on a CPU computes nothing twice and nothing that does not count."""

import math
from typing import Any

import torch
from peft.optimizers import create_loraplus_optimizer
from trl import SFTTrainer

from agentlab.inference.decoding import common_prefix

# What makes a model's logits more than hidden states times the head's weights.
_SCALED = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
_SHARE_TOKENS = 16  # a shorter common beginning is not worth a mask


class CompactSFTTrainer(SFTTrainer):  # type: ignore[misc]
    """The same loss and gradients as TRL's, with less work (`benchmarks/training.py` measures it).

    Only tokens with a label are projected onto the vocabulary: TRL leaves out the others where Triton runs, elsewhere
    it computes them all. And the tokens that all rows of a batch begin with, a suite's system prompt, are computed
    once: the rows are laid one behind the other and a mask lets each see the beginning and itself. With dropout the
    rows then share its draws on the beginning.

    loraplus_ratio: B's learning rate over A's (LoRA+, Hayou et al. 2024); their geometric mean is the one of `args`, so
    that a rate keeps its meaning. 1: TRL's own optimiser.
    """

    optimizer: torch.optim.Optimizer | None

    def __init__(self, *args: Any, loraplus_ratio: float = 1.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._loraplus_ratio = loraplus_ratio

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None and self._loraplus_ratio != 1:
            trained = self.model if model is None else model
            kind, values = self.get_optimizer_cls_and_kwargs(self.args, trained)
            values |= {"lr": self.args.learning_rate / math.sqrt(self._loraplus_ratio)}
            self.optimizer = create_loraplus_optimizer(
                trained, kind, loraplus_lr_ratio=self._loraplus_ratio,
                loraplus_weight_decay=self.args.weight_decay, **values,
            )  # fmt: skip
            return self.optimizer
        return super().create_optimizer(model)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        base = getattr(self.model, "get_base_model", lambda: self.model)()
        if return_outputs or not _is_plain(base, inputs):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels, rows = inputs["labels"], {key: inputs[key] for key in ("input_ids", "attention_mask")}
        packed = packed_rows(inputs["input_ids"], inputs["attention_mask"], labels, base.dtype)
        if packed is not None:
            labels, rows = packed
        hidden = base.base_model(**rows, use_cache=False).last_hidden_state[:, :-1]  # (B, T - 1, D)
        labels = labels[:, 1:]  # (B, T - 1)
        counted = labels != -100
        logits = base.get_output_embeddings()(hidden[counted]).float()  # (tokens that count, V)
        total = torch.nn.functional.cross_entropy(logits, labels[counted], reduction="sum")
        count = counted.sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        return total / count.clamp(min=1)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL adds the averages of metrics that the compact loss does not compute; transformers' own log suffices."""
        super(SFTTrainer, self).log(logs, start_time)


def packed_rows(
    ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, dict[str, torch.Tensor]] | None:
    """A batch as one row: the common beginning, then the rest of each row. (labels (1, N), inputs of the model).

    ids, mask, labels: (B, T), padded on the right. None where the rows have too little in common, or a label on it.
    """
    lengths = mask.sum(dim=1).tolist()
    rows = [row[:length].tolist() for row, length in zip(ids, lengths, strict=True)]
    first_label = min(int((row != -100).nonzero()[0]) if bool((row != -100).any()) else len(row) for row in labels)
    # the token before the first label predicts it, so it belongs to its own row
    shared = min(common_prefix(rows), first_label - 1) if len(rows) > 1 else 0
    if shared < _SHARE_TOKENS:
        return None
    owner = torch.tensor([0] * shared + [i + 1 for i, n in enumerate(lengths) for _ in range(n - shared)])
    positions = torch.tensor([*range(shared), *(p for n in lengths for p in range(shared, n))])
    size = len(owner)
    earlier = torch.ones(size, size, dtype=torch.bool).tril()
    visible = earlier & ((owner[None, :] == 0) | (owner[None, :] == owner[:, None]))  # (query, key)
    additive = torch.zeros(size, size, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)
    tails = [torch.cat([row[shared:n] for row, n in zip(matrix, lengths, strict=True)]) for matrix in (ids, labels)]
    return torch.cat([labels[0, :shared], tails[1]])[None], {
        "input_ids": torch.cat([ids[0, :shared], tails[0]])[None],
        "position_ids": positions[None].to(ids.device),
        "attention_mask": additive[None, None].to(ids.device),
    }


def projects_plainly(config: Any) -> bool:
    """Whether a model's logits are its hidden states times its head's weights and nothing more."""
    return not any(getattr(config, name, None) not in (None, 1, 1.0) for name in _SCALED)


def _is_plain(base: Any, inputs: dict[str, Any]) -> bool:
    """Whether the compact loss is this model's loss: on a CPU, dense, with logits that are a plain projection."""
    config = base.config.get_text_config()
    on_cpu = inputs["input_ids"].device.type == "cpu"
    # a sliding window would be lost in the packed row
    kinds = getattr(config, "layer_types", None) or []
    windowed = getattr(config, "sliding_window", None) is not None or any(kind != "full_attention" for kind in kinds)
    return on_cpu and projects_plainly(config) and not windowed and not hasattr(config, "router_aux_loss_coef")
