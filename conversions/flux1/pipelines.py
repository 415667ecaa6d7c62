"""FLUX.1's pipelines on the native runtime."""

from conversions.flux1.pipeline import FluxPipeline
from conversions.flux1.pipeline_fill import FluxFillPipeline
from conversions.flux1.pipeline_kontext import FluxKontextPipeline

EntryClass = (FluxPipeline, FluxFillPipeline, FluxKontextPipeline)
