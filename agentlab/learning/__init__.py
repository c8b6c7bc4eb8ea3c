"""From verified work to a trained adapter: sampling, supervised fine-tuning, failures and remedies."""

from agentlab.learning.dataset import Example, encode, sample, steps_of
from agentlab.learning.trouble import TrainingFailed, TrainingTrouble

__all__ = ["Example", "TrainingFailed", "TrainingTrouble", "encode", "sample", "steps_of"]
