"""Bytes known before anything runs: what weights and KV cache take while answering."""


def serving_mib(
    weight_bytes: int, layers: int, kv_heads: int, head_dim: int, element_bytes: int, rows: int, tokens: int
) -> float:
    """MiB of weights and KV cache for a batch of `rows` requests of `tokens` tokens each.

    One token keeps a key and a value in every layer: 2 · layers · kv_heads · head_dim · element_bytes.
    """
    kv_bytes = 2 * layers * kv_heads * head_dim * element_bytes * rows * tokens
    return (weight_bytes + kv_bytes) / 2**20
