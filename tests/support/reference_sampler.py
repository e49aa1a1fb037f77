"""What the sampler's parameters mean, token by token in float64: slow, plain, and independent of the sampler."""

from __future__ import annotations

import math
from collections.abc import Collection

import numpy as np

from nanoserve.request import Request
from nanoserve.sampling import SamplingParams


def changed_logits(row: np.ndarray, request: Request, eos: Collection[int] = ()) -> list[float]:
    """Bias, bad words, min_tokens, penalties, in this order."""
    params, prompt, output = request.params, request.prompt_tokens, request.output_tokens
    logits = [float(x) for x in row]
    for token, bias in (params.logit_bias or {}).items():
        logits[token] += bias
    for word in request.bad_word_ids:
        before = list(word[:-1])
        if not before or output[-len(before) :] == before:
            logits[word[-1]] = -math.inf
    if len(output) < params.min_tokens:
        for token in {*params.stop_token_ids, *(() if params.ignore_eos else eos)}:
            logits[token] = -math.inf
    for token in {*prompt, *output}:
        factor = params.repetition_penalty
        logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
    for token in set(output):
        logits[token] -= params.presence_penalty + params.frequency_penalty * output.count(token)
    return logits


def filtered_distribution(row: Collection[float], params: SamplingParams) -> list[float]:
    """Temperature, top_k, top_p, min_p: the order of transformers."""
    logits = [float(x) / params.temperature for x in row]
    alive = [i for i, x in enumerate(logits) if x > -math.inf]
    if params.top_k:
        kth = sorted((logits[i] for i in alive), reverse=True)[: params.top_k][-1]
        alive = [i for i in alive if logits[i] >= kth]

    def probabilities() -> dict[int, float]:
        top = max(logits[i] for i in alive)
        total = math.fsum(math.exp(logits[i] - top) for i in alive)
        return {i: math.exp(logits[i] - top) / total for i in alive}

    if params.top_p < 1:
        chances, mass, kept = probabilities(), 0.0, []
        for i in sorted(alive, key=lambda i: (-logits[i], i)):
            if mass >= params.top_p:
                break
            kept.append(i)
            mass += chances[i]
        alive = sorted(kept)
    if params.min_p:
        chances = probabilities()
        alive = [i for i in alive if chances[i] >= params.min_p * max(chances.values())]
    chances = probabilities()
    return [chances.get(i, 0.0) for i in range(len(logits))]


def distribution(row: np.ndarray, request: Request, eos: Collection[int] = ()) -> np.ndarray:
    """float64[V]: the exact probability of each token as the request's next."""
    return np.array(filtered_distribution(changed_logits(row, request, eos), request.params))
