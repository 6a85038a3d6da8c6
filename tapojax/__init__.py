"""RL post-training of reasoning language models as pure JAX functions."""
