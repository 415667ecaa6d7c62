"""Names for a model's files and classes in a framework, derived from what the model calls itself.

Everything here comes from files of strangers: what is returned by `derive` and `snake` is ASCII letters, digits and
underscores, starts with a letter and is no keyword, so that it is safe as a part of a path and of a class name.
"""

from __future__ import annotations

import keyword
import re
from dataclasses import dataclass
from typing import Literal

from porter.core.errors import visible
from porter.core.plan import ComponentPlan, PortPlan

Role = Literal["denoiser", "vae", "encoder", "scheduler", "processor", "other"]
LONGEST = 60  # characters of a derived name
_WORDS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|[^A-Za-z0-9]+")
# What a pipeline's name says after the model's own: the task, not the model.
_TASK = re.compile(
    r"((?:Text|Image|Video|Audio)(?:To|2)(?:Image|Video|Audio)|Img2Img|Inpaint(?:ing)?|Edit|Fill|Control(?:Net)?|Modular)$"
)
_DENOISER = re.compile(r"Transformer|UNet|DiT")
_VAE = re.compile(r"Autoencoder|VAE|VQModel")
_CLASS_TAIL = re.compile(r"(?:Transformer|UNet)?(?:[123]D)?(?:Condition)?(?:Model|Scheduler)?$")


def words(text: str) -> list[str]:
    """`WanImageToVideo` -> Wan, Image, To, Video; what is neither letter nor digit separates."""
    return [word for word in _WORDS.split(text) if word]


def snake(text: str) -> str:
    """`LunaVideo` -> `luna_video`; safe as a module's name. Empty where `text` has no letter or digit."""
    return _safe("_".join(word.lower() for word in words(text)), "m_")


def camel(text: str) -> str:
    """`luna-video.v1` -> `LunaVideoV1`; safe as a class's name. Empty where `text` has no letter or digit."""
    return _safe("".join(word[0].upper() + word[1:] for word in words(text)), "M")


def _safe(name: str, before_digit: str) -> str:
    name = name[:LONGEST].rstrip("_")
    if not name:
        return ""
    name = before_digit + name if name[0].isdigit() else name
    return f"{name}_model" if keyword.iskeyword(name) else name


def shown(text: str, limit: int = 80) -> str:
    """A stranger's text inside a code span: one line, no backtick, no control character, not too long."""
    line = visible(text).replace("\n", "\\n").replace("\t", "\\t").replace("`", "'")
    return line if len(line) <= limit else line[: limit - 1] + "…"


@dataclass(frozen=True)
class Names:
    """What a model is called in a framework.

    Attributes:
        prefix: of its classes (`LunaVideo`).
        model: of its files (`luna_video`).
        task: of the pipeline's file where the pipeline is one of several tasks (`image_to_video`), else empty.
        pipeline: its pipeline class.
        chosen: whether the model named its pipeline; otherwise the names are proposals.
    """

    prefix: str
    model: str
    task: str
    pipeline: str
    chosen: bool


def derive(plan: PortPlan) -> Names:
    """The model's names: from its pipeline class, or from the source's own name where it names none."""
    given = plan.pipeline_class or ""
    if given.endswith("Pipeline") and given.isascii() and given.isidentifier() and len(given) <= LONGEST:
        stem = re.sub(r"(Modular)?Pipeline$", "", given)
        task = _TASK.search(stem)
        prefix = stem[: task.start()] if task and task.start() else stem
        if prefix:
            rest = stem.removeprefix(prefix)
            return Names(prefix, snake(prefix), snake(rest) if rest else "", given, True)
    prefix = camel(re.sub(r"Pipeline$", "", given)) or camel(source_name(plan)) or "NewModel"
    return Names(prefix, snake(prefix) or "new_model", "", f"{prefix}Pipeline", False)


def source_name(plan: PortPlan) -> str:
    """The source's own name: the last part of its path or repository id, without a checkpoint's suffix."""
    last = re.split(r"[/\\:]", plan.source.rstrip("/\\"))[-1]
    return re.sub(r"\.(safetensors|sft|gguf|ckpt|pt|pth|bin)$", "", last)


def role(part: ComponentPlan) -> Role:
    """What a component does in its pipeline, by its key in model_index.json and its class's name."""
    name, class_name = part.name.lower(), part.class_name or ""
    if name.startswith("scheduler") or class_name.endswith("Scheduler"):
        return "scheduler"
    if re.search(r"(Tokenizer|Processor|FeatureExtractor)(Fast)?$", class_name) or name.startswith("tokenizer"):
        return "processor"
    if _VAE.search(class_name) or re.search(r"(^|_)vae(_|$)", name):
        return "vae"
    if name.startswith(("transformer", "unet", "dit", "prior")) or (
        part.library == "diffusers" and _DENOISER.search(class_name) and "ControlNet" not in class_name
    ):
        return "denoiser"
    if "encoder" in name or (part.library == "transformers" and part.layout != "none"):
        return "encoder"
    return "denoiser" if part.layout == "unknown" and part.library is None else "other"


def class_of(part: ComponentPlan, names: Names) -> tuple[str, bool]:
    """(class, whether the model names it): its own where that is a class's name, else a proposal."""
    given = part.class_name or ""
    if given.isascii() and given.isidentifier() and not keyword.iskeyword(given) and len(given) <= LONGEST:
        return given, True
    ending = {"denoiser": "Transformer2DModel", "vae": "VAE", "scheduler": "Scheduler", "encoder": "Encoder"}
    return names.prefix + ending.get(role(part), camel(part.name) or "Component"), False


def stem(class_name: str, names: Names) -> str:
    """A class's name for its file: `LunaTransformer3DModel` -> `luna`; the model's where nothing is left."""
    return snake(_CLASS_TAIL.sub("", class_name)) or names.model
