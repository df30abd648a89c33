"""What the metadata of installed packages say of `ray` where it is hpcray (`hpcray.ray_alias`)."""

from __future__ import annotations

from importlib.metadata import Distribution
from os import PathLike
from typing import Any

from hpcray.ray_alias import RAY_VERSION


class RayDistribution(Distribution):
    """A package without files."""

    def read_text(self, filename: str) -> str | None:
        if filename != "METADATA":
            return None
        return f"Metadata-Version: 2.1\nName: ray\nVersion: {RAY_VERSION}\nSummary: hpcray, under Ray's name\n"

    def locate_file(self, path: str | PathLike[str]) -> Any:
        raise FileNotFoundError(f"{path}: hpcray stands in for ray here, and has none of its files")
