"""A folder in the diffusers layout -> loaded components.

Weights fill modules built on the meta device: every parameter is filled and every tensor used, or the load fails by
name. Classes come from two libraries by name; code in a model folder is never run.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from porter.core.checkpoint import ANY, Header, read_header, read_sharded, spec
from porter.core.errors import BadInputError, CheckpointError, MissingError, UsageError
from porter.core.execute import apply
from porter.core.files import read_config
from porter.core.libraries import LIBRARIES, pipeline_module_has
from porter.core.onload import compile_on_load, on_disk, on_load
from porter.core.port import MANIFEST, is_manifest
from porter.core.recipe import Recipe, Rule
from porter.core.tensorplan import TensorPlan
from porter.core.weights import STANDARD
from runtime.encoders import load_encoder
from runtime.layers import PackedLinear
from runtime.memory.exhausted import ran_out
from runtime.memory.files import FileHome
from runtime.memory.fp8 import Fp8Home
from runtime.memory.gguf import gguf_home
from runtime.memory.options import EVERYTHING, Memory
from runtime.memory.parking import Home, keep
from runtime.meta import parameters_on_meta
from runtime.parallel import mesh
from runtime.parallel import tensor as tensor_parallel

INDEX = "model_index.json"
_SCHEDULER = "scheduler_config.json"  # "no limit" is an infinity in it
_VARIANT = re.compile(
    rf"({'|'.join(STANDARD)})(\.(?P<early>\w+))?\.safetensors(\.index(\.(?P<late>\w+))?\.json)?"
)  # the words that only these names may carry
_SHARD = re.compile(r"-\d+-of-\d+")
_AGAIN = "convert the model again: porter convert <model> -o <port> --overwrite"


@dataclass
class Loaded:
    """Components by name, and what was odd about them."""

    modules: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def read_index(path: Path) -> dict[str, Any]:
    """model_index.json of a pipeline folder.

    Raises:
        MissingError: there is no such folder.
        BadInputError: it is not a pipeline folder, or the file is no JSON object that names a pipeline class.
    """
    if not path.exists():
        raise MissingError(
            f"no such port: {path}",
            expected="a folder that `porter convert` wrote",
            hint=f"porter convert <model> -o {path}",
        )
    if not (path / INDEX).is_file():
        if is_manifest(path / MANIFEST):
            raise BadInputError(
                f"{path} is a port of single components, and a picture takes a whole pipeline",
                expected=f"a folder with {INDEX}",
                hint="convert the whole model, without --component: porter convert <model> -o <port>",
            )
        raise BadInputError(
            f"{path} is not a pipeline folder",
            expected=f"a folder with {INDEX}",
            found="a file" if path.is_file() else ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing",
            hint=f"porter plan {path}",
        )
    index = read_config(path / INDEX)
    if isinstance(index.get("_class_name"), list):
        raise BadInputError(
            f"{path / INDEX} names a pipeline of its own: code from a model repository never runs",
            expected="a pipeline class of diffusers", found=json.dumps(index["_class_name"])[:80],
            hint=f"porter plan {path}",
        )  # fmt: skip
    if not isinstance(index.get("_class_name"), str):
        raise BadInputError(f"{path / INDEX} names no pipeline", expected="a _class_name", hint=f"porter plan {path}")
    return index


def read_configs(path: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The config files of the components `names` that have one; no weights are read.

    Raises:
        BadInputError: a config file is not a JSON object.
    """
    found = {}
    for name in names:
        for file in (path / name / "config.json", path / name / _SCHEDULER):
            if file.is_file():
                found[name] = read_config(file, constants=file.name == _SCHEDULER)
    return found


