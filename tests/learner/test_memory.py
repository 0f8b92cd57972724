"Memory that is freed stays with the process; the statistics of layers lie side by side, and can be put back."

import subprocess
import sys

import torch

from learner.batchnorm import BatchNorm
from learner.models import build
from learner.statistics import Statistics

PAGES = """
import resource, sys
from learner.memory import keep_memory
if sys.argv[1] == "kept":
    keep_memory()
def use():
    for size in (2**22, 2**26):
        del [b"x" * size][0]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
before = use()
print(use() - before)
"""


def pages_taken_anew(how: str) -> int:
    "How many pages a process takes from the system to fill memory that it has had before."
    return int(subprocess.run([sys.executable, "-c", PAGES, how], capture_output=True, text=True, check=True).stdout)


def test_memory_that_was_freed_is_not_taken_from_the_system_again() -> None:
    assert pages_taken_anew("kept") < 100
    assert pages_taken_anew("as it comes") > 1000 or not sys.platform.startswith("linux")


def test_statistics_are_put_back_and_the_layers_go_on_with_them() -> None:
    model, twin = build("simple_cnn_bn", 3, 10), build("simple_cnn_bn", 3, 10)
    twin.load_state_dict(model.state_dict())
    statistics, x = Statistics(model), torch.randn(4, 3, 8, 8)
    model(x), twin(x)
    statistics.keep()
    after_one = [buffer.clone() for buffer in model.buffers()]
    model(2 * x)
    assert not torch.equal(model.buffers()[0], after_one[0])
    statistics.put_back()
    model(x), twin(x)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers(), strict=True))


def test_statistics_of_a_model_are_one_tensor() -> None:
    model = build("simple_cnn_bn", 3, 10)
    statistics = Statistics(model)
    assert len(statistics.flats) == 1
    statistics.apply(lambda flat: flat.fill_(3))
    layers = [module for module in model.modules() if isinstance(module, BatchNorm)]
    assert all((layer.running_mean == 3).all() and (layer.running_var == 3).all() for layer in layers)
    assert Statistics(build("simple_cnn", 3, 10)).flats == []
