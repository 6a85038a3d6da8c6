"""The data sets by name: where each is published, what it holds, how many rows. A builder is an entry here."""

from typing import NamedTuple


class File(NamedTuple):
    """A published file."""

    home: str
    path: str
    sha256: str = ""  # where a copy of the published file could be checked; of the others it is unknown to us

    @property
    def url(self) -> str:
        return f"{self.home}/{self.path}"


class Split(NamedTuple):
    files: tuple[File, ...]
    rows: int | None  # as published; None: not published


class Dataset(NamedTuple):
    splits: dict[str, Split]
    about: str
    kind: str = "problems"  # or steps: solutions in steps, the first wrong one marked
    answers: tuple[tuple[str, str], ...] = ()  # (sha256 of a problem's text, answer) where the file leaves it empty


def hub(name: str, *paths: str, sha256: str = "") -> tuple[File, ...]:
    return tuple(File(f"https://huggingface.co/datasets/{name}/resolve/main", path, sha256) for path in paths)


def github(name: str, commit: str, *paths: str, sha256: str = "") -> tuple[File, ...]:
    return tuple(File(f"https://raw.githubusercontent.com/{name}/{commit}", path, sha256) for path in paths)


def _math(split: str) -> tuple[File, ...]:
    subjects = "algebra counting_and_probability geometry intermediate_algebra number_theory prealgebra precalculus"
    return hub("EleutherAI/hendrycks_math", *(f"{name}/{split}-00000-of-00001.parquet" for name in subjects.split()))


GSM8K = "openai/grade-school-math", "3101c7d5072418e28b9008a6636bde82a006892c"
QWEN = "QwenLM/Qwen2.5-Math", "a45202bd16f1ec06f433442dc1152d0074773465"
PRIME = "PRIME-RL/PRIME", "18ad596f08d487bb546d80d738d99ec697bd2e75"
PROCESSBENCH = {"gsm8k": 400, "math": 1000, "olympiadbench": 1000, "omnimath": 1000}
NO_COMMON_PRIMES = "6bf518e40168794fbba95ee91ea9d554d1df9d1e01976b708d82702736b488c7"  # two solutions of MATH end in an
SEQUENCE_OF_58 = "debc1683173552965f459a0842c34b946893bc89d68e686bc97eca8e04a94c2a"  # empty box; their words say 0

