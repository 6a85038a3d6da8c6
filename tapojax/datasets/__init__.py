"""Files of problems as they are published: read, understood, prepared, and kept as TFDS folders."""
