"""The stages as functions: rows, arrays or paths in, rows or models out, for notebooks and other programs.

They are the stages of `m3po run` without a run directory: what a recipe says by a key is a keyword argument of the
same name here (``num_candidates`` of `generate` is ``generate.num_candidates``), checked in the same way. For runs
that must survive a kill, use the command.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jax.sharding import Mesh

from m3po_jax.config import BenchmarkConfig, Recipe
from m3po_jax.data.memory_images import encoded_row
from m3po_jax.data.pair_rows import PairRows, TableRows
from m3po_jax.data.prompt_list import PromptList
from m3po_jax.data.rows import RowRules, prompt_from_row
from m3po_jax.data.schema import PAIR, Prompt
from m3po_jax.data.sources import PromptSource
from m3po_jax.errors import UserError
from m3po_jax.hosts.sharding import make_mesh, use_mesh
from m3po_jax.inference.scorer import Scorer
from m3po_jax.inference.settings import sampling_config
from m3po_jax.models.export import export_adapter, export_model
from m3po_jax.pipeline.arms import needs_pairs
from m3po_jax.pipeline.backends import make_backend
from m3po_jax.pipeline.checks import check_recipe
from m3po_jax.pipeline.evaluate import Benchmark, check_scoring, open_benchmark
from m3po_jax.pipeline.evaluate import evaluate as evaluate_benchmark
from m3po_jax.pipeline.generate import Tally, candidate_pools
from m3po_jax.pipeline.model_card import model_card
from m3po_jax.pipeline.models import InputLimits, Policy, attach_adapter, load_policy, make_generator, read_rows
from m3po_jax.pipeline.pair_files import read_pair_file
from m3po_jax.pipeline.score import NEED_BLANK_IMAGE, judge_candidates, pools, rows_of_pools
from m3po_jax.pipeline.select import pair_with_prompt
from m3po_jax.pipeline.systems import greedy
from m3po_jax.pipeline.train import train_on_pairs
from m3po_jax.recipes import override
from m3po_jax.scoring.alignment import Backend, Scores
from m3po_jax.selection_rows import select_rows
from m3po_jax.training.loop import TrainResult
from m3po_jax.workspace.cell import Cell
from m3po_jax.workspace.evaluation import Evaluation

Rows = Sequence[Mapping[str, Any]]
Judge = Callable[[Sequence[Prompt], Sequence[Sequence[str]]], Scores]


@dataclass(frozen=True)
class Model:
    """A vision-language model, and what turns rows into its inputs.

    Attributes:
        network: What answers: a Flax NNX module, with adapters if it was trained with some.
        policy: The model as it was loaded, and its processor.
        mesh: The devices that it lies on.
        recipe: The settings that it was loaded and trained with.
        training: What `train` measured; None for a model that was only loaded.
    """

    network: Any = field(repr=False)
    policy: Policy = field(repr=False)
    mesh: Mesh = field(repr=False)
    recipe: Recipe
    training: TrainResult | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Selection:
    """What `select` makes of scored candidates.

    Attributes:
        pairs: In TRL's vision preference format, with token ids and reference log-probs beside.
        drops: Prompts that gave no pair, each with its ``reason``.
        summary: Counts of both.
    """

    pairs: list[dict[str, Any]]
    drops: list[dict[str, Any]]
    summary: dict[str, Any]


def _with(recipe: Recipe, section: str, settings: Mapping[str, Any]) -> Recipe:
    """The recipe with settings of one section, checked as a recipe's file is."""
    return override(recipe, {f"{section}.{name}": value for name, value in settings.items()}, where=section)


