"""The task table: name in a config -> constructor."""

from tapojax.tasks import arithmetic, critique_files, critiques, files

TASKS = {
    "arithmetic": arithmetic.arithmetic,
    "critiques": critiques.critiques,
    "critique_files": critique_files.critique_files,
    "files": files.files,
}
