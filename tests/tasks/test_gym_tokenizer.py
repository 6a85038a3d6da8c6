import dataclasses

import numpy as np
import pytest

from tapojax.tasks import gym, gym_levels, gym_tokenizer

TOKENIZER = gym_tokenizer.TOKENIZER


def test_every_level_round_trips():
    for example in gym.source(list(gym_levels.LEVELS), 360, 0):
        text = example["problem"] + example["solution"]
        tokens = TOKENIZER.encode(text)
        assert len(tokens) == len(text), "one character is one token"
        assert TOKENIZER.decode(tokens) == text


def test_vocabulary_is_a_bijection_with_two_different_specials():
    ids = TOKENIZER.encode(TOKENIZER.characters)
    special = {TOKENIZER.pad_token_id, TOKENIZER.eos_token_id}
    assert len(special) == 2
    assert special | set(ids) == set(range(TOKENIZER.vocab_size)) and len(TOKENIZER) == TOKENIZER.vocab_size


def test_decode_skips_specials_and_stops_at_nothing():
    left, right = TOKENIZER.encode("7+6"), TOKENIZER.encode("=13")
    tokens = np.array([*left, TOKENIZER.eos_token_id, *right, TOKENIZER.pad_token_id])
    assert TOKENIZER.decode(tokens, skip_special_tokens=True) == "7+6=13"
    assert TOKENIZER.decode(tokens, skip_special_tokens=False) == "7+6<eos>=13<pad>"
    assert TOKENIZER.decode([]) == "" and TOKENIZER.encode("") == []


def test_unknown_characters_and_ids_are_named():
    with pytest.raises(ValueError, match="'x'"):
        TOKENIZER.encode("7x6")
    with pytest.raises(ValueError, match="-1"):
        TOKENIZER.decode([3, -1])
    with pytest.raises(ValueError, match=f"vocab_size={TOKENIZER.vocab_size}"):
        TOKENIZER.decode([TOKENIZER.vocab_size])


def test_tokenizer_is_a_value():
    assert TOKENIZER == gym_tokenizer.CharTokenizer() and hash(TOKENIZER) == hash(gym_tokenizer.CharTokenizer())
    with pytest.raises(dataclasses.FrozenInstanceError):
        TOKENIZER.eos_token_id = 0
