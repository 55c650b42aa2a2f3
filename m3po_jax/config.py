"""Recipes: every key with its default, what it may hold, and its meaning.

A recipe is one `Recipe`; every field has a default, so that a YAML file states only what it changes. An annotation
says what a key may hold (fields.py), the comment behind or above it what it means; docs/recipes.md shows both. Names
follow TRL and PEFT where those have one. recipes.py reads and writes recipes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from m3po_jax.fields import OPERATIONAL, FileName, Length, LocalPath, OneOf, Overrides, Range, Words

# The largest sizes lie far beyond what machines hold, and are small enough for every computation with them.
Seed = Annotated[int, Range(0, 2**31 - 1)]
Count = Annotated[int, Range(1, 1_000_000_000)]
CountOrZero = Annotated[int, Range(0, 1_000_000_000)]
Rows = Annotated[int, Range(1, 1_048_576)]  # that are computed together
Parts = Annotated[int, Range(-1, 65_536, but=0)]
Rank = Annotated[int, Range(0, 65_536)]
Tokens = Annotated[int, Range(1, 1_048_576)]
TokensOrZero = Annotated[int, Range(0, 1_048_576)]
Candidates = Annotated[int, Range(1, 4096)]
Resamples = Annotated[int, Range(1, 1_000_000)]
Share = Annotated[float, Range(0.0, 1.0)]
PartOfAll = Annotated[float, Range(above=0.0, most=1.0)]
Between = Annotated[float, Range(above=0.0, below=1.0)]
Decay = Annotated[float, Range(0.0, below=1.0)]
NotNegative = Annotated[float, Range(0.0, 1e9)]
Positive = Annotated[float, Range(above=0.0, most=1e9)]
Finite = Annotated[float, Range(-1e9, 1e9)]
Rate = Annotated[float, Range(above=0.0, most=1000.0)]
Dtype = Literal["float32", "bfloat16", "float16"]
Name = Annotated[str, FileName()]  # of a folder
File = Annotated[str, LocalPath()]  # or folder, of this machine
Variant = Annotated[str, OneOf("scoring.confidence:VARIANTS")]
Rule = Annotated[str, OneOf("selection:RULES")]
LossName = Annotated[str, OneOf("objectives.loss_types:LOSSES")]
Tracker = Annotated[str, OneOf("training.trackers:TRACKERS")]
Cache = Annotated[str, Words("off", "auto"), LocalPath()]


@dataclass
class MeshConfig:
    """Sizes of the device mesh; -1 takes all devices that are left."""

    data: Parts = -1
    fsdp: Parts = 1
    tensor: Parts = 1


@dataclass
class ModelConfig:
    """A model directory in Hugging Face layout, and how to run it."""

    path: File = ""  # a local directory or a hub id; `builtin:NAME` for the checkpoints that ship with the package
    # of a hub id: a branch, a tag or a commit; OWNER/NAME@REVISION says the same wherever a hub id can stand
    revision: str = ""
    dtype: Dtype = "bfloat16"  # computation
    # frozen weights; trained ones are float32
    param_dtype: Dtype = "bfloat16"
    # of the language model's frozen linear layers
    quantization: Annotated[str, OneOf("models.quantization:QUANTIZATION")] = "none"
    # random: a directory with config.json alone starts from seed
    init: Literal["pretrained", "random"] = "pretrained"
    # a CLIP directory whose tower replaces the model's own (original LLaVA releases lack one)
    vision_tower: File = ""
    # chat: the model directory's own template; see data/templates.py
    template: Annotated[str, OneOf("data.templates:TEMPLATES", "chat")] = "vicuna_v1"
    image_fit: Annotated[str, OneOf("data.images:IMAGE_FITS")] = "pad"  # see data/images.py
    # smaller images are scaled up to so many, where a model's images have several sizes; null: the directory's own
    min_pixels: Count | None = None
    # larger images are scaled down to so many, where a model's images have several sizes; null: the directory's own
    max_pixels: Count | None = None
    pan_and_scan: bool = False  # Gemma 3: an elongated image is followed by up to four crops of it
    # what the backward pass recomputes
    remat: Annotated[str, OneOf("models.layers:REMAT_POLICIES"), OPERATIONAL] = "full"
    # pallas: TPU kernels; cudnn: NVIDIA GPUs, 16-bit types
    attention: Annotated[str, OneOf("models.kernels.choice:ATTENTION"), OPERATIONAL] = "xla"
    # image tokens included; longer rows are refused, never truncated
    max_prompt_tokens: Annotated[Tokens, OPERATIONAL] = 1024


@dataclass
class DataConfig:
    """Where rows come from: `source` names the reader, `path` is its argument."""

    # the reader, see data.md; jsonl: or what the path shows itself to be
    source: Annotated[str, OneOf("data.sources:READERS")] = "jsonl"
    path: File = ""
    split: str = "train"
    image_root: File = ""  # relative image paths stay inside it; default: the data file's folder
    limit: Count | None = None
    max_image_pixels: Annotated[Count, OPERATIONAL] = 50_000_000  # a larger image is refused before it is decoded
    # most sizes that rows of images are padded to, where a model's images have several; chosen for the data
    image_buckets: Annotated[int, Range(1, 64), OPERATIONAL] = 6
    # an image's EXIF orientation; LLaVA's own code ignores it
    exif: Annotated[str, OneOf("data.schema:EXIF")] = "apply"
    instruction: str = ""  # of rows that have none, such as the images of a folder
    # skip: bad rows are left out and counted
    on_bad_row: Annotated[str, OneOf("data.checker:ON_BAD_ROW")] = "stop"


@dataclass
class PoolMember:
    """Settings of `count` candidates of every prompt; what is not given is as under `generate`."""

    count: Candidates = 1
    temperature: NotNegative | None = None
    top_k: CountOrZero | None = None
    top_p: PartOfAll | None = None
    min_p: Share | None = None
    repetition_penalty: Positive | None = None
    min_new_tokens: TokensOrZero | None = None


@dataclass
class GenerateConfig:
    """Candidates: how many, and the distribution they are drawn from."""

    num_candidates: Candidates = 8
    temperature: NotNegative = 1.0
    top_k: CountOrZero = 0  # 0: off
    top_p: PartOfAll = 1.0
    min_p: Share = 0.0  # least probability, in units of the likeliest token's; 0: off
    repetition_penalty: Positive = 1.0  # over the answer's own tokens; 1: off
    repetition_penalty_prompt: bool = False  # over the prompt's tokens too, as transformers does
    min_new_tokens: TokensOrZero = 0  # no end token before so many others
    max_new_tokens: Tokens = 256
    # ids never drawn (image, padding, unused ids never are)
    suppress_tokens: list[CountOrZero] = field(default_factory=list)
    # An answer is cut before the first of these strings; the device decodes on to the end token or the limit.
    stop: list[Annotated[str, Length(1, 1000)]] = field(default_factory=list)
    greedy_member: bool = False  # candidate 0 is greedy
    # Of {count, temperature, top_k, top_p, min_p, repetition_penalty, min_new_tokens}; counts make num_candidates
    pool: list[PoolMember] = field(default_factory=list)
    # times that a candidate with the text of another of its prompt is drawn again
    resample_duplicates: Annotated[int, Range(0, 1000)] = 0
    batch_size: Annotated[Rows, OPERATIONAL] = 16  # prompts in flight
    shard_rows: Annotated[int, Range(1, 1_000_000)] = 256  # prompts in one output shard, the unit of resumption


@dataclass
class EnsembleConfig:
    """When an ensemble abstains because its members disagree (scoring/ensemble.py)."""

    # the rank correlation of two members in a pool
    correlation: Annotated[str, OneOf("scoring.ensemble:CORRELATIONS")] = "spearman"
    min_correlation: Annotated[float, Range(-1.0, 1.0)] = 0.0  # below it they disagree; -1: off
    max_gap: NotNegative = 0.25  # each holds the other's best for worse than its own by more than this; 1: off
    max_opposed_z: NotNegative | None = None  # a candidate's z-scores oppose each other beyond this; null: off
    min_contrast: NotNegative = 1e-3  # a member whose scores vary less in a pool has no opinion


@dataclass
class EndpointConfig:
    """An OpenAI-compatible server as judge (scoring/endpoint.py)."""

    base_url: str = ""  # up to and with /v1; `/chat/completions` is added
    model: str = ""  # the server's name for the judge
    api_key_env: str = ""  # the environment variable that holds the key; empty: no key is sent
    allow_insecure: bool = False  # send the key over plain http to another machine
    temperature: NotNegative = 0.0  # of the judge
    logprobs: bool = False  # ask for the grade tokens' log-probs: the expected grade instead of the given one
    # larger images are scaled down to this before they are sent
    max_image_side: Annotated[int, Range(1, 65_536)] = 1024
    extra_body: dict[str, Any] = field(default_factory=dict)  # more of the request; a null removes a key
    # A run may be continued with other values of what follows, which change no score.

    # of an answer, its thinking included; one that is cut has no grade
    max_tokens: Annotated[Tokens, OPERATIONAL] = 16
    # after an answer without a grade; then the candidate has no score
    max_reasks: Annotated[int, Range(0, 1000), OPERATIONAL] = 2
    concurrency: Annotated[int, Range(1, 4096), OPERATIONAL] = 8  # requests in flight
    requests_per_minute: Annotated[float, Range(0.0, 1e9), OPERATIONAL] = 0.0  # 0: no limit
    tokens_per_minute: Annotated[float, Range(0.0, 1e12), OPERATIONAL] = 0.0  # prompt and completion; 0: no limit
    timeout_s: Annotated[float, Range(above=0.0, most=86_400.0), OPERATIONAL] = 60.0  # of one request
    # after a time-out, a lost connection, status 408, 409, 429 or 5xx; the waits grow from 0.5 to 8 s
    max_retries: Annotated[int, Range(0, 10_000), OPERATIONAL] = 10
    prompt_price: Annotated[float, Range(0.0, 1e9), OPERATIONAL] = 0.0  # of a million prompt tokens, in any currency
    completion_price: Annotated[float, Range(0.0, 1e9), OPERATIONAL] = 0.0  # of a million completion tokens
    # scoring stops before this is spent; null: no limit
    max_cost: Annotated[float | None, Range(0.0, 1e12), OPERATIONAL] = None
    # paid answers, shared by all runs that name it; empty: OUTPUT_DIR/endpoint-cache
    cache_dir: Annotated[str, LocalPath(), OPERATIONAL] = ""


@dataclass
class ScoreConfig:
    """The alignment score (MAS) and the confidence variants."""

    backend: Annotated[str, OneOf("pipeline.backends:BACKENDS")] = "claims"  # who scores, see judges.md
    members: list[Annotated[str, LocalPath("=")]] = field(default_factory=list)  # of an ensemble: NAME or NAME=MODEL
    ensemble: EnsembleConfig = field(default_factory=EnsembleConfig)
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)
    rubric: str = ""  # judge, endpoint: the question, with {instruction} and {answer}; empty: see scoring/grading.py
    # judge, endpoint: worst to best
    grades: Annotated[list[Annotated[int, Range(-1_000_000, 1_000_000)]], Length(2, 1000)] = field(
        default_factory=lambda: [1, 2, 3, 4, 5]
    )
    min_grade_mass: Share = 0.05  # judge: abstains where all grades together are less likely
    judge_template: str = ""  # claims: the question about {claim}; empty: see scoring/judge.py
    model: File = ""  # the judge or the dual encoder (a model directory)
    unit: Annotated[str, OneOf("scoring.alignment:UNITS")] = "claim"  # similarity: what is compared with the image
    aggregate: Annotated[str, OneOf("scoring.alignment:AGGREGATES")] = "mean"  # of claims; soft_f1 needs `vocabulary`
    vocabulary: list[str] = field(default_factory=list)  # soft_f1: the claims that could have been made
    claim_template: str = "{claim}"  # the text that stands for one claim in the dual encoder
    # variants that are computed, see method.md
    confidence: list[Variant] = field(default_factory=lambda: ["mean"])
    batch_size: Annotated[Rows, OPERATIONAL] = 32  # prompts


@dataclass
class SelectConfig:
    """The M3P-Score and the rules that a pair must satisfy (docs/method.md)."""

    rule: Rule = "m3p"
    confidence: Variant = "mean"  # the variant that enters the score
    # another variant for the rejected role; empty: the same
    confidence_dispreferred: Annotated[str, OneOf("", "scoring.confidence:VARIANTS")] = ""
    lambda_preferred: Finite = 0.2
    lambda_dispreferred: Finite = 1.0
    chosen_floor: Finite = 0.5  # least MAS of a chosen answer
    margin: NotNegative = 0.1  # least MAS gap between chosen and rejected
    min_rejected_z: Finite = -2.0  # hardness band: a rejected answer is not garbage
    # rejected / chosen, in tokens
    length_ratio: Annotated[list[NotNegative], Length(2, 2)] = field(default_factory=lambda: [0.5, 2.0])
    max_similarity: Share = 0.9  # near-duplicates drive likelihood displacement
    min_contrast: NotNegative = 1e-3  # least standard deviation of MAS within a pool
    lexicographic: Annotated[list[Finite], Length(2, 2)] = field(default_factory=lambda: [0.7, 0.4])  # τ₊, τ₋
    # only each prompt's first so many candidates take part: a smaller K on one pool
    candidates: Annotated[int, Range(2, 4096)] | None = None
    # answers cut at generate.max_new_tokens: drop (they are in no pair) or keep
    cut: Annotated[str, OneOf("selection:CUT_RULES")] = "drop"
    budget: PartOfAll = 1.0  # the share of pairs that is kept
    max_pairs: Count | None = None  # at most so many are kept
    # value: the best pairs; random: any, the same prompts for every rule
    budget_by: Annotated[str, OneOf("selection:BUDGET_ORDERS")] = "value"
    budget_within: str = ""  # a key of the prompts' metadata (kind, say) in whose groups values are ranked apart
    seed: Seed = 0


@dataclass
class LoRAConfig:
    lora_rank: Rank = 128  # 0: full fine-tuning
    lora_alpha: Positive = 256.0
    # Layer names of the language model, or PART.NAME: vision_tower.q_proj, projector.linear_1
    target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    train_projector: bool = False


@dataclass
class RLConfig:
    """Reinforcement learning on the reward model (`train.objective: rlhf`); TRL's names."""

    # ppo: with a value head and GAE
    algorithm: Annotated[str, OneOf("objectives.rlhf:ALGORITHMS")] = "rloo"
    rloo_k: Candidates = 4  # answers of a prompt in a rollout, at least 2 for rloo
    temperature: Positive = 1.0  # of the rollouts; log-probs are those of temperature 1
    kl_coef: NotNegative = 0.05  # weight of the KL to the reference in the reward
    # see objectives/policy_gradient.py
    kl_estimator: Annotated[str, OneOf("objectives.policy_gradient:KL_ESTIMATORS")] = "k1"
    kl_target: Positive | None = None  # KL of an answer that an adaptive kl_coef holds; null: kl_coef is fixed
    kl_horizon: Count = 10_000  # answers in which an adaptive kl_coef can change by a fifth of itself
    num_ppo_epochs: Annotated[int, Range(1, 1000)] = 1  # passes over a rollout
    # optimizer steps of a pass; a rollout has so many times train.batch_size prompts
    num_mini_batches: Annotated[int, Range(1, 65_536)] = 1
    cliprange: Positive = 0.2  # of the ratio of new and old probability
    missing_eos_penalty: NotNegative = 0.0  # taken from the score of an answer cut at generate.max_new_tokens
    normalize_advantages: bool = False  # rloo: mean 0, standard deviation 1 over a rollout
    # ppo alone
    gamma: Share = 1.0  # discount
    lam: Share = 0.95  # λ of GAE
    vf_coef: NotNegative = 0.1  # weight of the value loss
    cliprange_value: Positive = 0.2  # how far a value may move from that of the rollout
    whiten_rewards: bool = False  # unit variance of the tokens' rewards


