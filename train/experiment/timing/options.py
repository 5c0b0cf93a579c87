"""The flags of the benchmark."""

from absl import flags

from experiment import commandline
from experiment.timing import biotorch
from experiment.timing.trainees import DTYPE_POLICIES
from experiment.timing.trainees import NETWORKS
from keras_fa.methods import METHODS

PROBE_SIZE = 256
MONITOR = f"alignment monitor, {PROBE_SIZE} images"

FLAGS = flags.FlagValues()
define = commandline.definers(FLAGS)

commandline.define_names(
    FLAGS,
    "networks",
    ["cifar10_1", "cifar10_2"],
    NETWORKS,
    "Networks, separated by commas.",
)

commandline.define_names(
    FLAGS,
    "methods",
    list(METHODS),
    METHODS,
    "Methods. The stock model is always there; a method whose maps do not fit "
    "into memory is left out, with a line that says so.",
    least=1,
)

commandline.define_names(
    FLAGS,
    "dtype_policies",
    ["float32", "mixed_bfloat16"],
    DTYPE_POLICIES,
    "Policies. On a CPU without bfloat16 arithmetic a convolution's gradients "
    "take some 30 times as long in it.",
    least=1,
)

define.integer("batch_size", 128, "Images a step.", lower_bound=1)

define.integer(
    "steps",
    10,
    "Training steps in a block, a multiple of --steps_per_execution.",
    lower_bound=1,
)

define.integer(
    "rounds", 10, "Blocks that each model trains, at least 2.", lower_bound=2
)

define.integer(
    "steps_per_execution",
    1,
    "Training steps per call of the compiled function.",
    lower_bound=1,
)

define.enum(
    "feedback_maps",
    "dense",
    ["dense", "convolutional"],
    "Form of the fixed maps of DFA and DenseFA.",
)

define.bool(
    "monitor",
    True,
    f"Whether to time the alignment monitor, too, on {PROBE_SIZE} images.",
)

define.bool(
    "memory",
    True,
    "Whether to measure the peak of memory: a process for each row.",
)

define.bool(
    "profile",
    False,
    "Whether to tell where the time goes: the milliseconds of each kind of "
    "operation in a step, by TensorFlow's profiler, on a CPU.",
)

define.float(
    "peak_tflops",
    0.0,
    "What the accelerator can do in the dtype policy at hand, in 10^12 "
    "operations a second, to tell the share of it; 0 leaves the column out.",
    lower_bound=0.0,
)

define.enum(
    "peer",
    None,
    ["biotorch"],
    "Another implementation to time in turn with ours, on the CPU in float32. "
    f"biotorch: {biotorch.INSTALL}",
)

define.string(
    "input",
    None,
    "The --data_dir of ImageNet, to measure how fast its training batches are "
    "made. To measure nothing else: --networks= with it.",
)

define.string(
    "out", "runs/benchmark", "Where to write: <out>.json and <out>.md."
)

flags.register_multi_flags_validator(
    ["networks", "input"],
    lambda given: given["networks"] or given["input"],
    "--networks and --input are empty: there is nothing to measure",
    flag_values=FLAGS,
)

flags.register_multi_flags_validator(
    ["steps", "steps_per_execution"],
    lambda given: given["steps"] % given["steps_per_execution"] == 0,
    "--steps must be a multiple of --steps_per_execution",
    flag_values=FLAGS,
)
