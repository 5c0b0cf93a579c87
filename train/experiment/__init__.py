"""What the programs of this folder are made of.

    settings.py    the table of settings: flags, their bounds, what a recipe is
    run.py         a run: data, model, training, report
    model.py       a network under a method, and its optimizer
    datasets/      a data set is an entry of DATASETS
    networks/      a network is an entry of NETWORKS
    devices/       a way to distribute is an entry of STRATEGIES
    runfolder/     what a run writes, and how it is continued
    table/         the paper's columns, sweeps over them, cells, figures
    timing/        what the benchmark measures
    board.py       what TensorBoard shows
    commandline.py, console.py, errors.py, files.py, markdown.py, startup.py

It is imported before anything that imports Keras.
"""

from experiment import startup as startup
