"""The task table: name in a config -> constructor."""

from tapojax.tasks import arithmetic, critiques, files

TASKS = {"arithmetic": arithmetic.arithmetic, "critiques": critiques.critiques, "files": files.files}
