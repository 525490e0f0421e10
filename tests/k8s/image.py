"""The image as its Dockerfile says, for containers that are started without it."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from tests.k8s.rendering import ROOT


@dataclass(frozen=True, slots=True)
class Image:
    """What a container takes from its image: entry point, arguments, environment, ports to listen on, user."""

    entrypoint: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    ports: tuple[int, ...] = ()
    user: str = ""

    @classmethod
    def read(cls, dockerfile: Path, target: str) -> Image:
        """The stage named `target`, on those that it begins from."""
        stages: dict[str, Image] = {}
        image, name = cls(), ""
        for instruction, value in _instructions(dockerfile.read_text(encoding="utf-8")):
            match instruction:
                case "FROM":
                    base, _, name = re.sub("--[^ ]+ ", "", value).partition(" AS ")
                    image = stages.get(base, cls())
                case "ENV":
                    pairs = (pair.partition("=") for pair in shlex.split(value))
                    image = replace(image, env=image.env | {key: text for key, _, text in pairs})
                case "EXPOSE":
                    image = replace(image, ports=tuple(map(int, value.split())))
                case "USER":
                    image = replace(image, user=value)
                case "ENTRYPOINT":
                    image = replace(image, entrypoint=tuple(json.loads(value)), arguments=())
                case "CMD":
                    image = replace(image, arguments=tuple(json.loads(value)))
            stages[name] = image
        return stages[target]

    def installed_here(self) -> Image:
        """The image with this checkout and its environment in place of what the image has under /opt/hsrpc/bin."""
        binaries = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        env = self.env | {"PATH": self.env["PATH"].replace("/opt/hsrpc/bin:$PATH", binaries)}
        return replace(self, env=env | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})


def find_image(reference: str) -> Image | None:
    """The image of this repository that a manifest names, such as registry/hsrpc:0.2.0-cpu; None: another's."""
    name, _, tag = reference.rpartition("/")[2].partition(":")
    target = tag.partition("@")[0].rpartition("-")[2]
    return Image.read(ROOT / "Dockerfile", target).installed_here() if name == "hsrpc" else None


def _instructions(text: str) -> list[tuple[str, str]]:
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    joined = re.sub(r"\\\n\s*", " ", lines)
    return [(word, value.strip()) for word, _, value in (line.partition(" ") for line in joined.splitlines() if line)]
