"""An invalid recipe is refused before its sources are read; the error names file, line, place and nearest name."""

import textwrap

import pytest

from adaptkit.errors import ConfigError, UsageError
from adaptkit.pipeline.reading import read_recipe

GOOD = """\
name: release
sources:
  base: {path: model}
  rows: {path: data/rows.jsonl}
steps:
  small: {quantize: base}
  adapter: {train: small, data: [rows], rank: 4}
  judged:
    evaluate: small
    adapter: adapter
    data: [rows]
    require: {loss: {max: 3}}
  merged: {merge: base, adapters: [adapter]}
  loads: {check: merged, target: [vllm]}
  release: {publish: merged, repo: org/name, tag: v1, needs: [judged, loads]}
"""


@pytest.fixture
def write(tmp_path):
    def write(text, old="", new=""):
        assert old in text
        path = tmp_path / "recipe.yaml"
        path.write_text(text.replace(old, new, 1))
        return path

    return write


def test_a_good_recipe_is_read_with_the_options_of_the_commands(write):
    from adaptkit.operations.quantize import QuantizeOptions
    from adaptkit.training.config import TrainConfig

    recipe = read_recipe(write(GOOD))
    assert (recipe.name, list(recipe.sources)) == ("release", ["base", "rows"])
    assert list(recipe.steps) == ["small", "adapter", "judged", "merged", "loads", "release"]
    assert recipe.steps["small"].options == QuantizeOptions()
    options = recipe.steps["adapter"].options
    assert isinstance(options, TrainConfig)
    assert (options.rank, options.alpha) == (4, 32.0)
    assert options.base == "."  # part of the steps' keys: if it changed, every release would train again
    assert recipe.steps["adapter"].inputs == {"train": ("small",), "data": ("rows",)}
    assert recipe.before(recipe.steps["release"]) == ["merged", "judged", "loads"]
    assert [step.name for step in recipe.until("adapter")] == ["small", "adapter"]


