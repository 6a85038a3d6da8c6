"""Rows in the layouts that are published, small and of our own making."""

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
CRITIC_PROMPT = (
    "The following is a math problem with its ground truth answer, along with an AI solution:\n\n[Math Problem]\n\n1+1?"
    "\n\n[Ground Truth]\n\n2\n\n[AI Solution]\n\n<paragraph_0>\nOne and one.\nTogether.\n</paragraph_0>\n\n"
    "<paragraph_1>\nso 2\n</paragraph_1>\n\nYour task is to review."
)


def verl(prompt, truth, **extra):
    """A row as verl's trainers read it."""
    return {
        "data_source": "math_dapo",
        "prompt": [{"content": prompt, "role": "user"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": truth, "style": "rule"},
        "extra_info": {"index": 0, "split": None} | extra,
    }


def critic(label=1, total=2, prompt=CRITIC_PROMPT):
    """A row of FAPO-Critic."""
    row = verl(prompt, label, total_steps=total)
    return {**row, "data_source": "fapo_critic", "ability": "math_critic"}


GSM8K = [
    {"question": "Tom has 3 apples and buys 4. How many?", "answer": "3+4 = <<3+4=7>>7 apples.\n#### 7"},
    {"question": "A car costs 1000 and 234 more. How much?", "answer": "1000+234 = 1234.\n#### 1,234"},
]
MATH = {
    "problem": "Half of $\\frac12$?",
    "level": "Level 5",
    "type": "Algebra",
    "solution": "It is $\\boxed{\\frac14}$.",
}
PROCESSBENCH = {
    "id": "gsm8k-0",
    "generator": "x",
    "problem": "1+1?",
    "steps": ["a", "b"],
    "final_answer_correct": False,
}
PRMBENCH = {
    "idx": "p1",
    "original_question": "1+1?",
    "modified_question": "1+1?",
    "original_process": ["a", "b", "c"],
    "modified_process": ["a", "x", "y"],
    "error_steps": [2, 3, 9],
}
PRM800K = {
    "question": {"problem": "1+1?", "ground_truth_answer": "2"},
    "label": {
        "finish_reason": "found_error",
        "steps": [
            {"completions": [{"text": "no", "rating": -1}, {"text": "yes", "rating": 1}], "chosen_completion": 1},
            {"completions": [], "human_completion": {"text": "by hand"}, "chosen_completion": None},
            {"completions": [{"text": "so 3", "rating": -1}, {"text": "hm", "rating": 0}], "chosen_completion": None},
        ],
    },
}
