"""The mean of the weights that training passed through, instead of those where it happened to end."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import TrainerCallback

from agentlab.learning.state import copied, trained


class WeightAverage(TrainerCallback):  # type: ignore[misc]
    """Averages the trained weights over the last `share` of a line's steps and puts the mean in their place at the end.

    At a steady learning rate weights circle around where they would settle, and their mean is near it, so that no steps
    go into a rate that falls to zero (Izmailov et al. 2018, Kaddour 2022). A·B of the mean factors is not the mean of
    A·B; over steps of one training the two are close. The mean is kept in RAM in fp32: on a GPU it takes nothing.
    """

    def __init__(self, share: float, steps_before: int = 0, mean_before: Sequence[torch.Tensor] = ()) -> None:
        """share: of all steps, above 0, at most 1; at least the last one counts.

        steps_before, mean_before: of a line that this training continues, how many steps it had and the mean that it
        ended with, in the order of the model's trained parameters. Where the share reaches back beyond the beginning
        of this training, that mean stands for the steps before: a mean of a few new steps alone would be of less.
        """
        if not 0 < share <= 1:
            raise ValueError(f"share: {share}; allowed: above 0, at most 1")
        self._share = share
        self._steps_before = steps_before
        self._mean_before = mean_before
        self._mean: list[torch.Tensor] = []
        self._count = 0

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        counted = max(1, round(self._share * (self._steps_before + state.max_steps)))
        if state.global_step <= state.max_steps - counted:
            return
        now = trained_weights(model)
        self._count += 1
        if self._count == 1:
            self._mean = now
        for mean, value in zip(self._mean, now, strict=True):
            mean.add_((value - mean) / self._count)
        if state.global_step >= state.max_steps:
            if self._mean_before:
                missing = max(0, counted - state.max_steps) / counted
                for mean, before in zip(self._mean, self._mean_before, strict=True):
                    mean.lerp_(before, missing)
            with torch.no_grad():
                for (_name, weight), mean in zip(trained(model), self._mean, strict=True):
                    weight.copy_(mean)


def trained_weights(model: torch.nn.Module) -> list[torch.Tensor]:
    """Copies of the parameters that are trained, fp32 in RAM, in the model's order."""
    return [copied(weight) for _, weight in trained(model)]