@pytest.mark.parametrize(
    ("old", "new", "message", "hint"),
    [
        ("rank: 4", "rnak: 4", "line 7: steps.adapter.rnak: unknown key", "did you mean 'rank'?"),
        ("rank: 4", "rank: '4'", "line 7: steps.adapter.rank: is '4'; expected a whole number", ""),
        ("rank: 4", "rank: 0", "line 7: steps.adapter.rank: must be at least 1 and at most 65,536, found 0",
         "rank: Rank of the adapter's matrices."),
        ("rank: 4", "targets: q_proj", "steps.adapter.targets: is 'q_proj'; expected a list", "write [q_proj]"),
        ("rank: 4", "wandb: x", "line 7: steps.adapter.wandb: cannot be set in a recipe", "this network service"),
        ("rank: 4", "base: x", "line 7: steps.adapter.base: cannot be set in a recipe", "value of train is the base"),
        ("rank: 4", "init: smal", "steps.adapter.init: no source or step named 'smal'", "did you mean 'small'?"),
        ("rank: 4", "mixture: {row: 1}", "steps.adapter.mixture: 'row' is not one of the data", "the data: rows"),
        ("{quantize: base}", "{quantise: base}", "line 6: steps.small.quantise: 'quantise' is not a kind of step",
         "did you mean 'quantize'?"),
        ("{quantize: base}", "{quantize: bsae}", "line 6: steps.small.quantize: no source or step named 'bsae'",
         "'base'?"),
        ("{quantize: base}", "{quantize: base, block_size: 60}", "line 6: steps.small", ""),
        ("{quantize: base}", "{quantize: base, calibration: {token: 3, files: [rows]}}",
         "steps.small.calibration.token: unknown key", "did you mean 'tokens'?"),
        ("{quantize: base}", "[]", "line 6: steps.small: expected what to do", "kinds of steps: adopt, check,"),
        ("data: [rows], rank", "data: rows, rank", "steps.adapter.data: expected a list of names", "write [rows]"),
        ("data: [rows], rank", "data: [rows, rows], rank", "steps.adapter.data: 'rows' is listed twice", ""),
        ("jsonl}\nsteps:\n  small: {quantize: base}\n  adapter: {train: small, data: [rows]",
         "jsonl}\n  more: {path: ./data/rows.jsonl}\nsteps:\n  small: {quantize: base}\n  adapter: {train: small, data"
         ": [rows, more]", "line 8: steps.adapter.data: 'rows' and 'more' are the same source", ""),
        ("data: [rows], rank", "data: [small], rank", "steps.adapter.data: 'small' is a folder; expected a file", ""),
        ("merge: base", "merge: small", "line 13: steps.merged.merge: 'small' is a quantized checkpoint; expected an "
         "unquantized checkpoint", "use the 16-bit checkpoint that it was made from"),
        ("rank: 4", "init: small", "steps.adapter.init: 'small' is a quantized checkpoint; expected an adapter", ""),
        ("rank: 4", "method: full", "line 7: steps.adapter.train: 'small' is a quantized checkpoint; expected an "
         "unquantized checkpoint", "use the 16-bit checkpoint that it was made from"),
        ("{check: merged, target: [vllm]}", "{train: merged, data: [rows], method: qlora}",
         "steps.loads.train: 'merged' is an unquantized checkpoint; expected a quantized checkpoint",
         "such as the output of a quantize step"),
        ("evaluate: small", "evaluate: adapter", "line 9: steps.judged.evaluate: 'adapter' is an adapter; expected a "
         "checkpoint", "add a merge step"),
        ("{check: merged, target: [vllm]}", "{quantize: adapter}",
         "line 14: steps.loads.quantize: 'adapter' is an adapter; expected an unquantized or released checkpoint",
         "merge step"),
        ("{check: merged, target: [vllm]}", "{dequantize: merged}",
         "steps.loads.dequantize: 'merged' is an unquantized checkpoint; expected a quantized checkpoint",
         "name a quantized one"),
        ("{check: merged, target: [vllm]}", "{resize: merged, rank: 2}", "expected an adapter", "add an extract step"),
        ("{check: merged, target: [vllm]}", "{stack: [adapter, merged]}", "'merged' is an unquantized checkpoint", ""),
        ("{check: merged, target: [vllm]}", "{extract: adapter, base: base, rank: 2}", "'adapter' is an adapter", ""),
        ("{check: merged, target: [vllm]}", "{check: merged, base: adapter}", "steps.loads.base: 'adapter' is", ""),
        ("{check: merged, target: [vllm]}", "{adopt: base, base: adapter}", "steps.loads.base: 'adapter' is", ""),
        ("{check: merged, target: [vllm]}", "{train: adapter, data: [rows]}", "steps.loads.train: 'adapter' is", ""),
        ("{check: merged, target: [vllm]}", "{extract: small, base: base, rank: 2}", "steps.loads.extract: 'sma", ""),
        ("{check: merged, target: [vllm]}", "{extract: merged, base: small, rank: 2}", "steps.loads.base: 'small'", ""),
        ("{check: merged, target: [vllm]}", "{evaluate: small, text: [rows], reference: adapter}",
         "steps.loads.reference: 'adapter' is an adapter; expected a checkpoint", ""),
        ("train: small, data: [rows],", "train: small,", "line 7: steps.adapter: data is missing", ""),
        ("adapters: [adapter]", "adapters: [judged]",
         "line 13: steps.merged.adapters: the step 'judged' makes no artifact", "needs: [judged]"),
        ("{check: merged, target: [vllm]}", "{adopt: merged}",
         "line 14: steps.loads.adopt: 'merged' is the output of a step, and so has a manifest", "use it as it is"),
        ("max: 3", "mx: 3", "line 12: steps.judged.require.loss.mx: unknown key", "did you mean 'max'?"),
        ("{max: 3}", "{}", "steps.judged.require.loss: has no limit", "set min, max or both"),
        ("{max: 3}", "{max: 3, min: 4}", "min 4 is larger than max 3", ""),
        ("loss: {max", "los: {max", "steps.judged.require: unknown figure 'los'", "did you mean 'loss'?"),
        ("loss: {max", "text.loss: {max", "require: text.loss is measured only with text", ""),
        ("loss: {max", "generated.scores.bleu: {min: 1, max", "measured only with generate", ""),
        ("    require", "    samples: 4\n    require", "line 12: steps.judged.samples: needs generate", "add generate"),
        ("    data: [rows]\n", "", "line 8: steps.judged: nothing to evaluate", "give data FILE, text FILE or"),
        ("target: [vllm]", "target: [vlm]", "line 14: steps.loads.target: must be one of gguf,", "Program to check"),
        ("repo: org/name", "repo: org", "line 15: steps.release: org: not the name of a repository", "org/name"),
        ("tag: v1", "signer: {}", "steps.release.signer: cannot be set in a recipe", "sign: true"),
        ("repo: org/name, ", "", "line 15: steps.release: repo is missing", ""),
        ("tag: v1", "tag: 1.0", "steps.release.tag: is 1.0; expected text", "write it in quotes"),
        ("needs: [judged,", "needs: [judge,", "steps.release.needs: no step named 'judge'", "'judged'?"),
        ("small: {q", "base: {q", "line 6: steps.base: 'base' is also the name of the source 'base'", ""),
        ("small: {q", "Base: {q", "line 6: steps.Base: 'Base' is also the name of the source 'base'", ""),
        ("small: {q", "../x: {q", "line 6: steps.../x: is not a valid name", "letters"),
        ("small: {q", "x.partial: {q", "is not a valid name", ""),
        ("rows: {path", "kaiming: {path", "line 4: sources.kaiming: the name has another meaning in train", ""),
        ("path: model", "path: /models/a", "line 3: sources.base.path: must be relative to the recipe's folder", "../"),
        ("path: model", "pth: model", "line 3: sources.base.pth: unknown key", "did you mean 'path'?"),
        ("path: model", "path: 3", "line 3: sources.base.path: is 3; expected text", "write it in quotes"),
        ("path: model", "repo:", "line 3: sources.base.repo: is None; expected text", "base: {repo: org/name"),
        ("path: model", "repo: a/b@v1", "sources.base.repo: a/b@v1: not the name of a", "the key revision"),
        ("path: model", "repo: a/b, path: c", "line 3: sources.base: expected either a path or a repo", ""),
        ("path: model", "path: model, revision: main", "sources.base.revision: only a repo has revisions", ""),
        ("  rows:", "  more: {path: x}\n  rows:", "line 4: sources.more: no step uses this source", ""),
        ("name: release\n", "", "name is missing", ""),
        ("name: release", "name: 3", "line 1: name: is not text", ""),
        ("name: release", "nam: release", "line 1: nam: unknown key", "did you mean 'name'?"),
    ],
)  # fmt: skip
def test_an_error_names_the_problem_and_its_place(write, old, new, message, hint):
    with pytest.raises(ConfigError) as caught:
        read_recipe(write(GOOD, old, new))
    assert message in caught.value.message
    assert hint in caught.value.hint
    assert caught.value.exit_code == 2


