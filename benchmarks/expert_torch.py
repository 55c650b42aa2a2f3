"""What someone who knows torch writes by hand for a LLaVA: the strongest peer of the benchmarks.

- The image is encoded once a prompt, up to the layer whose features are used; the prompt is prefilled once, and
  its last layer computes queries and MLP for the last token alone.
- The K candidates read one copy of the prefix's keys and values: their queries are the rows of one product.
- Keys and values of the answers are preallocated; steps write in place and read the written part only.
- Queries, keys and values are one product and so are gate and up; the scale of attention is folded into the
  queries' weights; residuals are added inside the products.
- One pass of exponentials over the vocabulary gives both the draw (by inverting the distribution in two levels,
  an order of magnitude cheaper than `torch.multinomial`) and the log-probability.
- The head is stored input-major, which is the faster layout for a handful of rows.

Shape suffixes: P prompts, S prefix tokens, K candidates, T new tokens, H heads, D head width, E model width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

KV = tuple[Tensor, Tensor]


def _block_width(vocabulary: int) -> int:
    """The largest divisor that is at most √vocabulary, from which blocks of about that size are made."""
    return vocabulary // next(n for n in range(math.isqrt(vocabulary), 0, -1) if vocabulary % n == 0)


def draw(logits: Tensor, width: int, greedy: bool) -> KV:
    """One token a row of [N, V] logits, and its log-probability."""
    top = logits.amax(-1, keepdim=True)
    blocks = torch.exp(logits - top).view(len(logits), -1, width)
    mass = blocks.sum(-1).cumsum(-1)
    if greedy:
        token = logits.argmax(-1)
    else:
        point = torch.rand(len(logits), 1) * mass[:, -1:]
        block = torch.searchsorted(mass, point, right=True).clamp_(max=mass.shape[1] - 1)
        before = torch.where(block > 0, mass.gather(1, (block - 1).clamp_(min=0)), 0.0)
        inside = blocks.gather(1, block[:, :, None].expand(-1, -1, width))[:, 0].cumsum(-1)
        place = torch.searchsorted(inside, point - before, right=True).clamp_(max=width - 1)
        token = (block * width + place)[:, 0]
    normaliser = mass[:, -1].log() + top[:, 0]
    return token, logits.gather(1, token[:, None])[:, 0] - normaliser


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), -1) * sin


class Expert:
    """A hand-written engine on the weights of a `LlavaForConditionalGeneration` with full multi-head attention.

    Args:
        longest: tokens of the longest prompt with its answer.
        compiled: runs decode steps under `torch.compile`; the answers' cache then has static shapes.
    """

    CHUNK = 64  # compiled steps read the cache in multiples of this, so that short answers do not read long ones'

    def __init__(self, model: Any, *, longest: int, compiled: bool = False):
        config = model.config.text_config
        assert config.num_key_value_heads == config.num_attention_heads
        self.config = model.config
        self.heads, self.width = config.num_attention_heads, config.hidden_size
        self.depth = self.width // self.heads
        self.eps, self.vocabulary = config.rms_norm_eps, config.vocab_size
        self.block = _block_width(self.vocabulary)
        self.compiled = compiled
        decoder = model.model.language_model
        self.tower, self.projector = model.model.vision_tower, model.model.multi_modal_projector
        feature_layer = self.config.vision_feature_layer
        assert isinstance(feature_layer, int) and self.config.vision_feature_select_strategy == "default"
        total = len(self.tower.encoder.layers)
        self.tower_layers = self.tower.encoder.layers[
            : feature_layer if feature_layer >= 0 else total + 1 + feature_layer
        ]
        with torch.no_grad():
            self.embedding = decoder.embed_tokens.weight.detach()
            self.head = model.lm_head.weight.detach().t().contiguous()
            self.norm = decoder.norm.weight.detach()
            self.layers = [self._fused(layer) for layer in decoder.layers]
            cos, sin = decoder.rotary_emb(self.embedding, torch.arange(longest)[None])
            self.cos, self.sin = cos[0], sin[0]
        self.step = torch.compile(self._step, dynamic=False) if compiled else self._step

    def _fused(self, layer: Any) -> tuple[Tensor, ...]:
        attention, mlp = layer.self_attn, layer.mlp
        q = attention.q_proj.weight * self.depth**-0.5
        parts = (
            layer.input_layernorm.weight,
            torch.cat([q, attention.k_proj.weight, attention.v_proj.weight]),
            attention.o_proj.weight.t(),
            layer.post_attention_layernorm.weight,
            torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]),
            mlp.down_proj.weight.t(),
        )
        return tuple(part.detach() for part in parts)

    def _rms(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (self.width,), weight, self.eps)

    def _finish(self, x: Tensor, attended: Tensor, layer: tuple[Tensor, ...]) -> Tensor:
        """Output projection, MLP and both residuals of [N, E] rows."""
        _, _, out, norm, gate_up, down = layer
        x = torch.addmm(x, attended, out)
        gate, up = F.linear(self._rms(x, norm), gate_up).chunk(2, -1)
        return torch.addmm(x, F.silu(gate) * up, down)

    def image_features(self, pixels: Tensor) -> Tensor:
        """[P, image tokens, E] of [P, 3, h, w]."""
        x = self.tower.pre_layrnorm(self.tower.embeddings(pixels))
        for layer in self.tower_layers:
            x = layer(x, None)
        return self.projector(x[:, 1:])

    def prefill(self, token_ids: Tensor, pixels: Tensor) -> tuple[Tensor, list[KV]]:
        """The last token's state before the final norm [P, E] and every layer's keys and values [P, H, S, D]."""
        p, s = token_ids.shape
        x = F.embedding(token_ids, self.embedding)
        x[token_ids == self.config.image_token_id] = self.image_features(pixels).flatten(0, 1)
        cos, sin, cache = self.cos[:s], self.sin[:s], []
        x = x.view(p * s, -1)
        split = lambda y, n: y.view(p, -1, n, self.heads, self.depth).permute(2, 0, 3, 1, 4)  # noqa: E731
        for index, layer in enumerate(self.layers):
            h, weight = self._rms(x, layer[0]), layer[1]
            if index < len(self.layers) - 1:
                q, k, v = split(F.linear(h, weight), 3)
                q = _rotate(q, cos, sin)
            else:
                k, v = split(F.linear(h, weight[self.width :]), 2)
                x = x.view(p, s, -1)[:, -1]
                q = split(F.linear(h.view(p, s, -1)[:, -1], weight[: self.width]), 1)[0]
                q = _rotate(q, cos[-1:], sin[-1:])
            k, v = _rotate(k, cos, sin), v.contiguous()
            cache.append((k, v))
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1, scale=1.0)
            x = self._finish(x, attended.transpose(1, 2).reshape(len(x), -1), layer)
        return x, cache

    def _step(
        self,
        token: Tensor,
        cos: Tensor,
        sin: Tensor,
        prefix: list[KV],
        own: list[KV],
        slot: Tensor,
        view: int,
        unseen: Tensor | None,
    ) -> Tensor:
        """Logits [P·K, V] after one more token of every candidate; `own` holds [P, H, K, T, D] each.

        Attends to the first `view` slots, plus `unseen` (0 or −∞ for each) where it is given.
        """
        p, h, s, d = prefix[0][0].shape
        n = len(token)
        x = F.embedding(token, self.embedding)
        for layer, (prefix_k, prefix_v), (own_k, own_v) in zip(self.layers, prefix, own, strict=True):
            qkv = F.linear(self._rms(x, layer[0]), layer[1]).view(p, n // p, 3, h, d)
            qk = _rotate(qkv[:, :, :2], cos, sin)
            q, k, v = (y.transpose(1, 2) for y in (qk[:, :, 0], qk[:, :, 1], qkv[:, :, 2]))
            own_k.index_copy_(3, slot, k[:, :, :, None])
            own_v.index_copy_(3, slot, v[:, :, :, None])
            on_own = (q[:, :, :, None] @ own_k[:, :, :, :view].transpose(-1, -2))[:, :, :, 0]
            if unseen is not None:
                on_own = on_own + unseen
            weights = torch.cat([q @ prefix_k.transpose(-1, -2), on_own], -1).softmax(-1)
            attended = weights[..., :s] @ prefix_v
            attended = attended + (weights[..., None, s:] @ own_v[:, :, :, :view])[:, :, :, 0]
            x = self._finish(x, attended.transpose(1, 2).reshape(n, -1), layer)
        return self._rms(x, self.norm) @ self.head

    @torch.inference_mode()
    def generate(
        self, token_ids: Tensor, pixels: Tensor, *, candidates: int, new_tokens: int, greedy: bool = False
    ) -> KV:
        """Tokens and their log-probabilities, [P, K, T] each; no token ends an answer."""
        p, s = token_ids.shape
        n, slots = p * candidates, new_tokens - 1
        last, prefix = self.prefill(token_ids, pixels)
        shape = (p, self.heads, candidates, max(slots, 1), self.depth)
        own = [(torch.zeros(shape), torch.zeros(shape)) for _ in self.layers]
        tokens, log_probs = torch.empty(n, new_tokens, dtype=torch.long), torch.empty(n, new_tokens)
        logits = (self._rms(last, self.norm) @ self.head).repeat_interleave(candidates, 0)
        tokens[:, 0], log_probs[:, 0] = draw(logits, self.block, greedy)
        positions = torch.arange(slots)
        for t in range(slots):
            view, unseen = t + 1, None
            if self.compiled:
                view = min((t // self.CHUNK + 1) * self.CHUNK, slots)
                unseen = torch.where(positions[:view] <= t, 0.0, -torch.inf)
            logits = self.step(
                tokens[:, t].contiguous(),
                self.cos[s + t],
                self.sin[s + t],
                prefix,
                own,
                positions[t : t + 1],
                view,
                unseen,
            )
            tokens[:, t + 1], log_probs[:, t + 1] = draw(logits, self.block, greedy)
        return tokens.view(p, candidates, -1), log_probs.view(p, candidates, -1)

    @torch.inference_mode()
    def score(self, token_ids: Tensor, pixels: Tensor, answers: Tensor) -> Tensor:
        """Log-probability of every token of the answers [P, K, T]; the prefix's cache serves all of them."""
        p, s = token_ids.shape
        _, k_count, t = answers.shape
        n, fed = p * k_count, t - 1
        last, prefix = self.prefill(token_ids, pixels)
        x = F.embedding(answers[:, :, :-1].reshape(n * fed), self.embedding)
        cos, sin = self.cos[s : s + fed], self.sin[s : s + fed]
        seen = torch.ones(fed, s + fed, dtype=torch.bool).tril_(s)
        for layer, (prefix_k, prefix_v) in zip(self.layers, prefix, strict=True):
            qkv = F.linear(self._rms(x, layer[0]), layer[1]).view(n, fed, 3, self.heads, self.depth)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
            repeat = lambda y: y[:, None].expand(-1, k_count, -1, -1, -1).reshape(n, *y.shape[1:])  # noqa: E731
            keys, values = torch.cat([repeat(prefix_k), k], 2), torch.cat([repeat(prefix_v), v], 2)
            attended = F.scaled_dot_product_attention(q, keys, values, attn_mask=seen, scale=1.0)
            x = self._finish(x, attended.transpose(1, 2).reshape(n * fed, -1), layer)
        first = torch.log_softmax(self._rms(last, self.norm) @ self.head, -1).gather(1, answers[:, :, 0])
        later, wanted = [], answers[:, :, 1:].reshape(-1, 1)
        # A few rows at a time, so that the logits stay in the cache.
        for rows, ids in zip(self._rms(x, self.norm).split(128), wanted.split(128), strict=True):
            logits = rows @ self.head
            later.append(logits.gather(1, ids)[:, 0] - logits.logsumexp(-1))
        return torch.cat([first[:, :, None], torch.cat(later).view(p, k_count, fed)], 2)
