"""Cross-entropy and prediction of bilinearly resized logits, without the resized logits.

Logits at stride 8 have 1/64 of the labels' pixels. Their resized map, (N, C, H, W), is the largest
tensor of a step, and the plain form writes and reads it several times. Here it exists in blocks
that stay in a cache (``bands``, a CPU) or in registers (``tiles``, Triton on a GPU).
"""

from kdprof.resized.bilinear import resize_backward
from kdprof.resized.cross_entropy import resized_cross_entropy
from kdprof.resized.prediction import resized_argmax

__all__ = ["resize_backward", "resized_argmax", "resized_cross_entropy"]
