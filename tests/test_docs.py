"""The documents agree with the code: examples run, keys and files exist, pages made from code are current."""

import dataclasses
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import typing
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image as PILImage

from m3po_jax import config
from m3po_jax.cli import VERBS, make_parser
from m3po_jax.config import DataConfig, Recipe
from m3po_jax.data import schema
from m3po_jax.data.sources import read_prompts
from m3po_jax.objectives import LOSSES
from m3po_jax.pipeline.arms import SYSTEMS
from m3po_jax.pipeline.backends import BACKENDS
from m3po_jax.pipeline.checks import check_recipe
from m3po_jax.pipeline.evaluate import read_benchmark
from m3po_jax.recipes import load_recipe
from m3po_jax.scoring.confidence import VARIANTS
from m3po_jax.scoring.grading import check_rubric
from m3po_jax.selection import RULES, Reason

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
SHARED = Path(os.environ.get("M3PO_SHARED", ROOT / "../shared")) / "data"


def blocks(page: str, language: str) -> list[str]:
    """The fenced examples of a page."""
    return re.findall(rf"^```{language}\n(.*?)^```$", (DOCS / page).read_text(encoding="utf-8"), re.M | re.S)


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def keys(cls: type, prefix: str = "") -> set[str]:
    """Every dotted key of a recipe, sections included."""
    found = set()
    for name, hint in typing.get_type_hints(cls).items():
        found.add(prefix + name)
        if dataclasses.is_dataclass(hint):
            found |= keys(hint, f"{prefix}{name}.")
    return found


KEYS = keys(Recipe)


def test_recipes_page_is_current():
    made = script("make_recipes").render()
    assert (DOCS / "recipes.md").read_text(encoding="utf-8") == made, "run python docs/make_recipes.py"


def test_models_page_is_current():
    assert (DOCS / "models.md").read_text(encoding="utf-8") == script("make_models").page(), "run docs/make_models.py"


def test_recipes_page_tells_every_key():
    text = (DOCS / "recipes.md").read_text(encoding="utf-8")
    leaves = {key for key in KEYS if not any(other.startswith(f"{key}.") for other in KEYS)}
    assert all(f"| `{key}` |" in text for key in leaves)
    benchmark = typing.get_type_hints(config.BenchmarkConfig)
    assert all(f"| `evaluate.benchmarks.NAME.{key}` |" in text for key in benchmark)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_keys_named_in_the_text_exist(page):
    text = page.read_text(encoding="utf-8")
    sections = {key.split(".")[0] for key in KEYS if "." in key}
    for key in re.findall(r"`((?:[a-z_]+\.)+[a-z_]+)(?:[= ][^`]*)?`", text):
        if key.split(".")[0] in sections and not key.endswith((".py", ".json", ".jsonl", ".md")):
            assert key in KEYS, f"{page.name} names {key}"


