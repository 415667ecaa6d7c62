"""What a family declares so that its components can be compared: everything that weights cannot say.

Which module holds which weights is derived from the compiled recipe (`parity.align`); a case adds how to call each
side, how blocks name their inputs and outputs, and where layouts of activations differ.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from parity import stubs
from parity.asserts import without_asserts, without_init
from parity.halves import without_halves

if TYPE_CHECKING:  # this file also runs beside the reference, without porter
    from parity.stages import Request
    from porter.core.recipe import Recipe

Named = Mapping[str, Tensor]
Shapes = Mapping[str, tuple[int, ...]]


def same(given: Named, other: Named | Shapes) -> Named:
    """Both sides use the same names and layouts."""
    return given


@dataclass(frozen=True)
class Block:
    """How one kind of block passes activations, on one candidate.

    Attributes:
        reference: regular expression for the reference module's whole path.
        force: (reference's recorded inputs, candidate's own inputs) -> candidate's arguments to replace, by name.
        inputs: (candidate's inputs, shapes of the reference's inputs) -> the same under the reference's names.
        outputs: (candidate's outputs, shapes of the reference's inputs) -> the same under the reference's names.
    """

    reference: str
    force: Callable[[Named, Named], Named] = same
    inputs: Callable[[Named, Shapes], Named] = same
    outputs: Callable[[Named, Shapes], Named] = same

    def matches(self, path: str) -> bool:
        return re.fullmatch(self.reference, path) is not None


@dataclass(frozen=True)
class Candidate:
    """One implementation under test.

    Attributes:
        name: `native` or `diffusers`.
        load: component folder of the port -> module with weights, float32, eval mode.
        passes: pass name -> (module, reference's inputs) -> output comparable with the reference's.
        blocks: how its blocks pass activations; blocks that none names have one input and one output.
        layout: (reference module path, reference shape, candidate's tensor) -> tensor in the reference's layout.
        on_load: the recipe by which its class packs the port's weights while they are read.
    """

    name: str
    load: Callable[[Path], nn.Module]
    passes: Mapping[str, Callable[[nn.Module, Named], Any]]
    blocks: tuple[Block, ...] = ()
    layout: Callable[[str, tuple[int, ...], Tensor], Tensor] = lambda path, shape, tensor: tensor
    on_load: Recipe | None = None


class Draw:
    """Random inputs, the same for a name and a seed whatever else is drawn: `draw("x", 1, 16, 8, 8)`."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def _generator(self, name: str) -> torch.Generator:
        return torch.Generator().manual_seed(((self.seed << 32) + zlib.crc32(name.encode())) % 2**63)

    def __call__(self, name: str, *shape: int) -> Tensor:
        """Normal numbers of mean 0 and deviation 1, float32."""
        return torch.randn(*shape, generator=self._generator(name))

    def uniform(self, name: str, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Numbers between `low` and `high`, float32."""
        return torch.rand(*shape, generator=self._generator(name)) * (high - low) + low

    def integers(self, name: str, below: int, *shape: int) -> Tensor:
        """Whole numbers from 0 to `below` - 1, int64."""
        return torch.randint(below, shape, generator=self._generator(name))


def _names(field_name: str, value: Any) -> None:
    if isinstance(value, str) or not isinstance(value, (tuple, list, set, frozenset)):
        raise TypeError(f"{field_name} is a tuple of names, not {value!r}")
    if odd := [name for name in value if not isinstance(name, str)]:
        raise TypeError(f"{field_name} is a tuple of names, and {odd[0]!r} is none")


def keywords(module: nn.Module, inputs: Named) -> Any:
    """Call a module with its inputs as keyword arguments."""
    return module(**inputs)


@dataclass(frozen=True)
class Side:
    """One implementation in a `Case`.

    Attributes:
        build: config -> module on the CPU; what its weights are does not matter, they are replaced.
        call: (module, named inputs) -> whatever the module answers; or pass name -> such a function.
        name: for the report; by default the module's class.
        float64: whether it can run in float64. Where it cannot, `Case.baseline` decides.
        stubs: packages that its code imports and computes nothing with: where they are missing, importable and empty.
        halves: whether its casts to float16 and bfloat16 are done. Where a kernel forces them that takes nothing else,
            False leaves them out; the report says so.
        asserts: whether the assertions of the code that it imports first while it builds hold; False leaves them out.
        bare: packages whose `__init__` is not run, where it imports more than the model needs: outer ones first.
    """

    build: Callable[[Mapping[str, Any]], nn.Module]
    call: Callable[[Any, Named], Any] | Mapping[str, Callable[[Any, Named], Any]] = keywords
    name: str = ""
    float64: bool = True
    stubs: tuple[str, ...] = ()
    halves: bool = True
    asserts: bool = True
    bare: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what would have no effect, or another one than it seems.

        Raises:
            TypeError: a field of the wrong kind.
        """
        for field_name in ("stubs", "bare"):
            _names(field_name, getattr(self, field_name))
        for field_name in ("float64", "halves", "asserts"):
            if not isinstance(getattr(self, field_name), bool):
                raise TypeError(f"{field_name} is True or False, not {getattr(self, field_name)!r}")
        if needed := {"torch", "numpy", "safetensors", "parity"} & set(self.bare):
            raise TypeError(f"bare: the comparison itself needs {', '.join(sorted(needed))}")

    def module(self, config: Mapping[str, Any]) -> nn.Module:
        """What `build` makes of a config of its own."""
        stubs.install(self.stubs)
        without_init(self.bare)
        with without_asserts(not self.asserts):
            return self.build(dict(config))

    @property
    def passes(self) -> Mapping[str, Callable[[Any, Named], Any]]:
        """Its calls by the name of the pass."""
        calls = self.call if isinstance(self.call, Mapping) else {"forward": self.call}
        return calls if self.halves else {name: without_halves(call) for name, call in calls.items()}


@dataclass(frozen=True)
class Case:
    """Two implementations of one model, compared on the same weights.

    Import what only one side needs inside its `build`: the other may run in another interpreter.

    Attributes:
        inputs: (config, draw) -> named inputs of the reference, which the candidate's `call` gets too; or, where `call`
            names several passes, pass name -> such inputs.
        convert: how the reference's state becomes the candidate's: a function (state -> state), a recipe, its file
            (`"FILE"`, `"FILE:NAME"`, `"module:NAME"`), or None where both have the same names.
        config: given to both sides' `build`.
        weights: a safetensors file in the reference's names; without one, weights are drawn from a seed.
        blocks: argument maps of block types that both sides name differently.
        layout: (reference module path, reference shape, candidate's tensor) -> tensor in the reference's layout.
        modules: reference module -> candidate module, where weights do not say so.
        steps: what stands outside of all modules, for the report: pass name -> text.
        baseline: the largest scaled difference of a correct port in float32: for sides that cannot run in float64, and
            for those of which one computes in a lower precision by design.
        free: inputs that need not have an effect; of any other, a change must change the output.
        skip: regular expression of reference modules that have no counterpart.
        keep: regular expression of the reference's state that is never drawn: tables that the class computes.
        on_load: the recipe by which the candidate's class packs what `convert` makes.
        name: the component's name in reports.
    """

    reference: Side
    candidate: Side
    inputs: Callable[[Mapping[str, Any], Draw], Mapping[str, Any]]
    convert: Any = None
    config: Mapping[str, Any] = field(default_factory=dict)
    weights: str | Path | None = None
    blocks: tuple[Block, ...] = ()
    layout: Callable[[str, tuple[int, ...], Tensor], Tensor] = lambda path, shape, tensor: tensor
    modules: Mapping[str, str] = field(default_factory=dict)
    steps: Mapping[str, str] = field(default_factory=dict)
    baseline: float | None = None
    free: tuple[str, ...] = ()
    skip: str = ""
    keep: str = ""
    name: str = "model"
    on_load: Recipe | None = None

    def __post_init__(self) -> None:
        """Refuse what would have no effect, or another one than it seems.

        Raises:
            TypeError: a field of the wrong kind.
            ValueError: a baseline that everything or nothing passes.
        """
        _names("free", self.free)
        for field_name in ("modules", "steps", "config"):
            if not isinstance(getattr(self, field_name), Mapping):
                raise TypeError(f"{field_name} is a mapping, not {getattr(self, field_name)!r}")
        for field_name in ("modules", "steps"):
            texts = getattr(self, field_name)
            if odd := [item for item in (*texts, *texts.values()) if not isinstance(item, str)]:
                raise TypeError(f"{field_name} maps names to texts, and {odd[0]!r} is none")
        if not isinstance(self.blocks, (tuple, list)):
            raise TypeError(f"blocks is a tuple of Block(…), not {self.blocks!r}")
        for field_name, pattern in (("skip", self.skip), ("keep", self.keep)):
            try:
                re.compile(pattern)
            except (re.error, TypeError) as error:
                raise TypeError(f"{field_name} is a regular expression, not {pattern!r}: {error}") from error
        for block in self.blocks:
            if not isinstance(block, Block):
                raise TypeError(f"blocks are Block(…), not {block!r}")
            try:
                re.compile(block.reference)
            except (re.error, TypeError) as error:
                raise TypeError(f"a block's `reference` is a regular expression: {error}") from error
        if not isinstance(self.name, str) or not self.name:
            raise TypeError(f"name is a text, not {self.name!r}")
        number = isinstance(self.baseline, (int, float)) and not isinstance(self.baseline, bool)
        if self.baseline is not None and not (number and 0 < self.baseline < float("inf")):
            raise ValueError(f"baseline is a positive, finite number, not {self.baseline!r}")

    def inputs_of(self, seed: int) -> dict[str, dict[str, Tensor]]:
        """Named inputs of every pass."""
        given = self.inputs(self.config, Draw(seed))
        several = isinstance(self.reference.call, Mapping)
        return {name: dict(values) for name, values in (given if several else {"forward": given}).items()}


@dataclass(frozen=True)
class Cross:
    """Two implementations of one component compared on the same port.

    Attributes:
        reference: whose `load` builds the reference side.
        candidate: its blocks and layout speak of the reference's module names.
        call: (reference module, inputs) -> output.
        inputs: (component folder, seed) -> pass name -> named inputs; the candidate's passes carry the same names.
        whole: regular expression of the reference's modules to record in full.
    """

    reference: Candidate
    candidate: Candidate
    call: Callable[[nn.Module, Named], Any]
    inputs: Callable[[Path, int], Mapping[str, Named]]
    whole: str


@dataclass(frozen=True)
class ComponentCase:
    """One component of a family: its recorded truth and what is compared with it.

    Attributes:
        recipe: `"module:attribute"` of the recipe original -> port, for the alignment of modules.
        trace: the committed reference trace.
        candidates: compared with the trace (and with the original code, live).
        cross: pairs of implementations compared with each other on the same port.
        record: (model folder, reference checkout, seed, output folder) -> what stands after `python -m` to record a
            fresh, full trace.
        output_step: pass name -> the step outside of all modules, for the report.
    """

    component: str
    recipe: str
    trace: Path
    candidates: tuple[Candidate, ...]
    cross: tuple[Cross, ...] = ()
    record: Callable[[Path, Path, int, Path], list[str]] | None = None
    output_step: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class PipelineSide:
    """A loaded pipeline.

    Attributes:
        stages: stage name -> module that is called as a module in every run, so that hooks see it. Names that start
            with `denoiser` are called once a step or more, `decoder` gets the latents after the last.
        weights: all modules with weights, to be run in float64 by the arbiter.
        scheduler: the scheduler whose `step` is called once a step.
        run: what is asked for -> image (B, 3, H, W) or video (B, F, 3, H, W) in [0, 1], B one for each prompt.
        save: such an image -> the levels its own code writes to a file, uint8 (frames, 3, H, W).
    """

    stages: Mapping[str, nn.Module]
    weights: tuple[nn.Module, ...]
    scheduler: Any
    run: Callable[[Request], Tensor]
    save: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class PipelineCase:
    """The whole pipeline, `candidate` against `reference`, each: (port folder, dtype) -> loaded side on the CPU.

    Attributes:
        other_prompt: what both sides must paint something else for.
        own: inputs of its denoiser that the candidate alone has by design, such as tables computed ahead.
        baseline: the largest scaled difference of a correct port in float32, where float64 cannot run.
        part: height and width of the third request, which has two prompts, as parts of the model's own.
        negative: negative prompt of the third request and the scale of its guidance; None where there are none.
    """

    reference: Callable[[Path, torch.dtype], PipelineSide]
    candidate: Callable[[Path, torch.dtype], PipelineSide]
    prompt: str
    steps: int
    guidance: float
    other_prompt: str = "a small blue triangle on a black background"
    own: tuple[str, ...] = ()
    baseline: float | None = None
    part: tuple[float, float] = (0.5, 0.75)
    negative: tuple[str, float] | None = None


@dataclass(frozen=True)
class FamilyCases:
    """All cases of a family: `Family.cases` names one of these.

    Attributes:
        pipelines: `_class_name` in model_index.json -> how ports of this pipeline are compared.
        code: modules whose source files a verdict is bound to, besides parity's own.
    """

    components: tuple[ComponentCase, ...]
    pipelines: Mapping[str, PipelineCase] = field(default_factory=dict)
    code: tuple[str, ...] = ()
