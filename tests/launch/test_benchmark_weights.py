"""`python -m launch.benchmark_weights`: that a table comes out and bytes are counted, never how fast."""

from launch import benchmark_weights


def test_a_small_run_prints_a_row_for_the_whole_and_for_deltas(capsys):
    shape = ["--preset=gym-small", "--num_layers=1", "--vocab_size=51"]
    benchmark_weights.main([*shape, "--learning_rates", "1e-6", "--steps=2", "--repetitions=1"])
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows] == ["transfer", "whole", "1e-06, step 1", "1e-06, step 2"]
    assert {len(row) for row in rows} == {10}
    assert rows[1][1:4] == ["-", "0.4", "100.0%"]
    for row in rows[2:]:
        changed, whole = float(row[1].rstrip("%")), float(row[3].rstrip("%"))
        assert 0.1 < changed < 5 and changed < whole < 3 * changed, "a change takes two or three times an element"