DATASETS = {
    "gsm8k": Dataset(
        {
            "train": Split(github(*GSM8K, "grade_school_math/data/train.jsonl"), 7473),
            "test": Split(github(*GSM8K, "grade_school_math/data/test.jsonl"), 1319),
        },
        "Cobbe et al., arXiv 2110.14168. MIT.",
    ),
    "math": Dataset(
        {"train": Split(_math("train"), 7500), "test": Split(_math("test"), 5000)},
        "Hendrycks et al., arXiv 2103.03874. MIT.",
        answers=((NO_COMMON_PRIMES, "0"), (SEQUENCE_OF_58, "0")),
    ),
    "math500": Dataset(
        {
            "test": Split(
                hub(
                    "HuggingFaceH4/MATH-500",
                    "test.jsonl",
                    sha256="35dc41080a3680858b27fa7e0533d2d547825316fc5dafe5d316f4ccc5a06132",
                ),
                500,
            )
        },
        "500 of MATH's test problems, those PRM800K tests on: Lightman et al., arXiv 2305.20050. MIT.",
    ),
    "dapo_math_17k": Dataset(
        {"train": Split(hub("BytedTsinghua-SIA/DAPO-Math-17k", "data/dapo-math-17k.parquet"), 1_791_700)},
        "Yu et al., arXiv 2503.14476: about 100 copies of each problem, deduplicate it. Apache-2.0.",
    ),
    "dapo_processed": Dataset(
        {"train": Split(hub("open-r1/DAPO-Math-17k-Processed", "all/train-00000-of-00001.parquet"), 17_398)},
        "DAPO-Math-17k without its copies and instructions. Apache-2.0.",
    ),
    "aime24": Dataset(
        {"test": Split(hub("Maxwell-Jia/AIME_2024", "aime_2024_problems.parquet"), 30)},
        "AIME I and II of 2024. Problems by the MAA.",
    ),
    "aime25": Dataset(
        {
            "test": Split(
                github(
                    "QwenLM/QwQ",
                    "620a5eadc89ff464d339367dd9c9973a93215c81",
                    "eval/data/aime25.jsonl",
                    sha256="9da60057135388687f3c594476b211538d0be8e7f3b2de6e680513281412c0ec",
                ),
                30,
            )
        },
        "AIME I and II of 2025. Problems by the MAA.",
    ),
    "amc23": Dataset(
        {"test": Split(github(*QWEN, "evaluation/data/amc23/test.jsonl"), 40)},
        "AMC 12 of 2023. Problems by the MAA.",
    ),
    "minerva": Dataset(
        {"test": Split(github(*QWEN, "evaluation/data/minerva_math/test.jsonl"), 272)},
        "Problems of MIT's OpenCourseWare: Lewkowycz et al., arXiv 2206.14858.",
    ),
    "olympiadbench": Dataset(
        {"test": Split(github(*QWEN, "evaluation/data/olympiadbench/test.jsonl"), 675)},
        "Its problems in English text with a final answer: He et al., arXiv 2402.14008. MIT.",
    ),
    "aime_1983_2023": Dataset(
        {
            "train": Split(
                github(
                    "agentica-project/rllm",
                    "874daa4acb7f451dc2a4b2b6e8ce28f5aa88d1f5",
                    "rllm/data/train/math/aime.json",
                ),
                975,
            )
        },
        "Problems by the MAA.",
    ),
    "aimo_aime90": Dataset(
        {"test": Split(github(*PRIME, "eval/data/AI-MO/aimo-validation-aime/aimo-validation-aime.jsonl"), 90)},
        "AIME of 2022 to 2024; holds aime24. Problems by the MAA.",
    ),
    "aimo_amc83": Dataset(
        {"test": Split(github(*PRIME, "eval/data/AI-MO/aimo-validation-amc/aimo-validation-amc.jsonl"), 83)},
        "AMC 12 of 2022 and 2023; holds amc23. Problems by the MAA.",
    ),
    "numina_verifiable": Dataset(
        {"train": Split(hub("nlile/NuminaMath-1.5-RL-Verifiable", "data/train-00000-of-00001.parquet"), 131_063)},
        "Of NuminaMath-1.5 the problems with an answer to verify; PAPO's source. Apache-2.0.",
    ),
    "processbench": Dataset(
        {name: Split(hub("Qwen/ProcessBench", f"{name}.json"), rows) for name, rows in PROCESSBENCH.items()},
        "Zheng et al., arXiv 2412.06559. Apache-2.0.",
        kind="steps",
    ),
    "fapo_critic": Dataset(
        {
            "train": Split(hub("dyyyyyyyy/FAPO-Critic", "train.parquet"), None),
            "test": Split(hub("dyyyyyyyy/FAPO-Critic", "test.parquet"), None),
        },
        "Ding et al., arXiv 2510.22543: about 85,000 rows and FlawedPositiveBench. Apache-2.0.",
        kind="steps",
    ),
    "fapo_critic_100": Dataset(
        {
            "train": Split(
                github(
                    "yyDing1/FAPO",
                    "e6d1164d1b005ffb19fc6879ecd215016ee32744",
                    "example_data/fapo-critic.jsonl",
                    sha256="5edd717ce75c0926c726a16ae1123b4d2f440674376a71a7c5012c4b81cf270e",
                ),
                100,
            )
        },
        "The first 100 rows of fapo_critic. Apache-2.0.",
        kind="steps",
    ),
    "prmbench": Dataset(
        {"test": Split((), 6216)},
        "Song et al., arXiv 2501.03124; hitsmy/PRMBench_Preview of the Hugging Face hub. Apache-2.0.",
        kind="steps",
    ),
    "prm800k": Dataset(
        {"train": Split((), None), "test": Split((), None)},
        "Lightman et al., arXiv 2305.20050; data/phase2_*.jsonl of openai/prm800k (Git LFS). MIT.",
        kind="steps",
    ),
    "rtpo_traces": Dataset(
        {"train": Split((), None)},
        "Problems with a worked solution to hint at, in gold_analysis, explanation or solution, or closing a prompt.",
    ),
}


def get(name: str) -> Dataset:
    """The entry of that name.

    Raises:
      ValueError: there is none.
    """
    if name not in DATASETS:
        raise ValueError(f"no data set {name!r}: choose one of {', '.join(DATASETS)}")
    return DATASETS[name]
