"""TRL's SFT trainer, with a loss that on a CPU projects only the tokens that count onto the vocabulary."""

from typing import Any

import torch
from trl import SFTTrainer

# What makes a model's logits more than hidden states times the head's weights.
_SCALED = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")


class CompactSFTTrainer(SFTTrainer):  # type: ignore[misc]
    """The same loss and gradients as TRL's, without the work for prompt tokens.

    TRL's fused head leaves out positions without a label where Triton runs; elsewhere it computes all of them, and with
    prompts three times as long as answers that was 45 % of a training step on two cores (`benchmarks/training.py`).
    """

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        base = getattr(self.model, "get_base_model", lambda: self.model)()
        if return_outputs or not _is_plain(base, inputs):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"][:, 1:]  # (B, T - 1)
        hidden = base.base_model(
            input_ids=inputs["input_ids"], attention_mask=inputs.get("attention_mask"), use_cache=False
        ).last_hidden_state[:, :-1]  # (B, T - 1, D)
        counted = labels != -100
        logits = base.get_output_embeddings()(hidden[counted]).float()  # (tokens that count, V)
        total = torch.nn.functional.cross_entropy(logits, labels[counted], reduction="sum")
        count = counted.sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        return total / count.clamp(min=1)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL adds the averages of metrics that the compact loss does not compute; transformers' own log suffices."""
        super(SFTTrainer, self).log(logs, start_time)


def _is_plain(base: Any, inputs: dict[str, Any]) -> bool:
    """Whether the compact loss is this model's loss: on a CPU, dense, with logits that are a plain projection."""
    config = base.config.get_text_config()
    on_cpu = inputs["input_ids"].device.type == "cpu"
    scaled = any(getattr(config, name, None) not in (None, 1, 1.0) for name in _SCALED)
    return on_cpu and not scaled and not hasattr(config, "router_aux_loss_coef")
