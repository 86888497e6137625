"""Qwen2-VL: every layer of the tower reads whole frames; tokens leave it in raster order."""

from lvtp.hf.mrope import MRope


class Qwen2VL(MRope):
    model_class = "Qwen2VLForConditionalGeneration"