@dataclass
class TrainConfig:
    objective: Annotated[str, OneOf("objectives.registry:OBJECTIVES")] = "preference"  # see training.md
    data: list[DataConfig] = field(default_factory=list)  # sft, contrastive: joined; empty: the recipe's `data`
    # preference, sft on chosen answers: a file (or folder) of pairs to learn from instead of a run's own, see data.md
    pairs: File = ""
    # an arm of objective sft learns the pairs' chosen | the data's reference answers
    sft_answers: Literal["chosen", "reference"] = "chosen"
    # a loss of training.md; mixture: those of `loss_weights`
    loss_type: Annotated[str, OneOf("objectives.loss_types:LOSSES", "mixture")] = "sigmoid"
    # MPO: {sigmoid: 0.8, bco_pair: 0.2, sft: 1.0}
    loss_weights: dict[LossName, NotNegative] = field(default_factory=dict)
    beta: Positive = 0.1
    label_smoothing: Annotated[float, Range(0.0, 0.5)] = 0.0
    f_divergence_type: Annotated[str, OneOf("objectives.divergences:DIVERGENCES")] = "reverse_kl"  # reverse_kl: DPO
    f_alpha_divergence_coef: Finite = 0.5  # α of alpha_divergence
    ld_alpha: Share | None = None  # LD-DPO: weight of the tokens beyond the shorter answer's length; null: off
    ld_alpha_reference: bool = True  # in the reference's sums too (TRL 1.16); false: the policy's alone
    discopop_tau: Positive = 0.05  # width of discopop's gate
    simpo_gamma: Finite = 0.5  # simpo's target margin, in units of reward
    chosen_nll_weight: NotNegative = 0.0  # anchor: per-token NLL of the chosen answer (RPO)
    conditional_weight: NotNegative = 0.0  # mDPO: the chosen answer is preferred to itself with a corrupted image
    # the corrupted image; swap: another row's
    conditional_image: Annotated[str, OneOf("objectives.model_passes:CORRUPTIONS")] = "blank"
    anchor_weight: NotNegative = 0.0  # mDPO: the chosen answer's reward stays above `anchor_delta`
    anchor_delta: Finite = 0.0  # in units of reward
    # recorded at generation, or computed by the reference model
    reference: Literal["recorded", "computed"] = "recorded"
    # recorded log-probs of so many rows are computed again and compared; 0: none
    reference_check_rows: Annotated[int, Range(0, 65_536)] = 8
    center_rewards_coefficient: NotNegative = 0.01  # reward: weight of (r_w + r_l)², which keeps rewards around 0
    reward_margin: NotNegative = 0.0  # reward: by how much a chosen answer should win
    rl: RLConfig = field(default_factory=RLConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    train_vision: bool = False  # sft only: the vision tower learns too
    # With lora_rank 0, the parts of the model that do not learn; the projector alone: [decoder]
    freeze: list[str] = field(default_factory=list)
    learning_rate: Rate = 2e-6
    lr_schedule: Annotated[str, OneOf("training.optimizer:SCHEDULES")] = "cosine"  # after the warm-up
    warmup_ratio: Share = 0.03
    warmup_steps: CountOrZero | None = None  # overrides the ratio
    adam_beta1: Decay = 0.9  # decay of the mean of gradients
    adam_beta2: Decay = 0.999  # and of the mean of their squares
    adam_epsilon: Annotated[float, Range(above=0.0, most=1.0)] = 1e-8  # larger: gradients near rounding move nothing
    weight_decay: NotNegative = 0.0
    max_grad_norm: NotNegative = 1.0
    ema_decay: Decay = 0.0  # of a moving average of what learns; 0: none is kept
    weights: Literal["last", "ema", "best"] = "last"  # what the stage hands on
    batch_size: Rows = 32  # pairs (or rows) of one optimizer step
    gradient_accumulation_steps: Rows = 1
    # rows of so many shuffled batches are exchanged to batches of like lengths; 1: off
    length_window: Annotated[int, Range(1, 1_000_000)] = 32
    # An NLL's sum (sft, chosen_nll_weight) is divided by the answer tokens of an average batch of the data, whatever
    # rows share a batch (data) | of each batch, as in TRL (batch)
    token_mean: Literal["data", "batch"] = "data"
    # most (prompt, answer) widths that batches are padded to, each compiled once
    max_shapes: Annotated[int, Range(1, 4096)] = 16
    epochs: Positive = 1.0
    max_steps: Count | None = None  # overrides epochs
    max_answer_tokens: Tokens = 256
    save_steps: Count = 50
    keep_checkpoints: Annotated[int, Range(1, 1_000_000)] = 2  # the last so many
    keep_best: Annotated[int, Range(0, 1_000_000)] = 0  # and so many with the best `best_metric`
    best_metric: str = "loss"  # mean since the checkpoint before; least of a loss or NLL, else most
    log_steps: Count = 1
    # beside metrics.jsonl
    report_to: list[Tracker] = field(default_factory=list)
    # warns when chosen answers lose so many nats per token while margins grow; 0: off
    collapse_warning: NotNegative = 0.5
    harm_metrics_steps: CountOrZero = 0  # steps between measures of what the text alone teaches; 0: off


@dataclass
class RewardConfig:
    """The reward model of the arms `rm_dpo` and `rlhf`, and of `train.objective: reward`.

    It learns from pairs of the prompts on its side of `split`; the arms that use it see the others alone.
    """

    # share of the prompts, by a hash of their ids, that only the reward model sees
    split: Between = 0.5
    # share of its pairs that measure its accuracy instead
    holdout: Between = 0.1
    # how its pairs are made from scored candidates; a `select.rule`
    rule: Rule = "vanilla"
    # at most so many different pairs of a prompt; more than one: vanilla or random alone
    pairs_per_prompt: Annotated[int, Range(1, 1_000_000)] = 1
    # a file (or folder) of pairs to learn from instead, see data.md; the split does not apply
    pairs: File = ""
    learning_rate: Rate | None = None  # null: that of `train`; so are the next four
    # 0: its backbone learns as a whole, while the policy has adapters
    lora_rank: Rank | None = None
    batch_size: Rows | None = None  # pairs of one optimizer step
    epochs: Positive | None = None  # passes over its pairs
    max_steps: Count | None = None  # overrides epochs; null where `epochs` is given here: by epochs


@dataclass
class CacheConfig:
    """What is computed once and kept on disk under a hash of its contents: off, a folder, or auto
    (`output_dir`/cache, shared by all runs there)."""

    # of a frozen tower; width × image tokens × size of dtype: 1.2 MB an image at 7B
    vision_features: Cache = "off"
    # log-prob sums of a computed reference, 16 bytes a pair
    reference: Cache = "off"


@dataclass
class BenchmarkConfig:
    """One benchmark: whose rule scores the answers, and where the questions come from."""

    metric: Annotated[str, OneOf("evaluation.registry:METRICS")] = "pope"  # see evaluation.md
    data: DataConfig = field(default_factory=DataConfig)
    kind: str = ""  # only rows whose metadata has this `kind`; empty: all rows
    rule: str = ""  # how answers are read, of those that the metric has (evaluation.md); empty: its default
    # chair: the objects, each a name or "name, other word, …"; empty: the names that the rows have
    vocabulary: list[str] = field(default_factory=list)
    synonyms: File = ""  # chair: the official synonyms.txt, for rule: official
    association: File = ""  # amber: its relation.json
    safe_words: File = ""  # amber: its safe_words.txt
    # amber: vocabulary (words that the association file has) or nltk (official)
    nouns: Literal["vocabulary", "nltk"] = "vocabulary"
    similarity: str = "exact"  # amber: exact | a spaCy model; en_core_web_lg is official


@dataclass
class GateConfig:
    """How far a number may drop below the base's before the command fails (docs/evaluation.md, the gate)."""

    drop: NotNegative = 0.0  # in the unit that tables show: points of a percentage, or the number's own


@dataclass
class EvaluateConfig:
    """Benchmarks by name, and the decoding of evaluation answers (greedy)."""

    benchmarks: dict[Name, BenchmarkConfig] = field(default_factory=dict)
    max_new_tokens: Tokens = 128
    batch_size: Annotated[Rows, OPERATIONAL] = 16
    stop_bias: list[Finite] = field(default_factory=list)  # the base model's stop-bias frontier (chair benchmarks)
    # The words that get the bias, each one token, where they announce an answer's end; empty: the end token.
    stop_words: list[str] = field(default_factory=list)
    contrast_alpha: list[NotNegative] = field(default_factory=list)  # contrastive decoding (VCD) of the base model
    bootstrap_samples: Resamples = 1000
    # BENCHMARK.NUMBER -> how far the recipe's own system may drop there, e.g. {pope.accuracy: {drop: 1.0}}
    gate: Annotated[dict[str, GateConfig], OPERATIONAL] = field(default_factory=dict)


@dataclass
class RoundConfig:
    """What later rounds take over from earlier ones."""

    # the reference model of a round; previous: the round's generator
    reference: Annotated[str, OneOf("pipeline.rounds:REFERENCES")] = "previous"
    # share of a round's training pairs that come from earlier rounds
    mix_previous: Decay = 0.0


@dataclass
class CompareConfig:
    """`m3po compare`: systems × seeds on shared candidates (docs/compare.md)."""

    # Systems that ship (docs/compare.md) or of `arms`; base and its stop-bias frontier are always there
    arms: list[str] = field(default_factory=lambda: ["vcd", "sft_chosen", "dpo", "mas_dpo", "low_confidence", "m3po"])
    seeds: Annotated[list[Seed], Length(1, 1000)] = field(default_factory=lambda: [0, 1, 2])
    per_seed: dict[str, str] = field(default_factory=dict)  # dotted key -> text with {seed}, e.g. model.path
    against: list[str] = field(default_factory=lambda: ["base", "mas_dpo"])  # paired differences against these
    main: str = "m3po"  # the system whose success is judged
    equal_pairs: bool = True  # every arm trains on as many pairs as the arm with the fewest
    # budgets of the data-efficiency curve, e.g. [0.25, 1.0]
    efficiency: list[PartOfAll] = field(default_factory=list)
    efficiency_of: list[str] = field(default_factory=list)  # the systems that it is drawn for; empty: `main`
    resamples: Resamples = 1000  # bootstrap samples of the intervals


@dataclass
class Recipe:
    """Everything one run needs."""

    name: Name = "run"
    output_dir: File = "runs"
    seed: Seed = 0
    rounds: Annotated[int, Range(1, 1000)] = 1
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
    arms: dict[Name, Annotated[dict[str, Any], Overrides("config:Recipe")]] = field(default_factory=dict)
    compare: CompareConfig = field(default_factory=CompareConfig)
