"""Marks of tests that only a GPU can pass; `make gpu` runs them."""

import pytest
import torch

ON_A_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU"),
    pytest.mark.usefixtures("whole_card"),
]
