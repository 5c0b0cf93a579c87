"""How time is measured. One stock model is converted to each method; all are
compiled alike (SGD with momentum 0.9) and fed one batch of random images again
and again. After a block that traces and compiles, they train in turn: in every
round each trains one block of --steps steps through `fit`, with its method's
callbacks, in an order drawn anew. A block's time runs from the end of its first
execution, when the loss has been read and so the device is idle, to that of
the last one. A ratio is that of two blocks of one round, so that what slows the
whole machine down for a while falls out: its median over the rounds and the
quartiles. In turn as well, each model predicts blocks of --steps batches.

Feedback bytes are those of all variables which the converted model has and
the stock model has not. The peak of memory is that of a process of its own
which builds the model and trains a few steps, less what it held before:
resident memory on a CPU, the device's own count on an accelerator. The
alignment monitor's row is one measurement on a probe of 256 images, as a
multiple of one training step. With --input, training batches of ImageNet are
made and dropped. With --peak_tflops, the share of the peak is that of the
operations that backpropagation needs,

    2 batch (3 (sum of all layers' multiply-adds) - (the first layer's)),

the forward pass, the gradient of each kernel and that of each layer's input
but the first's, for whatever method: normalizations and activations are not
counted.
"""
