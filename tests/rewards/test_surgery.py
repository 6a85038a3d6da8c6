r"""A completion gets another answer: its reasoning keeps its tokens, and the verifier reads the new answer."""

import re

import numpy as np
import pytest
import tokenizers
import transformers

from tapojax.rewards import answers, spans, surgery
from tapojax.tasks import arithmetic
from tapojax.tasks.gym_tokenizer import TOKENIZER as GYM
from tests.tasks.test_files import make, save_tokenizer

REASONING = "Half of 84 — “naïve” 🧮 π≈3 — is\n\n12+30 = 42, so 42.\nLet me check: 42 = 6·7.\n"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Merges over bytes: tokens of several characters, and characters of several tokens."""
    return make(save_tokenizer(tmp_path_factory.mktemp("tokenizer"))).tokenizer


def rng(seed=0):
    return np.random.default_rng(seed)


def text_of(tokenizer, tokens):
    return tokenizer.decode(tokens, skip_special_tokens=True)


def exchanged(tokenizer, text, answer, *, end=True):
    """(tokens, what became of them) of a text."""
    tokens = [*tokenizer.encode(text), *[tokenizer.eos_token_id] * end]
    return tokens, surgery.exchange(tokenizer, spans.find, tokens, answer)


# ---- exchange


@pytest.mark.parametrize("end", [True, False])
@pytest.mark.parametrize(
    ("closing", "expected"),
    [
        ("The answer is \\boxed{42}.", "The answer is \\boxed{A}."),
        ("So \\(x = \\boxed{42}\\) apples. That is 42. Done", "So \\(x = \\boxed{A}\\) apples."),
        ("\\boxed{42}\nand more", "\\boxed{A}"),
        ("\\[\n\\boxed{42}\n\\]\nDone", "\\[\n\\boxed{A}\n\\]"),
        ("$$\n\\boxed{42}\n$$", "$$\n\\boxed{A}\n$$"),
        ("\\begin{align}\n&=\\boxed{42}.\n\\end{align}\n\\] ok", "\\begin{align}\n&=\\boxed{A}.\n\\end{align}"),
        ("<answer>\n42\n</answer>\nbye", "<answer>\nA\n</answer>"),
        ("<answer> 42 </answer> bye", "<answer> A </answer> bye"),
        ("#### 42", "#### A"),
        ("The answer is **42**.", "The answer is **A**."),
        ('```json\n{"answer": "42"}\n```\n', '```json\n{"answer": "A"}\n```'),
        ("答案是 \\boxed{42}。好", "答案是 \\boxed{A}。"),
    ],
)
@pytest.mark.parametrize("answer", ["43", "1729", "7"])
def test_only_the_answer_changes(tokenizer, closing, expected, answer, end):
    tokens, got = exchanged(tokenizer, REASONING + closing, answer, end=end)
    assert text_of(tokenizer, got.tokens) == REASONING + expected.replace("A", answer)
    assert got.tokens[-1] == tokenizer.eos_token_id and tokenizer.eos_token_id not in got.tokens[:-1]
    unchanged = tokenizer.encode(REASONING)
    assert got.begin >= len(unchanged) and got.tokens[: got.begin] == tokens[: got.begin], "reasoning keeps its tokens"
    assert got.tokens[got.begin] != tokens[got.begin], "the span begins with the first token that differs"
    assert text_of(tokenizer, got.tokens[: got.end]).endswith(answer), "and ends with the new answer"
    assert answers.extract(text_of(tokenizer, got.tokens)) == answer


def test_tokens_that_no_encoder_would_choose_stay_as_they_are(tokenizer):
    """A policy samples other cuts than the encoder's; they are its reasoning."""
    spelled = [token for character in REASONING for token in tokenizer.encode(character)]
    assert spelled != tokenizer.encode(REASONING)
    tokens = [*spelled, *tokenizer.encode("\\boxed{42}."), tokenizer.eos_token_id]
    got = surgery.exchange(tokenizer, spans.find, tokens, "43")
    assert got.tokens[: len(spelled)] == spelled
    assert text_of(tokenizer, got.tokens) == REASONING + "\\boxed{43}."


@pytest.mark.parametrize("old", ["π", "😀", "½"])
@pytest.mark.parametrize("new", ["π/2", "7", "¾", "🙂"])
def test_characters_of_several_tokens_are_never_cut(tokenizer, old, new):
    """The first bytes of π and ½ or of two faces may be one token: the shared ones are no difference."""
    tokens, got = exchanged(tokenizer, f"é: \\boxed{{{old}}}.", new)
    assert text_of(tokenizer, got.tokens) == f"é: \\boxed{{{new}}}."
    assert got.tokens[: got.begin] == tokens[: got.begin]


