"""The standard stages. Each has one job, takes and returns the request, and checks what it takes and returns."""

from .base import BeforeDenoisingStage, PipelineStage, VerificationResult
from .decoding import DecodingStage
from .denoising import DenoisingStage
from .image_encoding import ImageEncodingStage, ImageVAEEncodingStage
from .input_validation import InputValidationStage
from .latent_preparation import LatentPreparationStage
from .text_encoding import TextEmbeddings, TextEncodingStage
from .timestep_preparation import TimestepPreparationStage

__all__ = [
    "BeforeDenoisingStage",
    "DecodingStage",
    "DenoisingStage",
    "ImageEncodingStage",
    "ImageVAEEncodingStage",
    "InputValidationStage",
    "LatentPreparationStage",
    "PipelineStage",
    "TextEmbeddings",
    "TextEncodingStage",
    "TimestepPreparationStage",
    "VerificationResult",
]
