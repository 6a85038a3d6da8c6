"""The beginning of a worked solution, in tokens: RTPO's hints."""

from tapojax import schedules


def cut(tokenizer, text: str, share: float) -> list[int]:
    """The first `share` of the text's tokens (`schedules.kept_tokens`), without a part of a character at their end."""
    tokens = tokenizer.encode(text, add_special_tokens=False)
    tokens = tokens[: schedules.kept_tokens(share, len(tokens))]
    while tokens and tokenizer.decode(tokens).endswith("\ufffd"):
        tokens = tokens[:-1]
    return tokens
