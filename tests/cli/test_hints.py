"""What commands say where something is not as somebody may think, and what there is to do about it."""


def train(base, instructions, output, *more):
    return ["train", "--base", base, "--data", instructions, "-o", output, "--held-out", 0, "--device", "cpu",
            "--steps", 1, *more]  # fmt: skip


def test_a_base_among_the_adapters_is_told_where_it_belongs(run_cli, llama, adapter, second_adapter, tmp_path):
    done = run_cli("merge", adapter, second_adapter, llama, "-o", tmp_path / "out")
    assert (done.code, done.stdout) == (2, "")
    said = f"{adapter} is an adapter and {llama} a checkpoint: the base comes first"
    assert done.stderr == f"error: {said}\nhint: merge {llama} {adapter}\n"


def test_a_merge_that_keeps_little_says_so(run_cli, llama, adapter, tmp_path):
    """The larger part of a change a thousandth as large is below what bfloat16 can hold."""
    for name, weight, little in (("whole", 1, False), ("weak", 0.001, True)):
        done = run_cli("merge", llama, adapter, "-o", tmp_path / name, "--weight", weight)
        assert done.code == 0
        notes = [line for line in done.stdout.splitlines() if line.startswith("note")]
        assert [("half of the weights' last digit" in line) for line in notes] == [True] * little
    quantized = run_cli("merge", llama, adapter, "-o", tmp_path / "nf4", "--weight", 0.001, "--format", "nf4")
    assert "last digit" not in quantized.stdout
