"""The alignment backend that a recipe names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from m3po_jax.config import DataConfig, ModelConfig, ScoreConfig
from m3po_jax.data.schema import Prompt
from m3po_jax.data.templates import CHAT
from m3po_jax.errors import UserError, nearest
from m3po_jax.hosts.agreement import from_writer, is_writer
from m3po_jax.hosts.signals import stop_signal
from m3po_jax.inference.scorer import Scorer
from m3po_jax.models.dual_encoder import DualEncoder
from m3po_jax.models.registry import Description, Loaded, describe
from m3po_jax.pipeline.console import say
from m3po_jax.pipeline.models import InputLimits, Policy, load_dual_encoder, load_policy, model_identity
from m3po_jax.pipeline.reward import load_reward, trained_identity
from m3po_jax.reading import check_values
from m3po_jax.scoring.alignment import Backend, Judged, Reference, Scores, Similarity
from m3po_jax.scoring.blind_spots import shared_blind_spots
from m3po_jax.scoring.endpoint import Endpoint
from m3po_jax.scoring.endpoint_settings import check_client, check_endpoint, read_key
from m3po_jax.scoring.ensemble import Ensemble
from m3po_jax.scoring.grading import Judge
from m3po_jax.scoring.judge import Claims
from m3po_jax.scoring.reward import RewardBackend


@dataclass(frozen=True)
class Setting:
    """What a backend is built from.

    Attributes:
        policy: The model that is aligned; needed where it judges itself, and for the warning.
        image_root: Folder that image paths are relative to.
        model_config: Data types, conversation template, image fit and prompt limit of a judge of its own; a judge of
            another family than the policy's has its own template.
        folder: The run directory, where a backend may keep what it paid for; None: it keeps nothing there.
        warnings: Gets a line where a judge shares the policy's blind spots.
        own_reward: Gives the run's own reward model, for ``reward`` without a model.
    """

    score: ScoreConfig
    mesh: Mesh
    policy: Policy | None
    image_root: Path
    model_config: ModelConfig
    folder: Path | None
    warnings: list[str]
    own_reward: Callable[[], RewardBackend] | None

    @property
    def max_image_pixels(self) -> int:
        """The recipe's limit, which the policy's processor has."""
        return DataConfig.max_image_pixels if self.policy is None else self.policy.processor.max_image_pixels


def make_backend(
    score: ScoreConfig,
    mesh: Mesh,
    *,
    policy: Policy | None = None,
    image_root: str | Path = ".",
    model_config: ModelConfig | None = None,
    folder: Path | None = None,
    warnings: list[str] | None = None,
    own_reward: Callable[[], RewardBackend] | None = None,
) -> Backend:
    """Builds `score.backend` (one of `BACKENDS`) and loads its model; the arguments are those of `Setting`.

    ``similarity`` needs `score.model`, a CLIP or SigLIP directory. ``claims`` and ``judge`` ask `score.model`, or
    the policy itself where that is empty. ``endpoint`` asks a server. ``ensemble`` joins `score.members`, each
    ``NAME`` or ``NAME=MODEL`` (without MODEL: `score.model`). ``reward`` reads `score.model`, a trained reward model,
    or is the run's own (as a member: ``reward=FOLDER`` or ``reward``). A judge that shares the policy's vision
    encoder is used, with a warning on standard error.

    Raises:
        UserError: an unknown backend (the nearest one is named), a missing or unsuitable model.
    """
    check_values(score, "score")
    noted = [] if warnings is None else warnings
    config = model_config or ModelConfig()
    setting = Setting(score, mesh, policy, Path(image_root), config, folder, noted, own_reward)
    return BACKENDS[score.backend](setting)


def describe_dual_encoder(score: ScoreConfig, *, download: bool = True) -> Description:
    """UserError unless `score.model` is a dual encoder; see `registry.describe` for `download`."""
    if not score.model:
        raise UserError("similarity needs a dual encoder", where="score.model", remedy="name a CLIP or SigLIP model")
    described = describe(score.model, download=download)
    if described.family.model_class is not DualEncoder:
        raise UserError(
            "not a dual encoder", where=f"score.model {score.model!r}", remedy="take a CLIP or SigLIP model"
        )
    return described


def describe_judge(score: ScoreConfig, *, download: bool = True) -> Description:
    """UserError unless `score.model` is a vision-language model; see `registry.describe` for `download`."""
    described = describe(score.model, download=download)
    if described.family.images is None:
        raise UserError(
            f"not a vision-language model, which the {score.backend} backend asks",
            where=f"score.model {score.model!r}",
            remedy="take one, or score.backend=similarity",
        )
    return described


def judge_config(path: str, policy: ModelConfig, judge: Description, policy_model: Description | None) -> ModelConfig:
    """How a judge of its own is loaded and asked: as the policy is, as far as the judge's family has such settings.

    Args:
        path: Of the judge.
        policy: The recipe's model.
        policy_model: What it is, where that is known. A judge of another family has its own template: the policy's
            words would be none that it was taught.
    """
    images = judge.family.images
    assert images is not None, "refused by describe_judge"
    stranger = policy_model is not None and policy_model.family.name != judge.family.name
    return dataclasses.replace(
        policy,
        path=path,
        revision="",
        vision_tower="",
        init="pretrained",
        template=CHAT if stranger else policy.template,
        min_pixels=policy.min_pixels if images.several_sizes else None,
        max_pixels=policy.max_pixels if images.several_sizes else None,
        pan_and_scan=policy.pan_and_scan and images.pan_and_scan,
    )


def _similarity(setting: Setting) -> Similarity:
    score = setting.score
    describe_dual_encoder(score, download=False)
    loaded, processor = load_dual_encoder(
        score.model,
        setting.mesh,
        image_root=setting.image_root,
        image_fit="",
        max_image_pixels=setting.max_image_pixels,
    )
    _warn(setting, loaded)
    return Similarity(
        loaded.model,
        processor,
        setting.mesh,
        unit=score.unit,
        aggregate=score.aggregate,
        vocabulary=score.vocabulary,
        template=score.claim_template,
        batch_size=score.batch_size,
    )


def _judge_model(setting: Setting) -> Policy:
    """The vision-language model that judges: `score.model`, or the policy itself."""
    score, policy = setting.score, setting.policy
    if score.model:
        described = describe_judge(score, download=False)
        of_policy = None if policy is None else policy.loaded.description
        config = judge_config(score.model, setting.model_config, described, of_policy)
        limits = InputLimits(max_image_pixels=setting.max_image_pixels)
        judge = load_policy(config, 0, setting.mesh, limits, image_root=setting.image_root)
    elif policy is not None:
        judge = dataclasses.replace(
            policy, processor=dataclasses.replace(policy.processor, image_root=setting.image_root)
        )
    else:
        raise UserError(
            f"the {score.backend} backend needs a judge", where="score.model", remedy="name a model directory"
        )
    _warn(setting, judge.loaded)
    return judge


def _claims(setting: Setting) -> Claims:
    score, judge = setting.score, _judge_model(setting)
    return Claims(
        Scorer(judge.model, setting.mesh, batch_size=score.batch_size),
        judge.processor,
        aggregate=score.aggregate,
        vocabulary=score.vocabulary,
        template=score.judge_template,
    )


def _judge(setting: Setting) -> Judge:
    score, judge = setting.score, _judge_model(setting)
    return Judge(
        Scorer(judge.model, setting.mesh, batch_size=score.batch_size),
        judge.processor,
        rubric=score.rubric,
        grades=score.grades,
        min_mass=score.min_grade_mass,
    )


def _endpoint(setting: Setting) -> Backend:
    score, folder, config = setting.score, setting.folder, setting.score.endpoint
    check_endpoint(config)
    if config.cache_dir:
        cache = Path(config.cache_dir)
    elif folder is not None:
        cache = folder.parent / "endpoint-cache"
    else:
        raise UserError("no place for paid answers", where="score.endpoint.cache_dir", remedy="name a folder")

    def make() -> Endpoint:
        return Endpoint(
            config,
            rubric=score.rubric,
            grades=score.grades,
            image_root=setting.image_root,
            cache=cache,
            run="library" if folder is None else str(folder.resolve()),
            stopping=stop_signal,
            report=say,
            max_image_pixels=setting.max_image_pixels,
        )

    return make() if jax.process_count() == 1 else OneHost(Endpoint.name, make)


def _reward(setting: Setting) -> RewardBackend:
    score = setting.score
    if score.model:
        return load_reward(
            score.model,
            setting.mesh,
            image_root=setting.image_root,
            batch_size=score.batch_size,
            max_image_pixels=setting.max_image_pixels,
        )
    if setting.own_reward is None:
        raise UserError("no reward model", where="score.model", remedy="name a folder of a trained one")
    return setting.own_reward()


def judge_identities(score: ScoreConfig) -> list[str]:
    """Hashes of the models that a recipe names as judges: `score.model`, and those of an ensemble's members."""
    members = [member.partition("=") for member in score.members]
    named = [(score.backend, score.model), *((name, model) for name, _, model in members if name != "endpoint")]
    return [judge_identity(name, path) for name, path in named if path]


