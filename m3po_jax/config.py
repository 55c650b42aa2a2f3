"""Typed recipes: dataclasses, YAML files and dotted overrides on the command line.

A recipe is one `Recipe`; every field has a default, so that a YAML file states only what it changes. Unknown
keys are errors that name the nearest known key. Names follow TRL and PEFT where those have one.
"""

from __future__ import annotations

import copy
import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from m3po_jax.errors import UserError, nearest


@dataclass
class MeshConfig:
    """Sizes of the device mesh; -1 takes all devices that are left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclass
class ModelConfig:
    """A model directory in Hugging Face layout, and how to run it."""

    path: str = ""  # a local directory or a hub id; `builtin:NAME` for the checkpoints that ship with the package
    dtype: str = "bfloat16"  # computation
    param_dtype: str = "bfloat16"  # frozen weights; trained ones are float32
    quantization: str = "none"  # none | int8 | nf4: the language model's frozen linear layers
    init: str = "pretrained"  # pretrained | random: a directory with config.json alone starts from seed
    vision_tower: str = ""  # a CLIP directory whose tower replaces the model's own (original LLaVA releases lack one)
    template: str = "vicuna_v1"  # vicuna_v1 | hf | plain, see data/templates.py
    image_fit: str = "pad"  # pad | crop | stretch, see data/images.py
    remat: str = "full"  # none | full | dots: what the backward pass recomputes
    attention: str = "xla"  # xla | pallas (TPU kernels) | cudnn (NVIDIA GPUs, 16-bit types)
    max_prompt_tokens: int = 1024  # image tokens included; longer rows are refused, never truncated


@dataclass
class DataConfig:
    """Where rows come from: `source` names the reader, `path` is its argument."""

    source: str = "jsonl"  # jsonl | parquet | tfds | array_record
    path: str = ""
    split: str = "train"
    image_root: str = ""  # relative image paths stay inside it; default: the data file's folder
    limit: int | None = None
    max_image_pixels: int = 50_000_000  # a larger image is refused before it is decoded


@dataclass
class PoolMember:
    """Settings of `count` candidates of every prompt; what is not given is as under `generate`."""

    count: int = 1
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_new_tokens: int | None = None


@dataclass
class GenerateConfig:
    """Candidates: how many, and the distribution they are drawn from."""

    num_candidates: int = 8
    temperature: float = 1.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0  # least probability, in units of the likeliest token's; 0: off
    repetition_penalty: float = 1.0  # over the answer's own tokens; 1: off
    repetition_penalty_prompt: bool = False  # over the prompt's tokens too, as transformers does
    min_new_tokens: int = 0  # no end token before so many others
    max_new_tokens: int = 256
    suppress_tokens: list[int] = field(default_factory=list)  # ids never drawn (image, padding, unused ids never are)
    # An answer is cut before the first of these strings; the device decodes on to the end token or the limit.
    stop: list[str] = field(default_factory=list)
    greedy_member: bool = False  # candidate 0 is greedy
    # Of {count, temperature, top_k, top_p, min_p, repetition_penalty, min_new_tokens}; counts make num_candidates
    pool: list[PoolMember] = field(default_factory=list)
    resample_duplicates: int = 0  # times that a candidate with the text of another of its prompt is drawn again
    batch_size: int = 16  # prompts in flight
    shard_rows: int = 256  # prompts in one output shard, the unit of resumption


@dataclass
class EnsembleConfig:
    """When an ensemble abstains because its members disagree (scoring/ensemble.py)."""

    correlation: str = "spearman"  # spearman | kendall: the rank correlation of two members in a pool
    min_correlation: float = 0.0  # below it they disagree; -1: off
    max_gap: float = 0.25  # each holds the other's best for worse than its own by more than this; 1: off
    max_opposed_z: float | None = None  # a candidate's z-scores oppose each other beyond this; null: off
    min_contrast: float = 1e-3  # a member whose scores vary less in a pool has no opinion


@dataclass
class EndpointConfig:
    """An OpenAI-compatible server as judge (scoring/endpoint.py)."""

    base_url: str = ""  # up to and with /v1; `/chat/completions` is added
    model: str = ""  # the server's name for the judge
    api_key_env: str = ""  # the environment variable that holds the key; empty: no key is sent
    allow_insecure: bool = False  # send the key over plain http to another machine
    temperature: float = 0.0  # of the judge
    max_tokens: int = 16  # of an answer
    logprobs: bool = False  # ask for the grade tokens' log-probs: the expected grade instead of the given one
    max_image_side: int = 1024  # larger images are scaled down to this before they are sent
    extra_body: dict[str, Any] = field(default_factory=dict)  # more of the request; a null removes a key
    max_reasks: int = 2  # after an answer without a grade; then the candidate has no score
    # A run may be continued with other values of what follows, which change no score.

    concurrency: int = 8  # requests in flight
    requests_per_minute: float = 0.0  # 0: no limit
    tokens_per_minute: float = 0.0  # prompt and completion; 0: no limit
    timeout_s: float = 60.0  # of one request
    max_retries: int = 6  # after a time-out, a lost connection, status 408, 409, 429 or 5xx
    retry_wait_s: float = 1.0  # before the first retry; doubles, with jitter, unless the server says how long
    prompt_price: float = 0.0  # of a million prompt tokens, in any currency
    completion_price: float = 0.0  # of a million completion tokens
    max_cost: float | None = None  # scoring stops before this is spent; null: no limit
    cache_dir: str = ""  # paid answers, shared by all runs that name it; empty: OUTPUT_DIR/endpoint-cache


@dataclass
class ScoreConfig:
    """The alignment score (MAS) and the confidence variants."""

    backend: str = "claims"  # similarity | claims | judge | endpoint | reference | reward | ensemble
    members: list[str] = field(default_factory=list)  # of an ensemble: NAME or NAME=MODEL
    ensemble: EnsembleConfig = field(default_factory=EnsembleConfig)
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)
    rubric: str = ""  # judge, endpoint: the question, with {instruction} and {answer}; empty: see scoring/grading.py
    grades: list[int] = field(default_factory=lambda: [1, 2, 3, 4, 5])  # judge, endpoint: worst to best
    min_grade_mass: float = 0.05  # judge: abstains where all grades together are less likely
    judge_template: str = ""  # claims: the question about {claim}; empty: see scoring/judge.py
    model: str = ""  # the judge or the dual encoder (a model directory)
    unit: str = "claim"  # similarity: whole | claim
    aggregate: str = "mean"  # of claims: mean | min | soft_f1 (needs `vocabulary`)
    vocabulary: list[str] = field(default_factory=list)  # soft_f1: the claims that could have been made
    claim_template: str = "{claim}"  # the text that stands for one claim in the dual encoder
    confidence: list[str] = field(default_factory=lambda: ["mean"])  # sum | mean | tail | cluster | prior | visual
    batch_size: int = 32  # prompts


@dataclass
class SelectConfig:
    """The M3P-Score and the rules that a pair must satisfy (METHOD section 2)."""

    # m3p | mas_only | vanilla | random | low_confidence | product | lexicographic | inversion | shared | extremes
    rule: str = "m3p"
    confidence: str = "mean"  # the variant that enters the score
    confidence_dispreferred: str = ""  # another variant for the rejected role; empty: the same
    lambda_preferred: float = 0.2
    lambda_dispreferred: float = 1.0
    chosen_floor: float = 0.5  # least MAS of a chosen answer
    margin: float = 0.1  # least MAS gap between chosen and rejected
    min_rejected_z: float = -2.0  # hardness band: a rejected answer is not garbage
    length_ratio: list[float] = field(default_factory=lambda: [0.5, 2.0])  # rejected / chosen, in tokens
    max_similarity: float = 0.9  # near-duplicates drive likelihood displacement
    min_contrast: float = 1e-3  # least standard deviation of MAS within a pool
    lexicographic: list[float] = field(default_factory=lambda: [0.7, 0.4])  # τ₊, τ₋
    candidates: int | None = None  # only each prompt's first so many candidates take part: a smaller K on one pool
    budget: float = 1.0  # the share of pairs that is kept
    max_pairs: int | None = None  # at most so many are kept
    budget_by: str = "value"  # value: the best pairs | random: any, the same prompts for every rule
    budget_within: str = ""  # a key of the prompts' metadata (kind, say) in whose groups values are ranked apart
    seed: int = 0


@dataclass
class LoRAConfig:
    lora_rank: int = 128  # 0: full fine-tuning
    lora_alpha: float = 256.0
    # Layer names of the language model, or PART.NAME: vision_tower.q_proj, projector.linear_1
    target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    train_projector: bool = False


@dataclass
class RLConfig:
    """Reinforcement learning on the reward model (`train.objective: rlhf`); TRL's names."""

    algorithm: str = "rloo"  # rloo | ppo (a value head and GAE)
    rloo_k: int = 4  # answers of a prompt in a rollout, at least 2 for rloo
    temperature: float = 1.0  # of the rollouts; log-probs are those of temperature 1
    kl_coef: float = 0.05  # weight of the KL to the reference in the reward
    kl_estimator: str = "k1"  # k1 | k2 | k3, see objectives/policy_gradient.py
    kl_target: float | None = None  # KL of an answer that an adaptive kl_coef holds; null: kl_coef is fixed
    kl_horizon: int = 10_000  # answers in which an adaptive kl_coef can change by a fifth of itself
    num_ppo_epochs: int = 1  # passes over a rollout
    num_mini_batches: int = 1  # optimizer steps of a pass; a rollout has so many times train.batch_size prompts
    cliprange: float = 0.2  # of the ratio of new and old probability
    missing_eos_penalty: float = 0.0  # taken from the score of an answer cut at generate.max_new_tokens
    normalize_advantages: bool = False  # rloo: mean 0, standard deviation 1 over a rollout
    # ppo alone
    gamma: float = 1.0  # discount
    lam: float = 0.95  # λ of GAE
    vf_coef: float = 0.1  # weight of the value loss
    cliprange_value: float = 0.2  # how far a value may move from that of the rollout
    whiten_rewards: bool = False  # unit variance of the tokens' rewards


