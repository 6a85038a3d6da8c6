"""The algorithm table: name in a config -> constructor. To add one, write a file and a line here."""

from tapojax.algorithms.cispo import cispo
from tapojax.algorithms.dapo import dapo
from tapojax.algorithms.dr_grpo import dr_grpo
from tapojax.algorithms.grpo import grpo
from tapojax.algorithms.gspo import gspo
from tapojax.algorithms.rloo import rloo

ALGORITHMS = {"grpo": grpo, "dr_grpo": dr_grpo, "dapo": dapo, "gspo": gspo, "cispo": cispo, "rloo": rloo}