def judge_identity(backend: str, path: str) -> str:
    """A hash of one judge: its model directory and the tower that this borrows, or a trained reward model.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    return trained_identity(path) if backend == "reward" else model_identity(describe(path))


def check_ready(score: ScoreConfig) -> None:
    """UserError where a server's key or client is missing: said before anything is generated for it to judge."""
    if is_writer() and "endpoint" in (score.backend, *(m.partition("=")[0] for m in score.members)):
        check_client()
        read_key(score.endpoint)


class OneHost(Backend):
    """A backend that runs on process 0 alone and tells the others: every host would pay for its own requests."""

    def __init__(self, name: str, make: Callable[[], Endpoint]):
        self.name = name
        self.endpoint: Endpoint | None = None
        from_writer(lambda: self._start(make))

    def _start(self, make: Callable[[], Endpoint]) -> None:
        self.endpoint = make()

    def __call__(self, prompts: Sequence[Prompt], pools: Sequence[Sequence[str]]) -> Scores:
        return self.judged(prompts, pools).scores

    def judged(self, prompts: Sequence[Prompt], pools: Sequence[Sequence[str]]) -> Judged:
        def run() -> dict[str, Any]:
            assert self.endpoint is not None
            judged = self.endpoint.judged(prompts, pools)
            scores = [row.tolist() for row in judged.scores]
            return {"scores": scores, "reasons": judged.reasons, "notes": dict(judged.notes)}

        received = from_writer(run)
        scores = [np.array(row, np.float64) for row in received["scores"]]
        return Judged(scores, received["reasons"], notes=received["notes"])

    def usages(self) -> list[dict[str, Any]]:
        return self.endpoint.usages() if self.endpoint is not None else []