@dataclass
class TrainConfig:
    objective: str = "preference"  # preference | sft | contrastive | reward | rlhf, see training.md
    data: list[DataConfig] = field(default_factory=list)  # sft, contrastive: joined; empty: the recipe's `data`
    sft_answers: str = "chosen"  # an arm of objective sft learns the pairs' chosen | the data's reference answers
    loss_type: str = "sigmoid"  # a loss of training.md, or mixture: those of `loss_weights`
    loss_weights: dict[str, float] = field(default_factory=dict)  # MPO: {sigmoid: 0.8, bco_pair: 0.2, sft: 1.0}
    beta: float = 0.1
    label_smoothing: float = 0.0
    f_divergence_type: str = "reverse_kl"  # reverse_kl (DPO) | forward_kl | js_divergence | alpha_divergence
    f_alpha_divergence_coef: float = 0.5  # α of alpha_divergence
    ld_alpha: float | None = None  # LD-DPO: weight of the tokens beyond the shorter answer's length; null: off
    ld_alpha_reference: bool = True  # in the reference's sums too (TRL 1.16); false: the policy's alone
    discopop_tau: float = 0.05  # width of discopop's gate
    simpo_gamma: float = 0.5  # simpo's target margin, in units of reward
    chosen_nll_weight: float = 0.0  # anchor: per-token NLL of the chosen answer (RPO)
    conditional_weight: float = 0.0  # mDPO: the chosen answer is preferred to itself with a corrupted image
    conditional_image: str = "blank"  # the corrupted image: blank | swap (another row's)
    anchor_weight: float = 0.0  # mDPO: the chosen answer's reward stays above `anchor_delta`
    anchor_delta: float = 0.0  # in units of reward
    reference: str = "recorded"  # recorded (at generation) | computed (by the reference model)
    reference_check_rows: int = 8  # recorded log-probs of so many rows are computed again and compared; 0: none
    center_rewards_coefficient: float = 0.01  # reward: weight of (r_w + r_l)², which keeps rewards around 0
    reward_margin: float = 0.0  # reward: by how much a chosen answer should win
    rl: RLConfig = field(default_factory=RLConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    train_vision: bool = False  # sft only: the vision tower learns too
    # With lora_rank 0, the parts of the model that do not learn; the projector alone: [decoder]
    freeze: list[str] = field(default_factory=list)
    learning_rate: float = 2e-6
    lr_schedule: str = "cosine"  # cosine | linear | constant
    warmup_ratio: float = 0.03
    warmup_steps: int | None = None  # overrides the ratio
    adam_beta1: float = 0.9  # decay of the mean of gradients
    adam_beta2: float = 0.999  # and of the mean of their squares
    adam_epsilon: float = 1e-8  # larger: gradients near rounding move nothing
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    ema_decay: float = 0.0  # of a moving average of what learns; 0: none is kept
    weights: str = "last"  # what the stage hands on: last | ema | best
    batch_size: int = 32  # pairs (or rows) of one optimizer step
    gradient_accumulation_steps: int = 1
    length_window: int = 32  # rows of so many shuffled batches are exchanged to batches of like lengths; 1: off
    # An NLL's sum (sft, chosen_nll_weight) is divided by the answer tokens of an average batch of the data, whatever
    # rows share a batch (data) | of each batch, as in TRL (batch)
    token_mean: str = "data"
    max_shapes: int = 16  # most (prompt, answer) widths that batches are padded to, each compiled once
    epochs: float = 1.0
    max_steps: int | None = None  # overrides epochs
    max_answer_tokens: int = 256
    save_steps: int = 50
    keep_checkpoints: int = 2  # the last so many
    keep_best: int = 0  # and so many with the best `best_metric`
    best_metric: str = "loss"  # mean since the checkpoint before; least of a loss or NLL, else most
    log_steps: int = 1
    report_to: list[str] = field(default_factory=list)  # tensorboard | wandb, beside metrics.jsonl
    collapse_warning: float = 0.5  # warns when chosen answers lose so many nats per token while margins grow; 0: off
    harm_metrics_steps: int = 0  # steps between measures of what the text alone teaches; 0: off


@dataclass
class RewardConfig:
    """The reward model of the arms `rm_dpo` and `rlhf`, and of `train.objective: reward`.

    It learns from pairs of the prompts on its side of `split`; the arms that use it see the others alone.
    """

    split: float = 0.5  # share of the prompts, by a hash of their ids, that only the reward model sees
    holdout: float = 0.1  # share of its pairs that measure its accuracy instead
    rule: str = "vanilla"  # how its pairs are made from scored candidates; a `select.rule`
    pairs_per_prompt: int = 1  # at most so many different pairs of a prompt; more than one: vanilla or random alone
    pairs: str = ""  # a folder or file of pairs to learn from instead (TRL's vision format); the split does not apply
    learning_rate: float | None = None  # null: that of `train`; so are the next four
    lora_rank: int | None = None  # 0: its backbone learns as a whole, while the policy has adapters
    batch_size: int | None = None  # pairs of one optimizer step
    epochs: float | None = None  # passes over its pairs
    max_steps: int | None = None  # overrides epochs; null where `epochs` is given here: by epochs


@dataclass
class CacheConfig:
    """What is computed once and kept on disk under a hash of its contents: off, a folder, or auto
    (`output_dir`/cache, shared by all runs there)."""

    vision_features: str = "off"  # of a frozen tower; width × image tokens × size of dtype: 1.2 MB an image at 7B
    reference: str = "off"  # log-prob sums of a computed reference, 16 bytes a pair


@dataclass
class BenchmarkConfig:
    """One benchmark: whose rule scores the answers, and where the questions come from."""

    # pope | chair | short_answer | mme | vqa | mmbench | amber | amber_yes_no | mmhal | llava_bench: evaluation.md
    metric: str = "pope"
    data: DataConfig = field(default_factory=DataConfig)
    kind: str = ""  # only rows whose metadata has this `kind`; empty: all rows
    rule: str = ""  # how answers are read, of those that the metric has (evaluation.md); empty: its default
    # chair: the objects, each a name or "name, other word, …"; empty: the names that the rows have
    vocabulary: list[str] = field(default_factory=list)
    synonyms: str = ""  # chair: the official synonyms.txt, for rule: official
    association: str = ""  # amber: its relation.json
    safe_words: str = ""  # amber: its safe_words.txt
    nouns: str = "vocabulary"  # amber: vocabulary (words that the association file has) | nltk (official)
    similarity: str = "exact"  # amber: exact | a spaCy model; en_core_web_lg is official


@dataclass
class EvaluateConfig:
    """Benchmarks by name, and the decoding of evaluation answers (greedy)."""

    benchmarks: dict[str, BenchmarkConfig] = field(default_factory=dict)
    max_new_tokens: int = 128
    batch_size: int = 16
    stop_bias: list[float] = field(default_factory=list)  # the base model's stop-bias frontier (chair benchmarks)
    # The words that get the bias, each one token, where they announce an answer's end; empty: the end token.
    stop_words: list[str] = field(default_factory=list)
    contrast_alpha: list[float] = field(default_factory=list)  # contrastive decoding (VCD) of the base model
    bootstrap_samples: int = 1000


@dataclass
class RoundConfig:
    """What later rounds take over from earlier ones."""

    reference: str = "previous"  # the reference model of a round: previous (the round's generator) | base
    mix_previous: float = 0.0  # share of a round's training pairs that come from earlier rounds


@dataclass
class CompareConfig:
    """`m3po compare`: systems × seeds on shared candidates (docs/compare.md)."""

    # Systems that ship (docs/compare.md) or of `arms`; base and its stop-bias frontier are always there
    arms: list[str] = field(default_factory=lambda: ["vcd", "sft_chosen", "dpo", "mas_dpo", "low_confidence", "m3po"])
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    per_seed: dict[str, str] = field(default_factory=dict)  # dotted key -> text with {seed}, e.g. model.path
    against: list[str] = field(default_factory=lambda: ["base", "mas_dpo"])  # paired differences against these
    main: str = "m3po"  # the system whose success is judged
    equal_pairs: bool = True  # every arm trains on as many pairs as the arm with the fewest
    efficiency: list[float] = field(default_factory=list)  # budgets of the data-efficiency curve, e.g. [0.25, 1.0]
    efficiency_of: list[str] = field(default_factory=list)  # the systems that it is drawn for; empty: `main`
    resamples: int = 1000  # bootstrap samples of the intervals


@dataclass
class Recipe:
    """Everything one run needs."""

    name: str = "run"
    output_dir: str = "runs"
    seed: int = 0
    rounds: int = 1
    round: RoundConfig = field(default_factory=RoundConfig)  # how rounds after the first begin
    mesh: MeshConfig = field(default_factory=MeshConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    select: SelectConfig = field(default_factory=SelectConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    # Comparison systems trained on the same candidates: name -> dotted overrides of this recipe. A name that ships
    # (docs/compare.md) starts from that system's own overrides.
    arms: dict[str, dict[str, Any]] = field(default_factory=dict)
    compare: CompareConfig = field(default_factory=CompareConfig)


def _hint(cls: type, path: typing.Sequence[str]) -> Any:
    """The annotation of the key that `path` leads to inside `cls`; None where it leads elsewhere."""
    hint: Any = cls
    for part in path:
        hint = typing.get_type_hints(hint).get(part) if dataclasses.is_dataclass(hint) else None
    return hint


def _known_keys(cls: type, path: typing.Sequence[str]) -> list[str]:
    """Field names of the dataclass that `path` leads to inside `cls` (empty where it leads elsewhere)."""
    hint = _hint(cls, path)
    return list(typing.get_type_hints(hint)) if dataclasses.is_dataclass(hint) else []


def _wanted(key: str) -> str | None:
    """What a key of the recipe takes, in words; None where it is not known."""
    known = _known_keys(Recipe, key.split("."))
    if known:
        return f"it is a section: set keys of it, like {key}.{known[0]}"
    hint = _hint(Recipe, key.split("."))
    if hint is None:
        return None
    return f"it takes {(hint.__name__ if isinstance(hint, type) else str(hint)).replace('typing.', '')}"


def _merge(base: Any, update: Any, where: str, key: str | None = None) -> Any:
    """`base` with `update`; `key` is the one that it sets, where it sets one."""
    try:
        return OmegaConf.merge(base, update)
    except ConfigKeyError as error:
        unknown = str(error.full_key)
        *parents, leaf = unknown.split(".")
        known = _known_keys(Recipe, parents)
        raise UserError(f"unknown key {unknown!r}{nearest(leaf, known) if known else ''}", where=where) from None
    except OmegaConfBaseException as error:
        place = getattr(error, "full_key", None) or key
        reason = str(error).splitlines()[0].rstrip(".")
        if "AnyNode" in reason or "Merge error" in reason:  # OmegaConf's own classes, which tell a user nothing
            reason = "the value does not fit"
        raise UserError(
            f"{place}: {reason}" if place else reason, where=where, remedy=_wanted(str(place)) if place else None
        ) from None


def _to_recipe(node: Any) -> Recipe:
    recipe = OmegaConf.to_object(node)
    assert isinstance(recipe, Recipe)
    return recipe


def load_recipe(path: str | Path | None, overrides: typing.Sequence[str] = ()) -> Recipe:
    """A recipe from a YAML file (or the defaults) and ``dotted.key=value`` overrides.

    Raises:
        UserError: missing or malformed file, unknown key (the nearest one is suggested), wrong type.
    """
    config = OmegaConf.structured(Recipe)
    if path is not None:
        path = Path(path)
        if not path.is_file():
            what = "a folder, not a recipe" if path.is_dir() else "no such recipe"
            raise UserError(what, where=str(path), remedy="see configs/ for the recipes that ship")
        try:
            loaded = OmegaConf.load(path)
        except Exception as error:  # yaml.YAMLError and its kin: the first line says where
            raise UserError(f"not valid YAML: {' '.join(str(error).split())}", where=str(path)) from None
        if not OmegaConf.is_dict(loaded):
            raise UserError("a recipe is a mapping of keys to values", where=str(path))
        config = _merge(config, loaded, str(path))
    for override in overrides:
        if "=" not in override or override.startswith("-"):
            raise UserError(
                f"cannot read {override!r}", where="command line", remedy="overrides are dotted.key=value"
            )
        try:
            read = OmegaConf.from_dotlist([override])
        except Exception:  # yaml.YAMLError and its kin, over several lines
            raise UserError(
                f"{override!r}: the value is not valid YAML",
                where="command line",
                remedy="quote it or close its brackets",
            ) from None
        config = _merge(config, read, "command line", override.partition("=")[0])
    return _to_recipe(config)


def override(recipe: Recipe, changes: dict[str, Any], where: str = "arms") -> Recipe:
    """A copy of `recipe` with ``{"dotted.key": value}`` replaced."""
    config = OmegaConf.structured(recipe)
    for key, value in changes.items():
        nested: Any = value
        for part in reversed(key.split(".")):
            nested = {part: nested}
        config = _merge(config, OmegaConf.create(nested), where, key)
    return _to_recipe(config)


T = typing.TypeVar("T")


def from_plain(kind: type[T], values: Mapping[str, Any], where: str) -> T:
    """A section of a recipe from what `dataclasses.asdict` made of it, as files of trained models hold it."""
    return typing.cast(
        T, OmegaConf.to_object(_merge(OmegaConf.structured(kind), OmegaConf.create(dict(values)), where))
    )


# Keys that change how a stage runs and nothing that it computes: a run may be continued with other values.
OPERATIONAL = {
    "score.endpoint": (
        *("concurrency", "requests_per_minute", "tokens_per_minute", "timeout_s", "max_retries", "retry_wait_s"),
        *("prompt_price", "completion_price", "max_cost", "cache_dir"),
    )
}


def essential(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe (or its `score` section under that key) as nested dictionaries, without the keys of `OPERATIONAL`."""
    copied = copy.deepcopy(dict(recipe))
    for path, keys in OPERATIONAL.items():
        section: Any = copied
        for part in path.split("."):
            section = section.get(part) if isinstance(section, dict) else None
        for key in keys if isinstance(section, dict) else ():
            section.pop(key, None)
    return copied


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe as YAML, as `config.yaml` of a run directory stores it."""
    return OmegaConf.to_yaml(OmegaConf.structured(recipe), resolve=True)
