"""What a CPU can't prove, tried on a GPU: correctness first, then speed and memory beside trl's.

    make gpu                                                 # all of it, appended to benchmarks/RESULTS.md
    python -m benchmarks.gpu --only attention rows           # some checks
    python -m benchmarks.gpu --device cpu --toy              # every branch at toy size: figures that tell nothing

Needs no network: weights, tokenizer and rows are made here, those of the large LLM on the GPU, quantized one matrix at
a time. Each check is a process of its own, or shares one with those that load the same weights, and prints one line as
soon as it ends; what crashes, hangs or runs out of memory leaves the others. They run in order of value, and those that
don't fit into `--seconds` are skipped.

attention   the kernel for segments of many lengths beside SDPA a segment, against float64, with gradients
rows        packed rows and shared prefixes against separate rows: losses and gradients in bfloat16 and float16
nf4         gradients through 4-bit weights, with activation checkpoints, against the same weights dequantized
float16     training with a loss scaler, without the kernel for segments, as on a T4, against float32
answers     generated tokens against whole forward passes; batches and the server's engine against one question alone
merge       merges compared on the GPU, and in memory beside a GPU that has no room
k=1, k=5    training a 7B-shaped LLM in nf4 with pictures of 576 tokens from an encoder of CLIP-L/336's shape, 1 and 5
            questions a picture (`benchmarks.train_vs_trl`): ours, then trl, each in a process that loads the LLM; then
            with compiled layers, with and without Liger's kernels, and with activation checkpoints, again a process a
            side. A step has about as many samples on both sides; trl computes at most as many tokens
            at once as a row of ours may hold, and accumulates the rest.
"""
