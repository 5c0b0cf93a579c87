"""Times each method against the stock Keras model that it is made of.

From the root of the project:

    python train/benchmark.py
    python train/benchmark.py --networks=cifar10_1 --methods=fa,fa_usf_sn,dfa
    python train/benchmark.py --helpfull

It prints a table for each network and dtype policy and writes <out>.md and,
with every single time, <out>.json. experiment/timing says how
it is measured.
"""

import json
import sys
from pathlib import Path

import experiment  # noqa: F401 - before anything imports Keras

# isort: split
from experiment import commandline
from experiment import files
from experiment import startup
from experiment.errors import UserError
from experiment.timing import biotorch
from experiment.timing.measure import INPUT_SIZE
from experiment.timing.measure import measure
from experiment.timing.measure import measure_input
from experiment.timing.memory import accelerator
from experiment.timing.memory import peak_in_new_process
from experiment.timing.options import FLAGS
from experiment.timing.report import input_table
from experiment.timing.report import report
from experiment.timing.report import surroundings
from experiment.timing.report import table
from experiment.timing.trainees import BACKEND
from keras_fa.methods import METHODS


def benchmark() -> None:
    """The program."""
    out = Path(FLAGS.out).expanduser()
    files.check_writable(
        out.parent,
        f"--out={out}",
        "Give the path of the files without their suffix.",
    )
    if FLAGS.profile and (BACKEND != "tensorflow" or accelerator()):
        raise UserError(
            "--profile: operations are told apart by TensorFlow on a CPU, and "
            f"Keras computes with {BACKEND} on {accelerator() or 'the CPU'}. "
            "Leave it out."
        )
    if FLAGS.peer:
        biotorch.check()
        if accelerator():
            raise UserError(
                f"--peer={FLAGS.peer} is timed on the CPU, and Keras computes "
                f"on {accelerator()}. Hide it (CUDA_VISIBLE_DEVICES=''), or "
                "leave --peer out."
            )
    if FLAGS.input:
        if not startup.installed("tensorflow", "tensorflow_datasets"):
            raise UserError(
                f"--input={FLAGS.input}: photos are read by TensorFlow "
                "Datasets. Install tensorflow and tensorflow-datasets, or "
                "leave --input out."
            )
        from experiment.datasets.photos import Photos

        photos = Photos(FLAGS.input, INPUT_SIZE)
    # Before this process itself takes an accelerator.
    cases = [(n, p) for n in FLAGS.networks for p in FLAGS.dtype_policies]
    peaks = {case: {} for case in cases}
    for case in cases if FLAGS.memory else []:
        for name in ["stock", *FLAGS.methods]:
            peaks[case][name] = peak_in_new_process(
                *case,
                name if name in METHODS else None,
                FLAGS.feedback_maps,
                FLAGS.batch_size,
                FLAGS.steps_per_execution,
            )
    results = surroundings()
    if FLAGS.input:
        results["input"] = measure_input(photos)
        print(input_table(results["input"]), flush=True)
    results["results"] = []
    for case in cases:
        results["results"].append(measure(*case, peaks[case]))
        print(table(results["results"][-1]), flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    for suffix, text in {
        ".json": json.dumps(results, indent=1) + "\n",
        ".md": report(results),
    }.items():
        path = out.with_name(out.name + suffix)
        files.replace(path, lambda aside, text=text: aside.write_text(text))
        print(path)


def run(argv: list[str]) -> int:
    """Runs the program on a command line and returns its exit status."""
    return commandline.run(
        argv, FLAGS, benchmark, __doc__, "Nothing was written."
    )


if __name__ == "__main__":
    sys.exit(run(sys.argv))