def test_a_token_that_holds_the_answer_and_its_neighbours_is_encoded_anew():
    """`boxed{42}.` is one token here: nothing of it can stay."""
    words = ["So ", "\\boxed{42}.", "\\boxed{", "43", "}.", " end"]
    tokens, got = exchanged(FixedVocabulary(words), "So \\boxed{42}. end", "43")
    assert [*map(words.__getitem__, got.tokens[:-1])] == ["So ", "\\boxed{", "43", "}."]
    assert (got.begin, got.end) == (1, 3) and got.tokens[:1] == tokens[:1]


def test_an_answer_in_one_token_with_what_follows_ends_the_span_there():
    words = ["So ", "\\boxed{", "42}.", "43}."]
    _, got = exchanged(FixedVocabulary(words), "So \\boxed{42}.", "43")
    assert (got.tokens[:-1], got.begin, got.end) == ([0, 1, 3], 2, 3)


class FixedVocabulary:
    """The longest word that fits is the next token."""

    def __init__(self, words):
        self.words, self.eos_token_id, self.pad_token_id = words, len(words), len(words)

    def __len__(self):
        return len(self.words) + 1

    def encode(self, text, *, add_special_tokens=True):
        pattern = "|".join(re.escape(word) for word in sorted(self.words, key=len, reverse=True))
        return [self.words.index(word) for word in re.findall(pattern, text)]

    def decode(self, tokens, skip_special_tokens=True):
        return "".join([*self.words, ""][token] for token in tokens)


def test_a_beginning_token_that_the_tokenizer_adds_gets_into_no_completion(tmp_path):
    model = tokenizers.Tokenizer.from_file(save_tokenizer(tmp_path) + "/tokenizer.json")
    start = model.token_to_id("<|im_start|>")
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", start)]
    )
    adds = transformers.PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<|im_end|>")
    assert adds.encode("4")[0] == start
    tokens = [*adds.encode("So \\boxed{42}.", add_special_tokens=False), adds.eos_token_id]
    assert start not in surgery.exchange(adds, spans.find, tokens, "43").tokens


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("I do not know the answer, nor anything.", "7"),
        ("\\boxed{42}", "42"),
        ("\\boxed{81}", "8"),
        ("\\boxed{42}", "4}{"),
        ("\\boxed{42}", " 7 "),
        ("\\boxed{42}", "7<|im_end|>"),
        ("#### 42", "seven apples and a pear"),
    ],
    ids=["no answer", "the same", "cut short", "unbalanced", "spaces", "special token", "no answer behind hashes"],
)
def test_what_would_not_read_back_is_not_made(tokenizer, text, answer):
    assert exchanged(tokenizer, text, answer)[1] is None


def test_an_answer_that_the_tokenizer_cannot_write_is_not_made():
    words = ["So ", "\\boxed{", "42", "}", "."]
    assert exchanged(FixedVocabulary(words), "So \\boxed{42}.", "43")[1] is None


def test_a_tokenizer_whose_texts_never_begin_with_a_space_is_left_alone():
    class Trimming(FixedVocabulary):
        def decode(self, tokens, skip_special_tokens=True):
            return super().decode(tokens).lstrip()

    words = ["The answer is", " 42", " 43", "."]
    assert exchanged(FixedVocabulary(words), "The answer is 42.", "43")[1] == ([0, 2, 3, 4], 1, 2)
    assert exchanged(Trimming(words), "The answer is 42.", "43")[1] is None


@pytest.mark.parametrize("seed", range(30))
def test_random_texts_keep_their_reasoning(tokenizer, seed):
    """Whatever the characters and cuts before the answer."""
    random = rng(seed)
    letters = [*"ab 12.{}$\\\n", "é", "π", "中", "😀", "\ufffd", "reason", "The answer is "]
    reasoning = "".join(random.choice(letters, 40)) + "\nSo "
    cut = int(random.integers(len(reasoning)))
    before = tokenizer.encode(reasoning[:cut]) + tokenizer.encode(reasoning[cut:])
    tokens = [*before, *tokenizer.encode("\\boxed{128}.\nBye"), tokenizer.eos_token_id]
    got = surgery.exchange(tokenizer, spans.find, tokens, "821")
    if spans.find(reasoning + "\\boxed{128}.") != (len(reasoning) + 7, len(reasoning) + 10):
        pytest.skip("an open brace swallows the box")
    assert got.tokens[: len(before)] == before and text_of(tokenizer, got.tokens) == reasoning + "\\boxed{821}."


