"""Wan's pipelines on the native runtime."""

from conversions.wan.pipeline import WanPipeline
from conversions.wan.pipeline_i2v import WanImageToVideoPipeline

EntryClass = (WanPipeline, WanImageToVideoPipeline)