def load_components(
    path: Path,
    names: Iterable[str],
    *,
    native_models: Mapping[str, type[nn.Module]],
    dtype: torch.dtype,
    device: torch.device,
    memory: Memory = EVERYTHING,
    denoisers: Collection[str] = (),
    precisions: Mapping[str, torch.dtype] | None = None,
) -> Loaded:
    """Load the components `names` of the pipeline folder `path`, weights as `dtype` on `device`.

    Args:
        memory: what is offloaded, and other weights for the `denoisers`.
        precisions: components that are to have another dtype; their weights are never rounded to `dtype`.

    Raises:
        BadInputError: a component or its class is missing or unknown, or its files do not fit together.
        CheckpointError: weights that are corrupt, or do not fill the module exactly.
    """
    index, loaded = read_index(path), Loaded()
    if memory.gguf is not None and len(set(names) & set(denoisers)) > 1:
        raise UsageError(
            "a GGUF file holds one denoiser, and this pipeline has two", expected="a pipeline with one denoiser",
            found=", ".join(sorted(set(names) & set(denoisers))), hint="--weights fp8",
        )  # fmt: skip
    with quiet_libraries():
        for name in names:
            entry = index.get(name)
            if not (isinstance(entry, list) and len(entry) == 2 and all(isinstance(word, str) for word in entry)):
                raise BadInputError(
                    f"{path / INDEX} has no component {name!r}",
                    expected=f'"{name}": ["library", "class"]',
                    found=json.dumps(entry),
                    hint=_AGAIN,
                )
            library, class_name = entry
            kind = (precisions or {}).get(name, dtype)
            own = memory if name in denoisers else Memory(memory.offload)
            if (native := native_models.get(class_name)) is not None:
                config = read_config(path / name / "config.json")
                loaded.modules[name] = load_module(
                    native, config, path / name, dtype=kind, device=device, memory=own
                )  # fmt: skip
            else:
                cls = library_class(library, class_name)
                _load_reused(loaded, name, cls, path / name, dtype=kind, device=device, memory=own)
    return loaded


def library_class(library: str, class_name: str) -> type:
    """The class that model_index.json names, from the libraries that porter trusts.

    Raises:
        BadInputError: another library, or a class that it does not have.
    """
    if library not in LIBRARIES and pipeline_module_has(library, class_name):
        return getattr(importlib.import_module(f"diffusers.pipelines.{library}"), class_name)  # type: ignore[no-any-return]
    if library not in LIBRARIES or not class_name.isidentifier():
        raise BadInputError(
            f"component class {library}.{class_name} is not loaded: code from a model repository never runs",
            expected=f"a class of {' or '.join(LIBRARIES)}",
            hint="porter plan <port>",
        )
    found = getattr(importlib.import_module(library), class_name, None)
    if found is None and library == "transformers":  # its image processors were called feature extractors
        found = getattr(
            importlib.import_module(library), class_name.replace("FeatureExtractor", "ImageProcessor"), None
        )
    if not isinstance(found, type):
        version = importlib.import_module(library).__version__
        raise BadInputError(
            f"{library} {version} has no class {class_name}",
            hint=f"pip install --upgrade {library}, or see what is known: porter families",
        )
    return found


