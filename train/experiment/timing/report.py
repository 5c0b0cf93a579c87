"""What the benchmark writes, and where it ran."""

import datetime
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from experiment import markdown
from experiment import startup
from experiment.timing import biotorch
from experiment.timing.memory import accelerator
from experiment.timing.options import FLAGS
from experiment.timing.trainees import BACKEND

# Environment variables that change what is timed.
ENVIRONMENT = (
    "KERAS_BACKEND",
    "TF_ENABLE_ONEDNN_OPTS",
    "TF_XLA_FLAGS",
    "XLA_FLAGS",
    "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
)


def table(result: dict[str, Any]) -> str:
    """An entry of `results` as Markdown."""
    stock = result["rows"][0]
    heads = ["method", "ms/step", "ratio (quartiles)", "images/s"]
    heads += ["predict, ratio (quartiles)"]
    heads += ["feedback bytes", "peak memory"]
    peak = "share_of_peak" in stock
    heads += ["share of peak"] if peak else []
    lines = []
    for row in result["rows"]:
        cells = [
            row["name"],
            f"{1e3 * row['median_seconds']:.2f}",
            _spread(row["ratio"]),
            _number(row.get("images_per_second"), ",.0f"),
            _spread(row.get("prediction_ratio")),
            _number(row.get("feedback_bytes"), ",d"),
            _memory(row.get("peak_memory_bytes"), stock["peak_memory_bytes"]),
        ]
        cells += [_number(row.get("share_of_peak"), ".1%")] if peak else []
        lines.append(cells)
    text = [
        f"## {result['network']}, {result['dtype_policy']}\n",
        markdown.table(heads, lines, "right"),
        "",
    ]
    for row in result["rows"]:
        if row.get("ours_is_faster_by"):
            text.append(
                f"- {biotorch.COUNTERPARTS[row['name']]}: "
                f"{_spread(row['ours_is_faster_by'])} times the images/s of "
                f"{row['name']}"
            )
    for row in result["rows"]:
        spent = row.get("milliseconds_by_operation", {})
        if spent:
            text.append(
                f"- {row['name']}, {sum(spent.values()):.1f} ms of operations "
                "a step: "
                + ", ".join(f"{k} {v:.1f}" for k, v in [*spent.items()][:12])
            )
    for name, why in result["left_out"].items():
        text.append(f"- left out: {name}: {why}")
    return "\n".join(text).rstrip() + "\n"


def input_table(result: dict[str, Any]) -> str:
    """The entry `input` as Markdown."""
    size = result["image_size"]
    return (
        f"## input, {result['photos']:,d} photos of ImageNet to {size}x{size}"
        f"\n\n{result['images_per_second']:,.0f} images/s, "
        f"{result['images_per_second_and_core']:,.0f} a core\n"
    )


def _spread(ratio: dict[str, float] | None) -> str:
    if ratio is None:
        return "-"
    return (
        f"{ratio['median']:.3f} ({ratio['first_quartile']:.3f} to "
        f"{ratio['third_quartile']:.3f})"
    )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _memory(value: int | None, stock: int | None) -> str:
    if value is None or not stock:
        return "not measured"
    return f"{value / 2**20:,.0f} MiB ({value / stock:.2f})"


def report(results: dict[str, Any]) -> str:
    """The Markdown file."""
    machine, versions = results["machine"], results["versions"]
    git = results["git"] or {"commit": "not known", "dirty": False}
    memory = "memory not measured"
    if machine["memory_bytes"]:
        memory = f"{machine['memory_bytes'] / 2**30:.0f} GiB"
    settings = results["settings"]
    environment = [f"{k}={v}" for k, v in results["environment"].items()]
    return "\n".join(
        [
            "# Benchmark\n",
            f"- command: `{' '.join([*environment, *results['command']])}`",
            f"- date: {results['date']}",
            f"- machine: {machine['cpu']}, {machine['cores']} cores, {memory}, "
            f"accelerator: {machine['accelerator'] or 'none'}",
            "- versions: "
            + ", ".join(f"{name} {v}" for name, v in versions.items()),
            f"- commit: {git['commit']}"
            + (", changed" if git["dirty"] else ""),
            f"- batch {settings['batch_size']}, SGD with momentum 0.9, "
            f"{settings['rounds']} rounds of {settings['steps']} steps, "
            f"{settings['steps_per_execution']} a call\n",
            *([input_table(results["input"])] if "input" in results else []),
            *map(table, results["results"]),
        ]
    )


def surroundings() -> dict[str, Any]:
    """What a reader has to know of the machine and the software."""
    peers = ["biotorch", "torch"] if FLAGS.peer else []
    return {
        "command": ["python", "train/benchmark.py", *sys.argv[1:]],
        "environment": {
            name: os.environ[name] for name in ENVIRONMENT if name in os.environ
        },
        "date": datetime.datetime.now(datetime.UTC).isoformat("T", "seconds"),
        "machine": {
            "cpu": _cpu(),
            "cores": cores(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE")
            * os.sysconf("SC_PHYS_PAGES")
            if hasattr(os, "sysconf")
            else None,
            "accelerator": accelerator(),
        },
        "versions": {
            **startup.versions("keras_fa", "keras", BACKEND),
            **{peer: metadata.version(peer) for peer in peers},
        },
        "git": _git(),
        "settings": {"backend": BACKEND, **FLAGS.flag_values_dict()},
    }


def _cpu() -> str:
    known = Path("/proc/cpuinfo")
    for line in known.read_text().splitlines() if known.exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))  # those that we may use
    return os.cpu_count()


def _git() -> dict[str, Any] | None:
    """The commit of this checkout, or `None` where it is none."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent,
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()

    try:
        changes = git("status", "--porcelain", "--untracked-files=no")
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(changes)}
    except (OSError, subprocess.CalledProcessError):
        return None
