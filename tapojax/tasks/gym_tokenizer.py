"""Character tokenizer of the arithmetic gym: one character is one token, so lengths can be read off the text.

It answers to the same names as a Hugging Face tokenizer (`encode`, `decode`, `pad_token_id`, `eos_token_id`,
`vocab_size`, `len`), so a training loop treats both alike. Unlike many of those, padding and end of sequence differ.
"""

import dataclasses
from collections.abc import Iterable
from typing import SupportsIndex

CHARACTERS = "0123456789+-*=,;:?.#ABCDEFGHIJKLMNOPQRSTUVWXYZ ()"
SPECIAL = ("<pad>", "<eos>")


@dataclasses.dataclass(frozen=True)
class CharTokenizer:
    """Fixed vocabulary: ids 0 and 1 are padding and end of sequence, id 2 + i is the i-th of `characters`."""

    characters: str = CHARACTERS
    pad_token_id: int = 0
    eos_token_id: int = 1

    @property
    def vocab_size(self) -> int:
        return len(SPECIAL) + len(self.characters)

    def __len__(self) -> int:
        return self.vocab_size

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; no special token begins or ends a text here, so there is none to add.

        Raises ValueError naming a character outside the vocabulary.
        """
        del add_special_tokens
        ids = [self.characters.find(character) for character in text]
        if -1 in ids:
            raise ValueError(f"character {text[ids.index(-1)]!r} is not in the gym's vocabulary {self.characters!r}")
        return [len(SPECIAL) + i for i in ids]

    def decode(self, token_ids: Iterable[SupportsIndex], skip_special_tokens: bool = True) -> str:
        """Text of `token_ids`; stops at nothing. Special tokens are left out, or spelled `<pad>` and `<eos>`.

        Raises ValueError naming an id outside the vocabulary (a model with more logits than `vocab_size`).
        """
        ids = [int(i) for i in token_ids]
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"token id {i} is outside the vocabulary; give the model vocab_size={self.vocab_size}")
        names = (("", "") if skip_special_tokens else SPECIAL) + tuple(self.characters)
        return "".join(names[i] for i in ids)


TOKENIZER = CharTokenizer()
