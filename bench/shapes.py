"""The shapes that selection meets in real models, once, for every benchmark."""

from typing import NamedTuple


class Shape(NamedTuple):
    """B images of N visual tokens with D features, of which the usual budget keeps k."""

    model: str
    images: int
    tokens: int
    features: int
    keep: int


SHAPES = (
    Shape("LLaVA-1.5", 1, 576, 1024, 64),
    Shape("LLaVA-1.5, batch", 8, 576, 1024, 64),
    Shape("LLaVA-NeXT", 5, 576, 1024, 128),
    Shape("OneVision", 1, 729, 1152, 128),
    Shape("Qwen2.5-VL, 1k", 1, 1024, 1280, 128),
)
