"""What a recipe's keys take: every type, range and choice of config.py, from files, the command line and arms."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from m3po_jax import yaml_text
from m3po_jax.cli import main
from m3po_jax.config import Recipe, SelectConfig, TrainConfig
from m3po_jax.errors import UserError, nearest
from m3po_jax.fields import FileName, Kind, LocalPath, OneOf, Range, Words, fields_of
from m3po_jax.pipeline.checks import check_recipe
from m3po_jax.pipeline.mock import shrink
from m3po_jax.pipeline.summary import main_name
from m3po_jax.reading import check_values
from m3po_jax.recipes import essential, from_plain, load_recipe, override, shipped, to_yaml


def places(cls: type = Recipe, key: str = "", listed: str = "") -> Iterator[tuple[str, str, Kind]]:
    """(what messages call it, an override with {} for the value, its kind) of every field.

    Those of sections in mappings and lists are included; `listed` is the key of such a list.
    """
    for name, kind in fields_of(cls).items():
        own = f"{key}.{name}" if key else name
        item = kind.item.base if kind.item is not None and kind.item.section else None
        if kind.section:
            yield from places(kind.base, own)
            continue
        yield own, f"{listed}=[{{{name}: {{}}}}]" if listed else f"{own}={{}}", kind
        if item is not None:
            yield from places(
                item, f"{own}[0]" if kind.base is list else f"{own}.x", own if kind.base is list else ""
            )


PLACES = list(places())
CONTAINER = {list: ["3", "abc", "{a: 1}", "null"], dict: ["3", "abc", "[1]", "null"]}
WRONG = {
    int: [
        "1.5",
        "true",
        "abc",
        '"1"',
        "[1]",
        "{a: 1}",
        "010",
        "1:30",
        "1e3",
        "0x10",
        "1e30",
        "9" * 400,
        "2020-01-01",
    ],
    float: ["true", "abc", "nan", ".nan", "inf", "-.inf", '"1.0"', "[1]", "{a: 1}", "010", "1:30", "0x10", "9" * 400],
    bool: ["1", "0", "abc", "null", '"true"', "[true]"],
    str: ["true", "no", "null", "~", "[a]", "{a: 1}", "'${x}'", "'${oc.env:HOME}'", '"a\\0b"', '"\\ud800"'],
}


def ranges(kind: Kind) -> list[Range]:
    return [rule for rule in kind.rules if isinstance(rule, Range)]


def wrong_values(kind: Kind) -> list[str]:
    found = list(CONTAINER.get(kind.base, WRONG.get(kind.base, [])))
    if kind.optional:
        found = [text for text in found if text not in ("null", "~")]
    for rule in ranges(kind):
        step = 1 if kind.base is int else 1e-3
        for end, way in ((rule.least, -1), (rule.most, 1)):
            if end is not None:
                found.append(repr(end + way * max(step, abs(end) * 1e-3 if kind.base is float else 1)))
        found += [repr(end) for end in (rule.above, rule.below, rule.but) if end is not None]
    if any(isinstance(rule, OneOf) for rule in kind.rules):
        found.append("nonsense")
    if any(isinstance(rule, LocalPath) and not rule.after for rule in kind.rules):
        found += ["gs://bucket/folder", "s3://b", "hdfs://x/y", "https://x.org/a.yaml", "gs:/bucket"]
    if any(isinstance(rule, FileName) for rule in kind.rules):
        found += ["../x", "a/b", "/x", ".", "..", '""', "a\\b", "x" * 101, '"a\\nb"', '" a"']
    if kind.base is list and kind.item is not None and not kind.item.section:
        found += [f"[{text}]" for text in wrong_values(kind.item) if text not in ("{a: 1}",)]
    return found


def boundary_values(kind: Kind) -> list[str]:
    found = []
    for rule in ranges(kind):
        found += [repr(end) for end in (rule.least, rule.most) if end is not None]
        if kind.base is float:
            found += [repr(math.nextafter(end, math.inf)) for end in (rule.above,) if end is not None]
            found += [repr(math.nextafter(end, -math.inf)) for end in (rule.below,) if end is not None]
    for rule in kind.rules:
        if isinstance(rule, (OneOf, Words)):
            names = rule.choices() if isinstance(rule, OneOf) else rule.named
            found += [name or '""' for name in names]
    if kind.optional:
        found += ["null", "~"]
    if kind.base is bool:
        found += ["true", "false"]
    return found


def test_every_number_has_a_finite_range():
    for key, _, kind in PLACES:
        for one in (kind, kind.item):
            if one is not None and one.base in (int, float):
                (rule,) = ranges(one)
                ends = [
                    rule.least if rule.above is None else rule.above,
                    rule.most if rule.below is None else rule.below,
                ]
                assert all(end is not None and math.isfinite(end) for end in ends), key
    assert len(PLACES) > 200


@pytest.mark.parametrize(("key", "line", "kind"), PLACES, ids=[key for key, *_ in PLACES])
def test_what_a_key_does_not_take_is_refused_by_name(key, line, kind):
    for text in wrong_values(kind):
        with pytest.raises(UserError) as caught:
            load_recipe(None, [line.replace("{}", text)])
        told = str(caught.value)
        assert key in told and "\n" not in told and len(told) < 1200, (text, told)


@pytest.mark.parametrize(("key", "line", "kind"), PLACES, ids=[key for key, *_ in PLACES])
def test_what_a_key_takes_up_to_its_ends(key, line, kind):
    for text in boundary_values(kind):
        recipe = load_recipe(None, [line.replace("{}", text)])
        check_values(recipe, "")
        try:
            check_recipe(recipe)
        except UserError as error:  # what two keys say together; never the range of one
            assert "must be in" not in str(error) and "unknown value" not in str(error), str(error)


def test_defaults_are_taken():
    check_values(Recipe(), "")


@pytest.mark.parametrize("name", list(shipped()))
def test_recipes_that_ship_are_found_checked_and_saved(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(name)
    assert load_recipe(f"configs/{name}.yaml") == recipe
    check_recipe(recipe)
    check_recipe(shrink(recipe))
    saved = tmp_path / "config.yaml"
    saved.write_text(to_yaml(recipe), encoding="utf-8")
    assert load_recipe(saved) == recipe
    # Other programs that read it as YAML see the same values.
    assert from_plain(Recipe, yaml.safe_load(saved.read_text(encoding="utf-8")), "x") == recipe


def test_the_command_lists_the_recipes_that_ship(capsys):
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in shipped()) and "The whole M3PO loop on embedded data" in listed
    assert main(["validate", "--config", "help"]) == 0
    assert capsys.readouterr().out == listed


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[(word, word) for word in ("off", "auto")],
        ("'off'", "off"),
        ("'no'", "no"),
        ("2020-01-01", "2020-01-01"),
        ("010", "010"),
        ("1:30", "1:30"),
        ("1e3", "1e3"),
        ("1_000", "1_000"),
        (".inf", ".inf"),
    ],
)
@pytest.mark.parametrize("way", ["file", "command line", "arm", "arm's section"])
def test_words_of_yaml_in_text(way, text, value, tmp_path):
    """A folder called ``False`` is what `cache.vision_features: off` made before."""
    file = tmp_path / "r.yaml"
    if way == "command line":
        recipe = load_recipe(None, [f"cache.vision_features={text}"])
    elif way == "file":
        file.write_text(f"cache:\n  vision_features: {text}\n")
        recipe = load_recipe(file)
    else:
        inner = f"cache.vision_features: {text}" if way == "arm" else f"cache: {{vision_features: {text}}}"
        file.write_text(f"arms: {{x: {{{inner}}}}}")
        recipe = load_recipe(file)
        assert recipe.arms == {"x": {"cache.vision_features": value}}
        recipe = override(recipe, recipe.arms["x"])
    assert recipe.cache.vision_features == value
    file.write_text(to_yaml(recipe))
    assert load_recipe(file) == recipe and yaml.safe_load(file.read_text())["cache"]["vision_features"] == value


@pytest.mark.parametrize("text", ["no", "No", "FALSE", "false", "true", "yes", "on", "ON", "null", "~", ""])
def test_words_that_are_no_text_are_refused_in_a_file(text, tmp_path):
    (tmp_path / "r.yaml").write_text(f"cache:\n  reference: {text}\n")
    with pytest.raises(UserError, match=r"cache\.reference"):
        load_recipe(tmp_path / "r.yaml")


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 1e-3), ("2E-6", 2e-6), ("1", 1.0), (".5", 0.5), ("5.", 5.0), ("1_000", 1000.0), ("+1", 1.0)],
)
def test_numbers(text, value):
    assert load_recipe(None, [f"train.beta={text}"]).train.beta == value


def test_a_mapping_or_a_list_given_whole_replaces_and_a_section_merges(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text(
        "train: {beta: 0.5, loss_type: mixture, loss_weights: {sigmoid: 1, sft: 1}, report_to: [wandb]}\n"
        "arms: {a: {train.beta: 0.3, train.loss_weights: {sft: 2}}, b: {}}\n"
    )
    recipe = load_recipe(file)
    assert load_recipe(file, ["arms={}"]).arms == {}
    assert load_recipe(file, ["arms={c: {}}"]).arms == {"c": {}}
    assert load_recipe(file, ["arms.a={}"]).arms == {"a": {}, "b": {}}
    assert load_recipe(file, ["arms.a.train.epochs=2"]).arms["a"] == recipe.arms["a"] | {"train.epochs": 2.0}
    assert load_recipe(file, ["train.loss_weights={sft: 3}"]).train.loss_weights == {"sft": 3.0}
    assert load_recipe(file, ["train.loss_weights.sft=3"]).train.loss_weights == {"sigmoid": 1.0, "sft": 3.0}
    assert load_recipe(file, ["train.report_to=[]"]).train.report_to == []
    changed = load_recipe(file, ["train={epochs: 2}"]).train
    assert (changed.beta, changed.epochs) == (0.5, 2.0)
    assert override(recipe, recipe.arms["a"]).train.loss_weights == {"sft": 2.0}
    benchmarks = load_recipe(file, ["evaluate.benchmarks.p.metric=chair", "evaluate.benchmarks.p.kind=caption"])
    assert benchmarks.evaluate.benchmarks["p"].metric == "chair"
    assert load_recipe(file, ["compare.per_seed.model.path=base-{seed}"]).compare.per_seed == {
        "model.path": "base-{seed}"
    }


HOSTILE = {
    "alias bomb": "a: &a [x, x]\n"
    + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
    "deep": "arms: " + "[" * 2000 + "]" * 2000,
    "rather deep": "score: {endpoint: {extra_body: {a: " + "[" * 60 + "]" * 60 + "}}}",
    "repeated key": "seed: 1\nseed: 2\n",
    "repeated inner key": "train: {beta: 1, beta: 2}",
    "environment": "name: ${oc.env:HOME}",
    "decode": 'name: ${oc.create:${oc.decode:"[1]"}}',
    "loop": "name: ${name}",
    "missing": "name: ${nope}",
    "in a list": "score: {members: ['${nope}']}",
    "in a free mapping": "score: {endpoint: {extra_body: {a: {b: ['${oc.env:HOME}']}}}}",
    "as a key": "arms: {'${oc.env:HOME}': {}}",
    "in an arm": "arms: {x: {train.loss_type: '${oc.env:HOME}'}}",
    "list": "- 1",
    "text": "hello",
    "two documents": "name: a\n---\nname: b\n",
    "NUL": 'name: "a\\0b"',
    "raw NUL": "name: a\0b",
    "object": "name: !!python/object/apply:os.system ['touch PWNED']",
    "own tag": "train: !x {beta: 1}",
    "binary": "name: !!binary aGVsbG8=",
    "recursive list": "name: &x [*x]",
    "recursive mapping": "arms: &x {a: *x}",
    "tabs": "name:\n\t- x",
    "unclosed": "train: [1,",
    "key that is a list": "? [a, b]\n: 1",
    "surrogate": 'name: "\\ud800"',
}


@pytest.mark.parametrize("text", list(HOSTILE.values()), ids=list(HOSTILE))
def test_hostile_files_are_one_line(text, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(text, encoding="utf-8")
    assert main(["validate", "--config", "r.yaml"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("m3po: r.yaml: ") and len(lines[0]) < 1200
    assert not Path("PWNED").exists()


def test_anchors_and_merges_are_read():
    found = yaml_text.read("a: &a {x: 1, y: off}\nb: {<<: *a, y: 2}\n")
    assert found == {"a": {"x": "1", "y": "off"}, "b": {"x": "1", "y": "2"}}


def test_bytes_that_are_no_recipe(tmp_path, capsys):
    for content in (b"\xff\xfe\x00bad", bytes(range(256))):
        (tmp_path / "r.yaml").write_bytes(content)
        assert main(["validate", "--config", str(tmp_path / "r.yaml")]) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("evaluate.benchmarks={pope: {}, POPE: {}}", "differ in case alone"),
        ("arms={a: {}, A: {}}", "differ in case alone"),
        ("score.endpoint.extra_body={a: yes}", "differently by different versions"),
        ("score.members=[similarity=gs://b/x]", "URL"),
        ("arms={x: {train.betta: 1}}", "unknown key 'arms.x.train.betta' (did you mean 'beta'?)"),
        ("arms={x: {train: {beta: nan}}}", "arms.x.train.beta"),
        ("arms={x: {evaluate.benchmarks.p.metric: pop}}", "did you mean 'pope'?"),
        (
            "train.loss_weights.sgmoid=1",
            "train.loss_weights.sgmoid: unknown value 'sgmoid' (did you mean 'sigmoid'?)",
        ),
    ],
)
def test_other_values_that_are_refused(line, told):
    with pytest.raises(UserError) as caught:
        load_recipe(None, [line])
    assert told in str(caught.value)


@pytest.mark.parametrize("metric", ["pope", "chair", "short_answer", "mme", "mmbench", "amber_yes_no", "vqa"])
def test_a_rule_that_a_metric_lacks(metric):
    benchmark = f"evaluate.benchmarks.b={{metric: {metric}, rule: nonsense}}"
    with pytest.raises(UserError, match=r"evaluate\.benchmarks\.b\.rule: unknown rule 'nonsense'"):
        check_recipe(load_recipe(None, [benchmark]))


@pytest.mark.parametrize("rule", ["official", "llava"])
def test_rules_of_vqa(rule):
    check_recipe(load_recipe(None, [f"evaluate.benchmarks.b={{metric: vqa, rule: {rule}}}"]))


def test_operational_keys_are_not_essential():
    plain: dict[str, Any] = {
        "seed": 1,
        "score": {"unit": "claim", "endpoint": {"concurrency": 3, "model": "m"}},
        "x": 2,
    }
    assert essential(plain) == {"seed": 1, "score": {"unit": "claim", "endpoint": {"model": "m"}}, "x": 2}


def test_sections_of_files_of_trained_models():
    assert from_plain(TrainConfig, {"beta": 0.3}, "reward.json").beta == 0.3
    with pytest.raises(UserError, match=r"reward\.json: beta: must be in \(0, 1e\+09\], not -1"):
        from_plain(TrainConfig, {"beta": -1}, "reward.json")
    with pytest.raises(UserError, match=r"select\.margin"):
        check_values(SelectConfig(margin=-1.0), "select")


@pytest.mark.parametrize(
    ("objective", "answers", "name"),
    [
        ("preference", "chosen", "m3po"),
        ("sft", "chosen", "sft_chosen"),
        ("sft", "reference", "sft"),
        ("rlhf", "chosen", "rlhf"),
    ],
)
def test_name_of_the_recipes_own_system(objective, answers, name):
    recipe = load_recipe(None, [f"train.objective={objective}", f"train.sft_answers={answers}"])
    assert main_name(recipe.train, recipe.select) == name


def test_only_near_names_are_suggested():
    known = ["quickstart-base", "quickstart-scorer", "sigmoid", "hinge", "llava", "clip"]
    assert nearest("sigmod", known) == " (did you mean 'sigmoid'?)"
    assert nearest("Sigmoid", known) == " (did you mean 'sigmoid'?)"
    for far in ("qwen2_vl", "grid", "x", "hint", "lava2_next_video"):
        assert "did you mean" not in nearest(far, known) and "known: clip" in nearest(far, known)
