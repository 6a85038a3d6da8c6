"""The task table: name in a config -> constructor."""

from tapojax.tasks.arithmetic import arithmetic
from tapojax.tasks.files import files

TASKS = {"arithmetic": arithmetic, "files": files}
