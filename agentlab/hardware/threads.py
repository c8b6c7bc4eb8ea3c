"""How many threads torch computes with on the CPU."""


def limit_threads(most: int) -> None:
    """Let torch use at most `most` threads in this process; it takes one per core by itself."""
    import torch

    torch.set_num_threads(min(torch.get_num_threads(), most))
