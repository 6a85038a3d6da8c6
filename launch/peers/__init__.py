"""One file per library that `launch.benchmark` measures, ours beside the others; each runs in its library's own Python."""
