"""Which layers slide and which rotate: config.json's several ways of saying so, as one flag per layer.

Rules (Family.sliding):
    every layer            one window for all (Mistral, Phi-3)
    upper layers           from max_window_layers on, if use_sliding_window (Qwen)
    layers without rope    no_rope_layers has 0 where a layer does not rotate; those slide, if use_sliding_window (SmolLM3)
    all but every nth      every sliding_window_pattern-th layer sees everything (Gemma)

An explicit `layer_types` overrides the last three. A window nobody uses is no window.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nanoserve.checks import shown, truth, whole_number

_KINDS = {"full_attention": False, "sliding_attention": True}


def layer_kinds(rule: str, given: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """ModelConfig's sliding_window, sliding_layers and rope_layers.

    Raises:
        ValueError: naming the field, its value and its limit.
    """
    whole_number("num_hidden_layers", layers, 1, 4096)
    window = given.get("sliding_window")
    if window is not None:
        window = whole_number("sliding_window", window, 1, 2**31 - 1)
    values: dict[str, Any] = {}
    if rule == "every layer":
        return {"sliding_window": window}
    switched_on = "use_sliding_window" not in given or truth(
        "use_sliding_window", given["use_sliding_window"]
    )
    if rule == "upper layers":
        first = whole_number("max_window_layers", given["max_window_layers"], 0)
        slides = tuple(window is not None and switched_on and i >= first for i in range(layers))
    elif rule == "layers without rope":
        rotates = _rope_layers(given, layers)
        values["rope_layers"] = None if all(rotates) else rotates
        slides = tuple(window is not None and switched_on and not rotate for rotate in rotates)
    else:
        pattern = whole_number("sliding_window_pattern", given["sliding_window_pattern"], 1)
        slides = tuple((i + 1) % pattern != 0 for i in range(layers))
    if given.get("layer_types") is not None:
        slides = _explicit(given["layer_types"], layers)
    if any(slides):
        if window is None or not switched_on:
            named = "use_sliding_window is false" if not switched_on else "sliding_window is not set"
            raise ValueError(f"layer_types: layer {slides.index(True)} slides, but {named}")
        values |= {"sliding_window": window, "sliding_layers": None if all(slides) else slides}
    return values


def _explicit(types: object, layers: int) -> tuple[bool, ...]:
    if not isinstance(types, list) or len(types) != layers:
        raise ValueError(f"layer_types: {shown(types)} must list {layers} layers")
    for kind in types:
        if not isinstance(kind, str) or kind not in _KINDS:
            raise ValueError(f"layer_types: {shown(kind)} is not supported, only {', '.join(_KINDS)}")
    return tuple(_KINDS[kind] for kind in types)


def _rope_layers(given: Mapping[str, Any], layers: int) -> tuple[bool, ...]:
    listed = given.get("no_rope_layers")
    if listed is None:
        interval = whole_number("no_rope_layer_interval", given["no_rope_layer_interval"], 1)
        return tuple((i + 1) % interval != 0 for i in range(layers))
    if not isinstance(listed, list) or len(listed) < layers:
        raise ValueError(f"no_rope_layers: {shown(listed)} must list at least {layers} layers")
    return tuple(
        bool(whole_number(f"no_rope_layers[{i}]", flag, 0, 1)) for i, flag in enumerate(listed[:layers])
    )