def _load_reused(
    loaded: Loaded, name: str, cls: Any, folder: Path, *, dtype: torch.dtype, device: torch.device, memory: Memory
) -> None:
    """Load a component with the library's own class."""
    import diffusers
    import transformers
    from diffusers.models.model_loading_utils import _fetch_remapped_cls_from_config
    from diffusers.models.modeling_utils import LegacyModelMixin
    from transformers.image_processing_base import ImageProcessingMixin

    if issubclass(cls, diffusers.SchedulerMixin):
        loaded.modules[name] = cls.from_config(read_config(folder / _SCHEDULER, constants=True))
    elif issubclass(cls, diffusers.ModelMixin):
        config = read_config(folder / "config.json")
        if issubclass(cls, LegacyModelMixin) and "norm_type" in config:  # one former name for several classes
            cls = _fetch_remapped_cls_from_config(config, cls)
        known = set(inspect.signature(cls.__init__).parameters)
        if unknown := sorted(key for key in config if not key.startswith("_") and key not in known):
            loaded.warnings.append(f"{name}: {cls.__name__} does not know {', '.join(unknown)} in config.json")
        loaded.modules[name] = load_module(cls, config, folder, dtype=dtype, device=device, memory=memory)
    elif issubclass(cls, transformers.PreTrainedModel):
        read_config(folder / "config.json")
        header = component_header(folder)  # refuses damaged files with the tensor's name
        if memory.offload != "none":
            with _readable(folder):
                parked = load_encoder(cls, folder, header, dtype=dtype, device=device, memory=memory)
            if parked is not None:
                loaded.modules[name] = parked
                return
            loaded.warnings.append(
                f"{name} stays on {device}: its files hold other tensors than {cls.__name__}, which are converted"
            )
        options = {"dtype": dtype, "local_files_only": True, "use_safetensors": True, "output_loading_info": True}
        options["variant"] = _weights(folder)[1]
        with _readable(folder):
            model, info = cls.from_pretrained(folder, **options)
        missing, extra = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
        if missing or extra:
            raise _misfit(folder, cls, missing, extra, [])
        loaded.modules[name] = model.to(device).eval()
    elif issubclass(cls, (transformers.PreTrainedTokenizerBase, transformers.ProcessorMixin, ImageProcessingMixin)):
        with _readable(folder):
            loaded.modules[name] = without_videos(cls).from_pretrained(folder, local_files_only=True)
    else:
        raise BadInputError(
            f"{name}: {cls.__name__} is not a model, tokenizer, processor or scheduler", hint="porter plan <port>"
        )


def without_videos(cls: Any) -> Any:
    """A processor class without its part for videos, which no pipeline here reads and which takes another library."""
    if "video_processor" not in getattr(cls, "get_attributes", list)():
        return cls

    def init(self: Any, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None) -> None:
        cls.__init__(self, image_processor, tokenizer, None, chat_template=chat_template)

    # The library reads the parts of a processor from this signature, and writes the name into files.
    return type(cls.__name__, (cls,), {"__init__": init, "__module__": cls.__module__})


def load_module(
    cls: Any, config: Mapping[str, Any], folder: Path, *, dtype: torch.dtype, device: torch.device,
    memory: Memory = EVERYTHING,
) -> nn.Module:  # fmt: skip
    """Build `cls.from_config(config)` without memory, then fill it from the safetensors of `folder`, or have it filled
    whenever it is used.

    A native class names in `on_load` the recipe that packs its weights on the way, and has no tables that its files
    lack; a library's class computes its own, in the types that its library gives them.

    Raises:
        CheckpointError: tensors that are missing, left over or of another shape; all of them are named.
    """
    native = hasattr(cls, "on_load")
    header = component_header(folder) if memory.gguf is None else {}
    with torch.device("meta") if native else _as_the_library_builds(dtype), _readable(folder):
        module: nn.Module = cls.from_config(dict(config))
    if memory.gguf is not None:
        return _from_gguf(cls, config, module, dtype, device, memory)
    recipe = cls.on_load if native else _former_names(module, header)
    ignored = getattr(cls, "_keys_to_ignore_on_load_unexpected", None) or ()  # what its files hold for other programs
    own = module.state_dict().keys() if ignored else ()
    header = {n: i for n, i in header.items() if n in own or not any(re.search(words, n) for words in ignored)}
    plan = _plan(cls, recipe, config, folder, header, module)
    run = mesh.current() if getattr(cls, "on_load", None) is not None else None
    tensor_parallel.distribute(module, plan, run)
    held = _keep(module, plan, dtype, device, memory, run)
    for part in module.modules():  # tables that are in no file
        for name, table in part._buffers.items():
            if table is not None and not table.is_meta:
                part._buffers[name] = table.to(device)
    empty = [n for n, tensor in [*module.named_parameters(), *module.named_buffers()] if tensor.is_meta]
    if unfilled := [n for n in empty if n not in held]:
        raise _misfit(folder, cls, unfilled, [], [])
    return module.eval()


