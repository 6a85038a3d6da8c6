"""How each paper evaluates: which sets, how many samples, how they are drawn, what number is reported.

A protocol is data. What a paper and its released code leave open is None here, and the config decides; `silent` says
what that is, and which of the given numbers are our choice.
"""

import os
import re
from pathlib import Path
from typing import NamedTuple


class Set(NamedTuple):
    """One set of a protocol: problems as published (None: not said), samples of each; FILES has more of its names."""

    name: str
    problems: int | None
    samples: int


class Protocol(NamedTuple):
    """A paper's evaluation; None leaves a number to the config."""

    sets: tuple[Set, ...]
    temperature: float
    top_p: float
    max_prompt_tokens: int | None
    max_tokens: int | None  # of a completion
    headline: str
    source: str
    silent: str


FILES = {  # what files of a set are called beside its name: by those who publish it, by tapojax.datasets
    "aime24": ("aime_2024", "aime_2024_problems"),
    "aime25": ("aime_2025", "aime_2025_problems"),
    "amc": ("aimo_amc83", "amc_aimo83", "aimo_validation_amc"),
    "math500": ("math_500",),
    "olympiadbench": ("olympiad_bench", "olympiad"),
    "minerva": ("minerva_math",),
    "gpqa_diamond": ("gpqa",),
}
VERSION = r"\d+\.\d+\.\d+"
SPLITS = ("train", "test", "val", "validation")

PROTOCOLS = {
    "hapo": Protocol(
        sets=(
            Set("aime24", 30, 8),
            Set("aime25", 30, 8),
            Set("amc", 83, 8),
            Set("math500", 500, 8),
            Set("olympiadbench", 675, 8),
            Set("minerva", 272, 8),
        ),
        temperature=0.5,
        top_p=0.7,
        max_prompt_tokens=1024,
        max_tokens=10_240,
        headline="unweighted mean of avg@8 over the six sets",
        source="HAPO, arXiv 2509.16591; lengths are those of the released evaluation script",
        silent="nothing",
    ),
    "fapo": Protocol(
        sets=(Set("aime24", 30, 32), Set("aime25", 30, 32), Set("gpqa_diamond", 198, 4)),
        temperature=1.0,
        top_p=0.7,
        max_prompt_tokens=2048,
        max_tokens=None,
        headline="avg@32 of AIME24 and of AIME25, avg@4 of GPQA-Diamond",
        source="FAPO, Ding et al., arXiv 2510.22543; the released test file and training scripts",
        silent="max_tokens goes with the model, 8192 (7b) or 20480 (32b); no mean over sets is published",
    ),
    "papo": Protocol(
        sets=(
            Set("olympiadbench", None, 4),
            Set("aime24", 30, 4),
            Set("aime25", 30, 4),
            Set("math500", 500, 4),
            Set("gpqa_diamond", 198, 4),
        ),
        temperature=0.7,
        top_p=1.0,
        max_prompt_tokens=2048,
        max_tokens=8192,
        headline="avg@4 of OlympiadBench",
        source="PAPO, Tan et al., arXiv 2603.26535; the lengths of training",
        silent="top_p is our choice; HumanEval, published too, is left out; no mean over sets is published",
    ),
    "tapo": Protocol(
        sets=(Set("aime24", 30, 8),),
        temperature=0.6,
        top_p=0.95,
        max_prompt_tokens=None,
        max_tokens=None,
        headline="pass@1 of AIME24, estimated from 8 samples",
        source="TAPO, Jiang et al., AAAI 2026: the metric and its values alone",
        silent="samples, temperature and top_p are our choice, lengths those of the config",
    ),
}


def set_named(protocol: Protocol, file_name: str) -> Set | None:
    """The set that a file is of by its name: aime24.jsonl, AIME24_test.jsonl.gz, math-500.parquet; None: not one."""
    name = stem(file_name).lower().replace("-", "_")
    return next((s for s in protocol.sets if name in (s.name, *FILES.get(s.name, ()))), None)


def title(path: str) -> str:
    """What a set is called: its file, the folder of a file called test, the folder above a version that TFDS wrote."""
    file = Path(os.path.abspath(path))
    folder = file.parent
    if re.fullmatch(VERSION, file.name):
        return folder.name
    if re.fullmatch(VERSION, folder.name) and not file.suffix:
        return folder.parent.name
    return folder.name if folder.name and stem(file.name) in SPLITS else stem(file.name)


def stem(file_name: str) -> str:
    """A file's name without suffixes and without a closing _test, -test, _val."""
    name = file_name.split(".")[0]
    return next((name[: -len(end)] for end in ("_test", "-test", "_val", "-val") if name.endswith(end)), name)
