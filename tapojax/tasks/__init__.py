"""The task table: name in a config -> constructor."""

from tapojax.tasks import arithmetic, files

TASKS = {"arithmetic": arithmetic.arithmetic, "files": files.files}
