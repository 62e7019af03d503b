"""Compare the Triton kernels with torch's operators, on the CPU.

It is a program of its own, because Triton's interpreter must be chosen (TRITON_INTERPRET=1) before
Triton is imported. It raises where the two differ.
"""

import torch

from kdprof.methods import _pair_triton, _pairs

SIDE = 16
"""Of a tile; the maps are smaller than one, or several that they do not fill."""

for pairs, positions in ((2, 5), (3, 21)):
    for both in (True, False):
        student, teacher = 20 * torch.rand(2, pairs, positions, positions) - 10
        slope, lost = student.clone(), teacher.clone()
        expected = _pairs.compare_maps(slope, lost, both)
        tiles = torch.full((2, 3, pairs, -(-positions // SIDE), positions), torch.nan)
        _pair_triton.tile_sums(student, teacher, tiles, SIDE)
        sums = tiles.sum(3)
        torch.testing.assert_close(sums, expected, rtol=1e-5, atol=1e-5)
        _pair_triton.write_slope(student, teacher, sums, both, SIDE)
        torch.testing.assert_close(student, slope, rtol=1e-5, atol=1e-6)
        print(pairs, positions, both)
