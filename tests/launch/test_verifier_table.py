"""The table counts cases as their sources and the panel of graders expect them, and names each that differs."""

import gzip
import json

import pytest

from launch import verifier_table


def write(path, *rows):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def folder(tmp_path):
    def case(gold, pred, verdict, kind="answer", core=True):
        return {"gold": gold, "pred": pred, "verdict": verdict, "kind": kind, "core": core, "source": "suite"}

    write(
        tmp_path / "verdicts.jsonl",
        case("1/2", r"\frac{1}{2}", True),
        case("43_5", "43_6", True),  # the source is wrong, and so is math-verify
        case("5", "it is 5 perhaps", True, kind="response", core=False),
        case("", "5", None),
        case("B", "(B)", True, kind="choice"),
        case(["1", "2"], "1", True),
    )
    panel = ("prm800k", "verl_prime", "qwen", "verl_math_verify")

    def reference(id, pred, *said):
        return {"id": id, "gold": "7", "pred": pred, "mode": "answer", "verdicts": dict(zip(panel, said, strict=True))}

    write(
        tmp_path / "reference_verdicts.jsonl.gz",
        reference("model/0", "7", True, True, True, None),
        reference("model/1", "8", True, False, "timeout", False),
        reference("model/2", "7", True, True, False, False),
        reference("verdict/0", "7", True, True, True, True),
    )
    write(tmp_path / "extraction.jsonl", {"text": r"\boxed{7}", "extracted": r"\boxed{7}", "source": "suite"})
    write(tmp_path / "normalize.jsonl", {"raw": "an answer", "expected": "answer", "source": "suite"})
    return tmp_path


def test_the_table(folder, capsys):
    verifier_table.main([str(folder)])
    out = capsys.readouterr().out
    assert "| model | 2 | 2 | 2 | 0 | 2 | 2 | 2 |" in out, "a panel of two minds expects nothing"
    assert "| suite | 4 | 2 | " in out and "| all | 6 | 4 | " in out
    assert "| suite | `43_5` | `\\boxed{43_6}` | True | False | True |" in out, "math-verify does not see the base"
    assert out.count("| suite |") == 2, "only core cases are told one by one, and only those that differ"
    assert "extraction: 1 of 1 agree" in out and "normalize: 0 of 1 agree" in out
    assert "* 'an answer' should be 'answer' (suite)" in out


def test_a_folder_is_needed():
    with pytest.raises(SystemExit, match="/nowhere/at/all is no folder"):
        verifier_table.main(["/nowhere/at/all"])