def load_model(path: str | Path, *, seed: int = 0, mesh: Mapping[str, int] | None = None, **settings: Any) -> Model:
    """Loads a vision-language model.

    Args:
        path: A directory in Hugging Face layout, a hub id, or ``builtin:NAME`` for a checkpoint that ships.
        seed: Of adapters, and of random weights (``init="random"``).
        mesh: Sizes of the axes ``data``, ``fsdp`` and ``tensor``; None: all devices along ``data``.
        settings: Keys of a recipe's `model` (docs/recipes.md): ``dtype``, ``template``, ``image_fit`` and others.

    Raises:
        UserError: a setting that is none, or anything wrong with the directory.
    """
    recipe = _with(dataclasses.replace(Recipe(), seed=seed), "model", {"path": str(path), **settings})
    recipe = _with(recipe, "mesh", mesh or {})
    devices = make_mesh(recipe.mesh)
    with use_mesh(devices):
        limits = InputLimits.of(recipe.data, recipe.generate, recipe.evaluate)
        policy = load_policy(recipe.model, seed, devices, limits)
    return Model(policy.model, policy, devices, recipe)


def read_prompts(prompts: str | Path | Rows | Sequence[Prompt], **settings: Any) -> PromptSource:
    """Prompts from a file, a folder of images, or rows in memory.

    Args:
        prompts: A path of any kind that `data.path` takes; or rows, mappings with ``instruction`` (or ``prompt``,
            ``question``, ``messages``) and ``image`` or ``images``: encoded bytes, PIL images, arrays
            [height, width, 3] of uint8, `Path` objects, or texts: paths under ``image_root``, as in a file of rows.
        settings: Keys of a recipe's `data` (docs/recipes.md): ``instruction`` for rows without one, ``image_root``,
            ``limit`` and others.

    Raises:
        UserError: names the first row that is no prompt.
    """
    if isinstance(prompts, PromptSource):
        return prompts
    if isinstance(prompts, (str, Path)):
        # A program may go to another folder before the images are read.
        path = Path(prompts).resolve() if Path(prompts).exists() else prompts
        return read_rows(_with(Recipe(), "data", {"path": str(path), **settings}).data)
    config = _with(Recipe(), "data", settings).data
    if unread := sorted(settings.keys() - _SETTINGS_OF_ROWS):
        raise UserError(
            "rows in memory do not take it",
            where=f"data.{unread[0]}",
            remedy=f"they take {', '.join(_SETTINGS_OF_ROWS)}",
        )
    if isinstance(prompts, Mapping) or not isinstance(prompts, Iterable):
        raise UserError(f"a {type(prompts).__name__}, not a path or a sequence of rows", where="prompts")
    rules, rows = RowRules(exif=config.exif, instruction=config.instruction), list[Prompt]()
    ids = set[str]()
    for number, row in enumerate(prompts, start=1):
        where = f"prompts:{number}"
        if isinstance(row, Prompt):
            prompt = row
        elif isinstance(row, Mapping):
            prompt = prompt_from_row(encoded_row(row, where), where, rules, place=str(number))
        else:
            raise UserError(f"a row is a mapping, not a {type(row).__name__}", where=where)
        if prompt.id in ids:
            raise UserError(f"the id {prompt.id!r} is another row's too", where=where, remedy="give each its own")
        ids.add(prompt.id)
        rows.append(prompt)
        if len(rows) == config.limit:
            break
    if not rows:
        raise UserError("no rows", where="prompts")
    return PromptList(rows, Path(config.image_root or "."))


def generate(model: Model, prompts: Any, /, *, seed: int = 0, **settings: Any) -> list[dict[str, Any]]:
    """Draws candidates of every prompt.

    Args:
        prompts: As of `read_prompts`.
        seed: Candidates depend on the seed, the prompt's id and the settings, and on nothing else.
        settings: Keys of a recipe's `generate` (docs/recipes.md): ``num_candidates``, ``temperature``,
            ``max_new_tokens`` and others.

    Returns:
        A row for each candidate, in the order of the prompts: ``id``, ``candidate``, ``text``, ``token_ids``,
        ``token_logprobs`` (nats, at temperature 1), ``finish_reason``, ``sampling``.
    """
    source = read_prompts(prompts)
    config = _with(model.recipe, "generate", settings).generate
    processor = dataclasses.replace(model.policy.processor, image_root=source.image_root)
    with use_mesh(model.mesh):
        generator = make_generator(
            processor,
            model.network,
            model.mesh,
            sampling=sampling_config(config, seed),
            batch_size=config.batch_size,
        )
        pools = dict(candidate_pools(_rows(source), generator, processor, config, Tally()))
    return [row for place in sorted(pools) for row in pools[place]]


