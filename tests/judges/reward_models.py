"""Folders of tiny random reward models, written without torch."""

import jax
import numpy as np

from tapojax.models import decoder, huggingface
from tapojax.models.config import DecoderConfig, ScoreHead
from tests.tasks.test_files import save_tokenizer

HEADS = {
    "outcome": ScoreHead("ForSequenceClassification", 1),
    "outcome, biased": ScoreHead("ForSequenceClassification", 1, bias=True),
    "outcome, 3 labels": ScoreHead("ForSequenceClassification", 3),
    "outcome, two layers": ScoreHead("ForRewardModel", 1, hidden=24),
    "process": ScoreHead("ForTokenClassification", 2, bias=True),
    "process, 1 label": ScoreHead("ForTokenClassification", 1),
    "process, two layers": ScoreHead("ForProcessRewardModel", 2, hidden=24),
}


def shape(head: ScoreHead) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=400,
        hidden_size=24,
        intermediate_size=40,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=6,
        qkv_bias=True,
        initializer_range=0.3,
        score=head,
    )


def random_params(config: DecoderConfig, seed=0):
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: decoder.init(config, jax.random.key(0)))
    return jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(x.dtype), shapes)


def save(folder, name: str, *, separator: str = "<extra_0>", **keys):
    """The folder of a reward model with its tokenizer, whose separator is a special token."""
    config = shape(HEADS[name])
    huggingface.save_params(folder, random_params(config), config, **keys)
    save_tokenizer(folder, extra_special_tokens=[separator])
    return folder
