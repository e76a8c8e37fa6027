"""The tables of a benchmark as CSV, JSON and Markdown, with the machine's data."""

import csv
import json
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import diffusers
import psutil
import torch

from toma_fx.tables import Table

PACKAGES = ("toma-fx", "torch", "diffusers", "transformers", "triton", "torchao", "tomesd", "numpy")
SUFFIXES = (".json", ".csv", ".md")


@dataclass(kw_only=True)
class Record:
    """All tables of one command. Files are written again after each table."""

    command: str
    folder: Path | None = None
    """Folder of the files; None writes no files."""
    tables: list[Table] = field(default_factory=list)
    started: datetime = field(default_factory=lambda: datetime.now(UTC))
    _stem: Path | None = field(default=None, repr=False)

    def add(self, table: Table) -> None:
        """Keep a table, and bring the files up to date."""
        self.tables.append(table)
        if self.folder is not None:
            self._write(self.folder)

    @property
    def files(self) -> tuple[Path, ...]:
        """The files written so far."""
        return () if self._stem is None else tuple(beside(self._stem, s) for s in SUFFIXES)

    @property
    def stem(self) -> Path | None:
        """Path of the files without their suffixes; None when none are written."""
        return self._stem

    def content(self) -> dict[str, Any]:
        """The whole record as JSON takes it: date, command, hardware, versions and tables."""
        return {
            "date": self.started.isoformat(timespec="seconds"),
            "command": self.command,
            **environment(),
            "tables": [_plain(table) for table in self.tables],
        }

    def _write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if self._stem is None:
            self._stem = _unused(folder / f"{self.started:%Y-%m-%d}-{slug(device_name())}")
        whole = self.content()
        about = {key: value for key, value in whole.items() if key != "tables"}
        beside(self._stem, ".json").write_text(json.dumps(whole, indent=1) + "\n")
        rows = [{"table": t.title, **_flat(row)} for t in self.tables for row in t.rows]
        with beside(self._stem, ".csv").open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(dict.fromkeys(key for row in rows for key in row)))
            writer.writeheader()
            writer.writerows(rows)
        texts = [f"## {t.title}\n\n{t.text('github').partition(chr(10))[2]}" for t in self.tables]
        head = "\n".join(f"* {key}: {_inline(value)}" for key, value in about.items())
        beside(self._stem, ".md").write_text("\n\n".join([head, *texts]) + "\n")


def environment() -> dict[str, Any]:
    """Hardware and versions."""
    versions = {name: _version(name) for name in PACKAGES}
    found: dict[str, Any] = {
        "device": device_name(),
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_cores": os.cpu_count(),
        "cpu_threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version for name, version in versions.items() if version},
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties()
        found |= {
            "gpu_memory_bytes": properties.total_memory,
            "gpu_multiprocessors": properties.multi_processor_count,
            "gpu_capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
        }
    return found


def device_name() -> str:
    """Name of the GPU, or of the CPU when there is none."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name()


def machine() -> str:
    """Hardware and versions in one line, for under a table."""
    return (
        f"{device_name()}, {torch.get_num_threads()} CPU threads, "
        f"Python {platform.python_version()}, "
        f"torch {torch.__version__}, diffusers {diffusers.__version__}"
    )


def slug(text: str) -> str:
    """A text as part of a file name.

    >>> slug("NVIDIA H200")
    'nvidia-h200'
    """
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def beside(stem: Path, ending: str) -> Path:
    """A file beside the others of a record; ``with_suffix`` would cut a device's name at a dot."""
    return stem.with_name(stem.name + ending)


def _unused(stem: Path) -> Path:
    """The stem, with a number when an earlier run of the day has it, so that no result is lost."""
    count, free = 1, stem
    while any(beside(free, suffix).exists() for suffix in SUFFIXES):
        count += 1
        free = beside(stem, f"-{count}")
    return free


def _plain(table: Table) -> dict[str, Any]:
    return {
        "title": table.title,
        "rows": [dict(row) for row in table.rows],
        "notes": list(table.notes),
    }


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """Lists as text, parted by spaces."""
    return {
        key: " ".join(map(str, value)) if isinstance(value, list | tuple) else value
        for key, value in row.items()
    }


def _inline(value: Any) -> str:
    return (
        ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else f"{value}"
    )


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()
