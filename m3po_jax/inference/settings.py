"""How candidates are drawn: one setting for all candidates of a prompt, or one for each of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from m3po_jax.config import EvaluateConfig, GenerateConfig
from m3po_jax.errors import UserError
from m3po_jax.reading import check_value, check_values

# Settings that may differ between the candidates of one prompt.
PER_CANDIDATE = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "min_new_tokens")


@dataclass(frozen=True)
class SamplingConfig:
    """The distribution that candidates are drawn from. Recorded log-probabilities do not depend on it.

    The settings of `PER_CANDIDATE` take a number, or a tuple with a number for each candidate. They are applied
    in the order of `transformers`: stop bias, repetition penalty, suppressed tokens, then temperature, top-k,
    top-p, min-p.

    Attributes:
        temperature: 0 is greedy.
        top_k: 0 is off.
        top_p: 1 is off.
        min_p: least probability in units of the likeliest token's (Nguyen et al., arXiv:2407.01082); 0 is off.
        repetition_penalty: divides positive logits and multiplies negative ones of tokens that the answer holds
            already (Keskar et al., arXiv:1909.05858); 1 is off.
        repetition_penalty_prompt: counts the prompt's tokens too, as `transformers` does. Off, because a question
            names what its answer should be about: penalising its words pushes an answer off the subject.
        min_new_tokens: the end token is not drawn before so many others.
        greedy_member: candidate 0 is greedy, whatever its temperature.
        stop_bias: added to the end token's logit before a draw: positive makes shorter answers.
        stop_token_ids: tokens that get the stop bias instead, where an answer's end is announced before it comes.
        contrast_alpha: strength of visual contrastive decoding against the blanked image; 0 is off.
        contrast_beta: its plausibility cut.
        suppress_token_ids: never drawn, in addition to image and padding tokens.
    """

    num_candidates: int = 1
    temperature: float | tuple[float, ...] = 1.0
    top_k: int | tuple[int, ...] = 0
    top_p: float | tuple[float, ...] = 1.0
    max_new_tokens: int = 256
    seed: int = 0
    stop_bias: float = 0.0
    stop_token_ids: tuple[int, ...] = ()
    contrast_alpha: float = 0.0
    contrast_beta: float = 0.1
    suppress_token_ids: tuple[int, ...] = ()
    min_p: float | tuple[float, ...] = 0.0
    repetition_penalty: float | tuple[float, ...] = 1.0
    repetition_penalty_prompt: bool = False
    min_new_tokens: int | tuple[int, ...] = 0
    greedy_member: bool = False

    def __post_init__(self) -> None:
        for name in ("num_candidates", "max_new_tokens", *PER_CANDIDATE):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != self.num_candidates:
                raise UserError(f"{len(value)} values for {self.num_candidates} candidates", where=f"generate.{name}")
            for x in value if isinstance(value, tuple) else (value,):
                check_value(GenerateConfig, name, x, "generate")
                if name == "min_new_tokens" and x > self.max_new_tokens:
                    longest = f"max_new_tokens ({self.max_new_tokens})"
                    raise UserError(f"{x} is more than {longest}", where=f"generate.{name}")
        check_value(EvaluateConfig, "contrast_alpha", [self.contrast_alpha], "evaluate")
        if not 0 < self.contrast_beta <= 1:
            raise UserError(f"{self.contrast_beta} is not in (0, 1]", where="contrast_beta")

    def of_candidate(self, candidate: int) -> dict[str, Any]:
        """The settings of `PER_CANDIDATE` as candidate number `candidate` has them."""
        values = {name: getattr(self, name) for name in PER_CANDIDATE}
        settings = {name: x[candidate] if isinstance(x, tuple) else x for name, x in values.items()}
        if self.greedy_member and candidate == 0:
            settings["temperature"] = 0.0
        return settings

    def by_name(self) -> dict[str, Any]:
        """The settings of `PER_CANDIDATE`: a number where all candidates agree, else a list with one for each."""
        rows = [self.of_candidate(k) for k in range(self.num_candidates)]
        columns = {name: [row[name] for row in rows] for name in PER_CANDIDATE}
        return {name: x if len(set(x)) > 1 else x[0] for name, x in columns.items()}


def sampling_config(config: GenerateConfig, seed: int) -> SamplingConfig:
    """The engine's settings of a recipe: `generate.pool` becomes a value for each candidate.

    Raises:
        UserError: names the key that cannot be meant.
    """
    check_values(config, "generate")
    shared = {name: getattr(config, name) for name in PER_CANDIDATE}
    members: list[dict[str, Any]] = []
    for recipe in config.pool:
        stated = {name: getattr(recipe, name) for name in PER_CANDIDATE}
        merged = {name: shared[name] if value is None else value for name, value in stated.items()}
        members += [merged] * recipe.count
    if members and len(members) != config.num_candidates:
        raise UserError(
            f"the counts add up to {len(members)} candidates, generate.num_candidates is {config.num_candidates}",
            where="generate.pool",
            remedy=f"set generate.num_candidates={len(members)}",
        )
    per_candidate: dict[str, Any] = {
        name: tuple(m[name] for m in members) if members else shared[name] for name in PER_CANDIDATE
    }
    return SamplingConfig(
        num_candidates=config.num_candidates,
        max_new_tokens=config.max_new_tokens,
        seed=seed,
        suppress_token_ids=tuple(config.suppress_tokens),
        repetition_penalty_prompt=config.repetition_penalty_prompt,
        greedy_member=config.greedy_member,
        **per_candidate,
    )


def sampling_record(config: GenerateConfig, sampling: SamplingConfig, candidate: int) -> dict[str, Any]:
    """What a row's `sampling` says: the usual settings always, the others where they are not the defaults."""
    settings, default = sampling.of_candidate(candidate), GenerateConfig()
    record = {
        "temperature": settings["temperature"],
        "top_k": settings["top_k"],
        "top_p": settings["top_p"],
        "max_new_tokens": config.max_new_tokens,
        "seed": sampling.seed,
    }
    rare = {name: settings[name] for name in ("min_p", "repetition_penalty", "min_new_tokens")}
    for name in ("repetition_penalty_prompt", "suppress_tokens", "stop", "resample_duplicates"):
        rare[name] = getattr(config, name)
    return record | {name: value for name, value in rare.items() if value != getattr(default, name)}
