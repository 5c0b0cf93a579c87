"""How time is measured. One stock model is built and converted to each method;
all are compiled alike (SGD with momentum 0.9) and fed one batch of random
images again and again, so that no data pipeline is measured. After a block
that traces and compiles, they train in turn: in every round each model trains
one block of --steps steps through `fit`, with the callbacks of its method, in
an order drawn anew for each round. A block's time runs from the end of its
first execution, when the loss has been read and so the device is idle, to the
end of the epoch, where Keras has read the loss of the last one. A ratio is
that of two blocks of the same round, so that what slows the whole machine
down for a while falls out. Reported are the median over the rounds, the
quartiles, and the number of rounds. Then, in turn as well, each model predicts
blocks of --steps batches.

Feedback bytes are those of all variables which the converted model has and
the stock model has not; the memory of a compiled step comes on top. The peak
of memory is that of a process of its own which builds the model and trains a
few steps, less what it held before: resident memory on a CPU, the device's
own count on an accelerator. The alignment monitor's row is one measurement on
a probe of 256 images, as a multiple of one training step on a batch. With
--input, training batches of ImageNet are made and dropped, in turn by the
pipeline that training has and by one which decodes each photo whole before it
cuts out the window; all else in the two is the same. With --peak_tflops, the
share of the peak is that of the operations that backpropagation needs,

    2 batch (3 (sum of all layers' multiply-adds) - (the first layer's)),

the forward pass, the gradient of each kernel and that of each layer's input
but the first's, for whatever method: normalizations and activations are not
counted.
"""
