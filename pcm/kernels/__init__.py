"""What is computed otherwise than plain torch would, on CPUs. Models do not mention it: it is put in from outside.

row_randomness  `with RowRandomness(seeds):` around a training step (cluster.training.step). A promise rather than a
                speed-up: 1 and 4 workers draw the same, resuming is exact.
                Twin: each row alone, drawn element by element (tests/pcm/kernels/test_row_randomness.py).
packed_linear   `for_decoding(model, rows=...)` before a search (pcm.captioners.captioner.decode_captions).
                Twin: nn.Linear, and a whole network's logits and captions (tests/pcm/kernels/test_packed_linear.py).
quantised       patch features in 8 bits, half the memory, cache and transfer of float16.
                Twin: the float16 features, to half a step (tests/pcm/kernels/test_quantised.py).

Figures: benchmarks/README.md. A kernel that gains less than 5 % of a training step or of a beam search has no place
here. Of those that had one, at the published size, batch 32: oneDNN's products saved 2 to 3 % of a training step,
dropout fused with the addition after it 0.2 %, with the ReLU before it 0.5 %, clipping gradients in one pass 0.5 %, a
fused log-softmax and gather nothing.
"""
