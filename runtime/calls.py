"""What the call of a diffusers pipeline takes and makes, read off its signature and its source; nothing is run."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from PIL import Image

from porter.core.errors import BadInputError, UsageError
from runtime.config import PipelineConfig, SamplingParams, TaskType
from runtime.loader import quiet_libraries
from runtime.request import Req

# Fields of a request -> the names that calls have for them, the first one that a call has.
NAMES = {
    "prompt": ("prompt",),
    "negative_prompt": ("negative_prompt", "neg_prompt"),
    "image": ("image", "images", "input_images", "video"),  # a video's frames are pictures in their order
    "last_image": ("last_image",),
    "mask_image": ("mask_image",),
    "height": ("height",),
    "width": ("width",),
    "num_frames": ("num_frames", "video_length", "frames"),
    "fps": ("frame_rate", "fps"),
    "num_inference_steps": ("num_inference_steps",),
    "guidance_scale": ("guidance_scale",),
    "guidance_scale_2": ("guidance_scale_2",),
    "true_cfg_scale": ("true_cfg_scale",),
    "max_sequence_length": ("max_sequence_length",),
    "sigmas": ("sigmas",),
}
_NUMBERS = (
    "height", "width", "num_frames", "num_inference_steps", "guidance_scale", "guidance_scale_2", "true_cfg_scale",
    "max_sequence_length",
)  # fmt: skip
# What the executor gives, or what changes how the call is run and not what it makes.
_OURS = (
    "generator", "output_type", "return_dict", "num_images_per_prompt", "num_videos_per_prompt", "batch_size",
    "callback_steps",
)  # fmt: skip
_TENSORS = {"Tensor", "FloatTensor", "LongTensor", "IntTensor", "BoolTensor", "Generator"}
_READABLE = {"int", "float", "str", "bool", "dict", "Dict", "Any", "Image", "ndarray"}
_PLAIN = {"int": int, "float": (int, float), "str": str, "bool": bool}
PICTURES = ("images", "image")  # fields of what a call returns
VIDEOS = ("frames",)

Parameters = Mapping[str, inspect.Parameter]


@dataclass(frozen=True)
class CallParams(SamplingParams):
    """Defaults of a pipeline's call; `settings` are what a request may set in `extra`."""

    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def extra(self) -> dict[str, Any]:
        return dict(self.settings)

    def fill(self, batch: Req) -> None:
        asked = dict(batch.extra)
        super().fill(batch)
        plain = {name: value for name, value in self.settings.items() if isinstance(value, int | float | str)}
        batch.extra = plain | asked  # the call has the rest itself


@dataclass
class CallConfig(PipelineConfig):
    """What a pipeline's call says of its task.

    Attributes:
        name: of the pipeline class.
        call: the parameters of its call.
        makes: fields of what it returns; empty where its source does not say.
    """

    name: str = ""
    call: Parameters = field(default_factory=dict)
    makes: frozenset[str] = frozenset()

    def name_of(self, field: str) -> str | None:
        """The call's name for a field of a request; None: it has none."""
        return next(
            (n for n in NAMES[field] if n in self.call and not (n == "video" and only_code(self.call[n]))), None
        )

    def images(self) -> tuple[int, int | None]:
        name = self.name_of("image")
        return (int(required(self.call[name])), None) if name else (0, 0)

    def size_multiple(self) -> int:
        return 1  # the call knows its own

    def default_size(self, batch: Req) -> tuple[int | None, int | None]:  # type: ignore[override]
        return None, None

    def guides(self, batch: Req) -> bool:
        return False  # the call guides by itself


def pipeline_class(name: str) -> Any:
    """The pipeline class of diffusers that model_index.json names.

    Raises:
        BadInputError: the installed diffusers has none of this name, or lacks a package that it needs.
    """
    import diffusers

    with quiet_libraries():  # what they say while they are imported
        found = getattr(diffusers, name, None) if name.isidentifier() else None
    if needs := getattr(found, "_backends", None):
        raise BadInputError(
            f"{name} needs packages that are not installed", expected=", ".join(needs), hint=f"pip install {needs[-1]}"
        )
    if not (isinstance(found, type) and issubclass(found, diffusers.DiffusionPipeline) and _parameters(found.__call__)):
        raise BadInputError(
            f"nothing runs {name}", expected="a pipeline that a family runs, or one of diffusers'",
            found=f"diffusers {diffusers.__version__} has no such pipeline", hint="pip install --upgrade diffusers",
        )  # fmt: skip
    return found