def test_a_merge_into_nf4_makes_a_quantized_checkpoint(write):
    text = GOOD.replace("{merge: base,", "{merge: base, format: nf4,")
    assert read_recipe(write(text, "{check: merged, target: [vllm]}", "{dequantize: merged}"))
    with pytest.raises(
        ConfigError, match="'merged' is a quantized checkpoint; expected an unquantized or released checkpoint"
    ):
        read_recipe(write(text, "{check: merged, target: [vllm]}", "{quantize: merged}"))


def test_two_steps_that_publish_to_the_same_tag_or_branch_are_refused(write):
    text = GOOD + "  again: {publish: merged, repo: Org/Name, tag: v1}\n"
    with pytest.raises(ConfigError, match=r"steps\.again\.tag: 'release' already publishes to the tag v1 of Org/Name"):
        read_recipe(write(text))
    with pytest.raises(
        ConfigError, match=r"steps\.again\.branch: 'release' already publishes to the branch main of Org/Name"
    ):
        read_recipe(write(text.replace("Org/Name, tag: v1", "Org/Name, tag: v2")))
    for other in ("Org/Name, tag: v2, branch: next", "Org/Name, pull_request: true", "Org/Other, tag: v1"):
        read_recipe(write(text.replace("Org/Name, tag: v1", other)))


def test_a_step_that_would_replace_a_source_is_refused(write):
    """The next run would quantize what this one published."""
    text = GOOD.replace("{path: model}", "{repo: Org/Name}")
    problem = r"steps\.release\.repo: publishing to the branch main of Org/Name replaces the source 'base'"
    with pytest.raises(ConfigError, match=problem) as caught:
        read_recipe(write(text))
    assert "a commit as its revision" in caught.value.hint
    named = text.replace("{repo: Org/Name}", "{repo: org/name, revision: main}")
    with pytest.raises(ConfigError, match="replaces the source 'base'"):
        read_recipe(write(named))
    for old, new in (
        ("{repo: Org/Name}", f"{{repo: Org/Name, revision: {'a' * 40}}}"),
        ("repo: org/name, tag: v1", "repo: org/name, branch: next"),
        ("repo: org/name, tag: v1", "repo: org/name, pull_request: true"),
    ):
        assert read_recipe(write(text, old, new))


