"""Qwen-Image's pipelines on the native runtime: text to image here, editing in `pipeline_edit`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import nn

from conversions.qwen_image.model import QwenImageTransformer
from conversions.qwen_image.pipeline_base import PromptEncodingStage, QwenImagePipelineConfig, QwenImageSamplingParams
from conversions.qwen_image.pipeline_edit import QwenImageEditPipeline, QwenImageEditPlusPipeline
from runtime.pipeline import ComposedPipelineBase
from runtime.registry import register_configs, register_pipeline


class QwenImagePipeline(ComposedPipelineBase):
    """Text to image; Modular style: the standard stages and the callbacks of `QwenImagePipelineConfig`."""

    pipeline_name = "QwenImagePipeline"
    native_models: ClassVar[Mapping[str, type[nn.Module]]] = {"QwenImageTransformer2DModel": QwenImageTransformer}
    _required_config_modules = ("scheduler", "text_encoder", "tokenizer", "transformer", "vae")

    def create_pipeline_stages(self) -> None:
        stage = PromptEncodingStage(self.modules["text_encoder"], self.modules["tokenizer"])
        self.add_standard_t2i_stages(text_encoding=stage)


register_pipeline(QwenImagePipeline)
register_configs(
    QwenImagePipeline.pipeline_name,
    sampling_param_cls=QwenImageSamplingParams,
    pipeline_config_cls=QwenImagePipelineConfig,
    hf_model_paths=("Qwen/Qwen-Image", "Qwen/Qwen-Image-2512"),
)
EntryClass = (QwenImagePipeline, QwenImageEditPipeline, QwenImageEditPlusPipeline)