def describe_call(cls: Any, index: Mapping[str, Any]) -> tuple[CallConfig, CallParams]:
    """Facts and defaults of the call of a pipeline class.

    Raises:
        UsageError: it makes neither pictures nor videos, or takes what no option gives.
        BadInputError: a component that it needs is missing in `index`.
    """
    call = _parameters(cls.__call__)
    makes = _returned(cls)
    if makes and not makes & {*PICTURES, *VIDEOS}:
        raise UsageError(
            f"{cls.__name__} makes neither pictures nor videos", expected="images or frames",
            found=", ".join(sorted(makes)), hint="run it with diffusers",
        )  # fmt: skip
    config = CallConfig(model_index=index, name=cls.__name__, call=call, makes=makes)
    named = {config.name_of(each) for each in NAMES} - {None}
    settings = {
        name: None if required(p) else p.default
        for name, p in call.items()
        if name not in _OURS and "callback" not in name and (name == "sigmas" or name not in named) and not only_code(p)
    }
    if lacking := [n for n, p in call.items() if required(p) and n not in settings and n not in named]:
        raise UsageError(
            f"{cls.__name__} takes {', '.join(lacking)}, which no option gives", expected="text, pictures, numbers",
            found="tensors", hint="run it with diffusers, or the pipeline that comes before it",
        )  # fmt: skip
    video = (
        bool(makes & {*VIDEOS}) or "video_length" in call or (not makes and config.name_of("num_frames") is not None)
    )
    config.task_type = TaskType.T2V if video else TaskType.T2I
    config.takes_mask, config.takes_last_image = "mask_image" in call, "last_image" in call
    config.should_use_guidance = "guidance_scale" in call
    config.further_scales = ("guidance_scale_2", "true_cfg_scale")
    config.cfg_field = "true_cfg_scale" if "true_cfg_scale" in call else "guidance_scale"
    config.cfg_none = 1.0 if "true_cfg_scale" in call else 0.0
    numbers = {name: _number(call, config.name_of(name)) for name in (*_NUMBERS, "fps")}
    if numbers["fps"] is not None:
        numbers["fps"] = round(numbers["fps"])
    _check_components(cls, index)
    return config, CallParams(**numbers, settings=settings)


def fits(parameter: inspect.Parameter, value: Any) -> bool:
    """Whether a setting's value is of a kind that the parameter says; True where it says nothing that can be told."""
    words, default = _words(parameter), parameter.default
    if value is None:
        return not required(parameter)
    if isinstance(default, Enum):
        return value in [member.value for member in type(default)]
    if isinstance(value, int | float | str) and value == default:  # some defaults are not what the annotation says
        return True
    if not words or "Any" in words:
        return True
    if isinstance(value, Image.Image):
        return bool(words & {"Image", "PipelineImageInput"})
    if isinstance(value, str):
        return bool(words & {"str", "Path"})
    if words <= {*_PLAIN, "None", "NoneType", "Optional", "Union"}:
        kinds = [_PLAIN[word] for word in words if word in _PLAIN]
        whole = isinstance(value, bool) and "bool" not in words
        return any(isinstance(value, kind) for kind in kinds) and not whole  # type: ignore[arg-type]
    return True


def described(parameter: inspect.Parameter) -> str:
    """What the parameter says it takes, for an error."""
    words = inspect.formatannotation(parameter.annotation) if not isinstance(parameter.annotation, str) else (
        parameter.annotation
    )  # fmt: skip
    picture = " (a picture: @FILE)" if _words(parameter) & {"Image", "PipelineImageInput"} else ""
    return words.replace("PIL.Image.Image", "Image")[:60] + picture


def takes_lists(parameter: inspect.Parameter) -> bool:
    """Whether a parameter takes a list: one value for each result."""
    return not _words(parameter) or bool(_words(parameter) & {"list", "List", "Any"})


def as_declared(parameter: inspect.Parameter, value: Any) -> Any:
    """What JSON cannot say: a member of an enumeration, and a tuple, which calls add to others."""
    if isinstance(parameter.default, Enum):
        return type(parameter.default)(value)
    words = _words(parameter)
    tuples = isinstance(parameter.default, tuple) or (bool(words & {"tuple", "Tuple"}) and not words & {"list", "List"})
    return tuple(value) if tuples and isinstance(value, list) else value


def required(parameter: inspect.Parameter) -> bool:
    """Whether a call cannot do without it."""
    return parameter.default is inspect.Parameter.empty


def only_code(parameter: inspect.Parameter) -> bool:
    """Whether only Python code can give it: tensors and functions."""
    words = _words(parameter)
    if not words:
        return parameter.name == "latents" or parameter.name.endswith("embeds")
    return "Callable" in words or bool(words & _TENSORS and not words & _READABLE)


def _words(parameter: inspect.Parameter) -> set[str]:
    annotation = parameter.annotation
    if annotation is inspect.Parameter.empty:
        return set()
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return set(re.findall(r"[A-Za-z_]\w*", text))


def _parameters(function: Any) -> Parameters:
    known = inspect.signature(function).parameters.values()
    return {p.name: p for p in known if p.name != "self" and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}


def _number(call: Parameters, name: str | None) -> Any:
    default = call[name].default if name else None
    return default if isinstance(default, int | float) else None


def _returned(cls: Any) -> frozenset[str]:
    """Fields of the output classes that the call's source returns; empty where it does not tell."""
    function = inspect.unwrap(cls.__call__)
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return frozenset()
    names = [
        node.value.func.id for node in ast.walk(tree)
        if isinstance(node, ast.Return) and isinstance(node.value, ast.Call) and isinstance(node.value.func, ast.Name)
    ]  # fmt: skip
    found = [function.__globals__.get(name) for name in names]
    return frozenset(f.name for one in found if dataclasses.is_dataclass(one) for f in dataclasses.fields(one))


def _check_components(cls: Any, index: Mapping[str, Any]) -> None:
    """Raises BadInputError: a component that the pipeline cannot do without is missing or null."""
    needed = {n for n, p in _parameters(cls.__init__).items() if required(p)} - set(cls._optional_components)
    there = {n for n, value in index.items() if not (isinstance(value, list) and value[:1] in ([], [None]))}
    if missing := sorted(needed - there):
        raise BadInputError(
            f"model_index.json lacks {', '.join(missing)}", expected=f"what {cls.__name__} is made of",
            found="null" if missing[0] in index else "no such entry",
            hint="convert the model again: porter convert <model> -o <port> --overwrite",
        )  # fmt: skip