def _rows(source: PromptSource) -> list[Prompt]:
    return [source[place] for place in range(len(source))]


# Settings of `data` that rows in memory obey; the others are of files.
_SETTINGS_OF_ROWS = ("exif", "image_root", "instruction", "limit")


class _Named(Backend):
    """A user's function as a backend."""

    def __init__(self, judge: Judge):
        self.name, self.judge = "custom", judge

    def __call__(self, prompts: Sequence[Prompt], pools: Sequence[Sequence[str]]) -> Scores:
        answered = self.judge(prompts, pools)
        try:
            judged = [np.asarray(scores, np.float64) for scores in answered]
        except (TypeError, ValueError):
            raise UserError(
                "gave no arrays of numbers", where="judge", remedy="one array of scores a prompt"
            ) from None
        for scores in judged:
            if bad := [float(score) for score in scores.ravel() if not (0 <= score <= 1 or np.isnan(score))]:
                raise UserError(f"a score of {bad[0]:g}", where="judge", remedy="in [0, 1], or NaN to abstain")
        return judged


def score(
    policy: Model, prompts: Any, candidates: Rows, /, *, judge: Judge | None = None, **settings: Any
) -> list[dict[str, Any]]:
    """Judges candidates: alignment scores in [0, 1], the model's confidence, M3P-Scores.

    Args:
        policy: The model that drew them.
        candidates: Rows of `generate`.
        judge: A function of prompts and the texts of each one's candidates to scores [candidates] of each prompt,
            NaN where it abstains; None: the backend that the settings name.
        settings: Keys of a recipe's `score` (docs/recipes.md): ``backend`` (``similarity``, ``judge``, ``endpoint``
            and others), ``model``, ``confidence`` and others.

    Returns:
        The candidates' rows with ``mas``, ``confidence`` and ``confidence_<variant>`` (nats a token),
        ``m3p_preferred``, ``m3p_dispreferred``, and ``abstained``: why there is no score.
    """
    source = read_prompts(prompts)
    recipe = _with(_recipe_of(policy), "score", settings)
    by_id = {prompt.id: prompt for prompt in _rows(source)}
    processor = dataclasses.replace(policy.policy.processor, image_root=source.image_root)
    with use_mesh(policy.mesh):
        backend: Backend
        if judge is not None:
            backend = _Named(judge)
        else:
            backend = make_backend(
                recipe.score,
                policy.mesh,
                policy=policy.policy,
                image_root=source.image_root,
                model_config=recipe.model,
            )
        groups = pools(_checked_candidates(candidates))
        judged = judge_candidates(groups, by_id, backend, "candidates")
        blank = NEED_BLANK_IMAGE.intersection(recipe.score.confidence)
        scorer = Scorer(policy.network, policy.mesh, batch_size=recipe.score.batch_size) if blank else None
        rows = rows_of_pools(groups, by_id, judged, backend.name, recipe.score, recipe.select, processor, scorer)
    ordered = [candidate for _, group in groups for candidate in group]
    return [{**candidate, **row} for candidate, row in zip(ordered, rows, strict=True)]


def _checked_candidates(rows: Rows) -> list[Mapping[str, Any]]:
    """Candidates with what scoring reads, each once, those of a prompt together in the order of their first ones."""
    of_prompt: dict[str, dict[int, Mapping[str, Any]]] = {}
    for number, row in enumerate(rows, start=1):
        if missing := [
            name for name in ("id", "candidate", "text", "token_ids", "token_logprobs") if name not in row
        ]:
            raise UserError(f"no {missing[0]!r}", where=f"candidates:{number}", remedy="give the rows of generate")
        pool = of_prompt.setdefault(row["id"], {})
        if row["candidate"] in pool:
            raise UserError(f"candidate {row['candidate']} occurs twice", where=f"candidates (id {row['id']!r})")
        pool[row["candidate"]] = row
    return [row for pool in of_prompt.values() for row in pool.values()]


