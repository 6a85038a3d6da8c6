"""One file per library that `launch.benchmark` measures, ours included; each runs in its library's own Python."""
