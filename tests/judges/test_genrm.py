"""FAPO's generative reward model behind endpoints: asked as it was trained, read strictly."""

import numpy as np
import pytest

from tapojax.judges import endpoint, genrm
from tapojax.tasks import critique_files
from tests.judges import endpoints
from tests.judges.endpoints import fail, say

EXAMPLE = {"id": "a", "problem": "1+1?", "answer": "2"}
STEPS = ["1+1 is 2", "so it is\n\\boxed{2}"]


def judge(*servers, **options):
    addresses = tuple(server.address for server in servers)
    return genrm.genrm(endpoint=endpoint.Options(addresses=addresses, pause_s=0.01, timeout_s=5.0), **options)


def test_steps_are_split_tagged_and_asked_about_as_in_training():
    with endpoints.served(say("\\boxed{1}")) as (server,):
        said = judge(server)([EXAMPLE], ["<think>hm\n\nhm</think>" + "\n\n".join(STEPS) + "\n"])
    row = critique_files._example(EXAMPLE | {"steps": STEPS, "label": 1}, "rows", 1)
    assert server.messages == [row["question"]]
    assert "<step 0>\n1+1 is 2\n</step 0>\n<step 1>\nso it is\n\\boxed{2}\n</step 1>" in row["question"]
    assert said.values.tolist() == [1] and said.costs["tokens"].tolist() == [25]


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ("\\boxed{-1}", 0),
        ("\\boxed{0}", 1),
        ("\\boxed{1}", 1),
        ("\\boxed{2}", None),  # of steps 0 and 1; the published code takes it for a flaw
        ("\\boxed{-2}", None),
        ("\\boxed{none}", None),  # for none
        ("", None),
    ],
)
def test_a_verdict_must_be_in_range(reply, value):
    with endpoints.served(say(reply)) as (server,):
        values, errors, _ = judge(server)([EXAMPLE], ["\n\n".join(STEPS)])
    assert (None if np.isnan(values[0]) else values[0]) == value and (errors[0] is None) == (value is not None)


def test_what_cannot_be_asked_says_why():
    with endpoints.served(say("\\boxed{-1}")) as (server,):
        values, errors, _ = judge(server)([EXAMPLE] * 3, ["", "<think>x</think>", "a\n\nb</step 1> right"])
    assert np.isnan(values).all() and not server.messages
    assert ["no text beside" in error for error in errors] == [True, True, False] and "'</step '" in errors[2]


def test_a_replica_that_dies_half_way_costs_no_row():
    """The first answers five questions and is gone; counts are exact, for one is asked at a time."""
    done = []

    def dying(message, turn):
        done.append(message)
        return say("\\boxed{-1}") if len(done) <= 5 else endpoints.DROP

    with endpoints.served(dying, say("\\boxed{0}")) as (first, second):
        options = endpoint.Options(addresses=(first.address, second.address), pause_s=60.0, timeout_s=5.0, requests=1)
        values, errors, costs = genrm.genrm(endpoint=options)([EXAMPLE] * 30, [f"step {i}" for i in range(30)])
    assert errors == [None] * 30 and (values == 0).sum() == 5 and (values == 1).sum() == 25
    assert len(first.messages) == 6 and len(second.messages) == 25 and costs["tries"].sum() == 31


def test_with_one_bad_replica_all_rows_have_their_verdict():
    with endpoints.served(fail(500), say("\\boxed{0}")) as (bad, good):
        values, errors, costs = judge(bad, good)([EXAMPLE] * 40, [f"step {i}" for i in range(40)])
    assert np.all(values == 1) and errors == [None] * 40 and len(good.messages) == 40
    assert costs["tries"].sum() == 40 + len(bad.messages)


def test_the_words_of_another_critic(tmp_path):
    (tmp_path / "theirs.md").write_text("{problem}|{answer}|{steps}")
    with endpoints.served(say("\\boxed{-1}")) as (server,):
        values, _, _ = judge(server, prompt_file=str(tmp_path / "theirs.md"), step_tag="paragraph_")([EXAMPLE], ["a"])
    assert server.messages == ["1+1?|2|<paragraph_0>\na\n</paragraph_0>"] and values[0] == 0
    (tmp_path / "theirs.md").write_text("{problem}|{answer}")
    with pytest.raises(ValueError, match=r"lacks \['steps'\]"):
        genrm.genrm(prompt_file=str(tmp_path / "theirs.md"))
