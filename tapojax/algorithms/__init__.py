"""The algorithm table: name in a config -> constructor. To add one, write a file and a line here."""

from tapojax.algorithms import cispo, dapo, dr_grpo, grpo, gspo, rloo

ALGORITHMS = {
    "grpo": grpo.grpo,
    "dr_grpo": dr_grpo.dr_grpo,
    "dapo": dapo.dapo,
    "gspo": gspo.gspo,
    "cispo": cispo.cispo,
    "rloo": rloo.rloo,
}
