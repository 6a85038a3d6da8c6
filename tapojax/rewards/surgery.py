r"""Exchanging the final answer of a completion for a wrong one, exactly where the verifier reads it.

The reasoning keeps its very tokens; the new answer and the rest of its sentence are encoded anew, and a result counts
only if it decodes to what was intended. Perturbed answer injection is of Jiang et al., AAAI 2026; every rule here is
our choice.
"""

import bisect
import itertools
import re
from collections.abc import Callable, Iterator, Sequence

from tapojax.types import Example, Perturbed, Scores

Span = Callable[[str], tuple[int, int] | None]  # where the final answer stands in a text
MAX_TRIES = 5
# the rest of the sentence or line, and the lines that do nothing but close mathematics or code
CLOSING = re.compile(
    r"[^\n]*?(?:[.!?](?=\s|\*|\Z)|。|(?=\n)|\Z)"
    r"(?:\n[ \t]*(?:\\\]|\\\)|\$\$|```|\*\*|\}|\\end\{[^{}\n]*\}|</answer>)[ \t]*(?=\n|\Z))*"
)
MONEY = r"(?:\\?[$€£])?"
FRACTION = re.compile(rf"({MONEY}[-+]?(?:\\[dt]?frac ?\{{)?)([-+]?\d{{1,30}})((?: ?/ ?|\}} ?\{{)\d+\D*)")
DECIMAL = re.compile(rf"({MONEY}[-+]?[\d,]*\.\d*)(\d)(\D*)")
INTEGER = re.compile(rf"({MONEY})([-+]?(?:\d{{1,3}}(?:,\d{{3}})+|\d{{1,30}}))(\D*)")
CHOICE = re.compile(r"((?:\\text(?:bf|rm)? ?\{)?\(?)([A-J])([^\w\s]{0,9})")


def make_perturb(
    tokenizer, span: Span, score: Callable[..., tuple[Scores, Sequence[str | None]]]
) -> Callable[..., Perturbed | None]:
    """Task.perturb for a tokenizer, the place of the final answer, and the task's verifier.

    The suggested answers are tried first, then numeric edits of the completion's own answer, at most MAX_TRIES in all.
    The first that can be written and that the verifier calls wrong is taken; no verdict is not wrong.
    """

    def perturb(example: Example, tokens: Sequence[int], suggestions: Sequence[str], rng) -> Perturbed | None:
        text = _decode(tokenizer, tokens)
        if (found := span(text)) is None:
            return None
        old = text[slice(*found)]
        answers = dict.fromkeys(itertools.chain(suggestions, wrong_answers(old, rng)))
        for answer in itertools.islice((answer for answer in answers if answer != old), MAX_TRIES):
            if (perturbed := exchange(tokenizer, span, tokens, answer)) is not None:
                scores, _ = score([example], [_decode(tokenizer, perturbed.tokens)])
                if scores["correct"][0] == 0:
                    return perturbed
        return None

    return perturb


def exchange(tokenizer, span: Span, tokens: Sequence[int], answer: str) -> Perturbed | None:
    """The completion with `answer` in place of its own; it ends with the sentence of the answer and end of sequence.

    `tokens` may end with end of sequence or not. The tokens before the one that holds the answer's first character are
    kept as they are. The result's span runs from the first token that differs to the last of the new answer.

    None where the text has no answer, where the new one differs by nothing but an earlier end, and where the result
    does not read back: another text before it, another answer found. So it is for a tokenizer that puts a space
    before whatever it encodes.
    """
    text = _decode(tokenizer, tokens)
    if (found := span(text)) is None:
        return None
    closing = CLOSING.match(text, found[1])
    before, after = text[: found[0]], closing[0] if closing else ""
    kept = _tokens_within(tokenizer, tokens, before)
    rest = before[len(_decode(tokenizer, tokens[:kept])) :] + answer
    added = tokenizer.encode(rest + after, add_special_tokens=False)
    new, intended = [*tokens[:kept], *added, tokenizer.eos_token_id], before + answer + after
    if _decode(tokenizer, new) != intended or span(intended) != (found[0], found[0] + len(answer)):
        return None
    differs = next((i for i, pair in enumerate(zip(tokens, new, strict=False)) if len(set(pair)) == 2), len(tokens))
    counts = range(len(added) + 1)
    end = kept + next((n for n in counts if _decode(tokenizer, added[:n]).startswith(rest)), 0)
    return Perturbed(new, differs, end) if differs < end else None


def wrong_answers(answer: str, rng) -> Iterator[str]:
    r"""Numeric edits of an answer, in random order; none where it is neither a number nor the letter of a choice.

    Integers (a unit may follow): n ± 1, 2, 10, two neighbouring digits swapped, the sign flipped. Fractions, `a/b` or
    `\frac{a}{b}`: the numerator ± 1. Decimals: another last digit. Letters: another one. Some may equal the answer in
    value, so the verifier has to look at them.
    """
    if match := FRACTION.fullmatch(answer):
        edits = [str(int(match[2]) + delta) for delta in (-1, 1)]
    elif match := DECIMAL.fullmatch(answer):
        edits = [digit for digit in "0123456789" if digit != match[2]]
    elif match := INTEGER.fullmatch(answer):
        edits = _other_integers(match[2], rng)
    elif match := CHOICE.fullmatch(answer):
        edits = [letter for letter in ("ABCDE" if match[2] <= "E" else "ABCDEFGHIJ") if letter != match[2]]
    else:
        return
    for i in rng.permutation(len(edits)):
        yield match[1] + edits[i] + match[3]


def _other_integers(number: str, rng) -> list[str]:
    value = int(number.replace(",", ""))
    digits = str(abs(value))
    others = {value + delta for delta in (-10, -2, -1, 1, 2, 10)} | {-value}
    if swaps := [i for i, (a, b) in enumerate(itertools.pairwise(digits)) if a != b]:
        i = int(rng.choice(swaps))
        swapped = int(digits[:i] + digits[i + 1] + digits[i] + digits[i + 2 :])
        others.add(swapped if value >= 0 else -swapped)
    return [f"{other:,}" if "," in number else str(other) for other in sorted(others - {value})]


def _tokens_within(tokenizer, tokens: Sequence[int], text: str) -> int:
    """How many of the first tokens decode to `text` or a beginning of it.

    A cut inside a character decodes to U+FFFD, sometimes to several, so lengths find the place only roughly.
    """

    def length(count: int) -> int:
        return len(_decode(tokenizer, tokens[:count]))

    near = bisect.bisect_right(range(len(tokens) + 1), len(text), key=length)
    cuts = range(min(near + 4, len(tokens)), -1, -1)
    return next(cut for cut in cuts if text.startswith(_decode(tokenizer, tokens[:cut])))


def _decode(tokenizer, tokens: Sequence[int]) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=True)
