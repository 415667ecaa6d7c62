"""The page of a result document: one file that needs no network and no script."""

from __future__ import annotations

import base64
import io
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from torch import Tensor

from parity.chart import HEIGHT, WIDTH, module_chart, step_chart
from parity.heat import LEVELS, MODULES, STAGES, module_groups, named, shade, stage_groups
from parity.images import difference
from parity.wording import further, judged, likeness, ratio_text, results, sci, sentence, short, state, uncompared
from porter.core.units import several

BADGES = {"pass": "PASS", "holds": "HOLDS, NO VERDICT", "fail": "FAIL"}


def page(data: dict[str, Any], images: tuple[Tensor, Tensor] | None = None) -> str:
    """The page of a document; everything that it shows is escaped.

    Args:
        images: reference and candidate, each (3, H, W) in [0, 1].
    """
    sections = []
    for component in data["components"]:
        groups = module_groups(component)
        failing = [e for e in component["modules"] if not e["free"]["passed"]]
        sections.append(
            {
                **component,
                "further": further(component),
                "uncompared": uncompared(component),
                "groups": groups,
                "chart": module_chart(component, groups, data["dtype"]),
                "failing": failing,
            }
        )
    pipeline = data["pipeline"]
    if pipeline:
        failing = [v for v in (*pipeline["stages"], *pipeline["guards"]) if not v["passed"]]
        pipeline = {
            **pipeline,
            "groups": stage_groups(pipeline),
            "chart": step_chart(pipeline, data["dtype"]),
            "failing": failing,
        }
    found = environment().get_template("report.html.jinja").render(
        data=data, sections=sections, pipeline=pipeline, results=results(data), verdict=sentence(data),
        state=state(data), pictures=pictures(images), metrics=named(MODULES, data["dtype"]),
        stage_metrics=named(STAGES, data["dtype"]),
        size=(WIDTH, HEIGHT),
    )  # fmt: skip
    return found.strip() + "\n"


def environment() -> Environment:
    """The templates with their filters; a name that they lack is an error."""
    env = Environment(
        loader=PackageLoader("parity"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    env.filters |= {
        "sci": sci,
        "short": short,
        "ratio": ratio_text,
        "count": lambda v: f"{v:,}",
        "judged": judged,
        "likeness": likeness,
        "several": several,
    }
    env.globals |= {
        "badges": BADGES,
        "shades": [[shade(level, dark) for level in range(LEVELS)] for dark in (False, True)],
    }
    return env


def pictures(images: tuple[Tensor, Tensor] | None) -> list[dict[str, str]]:
    """Both sides and their difference, scaled to its largest value, as data URIs with captions."""
    if images is None:
        return []
    reference, candidate = (image.float().nan_to_num().clamp(0, 1) for image in images)
    found = [_picture("reference", reference), _picture("candidate", candidate)]
    if reference.shape == candidate.shape:
        gap, largest = difference(reference, candidate)
        caption = f"difference; white is {sci(largest)}" if largest else "difference: none, every pixel is equal"
        found.append(_picture(caption, gap))
    return found


def _picture(caption: str, image: Tensor) -> dict[str, str]:
    from PIL import Image

    pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png", optimize=True)
    uri = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    return {"caption": caption, "uri": uri, "width": str(image.shape[2]), "height": str(image.shape[1])}
