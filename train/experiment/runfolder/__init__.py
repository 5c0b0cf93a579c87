"""The folder of a run: what is in it, how it is continued.

    model.keras     the model as it was last saved; also the checkpoint: besides
                    Keras's own members the archive holds `run.json` with the
                    settings, the rows of the history, how far the epoch under
                    way is, and the state of the random generators, which Keras
                    does not save
    model.1.keras   the one before; there may be more
    history.csv     one row an epoch
    result.json     written when the run is finished
    .lock           held by the process that is at the run

All of them are written aside and then renamed, so a file is the old or the
new one, never half of it. One file holds all that a run is continued from, so
the parts of a checkpoint cannot belong to different steps; `history.csv` is
written anew from it. Where the newest checkpoint is damaged all the same, the
run goes on from the one before, and learns what it has learned before.

TensorBoard's events are written as they come: where a run was killed and goes
on, those behind its checkpoint are there twice, with equal values.
"""
