"""What an objective is: what it reads, what learns, its loss with its own settings, and what its numbers say.

The loop, the step, the guards and the stages are the same for all of them and ask the objective; nobody compares its
name. A new objective is a file with a subclass of `Objective`, and one entry in `objectives.registry`.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from m3po_jax.config import TrainConfig
from m3po_jax.data.batch_source import BatchSource
from m3po_jax.data.pair_rows import PairRows
from m3po_jax.data.schema import Prompt
from m3po_jax.errors import UserError
from m3po_jax.models.forward import VISION_TOWER


class LossOutput(NamedTuple):
    """What a loss gives for a batch.

    Attributes:
        loss: Of the batch; under gradient accumulation the micro-batches' are averaged, and so are
        metrics: means over the batch's rows.
        row_losses: One a row, which names the guilty rows when something is not finite.
        token_sums: Metrics that are means over answer tokens, as (sum, number of tokens), so that those of
            micro-batches add up.
    """

    loss: Float[Array, ""]
    metrics: dict[str, Float[Array, ""]]
    row_losses: Float[Array, " b"]
    token_sums: dict[str, tuple[Float[Array, ""], Float[Array, ""]]]


class LossContext(NamedTuple):
    """What a loss is given beside a model and a batch.

    Attributes:
        tokens: What the sum of an NLL is divided by; None: the batch's own answer tokens. In training it is the
            number of an average micro-batch: of the whole batch (`token_mean: batch`), which makes the average over
            micro-batches the token mean of the batch, or of all data (`token_mean: data`), so that a token weighs
            the same whichever rows it shares a batch with.
        reference_model: The reference model, where it runs in the step.
        remat: What the backward pass recomputes.
    """

    tokens: jax.Array | float | None = None
    reference_model: Any = None
    remat: str = "none"

    def denominator(self, count: Num[Array, ""]) -> Num[Array, ""]:
        """`tokens`, or the batch's own number of them; at least 1."""
        return jnp.maximum(count if self.tokens is None else self.tokens, 1)


BATCH_ALONE = LossContext()


class Learner(Enum):
    """What a training makes."""

    POLICY = "a language model, which answers questions"
    REWARD_MODEL = "a scalar head over a language model, which answers nothing"
    DUAL_ENCODER = "an encoder of images and texts, which answers nothing"


class Reads(Enum):
    """What a system of a run learns from."""

    PAIRS = "pairs"
    REFERENCES = "reference answers"
    PROMPTS = "prompts"  # which the policy answers, for a reward
    REWARD_PAIRS = "pairs of the reward model's side"
    CLAIMS = "claims about images"


