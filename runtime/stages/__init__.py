"""The standard stages. Each has one job, takes and returns the request, and checks what it takes and returns."""

from .base import PipelineStage, VerificationResult
from .decoding import DecodingStage
from .denoising import DenoisingStage
from .input_validation import InputValidationStage
from .latent_preparation import LatentPreparationStage
from .text_encoding import TextEncodingStage
from .timestep_preparation import TimestepPreparationStage

__all__ = [
    "DecodingStage",
    "DenoisingStage",
    "InputValidationStage",
    "LatentPreparationStage",
    "PipelineStage",
    "TextEncodingStage",
    "TimestepPreparationStage",
    "VerificationResult",
]