def _keep(
    module: nn.Module, plan: TensorPlan, dtype: torch.dtype, device: torch.device, memory: Memory, run: mesh.Run | None
) -> set[str]:
    """Give a module on the meta device its weights as `memory` says; the names of those that come when it is used.

    In half precision the parts that a class keeps in float32 (`_keep_in_fp32_modules`, as diffusers calls it) stay so.

    Raises:
        UsageError: 8-bit weights that tensor-parallel ranks would share.
    """
    if memory.fp8:
        _check_whole(run)
    home: Home = FileHome(plan, lambda name, _: _precision(module, name, dtype), tensor_parallel.share(run))
    if memory.fp8:
        home = Fp8Home(module, home)
    return keep(module, home, device, memory)


def _from_gguf(
    cls: Any, config: Mapping[str, Any], module: nn.Module, dtype: torch.dtype, device: torch.device, memory: Memory
) -> nn.Module:
    """A native module, on the meta device as yet, with the weights of the GGUF file that `memory` names."""
    _check_whole(mesh.current())
    assert memory.gguf is not None
    own = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    disk = stored_shapes(module, getattr(cls, "on_load", None), config, own)
    home = gguf_home(memory.gguf, cls, config, module, disk, lambda name, _: _precision(module, name, dtype))
    keep(module, home, device, memory)
    return module.eval()


def _check_whole(run: mesh.Run | None) -> None:
    """Raises UsageError: other weights than the stored ones, which tensor-parallel ranks would share."""
    if run is not None and run.size("tp") > 1:
        raise UsageError(
            "tensor-parallel ranks share weights as they are stored", expected="no --weights, or no --tp",
            found="both", hint="leave out --weights, or share the tokens instead: --ulysses or --ring",
        )  # fmt: skip


@contextmanager
def _as_the_library_builds(dtype: torch.dtype) -> Iterator[None]:
    """Tables that a class computes without naming a type are `dtype`, as diffusers' own loading has them."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with parameters_on_meta():
            yield
    finally:
        torch.set_default_dtype(before)


def _former_names(module: nn.Module, header: Header) -> Recipe | None:
    """Tensors that diffusers' attention blocks had under other names, in the autoencoders of older models."""
    rename = getattr(module, "_fix_state_dict_keys_on_load", None)
    if rename is None:
        return None
    names = {name: name for name in header}
    rename(names)
    return on_load("former names", *(Rule(old, new) for new, old in names.items() if new != old))


def packed(cls: Any, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under their names on disk -> the state of a native class, by its on-load recipe.

    Raises:
        RecipeError: a tensor that the recipe packs with others is missing.
    """
    header = {name: spec(ANY, tuple(tensor.shape), name) for name, tensor in tensors.items()}
    return apply(compile_on_load(getattr(cls, "on_load", None), config, header), tensors)


def stored_shapes(
    module: nn.Module, recipe: Recipe | None, config: Mapping[str, Any], own: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """The shapes, under their names on disk, of a module's tensors of the shapes `own`."""
    found: dict[str, tuple[int, ...]] = {}
    for name, stored in on_disk(recipe, config, own).items():
        owner = module.get_submodule(name.rpartition(".")[0])
        rows = owner.outputs if isinstance(owner, PackedLinear) else own[name][:1] or (0,)
        for each, row in zip(stored, rows, strict=True):
            found[each] = own[name] if len(stored) == 1 else (row, *own[name][1:])
    return found


def _plan(
    cls: Any, recipe: Recipe | None, config: Mapping[str, Any], folder: Path, header: Header, module: nn.Module
) -> TensorPlan:
    """What of the files goes where in `module`: every tensor of either side exactly once."""
    own = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    expected = stored_shapes(module, recipe, config, own)
    missing, extra = [n for n in expected if n not in header], [n for n in header if n not in expected]
    shapes = [
        f"{n} is {header[n].shape}, not {shape}"
        for n, shape in expected.items()
        if n in header and header[n].shape != shape
    ]
    if missing or extra or shapes:
        raise _misfit(folder, cls, missing, extra, shapes)
    return compile_on_load(recipe, config, header, {name: spec(ANY, shape, name) for name, shape in own.items()})


def _precision(module: nn.Module, name: str, dtype: torch.dtype) -> torch.dtype:
    """dtype of one of the module's tensors where its weights are to be `dtype`."""
    kept = set(getattr(module, "_keep_in_fp32_modules", None) or ())
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) and kept & set(name.split(".")) else dtype