@dataclasses.dataclass(frozen=True)
class Objective(ABC):
    """One objective with the settings that its loss reads: an object that can be hashed and compared.

    Fields of a subclass are keys under `train`, read by `of`.

    Attributes:
        base_learns: More of the decoder than its adapters has gradients; see `Decoder.needed_states`.
        tower_learns: The vision tower's output changes in training: it learns, or carries adapters.

        name: The value of `train.objective`.
        learner: What a training makes.
        draws_candidates: Its recipes draw candidates and have a judge; those of others train on rows.
        reads_rows: A recipe of its own (no arm) trains on rows of `train.data`.
        answers: Branches of a row of its batches, where these are prompts with answers.
        uses_reference: The loss compares with a reference, recorded in the batch or computed.
        shared_fields: Fields of a batch that belong to all its rows, so that micro-batches do not divide them.
        whole_model: Every parameter learns, whatever `lora` and `freeze` say.
        unread: Layers that the loss does not read, so that they do not learn.
        needs_first_gradient: A first step without gradient means that nothing can be learned.
    """

    base_learns: bool
    tower_learns: bool

    name: ClassVar[str]
    learner: ClassVar[Learner] = Learner.POLICY
    draws_candidates: ClassVar[bool] = False
    reads_rows: ClassVar[bool] = False
    answers: ClassVar[int | None] = None
    uses_reference: ClassVar[bool] = False
    shared_fields: ClassVar[tuple[str, ...]] = ()
    whole_model: ClassVar[bool] = False
    unread: ClassVar[tuple[str, ...]] = ()
    needs_first_gradient: ClassVar[bool] = True

    @classmethod
    def of(cls, config: TrainConfig) -> Self:
        """The objective with its settings of `config`, which `check` has not seen yet."""
        lora = config.lora
        adapted = lora.lora_rank > 0 and any(name.startswith(f"{VISION_TOWER}.") for name in lora.target_modules)
        return cls(
            base_learns=lora.lora_rank == 0,
            tower_learns=config.train_vision or adapted or cls.whole_model,
            **cls._settings(config),
        )

    @classmethod
    def _settings(cls, config: TrainConfig) -> dict[str, Any]:
        """Values of the fields that a subclass adds."""
        shared = {field.name for field in dataclasses.fields(Objective)}
        return {f.name: getattr(config, f.name) for f in dataclasses.fields(cls) if f.name not in shared}

    # The loss.

    @abstractmethod
    def loss(self, model: Any, batch: Any, context: LossContext = BATCH_ALONE) -> LossOutput:
        """The loss of a batch under a model."""

    def answer_tokens(self, batch: Any) -> jax.Array | None:
        """Answer tokens of a batch, where the loss averages over tokens: what a sum over them is divided by, whole or
        accumulated, unless the step is given another number."""
        return None

    def check(self, config: TrainConfig) -> None:
        """
        Raises:
            UserError: settings that this objective cannot mean.
        """
        if config.batch_size % config.gradient_accumulation_steps:
            raise UserError(
                f"batch_size {config.batch_size} does not divide into {config.gradient_accumulation_steps} parts",
                where="train.gradient_accumulation_steps",
            )

    def first_values(self, tolerance: float) -> dict[str, tuple[float, float]]:
        """{metric: (value, tolerance)} known before the first update, when the policy is its reference.

        Args:
            tolerance: Of a log-prob sum, in nats.
        """
        return {}

    @property
    def computes_reference(self) -> bool:
        """Whether the reference model runs for every row, whatever the batches bring along."""
        return False

    @property
    def needs_reference_pass(self) -> bool:
        """Whether the reference must run in the step even where the generator's sums are recorded."""
        return False

    # Its data.

    @property
    @abstractmethod
    def reads(self) -> Reads:
        """What a system of a run learns from."""

    def batches_of_pairs(self, pairs: PairRows, processor: Any, *, where: str, **options: Any) -> BatchSource[Any]:
        """Batches of preference pairs; `options` are those of `data.batches.sft_batches`."""
        raise TypeError(f"{self.name} learns from no pairs")

    def batches_of_rows(
        self, rows: Sequence[Prompt], processor: Any, *, claim_template: str, **options: Any
    ) -> BatchSource[Any]:
        """Batches of rows of `train.data`; `options` as of `batches_of_pairs`."""
        raise TypeError(f"{self.name} learns from no rows")

    # What it is called.

    def system_name(self, rule: str) -> str:
        """What a recipe's own system is called in tables and reports; `rule`: how its pairs are selected."""
        return self.name

    @abstractmethod
    def description(self, rule: str, judge: str) -> tuple[str, list[str]]:
        """How weights were trained, in words, and the hub's tags for it.

        Args:
            rule, judge: How pairs are selected, and the backend of their scores.
        """

    def facts(self) -> dict[str, str]:
        """Settings that a model card shows beside those of every training."""
        return {}

    @classmethod
    def starting_loss(cls, train: Mapping[str, Any]) -> tuple[float, str] | None:
        """The value at which the training loss begins, and its label in the report's chart, if there is one.

        Args:
            train: A finished run's settings under `train`, as far as they can be read.
        """
        return None


def first_branch_tokens(batch: Any) -> jax.Array:
    return jnp.sum(batch.branch_mask[:, 0], dtype=jnp.float32)


def check_frozen_tower(config: TrainConfig) -> None:
    """Raises UserError where the whole vision tower is to learn."""
    if config.train_vision:
        raise UserError("the vision tower learns in sft only", where="train.train_vision", remedy="set false")
