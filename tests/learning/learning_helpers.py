"""A genome with the few genes that training looks at."""

from agentlab.records import Genome


def genome_of(steps=4, batch_size=4, learning_rate=1e-2, seed=5, rank=4, dropout=0.0):
    return Genome(
        candidate="g000-c00",
        generation=0,
        operator="founder",
        parents=[],
        merge_weights=[],
        merge_method="exact",
        rank=rank,
        alpha=2.0 * rank,
        dropout=dropout,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        learning_rate=learning_rate,
        steps=steps,
        batch_size=batch_size,
        data_mix={},
        weight_noise=0.0,
        mutated=[],
        seed=seed,
    )
