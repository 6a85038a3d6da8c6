"""A config section is its constructor's keyword arguments: no key is inert, and a wrong one is named."""

import inspect

import pytest
from ml_collections import ConfigDict

from configs import base
from launch import sections
from tapojax.algorithms import ALGORITHMS
from tapojax.judges import JUDGES, PLACES, endpoint
from tapojax.tasks import TASKS

# stated elsewhere in the config
GIVEN = {"group_size", "max_tokens", "seed", "max_prompt_tokens", "temperature", "steps", "task"}


def a_constructor(*, group_size, clip=0.2, names=("a",), flag=False):
    return group_size, clip, names, flag


TABLE = {"first": a_constructor, "second": lambda *, max_tokens: max_tokens}


def build(section, **given):
    return sections.build(TABLE, section, "thing", **given)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_algorithm_defaults_are_the_constructors_own(name):
    parameters = inspect.signature(ALGORITHMS[name]).parameters
    section = sections.algorithm_defaults(name)
    assert section.name == name
    assert set(section) - {"name"} == parameters.keys() - GIVEN
    assert all(section[key] == parameters[key].default for key in section if key != "name")
    given = dict(
        group_size=4, max_tokens=8, temperature=1.0, steps=10, task=TASKS["arithmetic"](seed=0, max_prompt_tokens=8)
    )
    assert sections.build(ALGORITHMS, section, "algorithm", **given).group_size == 4


@pytest.mark.parametrize("name", TASKS)
def test_task_defaults_are_the_constructors_own(name):
    assert set(sections.task_defaults(name)) - {"name"} == inspect.signature(TASKS[name]).parameters.keys() - GIVEN


@pytest.mark.parametrize("name", PLACES)
def test_judge_defaults_are_the_constructors_own_and_the_place_of_the_verdicts(name):
    parameters = inspect.signature(JUDGES[name]).parameters
    section = sections.judge_defaults(name)
    own = {key for key, parameter in parameters.items() if parameter.default is not parameter.empty}
    assert section.name == name and set(section) - {"name"} == own | PLACES[name].keys()
    assert parameters.keys() - own <= {"trained"}, "launch.build gives it"
    if "endpoint" in section:
        assert endpoint.Options(**section.endpoint.to_dict()) == parameters["endpoint"].default
    assert sections.judge_defaults("").to_dict() == sections.answer_judge_defaults("").to_dict() == {"name": ""}
    assert sections.answer_judge_defaults("answer").model and "channel" not in sections.answer_judge_defaults("answer")


def test_a_section_inside_a_section_is_a_tuple_of_options():
    def constructor(*, endpoint: endpoint.Options = endpoint.DEFAULTS):
        return endpoint

    section = {"name": "x", "endpoint": {"retries": 7}}
    assert sections.build({"x": constructor}, section, "judge").retries == 7


def test_judges_of_one_section_are_none_of_the_other():
    with pytest.raises(ValueError, match="no judge is called 'answer'"):
        sections.judge_defaults("answer")
    with pytest.raises(ValueError, match=r"no answer_judge is called 'rubric'; there are \['answer'\]"):
        sections.answer_judge_defaults("rubric")


def test_build_passes_the_sections_keys_and_what_is_given():
    assert build({"name": "first", "clip": 0.3}, group_size=8, max_tokens=99) == (8, 0.3, ("a",), False)
    assert build(ConfigDict({"name": "second"}), group_size=8, max_tokens=99) == 99
    section = ConfigDict({"name": "first", "names": ("b", "c")})
    assert build(section, group_size=1)[2] == ("b", "c") and section.name == "first", "the section is not changed"


def test_an_unknown_key_is_named_with_the_nearest():
    with pytest.raises(ValueError, match=r"thing.clpi: first has no such option \(did you mean 'clip'\?\)"):
        build({"name": "first", "clpi": 0.3}, group_size=1)
    with pytest.raises(ValueError, match="thing.temperature: first has no such option$"):
        build({"name": "first", "temperature": 0.3}, group_size=1)


def test_a_key_that_is_stated_elsewhere_is_refused():
    with pytest.raises(ValueError, match="thing.group_size"):
        build({"name": "first", "group_size": 3}, group_size=1)


def test_a_key_of_another_algorithm_is_refused():
    section = sections.algorithm_defaults("gspo")
    section.kl_coef = 0.1
    with pytest.raises(ValueError, match="algorithm.kl_coef: gspo has no such option"):
        sections.build(ALGORITHMS, section, "algorithm", group_size=4, max_tokens=8)


def test_an_unknown_name_is_told_the_nearest():
    with pytest.raises(ValueError, match=r"no algorithm is called 'drgrpo' \(did you mean 'dr_grpo'\?\); there are"):
        sections.algorithm_defaults("drgrpo")
    with pytest.raises(ValueError, match=r"no task is called 'xyz'; there are"):
        sections.task_defaults("xyz")


def test_every_key_of_a_config_must_be_read():
    known = base.get_config()
    sections.check_keys(base.get_config(), known)
    config = base.get_config()
    config.train.minibatchs = 4
    with pytest.raises(ValueError, match=r"config key train.minibatchs is not read \(did you mean 'minibatches'\?\)"):
        sections.check_keys(config, known)
    config = base.get_config()
    config.optimiser = ConfigDict({"learning_rate": 1.0})
    with pytest.raises(ValueError, match=r"config key optimiser is not read \(did you mean 'optimizer'\?\)"):
        sections.check_keys(config, known)


def test_a_config_with_keys_of_another_algorithm_is_refused():
    config = base.get_config(algorithm="dapo")
    with pytest.raises(ValueError, match=r"config key algorithm\.\w+ is not read by gspo"):
        sections.check_keys(config, base.get_config(algorithm="gspo"))