def _recipe_of(model: Model) -> Recipe:
    """The recipe of a model, whose other sections are the defaults."""
    return dataclasses.replace(Recipe(), seed=model.recipe.seed, model=model.recipe.model, mesh=model.recipe.mesh)


def select(prompts: Any, scored: Rows, /, **settings: Any) -> Selection:
    """Chooses preference pairs by the M3P-Score, or another rule.

    Args:
        scored: Rows of `score`.
        settings: Keys of a recipe's `select` (docs/recipes.md): ``rule``, ``margin``, ``lambda_dispreferred`` and
            others.
    """
    source = read_prompts(prompts)
    config = _with(Recipe(), "select", settings).select
    by_id = {prompt.id: prompt for prompt in _rows(source)}
    pairs, drops, summary = select_rows(
        [dict(row) for row in scored], config, dispreferred_confidence=config.confidence_dispreferred
    )
    if strange := [row["id"] for row in (*pairs, *drops) if row["id"] not in by_id]:
        raise UserError(f"no prompt has the id {strange[0]!r}", where="scored", remedy="give the prompts of the rows")
    whole = [pair_with_prompt(pair, by_id[pair["id"]], source.image_root) for pair in pairs]
    return Selection(whole, drops, summary)


def _pair_table(rows: Rows) -> pa.Table:
    """The table of pairs' rows.

    Raises:
        UserError: a row that lacks what training reads, or has it in another form.
    """
    for number, row in enumerate(rows, start=1):
        if missing := [name for name in ("id", "prompt", "chosen", "rejected") if row.get(name) is None]:
            raise UserError(
                f"no {missing[0]!r}",
                where=f"pairs:{number}",
                remedy="rows are those of select; a file may have any published shape",
            )
    try:
        return pa.Table.from_pylist(list(rows), schema=PAIR)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise UserError(
            f"not of the form of a pair ({str(error).splitlines()[0]})",
            where="pairs",
            remedy="rows are those of select; a file may have any published shape",
        ) from None


@contextmanager
def _folder(output_dir: str | Path | None) -> Iterator[Path]:
    if output_dir is not None:
        yield Path(output_dir)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def train(
    model: Model,
    pairs: Selection | Rows | str | Path,
    /,
    *,
    seed: int = 0,
    output_dir: str | Path | None = None,
    **settings: Any,
) -> Model:
    """Trains on preference pairs, by any loss of `train.loss_type`, or by supervision on the chosen answers.

    Args:
        pairs: What `select` returned, rows in TRL's vision preference format, or a file of any published shape.
        output_dir: Keeps checkpoints and metrics, from which the same call continues; None: nothing is kept.
        settings: Keys of a recipe's `train` (docs/recipes.md): ``beta``, ``max_steps``, ``learning_rate``,
            ``lora={"lora_rank": 16}`` and others.

    Returns:
        The trained model, with `Model.training`; the given one is left as it is.
    """
    recipe = _with(_recipe_of(model), "train", settings)
    recipe = _with(recipe, "cache", {"vision_features": "off", "reference": "off"})
    if not needs_pairs(recipe.train):
        raise UserError(
            f"{recipe.train.objective} does not learn from pairs", where="train.objective", remedy="use `m3po train`"
        )
    check_recipe(recipe)
    rows: PairRows
    policy = model.policy
    if recipe.train.pairs:
        raise UserError(
            "the pairs are given", where="train.pairs", remedy="leave it out, or give the file in their place"
        )
    if isinstance(pairs, (str, Path)):
        rows = read_pair_file(str(pairs), recipe.data)
    else:
        given = pairs.pairs if isinstance(pairs, Selection) else [dict(row) for row in pairs]
        if not given:
            raise UserError("there is no pair to train on", remedy="loosen the selection")
        rows = TableRows(_pair_table(given))
    with use_mesh(model.mesh), _folder(output_dir) as out:
        fresh = model.network is policy.model
        start = attach_adapter(policy, recipe.train.lora, recipe.seed) if fresh else model.network
        trained = train_on_pairs(recipe, policy, rows, out, model.mesh, start=start, seed=seed)
    return dataclasses.replace(model, network=trained.model, recipe=recipe, training=trained.result)