# ---- wrong answers


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("42", {"41", "43", "40", "44", "32", "52", "24", "-42"}),
        ("-7", {"-6", "-8", "-5", "-9", "3", "-17", "7"}),
        ("0", {"-1", "1", "-2", "2", "-10", "10"}),
        ("1,000", {"999", "1,001", "998", "1,002", "990", "1,010", "100", "-1,000"}),
        ("-12 cm", {f"{n} cm" for n in (-13, -11, -14, -10, -22, -2, 12, -21)}),
        ("\\$18", {f"\\${n}" for n in (17, 19, 16, 20, 8, 28, 81, -18)}),
        ("90^\\circ", {f"{n}^\\circ" for n in (89, 91, 88, 92, 80, 100, 9, -90)}),
        ("3/4", {"2/4", "4/4"}),
        ("-\\frac{3}{4}", {"-\\frac{2}{4}", "-\\frac{4}{4}"}),
        ("\\dfrac{-3}{4}\\pi", {"\\dfrac{-2}{4}\\pi", "\\dfrac{-4}{4}\\pi"}),
        ("2.50", {f"2.5{digit}" for digit in "123456789"}),
        ("$.5", {f"$.{digit}" for digit in "012346789"}),
        ("(B)", {"(A)", "(C)", "(D)", "(E)"}),
        ("\\text{(H)}", {f"\\text{{({letter})}}" for letter in "ABCDEFGIJ"}),
        ("\\text{B}", {f"\\text{{{letter}}}" for letter in "ACDE"}),
        ("x+1", set()),
        ("(1, 2)", set()),
        ("\\frac{\\pi}{2}", set()),
        ("Monday", set()),
        ("", set()),
    ],
)
def test_numeric_edits(answer, expected):
    got = list(surgery.wrong_answers(answer, rng()))
    assert set(got) == expected and len(got) == len(expected)


def test_the_order_of_edits_is_random_and_a_function_of_the_generator():
    orders = [tuple(surgery.wrong_answers("42", rng(seed))) for seed in range(8)]
    assert len(set(orders)) > 4
    assert orders[3] == tuple(surgery.wrong_answers("42", rng(3)))


# ---- perturb


def perturb_with(score):
    span = arithmetic._answer_span
    return surgery.make_perturb(GYM, span, lambda examples, texts: ({"correct": [score(texts[0])]}, [None]))


def test_suggestions_come_first_and_must_be_wrong():
    perturb = perturb_with(lambda text: float(text.endswith("#13")))
    tokens = [*GYM.encode("7+6=13#13"), GYM.eos_token_id]
    got = perturb({}, tokens, ["13", "1", "-5", "07", "12", "11"], rng())
    assert GYM.decode(got.tokens, False) == "7+6=13#12<eos>", "the right, a shorter, a negative, a padded one do not do"
    assert (got.begin, got.end) == (8, 9), "the 1 is not wrong yet"
    assert GYM.decode(perturb({}, tokens, [], rng()).tokens)[:7] == "7+6=13#"


def test_no_verdict_is_not_wrong_and_five_tries_are_enough():
    tried = []

    def score(text):
        tried.append(text)
        return float("nan") if len(tried) % 2 else 1.0

    tokens = [*GYM.encode("#13"), GYM.eos_token_id]
    suggestions = ["21", "21", "22", "23", "24", "25", "26"]
    assert perturb_with(score)({}, tokens, suggestions, rng()) is None
    assert tried == ["#21", "#22", "#23", "#24", "#25"]


def test_a_completion_without_a_readable_answer_is_left_alone():
    perturb = perturb_with(lambda text: 0.0)
    for text in ("7+6=13", "#", "#-5", "#013", "#1 3"):
        assert perturb({}, GYM.encode(text), ["4"], rng()) is None


def test_the_gym_perturbs_its_solutions():
    task = arithmetic.arithmetic(seed=0, max_prompt_tokens=16, train_size=30, evaluation_size=1)
    for index, example in enumerate(task.train):
        tokens = [*task.tokenizer.encode(example["solution"]), task.tokenizer.eos_token_id]
        got = task.perturb(example, tokens, [], rng(index))
        text = task.tokenizer.decode(got.tokens)
        assert task.score([example], [text])[0]["correct"] == 0 and task.score([example], [text])[0]["process"] == 1
        assert text.rpartition("#")[0] == example["solution"].rpartition("#")[0]
        assert task.answer(text).isdecimal() and got.tokens[-1] == task.tokenizer.eos_token_id


def test_files_perturb_what_their_verifier_accepts(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"problem": "Half of a half?", "answer": "\\\\frac{1}{4}", "id": "q"}\n')
    task = make(save_tokenizer(tmp_path), str(path))
    (example,) = task.train
    text = "Halves of halves are quarters.\nSo \\boxed{\\frac{1}{4}}."
    tokens = [*task.tokenizer.encode(text), task.tokenizer.eos_token_id]
    got = task.perturb(example, tokens, ["\\frac{2}{8}", "0.25", "\\frac{1}{8}"], rng())
    assert task.tokenizer.decode(got.tokens, skip_special_tokens=True) == text.replace("{4}", "{8}")
    assert task.perturb(example, task.tokenizer.encode("no idea at all"), ["7"], rng()) is None
