import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from agentlab.learning.trouble import DIVERGED_NATS, Attempt, TrainingTrouble, check_loss, is_out_of_memory, remedy


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_that_is_no_number_is_trouble(bad):
    with pytest.raises(TrainingTrouble, match="at step 3") as caught:
        check_loss([2.0, 1.9, bad])
    assert caught.value.problem == "nan"


def test_a_loss_far_above_the_first_is_divergence():
    check_loss([2.0, 2.0 + DIVERGED_NATS])
    check_loss([2.0, 4.0, 0.1])
    with pytest.raises(TrainingTrouble, match=r"loss rose from 2.00 to 5.10 at step 2") as caught:
        check_loss([2.0, 5.1])
    assert caught.value.problem == "divergence"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes"), True),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_out_of_memory_is_recognised_by_type_and_message(error, expected):
    assert is_out_of_memory(error) is expected


@pytest.mark.parametrize("problem", ["nan", "divergence"])
def test_unstable_training_gets_a_lower_rate_and_nothing_else(problem):
    attempt, action = remedy(Attempt(0.01, 8, 2), problem)
    assert attempt == Attempt(0.0025, 8, 2)
    assert action == "learning rate lowered to 0.0025"


@given(st.integers(1, 512))
def test_scarce_memory_gets_smaller_batches_of_the_same_items(batch_size):
    attempt = Attempt(0.01, batch_size)
    sizes = [batch_size]
    while (following := remedy(attempt, "out_of_memory")) is not None:
        attempt, action = following
        assert attempt.batch_size * attempt.accumulation == batch_size
        assert attempt.learning_rate == 0.01
        assert attempt.batch_size < sizes[-1]
        assert str(attempt.batch_size) in action
        sizes.append(attempt.batch_size)
    assert sizes[-1] == 1


def test_an_unknown_problem_has_no_remedy():
    assert remedy(Attempt(0.01, 8), "boredom") is None