def evaluate(
    model: Model,
    questions: Any,
    /,
    *,
    metric: str,
    seed: int = 0,
    output_dir: str | Path | None = None,
    benchmark: Mapping[str, Any] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Answers questions greedily and scores the answers by a benchmark's rule.

    Args:
        questions: As of `read_prompts`, with what the metric reads (docs/evaluation.md).
        metric: ``pope``, ``mme``, ``chair``, ``vqa`` and others.
        seed: Of the bootstrap.
        output_dir: Keeps ``items.jsonl`` and ``results.json``; None: nothing is kept.
        benchmark: Further keys of a benchmark (``rule``, ``vocabulary`` and others).
        settings: Keys of a recipe's `evaluate`: ``max_new_tokens``, ``bootstrap_samples`` and others.

    Returns:
        What ``results.json`` holds: ``summary`` (the metric's numbers), ``intervals`` (95 %, from a bootstrap over
        images), ``rule`` and others.
    """
    source = read_prompts(questions)
    recipe = _with(_recipe_of(model), "evaluate", settings)
    config = dataclasses.replace(recipe.evaluate, benchmarks={})
    keys = {"metric": metric, **(benchmark or {})}
    overridden = override(
        Recipe(), {f"evaluate.benchmarks.questions.{key}": value for key, value in keys.items()}, "evaluate"
    )
    chosen: BenchmarkConfig = overridden.evaluate.benchmarks["questions"]
    opened: Benchmark = open_benchmark("questions", chosen, source)
    check_scoring(opened)
    with use_mesh(model.mesh), _folder(output_dir) as out:
        generator = make_generator(
            model.policy.processor, model.network, model.mesh, sampling=greedy(config), batch_size=config.batch_size
        )
        return evaluate_benchmark(
            opened,
            generator,
            model.policy.processor,
            config,
            Evaluation(out),
            inputs=model.policy.identity,
            seed=seed,
            system="model",
        )


def export(
    model: Model,
    directory: str | Path,
    /,
    *,
    format: str = "huggingface",
    dtype: str = "auto",
    overwrite: bool = False,
) -> Path:
    """Writes a model that `transformers` (or PEFT) loads.

    Args:
        format: ``huggingface``: a whole model with adapters merged; ``peft``: the adapter alone.
        dtype: Of the tensors; ``auto``: each as in the base model (an adapter: float32).
        overwrite: Replace what `directory` holds.

    Raises:
        UserError: `directory` holds files, or there is no adapter.
    """
    out = Path(directory)
    if format not in ("huggingface", "peft"):
        raise UserError(f"unknown format {format!r}", where="export", remedy="huggingface or peft")
    adapter, base = format == "peft", model.policy.loaded
    steps = model.training.steps if model.training is not None else 0
    texts = {
        "README.md": model_card(
            model.recipe, base.family, cell=Cell(out, 1), steps=steps, dtypes=dtype, adapter=adapter
        )
    }
    if adapter:
        path, lora = model.recipe.model.path, model.recipe.train.lora
        export_adapter(model.network, path, out, lora, dtype=dtype, overwrite=overwrite, base=base, texts=texts)
    else:
        export_model(model.network, base, out, dtype=dtype, overwrite=overwrite, texts=texts)
    return out


__all__ = [
    "Model",
    "Selection",
    "evaluate",
    "export",
    "generate",
    "load_model",
    "read_prompts",
    "score",
    "select",
    "train",
]