def _warn(setting: Setting, judge: Loaded) -> None:
    if setting.policy is None:
        return
    base = setting.policy.loaded
    places = (base.tower or base.directory, judge.tower or judge.directory)
    warning = shared_blind_spots(*places, base.raw_config, judge.raw_config)
    if warning:
        setting.warnings.append(warning)
        say(f"score.model: {warning}", style="yellow")


def member_settings(score: ScoreConfig) -> list[ScoreConfig]:
    """What each member of an ensemble is built from: `score` with its own backend and model.

    Raises:
        UserError: an unknown member, or fewer than two.
    """
    members: list[ScoreConfig] = []
    names = [name for name in BACKENDS if name != "ensemble"]
    for member in score.members:
        backend, _, model = member.partition("=")
        if backend not in names:
            raise UserError(f"unknown backend {backend!r}{nearest(backend, names)}", where="score.members")
        fallback = "" if backend == "reward" else score.model  # a reward model is no model directory
        settings = dataclasses.replace(score, backend=backend, model=model or fallback, members=[])
        if backend == "endpoint" and model:
            settings = dataclasses.replace(settings, endpoint=dataclasses.replace(score.endpoint, model=model))
        members.append(settings)
    if len(members) < 2:
        raise UserError("an ensemble has at least two members", where="score.members", remedy="name two backends")
    return members


def _ensemble(setting: Setting) -> Ensemble:
    members = [
        BACKENDS[settings.backend](dataclasses.replace(setting, score=settings))
        for settings in member_settings(setting.score)
    ]
    rules = setting.score.ensemble
    return Ensemble(
        members,
        correlation=rules.correlation,
        min_correlation=rules.min_correlation,
        max_gap=rules.max_gap,
        max_opposed_z=rules.max_opposed_z,
        min_contrast=rules.min_contrast,
    )


# A further backend is a function here and an entry below.
BACKENDS: dict[str, Callable[[Setting], Backend]] = {
    "similarity": _similarity,
    "claims": _claims,
    "judge": _judge,
    "endpoint": _endpoint,
    "reference": lambda setting: Reference(setting.score.vocabulary),
    "reward": _reward,
    "ensemble": _ensemble,
}