@pytest.mark.parametrize(
    ("step", "problem"),
    [
        ("{merge: base, adapters: [adapter], weights: [1, 2]}", "2 weights for 1 adapter"),
        ("{stack: [adapter, more], weights: [1, 2, 3]}", "3 weights for 2 adapters"),
        ("{stack: [adapter]}", "stack needs at least two adapters"),
    ],
)
def test_numbers_of_adapters_and_weights_are_compared_before_anything_runs(write, step, problem):
    text = GOOD + f"  more: {{resize: adapter, rank: 2}}\n  last: {step}\n"
    with pytest.raises(ConfigError, match=problem) as caught:
        read_recipe(write(text))
    assert "--" not in caught.value.hint


@pytest.mark.parametrize(("step", "refused"), [("{publish: merged", "signer"), ("{quantize: base", "part")])
def test_keys_that_a_recipe_must_not_set_are_not_listed_as_known(write, step, refused):
    with pytest.raises(ConfigError, match="unknown key") as caught:
        read_recipe(write(GOOD, step, f"{step}, zzzzzz: 1"))
    assert "known: " in caught.value.hint
    assert refused not in caught.value.hint.split(": ")[1].split(", ")


def test_a_companion_adapter_is_named_after_its_base(write):
    text = GOOD.replace("{quantize: base}", "{quantize: base, calibration: {files: [rows], init_rank: 4}}")
    recipe = read_recipe(write(text, "[rows], rank: 4", "[rows], init: small-init"))
    assert recipe.steps["small"].makes == {"small": "quantized checkpoint", "small-init": "adapter"}
    assert recipe.steps["adapter"].inputs["init"] == ("small-init",)
    with pytest.raises(ConfigError, match="'small-init' is also the name of"):
        read_recipe(write(text, "  merged:", "  small-init:"))


def test_whole_numbers_are_accepted_where_floats_are_expected(write):
    """They become floats, since a manifest distinguishes 1 from 1.0."""
    options = read_recipe(write(GOOD, "rank: 4", "alpha: 8, alpha_pattern: {q: 1}")).steps["adapter"].options
    assert (repr(options.alpha), repr(options.alpha_pattern)) == ("8.0", "{'q': 1.0}")


def test_a_predefined_value_of_an_option_is_not_taken_for_a_name(write):
    recipe = read_recipe(write(GOOD, "rank: 4", "init: normal"))
    assert recipe.steps["adapter"].options.init == "normal"
    assert "init" not in recipe.steps["adapter"].inputs


def test_a_cycle_of_steps_is_named_in_the_error(write):
    path = write(GOOD, "{merge: base, adapters: [adapter]}", "{merge: base, adapters: [adapter], needs: [loads]}")
    with pytest.raises(ConfigError, match=r"line 13: steps.merged: waits for itself: merged -> loads -> merged"):
        read_recipe(path)


def test_steps_run_in_their_order_as_far_as_inputs_allow_and_publish_last(write):
    text = textwrap.dedent("""\
        name: x
        sources: {base: {path: m}}
        steps:
          out: {publish: plain, repo: a/b}
          landed: {check: base, needs: [out]}
          plain: {dequantize: small}
          checked: {check: small}
          small: {quantize: base}
          other: {check: base}
        """)
    recipe = read_recipe(write(text))
    assert list(recipe.steps) == ["small", "plain", "checked", "other", "out", "landed"]
    assert recipe.steps["out"].needs == ("checked", "other"), "every gate, but the one that waits for it"
    assert "checked" in [step.name for step in recipe.until("out")]


def test_an_unknown_step_to_stop_after_is_an_error(write):
    recipe = read_recipe(write(GOOD))
    with pytest.raises(UsageError, match="no step named 'adaptor'") as caught:
        recipe.until("adaptor")
    assert caught.value.hint == "did you mean 'adapter'?"