@pytest.mark.parametrize(
    "page",
    [*sorted(DOCS.rglob("*.md")), *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG"))],
    ids=lambda page: page.name,
)
def test_links_and_files_exist(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
    for name in re.findall(r"`((?:configs|launch|m3po_jax|tests|docs)/[\w./-]+)`", text):
        assert (ROOT / name).exists(), f"{page.name} names {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_parse(page):
    """Every `m3po` command: its verb and options exist, its recipe and overrides load."""
    parser = make_parser()
    for block in blocks(page.name, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            if not line.startswith("m3po "):
                continue
            words = shlex.split(line, comments=True)
            options = parser.parse_args(words[words.index("m3po") + 1 :])
            assert options.verb in VERBS
            load_recipe(options.config and ROOT / options.config, options.overrides)


def test_the_front_page_lists_every_verb_and_document():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `m3po (\w+)` \|", text, re.M)) == set(VERBS)
    assert {page.name for page in PAGES} <= set(re.findall(r"\]\(docs/([\w.]+)\)", text))
    assert len(text.splitlines()) <= 130


def test_prompt_rows_as_the_page_shows_them(tmp_path):
    for number, example in enumerate(blocks("data.md", "json")):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(example, encoding="utf-8")
        rows = read_prompts(DataConfig(path=str(path)))
        assert len(rows) == len([line for line in example.splitlines() if line.strip()])
    assert number >= 2


def test_python_examples_of_the_data_page_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    PILImage.new("RGB", (8, 8)).save("kitchen.jpg")
    (tmp_path / "prompts.jsonl").write_text(blocks("data.md", "json")[0], encoding="utf-8")
    examples = blocks("data.md", "python")
    assert len(examples) >= 3
    for example in examples:
        exec(compile(example, "data.md", "exec"), {})


def test_pope_conversion_of_the_data_page(tmp_path):
    if shutil.which("jq") is None or not (SHARED / "pope").is_dir():
        pytest.skip("needs jq and the shared data")
    for split in ("random", "popular", "adversarial"):
        shutil.copy(SHARED / f"pope/coco_pope_{split}.json", tmp_path)
    (command,) = (block for block in blocks("data.md", "bash") if "jq" in block)
    subprocess.run(["bash", "-euo", "pipefail", "-c", command], cwd=tmp_path, check=True)
    recipe = load_recipe(
        None, [f"evaluate.benchmarks.pope={{metric: pope, data: {{path: {tmp_path}/data/pope.jsonl}}}}"]
    )
    benchmark = read_benchmark("pope", recipe.evaluate.benchmarks["pope"])
    assert len(benchmark.prompts) == 9000
    assert {row.reference for row in benchmark.prompts} == {"yes", "no"}


def test_columns_of_the_data_page():
    text = (DOCS / "data.md").read_text(encoding="utf-8")
    for fields in (schema.CANDIDATE, schema.SCORE_FIXED, schema.PAIR):
        assert all(f"`{name}`" in text for name in fields.names)
    assert all(f"`{reason}`" in (DOCS / "method.md").read_text(encoding="utf-8") for reason in Reason)


def test_rules_and_variants_of_the_method_page():
    text = (DOCS / "method.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in text for name in (*RULES, *VARIANTS))


def test_every_loss_is_in_the_table_with_its_parity():
    """`tests/objectives/test_loss_table.py` measures each of them again."""
    text = (DOCS / "training.md").read_text(encoding="utf-8")
    number = r"([\d.e-]+)"
    table = re.findall(rf"^\| `(\w+)` \| .* \| yes[^|]* \| {number}, {number} \| {number}, {number} \|$", text, re.M)
    assert [name for name, *_ in table] == list(LOSSES)
    for name, *errors in table:
        double, single = map(float, errors[:2]), map(float, errors[2:])
        assert max(double) < 1e-6 and max(single) < 1e-5, name


def test_defaults_quoted_in_the_method_page():
    """`key` = value pairs in the text are the defaults."""
    text = (DOCS / "method.md").read_text(encoding="utf-8")
    quoted = re.findall(r"`((?:select|train|generate|score)\.[a-z_.]+)` = ([\d.e-]*\d|\[[^\]]*\])", text)
    assert len(quoted) >= 8
    for key, value in quoted:
        *parents, leaf = key.split(".")
        node: typing.Any = Recipe()
        for part in (*parents, leaf):
            node = getattr(node, part)
        assert json.loads(value) == node, f"{key} is {node}"


@pytest.mark.parametrize("text", blocks("judges.md", "yaml"))
def test_the_judges_recipes_are_recipes(text, tmp_path):
    (tmp_path / "recipe.yaml").write_text(text)
    recipe = load_recipe(tmp_path / "recipe.yaml")
    check_recipe(recipe)
    assert recipe.score.backend in BACKENDS
    check_rubric(recipe.score.rubric, recipe.score.grades)


def test_the_comparison_page_lists_every_system():
    text = (DOCS / "compare.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+)` \| (.+?) \| (.*) \|$", text, re.M)
    assert {name: what for name, what, _ in listed} == {name: system.what for name, system in SYSTEMS.items()}
    for name, _, overrides in listed:
        shown = re.findall(r"`([\w.]+)=([^`]*)`", overrides)
        assert shown == [(key, str(value)) for key, value in SYSTEMS[name].overrides.items()]
