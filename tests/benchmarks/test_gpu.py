"What of the GPU's benchmark runs without one."

from benchmarks.gpu import covered


def test_what_kernels_do_at_once_counts_once() -> None:
    assert covered([(3, 4), (0, 1), (0.5, 2), (3.2, 3.5)]) == 3
    assert covered([]) == 0
