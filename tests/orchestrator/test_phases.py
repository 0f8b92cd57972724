"Start-up times: phases follow each other without a gap, from the very start of the process."

import subprocess
import sys
import time

from orchestrator.phases import CLOCK, Phases, process_start


def test_a_process_knows_when_it_began() -> None:
    code = "from orchestrator.phases import process_start; print(process_start())"
    before = time.clock_gettime(CLOCK)
    told = float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout)
    assert before - 0.02 <= told <= time.clock_gettime(CLOCK), "a tick of the kernel's clock is 0.01 s"
    assert process_start() <= before


def test_phases_add_up() -> None:
    phases, began = Phases(), process_start()
    for name in ("import", "data"):
        phases.done(name)
    whole = time.clock_gettime(CLOCK) - began
    assert abs(whole - sum(phases.seconds.values())) < 1
    assert list(phases.seconds) == ["import", "data"] and "import" in str(phases)