def component_header(folder: Path) -> Header:
    """Headers of a component's safetensors files, one file or many.

    Raises:
        BadInputError: the folder has no safetensors weights.
        CheckpointError: they break the format.
    """
    file = _weights(folder)[0]
    return read_sharded(file) if file.suffix == ".json" else read_header(file)[0]


def _weights(folder: Path) -> tuple[Path, str | None]:
    """A component's safetensors file, or the index of its shards, and the variant that its name says.

    Beside plain weights a variant is not read; a variant alone is.
    """
    indexes = sorted(folder.glob("*.safetensors.index*.json"))
    whole = [p for p in sorted(folder.glob("*.safetensors")) if not _SHARD.search(p.name)]
    for files in (indexes, whole):
        if plain := [p for p in files if _variant(p) is None]:
            return _only(plain, folder), None
    if variants := [*indexes, *whole]:
        file = _only(variants, folder)
        return file, _variant(file)
    root = folder.parent
    shards = any(folder.glob("*.safetensors"))
    original = sorted(p.name for p in root.glob("*.s*t*") if p.suffix in (".safetensors", ".sft"))
    raise BadInputError(
        f"{folder} holds {'shards without their index' if shards else 'no weights'}"
        + (": the model is in its original layout" if original and not shards else ""),
        expected="*.safetensors in the diffusers layout",
        found=", ".join(original or sorted(p.name for p in folder.glob("*"))) or "nothing",
        hint=f"porter convert {root} -o {root.name}-port",
    )


def _variant(file: Path) -> str | None:
    found = _VARIANT.fullmatch(file.name)
    return (found["early"] or found["late"]) if found else None


def _only(files: list[Path], folder: Path) -> Path:
    if len(files) > 1:
        raise BadInputError(
            f"{folder} holds weights more than once",
            expected="one safetensors file, or one index of shards",
            found=", ".join(p.name for p in files),
            hint="keep the one that belongs to config.json",
        )
    return files[0]


def _misfit(folder: Path, cls: Any, missing: list[str], extra: list[str], shapes: list[str]) -> CheckpointError:
    parts = [("missing", missing), ("unexpected", extra), ("wrong shape", shapes)]
    found = "; ".join(f"{len(names)} {what}: {_some(names)}" for what, names in parts if names)
    first = next(iter([*missing, *extra, *shapes]), "").split(" is ")[0]
    return CheckpointError(
        f"the weights in {folder} do not fill {cls.__name__}, beginning with {first}",
        expected="every parameter filled by exactly one tensor of its shape",
        found=found,
        hint=_AGAIN,
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """What a library raises about a damaged folder, in our words."""
    try:
        yield
    except ImportError as error:
        raise BadInputError(
            f"{folder} needs a package that is not installed", found=str(error).strip().splitlines()[0],
            hint="install it, as the message says",
        ) from error  # fmt: skip
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        if ran_out(error):
            raise
        raise BadInputError(
            f"{folder} cannot be loaded", found=f"{type(error).__name__}: {error}", hint=_AGAIN
        ) from error


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep both libraries' loading bars and notes off the terminal; their settings come back afterwards."""
    import diffusers.utils.logging
    import transformers.utils.logging

    loggings = (diffusers.utils.logging, transformers.utils.logging)
    before = [(logging.get_verbosity(), logging.is_progress_bar_enabled()) for logging in loggings]
    for logging in loggings:
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    try:
        yield
    finally:
        for logging, (level, bars) in zip(loggings, before, strict=True):
            logging.set_verbosity(level)
            if bars:
                logging.enable_progress_bar()
